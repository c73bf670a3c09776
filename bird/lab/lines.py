"""Results that are kept while they come in: JSON lines that survive a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """A file of JSON objects, one a line, that grows at its end; for one process at a time.

    A line counts once its newline is there. What a kill left of a last line is not read, and is cut off when the
    next one is written, not before: a file that turns out to be somebody else's stays as it is.

    Args:
        path: of the file; where there is none, it and its folder are made with the first line.

    Attributes:
        rows: what the file held when it was opened.

    Raises:
        ValueError: a whole line is not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        self._end = data.rfind(b"\n") + 1
        self._torn = self._end < len(data)
        self.rows = [self._parse(line, i) for i, line in enumerate(data[: self._end].splitlines(), start=1)]

    def append(self, *rows: dict[str, Any]) -> None:
        """Write rows with one call, and wait until they are on the disk."""
        text = "".join(json.dumps(row) + "\n" for row in rows)  # ASCII: no character in it breaks a line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._torn:
                file.truncate(self._end)
            self._end, self._torn = file.seek(0, os.SEEK_END), True  # until all of it is there: the disk may be full
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self._torn = False

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.path}: line {number} is not a JSON object: the file is damaged or something else;"
                " delete it to start over, or choose another path"
            )
        return row
