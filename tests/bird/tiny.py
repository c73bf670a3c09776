"""The language models of the tests: a few thousand random weights each, their tokenizers, and what they are given.

All is made in memory; a trainer takes a step in milliseconds. `student` and `teacher` differ where real pairs do: a
decoder that reads bytes and pads with its end of text, as SmolLM2, and an encoder that reads letters and has a token of
its own for padding. `causal`, `absolute` and `classifier` read words, and have weights so large that the most probable
token is clear and depends on the prompt.
"""

from __future__ import annotations

import functools
import math
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from bird.language import Guidance

WINDOW = 64
SIZES = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

# ---------------------------------------------------------------------------------------------- tokenizers

CHAT = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT_OF_WORDS = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}<s> assistant"
SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(24)] + ["user", "assistant", "safe", "unsafe"]
END = 1


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte; padding is the end of text, as of SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>", model_max_length=10**9
    )


def letters_tokenizer(*, special: bool = False) -> PreTrainedTokenizerFast:
    """A token for each letter; ``special``: between the tokens that BERT begins and ends with."""
    names = ["[PAD]", "[UNK]", *(["[CLS]", "[SEP]"] if special else []), *string.ascii_lowercase, *" ,."]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    ends = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if special else {}
    if special:
        tokens.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", model_max_length=100, **ends
    )


def words_tokenizer(*, chat: bool = False, start: bool = True) -> PreTrainedTokenizerFast:
    """Words to tokens, ``<s>`` first if asked for. The token that pads is the one that ends."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        tokens.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT_OF_WORDS if chat else None
    return made


# ---------------------------------------------------------------------------------------------- networks


def student(seed: int = 0, kind: Any = LlamaForCausalLM, **changes: Any) -> Any:
    """A decoder, in eval mode."""
    torch.manual_seed(seed)
    ids = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return kind(LlamaConfig(**SIZES | ids | {"hidden_size": 16, "max_position_embeddings": 128} | changes)).eval()


def teacher(seed: int = 1, kind: Any = BertForSequenceClassification, **changes: Any) -> Any:
    """An encoder, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "vocab_size": 31, "max_position_embeddings": 110}
    return kind(BertConfig(**SIZES | sizes | changes)).eval()


def gpt2(seed: int = 0, kind: Any = GPT2Model, **changes: Any) -> Any:
    """A decoder with absolute positions, and no padding: a shifted text is another one."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": WINDOW}
    return kind(GPT2Config(**sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes))


def llama(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A student without a head, to be trained."""
    return student(seed, LlamaModel, max_position_embeddings=WINDOW, attention_dropout=dropout).train()


def bert(seed: int = 0) -> nn.Module:
    """A teacher without a head, to be trained without dropout."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return teacher(seed, BertModel, vocab_size=40, max_position_embeddings=WINDOW, **still).train()


def causal(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A decoder of words."""
    ids = {"vocab_size": len(SPECIAL + WORDS), "bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    more = {"num_key_value_heads": 1, "max_position_embeddings": WINDOW, "attention_dropout": 0.5}
    return _loud(lambda: student(seed, **ids | more | changes))


def absolute(seed: int = 0) -> GPT2LMHeadModel:
    """A decoder of words whose positions are embedded."""
    return _loud(lambda: gpt2(seed, GPT2LMHeadModel, vocab_size=len(SPECIAL + WORDS), eos_token_id=END))


def classifier(seed: int = 0, classes: int = 2) -> BertForSequenceClassification:
    """An encoder of words with a head."""
    sizes = {"hidden_size": 16, "vocab_size": len(SPECIAL + WORDS), "max_position_embeddings": WINDOW}
    return _loud(lambda: teacher(seed, **sizes, num_labels=classes, pad_token_id=END))


def _loud(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng([]):
        model = make().train()
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.5)
    return model


@functools.cache
def saved(name: str) -> str:
    """The folder of a network as people publish them, for what takes networks by name: "decoder" or "encoder"."""
    folder = Path(_folder().name, name)
    if name == "decoder":
        model, tokenizer = student(max_position_embeddings=2048, tie_word_embeddings=True), bytes_tokenizer()
        tokenizer.chat_template = CHAT
    else:
        model, tokenizer = teacher(kind=BertModel, vocab_size=33), letters_tokenizer(special=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """It goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="tiny-networks-")


# ---------------------------------------------------------------------------------------------- what they are given


def guidance(**changes: Any) -> Guidance:
    """By a teacher."""
    return Guidance(**{"teacher": teacher(), "tokenizer": letters_tokenizer(), "teacher_pooling": "mean"} | changes)


def preferences(count: int = 16) -> Dataset:
    """Pairs in TRL's format, of many lengths."""
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
    """Arguments of any trainer's configuration: two quiet steps on the CPU."""
    quiet = {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    steps = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "seed": 1, "bf16": False}
    return {"output_dir": str(folder)} | quiet | steps | changes


class Calls:
    """Counts the batches that a model starts on, and how many rows each has; fails on the way if asked to."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, fail_after: float = math.inf) -> None:
        self.prefills: list[int] = []
        real = model.forward

        @functools.wraps(real)
        def forward(**options: Any) -> Any:
            assert not torch.is_grad_enabled()
            if options["input_ids"].shape[1] > 1:
                if len(self.prefills) == fail_after:
                    raise KeyboardInterrupt
                self.prefills.append(len(options["input_ids"]))
            return real(**options)

        monkeypatch.setattr(model, "forward", forward)
