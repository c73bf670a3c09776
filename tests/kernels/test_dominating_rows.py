"""The unbiased estimator where a few rows are far larger than all others, as a sequence's first token often is.

HSIC_1 leaves out the diagonals of the Gram matrices. A row of size M puts M^4 there and about M^2 elsewhere, so that
whoever computes with the diagonal and subtracts it loses the rest; and whoever centres by the mean spreads M over all
rows. Bars: 1e-5 of the value; 1e-4 of the gradient in norm (fp32), plus the rounding of its two terms where these
cancel (several dominating rows are alike in x and y: CKA is near 1 and both terms are larger than their difference).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bird_kernels import Statistics, cka_matrix, plan, token_cka_loss
from bird_kernels.backends import dominating
from bird_kernels.backends.dominating import bulk_mean, largest, noise, squared_norms
from bird_kernels.matrix import hsic_matrix
from tests.accuracy import evaluate, operator, truth
from tests.selection import short

COMPILED = pytest.mark.compiled
SIZES = [10.0, 1e2, 1e3, 3e3, 1e4, 3e4]
COUNTS = [1, 3, 5]  # dominating rows
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VALUE = {torch.float64: 1e-7, torch.float32: 1e-5}  # the reference has 1e-8 of a row of 3e4 among 8
GRADIENT = {torch.float64: 1e-7, torch.float32: 1e-4}
COPIES = 16.0  # roundings of a gradient's terms; an fp32 Gram matrix by hand had up to 5 on this grid


class Case(NamedTuple):
    """Features x [n, p] and y [n, q], CKA, its gradient of x, and the norm of that gradient's two terms; fp64."""

    x: Tensor
    y: Tensor
    value: float
    dx: Tensor
    terms: float


