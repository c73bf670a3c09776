"""What the tests of the repository itself share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tracked() -> list[Path]:
    """What a clean clone would hold, relative to the root: files git tracks, or would if they were added."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout, so what belongs to it is unknown")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in map(Path, listed.splitlines()) if (ROOT / path).exists()]
