"""The eleven problems and all candidates: compiled beforehand by several processes, timed, profiled, and at the end
the hand-written forms through torch.compile."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import correctness
from benchmarks.gpu.contest import timed_rows
from benchmarks.gpu.context import Context, Item, Row
from benchmarks.gpu.problems import TargetQuestion, questions_of
from benchmarks.harness import Contestant
from benchmarks.kernels import gate, providers
from benchmarks.kernels.problems import fp32_switched

COMPILED = 4  # of the problems torch.compile is asked: the paper's batch, a read-bound and two large ones
WARMED = ("library", "triton", "symmetric")  # those that compile; the native part is being built meanwhile
PROFILED = ("auto", "library", "triton")


def warm_items(context: Context) -> Sequence[Item]:
    """Calls that later phases make, once, so that Triton's cache on the disk has their kernels; mixed, to be shared."""
    found = [*time_items(context), *correctness.check_items(context)]
    random.Random(0).shuffle(found)
    return found[: 4 if context.rehearse else None]


def time_items(context: Context) -> Sequence[Item]:
    """A question each."""
    return [Item(question.name, partial(_times, question)) for question in questions_of(context.rehearse)]


def _times(question: TargetQuestion, context: Context) -> Iterator[Row]:
    with fp32_switched(question.case.precision):
        candidates, judge = question.ask(context.machine, WARMED if context.warms else ())
        for row in timed_rows(context, candidates, judge, context.share()):
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
    asked = questions_of(context.rehearse)[: 1 if context.rehearse else COMPILED]
    return [Item(f"{question.name} compiled", partial(_rival, question)) for question in asked]


def _rival(question: TargetQuestion, context: Context) -> Iterator[Row]:
    """In the default mode, and captured in a graph of ours, which is what "reduce-overhead" would do."""
    case = question.case
    form = partial(providers.FORMS[providers.better_form(case)], **case.options)
    torch.compiler.reset()
    loss = torch.compile(form, fullgraph=True, dynamic=False, backend="aot_eager" if context.rehearse else "inductor")
    x, y = case.features(context.machine.device)
    with fp32_switched(case.precision):
        candidates = [Contestant("compiled", gate.call(loss, x, y, case.backward))]
        for row in timed_rows(context, candidates, gate.judge(case, x, y), context.share()):
            yield question.about | row
