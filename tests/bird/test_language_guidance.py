"""What a teacher is given to read, which tokens are pooled, and what is refused."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("datasets", reason="the tiny networks of these tests come with it")
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaModel

import bird.language
from bird.language import Guidance, pool_tokens
from bird.language.guidance import Guide, Sequences
from bird.language.mixin import _require_plain_parallelism
from bird.taps import FirstPass
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, student, teacher

TEXTS = ["a good film", "bad", "so so, but long enough."]


def batch(texts: list[str], side: str = "right", more: int = 0, prompt: int = 2) -> Sequences:
    """The student's tokens, the first ``prompt`` of each text the prompt's; padding of so many more."""
    rows = [bytes_tokenizer()(text)["input_ids"] for text in texts]
    width = max(map(len, rows)) + more
    ids, mask, completion = torch.zeros(3, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        places = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, places], mask[number, places] = torch.tensor(row), 1
        completion[number, places] = torch.arange(len(row)).ge(prompt).long()
    return Sequences(ids, mask, completion)


def rows_of(guide: Guide, model: Any, sequences: Sequences) -> Tensor:
    guide.taps.listen()
    model(input_ids=sequences.ids, attention_mask=sequences.mask)
    return guide.student_rows(sequences)


# ---------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "first", "mean", "all"])
def test_pooling_by_mask(pooling: Any, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 1, 4)]
    features, mask = torch.full((3, 7, 5), torch.nan, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.long)
    for number, row in enumerate(rows):
        places = slice(1, 1 + len(row)) if side == "left" else slice(7 - len(row), 7)
        features[number, places], mask[number, places] = row, 1
    wanted = {
        "last": torch.stack([row[-1] for row in rows]),
        "first": torch.stack([row[0] for row in rows]),
        "mean": torch.stack([row.mean(0) for row in rows]),
        "all": torch.cat(rows),
    }[pooling]
    torch.testing.assert_close(pool_tokens(features, mask, pooling), wanted)
    virtual = torch.randn(3, 2, 5, dtype=torch.float64)  # of prompt learning, in front
    torch.testing.assert_close(pool_tokens(torch.cat([virtual, features], 1), mask, pooling, virtual=2), wanted)


def test_pooling_refuses() -> None:
    features, mask = torch.zeros(3, 4, 5), torch.ones(3, 4)
    with pytest.raises(ValueError, match="'last', 'first', 'mean', 'all', not 'cls'"):
        pool_tokens(features, mask, "cls")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[3, 5\] and \[3, 4\].*keeps the tokens"):
        pool_tokens(features[:, 0], mask)
    with pytest.raises(ValueError, match=r"\[3, 4, 5\] and \[3, 3\]"):  # padded inside, as Longformer's
        pool_tokens(features, mask[:, :3])
    mask[1] = 0
    with pytest.raises(ValueError, match=r"sequences \[1\].*no token"):
        pool_tokens(features, mask)


# ---------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_padding_changes_nothing(kind: str, completion_only: bool) -> None:
    """Neither side nor amount, for a teacher with or without absolute positions; pads and ends share an id."""
    torch.manual_seed(3)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
    guide = {
        "llama": guidance(teacher=student(seed=5), tokenizer=bytes_tokenizer(), completion_only=completion_only),
        "gpt2": guidance(teacher=gpt2, tokenizer=bytes_tokenizer(), completion_only=completion_only),
        "bert": guidance(completion_only=completion_only),
    }[kind]
    model = student()
    guide = Guide(guide, model, bytes_tokenizer())
    texts = ["a good film<end>", "bad<end>", "so so, but long enough."]
    alone = [batch([text]) for text in texts]
    for side in ("left", "right"):
        for more in (0, 5):
            together = batch(texts, side, more)
            wanted = torch.cat([guide.teacher_rows(one) for one in alone])
            torch.testing.assert_close(guide.teacher_rows(together), wanted, rtol=1e-4, atol=1e-5)
            wanted = torch.cat([rows_of(guide, model, one) for one in alone])
            torch.testing.assert_close(rows_of(guide, model, together), wanted, rtol=1e-4, atol=1e-5)


def test_the_teacher_reads_what_text_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    guide = Guide(
        guidance(
            text=lambda prompt, completion: (read.append(f"{prompt}|{completion}"), f"q {prompt} a {completion}")[1]
        ),
        student(),
        bytes_tokenizer(),
    )
    found = guide.teacher_rows(batch(["a good film<end>", "bad"], "left", prompt=3))
    assert read == ["a g|ood film", "bad|"]
    tokenizer, model = letters_tokenizer(), teacher()
    for row, text in zip(found, ["q a g a ood film", "q bad a "], strict=True):
        states = model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row, states.mean(0), rtol=1e-4, atol=1e-5)


def test_completions_alone_are_pooled() -> None:
    model = student()
    guide = Guide(guidance(completion_only=True, pooling="mean", teacher_pooling=None), model, bytes_tokenizer())
    sequences = batch(["a good film", "bad"], prompt=2)
    ours, theirs = rows_of(guide, model, sequences), guide.teacher_rows(sequences)
    for number, text in enumerate(["a good film", "bad"]):
        states = model.model(**bytes_tokenizer()(text, return_tensors="pt")).last_hidden_state[0, 2:]
        torch.testing.assert_close(ours[number], states.mean(0), rtol=1e-4, atol=1e-5)
        states = teacher().bert(**letters_tokenizer()(text, return_tensors="pt")).last_hidden_state[0, 2:]
        torch.testing.assert_close(theirs[number], states.mean(0), rtol=1e-4, atol=1e-5)


def test_all_tokens_as_rows() -> None:
    model, other = student(), student(seed=4)
    guide = Guide(Guidance(other, bytes_tokenizer(), pooling="all"), model, bytes_tokenizer())
    sequences = batch(TEXTS, "left")
    ours, theirs = rows_of(guide, model, sequences), guide.teacher_rows(sequences)
    assert len(ours) == len(theirs) == sum(map(len, TEXTS))
    states = other.model(**bytes_tokenizer()(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(theirs[: len(TEXTS[0])], states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bare", [BertModel, LlamaModel])
def test_backbones_without_a_head_are_teachers(bare: type) -> None:
    guide = teacher(kind=bare) if bare is BertModel else student(kind=bare)
    chosen = guidance(teacher=guide, tokenizer=letters_tokenizer() if bare is BertModel else bytes_tokenizer())
    rows = Guide(chosen, student(), bytes_tokenizer()).teacher_rows(batch(TEXTS))
    tokenizer = letters_tokenizer() if bare is BertModel else bytes_tokenizer()
    wanted = guide(**tokenizer(TEXTS[2], return_tensors="pt")).last_hidden_state[0].mean(0)
    torch.testing.assert_close(rows[2], wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alpha": -1.0}, "alpha must be finite"),
        ({"beta": float("nan")}, "beta must be finite"),
        ({"pooling": "cls"}, "pooling must be one of"),
        ({"teacher_pooling": "max"}, "teacher_pooling must be one of"),
        ({"rows": "loser"}, "rows must be one of"),
        ({"pooling": "all"}, "must share it, and read all of a text"),
        ({"rows": "prompt", "completion_only": True}, "leaves no completion"),
        ({"estimator": "best"}, "estimator must be one of 'biased', 'unbiased'"),
    ],
)
def test_choices_that_do_not_exist(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Guide(guidance(**changes), student(), bytes_tokenizer())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layer": "model.layer.0"}, r"no layer is called.*'model\.layers\.0'"),
        ({"teacher_layer": "encoder"}, "no layer is called"),
        ({"tokenizer": None}, "not known which tokenizer the teacher reads with: give it"),
        ({"teacher": torch.nn.Linear(3, 3)}, None),
    ],
)
def test_networks_that_do_not_fit(changes: dict[str, Any], why: str | None) -> None:
    if why is None:  # a network that is no language model: its features are not of tokens, or it cannot read
        guide = Guide(guidance(**changes), student(), bytes_tokenizer())
        with pytest.raises(TypeError):
            guide.teacher_rows(batch(TEXTS))
        return
    with pytest.raises(ValueError, match=why):
        Guide(guidance(**changes), student(), bytes_tokenizer())


def test_the_students_tokenizer_is_needed_for_another() -> None:
    with pytest.raises(ValueError, match="give processing_class"):
        Guide(guidance(), student(), None)


def test_texts_that_cannot_be_read() -> None:
    guide = Guide(guidance(), student(), bytes_tokenizer())
    with pytest.raises(ValueError, match=r"101 tokens.*takes 100.*max_length"):
        guide.teacher_rows(batch(["a" * 101, "b"]))
    with pytest.raises(ValueError, match=r"sequences \[1\].*no text"):
        guide.teacher_rows(batch(["a", " ", "b"]))
    only = Guide(guidance(completion_only=True), student(), bytes_tokenizer())
    with pytest.raises(ValueError, match=r"sequences \[1\].*empty text or response"):
        only.teacher_rows(batch(["a good", "ba", "so so"], prompt=2))
    with pytest.raises(ValueError, match="do not say which tokens are the completion"):
        only.teacher_rows(batch(TEXTS)._replace(completion=None))
    other = Guide(guidance(completion_only=True, text=lambda p, c: f"{p}{c}."), student(), bytes_tokenizer())
    with pytest.raises(ValueError, match="must end with the completion"):
        other.teacher_rows(batch(TEXTS[:2]))


def test_parallelism_that_splits_a_sequence_or_hides_batches() -> None:
    def trainer(n_gpu: int = 1, **sizes: int) -> Any:
        config = SimpleNamespace(**sizes) if sizes else None
        return SimpleNamespace(
            args=SimpleNamespace(n_gpu=n_gpu), accelerator=SimpleNamespace(parallelism_config=config)
        )

    _require_plain_parallelism(trainer())
    _require_plain_parallelism(trainer(dp_shard_size=4, tp_size=1))
    with pytest.raises(ValueError, match="one process per GPU"):
        _require_plain_parallelism(trainer(2))
    with pytest.raises(ValueError, match="tp_size: BIRD compares whole sequences"):
        _require_plain_parallelism(trainer(tp_size=2))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "bird.language.trl_trainers", raising=False)
    with pytest.raises(ImportError, match=r"BirdDPOTrainer needs trl: pip install 'bird-kernels\[language\]'"):
        importlib.import_module("bird.language").BirdDPOTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'BirdPPOTrainer'"):
        bird.language.BirdPPOTrainer  # noqa: B018


# ---------------------------------------------------------------------------------------------- the first pass


def test_the_first_pass_counts() -> None:
    model, ids = student(), batch(TEXTS).ids
    with FirstPass(model, "model", pool="none") as taps:
        taps.listen()
        with torch.no_grad():
            model(input_ids=ids + 1)  # a pass without gradients in a step that has them
        first = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        model(input_ids=ids + 2)
        found = taps.pop()["model"]
        torch.testing.assert_close(found, first)
        assert found.requires_grad
        with torch.no_grad():
            taps.listen()
            first = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            model(input_ids=ids + 1)
            torch.testing.assert_close(taps.pop()["model"], first)
        taps.listen()
        model.model(input_ids=ids)  # past the hooks of the model itself
        assert taps.pop()["model"].shape == first.shape
        with pytest.raises(RuntimeError, match="have not run"):
            taps.pop()
