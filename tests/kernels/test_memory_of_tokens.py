"""What token features need beside themselves: never a square of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bird_kernels import explain, plan, token_cka_loss
from bird_kernels.types import Problem
from tests.accuracy import features


def test_a_language_models_shape_needs_no_square_of_tokens() -> None:
    """65,536 tokens of width 4,096 in bf16. On CUDA the products of features are all; the library on a CPU adds the two
    centred sides widened to fp32."""
    x = torch.zeros((), dtype=torch.bfloat16).expand(16, 4096, 4096).requires_grad_()
    y = torch.zeros((), dtype=torch.bfloat16).expand(16, 4096, 4096)
    here = explain(x, y, mask=torch.ones(16, 4096, dtype=torch.bool), row_dims=2, backend="library")
    products, widened = 2 * 4 * 4096**2, 2 * 4 * 65_536 * 4096
    assert (here.route, here.workspace) == ("cross", products + widened)
    there = Problem(65_536, 4096, 4096, torch.bfloat16, torch.device("cuda"), masked=True)
    assert plan.choose_route(there.n, there.p, there.q) == "cross"
    assert plan.workspace(there, "cross", "triton") == products
    assert products < 65_536**2 // 8  # less than a bit for every pair of tokens


def peak(run: Callable[[], object]) -> int:
    """Bytes that a call holds at its worst moment, by PyTorch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_of_many_tokens() -> None:
    """8,192 tokens of width 256, bf16, all of them rows: a few fp32 copies of the features, no square of tokens."""
    x, y = (side.reshape(8, 1024, 256) for side in features(8192, 256, 256, torch.bfloat16))
    x.requires_grad_()
    mask = torch.arange(1024) < torch.arange(896, 1024, 16)[:, None]
    copy, square = 4 * x.numel(), 4 * 8192**2

    def run() -> None:
        torch.autograd.grad(token_cka_loss(x, y, mask=mask, backend="library"), x)

    assert 2 * copy < peak(run) < 5 * copy < square / 6


@pytest.mark.parametrize("steps", [64, 256, 512])
def test_memory_of_single_sequences(steps: int, estimator: str) -> None:
    """The docstring's figures, for p + q = 256; the batch's square would be 8 times the products and more."""
    x, y = (side.reshape(8, steps, 128) for side in features(8 * steps, 128, 128))
    x.requires_grad_()
    mask = torch.ones(8, steps, dtype=torch.bool)

    def run() -> None:
        torch.autograd.grad(token_cka_loss(x, y, tokens="sequence", mask=mask, estimator=estimator), x)

    run()
    copies = 4 * (x.numel() + y.numel())
    assert copies < peak(run) < (5.1 if steps == 256 else 3.6) * copies
