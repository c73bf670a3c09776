"""Tables of errors and of batches: cells computed anew come out as committed."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("cka", reason="a rival, of the bench extra")

from benchmarks.accuracy import batches, measure
from benchmarks.rows import load_rows
from tests.repo.documents import ROOT

COMMITTED = {(row["loss"], row["dtype"], row["mean"]): row["error"] for row in load_rows(measure.RESULTS)}


def test_every_cell_is_there() -> None:
    cells = [(name, d, mean) for d in measure.DTYPES for name in measure.LOSSES for mean in measure.MEANS]
    assert list(COMMITTED) == cells


@pytest.mark.parametrize("name", measure.LOSSES)
def test_a_cell_comes_out_again(name: str) -> None:
    """Rounding differs between processors, the order of magnitude does not."""
    found = measure.gradient_error(name, 64, "float32")
    assert COMMITTED[name, "float32", 64] / 3 < found < 3 * COMMITTED[name, "float32", 64]


def test_ours_is_within_its_promise() -> None:
    ours = [
        error for (name, dtype, _), error in COMMITTED.items() if name.startswith("cka_loss") and dtype == "float32"
    ]
    assert max(ours) < 1e-4


def test_a_gradient_that_is_not_finite_is_not_a_number() -> None:
    assert math.isnan(measure.gradient_error("authors' formula", 1000, "bfloat16"))


TABLE = {(row["spectrum"], row["estimator"], row["n"]): row for row in load_rows(batches.RESULTS)}


@pytest.mark.parametrize("cell", [("white", "biased", 128), ("power law", "unbiased", 64)])
def test_a_batch_comes_out_again(cell: tuple[str, str, int]) -> None:
    found = batches.of_batches(*cell)
    for name in ("all", "value", "deviation"):
        assert TABLE[cell][name] == pytest.approx(found[name], abs=1.1e-3)
    assert TABLE[cell]["cosine"] == pytest.approx(found["cosine"], abs=0.011)


def test_the_guide_says_what_was_measured() -> None:
    text = (ROOT / "docs/guide/big-batches.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([\d,]+) " + r"\| (\S+) \| (\S+) ± (\S+) \| (\S+) " * 2 + r"\|$", text, re.MULTILINE)
    assert len(shown) == 5
    for n, *cells in shown:
        for spectrum, (biased, unbiased, deviation, cosine) in zip(
            batches.SPECTRA, (cells[:4], cells[4:]), strict=True
        ):
            one, other = (TABLE[spectrum, estimator, int(n.replace(",", ""))] for estimator in batches.ESTIMATORS)
            assert [biased, cosine] == [f"{one[name]:.2f}" for name in ("value", "cosine")]
            assert [unbiased, deviation] == [f"{other[name]:.2f}" for name in ("value", "deviation")]
