"""Tables of measurements: kept whole, read with care, and obeyed by ``auto`` where they speak of the problem at all."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bird_kernels import backends, cost, explain, tuning
from bird_kernels.tuning import Key, Measurement, Table
from bird_kernels.types import Problem

KEY = Key("NVIDIA Test 80GB (PCIe)", "12080", "2.11.0", "3.6.0")
DEVICE = torch.device("cuda:62")  # nobody else's: answers are remembered


def row(
    dtype: str, precision: str, n: int, p: int, q: int, candidate: str, us: float, estimator: str = "biased"
) -> Measurement:
    return Measurement(n, p, q, dtype, precision, estimator, candidate, us / 2, us)


ROWS = tuple(
    row(dtype, precision, n, p, q, candidate, us)
    for dtype, precision, n, p, q, times in (
        ("float32", "ieee", 128, 512, 512, {"native": 9, "triton": 30, "library": 200}),
        ("float32", "ieee", 4096, 1024, 1024, {"triton": 900, "library": 700}),
        ("float32", "tf32", 4096, 1024, 1024, {"library": 400}),
        ("float16", "", 16, 16, 16, {"native": 20, "triton": 10, "library": 30}),
        ("bfloat16", "", 8192, 8192, 8192, {"library": 50, "symmetric 128 128 64 8 3 0": 40}),
    )
    for candidate, us in times.items()
)
TABLE = Table(KEY, "2026-01-02T03:04:05", ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BIRD_TUNING")
    tuning.forget_files()
    backends.forget()
    yield
    tuning.forget_files()
    backends.forget()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in the cache of a user of that device, where native is not built."""
    tuning.write_table(tuning.user_file(KEY), TABLE)
    monkeypatch.setattr(tuning, "key_of", lambda device: KEY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: KEY.device)
    monkeypatch.setattr(backends, "why_not", lambda name, *rest: "no" if name == "native" else None)
    monkeypatch.setattr(backends, "works", lambda *use: True)


class DriverLibrary:
    """Stands for the library of the CUDA driver, of version 13.0."""

    def __init__(self, error: int) -> None:
        self.error = error

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return self.error


@pytest.mark.parametrize(("error", "wanted"), [(0, "13000"), (3, "unknown"), (None, "unknown")])
def test_the_key_names_the_driver(error: int | None, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> DriverLibrary:
        if error is None:
            raise OSError(f"{name}: no such file")
        return DriverLibrary(error)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: KEY.device)
    monkeypatch.setattr(ctypes, "CDLL", load)
    tuning.forget_files()
    key = tuning.key_of(DEVICE)
    assert (key.device, key.driver, key.torch) == (KEY.device, wanted, torch.__version__)


def test_a_table_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.json"
    tuning.write_table(path, TABLE)
    assert tuning.read_table(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    assert tuning.read_table(tmp_path / "none.json") is None
    assert json.loads(path.read_text())["version"] == tuning.VERSION


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    tuning.write_table(path, TABLE)

    def full(handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"):
        tuning.write_table(path, Table(KEY, "later", ()))
    assert tuning.read_table(path) == TABLE
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 99, "key": {}, "when": "", "rows": []}',
        '{"version": 1, "key": {"device": "x"}, "when": "", "rows": []}',
        '{"version": 1, "key": {"device": "", "driver": "", "torch": "", "triton": ""}, "when": "", "rows": [{}]}',
    ],
)
def test_a_damaged_table_is_ignored_with_one_warning(text: str) -> None:
    path = tuning.user_file(KEY)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignores the tuning table .*bird tune"):
        assert tuning.table_of(KEY) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.table_of(KEY) is None


