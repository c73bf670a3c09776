"""A teacher reads the student's text in its order: which of its tokens count, what is cut, whose ids they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="the trainers are TRL's")
from accelerate import cpu_offload, dispatch_model
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from bird.language import BirdDPOTrainer, BirdSFTTrainer, BirdTrainer, Guidance
from bird.language.guidance import Guide, concatenated, window_of
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, saved, student, teacher
from tests.bird.trainers import made, ran, sequences, states

NEAR = {"rtol": 1e-4, "atol": 1e-5}
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def guide_of(model: Any = None, tokenizer: Any = None, **changes: Any) -> Guide:
    return Guide(guidance(**changes), student() if model is None else model, tokenizer or bytes_tokenizer())


def reading(texts: list[str]) -> dict[str, Any]:
    """The choice of a guidance that notes what the teacher is given."""
    return {"text": lambda prompt, completion: texts.append(f"{prompt}|{completion}") or prompt + completion}


# ---------------------------------------------------------------------------------------------- order and spans


@pytest.mark.parametrize("only", [False, True])
def test_turns_of_a_conversation_are_read_in_their_order(only: bool, tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = TURNS
    talk = [("user", "q one. "), ("assistant", "a two. "), ("user", "q three. "), ("assistant", "a four.")]
    talks = talk, [("user", "x. "), ("assistant", "yes.")]
    data = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in talks]
    texts: list[str] = []
    guide = guidance(**reading(texts), completion_only=only, pooling="mean")
    own = {"train_dataset": Dataset.from_list(data), "processing_class": tokenizer}
    trainer = made(BirdSFTTrainer, tmp_path, guide, assistant_only_loss=True, **own)
    batch = next(iter(trainer.get_train_dataloader()))
    of = trainer.bird_sequences(batch)
    rows = trainer.bird_guide.teacher_rows(of)
    assert sorted(texts) == ["q one. |a two. q three. a four.", "x. |yes."]
    number, whole = texts.index("q one. |a two. q three. a four."), "q one. a two. q three. a four."
    counted = torch.tensor([not only or 7 <= place < 14 or place >= 23 for place in range(len(whole))])
    torch.testing.assert_close(rows[number], states(whole)[counted].mean(0), **NEAR)
    trainer.bird_guide.taps.listen()
    ours = trainer.model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1][number]
    if only:
        pooled = ours[: len(whole)][counted].mean(0)
        torch.testing.assert_close(trainer.bird_guide.student_rows(of)[number], pooled, **NEAR)


def test_the_teacher_reads_what_text_makes() -> None:
    texts: list[str] = []
    guide = guide_of(
        text=lambda prompt, completion: texts.append(f"{prompt}|{completion}") or f"q {prompt} a {completion}"
    )
    found = guide.teacher_rows(sequences(["a good film<end>", "bad"], 3, "left"))
    assert texts == ["a g|ood film", "bad|"]
    for row, text in zip(found, ["q a g a ood film", "q bad a "], strict=True):
        torch.testing.assert_close(row, states(text).mean(0), **NEAR)


def test_completions_are_masks_for_a_teacher_of_the_same_tokens() -> None:
    """Two spans, the second in the middle; the guidance hands the ids on."""
    other = student(seed=4)
    other.name_or_path = saved("decoder")
    guide = Guide(Guidance(other, completion_only=True, pooling="mean"), student(), bytes_tokenizer())
    (row,) = guide.teacher_rows(sequences(["a good film"], [[(0, 1), (4, 6)]]))
    wanted = states("a good film", other.model, bytes_tokenizer())[[0, 4, 5]].mean(0)
    torch.testing.assert_close(row, wanted, **NEAR)


@pytest.mark.parametrize("only", [False, True])
def test_words_do_not_grow_together_where_the_completion_begins(only: bool) -> None:
    """With a tokenizer as Llama 2's: a decoder takes the space off the first token of what it is given."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁film": 2, "▁is": 3, "▁good": 4, "▁bad": 5}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", pad_token="<unk>")
    texts: list[str] = []
    guide = Guide(guidance(**reading(texts), completion_only=only), student(), tokenizer)
    (row,) = guide.teacher_rows(sequences(["the film is good"], 3, tokenizer=tokenizer))
    assert texts == ["the film is| good"]
    torch.testing.assert_close(row, states("the film is good")[11 if only else 0 :].mean(0), **NEAR)


