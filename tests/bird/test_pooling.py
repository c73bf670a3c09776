"""From what a layer returns to rows of features: the first tensor of an output, and pooling."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird.features import pool_rows
from bird.taps import Taps

# What layers return


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.layer.register_forward_hook(lambda _m, _a, out: wrap(out))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


@dataclasses.dataclass
class Fields:
    loss: Tensor | None
    hidden: Tensor


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """As in transformers: a dataclass and a mapping of what is not None."""

    loss: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        self.update({k: v for k, v in vars(self).items() if v is not None})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: (out, torch.zeros(9)),
        lambda out: [None, "text", (out,)],
        lambda out: {"empty": [], "hidden": out, "other": torch.zeros(9)},
        lambda out: Fields(None, out),
        lambda out: ModelOutput(hidden=out),
    ],
    ids=["tuple", "nested", "dict", "dataclass", "transformers"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_tensor_of_an_output_is_taken(wrap: Any, compiled: bool) -> None:
    net = Returns(wrap)
    model = torch.compile(net, backend="eager") if compiled else net
    taps = Taps(model, "layer")
    x = torch.randn(3, 4)
    model(x)
    torch.testing.assert_close(taps.pop()["layer"], x @ net.layer.weight.T + net.layer.bias)


@pytest.mark.parametrize("output", [(None, "text"), (), torch.arange(6).view(2, 3), torch.ones(2, 3).bool()])
def test_an_output_without_features_is_refused(output: Any) -> None:
    net = Returns(lambda out: output)
    Taps(net, "layer")
    with pytest.raises(TypeError, match="a tapped layer returned"):
        net(torch.randn(3, 4))


# Pooling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 5), None),
        ((3, 7, 5), 1),
        ((3, 5, 4, 6), (2, 3)),
        ((3, 5, 2, 4, 3), (2, 3, 4)),
        ((1, 5, 1, 1), (2, 3)),
    ],
)
def test_mean_pooling(shape: tuple[int, ...], axes: Any, dtype: torch.dtype) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = pool_rows(features)
    truth = features.double().numpy() if axes is None else features.double().numpy().mean(axes)
    assert rows.dtype == dtype
    assert rows.shape == truth.shape
    torch.testing.assert_close(rows, torch.from_numpy(truth).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_means_of_low_precision_accumulate_in_fp32() -> None:
    for value, shape, dtype in ((60_000.0, (2, 3, 32, 32), torch.float16), (1.0, (2, 3, 64, 64), torch.bfloat16)):
        rows = pool_rows(torch.full(shape, value, dtype=dtype))  # fp16 overflows; bf16 stops growing at 256
        assert rows.equal(torch.full((2, 3), value, dtype=dtype))


@pytest.mark.parametrize("pool", ["mean", "flatten", "none", lambda t: t.amax((2, 3))])
def test_pooling_is_differentiable(pool: Any) -> None:
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda t: pool_rows(t, pool), x.requires_grad_())


def test_flatten_and_callables() -> None:
    x = torch.arange(48.0).view(2, 3, 4, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert pool_rows(x.to(memory_format=layout), "flatten").equal(torch.arange(48.0).view(2, 24))
    tokens = x.flatten(2)
    assert pool_rows(tokens, lambda t: t[:, 0]).equal(torch.stack([x[0, 0].flatten(), x[1, 0].flatten()]))


@pytest.mark.parametrize("pool", ["mean", "flatten", "none", lambda t: t])
def test_pooled_rows_are_no_view(pool: Any) -> None:
    x = torch.zeros(2, 3)
    rows = pool_rows(x, pool)
    x += 1
    assert not rows.any()


@pytest.mark.parametrize(
    ("shape", "pool", "came"),
    [
        ((4, 1), "mean", r"\[4, 1\] of features \[4, 1\]"),
        ((4, 1, 8, 8), "mean", r"\[4, 1\] of features \[4, 1, 8, 8\]"),
        ((4, 9, 1), "mean", r"\[4, 1\] of features \[4, 9, 1\]"),
        ((4,), "mean", r"\[4\] of features \[4\]"),
        ((), "mean", r"\[\] of features \[\]"),
        ((4, 1, 1), "flatten", r"\[4, 1\] of features \[4, 1, 1\]"),
        ((4, 9, 5), lambda t: t, r"\[4, 9, 5\] of features"),
        ((4, 9, 5), lambda t: t.mean((1, 2)), r"\[4\] of features"),
        ((4, 9, 5), lambda t: t[:, 0, :1], r"\[4, 1\] of features"),
    ],
)
def test_what_is_not_rows_of_features_is_refused(shape: tuple[int, ...], pool: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"made {came}.*a callable that returns"):
        pool_rows(torch.zeros(shape), pool)


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="'mean', 'flatten', 'none' or a callable"):
        pool_rows(torch.zeros(2, 3), "max")  # type: ignore[arg-type]
