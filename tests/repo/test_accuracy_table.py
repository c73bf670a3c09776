"""The README's table of errors: cells computed anew come out as committed."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("cka", reason="a rival, of the bench extra")

from benchmarks.accuracy import measure

COMMITTED = {(row.loss, row.dtype, row.mean): row.error for row in measure.committed()}


def test_every_cell_is_there() -> None:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in measure.DTYPES]
    assert list(COMMITTED) == [(name, d, mean) for d in dtypes for name in measure.LOSSES for mean in measure.MEANS]


@pytest.mark.parametrize("name", measure.LOSSES)
def test_a_cell_comes_out_again(name: str) -> None:
    """Rounding differs between processors, the order of magnitude does not."""
    found = measure.error(name, 64, torch.float32)
    assert COMMITTED[name, "float32", 64] / 3 < found < 3 * COMMITTED[name, "float32", 64]


def test_ours_is_within_its_promise() -> None:
    ours = [
        error for (name, dtype, _), error in COMMITTED.items() if name.startswith("cka_loss") and dtype == "float32"
    ]
    assert max(ours) < 1e-4


def test_a_gradient_that_is_not_finite_is_not_a_number() -> None:
    assert math.isnan(measure.error("authors' formula", 1000, torch.bfloat16))
