"""What is the native part's own: its copy of the closed form, its limits, and the plan of its launches."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bird_kernels import backends, cka_loss
from bird_kernels.moments import MIN_ROWS, Coefficients, Moments, combine
from bird_kernels.plan import FEW_ROWS
from bird_kernels.types import Problem
from tests.accuracy import Result, evaluate, features, operator, truth

native = pytest.importorskip("bird_kernels._native", reason="the native part is not built")
N, P, Q = 9, 5, 7


def u_centred(k: Tensor, n: float) -> Tensor:
    """K [m, m] with diagonal 0, U-centred; its other entries have no zero row or column but those of ``m - n`` rows."""
    r, others, keep = k.sum(1), max(n, 4.0) - 2.0, 1.0 - torch.eye(len(k), dtype=k.dtype, device=k.device)
    return keep * (k - (r[:, None] + r) / others + r.sum() / (others * (others + 1.0)))


def by_hand(k: Tensor, l: Tensor, keep: Tensor, statistic: str, estimator: str) -> list[float]:
    """Value and coefficients from Gram matrices by `moments.combine`, on Python floats; ``keep`` bool [n]."""
    k, l, n, sums = k.double(), l.double(), float(keep.sum()), (0.0, 0.0)
    if estimator == "unbiased":  # what stands on the diagonals is the backward's
        k, l = k.clone().fill_diagonal_(0.0), l.clone().fill_diagonal_(0.0)
        sums = k.sum().item(), l.sum().item()
    products = tuple((a * b).sum().item() for a, b in ((k, l), (k, k), (l, l)))
    moments = products
    if estimator == "unbiased":
        k, l = (u_centred(a, n)[keep][:, keep] for a in (k, l))
        moments = tuple((a * b).sum().item() for a, b in ((k, l), (k, k), (l, l)))
    result = combine(Moments(*moments), n, statistic, estimator, torch.finfo(torch.float32).eps)
    return [
        result.value,
        result.d_kl,
        result.d_kk,
        result.d_ll,
        *products,
        *sums,
        1.0,
        1.0,
        max(n, MIN_ROWS[estimator]),
    ]


@pytest.mark.parametrize("statistic", ["cka_loss", "cka", "hsic"])
@pytest.mark.parametrize("kind", ["plain", "masked", "constant student", "constant teacher", "too few rows", "nan"])
def test_closed_form_is_python_s(kind: str, statistic: str, estimator: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    mask = None
    if kind == "masked":
        mask = torch.arange(N, device=device) % 3 != 1
    elif kind == "too few rows":
        mask = torch.arange(N, device=device) < MIN_ROWS[estimator] - 1
    elif kind == "nan":
        x[3, 1] = math.nan
    elif kind != "plain":
        (x if kind == "constant student" else y).fill_(3.7)
    number = ["cka_loss", "cka", "hsic"].index(statistic)
    values, coefficients, _, grams = native.forward([x, y], mask, number, estimator == "unbiased", True)
    k, l = grams[0]
    keep = torch.ones(N, dtype=torch.bool, device=device) if mask is None else mask
    expected = by_hand(k, l, keep, statistic, estimator)
    found = [values.item(), *coefficients[0].tolist()]
    names = ["value", *Coefficients._fields]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        # The value is rounded to fp32, and sums in another order differ in the last places of fp64.
        tolerance = 1e-7 if name == "value" else 1e-13
        same = math.isnan(ours) and math.isnan(theirs)
        assert same or ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), name


emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation")


@emulated
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(N, P, Q), (70, 40, 500)], ids=str)
def test_launches(shape: tuple[int, int, int], masked: bool, estimator: str) -> None:
    """Two forward, unbiased three, and one backward whatever sides it is of; none if none wants a gradient."""
    forward = 3 if estimator == "unbiased" else 2
    x, y = features(*shape)
    mask = torch.arange(len(x)) % 3 != 1 if masked else None
    for sides in ("x", "y", "xy", ""):
        leaves = [t.clone().requires_grad_(name in sides) for name, t in (("x", x), ("y", y))]
        before = native.emulated_launches()
        value = cka_loss(*leaves, mask=mask, estimator=estimator, backend="native")
        assert native.emulated_launches() - before == forward
        if sides:
            value.backward()
            assert native.emulated_launches() - before == forward + 1


@emulated
def test_launches_of_many_pairs(estimator: str) -> None:
    """As many as of one; each pair comes out as by itself but for rounding, since its columns are split otherwise."""
    pairs = [features(N, p, q, seed=p) for p, q in ((P, Q), (40, 9), (1, 70), (33, 2)) * 8]
    leaves = [x.clone().requires_grad_() for x, _ in pairs]
    before = native.emulated_launches()
    value = cka_loss(leaves, [y for _, y in pairs], estimator=estimator, backend="native")
    found = torch.autograd.grad(value, leaves)
    assert native.emulated_launches() - before == (4 if estimator == "unbiased" else 3)
    alone = [evaluate(operator("gram", "native", estimator), x, y, "x") for x, y in pairs]
    torch.testing.assert_close(value, torch.stack([one.value for one in alone]).sum(), rtol=1e-6, atol=1e-6)
    for gradient, one in zip(found, alone, strict=True):
        torch.testing.assert_close(gradient, one.dx, rtol=0, atol=1e-6 * one.dx.abs().max().item())


def test_more_pairs_are_refused_not_computed(device: torch.device) -> None:
    x = torch.zeros(4, 2, device=device)
    with pytest.raises(ValueError, match="at most 32 pairs, got 33"):
        native.forward([x] * 66, None, 0, False, True)


@pytest.mark.parametrize(
    ("n", "widths", "grid"),
    [
        (128, [512], (16, 8, 1)),  # 128 blocks, for 132 multiprocessors
        (128, [512, 300], (16, 8, 2)),
        (17, [33], (2, 2, 1)),
        (512, [512], (8, 32, 1)),  # two chunks each: 512 blocks would form M twice as often
        (128, [25_088], (33, 8, 1)),
        (128, [512, 512, 1280, 64], (14, 8, 4)),  # 74 chunks of 8 tiles for 264 places: three each, of at most 40
    ],
)
def test_blocks_of_the_backward(n: int, widths: list[int], grid: tuple[int, int, int]) -> None:
    """(Chunks of 32 features, tiles of 16 rows, sides), two blocks on each of an H100's 132 multiprocessors."""
    assert native.backward_grid(n, widths, 132) == grid


@emulated
def test_threads_do_not_share(estimator: str) -> None:
    """Forwards in one thread while another runs backwards: to the bit what they give one after the other."""
    pairs = [features(N + i, P, Q, seed=i) for i in range(12)]
    function = operator("gram", "native", estimator)
    alone = [evaluate(function, *pair) for pair in pairs]

    def forwards() -> list[tuple[Tensor, Tensor, Tensor]]:
        leaves = [[t.clone().requires_grad_() for t in pair] for pair in pairs]
        return [(function(x, y), x, y) for x, y in leaves]

    graphs = forwards()
    with ThreadPoolExecutor(2) as threads:
        again = threads.submit(forwards)
        gradients = threads.submit(lambda: [torch.autograd.grad(value, (x, y)) for value, x, y in graphs])
        values, found = [value.detach() for value, _, _ in again.result()], gradients.result()
    for value, (dx, dy), expected in zip(values, found, alone, strict=True):
        torch.testing.assert_close(Result(value, dx, dy), expected, rtol=0, atol=0)


@pytest.mark.compiled
@pytest.mark.parametrize("n", [FEW_ROWS - 1, FEW_ROWS])
def test_the_most_rows(n: int, device: torch.device) -> None:
    x, y = features(n, 70, 9, device=device)
    found, true = evaluate(operator("gram", "native"), x, y), truth(x, y)
    torch.testing.assert_close(found.dx.double(), true.dx, rtol=0, atol=1e-5 * true.dx.abs().max().item())


def test_more_rows_are_refused_not_computed(device: torch.device) -> None:
    """By the operator too, which nothing checks before."""
    x = torch.zeros(FEW_ROWS + 1, 2, device=device)
    problem = Problem(FEW_ROWS + 1, 2, 2, torch.float32, device)
    with pytest.raises(ValueError, match="at most 512 rows, got 513"):
        backends.module_of("native").forward(x, x, None, problem, "gram")


def test_other_dtypes_are_refused(device: torch.device) -> None:
    x = torch.zeros(8, 2, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="no kernels for Double"):
        native.forward([x, x], None, 0, False, True)


def test_graph_outlives_its_inputs(device: torch.device) -> None:
    """The extension keeps what its backward reads, and lets go of it afterwards."""
    x, y = features(N, P, Q, device=device)
    leaf = x.clone().requires_grad_()
    value = operator("gram", "native")(leaf * 1.0, y.clone())
    junk = [torch.full_like(t, math.nan) for t in (x, y) for _ in range(4)]
    value.backward()
    torch.testing.assert_close(leaf.grad, evaluate(operator("gram", "native"), x, y, "x").dx, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    assert len(junk) == 8
