"""What README.md and the other documents promise is there: tree, links, tables; and no file names a machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.documents import FENCE, PAGES, README, ROOT, fences, name_of

PACKAGES = "bird", "bird_kernels", "csrc"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\./dev ([a-z]+)")
EXTRA = re.compile(r"(?:bird-kernels|'\.)\[([\w,-]+)\]")
DOTTED = re.compile(r"`(bird(?:_kernels)?(?:\.\w+)+)`")
MACHINE_PATH = re.compile(r"(?<![\w.*}-])/(?:home|root|Users|work|mnt|private)/\w|\b[A-Z]:\\")


def tree() -> Iterator[Path]:
    """The paths of CONTRIBUTING's tree: a name before a run of spaces, folders end in /, two spaces indent."""
    folders: list[str] = []
    for line in fences(ROOT / "CONTRIBUTING.md", "text")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del folders[depth:]
        name = re.split(r"\s{2,}", line.strip())[0]
        yield Path(*folders, name)
        folders.append(name)


def test_the_tree_has_folders_that_exist() -> None:
    assert [str(path) for path in tree() if not (ROOT / path).is_dir()] == []


def test_every_folder_of_the_packages_is_in_the_tree(tracked: list[Path]) -> None:
    parents = {parent for path in tracked for parent in path.parents if parent.parts}
    wanted = {path for path in parents if path.parts[0] in PACKAGES or len(path.parts) == 1}
    assert sorted(map(str, wanted - set(tree()))) == []


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 8 * 1024


def test_the_readme_shows_what_was_measured() -> None:
    pytest.importorskip("cka", reason="the benchmarks need the bench extra")
    from tools import readme_tables

    page = README.read_text(encoding="utf-8")
    assert readme_tables.with_parts(page, readme_tables.tables()) == page, (
        "python -m tools.readme_tables writes it anew"
    )


def test_links_lead_somewhere(tracked: list[Path]) -> None:
    dead = []
    for document in (path for path in tracked if path.suffix == ".md"):
        for target in LINK.findall((ROOT / document).read_text(encoding="utf-8")):
            file = target.split("#")[0]
            if file and "://" not in file and not (ROOT / document.parent / file).exists():
                dead.append(f"{document}: {target}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_code_can_be_read_without_scrolling(page: Path) -> None:
    """Of at most 100 characters, as the site and GitHub show in a window of 1280 pixels; a diff shows TRL's own."""
    text = page.read_text(encoding="utf-8")
    lines = [line for language, body in FENCE.findall(text) if language != "diff" for line in body.splitlines()]
    lines += [line[4:] for line in FENCE.sub("", text).splitlines() if re.match(r" {4}(?![ *-])", line)]
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_extras_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    launcher = (ROOT / "dev").read_text(encoding="utf-8")
    assert [name for name in COMMAND.findall(text) if f"\n    {name})" not in launcher] == []
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {name for names in EXTRA.findall(text) for name in names.split(",")}
    assert [name for name in sorted(extras) if f"\n{name} = [" not in project] == []


def exists(name: str) -> bool:
    """Whether a dotted name leads to a module, and what follows stands in it."""
    first, *rest = name.split(".")
    place = ROOT / first
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if rest and (place / f"{rest[0]}.py").exists():
        file = place / f"{rest.pop(0)}.py"
    elif (place / "__init__.py").exists():
        file = place / "__init__.py"
    else:
        return not rest
    text = file.read_text(encoding="utf-8")
    if "from bird_kernels import *" in text:
        text += (ROOT / "bird_kernels/__init__.py").read_text(encoding="utf-8")
    return not rest or re.search(rf"\b{rest[0]}\b", text) is not None


def test_names_in_documents_and_docstrings_exist(tracked: list[Path]) -> None:
    wrong = []
    for path in tracked:
        if (path.suffix == ".py" and path.parts[0] in PACKAGES) or ROOT / path in PAGES:
            names = DOTTED.findall((ROOT / path).read_text(encoding="utf-8"))
            wrong += [f"{path}: {name}" for name in names if not exists(name)]
    assert wrong == []


def test_no_file_names_a_machine(tracked: list[Path]) -> None:
    named = []
    for path in tracked:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and arrays
        named += [f"{path}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert named == []
