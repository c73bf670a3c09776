"""Language models of two tiny layers with random weights, and a tokenizer of words, made without any file."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}<s> assistant"
SPECIAL = ["<s>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(24)] + ["user", "assistant", "safe", "unsafe"]
END = 1


def tokenizer(*, chat: bool = False, start: bool = True) -> PreTrainedTokenizerFast:
    """Words to tokens, ``<s>`` first if asked for. As in SmolLM2, the token that pads is the one that ends."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT if chat else None
    return made


def causal(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Weights so large that the most probable token is clear and depends on the prompt."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=END,
        attention_dropout=0.5,
        **options,
    )
    return _random(LlamaForCausalLM, config, seed)


def absolute(seed: int = 0) -> GPT2LMHeadModel:
    """Positions are embedded: a shifted text is another one, as it is not with rotary embeddings."""
    config = GPT2Config(
        vocab_size=len(SPECIAL + WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        eos_token_id=END,
        bos_token_id=0,
    )
    return _random(GPT2LMHeadModel, config, seed)


def classifier(seed: int = 0, classes: int = 2) -> BertForSequenceClassification:
    """An encoder with a head."""
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=classes,
        pad_token_id=END,
    )
    return _random(BertForSequenceClassification, config, seed)


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


def _random(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = kind(config)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.5)
    return model
