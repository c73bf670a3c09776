"""docs/scale.md says what the formulas give, and its objectives differ as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("pytest_benchmark", reason="the benchmarks need the bench extra")

from benchmarks.kernels import results
from benchmarks.scale import bench, model


def test_the_page_is_what_the_formulas_give() -> None:
    page = model.PAGE.read_text(encoding="utf-8")
    assert model.written(page) == page, "python -m benchmarks.scale.model writes it anew"
    assert model.PICTURE.exists()


def test_crossover_by_hand() -> None:
    """fp32, 512 + 512 features, 128 rows a rank: upper blocks 163,840, all but the wire's common (R-1)/R."""
    merged = 2 * (4 * (2 * 163_840 + 512 * 512) + 8 * 1025)
    assert 9 * 128 * 1024 * 4 < merged <= 10 * 128 * 1024 * 4
    assert model.crossover(model.SHAPES[0]) == 10
    assert model.both(model.SHAPES[0], 8) == (merged * 7 // 8, 7 * 128 * 1024 * 4)


def test_seconds_and_bytes_for_people() -> None:
    assert [model.size_of(size) for size in (999, 1_000, 2.15e9, 1.1e12)] == ["999 B", "1 kB", "2.15 GB", "1.1 TB"]
    assert [model.time_of(t) for t in (8.16e-6, 0.00142, 3.0)] == ["8.16 us", "1.42 ms", "3 s"]


def test_a_wrong_contestant_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    contestants = {**bench.CONTESTANTS, "autograd": lambda x, y: bench.cka_loss(x, y) + 1e-3 * x.sum()}
    monkeypatch.setattr(bench, "CONTESTANTS", contestants)
    monkeypatch.setattr(bench, "SHARE", 0.0)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = bench.compete((12, 5, 4), results.origin(torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    by_name = {row.name: row for row in rows}
    assert {name for name, row in by_name.items() if row.red} == {"autograd"}
    assert (by_name["autograd"].p50, by_name["autograd"].rounds) == (None, 0)
    assert all(by_name[name].rounds == 3 for name in ("merged", "gathered", "average"))
    assert "off by" in bench.saved(rows).with_suffix(".md").read_text()
