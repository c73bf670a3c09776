"""The house stands: imports go down only, heavy packages load late, and one file speaks to ``torch.library``.

Read from the syntax tree, so imports inside functions and under ``TYPE_CHECKING`` count like any other, and a
string that is a module's full name counts too: that is how something is imported late.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LATE = re.compile(r"(bird|bird_kernels)(\.\w+)+")

# Each package from the top down. Rooms of one row must not know each other; a folder is one room.
HOUSE = {
    "bird": [
        {"__main__"},
        {"lab.cli"},
        {"lab.vision", "lab.language"},  # the two wings
        {"lab.experiment", "lab.claims"},
        {"lab.duration", "lab.recipe", "lab.stages", "lab.tables", "lab.statistics", "lab.figures"},
        {"lab.tensors"},
        {"lab"},  # what it is
        {"__init__"},
        {"language"},
        {"compare", "chunks"},
        {"losses"},
        {"structure", "course"},
        {"taps", "teachers"},
        {"features"},
        {"files"},
    ],
    "bird_kernels": [
        {"__init__"},
        {"modules", "statistics", "tokens", "tuner"},
        {"functional"},
        {"call"},
        {"matrix", "grams", "pairs", "global_batch"},
        {"inputs"},
        {"from_sums"},
        {"sums"},
        {"ops"},
        {"backends"},
        {"backends.shifted"},
        {"backends.triton"},
        {"backends.library_rbf"},
        {"backends.library", "backends.native", "sequences"},
        {"backends.unbiased"},
        {"backends.rows"},
        {"backends.sides"},
        {"tuning"},
        {"cost", "backends.dominating"},
        {"plan", "backends.linalg"},
        {"moments", "distributed", "transport", "clocks"},
        {"types", "reference"},
        {"_native"},  # csrc/, where it is built
    ],
}
# The rooms of `bird` that compute alignment, pool tokens or list backends; the front door re-exports the operators.
CALLS_KERNELS = {"losses", "structure", "chunks", "compare", "language", "__init__"}
CALLS_KERNELS |= {"lab.cli", "lab.vision", "lab.language"}
# `reference` is the truth to test against: only double backward and backend="reference" may lean on it.
CALLS_REFERENCE = {"call", "ops"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """The first name below the package, of a backend the first two: ``bird_kernels/backends/triton/small.py`` stands in
    the room ``backends.triton``."""
    package, *names = path.relative_to(ROOT).with_suffix("").parts
    return longest_room(names, package)


def longest_room(names: list[str], package: str) -> str:
    """The room that the longest beginning of ``names`` is; the first name where there is none."""
    known = {room for row in HOUSE[package] for room in row}
    return next((room for i in (2, 1) if (room := ".".join(names[:i])) in known), names[0])


def modules_named(path: Path) -> Iterator[str]:
    """Every module that a file imports, by full name; ``from a import b`` gives ``a.b``, which may be one."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and LATE.fullmatch(node.value):
            yield node.value


@functools.cache
def imports(package: str) -> list[tuple[str, str, str]]:
    """(file, its room, module named) for every import of a package."""
    return [
        (str(path.relative_to(ROOT)), room_of(path), name) for path in sources(package) for name in modules_named(path)
    ]


def rooms(package: str) -> dict[str, int]:
    """The floor of every room, 0 the lowest."""
    return {room: floor for floor, row in enumerate(reversed(HOUSE[package])) for room in row}


def target_room(name: str, package: str) -> str | None:
    """The room of ``package`` that a module's name leads to, None if it is in no room of that package."""
    head, _, rest = name.partition(".")
    if head != package:
        return None
    room = longest_room(rest.split("."), package)
    return room if room in rooms(package) else "__init__"


@pytest.mark.parametrize("package", HOUSE)
def test_every_file_has_a_room(package: str) -> None:
    found = {room_of(path) for path in sources(package)}
    assert "__init__" in found, f"no sources under {package}/"
    assert found <= set(rooms(package)), "a new file needs a place in the table of layers"


@pytest.mark.parametrize("package", HOUSE)
def test_imports_go_down_only(package: str) -> None:
    floors = rooms(package)
    wrong = []
    for file, room, name in imports(package):
        target = target_room(name, package)
        if target is not None and target != room and floors[target] >= floors[room]:
            wrong.append(f"{file} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_kernels_do_not_know_the_training_layer() -> None:
    wrong = [f"{file} imports {name}" for file, _, name in imports("bird_kernels") if name.split(".")[0] == "bird"]
    assert not wrong, "\n".join(wrong)


def test_few_rooms_of_bird_call_the_kernels() -> None:
    wrong = [
        f"{file} imports {name}"
        for file, room, name in imports("bird")
        if name.split(".")[0] == "bird_kernels" and room not in CALLS_KERNELS
    ]
    assert not wrong, "\n".join(wrong)


def test_few_rooms_lean_on_the_reference() -> None:
    wrong = [
        f"{file} imports {name}"
        for package in HOUSE
        for file, room, name in imports(package)
        if name.startswith("bird_kernels.reference") and not (package == "bird_kernels" and room in CALLS_REFERENCE)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reference_stands_alone() -> None:
    named = list(modules_named(ROOT / "bird_kernels/reference.py"))
    assert named
    assert not [name for name in named if name.split(".")[0] in HOUSE]


def test_only_ops_names_torch_library() -> None:
    by_import = {file for package in HOUSE for file, _, name in imports(package) if name.startswith("torch.library")}
    by_attribute = {
        str(path.relative_to(ROOT))
        for package in HOUSE
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.library")
    }
    assert by_import | by_attribute == {"bird_kernels/ops.py"}


LIGHT = """
import sys, bird, bird.lab.language.judges, bird.lab.statistics
from bird.lab.language import models
from bird.lab.language.data import files, positivity, preferences, questions, snippets
print(*sys.modules)
"""
HEAVY = {"triton", "torchvision", "sklearn", "matplotlib", "transformers", "trl", "peft", "vaderSentiment"}
HEAVY |= {"tokenizers", "datasets", "pyarrow", "huggingface_hub"}


def test_importing_is_light() -> None:
    """Heavy packages load when something asks for them: not with the packages, nor with judges, networks and texts."""
    run = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert set(HOUSE) <= loaded
    assert loaded & HEAVY == set()


def test_no_pickle_is_loaded() -> None:
    """Of what runs for users; a pickled batch of images is read without an unpickler (`datasets.unpickling`)."""
    paths = [
        path
        for folder in ("bird", "bird_kernels", "benchmarks", "examples", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ]
    loads = re.compile(
        r"weights_only=False|allow_pickle=True|pickle\.loads?\(|joblib|\bUnpickler\b|torch\.load\((?!.*weights_only=True)"
    )
    found = {path.relative_to(ROOT).as_posix() for path in paths if loads.search(path.read_text(encoding="utf-8"))}
    assert found == set()
