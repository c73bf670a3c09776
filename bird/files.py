"""Files that are whole or not there, say which version of their format they have, and show damage."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1  # of what is written; raised when a file would mislead the version before
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


def read_json(path: Path, advice: str) -> Any:
    """Plain data out of a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read now.
        ValueError: it is damaged, or something else: what to do, as ``advice`` says.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with too many digits
        raise ValueError(f"{path} is damaged ({error}): {advice}") from error


def write_checked(data: Mapping[str, Any], path: Path) -> None:
    """Write an object as JSON, atomically, with the version of its format and a checksum, for `read_checked`."""
    plain = json.loads(json.dumps({**data, "format": FORMAT}))  # as it will be read: names as strings, tuples as lists
    write_json(plain | {"sha256": _checksum(plain)}, path)


def read_checked(path: Path, advice: str) -> dict[str, Any]:
    """What `write_checked` wrote; or an object without version and checksum, as they were once written.

    Raises:
        OSError: there is no such file, or it cannot be read now.
        ValueError: it is damaged, something else, or of a later version: what to do.
    """
    found = read_json(path, advice)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds {type(found).__name__}, no object): {advice}")
    require_format(found, path)
    said = found.pop("sha256", None)
    if ("format" in found) != (said is not None) or said not in (None, _checksum(found)):
        raise ValueError(f"{path} is damaged (its checksum is of other contents): {advice}")
    found.pop("format", None)
    return found


def require_format(state: Mapping[str, Any], path: Path) -> None:
    """Raises a ValueError if a file says that a later version wrote it."""
    if isinstance(state.get("format"), int) and state["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, of a later version of bird-kernels; this one reads {FORMAT}: "
            "update, or choose another folder"
        )


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
