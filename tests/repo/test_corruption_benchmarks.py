"""The corruptions' benchmark: it measures every case, and what it keeps is whole and what the page says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.corruptions import throughput
from benchmarks.corruptions.reference import REFERENCE
from bird.lab.vision.corruptions import CORRUPTIONS


def test_every_case_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        rows = throughput.measure(batch=2, usual_images=1, rounds=1, device=torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert [(row.corruption, row.severity) for row in rows] == [(n, s) for n in CORRUPTIONS for s in range(1, 6)]
    assert all(min(row.usual, row.ours, row.ours_two_threads) > 0 for row in rows)
    path = throughput.save(rows)
    with path.open(encoding="utf-8", newline="") as file:
        kept = list(csv.DictReader(file))
    assert [float(row["ours"]) for row in kept] == pytest.approx([row.ours for row in rows], rel=1e-3)
    total = sum(row.usual for row in rows) / sum(row.ours for row in rows)
    line = next(line for line in path.with_suffix(".md").read_text(encoding="utf-8").splitlines() if "all 19" in line)
    assert line.split("|")[4].strip() == f"{total:.1f}"


def test_the_usual_way_knows_every_corruption() -> None:
    assert set(REFERENCE) == set(CORRUPTIONS)
