"""The benchmarks of layers and of tokens: everybody answers the same question, and who is wrong gets no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.kernels import layers, tokens, versus
from benchmarks.kernels.layers import LAYERS
from benchmarks.kernels.tokens import TOKENS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versus, "SHARE", 0.0)
    monkeypatch.setitem(layers.NETWORKS, "ResNet18", [8, 24, 40])


def test_networks_are_as_deep_as_their_names() -> None:
    networks = layers.NETWORKS
    assert len(networks["ResNet50"]) == 50
    assert networks["ResNet50"][1:4] == [64, 64, 256]
    assert networks["ResNet50"][-4:] == [512, 512, 2048, 1000]


@pytest.mark.parametrize("what", ["matrix", "matrix, itself", "pairs"])
def test_everybody_knows_the_layers(what: str) -> None:
    pytest.importorskip("cka", reason="pytorch-cka is in the bench extra")
    found = LAYERS.ask(layers.LayersQuestion(what, "ResNet18", 32), CPU)
    assert [row.provider for row in found] == list(layers.PAIRS if what == "pairs" else layers.MATRIX)
    assert all((row.red, row.rounds) == ("", 5) and row.error < 1e-5 for row in found)


@pytest.mark.parametrize("which", tokens.CALLS)
def test_everybody_knows_the_tokens(which: str) -> None:
    found = TOKENS.ask(tokens.TokensQuestion(which, 6, 14, 9, 60), CPU)
    assert [row.provider for row in found] == list(tokens.CALLS[which])
    assert all((row.red, row.rounds) == ("", 5) and row.error < 1e-5 for row in found)


def test_who_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return tokens.providers.by_features(x.flatten(0, 1), y.flatten(0, 1))

    monkeypatch.setitem(tokens.CALLS["all"], "token_cka_loss", unmasked)
    first, *others = TOKENS.ask(tokens.TokensQuestion("all", 4, 8, 5, 6), CPU)
    assert first.p50 is None
    assert first.red.startswith("off by")
    assert all(row.p50 for row in others)
    assert "| token_cka_loss        | off by" in TOKENS.page([first, *others])


def test_uncentred_products_are_wrong_far_from_the_origin() -> None:
    pytest.importorskip("cka", reason="pytorch-cka is in the bench extra")
    found = {row.provider: row for row in LAYERS.ask(layers.LayersQuestion("matrix", "ResNet18", 200, mean=100.0), CPU)}
    assert found["cka_matrix"].red == ""
    assert found["pytorch-cka"].p50 is None
    assert found["pytorch-cka"].red.startswith("off by")


@pytest.mark.parametrize(
    ("asked", "question"),
    [(LAYERS, layers.LayersQuestion("pairs", "ResNet18", 16)), (TOKENS, tokens.TokensQuestion("last", 6, 14, 9, 9))],
    ids=["layers", "tokens"],
)
def test_from_the_command_line_to_files(
    asked: versus.Benchmark,
    question: versus.Question,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(versus, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["it", "--save"])
    replace(asked, questions=[question]).main("what it is")
    kept, page = sorted(tmp_path.iterdir())
    assert (kept.suffix, page.suffix) == (".csv", ".md")
    assert kept.stem.endswith(f"-{asked.name}")
    assert len(rows.load_rows(kept, asked.row)) == 3
    assert page.read_text() in capsys.readouterr().out
