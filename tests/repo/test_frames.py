"""How many of our functions Python enters for a call: each costs a tenth of a microsecond and a line of a traceback."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bird
import bird_kernels
from bird_kernels import ops

OURS = tuple(str(Path(package.__file__).parent) for package in (bird, bird_kernels) if package.__file__)
N, P, Q = 128, 512, 1280


def entered(function: Callable[[], Any]) -> Counter[str]:
    """The functions of ours that a call enters, once everything is loaded and remembered."""
    function()
    function()
    found: Counter[str] = Counter()

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(OURS):
            found[f"{Path(code.co_filename).name}:{code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


@pytest.fixture(scope="module")
def calls() -> dict[str, Callable[[], Any]]:
    x, y = torch.randn(N, P, requires_grad=True), torch.randn(N, Q)
    loss, task = bird.BirdLoss(pairs=[("teacher", "student")]), torch.ones(())
    return {
        "cka_loss": lambda: bird_kernels.cka_loss(x, y),
        "BirdLoss": lambda: loss(task, {"teacher": y}, {"student": x}),
    }


@pytest.mark.parametrize(("n", "width"), [(128, 64), (128, 512)])  # by products of columns, and of rows
def test_a_forward_alone_enters_fewer(n: int, width: int) -> None:
    x, y = torch.randn(n, width), torch.randn(n, width)
    found = entered(lambda: bird_kernels.cka_loss(x, y))
    assert found["library.py:forward_alone"] == 1
    assert not found["library.py:forward"] + found["inputs.py:prepare"]
    assert found.total() <= 28, found


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("name", "most"), [("cka_loss", 50), ("BirdLoss", 60)])
def test_a_call_enters_few_functions(
    name: str, most: int, native: bool, calls: dict[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once any test has loaded the native backend, which is asked first and leaves matrices of this size."""
    monkeypatch.setattr(ops, "at_once", (lambda *_: None) if native else None)
    found = entered(calls[name])
    assert found["call.py:evaluate"] == found["library.py:forward"] == 1
    assert found.total() <= most, found
