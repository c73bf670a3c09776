"""What is measured on a GPU: ceilings, right or wrong, times of all candidates, their kernels, compiled rivals.

Warming makes each later call once, by several processes, for what it compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import run, sweeps
from benchmarks.gpu.context import Context, Item, Phase
from benchmarks.gpu.problems import TargetQuestion, questions_of
from benchmarks.harness import Contestant, quantiles
from benchmarks.kernels.limits import copying, fp32_switched, multiplying
from benchmarks.rows import Row, message
from tests.kernels import on_device
from tests.kernels.on_device import Check

# m, n, k of a product [m, k] x [k, n]: a square one, and those that the eleven problems are made of.
PRODUCTS = (
    (8192, 8192, 8192),
    (1024, 1024, 65_536),
    (2048, 1024, 65_536),
    (1024, 1024, 4096),
    (4096, 4096, 16_384),
    (128, 128, 802_816),
    (512, 512, 2048),
)
NUMBERS = ("bfloat16", "bfloat16 to float32", "float16 to float32", "float32 tf32", "float32 ieee")
COPIED = 2**32  # bytes read and written, past the cache, which is cold
ROUNDS = 7
COMPILED = 4  # of the problems torch.compile is asked: the paper's batch, a read-bound and two large ones
WARMED = ("library", "triton", "symmetric")  # those that compile; the native part is being built meanwhile
PROFILED = ("auto", "library", "triton")


# ---------------------------------------------------------------------------------------------- ceilings


def ceiling_items(context: Context) -> Sequence[Item]:
    """What this device reaches at its best: copies, products of every number at every size, launches."""
    products = [
        Item(f"{number} {'x'.join(map(str, sizes))}", partial(_product, number, sizes))
        for sizes in (((24, 16, 40),) if context.rehearse else PRODUCTS)
        for number in NUMBERS
        if not (number == "float32 ieee" and sizes[0] == 8192)  # a fiftieth of a second a call
    ]
    return [Item("copy", _copy), *products[:5], Item("launches", _launches), *products[5:]]


def _copy(context: Context) -> Iterator[Row]:
    moved = 2**16 if context.rehearse else COPIED
    yield _ceiling(context, "copy", copying(context.machine.device, moved), moved=moved)


def _product(number: str, sizes: tuple[int, int, int], context: Context) -> Iterator[Row]:
    m, n, k = sizes
    kind, _, rest = number.partition(" ")
    multiply = multiplying(context.machine.device, getattr(torch, kind), *sizes, wide=rest == "to float32")
    with fp32_switched(rest):
        about = dict(n=k, p=n, q=m, dtype=kind, precision=rest * (kind == "float32"))
        yield about | _ceiling(context, f"mm {number} {m}x{n}x{k}", multiply, flops=2 * m * n * k)


def _launches(context: Context) -> Iterator[Row]:
    """Of an empty kernel, of a graph of three, and of autograd's machinery."""
    one = torch.zeros(1, device=context.machine.device, requires_grad=True)
    other = torch.zeros_like(one)
    replay, _ = context.machine.captured(lambda: [other.add_(1) for _ in range(3)])
    for clock in ("host", "device"):
        yield _ceiling(context, "empty launch", lambda: other.add_(1), clock)
        yield _ceiling(context, "replay of 3 empty kernels", replay, clock)
    yield _ceiling(context, "multiply and its backward", lambda: torch.autograd.grad(one * 2, one), "host")


def _ceiling(
    context: Context, candidate: str, call: Callable[[], object], clock: str = "device", moved: int = 0, flops: int = 0
) -> Row:
    """A row with the rate that follows from the bytes moved, or from the operations."""
    context.machine.seconds(call)
    take = context.machine.take(clock, call)
    row = {"candidate": candidate, "status": "ok", "timer": clock} | quantiles([take() for _ in range(ROUNDS)])
    rate = {"rate": (moved or flops) / row["p50"], "unit": "B/s" if moved else "flop/s"}
    return row | (rate if moved or flops else {})


# ---------------------------------------------------------------------------------------------- right or wrong


def check_items(context: Context) -> Sequence[Item]:
    """A check each."""
    return [Item(str(check), partial(_check, check)) for check in on_device.every_check(tiny=context.rehearse)]


