"""What else the kernels could be launched with: warps and stages, kernel by kernel.

Every launch of the package is a `Launch`, whose warps and stages are replaced here by name of the kernel. A whole call
is timed each time, behind the gate, beside the call as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from benchmarks.gpu.context import Context, Item
from benchmarks.gpu.problems import TargetQuestion, questions_of
from benchmarks.kernels.limits import fp32_switched
from benchmarks.rows import Row, message

# A question by its place among the eleven, and the backend whose kernels it launches.
SWEPT = ((0, "triton"), (1, "library"), (2, "library"), (4, "triton"), (7, "triton"), (10, "triton"))
OPTIONS = tuple(dict(num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
KERNELS = "bird_kernels.backends.triton"  # the package whose modules define them, each named "..._kernel"
TIMED = 0.25  # seconds a candidate


def sweep_items(context: Context) -> list[Item]:
    """A question and one of its kernels each; at a rehearsal one kernel that is launched and one that is not."""
    asked = questions_of(context.rehearse)
    swept = [(asked[i], backend) for i, backend in (SWEPT[:1] if context.rehearse else SWEPT)]
    found = [
        Item(f"{question.name} {backend} {kernel}", partial(_sweep, question, backend, kernel))
        for question, backend in swept
        for kernel in kernels()
    ]
    if context.rehearse:
        seen = _launched(*swept[0], context)
        found = list({item.name.split()[-1] in seen: item for item in found}.values())
    return found


def kernels() -> list[str]:
    """The names of the package's Triton kernels."""
    package = importlib.import_module(KERNELS)
    modules = [importlib.import_module(f"{KERNELS}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


@contextlib.contextmanager
def launched_with(kernel: str, options: dict[str, int]) -> Iterator[set[str]]:
    """Launches of ``kernel`` take these warps and stages; yields the kernels that were asked for meanwhile."""
    from bird_kernels.backends.triton.launch import Launch

    original, seen = Launch.__init__, set[str]()

    def init(self: Launch, function: Any, *rest: Any, **named: Any) -> None:
        name = getattr(function, "__name__", None) or function.fn.__name__
        seen.add(name)
        original(self, function, *rest, **(named | options if name == kernel else named))

    Launch.__init__ = init  # type: ignore[method-assign]
    forget_launches()
    try:
        yield seen
    finally:
        Launch.__init__ = original  # type: ignore[method-assign]
        forget_launches()


def forget_launches() -> None:
    """Every launch that the backends keep is prepared anew."""
    for module in [module for name, module in sys.modules.items() if name.startswith("bird_kernels.backends")]:
        for value in list(vars(module).values()):
            if callable(getattr(value, "cache_clear", None)):
                value.cache_clear()


@cache
def _launched(question: TargetQuestion, backend: str, context: Context) -> frozenset[str]:
    """The kernels that this call launches."""
    (candidate,), _ = question.ask(context.machine, (backend,))
    with launched_with("", {}) as seen:
        candidate.run()
    return frozenset(seen)


def _sweep(question: TargetQuestion, backend: str, kernel: str, context: Context) -> Iterator[Row]:
    """The call as it is, then each variant, one after the other: a launch keeps what it was made with."""
    with fp32_switched(question.case.precision):
        if kernel not in _launched(question, backend, context):
            return
        (candidate,), gate = question.ask(context.machine, (backend,))
        about = question.about | {"backend": backend}
        for options in ({}, *OPTIONS[: 1 if context.rehearse else None]):
            name = "{} {num_warps} warps, {num_stages} stages".format(kernel, **options) if options else "as it is"
            if name in context.without:
                continue
            if context.left() <= 0:
                return
            try:
                with launched_with(kernel, options):
                    again = [candidate._replace(name=name)]
                    for row in context.timed(again, gate, min(TIMED, context.share())):
                        yield about | row
            except Exception as error:
                yield about | {"candidate": name, "status": "failed", "message": message(error)}
