"""A student, a teacher, their tokenizers and a few preferences, small enough for a trainer's step in milliseconds."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bird.language import Guidance
from tests.bird.tiny_networks import bytes_tokenizer

__all__ = ["bytes_tokenizer", "guidance", "letters_tokenizer", "preferences", "settings", "student", "teacher"]


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, two for nothing."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {c: i for i, c in enumerate(string.ascii_lowercase + " ,.", start=2)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=100)


def student(seed: int = 0, kind: type = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return kind(LlamaConfig(**sizes | ids | {"max_position_embeddings": 128} | changes)).eval()


def teacher(seed: int = 1, kind: type = BertForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(BertConfig(**sizes | {"vocab_size": 31, "max_position_embeddings": 110} | changes)).eval()


def guidance(**changes: Any) -> Guidance:
    return Guidance(**{"teacher": teacher(), "tokenizer": letters_tokenizer(), "teacher_pooling": "mean"} | changes)


def preferences(count: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"the {string.ascii_lowercase[i] * (1 + i % 4)} film is",
                "chosen": " very" * (i % 3) + " good",
                "rejected": " so" * (i % 4) + " bad",
            }
            for i in range(count)
        ]
    )


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of any trainer's configuration: four quiet steps on the CPU."""
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    steps = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "seed": 1, "bf16": False}
    return {"output_dir": str(folder)} | quiet | steps | changes
