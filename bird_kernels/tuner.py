"""`bird tune`: measure on this device, problem by problem, which candidate is fastest, and write a `tuning.Table`.

Candidates are the backends that can run here and the symmetric product kernel in each of its configurations. Each is
timed only if it agrees with fp64: on the device by replays of a CUDA graph with cold caches, on the host by its clock.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from . import backends, clocks, cost, ops, plan, tuning
from .backends import trust
from .types import Problem, Route

SHAPES = (  # rows, student's width, teacher's width; the most usual first
    (128, 512, 512), (128, 512, 1280), (512, 2048, 2048), (4096, 1024, 1024), (1024, 1024, 1024), (256, 768, 768),
    (16_384, 1024, 1024), (128, 25_088, 25_088), (16_384, 4096, 4096), (65_536, 1024, 1024), (4096, 4096, 4096),
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
SHARE, FEWEST, MOST = 0.1, 5, 100  # each timer repeats a call for SHARE seconds, but FEWEST to MOST times
# By precision, the largest relative errors of value and gradient against fp64; a working kernel is far below them.
BOUNDS = {"ieee": (1e-4, 1e-3), "tf32x3": (1e-4, 1e-3), "tf32": (2e-3, 2e-2), "": (5e-3, 3e-2)}
Candidate = Callable[[], tuple[Tensor, Tensor]]  # value and gradient of x


def tune(
    device: torch.device, problems: Sequence[tuple[Sequence[int], str]], minutes: float, say: Callable[[str], object]
) -> tuning.Table:
    """Measure ``problems``, each (rows, student's width, teacher's width) and a dtype, until ``minutes`` are over.

    Rows are added to the table in the user's cache one by one, so an interrupted run loses nothing, and replace those
    of the same problem and candidate. ``say`` gets a line of text for each candidate.

    Raises:
        OSError: the cache folder cannot be written to; checked before anything is measured.
        ValueError: ``device`` is no CUDA device, or nothing could be measured.
    """
    if device.type != "cuda":
        raise ValueError(f"on {device} there is nothing to tune: the library backend is the only one that runs there")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    deadline = time.monotonic() + 60 * minutes
    with torch.cuda.device(device), _untuned():
        key = tuning.key_of(device)
        file = tuning.user_file(key)
        kept = tuning.read_table(file)
        table = kept if kept is not None and kept.key == key else tuning.Table(key, "", ())
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()  # to fail now, not after minutes of measuring
        measured = False
        for (n, p, q), dtype in problems:
            problem = backends.precise(Problem(n, p, q, getattr(torch, dtype), device))
            for row in _of_problem(problem, deadline, say):
                others = tuple(known for known in table.rows if known.what != row.what)
                table = tuning.Table(key, datetime.datetime.now().isoformat(timespec="seconds"), (*others, row))
                tuning.write_table(file, table)
                measured = True
    backends.forget()
    if not measured:
        raise ValueError(f"nothing was measured within {minutes:g} minutes: give it more time, or smaller shapes")
    return table


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """A context in which earlier measurements do not change what a candidate runs."""
    before = os.environ.get("BIRD_TUNING")
    os.environ["BIRD_TUNING"] = "off"
    tuning.forget_files()
    try:
        yield
    finally:
        os.environ.pop("BIRD_TUNING")
        if before is not None:
            os.environ["BIRD_TUNING"] = before
        tuning.forget_files()


def _of_problem(problem: Problem, deadline: float, say: Callable[[str], object]) -> Iterator[tuning.Measurement]:
    """Measure one problem: yield a row for each correct candidate, until ``deadline`` (of `time.monotonic`)."""
    dtype, precision = tuning.number_of(problem)
    title = f"{problem.n:,} x {problem.p:,}, {problem.q:,} {' '.join(filter(None, (dtype, precision)))}"
    expected = cost.predict(problem, cost.sheet_of(torch.cuda.get_device_name(problem.device)))
    needed = 4 * sum(FEWEST * known.us for known in expected.values()) * 1e-6  # check, graph, two timers
    if time.monotonic() + needed > deadline:
        say(f"{title}: no time left (it would take {needed:.1f} s)")
        return
    try:
        truth, candidates = _prepare(problem)
    except torch.OutOfMemoryError:
        say(f"{title}: no memory for it")
        return
    for name, run in candidates:
        if time.monotonic() > deadline:
            say(f"{title}: {name} not reached in time")
            return
        try:
            wrong = _why_wrong(run(), truth, BOUNDS[precision])
            if wrong is None:
                host, device = _times(run)
        except Exception as error:  # compilers and drivers raise all kinds
            wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if wrong is not None:
            say(f"{title}: {name} is left out, {wrong}")
            continue
        say(f"{title}: {name} {max(host, device):.4g} us")
        of_problem = problem.n, problem.p, problem.q, dtype, precision, problem.estimator
        yield tuning.Measurement(*of_problem, name, round(host, 3), round(device, 3))


def _times(run: Candidate) -> tuple[float, float]:
    """Median microseconds of the host, and of the device in replays of a CUDA graph with cold caches."""
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


def _prepare(problem: Problem) -> tuple[tuple[Tensor, Tensor], list[tuple[str, Candidate]]]:
    """Value and gradient in fp64 for random features, and the candidates that can run here: (name, a call on them)."""
    x, y = trust.related(problem.n, problem.p, problem.q, problem.dtype, problem.device)
    x.requires_grad_()
    wide = problem._replace(dtype=torch.float64, precision=None)
    truth = _evaluate(x.detach().double().requires_grad_(), y.double(), wide, "library")
    able = [name for name in ("native", "triton", "library") if backends.runs(name, problem)]
    candidates: list[tuple[str, Candidate]] = [(name, partial(_evaluate, x, y, problem, name)) for name in able]
    if cost.side(problem) >= min(cost.SYMMETRIC):
        candidates += _symmetric(x.detach(), y, problem, plan.route_of(problem, "library"))
    return truth, candidates


def _evaluate(x: Tensor, y: Tensor, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """The value (0-d) and the gradient with respect to x [n, p]."""
    value = ops.alignment(x, y, None, ops.Call(problem, plan.route_of(problem, backend), backend))
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def _why_wrong(found: Sequence[Tensor], true: Sequence[Tensor], bounds: Sequence[float]) -> str | None:
    """Which error exceeds its bound, in words; None if none does."""
    for one, other, bound in zip(found, true, bounds, strict=True):
        error = trust.relative_error(one, other)
        if not error <= bound:
            return f"it is off by {error:.2g} of the result's size"
    return None


def _symmetric(x: Tensor, y: Tensor, problem: Problem, route: Route) -> Iterator[tuple[str, Candidate]]:
    """The library backend with the symmetric product kernel (`triton.symmetric`), in each configuration that fits."""
    if problem.dtype == torch.float32 and problem.precision != "tf32":
        return  # the kernel has no exact fp32 products
    module = backends.of(problem, "library")
    if not module.__name__.endswith(backends.SHIFTED):
        return
    kernel = importlib.import_module("bird_kernels.backends.triton.symmetric")
    for c in kernel.fitting(torch.cuda.get_device_capability(problem.device)):

        def run(c: object = c) -> tuple[Tensor, Tensor]:
            value, stash = module.forward(x, y, None, problem, route, c)
            dx, _ = module.backward(torch.ones_like(value), x, y, None, stash, problem, route=route)
            return value, dx

        yield f"symmetric {' '.join(map(str, c))}", run
