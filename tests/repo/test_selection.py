"""What the short set, the slices and --quick select: a small suite of its own, collected as ours is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import selection

SUITE = """
import pytest
from tests.selection import short

@short("the diagonal", lambda a, b: a == b)
@pytest.mark.parametrize("a", range(10))
@pytest.mark.parametrize("b", range(10))
def test_grid(a, b): ...

@short("small", lambda a: a < 3)
@short("even", lambda a: a % 2 == 0)
@pytest.mark.parametrize("a", range(6))
def test_both(a): ...

@short("said by another", lambda: False)
def test_more(): ...

@pytest.mark.slow
def test_slow(): ...

def test_plain(): ...
"""
CONFTEST = """
from tests import selection

def pytest_addoption(parser):
    selection.add_options(parser)

def pytest_collection_modifyitems(config, items):
    items[:] = selection.select(config, items)
"""
SHORT = {*(f"test_grid[{k}-{k}]" for k in range(10)), "test_both[0]", "test_both[2]", "test_slow", "test_plain"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(SUITE, encoding="utf-8")
    (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    short\n    slow\n", encoding="utf-8")
    return folder


class Collected:
    """A plugin that holds the names of the cases."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = {item.nodeid.partition("::")[2] for item in session.items}


def collected(suite: Path, *options: str, part: str = "") -> set[str]:
    found = Collected()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIRD_SLICE", part)
        command = [str(suite), f"--rootdir={suite}", f"--config-file={suite / 'pytest.ini'}", "--collect-only", "-q"]
        assert pytest.main([*command, "--import-mode=importlib", *options], plugins=[found]) == 0
    return found.names


def test_the_short_set_and_the_slices_are_all(suite: Path) -> None:
    everything = collected(suite, "--all")
    assert len(everything) == 109
    assert collected(suite) == SHORT
    one, two = (collected(suite, part=part) for part in ("1/2", "2/2"))
    assert SHORT < one < everything
    assert one & two == SHORT
    assert one | two == everything


def test_quick_is_one_fast_case_or_some_of_each_test() -> None:
    cases = [*(f"test_suite.py::test_grid[{k}]" for k in range(10)), "test_suite.py::test_plain"]
    items: list[Any] = [_Item(Path("test_suite.py"), name) for name in ("test_suite.py::test_slow", *cases)]

    def chosen(*changed: str) -> list[str]:
        return [item.nodeid.partition("::")[2] for item in selection.quick(items, changed)]

    assert chosen() == ["test_grid[0]"]
    items.append(_Item(Path("test_suite.py"), "test_suite.py::test_smoke"))
    assert chosen() == ["test_smoke"]
    with mock.patch.object(selection, "concerns", lambda path, changed: changed == "bird/own.py"):
        assert chosen("bird/other.py") == ["test_smoke"]
        grid = [f"test_grid[{k}]" for k in (0, 3, 6, 9)]
        assert chosen("bird/own.py", "bird/other.py") == ["test_slow", *grid, "test_plain", "test_smoke"]


class _Item:
    """What `quick` reads of a case."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.nodeid = path, name

    def get_closest_marker(self, name: str) -> bool:
        return self.nodeid.endswith(f"::test_{name}")


@pytest.mark.parametrize(
    ("changed", "concerned"),
    [
        ("bird/losses.py", True),
        ("bird/lab/__init__.py", True),
        ("bird_kernels/backends/median.py", True),
        ("bird/lab/vision/own.py", True),  # the name
        ("tests/bird/test_own.py", True),
        ("data.csv", True),
        ("bird/lab/losses.py", False),
        ("bird_kernels/median.py", False),
        ("bird/loss.py", False),
        ("other.csv", False),
        ("bird/lab/vision/methods.py", True),
        ("bird/lab/vision/steps.py", False),
    ],
)
def test_what_a_file_concerns(changed: str, concerned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "ROOT", tmp_path)
    test = tmp_path / "tests/bird/test_own.py"
    test.parent.mkdir(parents=True)
    text = (
        'import bird.losses\nfrom bird.lab import cli\nfrom bird_kernels.backends import library, median\n"data.csv"\n'
        "from bird.lab.vision import (\n    augment,\n    methods,\n)\nsteps = 3\n"
    )
    test.write_text(text, encoding="utf-8")
    assert selection.concerns(test, changed) == concerned


def test_long_files_come_first_and_files_stay_whole() -> None:
    names = [f"tests/{name}.py" for name in ("a", "bird/test_demo", "b", "kernels/test_aot", "c")]
    items: list[Any] = [_Item(selection.ROOT / name, str(k)) for k in range(3) for name in names]
    items += [_Item(selection.ROOT / "tests/c.py", "3")]
    found = [item.path.stem + item.nodeid for item in selection.longest_first(items)]
    assert found[:10] == [f"{name}{k}" for name in ("test_aot", "test_demo", "c") for k in range(4 - (name > "c"))]
    assert found[10:] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [name for name in selection.LONGEST if not (selection.ROOT / f"tests/{name}.py").exists()] == []


@pytest.mark.parametrize("part", ["0/8", "9/8"])
def test_slices_that_are_none_are_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"BIRD_SLICE={part} is none of the slices 1/8 to 8/8"):
        selection.in_slice("a", part)


def test_large_grids_say_what_is_short_and_why(request: pytest.FixtureRequest) -> None:
    """Of the tests that were collected with this one."""
    cases = Counter(item.nodeid.partition("[")[0] for item in request.session.items if not _reason(item))
    assert {name: count for name, count in cases.items() if count > 100} == {}
    assert all(len(why.split()) > 2 for why in map(_reason, request.session.items) if why)


def _reason(item: pytest.Item) -> str:
    marker = item.get_closest_marker("short")
    return marker.args[0] if marker else ""
