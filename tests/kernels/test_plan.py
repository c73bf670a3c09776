"""Planning, by tables: routes against brute force, work and memory against what the library backend really does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bird_kernels import backends, cost, plan
from bird_kernels.backends import library, linalg
from bird_kernels.types import Choice, Cost, Problem
from tests.accuracy import features

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SIZES = [1, 2, 3, 5, 13, 34, 64, 100, 128, 200, 333, 512, 700, 2048, 30_000]
SIDES = [(True, False), (False, True), (True, True), (False, False)]


def chosen(backend: str) -> Choice:
    return Choice(backend, "asked for")


def shapes() -> Iterator[tuple[int, int, int, bool, bool]]:
    for n, p, q in itertools.product(SIZES[1:], SIZES, SIZES):
        for sides in SIDES:
            yield n, p, q, *sides


def mixed_forms(n: int, p: int, q: int, x_grad: bool, y_grad: bool) -> Iterator[int]:
    """Operations of every way to combine K = XX', L = YY', A = X'X, B = Y'Y and C = Y'X into value and gradients."""
    forward = {"K": n * n * p, "L": n * n * q, "A": n * p * p, "B": n * q * q, "C": 2 * n * p * q}
    for made in itertools.chain.from_iterable(itertools.combinations("KLABC", r) for r in range(2, 6)):
        has = set(made)
        if not (has & {"K", "A"} and has & {"L", "B"} and ({"K", "L"} <= has or "C" in has)):
            continue
        total = sum(forward[product] for product in made)
        for wanted, own, other, own_gram, other_gram, own_square in (
            (x_grad, p, q, "K", "L", "A"),
            (y_grad, q, p, "L", "K", "B"),
        ):
            if not wanted:
                continue
            across = [2 * n * n * own] * (other_gram in has) + [2 * n * own * other] * ("C" in has)
            within = [2 * n * n * own] * (own_gram in has) + [2 * n * own * own] * (own_square in has)
            both_in_one = [2 * n * n * own] * ({own_gram, other_gram} <= has)
            total += min([min(across) + min(within), *both_in_one])
        yield total


def test_the_chosen_route_is_the_cheapest_form() -> None:
    """Of both routes and of all mixtures of them, whoever needs a gradient."""
    for shape in shapes():
        chosen = plan.route_flops(plan.choose_route(*shape[:3]), *shape)
        assert chosen <= min(mixed_forms(*shape)), shape


def test_the_routes_are_among_the_forms() -> None:
    """So that the brute force counts as the plan does: these are {K, L} and {A, B, C}."""
    for shape in itertools.islice(shapes(), 0, None, 7):
        forms = set(mixed_forms(*shape))
        assert {plan.route_flops("gram", *shape), plan.route_flops("cross", *shape)} <= forms


def test_products_never_exceed_the_features() -> None:
    """Nothing n x n where n >> d, nothing d x d where d >> n: at most 2 n min(n, p + q) numbers."""
    for n, p, q, x_grad, y_grad in shapes():
        problem = Problem(n, p, q, torch.float32, CPU, x_grad=x_grad, y_grad=y_grad)
        route = plan.choose_route(n, p, q)
        centred = 4 * n * (p + q)
        assert plan.workspace(problem, route, "library") <= 4 * 2 * n * min(n, p + q) + centred, problem


@pytest.mark.parametrize("sides", SIDES[:3])
def test_work_is_what_is_done(sides: tuple[bool, bool], route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations counted on the library products, with blocks so small that symmetric ones cost half."""
    n, p, q = 96, 80, 64
    for limits in (linalg.SMALLEST_BLOCK, linalg.LARGEST_BLOCK):
        monkeypatch.setitem(limits, "cpu", 1)
    problem = Problem(n, p, q, torch.float32, CPU, x_grad=sides[0], y_grad=sides[1])
    x, y = features(n, p, q)
    with FlopCounterMode(display=False) as counter:
        value, stash = library.forward(x, y, None, problem, route)
        library.backward(torch.ones_like(value), x, y, None, stash, problem, route=route)
    counted = counter.get_total_flops()
    assert counted == pytest.approx(plan.route_flops(route, n, p, q, *sides), rel=0.02)


def test_workspace_is_what_is_kept(estimator: str, route: str, backend: str) -> None:
    """The library's on a GPU is that of shifted operands."""
    dtypes = [torch.float32, torch.bfloat16] + [torch.float64] * (backend == "library")
    shifted = pytest.importorskip("bird_kernels.backends.shifted", reason="Triton does not exist for this system")
    for device, dtype, sides in itertools.product((CPU, GPU), dtypes, SIDES[:3]):
        problem = Problem(512, 300, 200, dtype, device, "cka_loss", estimator, None, False, *sides)
        shifts = backend == "library" and device == GPU and dtype != torch.float64
        stash = (shifted if shifts else backends.module_of(backend)).stash_shapes(problem, route)
        kept = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stash.values())
        assert plan.workspace(problem, route, backend) == pytest.approx(kept, rel=0.03), problem


def test_least_traffic() -> None:
    """By hand, n = 10, p = 3, q = 4: inputs of 70 numbers; read again for gradients, which are written."""
    cross, gram = (70 * 2 + 30, 70 * 2 + 40, 70 * 2 + 70, 70), (70 + 30 * 2, 70 + 40 * 2, 70 + 70 * 2, 70)
    for sides, by_features, by_rows in zip(SIDES, cross, gram, strict=True):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            problem = Problem(10, 3, 4, dtype, CPU, x_grad=sides[0], y_grad=sides[1])
            assert plan.minimum_bytes(problem, "cross") == by_features * size
            assert plan.minimum_bytes(problem, "gram") == by_rows * size