@lru_cache(maxsize=80)
def case(n: int, count: int, size: float, dtype: torch.dtype = torch.float32, where: str = "both") -> Case:
    """Standard normal rows that share their geometry, ``count`` of them ``size`` large in two features of ``where``."""
    wide = n <= 64
    p, q = (40, 30) if wide else (24, 16)
    generator = torch.Generator().manual_seed(n + count)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    y = torch.randn(n, q, generator=generator, dtype=torch.float64)
    y += x[:, :q]
    rows = torch.arange(count) * (n // count)
    sizes = size * (1.0 + 0.1 * torch.arange(count, dtype=torch.float64))[:, None]
    if where != "y":
        x[rows, :2] = sizes
    if where != "x":
        y[rows if where != "apart" else rows + 1, :2] = sizes
    x, y = x.to(dtype), y.to(dtype)
    true = truth(x, y, "unbiased", "cka", sides="x")
    assert true.dx is not None
    return Case(x, y, true.value.item(), true.dx, _terms(x.double(), y.double()))


def _terms(x: Tensor, y: Tensor) -> float:
    """|2 L X| / sqrt(<K,K> <L,L>), with both Gram matrices hollow and doubly centred."""
    k, l = (_hollow(a - a.median(0).values) for a in (x, y))
    return (2.0 * (l @ (x - x.median(0).values)).norm() / (k.norm() * l.norm())).item()


def _hollow(x: Tensor) -> Tensor:
    n, k = len(x), (x @ x.T).fill_diagonal_(0.0)
    r = k.sum(0) / (n - 2)
    return (k - r[:, None] - r + r.sum() / (n - 1)).fill_diagonal_(0.0)


def bar(dtype: torch.dtype) -> float:
    """Of a value: halves are rounded before, and their products may be taken in halves."""
    return VALUE.get(dtype, torch.finfo(dtype).eps / 32)


def assert_right(found: float, true: float, dtype: torch.dtype = torch.float32) -> None:
    assert abs(found - true) <= bar(dtype), f"{found} is {found - true:.2g} off {true}"


def assert_gradient(found: Tensor, true: Case, sign: float = 1.0, share: float = 1.0) -> None:
    """``found`` is ``sign * share`` times the gradient of CKA."""
    dtype = found.dtype
    error = (found.double() * (sign / share) - true.dx).norm().item()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    relative = GRADIENT.get(dtype, 2.0 * torch.finfo(dtype).eps)
    allowed = relative * true.dx.norm().item() + COPIES * eps * true.terms
    assert error <= allowed, f"gradient: error {error / true.dx.norm():.2g} of its norm, allowed {allowed:.2g}"


def loss_scale(true: Case) -> float:
    """A power of two that brings the gradient near 1: fp16 has nothing below 6e-8."""
    return 2.0 ** -torch.frexp(true.dx.abs().amax()).exponent.item()


def check(true: Case, route: str, backend: str = "library") -> None:
    upstream = loss_scale(true)
    function = operator(route, backend, "unbiased", "cka")
    found = evaluate(function, true.x, true.y, "x", upstream)
    assert_right(found.value.item(), true.value, true.x.dtype)
    assert found.dx is not None
    assert_gradient(found.dx, true, share=upstream)


def by_statistics(cases: list[Case], parts: bool = False) -> None:
    for true in cases:
        statistics, rows = Statistics(), len(true.x) // 2 - 1 if parts else len(true.x)
        for x, y in zip(true.x.split(rows), true.y.split(rows), strict=True):
            statistics.update(x, y)
        assert_right(statistics.cka("unbiased").item(), true.value)
        assert_gradient(statistics.gradient(true.x, true.y, "unbiased"), true, sign=-1.0)


def by_matrix(cases: list[Case]) -> None:
    """One layer for each case. Of 8 and 64 rows by Gram matrices, of more by products of features."""
    xs, ys = [true.x for true in cases], [true.y for true in cases]
    hsics = hsic_matrix(xs, ys, estimator="unbiased")
    both = hsics.xy / (hsics.xx[:, None].sqrt() * hsics.yy[None, :].sqrt())
    for found in (cka_matrix(xs, ys, estimator="unbiased"), both):
        for value, true in zip(found.diagonal().tolist(), cases, strict=True):
            assert_right(value, true.value)
    itself = cka_matrix(xs, estimator="unbiased")
    for value in itself.diagonal().tolist():
        assert_right(value, 1.0)
    assert_right(itself[0, 2].item(), truth(xs[0], xs[2], "unbiased", "cka", sides="").value.item())


def by_sequences(cases: list[Case], route: str) -> None:
    """One sequence for each case."""
    x, y = torch.stack([true.x for true in cases]).requires_grad_(), torch.stack([true.y for true in cases])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "choose_route", lambda *sizes: route)
        value = token_cka_loss(x, y, tokens="sequence", estimator="unbiased")
        (dx,) = torch.autograd.grad(value, x)
    assert_right(value.item(), 1.0 - sum(true.value for true in cases) / len(cases))
    for own, true in zip(dx, cases, strict=True):
        assert_gradient(own, true, sign=-1.0, share=1.0 / len(cases))


CALLS: dict[str, Callable[[list[Case]], object]] = {
    "gram": lambda cases: [check(true, "gram") for true in cases],
    "cross": lambda cases: [check(true, "cross") for true in cases],
    "statistics": by_statistics,
    "statistics of parts": partial(by_statistics, parts=True),
    "matrix": by_matrix,
    "sequences, gram": partial(by_sequences, route="gram"),
    "sequences, cross": partial(by_sequences, route="cross"),
}


@pytest.mark.parametrize("n", [8, 64, 600, 1000])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("call", CALLS)
def test_value_and_gradient(call: str, count: int, n: int) -> None:
    CALLS[call]([case(n, count, size) for size in SIZES])


@short(
    "both sizes in fp32, the larger in the other dtypes",
    lambda dtype, size: dtype == torch.float32 or size == 3e4,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["both", "x", "y", "apart"])
@pytest.mark.parametrize("size", [1e2, 3e4])
def test_dtypes_and_sides(size: float, where: str, dtype: torch.dtype, route: str) -> None:
    """Rows that dominate in one side only, and others in x than in y: unrelated, CKA is near 0."""
    for count in COUNTS:
        check(case(64, count, size, dtype, where), route)


