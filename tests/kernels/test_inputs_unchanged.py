"""No operator writes to an input, whatever its layout and dtype, on no backend, neither forward nor backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import bird_kernels
from bird_kernels import RBF, CKALoss, HSICLoss, Statistics
from bird_kernels.call import across
from bird_kernels.matrix import hsic_matrix
from bird_kernels.types import Options
from tests.selection import short
from tests.untouched import untouched

COMPILED = pytest.mark.compiled
N, P, Q = 12, 5, 3

Call = Callable[..., Any]


def _parameter(x: Tensor) -> Tensor:
    return nn.Parameter(x)


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T.requires_grad_()


def _inside(x: Tensor) -> Tensor:
    """Every other row and column of a larger tensor."""
    larger = x.new_zeros(2 * len(x) + 1, 2 * x.shape[1] + 1)
    larger[1::2, 1::2] = x
    return larger[1::2, 1::2].requires_grad_()


def _equal_rows(x: Tensor) -> Tensor:
    return x[:1].expand_as(x).requires_grad_()


def _equal_columns(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x).requires_grad_()


def _frozen(x: Tensor) -> Tensor:
    return x


def _result(x: Tensor) -> Tensor:
    """Not a leaf: as a layer's output is."""
    return nn.Parameter(x.clone()) * 1.0


LAYOUTS = {
    "parameters": _parameter, "transposed": _transposed, "inside": _inside, "equal rows": _equal_rows,
    "equal columns": _equal_columns, "frozen": _frozen, "results": _result,
}  # fmt: skip
EMULATED = ("parameters", "transposed")  # on a CPU the kernels' tests are slow
KINDS = [
    *(pytest.param(name, torch.float32, marks=() if name in EMULATED else COMPILED) for name in LAYOUTS),
    *(
        pytest.param(name, dtype, marks=COMPILED)
        for name in ("parameters", "transposed")
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ),
]
kinds = pytest.mark.parametrize(("layout", "dtype"), KINDS)


def ordinary(layout: str, dtype: torch.dtype) -> bool:
    """What a training step has: of it every function is tested, of the rest one for every way in."""
    return layout in EMULATED and dtype == torch.float32


