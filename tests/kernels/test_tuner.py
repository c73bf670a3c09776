"""`bird tune`: gate before clock, the deadline, and what is kept; on a CPU, where the clock is told what it shows."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bird.lab import cli
from bird_kernels import backends, cost, tuner, tuning
from bird_kernels.backends import native
from bird_kernels.types import Problem

KEY = tuning.Key("NVIDIA Test", "1", "2", "3")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BIRD_TUNING")
    monkeypatch.setattr(tuning, "key_of", lambda device: KEY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: KEY.device)
    monkeypatch.setattr(native, "why_not", lambda *call: "is not built")
    tuning.forget_files()
    yield
    tuning.forget_files()
    backends.forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was timed; the first takes 10 us of the host and 20 of the device, the next 11 and 22, ..."""
    timed: list[Any] = []

    def times(run: Any) -> tuple[float, float]:
        timed.append(run())
        return 9.0 + len(timed), 18.0 + 2 * len(timed)

    monkeypatch.setattr(tuner, "_times", times)
    return timed


def of_problem(problem: Problem, deadline: float = float("inf")) -> tuple[list[tuning.Measurement], list[str]]:
    said: list[str] = []
    return list(tuner._of_problem(problem, deadline, said.append)), said


def test_every_candidate_that_is_right_is_timed(clock: list[Any]) -> None:
    pytest.importorskip("triton", reason="Triton does not exist for this system")
    rows, said = of_problem(Problem(40, 33, 24, torch.float32, CPU, precision="ieee"))
    assert rows == [
        tuning.Measurement(40, 33, 24, "float32", "ieee", "biased", name, host, device)
        for name, host, device in (("triton", 10.0, 20.0), ("library", 11.0, 22.0))
    ]
    assert said == ["40 x 33, 24 float32 ieee: triton 20 us", "40 x 33, 24 float32 ieee: library 22 us"]
    assert len(clock) == 2


