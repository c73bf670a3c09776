"""Which tests run: the short set, full grids (--all), a slice of them (BIRD_SLICE), or the inner loop (--quick).

The short set is what `./dev test` runs. A test whose parameters make a cross product says by `short` which of its cells
belong to that set, and why; the other cells are deselected, not skipped. CI runs one of eight slices of them, too: the
commit's hash chooses, so that over some tens of commits each is seen several times.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Files that take 20 s of a core or more for few tests, and the longest of all. A process asks for its next file when it
# has two tests left, and xdist would hand out files of many tests first: two processes ended minutes apart, the last
# with three of these. With these first, then by number of tests, what comes last is short. Order is all they decide.
LONGEST = (
    "kernels/test_regimes", "kernels/test_aot", "repo/test_gpu_session", "repo/test_examples", "bird/test_demo",
    "kernels/test_trust", "kernels/test_shifted", "repo/test_wheel", "bird/test_language_experiments",
    "kernels/test_apart", "bird/test_experiments", "bird/test_language_trainers", "kernels/test_pairs",
    "bird/test_unpickling", "bird/test_command_line", "repo/test_scale", "bird/test_candidates",
)  # fmt: skip
SAMPLE, MOST = 4, 300  # cases that `--quick` runs of one test whose file is concerned, and of all such tests


def short(why: str, keep: Callable[..., bool]) -> pytest.MarkDecorator:
    """The cells of a test's grid that are in the short set: where ``keep`` of the parameters it names is true.

    ``why`` is for readers: what the cells that are left out would say again. A test without parameters is one cell.
    """
    return pytest.mark.short(why, keep)


def is_short(item: pytest.Item) -> bool:
    """Whether every `short` of the test keeps this case."""
    kept = []
    for marker in item.iter_markers("short"):
        _, keep = marker.args
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kept.append(keep(**{name: params[name] for name in inspect.signature(keep).parameters}))
    return all(kept)


def in_slice(nodeid: str, part: str) -> bool:
    """Whether a case is in the slice ``part``, "K/N" with K from 1 to N; each case is in one of the N."""
    k, n = map(int, part.split("/"))
    if not 1 <= k <= n:
        raise ValueError(f"BIRD_SLICE={part} is none of the slices 1/{n} to {n}/{n}")
    return zlib.crc32(nodeid.encode()) % n == k - 1


def quick(items: list[pytest.Item], changed: Iterable[str]) -> list[pytest.Item]:
    """Some cases of the tests in files that a change `concerns`; of every other file one: `smoke`, or the first."""
    files = defaultdict(list)
    for item in items:
        files[item.path].append(item)
    concerned, chosen = [], []
    for path, of_file in files.items():
        if any(concerns(path, name) for name in changed):
            tests = defaultdict(list)
            for item in of_file:
                tests[item.nodeid.partition("[")[0]].append(item)
            concerned += [item for cases in tests.values() for item in spread(cases, SAMPLE)]
        else:
            fast = [item for item in of_file if not item.get_closest_marker("slow")]
            chosen += [item for item in fast if item.get_closest_marker("smoke")][:1] or fast[:1]
    return spread(concerned, MOST) + chosen


def spread(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most so many of them, evenly from the first on."""
    return items[:: max(1, -(-len(items) // most))]


def concerns(test: Path, changed: str) -> bool:
    """Whether a file of tests is, imports or names the file ``changed``, or has its name."""
    module = changed.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parent, _, name = module.rpartition(".")
    if ROOT / changed == test or (changed.endswith(".py") and test.stem == f"test_{name}"):
        return True
    text = test.read_text(encoding="utf-8")
    if not changed.endswith(".py"):
        return Path(changed).name in text
    imported = rf"^\s*(import|from) {re.escape(module)}\b|^\s*from {re.escape(parent)} import (\([^)]*|.*)\b{name}\b"
    return re.search(imported, text, re.MULTILINE) is not None


def changes() -> list[str]:
    """The files that differ from where this branch left main, and those that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.splitlines()

    base = git("merge-base", "HEAD", "main") or ["HEAD"]
    return git("diff", "--name-only", base[0]) + git("ls-files", "--others", "--exclude-standard")


def select(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """Those of ``items`` that the command line and BIRD_SLICE ask for."""
    part = os.environ.get("BIRD_SLICE")
    if not config.getoption("--all"):
        items = [item for item in items if is_short(item) or (part and in_slice(item.nodeid, part))]
    return longest_first(quick(items, changes()) if config.getoption("--quick") else items)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """File by file: `LONGEST` in its order, then by number of tests."""
    of_file = Counter(item.path for item in items)
    named = {ROOT / f"tests/{name}.py": rank for rank, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: (named.get(item.path, len(named)), -of_file[item.path], item.path))


def add_options(parser: pytest.Parser) -> None:
    """The two options."""
    group = parser.getgroup("selection")
    group.addoption("--all", action="store_true", help="full grids, not the short set of each")
    group.addoption("--quick", action="store_true", help="some tests of what changed, and one of every other file")
