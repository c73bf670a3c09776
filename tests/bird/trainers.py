"""Trainers of tiny students: TRL's and transformers' own, and BIRD's; and what is read of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, RewardConfig, RewardTrainer, SFTConfig

from bird.language import BirdMixin, BirdTrainer
from tests.bird.tiny import (
    bytes_tokenizer,
    letters_tokenizer,
    preferences,
    settings,
    student,
    teacher,
)


class BirdRewardTrainer(BirdMixin, RewardTrainer):
    """Any trainer takes the mixin."""


def dpo(kind: type, folder: Path, model: Any = None, more: Any = None, **changes: Any) -> Any:
    model = student() if model is None else model
    reference = None if getattr(model, "peft_config", None) or "peft_config" in (more or {}) else copy.deepcopy(model)
    arguments = DPOConfig(**settings(folder, **changes))
    return kind(
        model, reference, args=arguments, train_dataset=preferences(), processing_class=bytes_tokenizer(), **more or {}
    )


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance or {"rtol": 0, "atol": 0}, msg=name)


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def hidden(model: Any, ids: Tensor, mask: Tensor, layer: int = -1) -> Tensor:
    """Hidden states by transformers' own way."""
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def last(features: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[of.nonzero().max()] for row, of in zip(features, mask, strict=True)])


def teachers_means(texts: list[str], model: Any = None) -> Tensor:
    """One text at a time, so no padding: the mean of the last hidden states."""
    model, tokenizer = model or teacher(), letters_tokenizer()
    rows = [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        return torch.cat([hidden(model, row["input_ids"], row["attention_mask"])[0].mean(0)[None] for row in rows])


def texts_of(rows: Any) -> list[str]:
    return [row["prompt"] + row[kind] for kind in ("chosen", "rejected") for row in rows]


def of_classes(kind: type, folder: Path, **changes: Any) -> Any:
    tokenizer = bytes_tokenizer()
    rows = [tokenizer(text) | {"labels": i % 2} for i, text in enumerate(texts_of(preferences()))]
    if kind in (BirdTrainer, Trainer):
        data, arguments = Dataset.from_list(rows), TrainingArguments(**settings(folder, **changes))
        more = {"data_collator": DataCollatorWithPadding(tokenizer)}
    else:
        data, arguments, more = preferences(), RewardConfig(**settings(folder, **changes)), {}
    labels = 2 if kind in (BirdTrainer, Trainer) else 1
    model = student(kind=LlamaForSequenceClassification, num_labels=labels)
    return lambda **own: kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more, **own)


def sft(kind: type, folder: Path, **changes: Any) -> Any:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
    arguments = SFTConfig(**settings(folder, **changes))
    return lambda **own: kind(
        student(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=bytes_tokenizer(), **own
    )
