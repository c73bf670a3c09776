"""Weak-to-strong: training against a plain loop, pooling against single texts, and a teacher that stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bird.lab.language.classifiers import (
    Classifier,
    accuracy,
    batched,
    certain,
    class_probabilities,
    tokenize,
    train_classifier,
)
from bird.lab.language.recipe import Training
from bird.language import Guidance
from tests.bird.tiny import WINDOW, bert, bytes_tokenizer, gpt2, letters_tokenizer, llama

BYTES, LETTERS = bytes_tokenizer(), letters_tokenizer(special=True)


def snippets(count: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """Texts of 2 to 12 letters, and soft labels, none alike."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    texts = ["".join("abcdefghijklm"[i] for i in torch.randint(13, (n,), generator=generator)) for n in lengths]
    first = torch.rand(count, generator=generator)
    return texts, torch.stack([first, 1 - first], 1)


def weak() -> Classifier:
    return Classifier(bert(3), "mean", seed=5).double()


def guided(teacher: nn.Module, **changes: Any) -> Guidance:
    return Guidance(teacher, LETTERS, **(dict(alpha=0.3, beta=0.7, teacher_pooling="mean") | changes))


def literal_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - CKA, biased: centred features, Frobenius norms (Kornblith et al., 2019)."""
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


SEED = 7


def plain_loop(
    model: Classifier,
    texts: list[str],
    targets: Tensor,
    training: Training,
    distance: Callable[[list[str]], Any] | None,
) -> None:
    """Adam and a cosine, each text by itself, without padding."""
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    steps, step = training.epochs * math.ceil(len(texts) / training.batch_size), 0
    for epoch in range(training.epochs):
        generator = torch.Generator().manual_seed(SEED + 1_000_003 * epoch)
        for batch in torch.randperm(len(texts), generator=generator).split(training.batch_size):
            hidden = [model.backbone(torch.tensor([BYTES(texts[i])["input_ids"]]))[0][0, -1] for i in batch]
            chances = [model.head(h).softmax(0) for h in hidden]
            loss = -sum((targets[i] * p.log()).sum() for i, p in zip(batch, chances, strict=True)) / len(batch)
            if distance is not None:
                rows = distance([texts[i] for i in batch])
                loss = 0.3 * loss + 0.7 * literal_distance(torch.stack(hidden), rows)
            optimizer.param_groups[0]["lr"] = training.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def gap(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference between two networks' weights."""
    both = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max((x - y).abs().max().item() for x, y in both)


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("guides", [False, True])
def test_training_is_the_plain_loop(guides: bool, micro: int | None, tmp_path: Path) -> None:
    """Soft cross-entropy, the cosine, whole batches of CKA: whatever the last batch and the accumulation."""
    texts, targets = snippets(15 if guides else 13)  # a last batch of 3 rows (2 and 1, accumulated), or of 1
    training = Training(epochs=2, batch_size=4, micro_batch=micro, lr=1e-3)
    ours, teacher = Classifier(llama()).double(), weak()
    theirs, before, start = copy.deepcopy(ours), copy.deepcopy(teacher), copy.deepcopy(ours)

    def rows(of: list[str]) -> Tensor:
        with torch.no_grad():
            return torch.stack([before.backbone.eval()(**LETTERS([t], return_tensors="pt"))[0][0].mean(0) for t in of])

    history = train_classifier(
        ours, BYTES, texts, targets, training, tmp_path, guidance=guided(teacher) if guides else None, seed=SEED
    )
    plain_loop(theirs, texts, targets.double(), training, rows if guides else None)
    assert gap(ours, start) > 1e-3
    assert gap(ours, theirs) < 1e-7
    assert gap(teacher, before) == 0
    assert not ours.training
    assert not any(module._forward_hooks for module in ours.modules())
    assert [row["step"] for row in history["train"]] == list(range(1, 9))
    assert ("cka" in history["train"][0]) == guides


@pytest.mark.parametrize("backbone", [llama, gpt2])
def test_padding_changes_nothing(backbone: Callable[[], nn.Module]) -> None:
    """On either side, of any length, with any id; the id of padding inside of a text is a token like others."""
    model = Classifier(backbone()).eval()
    rows = [[5, 9, 3], [7, 0, 8, 0], [0, 0], [4, 0, 0, 0, 0, 6], [11]]
    with torch.no_grad():
        alone = torch.cat([model.head(model.backbone(torch.tensor([row]))[0][:, -1]) for row in rows])
        for width in (6, 11):
            for left in (False, True):
                for filler in (0, 13):
                    ids, mask = torch.full((5, width), filler), torch.zeros(5, width, dtype=torch.long)
                    for i, row in enumerate(rows):
                        place = slice(width - len(row), width) if left else slice(len(row))
                        ids[i, place], mask[i, place] = torch.tensor(row), 1
                    logits = model(ids, mask).logits
                    torch.testing.assert_close(logits, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("backbone", "tokenizer", "pooling"), [(llama, BYTES, "last"), (bert, LETTERS, "mean")])
