"""A picture shows what the rows say: its cells are compared with the CSV files that are committed."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="plots need matplotlib")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.kernels.loss import BENCHMARK, OURS
from benchmarks.rows import load_rows

PICTURES = sorted(BENCHMARK.folder.glob("*.png"))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    return saved


def numbers(labels: list) -> list[int]:
    return [int(label.get_text().replace(",", "")) for label in labels]


def cells(axes: Axes) -> dict[tuple[int, int], str]:
    """The numbers of a map, by n and d."""
    ns, ds = numbers(axes.get_xticklabels()), numbers(axes.get_yticklabels())
    return {(ns[round(t.get_position()[0])], ds[round(t.get_position()[1])]): t.get_text() for t in axes.texts}


MODES = "forward", "forward+backward"  # the rows of a picture, from the top


def linear_times(path: Path, mode: str) -> dict[tuple[int, int], dict[str, float]]:
    """Medians of the biased linear loss in fp32, by n and d and provider."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            wanted = row["estimator"], row["mode"], row["dtype"], row["precision"]
            equal = row["p"] == row["q"] and row["problem"] != "rbf"
            if equal and wanted == ("biased", mode, "float32", "ieee") and row["p50"]:
                found.setdefault((int(row["n"]), int(row["p"])), {})[row["provider"]] = float(row["p50"])
    return found


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_the_cells_of_a_picture_are_the_files(path: Path, figures: list[Figure], tmp_path: Path) -> None:
    BENCHMARK.draw(load_rows(path.with_suffix(".csv")), tmp_path / "device.png")
    (figure,) = figures
    found = {}
    for mode, shown in zip(MODES, [cells(axes) for axes in figure.axes if axes.images], strict=True):
        times = linear_times(path.with_suffix(".csv"), mode)
        rivals = {key: [t for name, t in line.items() if name not in OURS] for key, line in times.items()}
        assert shown == {key: f"{min(rivals[key]) / line['auto']:.2g}" for key, line in times.items()}
        found[mode] = shown
    assert found["forward"][128, 512] == "0.92"
    assert found["forward+backward"][128, 512] == "1.1"
    assert found["forward+backward"][512, 512] == "1.4"


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_the_curves_of_a_picture_are_the_files(path: Path, figures: list[Figure], tmp_path: Path) -> None:
    BENCHMARK.draw(load_rows(path.with_suffix(".csv")), tmp_path / "device.png")
    for mode, width, least, first in ((MODES[0], 64, 3, 0), (MODES[1], 512, 8, 3)):
        times = linear_times(path.with_suffix(".csv"), mode)
        over_n, over_d = figures[0].axes[first : first + 2]
        for axes, key in ((over_n, lambda size, width=width: (size, width)), (over_d, lambda size: (128, size))):
            for curve in axes.get_lines():
                name = curve.get_label()
                drawn = {key(int(size)): time for size, time in zip(*curve.get_data(), strict=True)}
                assert name == "floor" or drawn == {at: times[at][name] for at in drawn}
                assert name != "auto" or len(drawn) >= least


def test_without_matplotlib_or_rows_there_is_no_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = load_rows(PICTURES[0].with_suffix(".csv"))
    BENCHMARK.draw(rows[:5], tmp_path / "few.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    BENCHMARK.draw(rows, tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []
