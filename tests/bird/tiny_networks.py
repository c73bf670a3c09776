"""Language models of a few thousand weights, and tokenizers for them, made in memory."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

WINDOW = 64


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte; padding is the end of text, as of SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>", model_max_length=10**9
    )


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, between the special tokens of BERT."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {c: i + 4 for i, c in enumerate("abcdefghijklm ")}
    tokens = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokens.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def llama(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return LlamaModel(
        LlamaConfig(
            **sizes,
            max_position_embeddings=WINDOW,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def gpt2(seed: int = 0) -> nn.Module:
    """Absolute positions, and no padding."""
    torch.manual_seed(seed)
    return GPT2Model(
        GPT2Config(vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=WINDOW, bos_token_id=0, eos_token_id=0)
    )


def bert(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(
        BertConfig(
            **sizes,
            max_position_embeddings=WINDOW,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
