"""A student whose lowest blocks keep their weights: as the whole network with those frozen, and run once for a text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bird.lab.language import experiment
from bird.lab.language.classifiers import Classifier, class_probabilities, train_classifier
from bird.lab.language.experiment import classifier
from bird.lab.language.frozen import LowerBlocks, UpperBlocks
from bird.lab.language.recipe import Training, parse
from tests.bird.test_recipes import LANGUAGE, WEAK
from tests.bird.test_weak_to_strong import BYTES, gap, guided, snippets, weak
from tests.bird.tiny import gpt2, llama, saved


def cut(blocks: int = 1, **changes: Any) -> Classifier:
    model = llama(**changes)
    return Classifier(UpperBlocks(copy.deepcopy(model), LowerBlocks(model, blocks)))


@pytest.mark.parametrize("guides", [False, True])
def test_it_learns_as_the_whole_network_with_frozen_blocks(guides: bool, tmp_path: Path) -> None:
    texts, targets = snippets(14)
    training = Training(epochs=2, batch_size=4, micro_batch=2, lr=1e-2)
    ours, whole = cut().double(), Classifier(llama()).double()
    ours.backbone.lower.model.double()
    theirs: Any = whole.backbone
    before = copy.deepcopy(whole)
    for part in (theirs.embed_tokens, theirs.layers[0]):
        part.requires_grad_(False)
    for model, name in ((ours, "ours"), (whole, "whole")):
        guidance = guided(weak()) if guides else None
        train_classifier(model, BYTES, texts, targets, training, tmp_path / name, guidance=guidance)
    upper: Any = ours.backbone.upper
    assert gap(upper.layers[0], theirs.layers[1]) < 1e-9
    assert gap(upper.norm, theirs.norm) < 1e-9
    assert gap(ours.head, whole.head) < 1e-9
    assert gap(theirs.layers[1], before.backbone.layers[1]) > 1e-3  # type: ignore[union-attr, index]
    assert gap(ours.backbone.lower.model.layers[0], before.backbone.layers[0]) == 0  # type: ignore[union-attr, index]
    for batch_size in (3, 64):
        chances = class_probabilities(ours, BYTES, texts, batch_size=batch_size)
        torch.testing.assert_close(chances, class_probabilities(whole, BYTES, texts), atol=1e-6, rtol=1e-6)


def test_a_text_passes_through_the_lowest_blocks_once(tmp_path: Path) -> None:
    """Of all students of a process, whatever surrounds it in a batch; and a student's weights are those above alone."""
    experiment._lower_blocks.cache_clear()
    texts, targets = snippets(12)
    students = [classifier(saved("decoder"), "last", seed, 1)[0] for seed in (0, 1)]
    lower: Any = students[0].backbone.lower
    assert students[1].backbone.lower is lower
    seen: list[int] = []
    lower.model.register_forward_pre_hook(lambda _m, _a, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    for student, name in zip(students, ("one", "two"), strict=True):
        train_classifier(student, BYTES, texts, targets, Training(epochs=2, batch_size=4), tmp_path / name)
        class_probabilities(student, BYTES, [*texts, "another"])
    assert sum(seen) == 13
    assert gap(students[0], students[1]) > 0
    names = students[0].state_dict()
    assert not [name for name in names if "embed" in name or "layers.1" in name]
    assert any("layers.0" in name for name in names)


def test_padding_stands_on_either_side() -> None:
    model, whole = cut().eval(), Classifier(llama()).eval()
    ids = torch.tensor([[5, 9, 3, 0, 0], [7, 0, 8, 4, 6]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    left = torch.tensor([[0, 0, 5, 9, 3], [7, 0, 8, 4, 6]])
    with torch.no_grad():
        wanted = whole(ids, mask).logits
        torch.testing.assert_close(model(ids, mask).logits, wanted)
        torch.testing.assert_close(model(left, mask.flip(1) * mask[1]).logits, wanted)


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="not 'gpt2'"):
        LowerBlocks(gpt2(), 1)
    with pytest.raises(ValueError, match="frozen = 2 leaves none of 2 blocks"):
        LowerBlocks(llama(), 2)
    for table, part in ((LANGUAGE, "transfer"), (LANGUAGE, "teacher"), (WEAK, "teacher")):
        with pytest.raises(ValueError, match="frozen is for students of weak-to-strong"):
            parse("mine", table | {part: {"frozen": 1}})
    with pytest.raises(ValueError, match="sciq has no validation rows"):
        parse("mine", WEAK | {"data": {"source": "sciq", "part": "validation"}})
    assert "frozen" not in Training().about
    assert Training(frozen=2).about["frozen"] == 2
