"""`bird tune`: measures on this device which candidate is fastest, problem by problem, until the time is over.

A candidate (a backend that can run here; the symmetric product kernel in each of its configurations) is compared with
fp64 first, and timed only if it agrees: by replays of a CUDA graph with cold caches, and by the host's clock. What
comes of it is a `tuning.Table`.
"""

from __future__ import annotations

import datetime
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, clocks, cost, ops, plan, tuning
from .backends.linalg import fp32_products
from .types import Problem

SHAPES = (  # rows, student's and teacher's widths; the most usual first
    (128, 512, 512), (128, 512, 1280), (512, 2048, 2048), (4096, 1024, 1024), (1024, 1024, 1024), (256, 768, 768),
    (16_384, 1024, 1024), (128, 25_088, 25_088), (16_384, 4096, 4096), (65_536, 1024, 1024), (4096, 4096, 4096),
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
SHARE, FEWEST, MOST = 0.1, 5, 100  # seconds and rounds of one clock
# How far value and gradient may be from fp64's, relative: what a working kernel keeps by a wide margin.
BOUNDS = {"ieee": (1e-4, 1e-3), "tf32x3": (1e-4, 1e-3), "tf32": (2e-3, 2e-2), "": (5e-3, 3e-2)}
PRODUCT_BOUND = {2: 1e-4, 4: 5e-3}  # of a product of exact operands, by their bytes; tf32 rounds them


PRODUCTS = "library's products"  # no candidate, but what the symmetric kernel would be there instead of


class Candidate(NamedTuple):
    """``run`` is what is timed, ``why_wrong`` compares its result with fp64's: None, or the reason to leave it out."""

    name: str
    run: Callable[[], object]
    why_wrong: Callable[[], str | None]


def tune(
    device: torch.device, problems: Sequence[tuple[Sequence[int], str]], minutes: float, say: Callable[[str], object]
) -> tuning.Table:
    """Measure ``problems``, each (rows, student's width, teacher's width) and a dtype, until ``minutes`` are over.

    The table is kept in the user's cache, with what it held before.

    Raises:
        ValueError: nothing is to be tuned on this device, or nothing could be measured.
    """
    if device.type != "cuda":
        raise ValueError(f"on {device} there is nothing to tune: the library backend is the only one that runs there")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    deadline = time.monotonic() + 60 * minutes
    rows: list[tuning.Row] = []
    with torch.cuda.device(device):
        key = tuning.key_of(device)
        for shape, dtype in problems:
            rows += _of_problem(_problem(shape, dtype, device), deadline, say)
    if not rows:
        raise ValueError(f"nothing was measured within {minutes:g} minutes: give it more time, or smaller shapes")
    known = tuning.read(tuning.user_file(key))
    done = {_identity(row) for row in rows}
    kept = [row for row in known.rows if _identity(row) not in done] if known is not None and known.key == key else []
    table = tuning.Table(key, datetime.datetime.now().isoformat(timespec="seconds"), (*kept, *rows))
    tuning.write(tuning.user_file(key), table)
    backends.forget()
    return table


def _problem(shape: Sequence[int], dtype: str, device: torch.device) -> Problem:
    number: torch.dtype = getattr(torch, dtype)
    n, p, q = shape
    return backends.precise(Problem(n, p, q, number, device))


def _identity(row: tuning.Row) -> tuple[object, ...]:
    return row.n, row.p, row.q, row.dtype, row.precision, row.estimator, row.candidate


def _of_problem(problem: Problem, deadline: float, say: Callable[[str], object]) -> Iterator[tuning.Row]:
    """A row for every candidate that is right, as far as the time goes."""
    dtype, precision = tuning.numbers(problem)
    title = f"{problem.n:,} x {problem.p:,}, {problem.q:,} {' '.join(filter(None, (dtype, precision)))}"
    expected = cost.predict(problem, cost.sheet_of(torch.cuda.get_device_name(problem.device)))
    needed = 4 * sum(FEWEST * known.us for known in expected.values()) * 1e-6  # gate, graph, two clocks
    if time.monotonic() + needed > deadline:
        say(f"{title}: no time left (it would take {needed:.1f} s)")
        return
    try:
        candidates = list(_candidates(problem))
    except torch.OutOfMemoryError:
        say(f"{title}: no memory for it")
        return
    times: dict[str, tuple[float, float]] = {}
    for name, run, why_wrong in candidates:
        if time.monotonic() > deadline:
            say(f"{title}: {name} not reached in time")
            return
        try:
            wrong = why_wrong()
            if wrong is None:
                times[name] = host, device = _times(run)
        except Exception as error:  # whatever a compiler or driver makes of it
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if wrong is not None:
            say(f"{title}: {name} is left out, {wrong}")
            continue
        if name == PRODUCTS:
            continue
        if name.startswith("symmetric"):  # the whole call with other products
            if "library" not in times:
                continue
            host, device = (
                whole + own - usual
                for whole, own, usual in zip(times["library"], times[name], times[PRODUCTS], strict=True)
            )
        say(f"{title}: {name} {max(host, device):.4g} us")
        yield tuning.Row(
            problem.n, problem.p, problem.q, dtype, precision, problem.estimator, name, round(host, 3), round(device, 3)
        )  # fmt: skip


def _times(run: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of the host, and of the device in replays of a CUDA graph with cold caches: medians."""
    run()
    torch.cuda.synchronize()
    once = clocks.host(run, 0.0)()
    torch.cuda.synchronize()
    graph, result = clocks.capture(run, None)
    del result
    takes = clocks.host(run, once), clocks.device(graph.replay, once)
    rounds = max(FEWEST, min(MOST, int(SHARE / max(once, takes[1]()))))
    host, device = (statistics.median(take() for _ in range(rounds)) * 1e6 for take in takes)
    return host, device


def _candidates(problem: Problem) -> Iterator[Candidate]:
    """The backends that can run here, then the library's products and the symmetric kernel in their place."""
    generator = torch.Generator(problem.device).manual_seed(0)
    x, y = (
        torch.randn(problem.n, width, generator=generator, device=problem.device).to(problem.dtype)
        for width in (problem.p, problem.q)
    )
    width = min(problem.p, problem.q)
    y[:, :width] += x[:, :width]
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    route = plan.choose_route(problem.n, problem.p, problem.q)
    truth = _evaluate(wide, y.double(), problem._replace(dtype=torch.float64, precision=None), "library")
    for name in ("native", "triton", "library"):
        if name in cost.predict(problem, cost.UNKNOWN) and backends.runs(name, problem):

            def run(name: str = name) -> tuple[Tensor, Tensor]:
                return _evaluate(x, y, problem, name)

            yield Candidate(name, run, lambda run=run: _why_wrong(run(), truth, BOUNDS[tuning.numbers(problem)[1]]))  # type: ignore[misc]
    if cost.side(problem) >= min(cost.SYMMETRIC):
        yield from _products(x.detach(), y, problem, transposed=route == "cross")


def _evaluate(x: Tensor, y: Tensor, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """Value and gradient of x."""
    value = ops.alignment(x, y, None, problem, plan.route_of(problem, backend), backend)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def _why_wrong(found: Sequence[Tensor], true: Sequence[Tensor], bounds: Sequence[float]) -> str | None:
    for one, other, bound in zip(found, true, bounds, strict=True):
        error = float((one.double() - other).norm() / other.norm())
        if not error <= bound:
            return f"it is off by {error:.2g} of the result's size"
    return None


def _products(x: Tensor, y: Tensor, problem: Problem, transposed: bool) -> Iterator[Candidate]:
    """The products of the forward, as the library backend has them made, and with the symmetric kernel in its place."""
    try:
        symmetric = importlib.import_module("bird_kernels.backends.triton.symmetric")
    except ImportError:
        return
    tf32 = problem.precision == "tf32"
    if (problem.dtype.itemsize == 4 and not tf32) or any(a.stride(0) * a.itemsize % 16 for a in (x, y)):
        return  # exact fp32 is the library's; unaligned rows are padded by the backend, and timed at other widths
    both = torch.cat([y, x], 1)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize == 2 else torch.mm(a, b)

    def by_library() -> tuple[Tensor, ...]:
        with fp32_products(problem):
            return (product(both.T, x), product(y.T, y)) if transposed else (product(x, x.T), product(y, y.T))

    truth = (x.T if transposed else x).double()
    truth = truth @ truth.T
    bound = (PRODUCT_BOUND[problem.dtype.itemsize],)
    yield Candidate(PRODUCTS, by_library, lambda: None)
    for c in symmetric.fitting(torch.cuda.get_device_capability(problem.device)):

        def by_kernel(c: tuple[int, ...] = c) -> tuple[Tensor, ...]:
            own = tuple(symmetric.multiply(a, transposed, 1, c, tf32) for a in (x, y))
            with fp32_products(problem):
                return (*own, product(y.T, x)) if transposed else own

        def why_wrong(run: Callable[[], tuple[Tensor, ...]] = by_kernel) -> str | None:
            return _why_wrong([run()[0].sum(0)], [truth], bound)

        yield Candidate(f"symmetric {' '.join(map(str, c))}", by_kernel, why_wrong)
