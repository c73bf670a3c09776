"""Measurements that ship with the package choose the backend: the nearest one, if it speaks of this problem at all."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from bird_kernels import backends, timings
from bird_kernels.timings import Shape
from bird_kernels.types import Problem

DEVICE = "NVIDIA Test 80GB (PCIe)"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "FOLDER", tmp_path)
    rows = [
        (DEVICE, "float32", "ieee", 128, 512, 512, {"native": 9e-6, "triton": 3e-5, "library": 2e-4}),
        (DEVICE, "float32", "ieee", 4096, 1024, 1024, {"triton": 9e-4, "library": 7e-4}),
        (DEVICE, "float32", "tf32", 4096, 1024, 1024, {"triton": 3e-4, "library": 4e-4}),
        (DEVICE, "float16", "", 16, 16, 16, {"native": 2e-5, "triton": 1e-5, "library": 3e-5}),
        ("NVIDIA Test 80GB PCIe", "bfloat16", "", 128, 512, 512, {"native": 1.0, "triton": 1.0, "library": 1e-9}),
    ]
    with timings.file_of(DEVICE).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(timings.COLUMNS)
        for device, dtype, precision, n, p, q, seconds in rows:
            for backend, value in seconds.items():
                writer.writerow([device, "abc", dtype, precision, "biased", n, p, q, backend, value])
    timings._findings.cache_clear()
    yield
    timings._findings.cache_clear()


def test_file_is_named_after_the_device() -> None:
    assert timings.file_of(DEVICE).name == "nvidia-test-80gb-pcie.csv"


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
        ("float16", "", (128, 512, 512), None),
        ("bfloat16", "", (128, 512, 512), None),  # another device with a name that gives the same file
    ],
)
def test_nearest(dtype: str, precision: str, shape: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    finding = timings.nearest(DEVICE, dtype, precision, "biased", Shape(*shape))
    assert (finding and tuple(finding.shape)) == found
    assert timings.nearest(DEVICE, dtype, precision, "unbiased", Shape(*shape)) is None
    assert timings.nearest("NVIDIA Unknown", dtype, precision, "biased", Shape(*shape)) is None


@pytest.mark.usefixtures("planted")
def test_fastest_of_those_that_can_run() -> None:
    small, large = (timings.nearest(DEVICE, "float32", "ieee", "biased", Shape(n, 512, 512)) for n in (128, 4096))
    assert timings.fastest(small, ["native", "triton", "library"]) == "native"
    assert timings.fastest(small, ["triton", "library"]) == "triton"
    assert timings.fastest(large, ["triton", "library"]) == "library"
    assert timings.fastest(large, ["native", "triton", "library"]) is None  # not measured: no verdict
    assert timings.fastest(None, ["triton", "library"]) is None


@pytest.mark.usefixtures("planted")
def test_auto_follows_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE)
    monkeypatch.setattr(backends, "why_not", lambda name, dtype, device, few: "no" if name == "native" else None)
    backends._prefer.cache_clear()
    device = torch.device("cuda:62")
    large = Problem(4096, 1024, 1024, torch.float32, device, precision="ieee")
    assert backends.prefer(large, "triton") == (
        "library", "fastest at 4096 x 1024 x 1024: triton 900 us, library 700 us"
    )  # fmt: skip
    assert backends.prefer(large._replace(precision="tf32"), "triton")[0] == "triton"
    assert backends.prefer(large._replace(n=40_000), "triton") == ("triton", "")
    assert backends.prefer(large._replace(device=torch.device("cpu")), "library") == ("library", "")
    backends._prefer.cache_clear()


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(
    ("name", "dtype", "auto"),
    [
        (DEVICE, torch.float32, True),  # native won wherever it was measured
        (DEVICE, torch.float16, False),
        (DEVICE, torch.bfloat16, True),  # another device's
        ("NVIDIA Unknown", torch.float16, True),
    ],
)
def test_calls_go_through_the_measurements_of_their_device(
    name: str, dtype: torch.dtype, auto: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And past them where native lost nowhere, or a backend was asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(backends, "why_not", lambda *call: None)
    device = torch.device("cuda:61")
    assert backends.is_always_native("auto", dtype, device) is auto
    assert backends.is_always_native("native", dtype, device)
    monkeypatch.setattr(backends, "why_not", lambda *call: "no")
    assert not backends.is_always_native("native", dtype, device)


def test_shipped_files_are_whole() -> None:
    for path in timings.FOLDER.glob("*.csv"):
        rows = list(csv.DictReader(path.open(newline="")))
        assert {timings.file_of(row["device"]) for row in rows} == {path}
        assert all(tuple(row) == timings.COLUMNS and float(row["seconds"]) > 0 for row in rows)


def test_a_result_file_becomes_a_shipped_one(planted: None, tmp_path: Path) -> None:
    from benchmarks.kernels import results, ship

    def row(provider: str, timer: str, seconds: float | None, mode: str = "forward+backward") -> results.Row:
        known = dict(
            device=DEVICE, commit="abc", problem="bird", n=100, p=200, q=300, dtype="bfloat16", precision="",
            estimator="unbiased", mode=mode, timer=timer, provider=provider, p50=seconds,
            red="" if seconds else "wrong",
        )  # fmt: skip
        kinds = {field.name: str(field.type) for field in fields(results.Row)}
        return results.Row(**{name: known.get(name, "" if kind == "str" else None) for name, kind in kinds.items()})

    rows = [
        row("triton", "host", 4e-5), row("triton", "device", 1e-5), row("library", "host", 9e-5),
        row("library", "device", 2e-4), row("native", "host", 1e-5), row("native", "device", None),
        row("naive", "host", 1e-9), row("naive", "device", 1e-9), row("triton", "device", 7.0, mode="forward"),
    ]  # fmt: skip
    results.write(tmp_path / "measured.csv", rows)
    target = ship.ship(tmp_path / "measured.csv")
    assert target == timings.file_of(DEVICE)
    timings._findings.cache_clear()
    finding = timings.nearest(DEVICE, "bfloat16", "", "unbiased", Shape(100, 200, 300))
    assert finding == (Shape(100, 200, 300), {"triton": 4e-5, "library": 2e-4})
    results.write(tmp_path / "none.csv", rows[4:6])
    with pytest.raises(ValueError, match="must hold measurements of one GPU with host and device time"):
        ship.ship(tmp_path / "none.csv")
