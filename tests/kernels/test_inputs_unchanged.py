"""No call writes to an input, whatever its layout and dtype, on no backend, neither forward nor backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import bird_kernels
from bird_kernels import Statistics, cka_loss
from bird_kernels.call import across
from bird_kernels.types import Options
from tests.kernels.surface import CALLS, COMMON
from tests.selection import short
from tests.untouched import untouched

N, P, Q = 12, 5, 3


def _inside(x: Tensor) -> Tensor:
    """Every other row and column of a larger tensor."""
    larger = x.new_zeros(2 * len(x) + 1, 2 * x.shape[1] + 1)
    larger[1::2, 1::2] = x
    return larger[1::2, 1::2].requires_grad_()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameters": nn.Parameter,
    "transposed": lambda x: x.T.contiguous().T.requires_grad_(),
    "inside": _inside,
    "equal rows": lambda x: x[:1].expand_as(x).requires_grad_(),
    "equal columns": lambda x: x[:, :1].expand_as(x).requires_grad_(),
    "frozen": lambda x: x,
    "results": lambda x: nn.Parameter(x.clone()) * 1.0,  # not a leaf: as a layer's output is
}
KINDS = [(name, torch.float32) for name in LAYOUTS] + [
    (name, dtype) for name in ("parameters", "transposed") for dtype in (torch.float64, torch.bfloat16, torch.float16)
]
kinds = pytest.mark.parametrize(("layout", "dtype"), KINDS)
# Of which every kind is in the short set: each has its own way in, which the others share.
OWN_WAY = ("cka_loss", "uncentred", "rbf", "centered_gram", "hsic_matrix", "tokens", "packed tokens", "statistics")


def features(layout: str, dtype: torch.dtype, device: torch.device, size: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, P], y [N, Q], mask [N] of the kind; not near 1, and with means, so that there is something to change."""
    generator = torch.Generator().manual_seed(0)
    x, y = (size * (1.0 + torch.randn(N, width, generator=generator)) for width in (P, Q))
    x, y = (LAYOUTS[layout](a.to(device=device, dtype=dtype)) for a in (x, y))
    return x, y, torch.arange(N, device=device) % 5 != 2


def check(call: Callable[[], Any], *given: Tensor) -> None:
    """``call()`` and the backward of its result leave all that was ``given`` as it was, the upstream gradient too."""
    with untouched(*given):
        value = call()
    if isinstance(value, Tensor) and value.requires_grad:
        upstream = torch.full_like(value, 3.0)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        with untouched(*given, upstream):
            torch.autograd.grad(value, wanted, upstream, allow_unused=True)


@short(
    "every layout of the calls with a way in of their own; parameters of the others",
    lambda name, layout, dtype: (
        (name in OWN_WAY and (dtype == torch.float32 or layout == "transposed")) or (layout, dtype) == KINDS[0]
    ),
)
@kinds
@pytest.mark.parametrize("name", CALLS)
def test_every_call(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """On both routes, and of sizes whose squares of squares leave fp32's range, which takes another way."""
    for size in (5.0, 1e-15):
        x, y, mask = features(layout, dtype, device, size)
        for rows in (None, mask):
            check(partial(CALLS[name], x, y, rows), x, y, mask)
    if name in ("cka_loss", "unbiased", "lists", "uncentred", "gram_mse"):  # more rows than features
        x = x.detach()[:, :2].requires_grad_()
        check(partial(CALLS[name], x, y[:, :1], mask), x, y, mask)


BACKENDS = [(backend, name) for backend in ("native", "triton", "reference") for name in COMMON]
BACKENDS += [("triton", name) for name in ("sqrt", "rbf", "rbf, fixed")]
BACKENDS += [("reference", name) for name in ("uncentred", "sqrt", "gram_mse", "rbf", "rbf, flow")]


@pytest.mark.parametrize(("backend", "name"), BACKENDS)
def test_of_other_backends(backend: str, name: str, device: torch.device) -> None:
    module = {"native": "bird_kernels._native", "triton": "triton"}.get(backend, "torch")
    pytest.importorskip(module, reason="not built, or not of this system")
    layout = "transposed" if name in ("cka", "hsic, unbiased") else "parameters"
    x, y, mask = features(layout, torch.float32, device)
    for rows in (None, mask):
        check(partial(CALLS[name], x, y, rows, backend=backend), x, y, mask)


def test_zeros_beside_features_that_are_not_centred() -> None:
    """The side that is left as it is was once divided by a power of two, where it lay."""
    x, y = torch.zeros(8, 4), torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 3
    check(lambda: cka_loss(x, y, center=False), x, y)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_sizes_that_need_care(size: float, device: torch.device) -> None:
    x, y, mask = features("parameters", torch.float32, device, size)
    for name in ("cka_loss", "unbiased", "hsic"):
        for rows in (None, mask):
            check(partial(CALLS[name], x, y, rows), x, y, mask)


@pytest.mark.parametrize(("layout", "dtype"), KINDS[:3])
def test_pooled_tokens(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x, _, mask = features(layout, dtype, device)
    starts = torch.tensor([0, 7, N], device=device)
    for pool in (bird_kernels.last_token, bird_kernels.mean_tokens):
        check(partial(pool, x.unflatten(0, (2, 6)), mask.view(2, 6)), x, mask)
        check(partial(pool, x, cu_seqlens=starts), x, starts)


def test_statistics(device: torch.device) -> None:
    """The other statistics that are merged, a state that is loaded, and a state that was given away."""
    x, y, mask = features("parameters", torch.float32, device)
    total, other = Statistics(), Statistics()
    for statistics in (total, other, other):
        statistics.update(x, y, mask)
    theirs, given_away = [list(s.state_dict().values()) for s in (other, total)]
    state, held = other.state_dict(), other._sums
    assert held is not None
    assert held.norms is not None
    loaded = Statistics.from_state_dict(state)
    with untouched(*theirs, *given_away, *state.values(), *held[:-1], *held.norms):
        total.merge(other)
        Statistics().merge(other)
        loaded.update(x, y)
        for estimator in ("biased", "unbiased"):
            for statistics in (total, loaded):
                statistics.cka(estimator)
                check(partial(statistics.gradient, x, y, estimator), x, y)
        loaded.to(device)
        loaded.to("cpu")


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of one rank, in this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def _of_one_pair(x: Tensor, y: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    return across([(x, y)], mask, options)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("center", "estimator"), [(True, "biased"), (True, "unbiased"), (False, "biased")])
@pytest.mark.parametrize("widths", ["merged", "gathered"])
def test_a_group_of_ranks(
    widths: str, center: bool, estimator: str, layout: str, group: Any, device: torch.device
) -> None:
    """By the way of many ranks, of which there is one here: few features are merged, many rows gathered."""
    x, y, mask = features(layout, torch.float32, device)
    if widths == "merged":
        x, y = x[:, :2], y[:, :1]
    for rows in (None, mask):
        options = Options("cka_loss", estimator=estimator, group=group, center=center, backend="library")
        check(partial(_of_one_pair, x, y, rows, options), x, y, mask)
    statistics = Statistics()
    statistics.update(x, y)
    check(partial(statistics.all_reduce, group), x, y)