def test_a_character_of_several_tokens_is_read_whole() -> None:
    """The boundary lies inside of an é, two bytes; the text stays what it is."""
    texts: list[str] = []
    guide_of(**reading(texts)).teacher_rows(sequences(["caf\u00e9 noir", "ab"], [[(4, 10)], [(2, 2)]]))
    assert texts == ["caf|\u00e9 noir", "ab|"]


# ---------------------------------------------------------------------------------------------- encoder and decoder


def bart(words: int = 257) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    return BartForConditionalGeneration(BartConfig(vocab_size=words, forced_eos_token_id=None, **ids, **sizes)).eval()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1, "vocab_size": 257}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).eval()


def test_decoders_of_encoder_decoder_networks_are_refused_at_construction() -> None:
    said = r"reads with an encoder.*name a layer of the encoder, such as '(model\.)?enc"
    for model, layer in ((bart(), None), (bart(), "model.decoder.layers.0"), (t5(), "decoder"), (t5(), "lm_head")):
        with pytest.raises(ValueError, match=said):
            guide_of(model, layer=layer)
    for model, layer in ((bart(31), None), (bart(31).model, None), (bart(31), "model.decoder")):
        with pytest.raises(ValueError, match="reads with an encoder"):
            guide_of(teacher=model, teacher_layer=layer)


def test_encoders_of_encoder_decoder_networks_guide_and_are_guided(tmp_path: Path) -> None:
    """Labels as long as the text are the decoder's tokens, no mask of the encoder's; batches are accumulated too."""
    rows = [{**bytes_tokenizer()(text), "labels": [-100, 5, 6, 7]} for text in ("good", "ill.", "so s", "fine") * 2]
    texts: list[str] = []
    guide = guidance(**reading(texts), layer="encoder", teacher=bart(31), teacher_layer="model.encoder")
    few = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "model": t5()}
    trainer = ran(BirdTrainer, tmp_path, guide, train_dataset=Dataset.from_list(rows), eval_dataset=None, **few)
    assert set(texts) == {"|good", "|ill.", "|so s", "|fine"}
    found = trainer.bird_guide.teacher_rows(sequences(["a good film", "bad"])._replace(completion=None))
    for row, text in zip(found, ("a good film", "bad"), strict=True):
        torch.testing.assert_close(row, states(text, bart(31).get_encoder()).mean(0), **NEAR)


# ---------------------------------------------------------------------------------------------- whose ids they are


def test_equal_sizes_are_no_equal_vocabulary() -> None:
    """A BERT of 257 letters was fed a Llama's bytes. Its own tokenizer reads the text, where it can be found."""
    other = teacher(kind=BertModel, vocab_size=257)
    with pytest.raises(ValueError, match=r"not known which tokenizer the teacher reads with: give it, tokenizer="):
        Guide(Guidance(other), student(), bytes_tokenizer())
    other.name_or_path = saved("encoder")
    guide = Guide(Guidance(other, pooling="mean"), student(), bytes_tokenizer())
    wanted = states("a good", other, letters_tokenizer(special=True)).mean(0)
    torch.testing.assert_close(guide.teacher_rows(sequences(["a good"], 6))[0], wanted, **NEAR)


def test_ids_are_handed_on_to_a_teacher_of_the_same_vocabulary(tmp_path: Path) -> None:
    """Special tokens too, whoever says which tokenizer it is; sizes that networks have are not asked."""
    padded = student(seed=3, vocab_size=264)  # rows that no token uses, as networks have for a GPU's sake
    of, found, named = sequences(["good<end>", "ill<end>"]), [], student()
    named.name_or_path = saved("decoder")
    with pytest.raises(ValueError, match="the student's tokenizer is not known: give processing_class"):
        Guide(Guidance(padded, bytes_tokenizer()), student(), None)
    for own, name, tokenizer in ((bytes_tokenizer(), "", None), (None, saved("decoder"), bytes_tokenizer())):
        padded.name_or_path = name
        found.append(Guide(Guidance(padded, own, pooling="all"), named, tokenizer).teacher_rows(of))
    assert len(found[0]) == 5 + 4
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][:5], states("good<end>", padded.model, bytes_tokenizer()), **NEAR)
    more = bytes_tokenizer()
    more.add_tokens(["<|new|>"])
    said = r"compares tokens: give no text=, and a teacher of the student's vocabulary"
    for tokenizer, text in ((more, concatenated), (bytes_tokenizer(), lambda prompt, completion: prompt + completion)):
        assert not Guide(Guidance(padded, text=text), named, tokenizer).hands_on
        with pytest.raises(ValueError, match=said):
            Guide(Guidance(padded, pooling="all", text=text), named, tokenizer)
    padded.name_or_path = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not known which tokenizer"):
        Guide(Guidance(padded), named, None)