def _check(check: Check, context: Context) -> Iterator[Row]:
    about = {key: value for key, value in vars(check).items() if key != "shape"}
    about |= dict(zip("npq", check.shape, strict=True), candidate=check.backend)
    if context.warms:
        yield context.warmed([partial(check.evaluated, context.machine.device)] * (check.backend != "native"))
        return
    try:
        found = on_device.judged(check, context.machine)
        wrong = ", ".join(name for name, right in found.items() if right is False)
        yield about | found | {"status": "red" if wrong else "ok", "gate": wrong}
    except ValueError as error:
        if "cannot run here" not in str(error):
            raise
        yield about | {"status": "refused", "message": message(error)}


# ---------------------------------------------------------------------------------------------- times and kernels


def warm_items(context: Context) -> Sequence[Item]:
    """Calls that later phases make, once, so that Triton's cache on the disk has their kernels."""
    return [*time_items(context), *check_items(context)][:: 9 if context.rehearse else 1]


def time_items(context: Context) -> Sequence[Item]:
    """A question each."""
    return [Item(question.name, partial(_times, question)) for question in questions_of(context.rehearse)]


def _times(question: TargetQuestion, context: Context) -> Iterator[Row]:
    with fp32_switched(question.case.precision):
        candidates, gate = question.ask(context.machine, WARMED if context.warms else ())
        for row in context.timed(candidates, gate, context.share()):
            yield question.about | row


def profile_items(context: Context) -> Sequence[Item]:
    """One call of each question, kernel by kernel."""
    return [
        Item(f"{question.name} {name}", partial(_profile, question, name))
        for name in PROFILED
        for question in questions_of(context.rehearse)[: 1 if context.rehearse else None]
    ]


def _profile(question: TargetQuestion, name: str, context: Context) -> Iterator[Row]:
    """A row a kernel, in the order of their first launch: how often, and microseconds altogether."""
    machine = context.machine
    about = question.about | {"candidate": name}
    with fp32_switched(question.case.precision):
        candidates, _ = question.ask(machine, (name,))
        if not candidates:
            return
        try:
            machine.seconds(candidates[0].run)
        except ValueError as error:
            yield about | {"status": "refused", "message": message(error)}
            return
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]) as seen:
            machine.seconds(candidates[0].run)
    kind = DeviceType.CUDA if machine.is_cuda else DeviceType.CPU
    kernels: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            kernels.setdefault(event.name, []).append(event.time_range.elapsed_us())
    for order, (kernel, elapsed) in enumerate(kernels.items()):
        told = {"status": "ok", "order": order, "kernel": kernel[:200], "launches": len(elapsed), "us": sum(elapsed)}
        yield about | told


def rival_items(context: Context) -> Sequence[Item]:
    """The better hand-written form, compiled; last, because a compilation takes up to half a minute."""
    asked = questions_of(context.rehearse)[: 1 if context.rehearse else COMPILED]
    return [Item(f"{question.name} compiled", partial(_rival, question)) for question in asked]


def _rival(question: TargetQuestion, context: Context) -> Iterator[Row]:
    """In the default mode, and captured in a graph of ours, which is what "reduce-overhead" would do."""
    case = question.case
    torch.compiler.reset()
    backend = "aot_eager" if context.rehearse else "inductor"
    form = torch.compile(partial(case.better_form, **case.options), fullgraph=True, dynamic=False, backend=backend)
    x, y = case.features(context.machine.device)
    with fp32_switched(case.precision):
        candidates = [Contestant("compiled", case.call(form, x, y))]
        for row in context.timed(candidates, case.gate(x, y), context.share()):
            yield question.about | row


PHASES = {
    "warm": Phase(warm_items, run.EVENTS, warms=True),
    "ceilings": Phase(ceiling_items, run.ROWS),
    "correctness": Phase(check_items, run.CHECKS),
    "times": Phase(time_items, run.ROWS),
    "profiles": Phase(profile_items, run.KERNELS),
    "rivals": Phase(rival_items, run.ROWS),
    # Of the second run:
    "precompile": Phase(sweeps.sweep_items, run.SWEEP, warms=True),
    "sweep": Phase(sweeps.sweep_items, run.SWEEP),
}
