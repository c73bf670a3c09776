"""A teacher reads the student's text in its order: which of its tokens count, what is cut, whose ids they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the trainers are TRL's")
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    LongformerConfig,
    LongformerModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)
from trl import SFTConfig

from bird.language import BirdSFTTrainer, BirdTrainer, Guidance
from bird.language.guidance import Guide, Sequences, concatenated, window_of
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, saved, settings, student, teacher

TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def marked(texts: list[str], spans: list[list[tuple[int, int]]], tokenizer: Any = None) -> Sequences:
    """Sequences padded on the right, whose tokens in these places are the completion."""
    rows = [(tokenizer or bytes_tokenizer())(text)["input_ids"] for text in texts]
    ids, mask, completion = torch.zeros(3, len(rows), max(map(len, rows)), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
        for start, stop in spans[number]:
            completion[number, start:stop] = 1
    return Sequences(ids, mask, completion)


def states(text: str, model: Any = None, tokenizer: Any = None) -> Tensor:
    """The teacher's last hidden states of one text."""
    given = (tokenizer or letters_tokenizer())(text, return_tensors="pt")
    with torch.no_grad():
        return (model or teacher().bert)(**given).last_hidden_state[0]


def reading(texts: list[str], **changes: Any) -> Guidance:
    """A guidance that notes what the teacher is given."""

    def text(prompt: str, completion: str) -> str:
        texts.append(f"{prompt}|{completion}")
        return prompt + completion

    return guidance(text=text, **changes)


# ---------------------------------------------------------------------------------------------- order and spans