def features(layout: str, dtype: torch.dtype, device: torch.device, size: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, P], y [N, Q], mask [N] of the kind; not near 1, and with means, so that there is something to change."""
    generator = torch.Generator().manual_seed(0)
    x, y = (size * (1.0 + torch.randn(N, width, generator=generator)) for width in (P, Q))
    x, y = (LAYOUTS[layout](a.to(device=device, dtype=dtype)) for a in (x, y))
    return x, y, torch.arange(N, device=device) % 5 != 2


def check(call: Call, *given: Tensor) -> None:
    """``call()`` and the backward of its result leave all that was ``given`` as it was, the upstream gradient too."""
    with untouched(*given):
        value = call()
    if isinstance(value, Tensor) and value.requires_grad:
        upstream = torch.full_like(value, 3.0)
        wanted = [tensor for tensor in given if tensor.requires_grad]
        with untouched(*given, upstream):
            torch.autograd.grad(value, wanted, upstream, allow_unused=True)


# Computed by every backend: x, y and options.
COMMON: dict[str, Call] = {
    "cka_loss": bird_kernels.cka_loss,
    "cka": bird_kernels.cka,
    "hsic": bird_kernels.hsic,
    "lists": lambda x, y, **options: bird_kernels.cka_loss([x, y], [y, y], weights=[0.5, 2.0], **options),
    "lists of one": lambda x, y, **options: bird_kernels.cka_loss([x], [y], **options),
}


@short(
    "every layout of one function; the others have the same way in",
    lambda name, layout, dtype: name == "cka_loss" or ordinary(layout, dtype),
)
@kinds
@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("backend", ["library", "native", "triton", "reference"])
def test_of_any_backend(
    backend: str, name: str, layout: str, dtype: torch.dtype, estimator: str, device: torch.device
) -> None:
    available(backend)
    x, y, mask = features(layout, dtype, device)
    for rows in (None, mask):
        call = partial(COMMON[name], x, y, estimator=estimator, backend=backend, mask=rows)
        check(call, x, y, mask)


def available(backend: str) -> None:
    module = {"native": "bird_kernels._native", "triton": "triton"}.get(backend)
    if module:
        pytest.importorskip(module)


def by_features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """More rows than features: the cross route."""
    return x[:, :2], y[:, :1]


# The options that not every backend has.
SPECIAL: dict[str, Call] = {
    "uncentred": partial(bird_kernels.cka_loss, center=False),
    "uncentred cka": partial(bird_kernels.cka, center=False),
    "uncentred lists": lambda x, y, **o: bird_kernels.cka_loss([x, y], [y, y], center=False, weights=[0.5, 2.0], **o),
    "sqrt": partial(bird_kernels.cka_loss, sqrt=True),
    "gram_mse": bird_kernels.gram_mse,
    "uncentred gram_mse": partial(bird_kernels.gram_mse, center=False),
    "rbf": partial(bird_kernels.cka_loss, kernel="rbf"),
    "rbf, fixed": partial(bird_kernels.cka_loss, kernel=RBF(sigma=4.0)),
    "rbf, threshold": partial(bird_kernels.hsic, kernel=RBF(threshold=0.5)),
    "rbf, flow": partial(bird_kernels.cka, kernel=RBF(flow=True)),
    "rbf, uncentred": partial(bird_kernels.cka_loss, kernel="rbf", center=False),
    "rbf gram_mse": partial(bird_kernels.gram_mse, kernel="rbf"),
    "module": lambda x, y, mask, **o: CKALoss(center=False, **o)(x, y, mask),
    "module of hsic": lambda x, y, mask, **o: HSICLoss(estimator="unbiased", **o)(x, y, mask),
}


@short(
    "every layout where features are not centred and where distances are; the others have the same way in",
    lambda name, layout, dtype: name in ("uncentred", "rbf") or ordinary(layout, dtype),
)
@kinds
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_of_the_library(backend: str, name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    for size in (5.0, 1e-15):  # squares of squares of the small ones leave fp32's range, which takes another way
        x, y, mask = features(layout, dtype, device, size)
        for rows in (None, mask):
            check(lambda: SPECIAL[name](x, y, mask=rows, backend=backend), x, y, mask)  # noqa: B023 - called at once


@pytest.mark.parametrize("name", ["sqrt", "rbf", "rbf, fixed"])
def test_of_triton(name: str, device: torch.device) -> None:
    available("triton")
    x, y, mask = features("parameters", torch.float32, device)
    check(lambda: SPECIAL[name](x, y, mask=mask, backend="triton"), x, y, mask)


@short(
    "every layout of one pair and of lists; the others have the same way in",
    lambda name, layout, dtype: name in ("cka_loss", "lists") or ordinary(layout, dtype),
)
@kinds
@pytest.mark.parametrize("name", [*COMMON, *SPECIAL])
def test_by_products_of_features(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Lists have a pair of equal widths, which is half of one route and half of the other."""
    x, y = (side.detach() for side in by_features(*features(layout, dtype, device)[:2]))
    x.requires_grad_()
    check(lambda: (COMMON | SPECIAL)[name](x, y, mask=None, backend="library"), x, y)


def test_zeros_beside_features_that_are_not_centred() -> None:
    """The side that is left as it is was once divided by a power of two, where it lay."""
    x, y = torch.zeros(8, 4), torch.randn(8, 5, generator=torch.Generator().manual_seed(0)) * 3
    check(lambda: bird_kernels.cka_loss(x, y, center=False), x, y)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_sizes_that_need_care(size: float, estimator: str, device: torch.device) -> None:
    x, y, mask = features("parameters", torch.float32, device, size)
    for name in ("cka_loss", "cka", "hsic"):
        for rows in (None, mask):
            check(lambda: COMMON[name](x, y, estimator=estimator, mask=rows), x, y, mask)  # noqa: B023


# Not operators on two matrices.
OTHERS: dict[str, Call] = {
    "centered_gram": lambda x, y, mask: bird_kernels.centered_gram(x),
    "centered_gram, rbf": lambda x, y, mask: bird_kernels.centered_gram(x, kernel="rbf"),
    "explain": lambda x, y, mask: bird_kernels.explain(x, y, mask=mask),
    "cka_matrix": lambda x, y, mask: bird_kernels.cka_matrix([x, y], [y, x], mask=mask, estimator="unbiased"),
    "cka_matrix, itself": lambda x, y, mask: bird_kernels.cka_matrix([x, x, y]),
    "cka_matrix, one layer": lambda x, y, mask: bird_kernels.cka_matrix([x]),
    "hsic_matrix": lambda x, y, mask: hsic_matrix([x, y], mask=mask),
    "hsic_matrix, by features": lambda x, y, mask: hsic_matrix([x[:, :1]], [y[:, :1], y[:, 1:2]]),
}


