"""How layers lay out what they return: channels first or last, time first, padding, packed; or it is asked."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bird import Taps, Teacher, compare
from bird.features import poolers_of
from bird.taps import FirstPass


def tapped(model: nn.Module, name: str, *inputs: Any, pool: Any = "mean", **more: Any) -> Tensor:
    with Taps(model, name, pool=pool) as taps:
        model(*inputs, **more)
        return taps.pop()[name]


class Last(nn.Module):
    """A vision transformer in windows, as Swin is: maps [N, H, W, C] between blocks of matrices and norms."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        x = self.drop(self.norm(x + self.block(x)))
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize("name", ["block", "block.0", "block.1", "block.2", "norm", "drop"])
@pytest.mark.parametrize("size", [12, 16])  # maps of 6 x 6, and of 8 x 8 beside 8 channels
def test_channels_that_are_last(name: str, size: int) -> None:
    model, images = Last().eval(), torch.randn(4, 3, size, size)
    if size == 16 and name in ("norm", "drop"):
        with pytest.raises(ValueError, match=rf"whether \[4, 8, 8, 8\] of layer '{name}'.*unclear.*'channels_last'"):
            tapped(model, name, images)
        return
    kept = []
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: kept.append(output))
    found = tapped(model, name, images)
    torch.testing.assert_close(found, kept[0].mean((1, 2)))
    assert found.shape == (4, 8)
    teacher = Teacher(copy.deepcopy(model), name)
    torch.testing.assert_close(teacher(images)[name], found)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", ["0", "1", "2", "3", "4"])
def test_channels_that_are_first(name: str, size: int) -> None:
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU()
    )
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(4, 3, size, size)
    torch.testing.assert_close(tapped(model, f"0.{name}", images), body[: int(name) + 1](images).mean((2, 3)))


def test_a_convolution_over_time_is_no_sequence_of_tokens() -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3)), torch.randn(4, 3, 20)
    torch.testing.assert_close(tapped(model, "0", x), model[0](x).mean(2))
    torch.testing.assert_close(tapped(model, "1", x), model[:2](x).mean(2))


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    images = torch.randn(4, 3, 64, 64)
    widths = {
        "swin_t": {"features.0": 96, "features.1": 96, "features.7.1.mlp": 768, "features": 768, "norm": 768},
        "convnext_tiny": {"features.0": 96, "features.1.0": 96, "features.3": 192, "features": 768},
        "resnet18": {"relu": 64, "layer1": 64, "layer3.0": 256, "avgpool": 512},
        "densenet121": {"features.denseblock1": 256, "features.transition1": 128, "features": 1024},
        "googlenet": {"inception3a": 256, "inception5b": 1024},
        "vit_b_32": {"conv_proj": 768, "encoder.layers.encoder_layer_0": 768, "encoder.ln": 768},
        "mobilenet_v3_small": {"features.3": 24, "features": 576},
    }
    for name, layers in widths.items():
        size = dict(image_size=64) if name.startswith("vit") else {}
        model = getattr(models, name)(weights=None, **size).eval()
        with torch.no_grad(), Taps(model, list(layers)) as taps:
            model(images)
            assert {layer: rows.shape[1] for layer, rows in taps.pop().items()} == layers, name


def test_a_compiled_model_of_any_size_is_compiled_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    taps, graphs = Taps(model, ["0", "1"]), []
    compiled = torch.compile(
        model, backend=lambda graph, _: graphs.append(0) or graph.forward, fullgraph=True, dynamic=True
    )
    for rows, size in ((4, 12), (5, 20), (6, 33), (7, 41)):
        images = torch.randn(rows, 3, size, size)
        compiled(images)
        found = taps.pop()["1"]
        torch.testing.assert_close(found, model[:2](images).mean((2, 3)))
        taps.pop()
    assert len(graphs) == 1


# ------------------------------------------------------------------------------------ time first


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: Any, batch_first: bool) -> None:
    model = nn.ModuleDict({"net": kind(5, 8, batch_first=batch_first)})
    model.forward = lambda x: model["net"](x)[0]  # type: ignore[method-assign]
    x = torch.randn(7, 3, 5)
    rows = tapped(model, "net", x)
    assert rows.shape == ((7, 8) if batch_first else (3, 8))
    torch.testing.assert_close(rows, model(x).mean(1 if batch_first else 0))


@pytest.mark.parametrize("name", ["layers.0", "layers.1.linear1", "layers.1.norm2", "layers.0.self_attn"])
@pytest.mark.parametrize("square", [False, True])
def test_encoders_with_time_first(name: str, square: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2).train()
    x = torch.randn(4 if square else 7, 4, 8)
    kept = []
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: kept.append(output))
    rows = tapped(model, name, x)
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    torch.testing.assert_close(rows, output.mean(0))