def test_bytes_that_are_no_text_and_a_row_that_makes_no_sense(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    senseless = {"zero.json": ("library", 0.0), "endless.json": ("library", float("nan"))}
    candidates = [
        "",
        None,
        7,
        "symmetric",
        "symmetric 1 2",
        "symmetric a b c d e f",
        "symmetric 128 128 64 8 3",
        "library 3",
    ]
    senseless |= {f"{number}.json": (candidate, 1.0) for number, candidate in enumerate(candidates)}
    for name, (candidate, us) in senseless.items():
        tuning.write_table(tmp_path / name, Table(KEY, "", (row("float32", "ieee", 1, 1, 1, candidate, us),)))  # type: ignore[arg-type]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("bytes.json", "deep.json", *senseless):
        with pytest.warns(UserWarning, match=name):
            assert tuning.read_table(tmp_path / name) is None


def test_a_missing_table_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRD_TUNING", str(tmp_path / "missing.json"))
    with pytest.warns(UserWarning, match=r"finds no tuning table at BIRD_TUNING=.*missing\.json"):
        assert tuning.table_of(KEY) is None


def test_whose_table_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's of the very same versions; else one that ships for the device; BIRD_TUNING above both."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    shipped = Table(KEY._replace(torch="1"), "long ago", ROWS[:1])
    tuning.write_table(tmp_path / "shipped" / "nvidia-test-80gb-pcie.json", shipped)
    assert tuning.table_of(KEY) == shipped
    assert tuning.table_of(KEY._replace(device="NVIDIA Other")) is None
    tuning.write_table(tuning.user_file(KEY), TABLE)
    assert tuning.table_of(KEY) == TABLE
    for changed in (KEY._replace(driver="13000"), KEY._replace(torch="2.12"), KEY._replace(triton="3.7")):
        assert tuning.user_file(changed) != tuning.user_file(KEY)
        assert tuning.table_of(changed) == shipped
    other = Table(KEY, "mine", ROWS[:2])
    tuning.write_table(tmp_path / "mine.json", other)
    monkeypatch.setenv("BIRD_TUNING", str(tmp_path / "mine.json"))
    tuning.forget_files()
    assert tuning.table_of(KEY) == other
    monkeypatch.setenv("BIRD_TUNING", "off")
    tuning.forget_files()
    assert tuning.table_of(KEY) is None


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("dtype", "precision", "shape", "found"),
    [
        ("float32", "ieee", (128, 512, 512), (128, 512, 512)),
        ("float32", "ieee", (100, 512, 1280), (128, 512, 512)),  # 1.28 * 2.5 = 3.2 times away
        ("float32", "ieee", (1024, 1024, 1024), (4096, 1024, 1024)),  # 4 times, and 32 from the other
        ("float32", "tf32", (4000, 1024, 1024), (4096, 1024, 1024)),
        ("float32", "ieee", (128, 512, 4200), None),  # 8.2 times
        ("float32", "tf32x3", (128, 512, 512), None),
        ("float16", None, (128, 512, 512), None),
    ],
)
def test_nearest(dtype: str, precision: str | None, shape: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    asked = Problem(*shape, getattr(torch, dtype), DEVICE, precision=precision)
    finding = tuning.nearest(KEY, asked)
    assert (finding and tuple(finding.shape)) == found
    assert tuning.nearest(KEY, asked._replace(estimator="unbiased")) is None
    assert tuning.nearest(KEY._replace(device="NVIDIA Unknown"), asked) is None


@pytest.mark.usefixtures("planted")
def test_auto_follows_the_measurements() -> None:
    small = Problem(100, 512, 512, torch.float32, DEVICE, precision="ieee")
    chosen = backends.decide(small, "auto")
    assert chosen[:3] == ("triton", "measured fastest at 128 x 512 x 512", {"native": "no"})
    assert chosen.measured == {"triton": 30, "library": 200}
    assert set(chosen.predicted) == {"triton", "library"}
    assert backends.resolve(small, "auto") == "triton"
    asked = backends.decide(small, "library")
    assert asked[:2] == ("library", "asked for")
    assert asked.measured == {"native": 9, "triton": 30, "library": 200}
    far = backends.decide(small._replace(n=8), "auto")
    assert far.backend == "triton"
    assert far.reason == "predicted fastest, by the data sheet of: unknown"
    assert not far.measured


@pytest.mark.usefixtures("planted")
def test_a_measurement_overrules_the_model() -> None:
    slow = [row("float32", "ieee", 128, 512, 512, name, us) for name, us in (("triton", 300.0), ("library", 20.0))]
    tuning.write_table(tuning.user_file(KEY), Table(KEY, "", tuple(slow)))
    backends.forget()
    problem = Problem(128, 512, 512, torch.float32, DEVICE, precision="ieee")
    costs = cost.predict(problem, cost.sheet_of(KEY.device))
    assert costs["triton"].us < costs["library"].us
    assert backends.resolve(problem, "auto") == "library"
    tuning.write_table(tuning.user_file(KEY), Table(KEY, "", tuple(slow[1:])))  # not all that can run were measured
    backends.forget()
    assert backends.resolve(problem, "auto") == "triton"


@pytest.mark.usefixtures("planted")
def test_the_symmetric_kernel_is_taken_where_it_was_measured() -> None:
    problem = Problem(8192, 8192, 8192, torch.bfloat16, DEVICE)
    chosen = backends.decide(problem, "auto")
    assert chosen.backend == "library"
    assert chosen.reason.endswith("with the product kernel: symmetric 128 128 64 8 3 0")
    assert tuning.product_kernel(problem) == (128, 128, 64, 8, 3, 0)
    assert tuning.product_kernel(problem._replace(n=1 << 20)) is None


@pytest.mark.parametrize(
    ("dtype", "straight"),
    [
        (torch.float32, True),  # native won wherever it was measured
        (torch.float16, False),
        (torch.bfloat16, True),  # never measured where native could run
    ],
)
@pytest.mark.usefixtures("planted")
def test_calls_go_past_python_where_native_lost_nowhere(
    dtype: torch.dtype, straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "why_not", lambda *call: None)
    most = backends.most_at_once("auto", dtype, DEVICE)
    assert (most > 0) == straight
    assert backends.most_at_once("native", dtype, DEVICE) > 1 << 60
    for n, width in ((128, most // 128), (512, most // 512), (8, most // 8)) if straight and most else ():
        problem = Problem(n, width // 2, width // 2, dtype, DEVICE, estimator="unbiased")
        assert backends.decide(problem, "auto").backend == "native"
    monkeypatch.setattr(backends, "why_not", lambda *call: "no")
    assert backends.most_at_once("native", dtype, DEVICE) == 0


def test_calls_go_past_python_once_all_their_kernels_were_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def resolve(problem: Problem, requested: str) -> str:
        asked.add((problem.estimator, problem.precision, problem.masked))
        return "native"

    for name, answer in (("why_not", None), ("compares", True), ("largest_fused", 7)):
        monkeypatch.setattr(backends, name, lambda *call, answer=answer: answer)
    monkeypatch.setattr(backends, "resolve", resolve)
    assert backends.most_at_once("auto", torch.float32, DEVICE) == 7
    assert asked == set(itertools.product(("biased", "unbiased"), ("ieee", "tf32"), (False, True)))


def test_explain_shows_predicted_and_measured(planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(100, 512)
    monkeypatch.setattr(backends, "compares", lambda device: True)
    backends.forget()
    text = str(explain(x.requires_grad_(), x.detach()))
    assert "  backend    triton, " in text
    assert "  because    measured fastest at 128 x 512 x 512\n" in text
    assert "  time       triton: predicted 56 us (" in text
    assert " launches), measured 30 us\n" in text
    assert "  time       library: predicted " in text
    assert "  not native   no" in text


def test_shipped_tables_are_whole() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        table = tuning.read_table(path)
        assert table is not None
        assert tuning._slug(table.key.device) == path.stem
