"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial."  # begins the names of files that are being written: .partial.1f9a20c4.NAME


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a new file beside ``path`` to write to; it becomes ``path`` in one step, or is removed after an exception.

    Its name is new, so that several processes can write ``path`` at once (the last one stays) and no link is followed.
    The contents reach the disk before the name does, and the name before the block is left.
    """
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}.{path.name}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # a folder is a file there, and the new name is in it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(data: Any, path: Path) -> None:
    """Write plain data as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