class Attends(nn.Module):
    """A block of one's own, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x)[0])


class Tokens(nn.Module):
    """Token ids [N, T], and blocks of [T, N, D] or, if ``back``, of [N, T, D]."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.embed, self.block, self.back = nn.Embedding(9, 8), Attends(), back
        if back:
            self.block.forward = lambda x: Attends.forward(self.block, x.transpose(0, 1)).transpose(0, 1)  # type: ignore[method-assign]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.block(x if self.back else x.transpose(0, 1))


@pytest.mark.parametrize("back", [False, True])
def test_blocks_around_an_attention_with_time_first(back: bool) -> None:
    model, ids = Tokens(back), torch.randint(9, (4, 7))
    torch.testing.assert_close(tapped(model, "block", ids), model(ids).mean(1 if back else 0))


def test_blocks_around_an_attention_whose_inputs_say_nothing_are_asked_about() -> None:
    model, x = nn.Sequential(Attends()), torch.randn(7, 4, 8)
    with pytest.raises(ValueError, match=r"'0' holds an attention that is not batch_first.*'time_first'"):
        tapped(model, "0", x)
    torch.testing.assert_close(tapped(model, "0", x, pool="time_first"), model(x).mean(0))


class Transposes(nn.Module):
    """Blocks of its own that want time first, in a model that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1)).mean(0)


def test_rows_that_are_no_samples_are_an_error_that_says_what_to_do() -> None:
    x, model = torch.randn(4, 7, 5), Transposes()
    with pytest.raises(ValueError, match=r"layer 'block' has 7 rows of features in a batch of 4: say as pool="):
        tapped(model, "block", x)
    with pytest.raises(ValueError, match=r"has 7 rows of features in a batch of 4"):
        Teacher(copy.deepcopy(model), "block")(x)
    found = tapped(model, "block", x, pool={"block": "time_first"})
    torch.testing.assert_close(found, model.block(x).mean(1))
    assert tapped(model, "block", x, pool=lambda t: t.flatten(0, 1)).shape == (28, 6)
    with pytest.raises(ValueError, match=r"pool names \['blok'\], but the layers are \['block'\]"):
        tapped(model, "block", x, pool={"blok": "time_first"})


def test_any_tensor_of_the_call_may_have_the_samples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.texts = nn.Linear(5, 6), nn.Linear(3, 6)

        def forward(self, images: Tensor, texts: Tensor) -> Tensor:
            return self.images(images) @ self.texts(texts).T

    model = Two()
    with Taps(model, ["images", "texts"]) as taps:
        model(images=torch.randn(4, 5), texts=torch.randn(9, 3))
        assert [len(rows) for rows in taps.pop().values()] == [4, 9]
        model.images(torch.randn(2, 5))  # by itself: there is no batch to compare with
        assert len(taps._passes.now.features["images"]) == 2


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "time_first"])
def test_a_layout_can_be_said(layout: str) -> None:
    model, x = nn.Sequential(nn.Identity()), torch.randn(4, 4, 4)
    over = {"channels_first": 2, "channels_last": 1, "time_first": 0}[layout]
    torch.testing.assert_close(tapped(model, "0", x, pool=layout), x.mean(over))


# ------------------------------------------------------------------------------------ padding


def test_padding_of_a_fast_encoder_does_not_count() -> None:
    """In eval mode, on the fast path, layers pass nested tensors to each other."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, lengths = torch.randn(4, 7, 8), [7, 3, 5, 2]
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    kinds = []
    model.layers[0].register_forward_hook(lambda _m, _a, output: kinds.append(output.is_nested))
    with torch.no_grad():
        found = tapped(model, "layers.0", x, src_key_padding_mask=padding)
        alone = torch.cat([tapped(model, "layers.0", row[None, :t]) for row, t in zip(x, lengths, strict=True)])
        padded = tapped(model, "layers.0", x, src_key_padding_mask=padding, pool="none")
    assert kinds[0], "this says nothing about nested tensors"
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert padded.shape == (4, 7, 8)
    assert not padded[padding].any()