@pytest.mark.parametrize(
    ("n", "d", "dtype", "splits"),
    [
        (128, 512, torch.float32, (16, 16)),  # a program for every step of both sides
        (128, 512, torch.bfloat16, (8, 8)),
        (16, 64, torch.float32, (2, 2)),
        (256, 2048, torch.float32, (22, 22)),  # 52 programs for a tile's 128 steps: 3 each
        (512, 512, torch.float32, (6, 6)),  # 14 for 32: 3 each
        (128, 25_088, torch.float32, (88, 88)),  # 176 programs for 1568 steps: 9 each
        (128, 802_816, torch.bfloat16, (66, 66)),  # read once: a program for each multiprocessor
        (128, 16_384, torch.bfloat16, (86, 86)),  # not wide enough for that
        (1, 1, torch.float32, (1, 1)),
    ],
)
def test_columns_are_split_until_the_gpu_is_full(n: int, d: int, dtype: torch.dtype, splits: tuple[int, ...]) -> None:
    t = plan.small_tiling([Problem(n, d, d, dtype, GPU)])
    assert t.splits == splits
    assert t.chunk % t.step == 0
    assert t.splits == (math.ceil(d / t.chunk),) * 2


@pytest.mark.parametrize(
    ("n", "d", "dtype", "precision", "tiling", "programs"),
    [
        (128, 512, torch.float32, "ieee", (16, 32, 32, 0), 128),
        (128, 512, torch.float32, "tf32", (16, 32, 128, 1), 128),
        (128, 512, torch.bfloat16, None, (16, 32, 128, 1), 128),
        (48, 4096, torch.bfloat16, None, (16, 64, 64, 1), 192),
        (512, 2048, torch.bfloat16, None, (64, 64, 64, 0), 256),
        (128, 25_088, torch.float16, None, (128, 64, 128, 1), 392),
        (128, 802_816, torch.bfloat16, None, (128, 64, 128, 96), 131),
        (128, 802_816, torch.float32, "tf32", (128, 32, 128, 191), 132),
    ],
)
def test_gradients_are_divided_until_the_gpu_is_full(
    n: int, d: int, dtype: torch.dtype, precision: Any, tiling: tuple[int, ...], programs: int
) -> None:
    """By hand; of x alone."""
    problem = Problem(n, d, 7, dtype, GPU, precision=precision, x_grad=True, y_grad=False)
    t = plan.gradient_tiling([problem])
    assert t == tiling
    assert math.ceil(n / t.tall) * math.ceil(d / (t.wide * max(t.share, 1))) == programs


@pytest.mark.parametrize("sides", SIDES)
def test_launches(sides: tuple[bool, bool]) -> None:
    """By hand; what is launched is compared in test_triton."""
    problem = Problem(128, 512, 300, torch.float32, GPU, x_grad=sides[0], y_grad=sides[1])
    assert plan.launches(problem) == (2, int(any(sides)))
    unbiased = problem._replace(estimator="unbiased", masked=True)
    assert plan.launches(unbiased) == (3, int(any(sides)))
    text = str(plan.describe(problem, "gram", chosen("triton")))
    assert f"3 tiles of 64 x 64, inner step 32, split 16 + 10 ways, {2 + any(sides)} launches" in text


@pytest.mark.parametrize(("dtype", "tflops"), [(torch.float32, 67.0), (torch.bfloat16, 989.0)], ids=str)
def test_floor(dtype: torch.dtype, tflops: float) -> None:
    """Data-sheet figures: the larger of the times for arithmetic and memory, and which it is."""
    sheet = cost.sheet_of("NVIDIA H100 80GB HBM3")
    large = plan.describe(Problem(8192, 4096, 4096, dtype, GPU), "gram", chosen("library"), sheet)
    assert large.floor == f"{large.flops / tflops * 1e-6:.3g} us, bound by arithmetic (data-sheet peaks, H100)"
    small = plan.describe(Problem(16, 4096, 4096, dtype, GPU), "gram", chosen("library"), sheet)
    assert small.floor.startswith(f"{small.bytes / 3.35 * 1e-6:.3g} us, bound by memory")
    assert plan.describe(large.problem, "gram", chosen("library")).floor == "unknown for this device"


def test_a_plan_is_worth_reading() -> None:
    problem = Problem(128, 512, 300, torch.bfloat16, GPU, "cka", "unbiased", None, True, True, True)
    predicted = {"triton": Cost(56, 14.58, 3), "library": Cost(99, 104.2, 8)}
    choice = Choice(
        "library", "measured fastest at 128 x 512 x 512", {"native": "has a reason"}, predicted, {"library": 9.0}
    )
    made = plan.describe(problem, "gram", choice)
    text = str(made)
    for part in (
        "cka (unbiased, linear) of x [128, 512] and y [128, 300], bfloat16 on cuda:0, masked",
        "gradient   x and y",
        "route      gram: ",
        "backend    library, library products",
        "kflop" if made.flops < 1e6 else "Mflop",
        "because    measured fastest at 128 x 512 x 512\n",
        "time       triton: predicted 56 us (14.6 on the device, 3 launches)\n",
        "time       library: predicted 104 us (104 on the device, 8 launches), measured 9 us\n",
        "B beyond inputs and gradients",
        "not native   has a reason",
    ):
        assert part in text
    assert made.flops == plan.route_flops("gram", 128, 512, 300, True, True)
    assert "shared memory at a time, 3 launches" in str(plan.describe(problem, "gram", chosen("native")))
    forward = problem._replace(x_grad=False, y_grad=False)
    assert "shared memory at a time, 2 launches" in str(plan.describe(forward, "gram", chosen("native")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.route = "cross"
