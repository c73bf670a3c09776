"""What the documents promise is there: tree, links, snippets; and no file names a machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MACHINE_PATH = re.compile(r"(?<![\w.*}-])/(?:home|root|Users|work|mnt|private)/\w|\b[A-Z]:\\")


def fences(language: str) -> list[str]:
    return [body for name, body in FENCE.findall(README.read_text(encoding="utf-8")) if name == language]


def tree() -> Iterator[Path]:
    """The paths of the README's tree: names before a run of spaces, folders end in /, two spaces indent."""
    folders: list[str] = []
    for line in fences("text")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        names = re.split(r"\s{2,}", line.strip())[0].split()
        for name in names:
            yield Path(*folders, name)
        if len(names) == 1 and names[0].endswith("/"):
            folders.append(names[0])


def test_every_path_in_the_tree_exists() -> None:
    paths = list(tree())
    assert len(paths) > 20
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []


def test_every_file_at_the_top_is_in_the_tree(tracked: list[Path]) -> None:
    shown = {path.parts[0] for path in tree()}
    assert sorted({path.parts[0] for path in tracked} - shown) == [".gitignore"]


def test_every_module_is_in_the_tree(tracked: list[Path]) -> None:
    """A newcomer finds each file of the packages in the README; an ``__init__`` needs no line."""
    shown = set(tree())
    modules = {path for path in tracked if path.parts[0] in {"bird", "bird_kernels"} and path.suffix == ".py"}
    assert sorted(str(path) for path in modules - shown if path.name != "__init__.py") == []


def test_links_lead_somewhere(tracked: list[Path]) -> None:
    dead = []
    for document in (path for path in tracked if path.suffix == ".md"):
        for target in LINK.findall((ROOT / document).read_text(encoding="utf-8")):
            file = target.split("#")[0]
            if file and "://" not in file and not (ROOT / document.parent / file).exists():
                dead.append(f"{document}: {target}")
    assert dead == []


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_snippets_run(number: int, tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + fences("python")[number]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_machine(tracked: list[Path]) -> None:
    named = []
    for path in tracked:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and arrays
        named += [f"{path}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert named == []
