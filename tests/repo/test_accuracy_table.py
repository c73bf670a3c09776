"""The README's table of errors: cells computed anew come out as committed."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("cka", reason="a rival, of the bench extra")

from benchmarks.accuracy import measure
from benchmarks.rows import load_rows

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
