"""The corruptions' benchmark: it measures every case, and what it keeps is whole and what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.corruptions import throughput
from bird.lab.vision.corruptions import CORRUPTIONS
from tests.bird.usual_corruptions import REFERENCE


def test_every_case_is_measured_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["throughput", "--batch", "2", "--usual", "1", "--rounds", "1", "--save"])
    threads = torch.get_num_threads()
    try:
        throughput.main()
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*.csv")
    kept = rows.load_rows(path)
    assert [(row["corruption"], row["severity"]) for row in kept] == [(n, s) for n in CORRUPTIONS for s in range(1, 6)]
    assert all(row[way] > 0 for row in kept for way in throughput.WAYS)
    total = sum(row["usual"] for row in kept) / sum(row["ours"] for row in kept)
    line = next(line for line in path.with_suffix(".md").read_text(encoding="utf-8").splitlines() if "all 19" in line)
    assert float(line.split("|")[4]) == pytest.approx(total, abs=0.06)
    assert line in capsys.readouterr().out


def test_the_usual_way_knows_every_corruption() -> None:
    assert set(REFERENCE) == set(CORRUPTIONS)
