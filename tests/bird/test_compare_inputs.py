"""What `compare` takes and gives back: batches of other forms, padding, devices, names, results that are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bird import Similarity, cka_matrix, compare


class Reader(nn.Module):
    """Takes tokens and their mask, as transformers' models do."""

    def __init__(self, encoder: str = "encoder") -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.parts = nn.ModuleDict({encoder: nn.Linear(8, 6)})
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        return self.parts[self.encoder](self.embed(input_ids)).sum()


def reader_batches(filler: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        ids = torch.randint(50, (12, 7), generator=generator)
        mask = (torch.arange(7) < torch.randint(1, 8, (12, 1), generator=generator)).long()
        batches.append({"input_ids": torch.where(mask != 0, ids, filler), "attention_mask": mask})
    return batches


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model, options = Reader(), dict(layers_a="embed", layers_b="parts.encoder", progress=False)
    found, other = (compare(model, model, reader_batches(filler), **options).matrix for filler in (0, 49))
    np.testing.assert_allclose(found, other, rtol=1e-6)

    def means(layer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens, mask = layer(batch["input_ids"]), batch["attention_mask"]
        return torch.stack([row[keep != 0].mean(0) for row, keep in zip(tokens, mask, strict=True)])

    batch = reader_batches(0)[0]
    xs = means(model.embed, batch), means(lambda ids: model.parts["encoder"](model.embed(ids)), batch)
    one = compare(model, model, [batch], **options).matrix
    torch.testing.assert_close(
        torch.tensor(one), cka_matrix([xs[0]], [xs[1]], estimator="unbiased").double(), rtol=1e-5, atol=1e-6
    )


def test_a_decoder_has_a_mask_of_its_own() -> None:
    torch.manual_seed(0)
    model, options = Reader("decoder"), dict(layers_a="embed", layers_b="parts.decoder", progress=False)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    batch = reader_batches(0)[0]
    ours = {"decoder_attention_mask": torch.ones(12, 7)}
    whole = compare(model, model, [batch | ours], **options).matrix
    without = compare(model, model, [batch], **options).matrix  # nothing is known of the decoder's padding
    padded = compare(model, model, [batch | {"decoder_attention_mask": batch["attention_mask"]}], **options).matrix
    np.testing.assert_allclose(whole, without)
    assert abs(whole - padded).max() > 1e-3
    labels = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    np.testing.assert_allclose(compare(model, model, [batch | {"labels": labels}], **options).matrix, padded)


@pytest.mark.parametrize("config", [None, SimpleNamespace(is_encoder_decoder=False)])
def test_a_network_that_is_a_decoder_only_has_the_mask_of_its_tokens(config: Any) -> None:
    """OPT's layers are ``decoder.layers.0``, and its batches have ``attention_mask`` alone."""
    torch.manual_seed(0)
    model, options = Reader("decoder"), dict(layers_a="embed", layers_b="parts.decoder", progress=False)
    if config is not None:
        model.config = config
    found, other = (compare(model, model, reader_batches(filler), **options).matrix for filler in (0, 49))
    np.testing.assert_allclose(found, other, rtol=1e-6)


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_the_first_of_a_mapping_goes_to_a_model_that_takes_none_of_its_names() -> None:
    model, x = Pictures(), torch.randn(8, 5)
    expected = compare(model, model, [x], progress=False).matrix
    for batch in ({"image": x, "label": torch.arange(8)}, {"x": x}):
        np.testing.assert_allclose(compare(model, model, [batch], progress=False).matrix, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        compare(model, model, [{"x": x, "label": torch.arange(8)}], progress=False)


@pytest.mark.parametrize("layers", [[0, -1], 0])
def test_numbers_are_no_layers(layers: Any) -> None:
    with pytest.raises(TypeError, match=r"module paths, not by .*: the outermost are \['one', 'two'\]"):
        compare(Pictures(), Pictures(), [torch.randn(8, 5)], layers_a=layers, progress=False)


def test_runs_where_it_is_asked_to_and_comes_back() -> None:
    model, places = Pictures().double(), []
    model.one.register_forward_hook(lambda layer, args, _output: places.append((layer.weight.device, args[0].device)))
    found = compare(model, model, [torch.randn(8, 5).double()], device="cpu", progress=False)
    assert found.matrix.shape == (2, 2)
    with pytest.raises(Exception, match="meta"):  # there is no other device here: it goes there, and has no numbers
        compare(model, Pictures(), [torch.randn(8, 5).double()], device="meta", layers_a="one", layers_b="one")
    assert places[-1][0].type == "meta"


def test_what_was_saved_is_loaded_with_names_on_the_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    axes, real = [], figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **o: (axes.append(self.axes[0]), real(self, *a, **o))
    )
    found = compare(Pictures(), Pictures(), [torch.randn(8, 5)], names=("student", "teacher"), progress=False)
    found.matrix[0, 1] = np.nan
    found.save(tmp_path)
    assert (axes[0].get_ylabel(), axes[0].get_xlabel()) == ("student", "teacher")
    again = Similarity.load(tmp_path)
    np.testing.assert_array_equal(again.matrix, found.matrix)
    for name in ("layers_a", "layers_b", "estimator", "batches", "samples", "names"):
        assert getattr(again, name) == getattr(found, name)
    about = json.loads((tmp_path / "cka.json").read_text())
    assert about["names"] == ["student", "teacher"]
    (tmp_path / "cka.json").write_text(json.dumps(about | {"layers_a": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match=r"a matrix \[2, 2\] of other layers"):
        Similarity.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(estimator="x"), dict(batches=-1), dict(samples=None), dict(names=5), dict(names=["a"]),
        dict(layers_a="a"), dict(layers_a=[1]), dict(cka=[["1", "2"]]), dict(cka=[[True, 1.0]]),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_another_kind_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    Similarity(np.ones((1, 2)), ("a",), ("b", "c"), "biased", 1, 4).save(tmp_path)
    about = json.loads((tmp_path / "cka.json").read_text())
    (tmp_path / "cka.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"cka\.json is not what Similarity\.save writes"):
        Similarity.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "[1]", "{}", '{"cka": [[1.0]], "what": 1}', '{"cka": "x"}', "{"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "cka.json").write_text(text)
    with pytest.raises(ValueError, match=r"cka\.json is not what Similarity\.save writes"):
        Similarity.load(tmp_path)


def test_a_pool_for_each_layer_names_layers_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"pool names \['three'\], but the layers are \['one', 'two'\] and"):
        compare(Pictures(), Pictures(), [torch.randn(8, 5)], pool={"three": "flatten"}, progress=False)
