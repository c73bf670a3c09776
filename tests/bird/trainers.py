"""Trainers of tiny students: TRL's and transformers' own, and BIRD's; and what is read of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from bird.language import BirdMixin
from bird.language.guidance import Sequences
from tests.bird.tiny import bytes_tokenizer, letters_tokenizer, preferences, settings, student, teacher

TEXTS = [f"the {letter * (1 + i % 4)} film is{' very' * (i % 3)} good" for i, letter in enumerate("abcdefghijklmnop")]
OWN = ("model", "model_init", "callbacks", "train_dataset", "eval_dataset", "peft_config", "processing_class")
OWN += ("data_collator",)


class BirdRewardTrainer(BirdMixin, RewardTrainer):
    """Any trainer takes the mixin."""


def classes(texts: list[str]) -> Dataset:
    return Dataset.from_list([bytes_tokenizer()(text) | {"labels": i % 2} for i, text in enumerate(texts)])


def classifier(seed: int = 0, labels: int = 2, **changes: Any) -> Any:
    return student(seed, LlamaForSequenceClassification, num_labels=labels, **changes)


def made(kind: type, folder: Path, guide: Any = None, **changes: Any) -> Any:
    """A trainer: of a tiny student, on 16 rows of its kind; ``changes`` are `OWN`, or its configuration's arguments."""
    own = {name: changes.pop(name) for name in OWN if name in changes}
    own |= {"processing_class": bytes_tokenizer()} | own | ({} if guide is None else {"guidance": guide})
    if issubclass(kind, DPOTrainer):
        own = {"model": student(), "train_dataset": preferences()} | own
        if "peft_config" not in own and not getattr(own["model"], "peft_config", None):
            own["ref_model"] = copy.deepcopy(own["model"])
        config: Any = DPOConfig
    elif issubclass(kind, SFTTrainer):
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
        own, config = {"model": student(), "train_dataset": Dataset.from_list(rows)} | own, SFTConfig
    elif issubclass(kind, RewardTrainer):
        own, config = {"model": classifier(labels=1), "train_dataset": preferences()} | own, RewardConfig
    else:
        own = {"train_dataset": classes(TEXTS), "eval_dataset": classes(TEXTS[:8])} | own
        own = {"data_collator": DataCollatorWithPadding(bytes_tokenizer())} | own
        own |= {} if "model_init" in own or "model" in own else {"model": classifier()}
        config = TrainingArguments
    return kind(args=config(**settings(folder, **changes)), **own)


def ran(kind: type, folder: Path, guide: Any = None, **changes: Any) -> Any:
    """The same, once it has trained."""
    trainer = made(kind, folder, guide, **changes)
    trainer.train()
    return trainer


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 0, atol: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=name)


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states by transformers' own way."""
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]


def last(features: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[of.nonzero().max()] for row, of in zip(features, mask, strict=True)])


@torch.no_grad()
def states(text: str, model: Any = None, tokenizer: Any = None) -> Tensor:
    """Of one text, so without padding: the last hidden states of a backbone, by default the teacher's."""
    given = (tokenizer or letters_tokenizer())(text, return_tensors="pt")
    return (teacher().bert if model is None else model)(**given).last_hidden_state[0]


def means(texts: list[str]) -> Tensor:
    """The teacher's features of texts, in fp64."""
    return torch.stack([states(text).mean(0) for text in texts]).double()


def ends(model: Any, texts: list[str]) -> Tensor:
    """A student's features of texts, in fp64, one text at a time."""
    model = getattr(model, "model", model)
    return torch.stack([states(text, model, bytes_tokenizer())[-1] for text in texts]).double()


def read(ids: Tensor, mask: Tensor) -> list[str]:
    """The texts of rows of the student's tokens."""
    decode = bytes_tokenizer().decode
    return [decode(row[of == 1], skip_special_tokens=True) for row, of in zip(ids, mask, strict=True)]


def sequences(texts: list[str], spans: Any = 2, side: str = "right", more: int = 0, tokenizer: Any = None) -> Sequences:
    """The student's tokens, with so much ``more`` padding; the completion is what follows a prompt of ``spans`` tokens,
    or of each text the places ``spans``.
    """
    rows = [(tokenizer or bytes_tokenizer())(text)["input_ids"] for text in texts]
    width = max(map(len, rows)) + more
    ids, mask, completion = torch.zeros(3, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        ids[number, start : start + len(row)], mask[number, start : start + len(row)] = torch.tensor(row), 1
        for first, end in [(spans, len(row))] if isinstance(spans, int) else spans[number]:
            completion[number, start + first : start + end] = 1
    return Sequences(ids, mask, completion)
