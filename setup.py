"""Nothing but the optional native extension; all the rest stands in pyproject.toml.

``BIRD_BUILD_EXT`` says what to do about native code: ``0`` (the default) never builds it, ``1`` builds it or
fails, ``auto`` builds it where that is possible. This release has no native sources: ``0`` and ``auto`` are
the same.
"""

import os

from setuptools import setup

choice = os.environ.get("BIRD_BUILD_EXT", "0")
if choice not in ("0", "1", "auto"):
    raise SystemExit(f"BIRD_BUILD_EXT={choice!r} is not understood: use 0, 1 or auto")
if choice == "1":
    raise SystemExit(
        "BIRD_BUILD_EXT=1 asks for the native extension, but this release has no native sources: "
        "unset it (or set 0 or auto) to install the pure Python package, Triton kernels included"
    )

setup()