@pytest.mark.parametrize("size", [1e2, 3e3, 3e4])
@pytest.mark.parametrize("backend", ["triton", "native"])
def test_small_kernels(backend: str, size: float) -> None:
    pytest.importorskip({"triton": "triton", "native": "bird_kernels._native"}[backend])
    for count in (1, 3):
        check(case(8, count, size), "gram", backend)


@short(
    "kernels group rows as the library does: a period below the number of groups, one without a factor of it, and it",
    lambda backend, stride: backend == "library" or stride in (2, 5, 8),
)
@pytest.mark.parametrize("stride", range(2, 13))
@pytest.mark.parametrize("backend", ["library", "triton", "native"])
def test_masks_with_a_period(backend: str, stride: int) -> None:
    """The location is a median over groups of rows: no period of the mask puts all that count into one group."""
    pytest.importorskip({"library": "torch", "triton": "triton", "native": "bird_kernels._native"}[backend])
    true = case(16, 1, 3e4)
    mask = torch.arange(16 * stride) % stride == stride - 1
    x, y = (torch.full((len(mask), a.shape[1]), torch.nan) for a in (true.x, true.y))
    x[mask], y[mask] = true.x, true.y
    for route in ("gram", "cross") if backend == "library" else ("gram",):
        found = evaluate(operator(route, backend, "unbiased", "cka", mask=mask), x, y, "x")
        assert_right(found.value.item(), true.value)
        assert found.dx is not None
        assert_gradient(found.dx[mask], true)
        assert found.dx[~mask].eq(0).all()


@pytest.mark.parametrize("stride", range(2, 13))
@pytest.mark.parametrize(("shape", "masks"), [((), ()), ((3,), (3,)), ((3,), ())], ids=["one", "several", "one mask"])
def test_the_location_is_amid_the_rows_that_count(shape: tuple[int, ...], masks: tuple[int, ...], stride: int) -> None:
    """Of 16 rows that count, one at 3e4: within their spread of the mean of the other 15."""
    x = torch.randn(*shape, 16 * stride, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(stride))
    keep = (torch.arange(16 * stride) % stride == 0).expand(*masks, -1)
    x[..., 0, :] = 3e4
    wanted = x[..., stride::stride, :].mean(-2, keepdim=True)
    found = dominating.location(torch.where(keep[..., None], x, torch.nan), keep)
    assert (found - wanted).abs().max() < 2.0


