"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial."  # before the name of a file that is being written


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it becomes ``path`` in one step if all goes well, else it goes."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(data: Any, path: Path) -> None:
    """Write plain data as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