@pytest.mark.parametrize("only", [False, True])
def test_turns_of_a_conversation_are_read_in_their_order(only: bool, tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = TURNS
    talk = [("user", "q one. "), ("assistant", "a two. "), ("user", "q three. "), ("assistant", "a four.")]
    other = [("user", "x. "), ("assistant", "yes.")]
    data = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in (talk, other)]
    texts: list[str] = []
    trainer = BirdSFTTrainer(
        student(),
        args=SFTConfig(**settings(tmp_path, assistant_only_loss=True)),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        guidance=reading(texts, completion_only=only, pooling="mean"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    sequences = trainer.bird_sequences(batch)
    rows = trainer.bird_guide.teacher_rows(sequences)
    assert sorted(texts) == ["q one. |a two. q three. a four.", "x. |yes."]
    number = texts.index("q one. |a two. q three. a four.")
    whole = "q one. a two. q three. a four."
    counted = [True] * len(whole) if not only else [7 <= place < 14 or place >= 23 for place in range(len(whole))]
    torch.testing.assert_close(rows[number], states(whole)[torch.tensor(counted)].mean(0), rtol=1e-4, atol=1e-5)
    trainer.bird_guide.taps.listen()
    ours = trainer.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1][number]
    if only:
        pooled = ours[: len(whole)][torch.tensor(counted)].mean(0)
        torch.testing.assert_close(trainer.bird_guide.student_rows(sequences)[number], pooled, rtol=1e-4, atol=1e-5)


def test_completions_are_masks_for_a_teacher_of_the_same_tokens() -> None:
    """Two spans, the second in the middle; the guidance hands the ids on."""
    other = student(seed=4)
    other.name_or_path = saved("decoder")
    guide = Guide(Guidance(other, completion_only=True, pooling="mean"), student(), bytes_tokenizer())
    (row,) = guide.teacher_rows(marked(["a good film"], [[(0, 1), (4, 6)]]))
    wanted = states("a good film", other.model, bytes_tokenizer())[[0, 4, 5]].mean(0)
    torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def words_with_spaces() -> PreTrainedTokenizerFast:
    """As Llama 2's: a decoder takes the space off the first token of what it is given."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁film": 2, "▁is": 3, "▁good": 4, "▁bad": 5}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<unk>")


@pytest.mark.parametrize("only", [False, True])
def test_words_do_not_grow_together_where_the_completion_begins(only: bool) -> None:
    texts: list[str] = []
    tokenizer = words_with_spaces()
    guide = Guide(reading(texts, completion_only=only), student(), tokenizer)
    (row,) = guide.teacher_rows(marked(["the film is good"], [[(3, 4)]], tokenizer))
    assert texts == ["the film is| good"]
    whole = states("the film is good")
    torch.testing.assert_close(row, whole[11 if only else 0 :].mean(0), rtol=1e-4, atol=1e-5)


def test_a_character_of_several_tokens_is_read_whole() -> None:
    """The boundary lies inside of an é, two bytes; the text stays what it is."""
    texts: list[str] = []
    guide = Guide(reading(texts), student(), bytes_tokenizer())
    guide.teacher_rows(marked(["caf\u00e9 noir", "ab"], [[(4, 10)], [(2, 2)]]))
    assert [text.replace("|", "", 1) for text in texts] == ["caf\u00e9 noir", "ab"]
    assert texts == ["caf|\u00e9 noir", "ab|"]


# ---------------------------------------------------------------------------------------------- encoder and decoder

SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SMALL |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}


def bart(kind: Any = BartForConditionalGeneration, words: int = 257) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return kind(BartConfig(vocab_size=words, forced_eos_token_id=None, **ids, **SMALL)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "vocab_size": 257}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).eval()


def test_decoders_of_encoder_decoder_networks_are_refused_at_construction() -> None:
    for model, layer in ((bart(), None), (bart(), "model.decoder.layers.0"), (t5(), "decoder"), (t5(), "lm_head")):
        with pytest.raises(
            ValueError, match=r"reads with an encoder.*name a layer of the encoder, such as '(model\.)?enc"
        ):
            Guide(guidance(layer=layer), model, bytes_tokenizer())
    for model, layer in ((bart(words=31), None), (bart(words=31).model, None), (bart(words=31), "model.decoder")):
        with pytest.raises(ValueError, match="reads with an encoder"):
            Guide(guidance(teacher=model, teacher_layer=layer), student(), bytes_tokenizer())


def test_encoders_of_encoder_decoder_networks_guide_and_are_guided(tmp_path: Path) -> None:
    """Labels as long as the text are the decoder's tokens, no mask of the encoder's; batches are accumulated too."""
    tokenizer = bytes_tokenizer()
    rows = [{**tokenizer(text), "labels": [-100, 5, 6, 7]} for text in ("good", "ill.", "so s", "fine") * 2]
    texts: list[str] = []
    few = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = BirdTrainer(
        t5(),
        args=TrainingArguments(**settings(tmp_path, **few)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        guidance=reading(texts, layer="encoder", teacher=bart(words=31), teacher_layer="model.encoder"),
    )
    trainer.train()
    assert set(texts) == {"|good", "|ill.", "|so s", "|fine"}
    sequences = marked(["a good film", "bad"], [[], []])
    found = trainer.bird_guide.teacher_rows(sequences._replace(completion=None))
    for row, text in zip(found, ("a good film", "bad"), strict=True):
        wanted = states(text, bart(words=31).get_encoder()).mean(0)
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_pads_inside_is_refused() -> None:
    """Longformer's layers have places up to a multiple of their window, on the right: not virtual tokens in front."""
    config = LongformerConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attention_window=8, pad_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LongformerModel(config).eval()
    sequences = marked(["a good film", "bad"], [[], []])
    Guide(guidance(teacher=model), student(), bytes_tokenizer()).teacher_rows(sequences)
    guide = Guide(guidance(teacher=model, teacher_layer="encoder.layer.0"), student(), bytes_tokenizer())
    with pytest.raises(ValueError, match=r"\[2, 16, 16\] and \[2, 11\].*keeps the tokens"):
        guide.teacher_rows(sequences)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning_has_its_tokens_in_front(kind: str) -> None:
    config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    model: Any = get_peft_model(student(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    guide = Guide(guidance(pooling="first"), model, bytes_tokenizer())
    sequences = marked(["a good film", "bad"], [[], []])
    guide.taps.listen()
    seen = model(input_ids=sequences.ids, attention_mask=sequences.mask, output_hidden_states=True).hidden_states[-1]
    assert seen.shape[1] == 11 + (3 if kind == "prompt" else 0)
    torch.testing.assert_close(guide.student_rows(sequences), seen[:, 3 if kind == "prompt" else 0])


# ---------------------------------------------------------------------------------------------- whose ids they are


def test_equal_sizes_are_no_equal_vocabulary() -> None:
    """A BERT of 257 letters was fed a Llama's bytes. Its own tokenizer reads the text, where it can be found."""
    other = teacher(kind=BertModel, vocab_size=257)
    with pytest.raises(ValueError, match=r"not known which tokenizer the teacher reads with: give it, tokenizer="):
        Guide(Guidance(other), student(), bytes_tokenizer())
    other.name_or_path = saved("encoder")
    rows = Guide(Guidance(other, pooling="mean"), student(), bytes_tokenizer()).teacher_rows(marked(["a good"], [[]]))
    wanted = states("a good", other, letters_tokenizer(special=True)).mean(0)
    torch.testing.assert_close(rows[0], wanted, rtol=1e-4, atol=1e-5)


def test_ids_are_handed_on_to_a_teacher_of_the_same_vocabulary(tmp_path: Path) -> None:
    """Special tokens too, whoever says which tokenizer it is; sizes that networks have are not asked."""
    padded = student(seed=3, vocab_size=264)  # rows that no token uses, as networks have for a GPU's sake
    sequences, found = marked(["good<end>", "ill<end>"], [[], []]), []
    named = student()
    named.name_or_path = saved("decoder")
    with pytest.raises(ValueError, match="the student's tokenizer is not known: give processing_class"):
        Guide(Guidance(padded, bytes_tokenizer()), student(), None)
    for own, name, tokenizer in ((bytes_tokenizer(), "", None), (None, saved("decoder"), bytes_tokenizer())):
        padded.name_or_path = name
        found.append(Guide(Guidance(padded, own, pooling="all"), named, tokenizer).teacher_rows(sequences))
    assert len(found[0]) == 5 + 4
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][:5], states("good<end>", padded.model, bytes_tokenizer()), rtol=1e-4, atol=1e-5)
    more = bytes_tokenizer()
    more.add_tokens(["<|new|>"])
    for tokenizer, text in ((more, concatenated), (bytes_tokenizer(), lambda prompt, completion: prompt + completion)):
        assert not Guide(Guidance(padded, text=text), named, tokenizer).hands_on
        with pytest.raises(
            ValueError, match=r"compares tokens: give no text=, and a teacher of the student's vocabulary"
        ):
            Guide(Guidance(padded, pooling="all", text=text), named, tokenizer)
    padded.name_or_path = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not known which tokenizer"):
        Guide(Guidance(padded), named, None)


# ---------------------------------------------------------------------------------------------- what is too long


@pytest.mark.parametrize(("config", "kind"), [(RobertaConfig, RobertaModel), (MPNetConfig, MPNetModel)])
def test_positions_of_robertas_kind_begin_behind_the_paddings(config: Any, kind: Any) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = kind(config(vocab_size=31, pad_token_id=1, max_position_embeddings=20, **sizes)).eval()
    tokenizer = letters_tokenizer()
    tokenizer.model_max_length = 10**30
    window = window_of(model, tokenizer)
    ids = torch.full((1, 20), 5)
    assert window == 18
    model(input_ids=ids[:, :window])
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        model(input_ids=ids[:, : window + 1])
    guide = Guide(guidance(teacher=model, tokenizer=tokenizer), student(), bytes_tokenizer())
    guide.teacher_rows(marked(["a" * 18, "b"], [[], []]))
    with pytest.raises(ValueError, match=r"19 tokens.*takes 18.*truncation"):
        guide.teacher_rows(marked(["a" * 19, "b"], [[], []]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("only", [False, True])
def test_long_texts_are_cut_on_the_side_that_was_named(side: Any, only: bool) -> None:
    """Special tokens stay where they are, and offsets point into the whole text."""
    tokenizer = letters_tokenizer(special=True)
    tokenizer.model_max_length = 12
    model = teacher(kind=BertModel, vocab_size=33)
    chosen = guidance(teacher=model, tokenizer=tokenizer, truncation=side, completion_only=only)
    guide = Guide(chosen, student(), bytes_tokenizer())
    long, short = "abcdefghijklmnopqrst", "a good"
    rows = guide.teacher_rows(marked([long, short], [[(7, 9), (10, 14)], [(2, 6)]]))
    assert guide.truncated == 1
    assert tokenizer.truncation_side == "right", "the user's own tokenizer stays as it was"
    kept = long[-10:] if side == "left" else long[:10]
    counted = [1 + place for place, letter in enumerate(kept) if not only or letter in "hiklmn"]
    wanted = states(kept, model, tokenizer)
    torch.testing.assert_close(rows[0], wanted[counted if only else slice(None)].mean(0), rtol=1e-4, atol=1e-5)
    wanted = states(short, model, tokenizer)
    torch.testing.assert_close(rows[1], wanted[3:7].mean(0) if only else wanted.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_that_are_handed_on_are_cut_too(side: Any) -> None:
    other = student(seed=4, max_position_embeddings=8)
    other.name_or_path = saved("decoder")
    guide = Guide(Guidance(other, truncation=side, pooling="mean"), student(), bytes_tokenizer())
    rows = guide.teacher_rows(marked(["a good film", "bad"], [[], []]))
    wanted = states("ood film" if side == "left" else "a good f", other.model, bytes_tokenizer()).mean(0)
    torch.testing.assert_close(rows[0], wanted, rtol=1e-4, atol=1e-5)
    assert guide.truncated == 1
    silent = Guide(Guidance(other), student(), bytes_tokenizer())
    with pytest.raises(ValueError, match=r"11 tokens.*takes 8"):
        silent.teacher_rows(marked(["a good film", "bad"], [[], []]))


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(ValueError, match="truncation must be one of 'left', 'right', None, not 'end'"):
        guidance(truncation="end")
    with pytest.raises(ValueError, match="read all of a text"):
        Guidance(student(), truncation="left", pooling="all")