def test_predictions_keep_the_order(backbone: Any, tokenizer: Any, pooling: Any) -> None:
    texts = [*snippets(11)[0], "a<end>b<end>", "<end>"]
    model = Classifier(backbone(), pooling)
    if pooling == "last":
        for layer in model.backbone.layers:
            layer.self_attn.attention_dropout = 0.5
    model.head.weight.data.mul_(20)  # apart from 1/2
    with torch.no_grad():
        hidden = [model.backbone.eval()(**tokenizer([text], return_tensors="pt"))[0][0] for text in texts]
        rows = torch.stack([h[-1] if pooling == "last" else h.mean(0) for h in hidden])
        alone = (rows @ model.head.weight.T).softmax(1)
    model.train()
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        for batch_size in (1, 4, 64):
            chances = class_probabilities(model, tokenizer, texts, batch_size=batch_size)
            torch.testing.assert_close(chances, alone, atol=1e-5, rtol=1e-4)
    finally:
        tokenizer.padding_side = side
    assert model.training
    assert alone.std(0).min() > 0.005


def test_long_texts_are_cut_and_named(tmp_path: Path) -> None:
    model = Classifier(llama())
    with pytest.raises(ValueError, match=f"1 to {WINDOW}"):
        class_probabilities(model, BYTES, ["a"], max_length=WINDOW + 1)
    with pytest.warns(UserWarning, match=r"texts \[1\] are longer than 3 tokens"):
        chances = class_probabilities(model, BYTES, ["abc", "abcdef"], max_length=3)
    torch.testing.assert_close(chances[0], chances[1])
    with pytest.warns(UserWarning, match=f"longer than {WINDOW} tokens"):
        rows, cut = tokenize(model, BYTES, ["a", "ab" * WINDOW])
    assert (list(map(len, rows)), cut) == ([1, WINDOW], [1])
    with pytest.warns(UserWarning, match="cut"):
        rows, _ = tokenize(Classifier(bert(), "mean"), LETTERS, ["abcdef"], 4)
    assert rows == [[2, 4, 5, 3]]  # [CLS] a b [SEP]
    with pytest.warns(UserWarning, match="cut"):
        history = train_classifier(
            model, BYTES, ["ab", "abcd"], certain([0, 1]), Training(epochs=1, max_length=3), tmp_path
        )
    assert history["cut"] == [1]


def test_the_head() -> None:
    backbone = bert()
    before = torch.get_rng_state()
    one, same, other = (Classifier(backbone, "first", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.head.weight.dtype == torch.float32
    assert one.head.bias.count_nonzero() == 0
    assert Classifier(llama().bfloat16())(**batched([[1, 2]])).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="each token"):
        Classifier(backbone, "all")


def test_the_loss_takes_probabilities_and_numbers() -> None:
    model = Classifier(llama())
    batch = batched([[1, 2, 3], [4]])
    chances = model(**batch).logits.softmax(1)
    soft = torch.tensor([[0.3, 0.7], [0.9, 0.1]])
    torch.testing.assert_close(model(**batch, labels=soft).loss, -(soft * chances.log()).sum(1).mean())
    hard = model(**batch, labels=torch.tensor([1, 0])).loss
    torch.testing.assert_close(hard, -(chances[0, 1].log() + chances[1, 0].log()) / 2)
    torch.testing.assert_close(model(**batch, labels=certain([1, 0])).loss, hard)


def test_saved_and_restored(tmp_path: Path) -> None:
    model, other = Classifier(bert(1), "mean", seed=3), Classifier(bert(2), "mean")
    model.save(tmp_path)
    other.restore(tmp_path)
    assert gap(model, other) == 0
    with pytest.raises(ValueError, match="architecture"):
        Classifier(llama()).restore(tmp_path)
    with pytest.raises(FileNotFoundError):
        other.restore(tmp_path / "nowhere")
    file = tmp_path / "classifier.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        other.restore(tmp_path)


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        (["a", " "], [[1.0, 0], [0, 1]], r"texts \[1\] are empty"),
        (["a", "b"], [[1.0, 0]], "2 texts need targets"),
        (["a"], [[0.2, 0.3, 0.5]], r"targets \[1, 2\]"),
        (["a", "b"], [[1.0, 0], [0.5, 0.6]], r"targets \[1\]"),
        (["a", "b"], [[1.5, -0.5], [0.5, 0.5]], r"targets \[0\]"),
        (["a"], [[math.nan, 0.5]], r"targets \[0\]"),
        ([], torch.empty(0, 2).tolist(), "targets|no texts"),
    ],
)
def test_bad_data_is_refused(texts: list[str], targets: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_classifier(Classifier(llama()), BYTES, texts, torch.tensor(targets), Training(), tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_scores() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    assert accuracy(chances, [0, 1, 0, 1]) == 0.5
    assert accuracy(chances, torch.tensor([0, 1, 1, 1])) == 0.75
    with pytest.raises(ValueError, match="labels"):
        accuracy(chances, [0, 1])
    assert certain([1, 0]).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="0 or 1"):
        certain([0, 2])
