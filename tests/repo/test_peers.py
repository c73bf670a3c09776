"""The page for those who come from other packages: every row of its tables runs, and gives what it says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/guide/from-pytorch-cka.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| ([\d. -]+?) \| ([\d. -]+?) \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's block defines."""
    for peer in ("cka", "cka_pytorch", "torch_cka"):
        pytest.importorskip(peer, reason="in the bench extra; cka-pytorch needs Python 3.11")
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], found)
    return found


def test_every_row_is_read() -> None:
    tables = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(tables) == len(ROWS) == 8


@pytest.mark.parametrize("row", ROWS, ids=[f"{number}-{row[0][:30]}" for number, row in enumerate(ROWS)])
def test_a_row_gives_what_it_says(row: tuple[str, ...], names: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        values = [np.asarray(eval(code, names), dtype=np.float64).ravel() for code in row[:2]]
    for found, shown in zip(values, row[2:], strict=True):
        np.testing.assert_allclose(found, [float(number) for number in shown.split()], atol=1.5e-4, rtol=1e-5)
    if "epsilon=0.0" in row[0] or "CKACalculator" not in row[0]:  # the other row shows what its epsilon does
        np.testing.assert_allclose(*values, atol=2e-4, rtol=1e-6)


def test_grams_and_pictures_as_the_page_says(names: dict[str, Any], tmp_path: Path) -> None:
    x, y, grams = names["x"], names["y"], (names["K"], names["L"])
    bird = names["bird"]
    expected = bird.cka(x, y, estimator="unbiased").item()
    assert bird.cka_from_grams(*grams, estimator="unbiased").item() == pytest.approx(expected, rel=1e-5)
    found = bird.compare(names["a"], names["b"], names["loader"], **names["options"])
    found.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"cka.png", "trend.png"}
    np.testing.assert_array_equal(bird.Similarity.load(tmp_path).matrix, found.matrix)
