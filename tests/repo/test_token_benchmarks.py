"""The benchmark of tokens: everybody answers the same question, and who is wrong gets no time."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import results, tokens, versus
from benchmarks.kernels.tokens import Question

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versus, "SHARE", 0.0)


@pytest.mark.parametrize("which", tokens.CALLS)
def test_everybody_passes_the_gate(which: str) -> None:
    rows = tokens.ask(Question(which, 6, 14, 9, 60), CPU, results.origin(CPU))
    assert [row.provider for row in rows] == list(tokens.CALLS[which])
    for row in rows:
        assert row.red == ""
        assert row.error < 1e-5
        assert row.rounds == versus.timers.FEWEST_ROUNDS


def test_who_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tokens.providers.feature(x.flatten(0, 1), y.flatten(0, 1))

    monkeypatch.setitem(tokens.CALLS["all"], "token_cka_loss", unmasked)
    first, *others = tokens.ask(Question("all", 4, 8, 5, 6), CPU, results.origin(CPU))
    assert first.p50 is None
    assert first.red.startswith("off by")
    assert all(row.p50 for row in others)
    assert "| token_cka_loss | off by" in tokens.page([first, *others])
