"""Which tokens are pooled, that padding is none of them, and what is refused."""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the tiny networks of these tests come with it")
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BertModel, LlamaModel, LongformerConfig, LongformerModel

import bird.language
from bird.language import Guidance, pool_tokens
from bird.language.guidance import Guide, Sequences, _order
from bird.language.mixin import _require_plain_parallelism
from bird.taps import FirstPass
from tests.bird.tiny import bytes_tokenizer, gpt2, guidance, letters_tokenizer, student, teacher
from tests.bird.trainers import sequences, states

TEXTS = ["a good film", "bad", "so so, but long enough."]
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def guide_of(model: Any = None, **changes: Any) -> Guide:
    return Guide(guidance(**changes), student() if model is None else model, bytes_tokenizer())


def rows_of(guide: Guide, model: Any, of: Sequences) -> Tensor:
    guide.taps.listen()
    model(input_ids=of.ids, attention_mask=of.mask)
    return guide.student_rows(of)


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
    empty = mask * torch.tensor([[1], [0], [1]])
    for arguments, said in (
        ((features, mask, "cls"), "'last', 'first', 'mean', 'all', not 'cls'"),
        ((features[:, 0], mask), r"\[3, 5\] and \[3, 4\].*keeps the tokens"),
        ((features, mask[:, :3]), r"\[3, 4, 5\] and \[3, 3\]"),  # padded inside, as Longformer's
        ((features, empty), r"sequences \[1\].*no token"),
    ):
        with pytest.raises(ValueError, match=said):
            pool_tokens(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_padding_changes_nothing(kind: str, completion_only: bool) -> None:
    """Neither side nor amount, for a teacher with or without absolute positions; pads and ends share an id."""
    teachers = {"llama": {"teacher": student(seed=5)}, "gpt2": {"teacher": gpt2().eval()}, "bert": {}}[kind]
    tokenizer = letters_tokenizer() if kind == "bert" else bytes_tokenizer()
    model = student()
    guide = guide_of(model, tokenizer=tokenizer, completion_only=completion_only, **teachers)
    texts = ["a good film<end>", "bad<end>", "so so, but long enough."]
    alone = [sequences([text]) for text in texts]
    for side in ("left", "right"):
        for more in (0, 5):
            together = sequences(texts, 2, side, more)
            wanted = torch.cat([guide.teacher_rows(one) for one in alone])
            torch.testing.assert_close(guide.teacher_rows(together), wanted, **NEAR)
            wanted = torch.cat([rows_of(guide, model, one) for one in alone])
            torch.testing.assert_close(rows_of(guide, model, together), wanted, **NEAR)


def test_completions_alone_are_pooled() -> None:
    model, texts = student(), TEXTS[:2]
    guide = guide_of(model, completion_only=True, pooling="mean", teacher_pooling=None)
    of = sequences(texts)
    ours, theirs = rows_of(guide, model, of), guide.teacher_rows(of)
    for number, text in enumerate(texts):
        torch.testing.assert_close(ours[number], states(text, model.model, bytes_tokenizer())[2:].mean(0), **NEAR)
        torch.testing.assert_close(theirs[number], states(text)[2:].mean(0), **NEAR)


def test_completions_that_the_teacher_reads_in_part() -> None:
    """Of a completion that is too long for it ``text`` gives the end alone: all of that is pooled."""
    guide = guide_of(completion_only=True, pooling="mean", text=lambda prompt, completion: (prompt + completion)[-6:])
    rows = guide.teacher_rows(sequences(TEXTS))
    for row, text, first in zip(rows, TEXTS, (0, 2, 0), strict=True):
        torch.testing.assert_close(row, states(text[-6:])[first:].mean(0), **NEAR)


def test_the_rows_of_a_permuted_teacher() -> None:
    """They are its rows, each for another text; the same batch has the same order again, and no generator moves."""
    texts = [f"a {letter} film" for letter in "abcdefghijklmnop"]
    plain, permuted = guide_of().teacher_rows(sequences(texts)), guide_of(permuted=True)
    before = torch.get_rng_state()
    rows = permuted.teacher_rows(sequences(texts))
    assert torch.equal(torch.get_rng_state(), before)
    places = torch.cdist(rows.double(), plain.double()).argmin(1)
    assert sorted(places.tolist()) == list(range(16))
    assert (places != torch.arange(16)).all()
    torch.testing.assert_close(rows, plain[places])
    torch.testing.assert_close(permuted.teacher_rows(sequences(texts)), rows)
    other = permuted.teacher_rows(sequences([text.replace("film", "play") for text in texts]))
    assert not torch.equal(torch.cdist(other.double(), plain.double()).argmin(1), places)


@pytest.mark.parametrize("count", [2, 3, 4, 16])
def test_no_row_of_a_permuted_teacher_stays_in_its_place(count: int) -> None:
    """In none of 500 batches; each row is used once, and every cycle of a few rows is drawn."""
    mask = torch.ones(1, 2)
    drawn = [_order(Sequences(torch.tensor([[seed, 7]]), mask, None), count).tolist() for seed in range(500)]
    assert all(sorted(order) == list(range(count)) for order in drawn)
    assert not any(row == place for order in drawn for place, row in enumerate(order))
    assert len({*map(tuple, drawn)}) == (500 if count == 16 else math.factorial(count - 1))


def test_one_row_cannot_be_permuted() -> None:
    """It would be in its own place, and the control would be the treatment."""
    guide = guide_of(permuted=True)
    with pytest.raises(ValueError, match=r'one row.*per_device_train_batch_size.*rows="both".*drop_last=True'):
        guide.teacher_rows(sequences(TEXTS[:1]))
    assert len(guide.teacher_rows(sequences(TEXTS[:2]))) == 2


def test_all_tokens_as_rows() -> None:
    model, other = student(), student(seed=4)
    guide = Guide(Guidance(other, bytes_tokenizer(), pooling="all"), model, bytes_tokenizer())
    of = sequences(TEXTS, 2, "left")
    ours, theirs = rows_of(guide, model, of), guide.teacher_rows(of)
    assert len(ours) == len(theirs) == sum(map(len, TEXTS))
    torch.testing.assert_close(theirs[: len(TEXTS[0])], states(TEXTS[0], other.model, bytes_tokenizer()), **NEAR)


@pytest.mark.parametrize("bare", [BertModel, LlamaModel])
def test_backbones_without_a_head_are_teachers(bare: Any) -> None:
    other = teacher(kind=bare) if bare is BertModel else student(kind=bare)
    tokenizer = letters_tokenizer() if bare is BertModel else bytes_tokenizer()
    rows = guide_of(teacher=other, tokenizer=tokenizer).teacher_rows(sequences(TEXTS))
    torch.testing.assert_close(rows[2], states(TEXTS[2], other, tokenizer).mean(0), **NEAR)


@pytest.mark.parametrize(("config", "virtual"), [(PromptTuningConfig, 3), (PrefixTuningConfig, 0)])
def test_prompt_learning_has_its_tokens_in_front(config: Any, virtual: int) -> None:
    model: Any = get_peft_model(student(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    guide, of = guide_of(model, pooling="first"), sequences(TEXTS[:2])
    guide.taps.listen()
    seen = model(input_ids=of.ids, attention_mask=of.mask, output_hidden_states=True).hidden_states[-1]
    assert seen.shape[1] == 11 + virtual
    torch.testing.assert_close(guide.student_rows(of), seen[:, virtual])


def test_a_layer_that_pads_inside_is_refused() -> None:
    """Longformer's layers have places up to a multiple of their window, on the right: not virtual tokens in front."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"vocab_size": 31, "pad_token_id": 1, "max_position_embeddings": 64, "attention_window": 8}
    model = LongformerModel(LongformerConfig(**sizes | ids)).eval()
    of = sequences(TEXTS[:2])
    guide_of(teacher=model).teacher_rows(of)
    with pytest.raises(ValueError, match=r"\[2, 16, 16\] and \[2, 11\].*keeps the tokens"):
        guide_of(teacher=model, teacher_layer="encoder.layer.0").teacher_rows(of)


def test_the_first_pass_counts() -> None:
    model, ids = student(), sequences(TEXTS).ids
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
        ({"pooling": "all", "truncation": "left"}, "read all of a text"),
        ({"truncation": "end"}, "truncation must be one of 'left', 'right', None; got 'end'"),
        ({"rows": "prompt", "completion_only": True}, "leaves no completion"),
        ({"estimator": "best"}, "estimator must be one of 'biased', 'unbiased'"),
        ({"layer": "model.layer.0"}, r"no layer is called.*'model\.layers\.0'"),
        ({"teacher_layer": "encoder"}, "no layer is called"),
        ({"tokenizer": None}, "not known which tokenizer the teacher reads with: give it"),
    ],
)
def test_choices_that_do_not_exist(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        guide_of(**changes)


def test_what_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="give processing_class"):
        Guide(guidance(), student(), None)
    with pytest.raises(TypeError):  # features that are not of tokens
        guide_of(teacher=torch.nn.Linear(3, 3)).teacher_rows(sequences(TEXTS))
    whole, only = guide_of(), guide_of(completion_only=True)
    for guide, of, said in (
        (whole, sequences(["a" * 101, "b"]), r"101 tokens.*takes 100.*max_length"),
        (whole, sequences(["a", " ", "b"]), r"sequences \[1\].*no text"),
        (only, sequences(["a good", "ba", "so so"]), r"sequences \[1\].*empty text or response"),
        (only, sequences(TEXTS)._replace(completion=None), "do not say which tokens are the completion"),
        (
            guide_of(completion_only=True, text=lambda p, c: f"{p}{c}."),
            sequences(TEXTS),
            "must end with the completion",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            guide.teacher_rows(of)


@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_that_is_part_of_the_student_is_refused(whole: bool) -> None:
    """It would be frozen, and the student with it."""
    net = student()
    with pytest.raises(ValueError, match=r"the student's own parameters.*copy\.deepcopy"):
        Guide(Guidance(net if whole else net.model), net, bytes_tokenizer())
    assert all(p.requires_grad for p in net.parameters())


def test_parallelism_that_splits_a_sequence_or_hides_batches() -> None:
    def trainer(n_gpu: int = 1, **sizes: int) -> Any:
        config = SimpleNamespace(**sizes) if sizes else None
        accelerator = SimpleNamespace(parallelism_config=config)
        return SimpleNamespace(args=SimpleNamespace(n_gpu=n_gpu), accelerator=accelerator)

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
