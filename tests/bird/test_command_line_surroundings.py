"""The command line where its surroundings are poor: pipes that close, terminals of ASCII, a package not installed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from bird.lab import cli, tables
from bird.lab.recipe import at_home, data_root
from tests.bird.test_shared_runs import TINY

ROOT = Path(__file__).resolve().parents[2]


def bird(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a pipe behind it if asked for."""
    command = f"{sys.executable} -m bird {' '.join(arguments)} {shell}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_training_goes_on_where_nobody_reads_and_ascii_is_all_there_is(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY.replace("seeds = 1", "seeds = 2"))
    out = str(tmp_path / "out")
    run = "run", str(recipe), "--device", "cpu", "--jobs", "1", "--out", out
    done = bird(*run, shell="| head -c 1 >/dev/null")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/reports/tiny/README.md").exists()
    assert "±" in (tmp_path / "out/reports/tiny/README.md").read_text(encoding="utf-8")
    done = bird("report", str(recipe), "--out", out, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stdout
    assert done.stdout.isascii()


class Closed(io.TextIOWrapper):
    """A stream whose reader has gone."""

    def __init__(self, error: OSError) -> None:
        super().__init__(io.BytesIO(), "utf-8")
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_a_line_that_cannot_be_written_stops_nothing(error: OSError) -> None:
    cli._say("a line", Closed(error))


@pytest.mark.smoke
def test_what_an_encoding_lacks_is_replaced() -> None:
    for encoding, said in (("ascii", "1 +- 2 ?\n"), ("latin-1", "1 ± 2 ?\n"), ("utf-8", "1 ± 2 →\n")):
        raw = io.BytesIO()
        terminal = io.TextIOWrapper(raw, encoding, newline="\n")
        cli._say("1 ± 2 →", terminal)
        assert raw.getvalue().decode(encoding) == said


def test_a_package_that_is_not_installed_has_no_version_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert tables.report_origin()["bird-kernels"] == "not installed"
    assert cli.main(["info"]) == 0


def test_there_is_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bird-kernels {tables.version('bird-kernels')}\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--device", "cpu"], {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', which is no number"),
        (["--device", "cpu"], {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', which is no number"),
        (["--device", "meta"], {}, "--device meta cannot be used here"),
        (["--device", ""], {}, "--device  cannot be used here"),
        (["--device", "cpu"], {"BIRD_DATA": "~nobody-of-this-name"}, "~nobody-of-this-name: there is no home of"),
        (["--device", "cpu", "--data", "~nobody-of-this-name/x"], {}, "~nobody-of-this-name/x: there is no home of"),
    ],
)
def test_mistakes_are_told_in_words(
    arguments: list[str],
    environment: dict[str, str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "digits.toml"
    recipe.write_text(TINY.replace("fashion-mnist-subset", "fashion-mnist"))
    assert cli.main(["run", str(recipe), *arguments, "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_homes_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert data_root("~/data") == Path("/somewhere/data")
    with pytest.raises(ValueError, match="no home of such a user"):
        at_home("~nobody-of-this-name")
    networks: Any = pytest.importorskip("bird.lab.language.models", reason="an extra: bird-kernels[language]")
    with pytest.raises(ValueError, match="no home of such a user"):
        networks.locate_network("~nobody-of-this-name/x")


def test_a_report_of_a_folder_that_is_not_there_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "fashion/demo", "--out", str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
