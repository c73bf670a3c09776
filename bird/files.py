"""Atomic writing: under its final name a file is either complete or absent."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial."  # prefix of files that are being written: .partial.1f9a20c4.NAME


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a new file beside ``path`` to write to; it is renamed to ``path``, or removed after an exception.

    Its name is random, so several processes can write ``path`` at once (the last one wins) and no link is followed.
    The contents are synced to disk before the rename, and the rename before the block is left.
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
    if os.name == "posix":  # the rename is durable once the folder is synced, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(data: Any, path: Path) -> None:
    """Write data as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