class Wraps(nn.Module):
    """An encoder inside a network of one's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("name", ["encoder", "encoder.layers.0", "encoder.layers.1"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"norm_first": True}])
def test_padding_of_other_encoders_does_not_count(options: dict[str, Any], training: bool, name: str) -> None:
    torch.manual_seed(0)
    model, x, lengths = Wraps(**options).train(training), torch.randn(4, 7, 8), [7, 3, 5, 2]
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    lay = (lambda rows: rows) if "batch_first" in options else (lambda rows: rows.transpose(0, 1))
    found = tapped(model, name, lay(x), padding)
    alone = torch.cat([tapped(model, name, lay(row[None, :t])) for row, t in zip(x, lengths, strict=True)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Teacher(model, name)(lay(x), padding)[name], alone, rtol=1e-4, atol=1e-5)


def test_padding_of_decoders_is_that_of_the_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True))
    model.forward = lambda x, y, **more: model[0](x, y, **more)  # type: ignore[method-assign]
    x, y, lengths = torch.randn(4, 7, 8), torch.randn(4, 7, 8), torch.tensor([7, 3, 5, 2])
    padding = torch.arange(7) >= lengths[:, None]
    masks = {"src_key_padding_mask": padding.flip(0), "tgt_key_padding_mask": padding}
    for name in ("0", "0.decoder", "0.decoder.layers.0"):
        kept = []
        handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: kept.append(output))  # noqa: B023
        found = tapped(model, name, x, y, **masks)
        handle.remove()
        expected = torch.stack([row[:t].mean(0) for row, t in zip(kept[0], lengths, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_packed_sequences_count_their_own_steps() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.GRU(5, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.net(pack_padded_sequence(x, lengths, enforce_sorted=False))[1]

    model, x, lengths = Reader(), torch.randn(7, 3, 5), [4, 7, 2]
    rows = tapped(model, "net", x, torch.tensor(lengths))
    alone = torch.stack([model.net(x[:t, i])[0].mean(0) for i, t in enumerate(lengths)])
    torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-6)
    rows.sum().backward()
    assert model.net.weight_ih_l0.grad.norm() > 0


def test_a_mask_leaves_tokens_out() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8)), torch.randn(3, 6, 5).bfloat16()
    model, mask = model.bfloat16(), torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6, [0, 1, 0, 1, 0, 0]])
    with Taps(model, "0") as taps:
        taps.masks = {"0": mask}
        output = model(torch.where(mask[:, :, None] != 0, x, torch.nan))
        rows = taps.pop()["0"]
    expected = torch.stack([o[m != 0].float().mean(0) for o, m in zip(output, mask, strict=True)])
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), expected, rtol=1e-2, atol=1e-3)


def test_an_object_with_a_last_hidden_state_is_read() -> None:
    class Body(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=super().forward(x))

    model, x = nn.ModuleDict({"body": Body(5, 8)}), torch.randn(4, 6, 5)
    model.forward = lambda x: model["body"](x).last_hidden_state  # type: ignore[method-assign]
    torch.testing.assert_close(tapped(model, "body", x), model(x).mean(1))


# ------------------------------------------------------------------------------------ threads and copies


@pytest.mark.parametrize("kind", ["taps", "teacher", "compiled"])
def test_threads_have_their_own_features(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    taps = Taps(model, ["0", "2"]) if kind != "teacher" else None
    run: Any = Teacher(copy.deepcopy(model), ["0", "2"]) if taps is None else model
    if kind == "compiled":
        run = torch.compile(model, backend="eager")
        run(torch.randn(5, 3))

    first = copy.deepcopy(model[0])
    first._forward_hooks.clear()
    expected = [first(torch.full((5, 3), float(number))) for number in range(4)]
    assert not expected[0].equal(expected[1])

    def work(number: int) -> None:
        x = torch.full((5, 3), float(number))
        for _ in range(100):
            output = run(x)
            found = output if taps is None else taps.pop()
            torch.testing.assert_close(found["0"], expected[number])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what they raise


@pytest.mark.parametrize("kind", [Taps, FirstPass])
def test_a_copy_of_a_tapped_model_records_for_itself(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    taps = kind(model, "0")
    other = copy.deepcopy(model)
    other(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="no features"):
        taps.pop()
    pickle.loads(pickle.dumps(Teacher(nn.Sequential(nn.Linear(3, 4)), "0")))


def test_weights_that_have_no_size_yet_are_passed_by() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    rows = poolers_of(model, {"1": model[1]}, "mean")["1"]
    assert rows.sizes[0] == ([], [3, 4], [3, 4])


def test_networks_with_channels_last_are_compared() -> None:
    model = Last()
    found = compare(model, model, [torch.randn(8, 3, 12, 12) for _ in range(2)], progress=False)
    assert found.layers_a == ("patch", "block", "norm", "drop", "head")
    images = torch.randn(8, 3, 12, 12)
    again = compare(model, model, [images], layers_a="norm", layers_b="block", progress=False)
    pool = {"norm": "channels_last", "block": lambda t: t.mean((1, 2))}
    explicit = compare(model, model, [images], layers_a="norm", layers_b="block", pool=pool, progress=False)
    assert again.matrix[0, 0] == pytest.approx(explicit.matrix[0, 0])


def test_a_concatenation_whose_parts_are_as_wide_as_the_picture() -> None:
    """A dense block's own weights know its growth, 32 here, and not the 96 channels that it gives."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow = nn.Conv2d(64, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.grow(x)], 1)

    model = nn.Sequential(nn.Conv2d(3, 64, 1), Dense(), nn.BatchNorm2d(96), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with Taps(model, "1") as taps:
        model(torch.randn(2, 3, 32, 32))
        assert taps.pop()["1"].shape == (2, 96)