@pytest.mark.parametrize("how", ["value", "gradient", "error"])
def test_the_gate_comes_before_the_clock(how: str, clock: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton does not exist for this system")
    triton = backends.module_of("triton")
    forward, backward = triton.forward, triton.backward

    def fail(*call: Any) -> Any:
        raise RuntimeError("no such instruction\nat all")

    def slightly(function: Any) -> Any:
        def changed(*call: Any, **named: Any) -> Any:
            first, *rest = function(*call, **named)
            return (first * 1.01, *rest)

        return changed

    replaced = {"value": slightly(forward), "gradient": forward, "error": fail}[how]
    monkeypatch.setattr(triton, "forward", replaced)
    monkeypatch.setattr(triton, "backward", slightly(backward) if how == "gradient" else backward)
    rows, said = of_problem(Problem(40, 33, 24, torch.float32, CPU, precision="ieee"))
    assert [row.candidate for row in rows] == ["library"]
    why = "RuntimeError: no such instruction" if how == "error" else "it is off by 0.01 of the result's size"
    assert said[0] == f"40 x 33, 24 float32 ieee: triton is left out, {why}"
    assert len(clock) == 1


def test_each_configuration_of_the_symmetric_kernel_is_a_candidate(
    clock: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter, on a problem small enough for it; they are those that the device has room for."""
    pytest.importorskip("triton", reason="Triton does not exist for this system")
    monkeypatch.setattr(cost, "SYMMETRIC", {64: 1.0})
    monkeypatch.setattr(backends, "_shifts", lru_cache(lambda *call: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    rows, _ = of_problem(Problem(160, 64, 64, torch.bfloat16, CPU))
    names = [row.candidate for row in rows]
    assert names[:2] == ["triton", "library"]
    assert "symmetric 64 64 128 4 3 0" in names
    assert len(names) > 3


def test_the_deadline_is_kept(clock: list[Any]) -> None:
    problem = Problem(40, 33, 24, torch.float32, CPU, precision="ieee")
    rows, said = of_problem(problem, time.monotonic() - 1)
    assert rows == []
    assert said[0].startswith("40 x 33, 24 float32 ieee: no time left")
    assert clock == []
    large = Problem(1 << 20, 8192, 8192, torch.float32, CPU, precision="ieee")
    assert of_problem(large, time.monotonic() + 1)[0] == []  # it is not even begun


def test_what_is_measured_joins_what_was(clock: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept in the user's cache: what another run measured stays, the same problem's times are new."""

    class Somewhere:
        type, index = "cuda", 0

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "device", lambda *name: CPU)
    first = tuner.tune(Somewhere(), [((40, 33, 24), "float32")], 1.0, print)

    again = tuner.tune(Somewhere(), [((40, 33, 24), "float32"), ((44, 8, 64), "bfloat16")], 1.0, print)
    assert [row for row in again.rows if row.dtype == "float32"] != list(first.rows)
    assert len(again.rows) == 2 * len(first.rows)
    assert tuning.table_of(KEY) == again
    fourth = ((48, 8, 64), "float32")

    def interrupted(title: str) -> None:
        if title.startswith("48") and "library" in title:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(Somewhere(), [((36, 8, 8), "float32"), fourth], 1.0, interrupted)
    kept = tuning.table_of(KEY)
    assert kept is not None
    assert len({row.candidate for row in kept.rows if row.n == 36}) == len(first.rows)
    third = tuner.tune(Somewhere(), [((40, 33, 24), "float32")], 1.0, print)
    assert {row for row in again.rows if row.dtype == "bfloat16"} < set(third.rows)


def test_nothing_to_tune_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing to tune"):
        tuner.tune(CPU, [((8, 8, 8), "float32")], 1.0, print)
    assert cli.main(["tune", "--device", "cpu", "--shape", "8,8,8", "--minutes", "0.1"]) == 0
    assert cli.main(["tune", "--device", "cpu", "--from-run", "/nonexistent"]) == 2
    assert "On cpu there is nothing to tune" in capsys.readouterr().out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line asks to be measured."""
    calls: list[Any] = []

    def tune(device: torch.device, problems: Any, minutes: float, say: Any) -> tuning.Table:
        calls.append((list(problems), minutes))
        return tuning.Table(KEY, "", ())

    monkeypatch.setattr(cli, "_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tuner, "tune", tune)
    return calls


def test_the_command_line(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--shape", "8,16,32", "--shape", "4,1,1", "--dtype", "float16", "bfloat16", "--minutes", "0.5"]
    assert cli.main(command) == 0
    shapes = ((8, 16, 32), (4, 1, 1))
    assert asked[0] == ([(shape, dtype) for shape in shapes for dtype in ("float16", "bfloat16")], 0.5)
    assert str(tuning.user_file(KEY)) in capsys.readouterr().out
    assert cli.main(["tune"]) == 0
    assert asked[1] == ([(shape, dtype) for shape in tuner.SHAPES for dtype in tuner.DTYPES], 2.0)
    for wrong in ("8,16", "3,1,1", "a,b,c", "8,0,8"):
        with pytest.raises(SystemExit):
            cli.main(["tune", "--shape", wrong])


def test_from_run(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shapes in (("a", [[8, 16, 32, "float32"]]), ("b", [[8, 16, 32, "float32"], [4, 1, 1, "float64"]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shapes.json").write_text(json.dumps(shapes))
    assert cli.main(["tune", "--from-run", str(tmp_path)]) == 0
    assert asked == [([([8, 16, 32], "float32")], 2.0)]
    (tmp_path / "empty").mkdir()
    assert cli.main(["tune", "--from-run", str(tmp_path / "empty")]) == 2
    assert "has no shapes.json" in capsys.readouterr().err


def test_info_says_whether_this_device_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli._tuned(0).startswith("not tuned")
    row = tuning.Measurement(8, 8, 8, "float32", "ieee", "biased", "library", 1.0, 2.0)
    tuning.write_table(tuning.user_file(KEY), tuning.Table(KEY, "2026-01-02T03:04:05", (row,)))
    assert cli._tuned(0) == "tuned 2026-01-02T03:04:05, 1 measurements"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--minutes", "nan"], "nan is not a number of minutes above 0"),
        (["--minutes", "-1"], "-1 is not a number of minutes above 0"),
        (["--shape", "128,512"], "'128,512' must be at least 4 rows and two widths, as in 128,512,1280"),
        (["--shape", "3,8,8"], "'3,8,8' must be at least 4 rows"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "--device", "cpu", *arguments])
    assert words in capsys.readouterr().err
