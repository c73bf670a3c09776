"""The eleven problems and all candidates: compiled beforehand by several processes, timed, profiled, and at the end
the hand-written forms through torch.compile."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import correctness
from benchmarks.gpu.contest import compete
from benchmarks.gpu.context import Context, Item, Row, failure
from benchmarks.gpu.problems import Question, questions
from benchmarks.harness import Candidate
from benchmarks.kernels import gate, providers
from benchmarks.kernels.problems import fp32_switched

COMPILED = 4  # of the problems torch.compile is asked: the paper's batch, a read-bound and two large ones
WARMED = ("library", "triton", "symmetric")  # those that compile; the native part is being built meanwhile
PROFILED = ("auto", "library", "triton")


def warm_items(context: Context) -> Sequence[Item]:
    """Calls that later phases make, once, so that Triton's cache on the disk has their kernels; mixed, to be shared."""
    wanted = questions(context.rehearse)
    found = [Item(f"{question.name} {name}", partial(_warm, question, name)) for question in wanted for name in WARMED]
    found += [
        Item(str(check), partial(_warm_check, check))
        for check in correctness.chosen(context.rehearse)
        if check.backend in WARMED
    ]
    random.Random(0).shuffle(found)
    return found[: 4 if context.rehearse else None]


def _warm(question: Question, name: str, context: Context) -> Iterator[Row]:
    with fp32_switched(question.case.precision):
        for candidate in question.ask(context.machine, (name,))[0]:
            yield compiled(candidate.run, context)


def _warm_check(check: correctness.Check, context: Context) -> Iterator[Row]:
    device = context.machine.device
    call = partial(correctness.evaluated, check, check.mask(device), *check.features(device, seed=0))
    with fp32_switched(check.number):
        yield compiled(call, context)


def compiled(run: Callable[[], object], context: Context) -> Row:
    """Make a call whose kernels are compiled by it; the event says how long that took."""
    start = time.perf_counter()
    with contextlib.suppress(ValueError):  # a backend that does not do this; later phases say so
        run()
    context.machine.wait()
    return {"event": "compiled", "seconds": round(time.perf_counter() - start, 3)}


def items(context: Context) -> Sequence[Item]:
    """A question each."""
    return [Item(question.name, partial(_times, question)) for question in questions(context.rehearse)]


def _times(question: Question, context: Context) -> Iterator[Row]:
    with fp32_switched(question.case.precision):
        candidates, judge = question.ask(context.machine)
        for row in compete(context, candidates, judge, context.share()):
            yield question.about | row


def profile_items(context: Context) -> Sequence[Item]:
    """One call of each question, kernel by kernel."""
    return [
        Item(f"{question.name} {name}", partial(_profile, question, name))
        for name in PROFILED
        for question in questions(context.rehearse)[: 1 if context.rehearse else None]
    ]


def _profile(question: Question, name: str, context: Context) -> Iterator[Row]:
    """A row a kernel, in the order of their first launch: how often, and microseconds altogether."""
    machine = context.machine
    about = question.about | {"candidate": name}
    with fp32_switched(question.case.precision):
        candidates, _ = question.ask(machine, (name,))
        if not candidates:
            return
        run = candidates[0].run
        try:
            run()
        except ValueError as error:
            yield about | {"status": "refused", "message": str(error)[:300]}
            return
        machine.seconds(run)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]) as seen:
            run()
            machine.wait()
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
    asked = questions(context.rehearse)[: 1 if context.rehearse else COMPILED]
    return [Item(f"{question.name} compiled", partial(_rival, question)) for question in asked]


def _rival(question: Question, context: Context) -> Iterator[Row]:
    """In the default mode, and captured in a graph of ours, which is what "reduce-overhead" would do."""
    case, machine = question.case, context.machine
    form = partial(providers.better_form(case), **case.options)
    torch.compiler.reset()
    loss = torch.compile(form, fullgraph=True, dynamic=False, backend="aot_eager" if context.rehearse else "inductor")
    x, y = case.features(machine.device)
    with fp32_switched(case.precision):
        run = gate.call(loss, x, y, case.backward)
        context.step("compiled")
        try:
            seconds = compiled(run, context)["seconds"]
        except Exception as error:
            yield question.about | failure("compiled", error)
            return
        about = question.about | {"compile_seconds": seconds}
        for row in compete(context, [Candidate("compiled", run)], gate.judge(case, x, y), context.share()):
            yield about | row
