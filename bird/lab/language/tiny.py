"""Two networks of a few thousand random weights, and their tokenizers, made in memory: for tests, not for results.

They differ where real pairs of networks do: a decoder that reads bytes and pads with its end-of-text token, as SmolLM2,
and an encoder that reads pieces of words between [CLS] and [SEP] and has a padding token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

LENGTH = 256  # tokens that the encoder has positions for
# Merged in this order: enough that its tokens do not fall on the decoder's bytes.
PIECES = ("th", "the", "in", "ing", "er", "an", "and", "on", "re", "es", "or", "ou", "is", "it", "mo", "vi", "fi", "lm")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama() -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """A decoder of two layers and 16 features, 259 tokens: three special ones, then the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return config, fast


def bert() -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """An encoder of two layers and 16 features: characters, pieces of words, bytes for all other characters."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)] + [chr(code) for code in range(32, 127)] + list(PIECES)
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [(piece[:-1], piece[-1]) for piece in PIECES]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        cls_token=special[1],
        sep_token=special[2],
        unk_token=special[3],
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    return config, fast