# ---------------------------------------------------------------------------------------------- as reported


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_tokens(dtype: torch.dtype) -> None:
    """8 x 128 x 576, spread 0.3, the first token of each sequence at 2,500: the loss was 1."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(8, 128, 576, generator=generator)
    y = x + 0.3 * torch.randn(8, 128, 576, generator=generator)
    x[:, 0, 0] = y[:, 0, 0] = 2500.0
    x, y = x.to(dtype).requires_grad_(), y.to(dtype)
    each = [truth(a, b, "unbiased", sides="x") for a, b in zip(x.detach(), y, strict=True)]
    value = token_cka_loss(x, y, tokens="sequence", estimator="unbiased")
    (dx,) = torch.autograd.grad(value, x)
    assert_right(value.item(), sum(true.value.item() for true in each) / 8, dtype)
    wanted = torch.stack([true.dx for true in each]) / 8
    assert (dx.double() - wanted).norm() < max(1e-4, torch.finfo(dtype).eps) * wanted.norm()


# ---------------------------------------------------------------------------------------------- in different features


@lru_cache(maxsize=1)
def orthogonal(n: int, p: int, q: int, count: int, size: float) -> Case:
    """``count`` of n normal rows are ``size`` large, each in a feature of its own: between them <K, K> has size^2."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator) for width in (p, q))
    y[:, : min(p, q)] += x[:, : min(p, q)]
    rows, features = torch.arange(count) * (n // count), torch.arange(count)
    x[rows, features % p] = y[rows, features % q] = size
    true = truth(x, y, "unbiased", "cka", sides="x")
    assert true.dx is not None
    return Case(x, y, true.value.item(), true.dx, 0.0)


ORTHOGONAL = [  # n, p, q, rows, their size
    *((64, 576, 576, count, 1e6) for count in (2, 4, 8, 16)),
    (64, 576, 576, 16, 1e4),
    (64, 576, 576, 2, 1e7),
    (12, 64, 40, 2, 3e5),
    *((200, 40, 24, 12, size) for size in (3e3, 3e4)),
    *((300, 40, 40, 16, size) for size in (1e4, 1e6)),
    *((2048, 96, 96, 16, size) for size in (3e3, 3e4, 1e6)),
]


@pytest.mark.parametrize("sizes", ORTHOGONAL, ids=str)
def test_rows_in_features_of_their_own(
    sizes: tuple[int, int, int, int, float], route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two such rows the products are far smaller than the product of their norms; there are up to a quarter."""
    true = orthogonal(*sizes)
    check(true, route)
    assert_right(cka_matrix([true.x], [true.y], estimator="unbiased").item(), true.value)
    monkeypatch.setattr(plan, "choose_route", lambda *sizes: route)
    x = true.x[None].clone().requires_grad_()
    loss = token_cka_loss(x, true.y[None], tokens="sequence", estimator="unbiased")
    assert_right(1.0 - loss.item(), true.value)
    assert_gradient(torch.autograd.grad(loss, x)[0][0], true, sign=-1.0)
    statistics = Statistics()
    statistics.update(true.x, true.y)
    size = sizes[-1]  # merged sums hold its fourth power, and are fp64
    assert abs(statistics.cka("unbiased").item() - true.value) <= 1e-5 * max(1.0, size / 1e6) ** 2
    if size <= 3e4:
        assert_gradient(statistics.gradient(true.x, true.y, "unbiased"), true, sign=-1.0)


def test_the_bound_of_rounding() -> None:
    """It is above what rounding does, below what there is, and no smaller where fewer rows are looked at one by one."""
    for sizes in ORTHOGONAL:
        z = (true := orthogonal(*sizes)).x - bulk_mean(true.x, None)
        exact, norms = z.double() @ z.double().T, squared_norms(z)
        gram = (z @ z.T).double()
        off, kk = (_hollow_norm(a) for a in (gram - exact, exact))
        every, few = (noise((z,), norms[None], rows, 2.0**-23).item() for rows in (None, largest(norms)))
        assert off <= every <= 1.001 * few
        assert few < 1e-2 * kk


def _hollow_norm(gram: Tensor) -> float:
    return gram.clone().fill_diagonal_(0.0).square().sum().item()


# ---------------------------------------------------------------------------------------------- really collapsed


@pytest.mark.parametrize("size", [0.0, 10.0, 3e4])
@pytest.mark.parametrize("level", [0.0, 0.1, 1000.3])
@pytest.mark.parametrize("n", [8, 64, 601])
def test_a_side_that_is_collapsed(n: int, level: float, size: float, route: str) -> None:
    """All rows equal but for one: between any two rows of the others nothing differs, and HSIC_1 is zero."""
    true = case(n, 1, 10.0) if n < 600 else case(600, 1, 10.0)
    x, y = torch.full_like(true.x, level), true.y
    x[3, :2] += size
    for both in ((x, y), (y, x)):
        found = evaluate(operator(route, "library", "unbiased", "cka_loss"), *both)
        assert found.value.item() == 1.0
        assert found.dx.eq(0).all()
        assert found.dy.eq(0).all()
        statistics = Statistics()
        statistics.update(*both)
        assert statistics.cka("unbiased").item() == 0.0
        assert statistics.gradient(*both, "unbiased").eq(0).all()
        assert cka_matrix(both[:1], both[1:], estimator="unbiased").item() == 0.0
        tokens = both[0][None].clone().requires_grad_()
        loss = token_cka_loss(tokens, both[1][None], tokens="sequence", estimator="unbiased")
        assert loss.item() == 1.0
        assert torch.autograd.grad(loss, tokens)[0].eq(0).all()
