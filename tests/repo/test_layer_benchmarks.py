"""The benchmark of many layers: everybody answers the same question, who is wrong gets no time, the page says it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cka", reason="pytorch-cka is in the bench extra")

from benchmarks.kernels import layers, results, versus
from benchmarks.kernels.layers import Question

CPU = torch.device("cpu")


def ask(question: Question, monkeypatch: pytest.MonkeyPatch) -> dict[str, layers.Row]:
    monkeypatch.setattr(versus, "SHARE", 0.0)
    monkeypatch.setitem(layers.NETWORKS, "ResNet18", [8, 24, 40])
    return {row.provider: row for row in layers.ask(question, CPU, results.origin(CPU))}


def test_networks_are_as_deep_as_their_names() -> None:
    assert [len(widths) for widths in layers.NETWORKS.values()] == [18, 50]
    assert layers.NETWORKS["ResNet50"][1:4] == [64, 64, 256]
    assert layers.NETWORKS["ResNet50"][-4:] == [512, 512, 2048, 1000]


@pytest.mark.parametrize("what", ["matrix", "matrix, itself", "pairs"])
def test_everybody_passes_the_gate(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ask(Question(what, "ResNet18", 32), monkeypatch)
    assert set(rows) == set(layers.PAIRS if what == "pairs" else layers.MATRIX)
    for row in rows.values():
        assert row.red == ""
        assert row.error < 1e-5
        assert row.rounds == versus.timers.FEWEST_ROUNDS


def test_who_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncentred Gram matrices at a mean of a hundred spreads."""
    rows = ask(Question("matrix", "ResNet18", 200, mean=100.0), monkeypatch)
    assert rows["cka_matrix"].red == ""
    assert rows["pytorch-cka"].p50 is None
    assert rows["pytorch-cka"].red.startswith("off by")
    assert "| pytorch-cka | off by" in layers.page(list(rows.values()))
