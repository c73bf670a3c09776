"""Tables, JSON and pictures of a comparison whose figures are known."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bird.lab.tables import percent
from bird.lab.vision.checkpoints import History
from bird.lab.vision.comparison import Comparison, Outcome, table, write_results
from bird.lab.vision.evaluation import Robustness
from bird.lab.vision.pictures import picture

matplotlib = pytest.importorskip("matplotlib", reason="pictures are an extra: pip install bird-kernels[demo]")


def outcome(method: str, seed: int, held_out: float, cka: float = 0.5) -> Outcome:
    rows: list[dict[str, float]] = [
        {"step": step, "lr": 0.1, "loss": 1 / step, "accuracy": 0.5, "task": 2 / step, "cka/a/b": step / 30}
        for step in (10, 20)
    ]
    return Outcome(
        method,
        seed,
        Robustness(0.9, {"fog": [held_out + 0.1, held_out - 0.1], "speckle_noise": [held_out] * 2}),
        Robustness(0.9, {"contrast": [0.4]}),
        cka,
        History(rows, [{"step": 20, "score": 0.8}], 20, 0.8),
    )


COMPARISON = Comparison(
    [
        outcome(method, seed, held_out)
        for seed in (0, 1)
        for method, held_out in (
            ("None", 0.5),
            ("FT", 0.55 + 0.1 * seed),
            ("BIRD", 0.45),
            ("Ceiling", 0.7 + 0.1 * seed),
        )
    ],
    "None",
    "Ceiling",
)


def test_methods_and_shares() -> None:
    assert COMPARISON.methods == ["None", "FT", "BIRD", "Ceiling"]
    assert COMPARISON.contenders == ["FT", "BIRD"]
    assert COMPARISON.recovered("FT") == pytest.approx([0.05 / 0.2, 0.15 / 0.3])  # seed by seed, then the mean
    assert COMPARISON.recovered("BIRD") == pytest.approx([-0.25, -1 / 6])
    assert COMPARISON.recovered("None") == [0, 0]
    assert COMPARISON.recovered("Ceiling") == [1, 1]


def test_percent_gives_mean_and_sample_deviation() -> None:
    assert percent([0.25, 0.5]) == "37.5 ± 17.7"
    assert percent([0.25]) == "25.0"


def test_the_table_is_markdown_with_every_figure() -> None:
    lines = table(COMPARISON).splitlines()
    assert len(set(map(len, lines))) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method",
        "clean",
        "held-out corruptions",
        "teacher's corruptions",
        "gap recovered",
        "CKA to teacher",
    ]
    assert all(set(cell) <= {"-", ":"} for cell in cells[1])
    assert cells[3] == ["FT", "90.0 ± 0.0", "60.0 ± 7.1", "40.0 ± 0.0", "37.5 ± 17.7", "0.50"]
    assert cells[4] == ["BIRD", "90.0 ± 0.0", "45.0 ± 0.0", "40.0 ± 0.0", "-20.8 ± 5.9", "0.50"]
    assert [row[4] for row in (cells[2], cells[5])] == ["", ""]


def test_results_say_everything_and_read_back(tmp_path: Path) -> None:
    write_results(COMPARISON, {"seeds": 2}, tmp_path / "results.json")
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["seeds"] == 2
    assert data["summary"]["FT"]["held_out"] == pytest.approx([0.55, 0.65])
    assert data["summary"]["FT"]["pooled"] == pytest.approx([(0.9 + 2 * 0.55) / 3, (0.9 + 2 * 0.65) / 3])
    assert data["summary"]["FT"]["gap_recovered"] == pytest.approx([0.25, 0.5])
    assert [Outcome.from_json(one) for one in data["outcomes"]] == COMPARISON.outcomes
    assert Outcome.from_json(asdict(COMPARISON.outcomes[1])) == COMPARISON.outcomes[1]


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_picture_is_a_png(tmp_path: Path, seeds: int) -> None:
    chosen = [one for one in COMPARISON.outcomes if one.seed < seeds]
    picture(Comparison(chosen, "None", "Ceiling"), tmp_path / "results.png", title="A title")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG\r\n")
    image = matplotlib.image.imread(tmp_path / "results.png")
    assert image.shape[:2] == (1118, 1690)
    colours = {tuple(pixel) for pixel in (image[::2, ::2, :3] * 255).round().astype(int).reshape(-1, 3).tolist()}
    assert {(0, 114, 178), (230, 159, 0)} <= colours  # the two contenders' dots
    assert [path.name for path in tmp_path.iterdir()] == ["results.png"]


def test_without_matplotlib_the_picture_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        picture(COMPARISON, tmp_path / "results.png", title="")
    assert list(tmp_path.iterdir()) == []
