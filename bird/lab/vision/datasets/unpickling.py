"""Arrays out of pickles without running what else a pickle could hold.

The official CIFAR and ImageNet-32 batches are pickled dicts of a NumPy array and lists. A pickle is a program,
and can call whatever it names; here it may name what rebuilds an array, and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def _encode(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in a pickle: Python 3 writes bytes as latin-1 text in the older protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes as {encoding!r} text")
    return text.encode("latin1")


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # NumPy's own, which has moved from module to module
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 2
    ("_codecs", "encode"): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Every global that a pickle names comes through here."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such file needs: refused")
        return _ALLOWED[module, name]


def load_batch(path: Path) -> dict[str, Any]:
    """Read a pickled dict of arrays, lists, numbers and strings, as Python 2 or 3 wrote it.

    Returns:
        the dict, its keys as str.

    Raises:
        ValueError: the file names any other global (which is not called), is cut short, or holds no dict.
    """
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a broken pickle fails in any way: EOFError, KeyError, UnicodeDecodeError, ...
            raise ValueError(f"{path}: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a pickled {type(content).__name__}, not a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
