"""The site builds without a warning; citation, workflows and templates say what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML comes with the docs extra")

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
FILES = [ROOT / "CITATION.cff", *sorted(GITHUB.rglob("*.yml"))]


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    pytest.importorskip("mkdocstrings", reason="needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "reference/losses.html").read_text(encoding="utf-8")
    assert "teacher features, shape" in page  # of cka_loss, from its docstring
    assert ".. math::" not in page
    assert (tmp_path / "repository/benchmarks/reproduction/README.html").exists() or (
        tmp_path / "repository/benchmarks/reproduction/index.html"
    ).exists()


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in sorted(pages) if f": {page}\n" not in text] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_yaml_is_yaml(path: Path) -> None:
    assert isinstance(read(path), dict)


def test_the_workflow_calls_commands_that_exist() -> None:
    workflow = read(GITHUB / "workflows/ci.yml")
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}  # YAML 1.1 reads "on" as true
    launcher = (ROOT / "dev").read_text(encoding="utf-8")
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(workflow["jobs"])
    for command in commands:
        match = re.match(r"\./dev (\w+)( [\w/ \"-]+)?$", command)
        assert match is not None, command
        assert f"\n    {match[1]})" in launcher
        for path in re.findall(r"\btests/[\w/]+", command):
            assert (ROOT / path).exists()
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        assert job["steps"][0]["uses"].startswith("actions/checkout@")


def test_the_workflow_has_the_oldest_python() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    jobs = read(GITHUB / "workflows/ci.yml")["jobs"]
    assert jobs["linux"]["strategy"]["matrix"]["python"][0] == oldest
    assert jobs["floor"]["steps"][1]["with"]["python-version"].split()[0] == oldest


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_a_form_has_what_forms_need(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    assert all(field["attributes"]["label"] for field in form["body"])
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{citation["version"]}"\n' in project
    url = citation["references"][0]["url"]
    assert url in (ROOT / "README.md").read_text(encoding="utf-8")