# ---------------------------------------------------------------------------------------------- what is too long


@pytest.mark.parametrize(("config", "kind"), [(RobertaConfig, RobertaModel), (MPNetConfig, MPNetModel)])
def test_positions_of_robertas_kind_begin_behind_the_paddings(config: Any, kind: Any) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = kind(config(vocab_size=31, pad_token_id=1, max_position_embeddings=20, **sizes)).eval()
    own = letters_tokenizer()
    own.model_max_length = 10**30
    window, ids = window_of(model, own), torch.full((1, 20), 5)
    assert window == 18
    model(input_ids=ids[:, :window])
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        model(input_ids=ids[:, : window + 1])
    guide = Guide(guidance(teacher=model, tokenizer=own), student(), bytes_tokenizer())
    guide.teacher_rows(sequences(["a" * 18, "b"]))
    with pytest.raises(ValueError, match=r"19 tokens.*takes 18.*truncation"):
        guide.teacher_rows(sequences(["a" * 19, "b"]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("only", [False, True])
def test_long_texts_are_cut_on_the_side_that_was_named(side: Any, only: bool) -> None:
    """Special tokens stay where they are, and offsets point into the whole text."""
    own = letters_tokenizer(special=True)
    own.model_max_length = 12
    model = teacher(kind=BertModel, vocab_size=33)
    chosen = guidance(teacher=model, tokenizer=own, truncation=side, completion_only=only)
    guide = Guide(chosen, student(), bytes_tokenizer())
    long, short = "abcdefghijklmnopqrst", "a good"
    rows = guide.teacher_rows(sequences([long, short], [[(7, 9), (10, 14)], [(2, 6)]]))
    assert guide.truncated == 1
    assert own.truncation_side == "right", "the user's own tokenizer stays as it was"
    kept = long[-10:] if side == "left" else long[:10]
    counted = [1 + place for place, letter in enumerate(kept) if not only or letter in "hiklmn"]
    wanted = states(kept, model, own)
    torch.testing.assert_close(rows[0], wanted[counted if only else slice(None)].mean(0), **NEAR)
    wanted = states(short, model, own)
    torch.testing.assert_close(rows[1], wanted[3:7].mean(0) if only else wanted.mean(0), **NEAR)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_that_are_handed_on_are_cut_too(side: Any) -> None:
    other, of = student(seed=4, max_position_embeddings=8), sequences(["a good film", "bad"])
    other.name_or_path = saved("decoder")
    guide = Guide(Guidance(other, truncation=side, pooling="mean"), student(), bytes_tokenizer())
    wanted = states("ood film" if side == "left" else "a good f", other.model, bytes_tokenizer()).mean(0)
    torch.testing.assert_close(guide.teacher_rows(of)[0], wanted, **NEAR)
    assert guide.truncated == 1
    with pytest.raises(ValueError, match=r"11 tokens.*takes 8"):
        Guide(Guidance(other), student(), bytes_tokenizer()).teacher_rows(of)


@pytest.mark.parametrize("kind", ["offloaded", "spread"])
def test_what_accelerate_has_placed_stays_there(kind: str, tmp_path: Path) -> None:
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    if kind == "offloaded":
        model = cpu_offload(teacher(), execution_device=torch.device("cpu"))
    else:
        model = dispatch_model(teacher(), places, main_device="cpu", offload_dir=str(tmp_path / "weights"))
    before = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert "meta" in before.values()
    trainer = ran(BirdDPOTrainer, tmp_path, guidance(teacher=model), max_steps=1)
    nn.ModuleList([trainer.bird_guide.teacher]).to("cpu", torch.float32)
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == before
    of = sequences(["a good film", "bad"])
    torch.testing.assert_close(trainer.bird_guide.teacher_rows(of), guide_of().teacher_rows(of))
