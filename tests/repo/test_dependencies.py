"""What is imported is declared: of each part of the packages, against the dependencies and extras in pyproject.toml.

Imports are read from the syntax tree, so those inside functions count like any other.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
OURS = {"bird", "bird_kernels"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Names on PyPI that are not the name of what they bring.
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}
# Each part, the longest folder first, and the extras that it may import from, beside what is always installed.
# What both wings of the laboratory share is in the extras of either; the demo needs its report and a network.
PARTS: dict[str, tuple[str, ...]] = {
    "bird/lab/vision/models": ("vision", "demo"),
    "bird/lab/vision": ("vision",),
    "bird/lab/language": ("language",),
    "bird/lab/statistics.py": ("vision", "language", "demo"),
    "bird/lab/claims.py": ("vision", "language", "demo"),
    "bird/lab/figures.py": ("vision", "language", "demo"),
    "bird/lab": (),  # the command line and the machinery of recipes
    "bird/language": ("language",),
    "bird/compare.py": ("demo",),  # it draws, if asked to
    "bird": (),
    "bird_kernels": (),
    "examples/own_loop.py": ("vision",),
    "examples/large_batch.py": ("vision",),
    "examples/dpo.py": ("language",),
    "examples/trl_sft.py": ("language",),
    "examples/hidden_states.py": ("language",),
    "examples": ("language",),  # DDP, which needs nothing, and Accelerate
}
# Declared for libraries that look for them.
UNSEEN = {"accelerate": "transformers' trainers", "gguf": "transformers, where weights are GGUF files"}
# What may be looked for, but is imported by name in no file.
NAMED = re.compile(r'_need\("([\w.]+)"\)')


def names_of(requirements: Iterable[str]) -> set[str]:
    """The packages that requirements name, as modules; our own extras resolved."""
    found = set()
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
        if name == PROJECT["name"]:
            found |= set().union(*(extra(e) for e in re.findall(r"[\w-]+", requirement.partition("[")[2])))
        else:
            found.add(MODULES.get(name, name))
    return found


def extra(name: str) -> set[str]:
    return names_of(PROJECT["optional-dependencies"][name])


def part_of(file: str) -> str:
    return next(part for part in PARTS if file == part or file.startswith(f"{part}/"))


def imported(path: Path) -> Iterator[str]:
    """The packages that a file imports and that are neither ours nor Python's."""
    text = path.read_text(encoding="utf-8")
    modules = NAMED.findall(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module or "")
    for module in modules:
        top = module.split(".")[0]
        if top not in OURS and top not in sys.stdlib_module_names - {"tomllib"}:
            yield "tomli" if top == "tomllib" else top


@functools.cache
def imports() -> dict[str, dict[str, list[str]]]:
    """Part, package, files that import it."""
    found: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    for file in sorted(path for ours in (*OURS, "examples") for path in (ROOT / ours).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        for package in imported(file):
            found[part_of(name)].setdefault(package, []).append(name)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_imports_is_declared(part: str) -> None:
    always = names_of(PROJECT["dependencies"])
    extras = [extra(name) for name in PARTS[part]]
    allowed = always | (set.intersection(*extras) if extras else set())
    found = imports()[part]
    assert {package: files for package, files in found.items() if package not in allowed} == {}


@pytest.mark.parametrize("name", ["vision", "language", "demo"])
def test_what_an_extra_declares_is_imported(name: str) -> None:
    used = {package for part, packages in imports().items() if name in PARTS[part] for package in packages}
    assert extra(name) - used - set(UNSEEN) == set()


def test_what_is_always_installed_is_imported() -> None:
    used = {package for packages in imports().values() for package in packages}
    assert names_of(PROJECT["dependencies"]) - used == set()


def test_lab_brings_what_both_wings_need() -> None:
    assert extra("lab") == extra("vision") | extra("language")


def test_no_extra_contradicts_another() -> None:
    """One floor for a package, wherever it is declared; development may ask for a newer one."""
    floors: dict[str, set[str]] = {}
    for name, requirements in PROJECT["optional-dependencies"].items():
        for requirement in requirements if name != "dev" else ():
            floors.setdefault(re.match(r"[\w.-]+", requirement)[0], set()).add(requirement)  # type: ignore[index]
    assert {package: found for package, found in floors.items() if len(found) > 1} == {}


# ---------------------------------------------------------------------------------------------- with nothing else

HIDE = """
import importlib.abc
import sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Hidden())
"""


def closure(names: Iterable[str]) -> set[str]:
    """Distributions that are installed with these: what they require without any extra."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform or Python
            continue
        found.add(name)
        left += [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]  # type: ignore[index]
    return found


def run(script: str, with_packages: Iterable[str]) -> subprocess.CompletedProcess[str]:
    """A script in a process that finds these packages alone, and what they bring."""
    kept = closure(with_packages)
    hidden = {
        module
        for module, homes in packages_distributions().items()
        if module not in OURS and not {re.sub(r"[-_.]+", "-", home).lower() for home in homes} & kept
    }
    assert "scipy" in hidden or "transformers" in hidden or len(hidden) < 3, "nothing is hidden"
    program = f"HIDDEN = {hidden!r}\n{HIDE}\nsys.path.insert(0, {str(ROOT)!r})\n{script}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


def test_the_core_imports_with_torch_numpy_and_tqdm_alone() -> None:
    files = [
        *(path for path in (ROOT / "bird").glob("*.py") if path.stem != "__main__"),
        *(ROOT / "bird_kernels").glob("*.py"),
    ]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    script = f"import importlib\nfor name in {sorted(modules)}: importlib.import_module(name)\n"
    script += "import bird.language\nassert not any(name.startswith('bird.lab') for name in sys.modules)"
    done = run(script, ["torch", "numpy", "tqdm"])
    assert done.returncode == 0, done.stderr


ANSWERS = """
from bird.lab.cli import main
for command in ("info", "--help", "run --help"):
    sys.argv = ["bird", *command.split()]
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code
    assert status == 0, command
    print("that was", command)
"""


def test_the_command_line_answers_without_any_extra() -> None:
    always = [re.match(r"[\w.-]+", requirement)[0] for requirement in PROJECT["dependencies"]]  # type: ignore[index]
    done = run(ANSWERS, always)
    assert done.returncode == 0, done.stderr
    assert all(said.strip() for said in re.split(r"that was .*\n", done.stdout)[:3])


def test_what_is_hidden_is_hidden() -> None:
    """Of the test itself: an extra's package cannot be imported there, and says that it is hidden."""
    pytest.importorskip("scipy", reason="an extra's package must be there to be hidden")
    assert "scipy is hidden" in run("import scipy", ["torch", "numpy", "tqdm"]).stderr
