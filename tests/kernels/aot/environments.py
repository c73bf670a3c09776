"""Which Triton compiles: the one that is installed, the oldest that pyproject.toml allows, or any other.

Another Triton than the installed one lies in a folder of its own under build/, which PYTHONPATH puts before the rest:
PyTorch imports no Triton by itself, and no kernel runs, so it need not be the Triton of this PyTorch.

    python -m tests.kernels.aot.environments oldest    brings that Triton
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build"


def installed() -> str:
    """The version of the Triton that is installed, whatever PYTHONPATH puts before it from build/."""
    path = [entry for entry in sys.path if not Path(entry).absolute().is_relative_to(BUILD)]  # links, too
    return next(iter(importlib.metadata.distributions(name="triton", path=path))).version


def version_of(name: str) -> str:
    """The version that "newest" (the installed one), "oldest" (pyproject.toml's least) or a version stands for."""
    if name == "newest":
        return installed()
    if name == "oldest":
        least = re.search(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert least is not None, "pyproject.toml names no least Triton"
        name = least[1]
    return ".".join((*name.split("."), "0", "0")[:3])


def folder_of(version: str) -> Path | None:
    """Where this Triton lies or would lie; None for the installed one."""
    return None if version == installed() else BUILD / f"triton-{version}"


def install(version: str) -> None:
    """Brings this Triton into its folder, if it is not there; it appears there whole or not at all."""
    folder = folder_of(version)
    if folder is None or folder.is_dir():
        return
    partial = BUILD / f"partial-triton-{version}-{os.getpid()}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*pip, "--target", partial, f"triton=={version}"], check=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def environment(version: str) -> dict[str, str]:
    """The environment of a process that compiles with this Triton, into a cache of its own, and interprets nothing."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = folder_of(version)
    path = [str(ROOT)] if folder is None else [str(folder), str(ROOT)]
    return variables | {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(BUILD / f"aot-cache-{version}")}


if __name__ == "__main__":
    install(version_of(sys.argv[1]))
