"""How large the house is, room by room, beside what was agreed on: `./dev count`.

Lines of Python as `wc` counts them; the files are those that git knows.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 400  # lines of a file
# A room, its folder, folders that are rooms of their own, and the most lines it should have.
ROOMS = (
    ("kernels", "bird_kernels", ("bird_kernels/backends/triton",), None),
    ("triton", "bird_kernels/backends/triton", (), 1300),
    ("core", "bird", ("bird/lab",), 3030),
    ("laboratory", "bird/lab", (), 8800),
    ("benchmarks", "benchmarks", (), 2500),
    ("tests", "tests", (), 16_500),
    ("tools", "tools", (), None),
)


def lines_of(path: Path) -> int:
    """How many lines a file has."""
    return path.read_text(encoding="utf-8").count("\n")


def tracked() -> list[Path]:
    """The Python files that git knows and that are there."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.splitlines() if (path := ROOT / name).exists()]


def count(folder: str, without: tuple[str, ...] = ()) -> tuple[int, int]:
    """Files and lines below a folder."""
    found = [
        path
        for path in tracked()
        if path.is_relative_to(ROOT / folder) and not any(path.is_relative_to(ROOT / other) for other in without)
    ]
    return len(found), sum(map(lines_of, found))


def main() -> None:
    """Print a line a room, then what is too long."""
    print(f"{'':12}{'files':>8}{'lines':>8}{'at most':>10}")
    for name, folder, without, most in ROOMS:
        files, lines = count(folder, without)
        print(f"{name:12}{files:8}{lines:8}{most or '':>10}")
    long = [(lines_of(path), path.relative_to(ROOT)) for path in tracked() if lines_of(path) > LONGEST]
    print(f"\n{len(long)} files of more than {LONGEST} lines")
    for lines, path in sorted(long, reverse=True):
        print(f"{lines:8} {path}")
    skips = sum(
        path.read_text(encoding="utf-8").count("# fmt: skip")
        for path in tracked()
        if path.is_relative_to(ROOT / "bird_kernels")
    )
    print(f"\n{skips} times `# fmt: skip` in bird_kernels (at most 20)")
    print(f"{(ROOT / 'README.md').stat().st_size:,} bytes of README (at most 8,192)")


if __name__ == "__main__":
    main()