@short(
    "every layout of the two that centre for themselves",
    lambda name, layout, dtype: name in ("centered_gram", "hsic_matrix") or ordinary(layout, dtype),
)
@kinds
@pytest.mark.parametrize("name", OTHERS)
def test_other_functions(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x, y, mask = features(layout, dtype, device)
    check(lambda: OTHERS[name](x, y, mask), x, y, mask)


@short(
    "every layout of all tokens; what is pooled is a copy",
    lambda tokens, layout, dtype: tokens == "all" or ordinary(layout, dtype),
)
@kinds
@pytest.mark.parametrize("tokens", ["all", "last", "mean", "sequence"])
def test_tokens(tokens: Any, layout: str, dtype: torch.dtype, estimator: str, device: torch.device) -> None:
    """Padded and packed, [2, 6, width] and [12, width]."""
    if tokens in ("last", "mean"):
        estimator = "biased"  # two sequences are two rows
    x, y, mask = features(layout, dtype, device)
    padded_x, padded_y, padded = (a.unflatten(0, (2, 6)) for a in (x, y, mask))
    starts = torch.tensor([0, 7, N], device=device)
    loss = partial(bird_kernels.token_cka_loss, tokens=tokens, estimator=estimator)
    given = x, y, mask, starts
    check(lambda: loss(padded_x, padded_y), *given)
    check(lambda: loss(padded_x, padded_y, mask=padded), *given)
    check(lambda: loss(x, y, cu_seqlens=starts, max_seqlen=7), *given)


@kinds
def test_pooled_tokens(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x, _, mask = features(layout, dtype, device)
    starts = torch.tensor([0, 7, N], device=device)
    for pool in (bird_kernels.last_token, bird_kernels.mean_tokens):
        check(lambda: pool(x.unflatten(0, (2, 6)), mask.view(2, 6)), x, mask)  # noqa: B023 - called at once
        check(lambda: pool(x, cu_seqlens=starts), x, starts)  # noqa: B023


@kinds
def test_statistics(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows, the other statistics that are merged, a state that is loaded, and a state that was given away."""
    x, y, mask = features(layout, dtype, device)
    total, other = Statistics(), Statistics()
    for statistics in (total, other, other):
        check(partial(statistics.update, x, y, mask), x, y, mask)
    theirs, given_away = [list(s.state_dict().values()) for s in (other, total)]
    state = other.state_dict()
    loaded = Statistics.from_state_dict(state)
    with untouched(*theirs, *given_away, *state.values(), *_held(other)):
        total.merge(other)
        Statistics().merge(other)
        loaded.update(x, y)
        for estimator in ("biased", "unbiased"):
            for statistics in (total, loaded):
                statistics.cka(estimator)
                statistics.hsic(estimator)
                check(partial(statistics.gradient, x, y, estimator), x, y)
        loaded.to(device)
        loaded.to("cpu")


def _held(statistics: Statistics) -> list[Tensor]:
    """The sums themselves, not the copies of `state_dict`."""
    held = statistics._sums
    assert held is not None
    assert held.norms is not None
    return [*held[:-1], *held.norms]


@pytest.fixture
def group() -> Iterator[Any]:
    """A group of one rank, in this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@short(
    "every layout with one estimator: it comes after what travels",
    lambda layout, estimator: estimator == "biased" or layout in EMULATED,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("widths", ["merged", "gathered"])
def test_a_group_of_ranks(
    widths: str, center: bool, layout: str, estimator: str, group: Any, device: torch.device
) -> None:
    """By the way of many ranks, of which there is one here: few features are merged, many rows gathered."""
    x, y, mask = features(layout, torch.float32, device)
    if widths == "merged":
        x, y = by_features(x, y)
    estimator = estimator if center else "biased"
    for rows in (None, mask):
        options = Options("cka_loss", estimator=estimator, group=group, center=center, backend="library")
        check(partial(across, x, y, rows, options), x, y, mask)
    statistics = Statistics()
    statistics.update(x, y)
    check(partial(statistics.all_reduce, group), x, y)
