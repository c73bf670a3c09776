"""What else the kernels could be launched with: warps and stages, kernel by kernel, and numbers that cut the work.

Every launch of the package is a `Launch`, whose warps and stages are replaced here by name of the kernel; a setting is
a module's constant. A whole call is timed each time, behind the gate, beside the call as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from benchmarks.gpu.contest import compete
from benchmarks.gpu.context import Context, Item, Row, failure
from benchmarks.gpu.problems import Question, questions
from benchmarks.harness import Candidate, Judge
from benchmarks.kernels.problems import fp32_products

# A question by its place among the eleven, and the backend whose kernels it launches.
SWEPT = ((0, "triton"), (1, "library"), (2, "library"), (4, "triton"), (7, "triton"), (10, "triton"))
OPTIONS = tuple(dict(num_warps=warps, num_stages=stages) for warps in (4, 8) for stages in (1, 2, 3, 4))
# Those that a version of the package does not have are passed over.
SETTINGS: dict[tuple[str, str], tuple[int, ...]] = {
    ("bird_kernels.backends.triton.shift", "SHIFTED"): (32, 128),
    ("bird_kernels.backends.triton.shift", "SHARES"): (32,),
    ("bird_kernels.backends.triton.shift", "LOCATED"): (16, 64),
    ("bird_kernels.backends.shifted", "PART"): (4096, 8192, 32_768),
    ("bird_kernels.backends.triton.small", "REDUCED"): (4, 16),
    ("bird_kernels.plan", "PROGRAMS"): (66, 264),
    ("bird_kernels.plan", "CROWD"): (2, 8),
}
KERNELS = "bird_kernels.backends.triton"  # the package whose modules define them, each named "..._kernel"
TIMED = 0.25  # seconds a candidate

Variant = tuple[str, Callable[[], contextlib.AbstractContextManager[Any]]]


def items(context: Context) -> Sequence[Item]:
    """A question and one of its kernels or settings each; at a rehearsal one kernel that is launched and one not."""
    found = _every(context, _sweep)
    if context.rehearse:
        (question, backend), *_ = _swept(context)
        seen = _launched(question, backend, context)
        by_use = {item.name.split()[-1] in seen: item for item in found}
        found = list(by_use.values())
    return found


def warm_items(context: Context) -> Sequence[Item]:
    """The same, compiled by several processes."""
    found = _every(context, _warm)
    random.Random(0).shuffle(found)
    return found[:2] if context.rehearse else found


def _every(context: Context, run: Callable[..., Iterator[Row]]) -> list[Item]:
    return [
        Item(f"{question.name} {backend} {what}", partial(run, question, backend, what, variants))
        for question, backend in _swept(context)
        for what, variants in _variants().items()
    ]


def _swept(context: Context) -> list[tuple[Question, str]]:
    asked = questions(context.rehearse)
    chosen = ((0, "triton"),) if context.rehearse else SWEPT
    return [(asked[i], backend) for i, backend in chosen]


def _variants() -> dict[str, list[Variant]]:
    """What is varied, by name: each kernel's options, each setting's values."""
    found: dict[str, list[Variant]] = {}
    for kernel in kernels():
        found[kernel] = [
            (f"{kernel} {o['num_warps']} warps, {o['num_stages']} stages", partial(launched_with, kernel, o))
            for o in OPTIONS
        ]
    for (module, name), values in SETTINGS.items():
        if hasattr(_imported(module), name):
            found[name] = [(f"{name} {value}", partial(set_to, module, name, value)) for value in values]
    return found


def kernels() -> list[str]:
    """The names of the package's Triton kernels."""
    package = importlib.import_module(KERNELS)
    for path in sorted(importlib.resources.files(package).iterdir(), key=str):
        if path.name.endswith(".py") and path.name != "__init__.py":
            importlib.import_module(f"{KERNELS}.{path.name[:-3]}")
    return sorted({
        name for module in list(sys.modules) if module.startswith(KERNELS) for name in vars(sys.modules[module])
        if name.endswith("_kernel")
    })  # fmt: skip


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


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
    forget()
    try:
        yield seen
    finally:
        Launch.__init__ = original  # type: ignore[method-assign]
        forget()


@contextlib.contextmanager
def set_to(module: str, name: str, value: int) -> Iterator[None]:
    """A module's constant has another value."""
    place = importlib.import_module(module)
    before = getattr(place, name)
    setattr(place, name, value)
    forget()
    try:
        yield
    finally:
        setattr(place, name, before)
        forget()


def forget() -> None:
    """Every launch that the backends keep is prepared anew."""
    for module in [module for name, module in sys.modules.items() if name.startswith("bird_kernels.backends")]:
        for value in list(vars(module).values()):
            if callable(getattr(value, "cache_clear", None)):
                value.cache_clear()


def _asked(question: Question, backend: str, context: Context) -> tuple[Candidate, Judge]:
    (candidate,), judge = question.ask(context.machine, (backend,))
    return candidate, judge


@cache
def _launched(question: Question, backend: str, context: Context) -> frozenset[str]:
    """The kernels that this call launches."""
    candidate, _ = _asked(question, backend, context)
    with launched_with("", {}) as seen:
        candidate.run()
    return frozenset(seen)


def _concerns(what: str, question: Question, backend: str, context: Context) -> bool:
    """Whether this call launches the kernel that is varied; of a setting nobody knows, if it launches any."""
    seen = _launched(question, backend, context)
    return what in seen if what.endswith("_kernel") else bool(seen)


def _warm(question: Question, backend: str, what: str, variants: Sequence[Variant], context: Context) -> Iterator[Row]:
    start = time.perf_counter()
    with fp32_products(question.case.precision):
        if not _concerns(what, question, backend, context):
            return
        candidate, _ = _asked(question, backend, context)
        for _, changed in variants:
            with contextlib.suppress(Exception), changed():  # told when it is timed
                candidate.run()
    yield {"event": "compiled", "seconds": round(time.perf_counter() - start, 3)}


def _sweep(question: Question, backend: str, what: str, variants: Sequence[Variant], context: Context) -> Iterator[Row]:
    """The call as it is, then each variant, one after the other: a launch keeps what it was made with."""
    with fp32_products(question.case.precision):
        if not _concerns(what, question, backend, context):
            return
        candidate, judge = _asked(question, backend, context)
        as_it_is: Variant = ("as it is", contextlib.nullcontext)
        for name, changed in (as_it_is, *variants[: 1 if context.rehearse else None]):
            if name in context.without:
                continue
            if context.left() <= 0:
                return
            try:
                with changed():
                    again = [candidate._replace(name=name)]
                    for row in compete(context, again, judge, min(TIMED, context.share())):
                        yield question.about | {"backend": backend} | row
            except Exception as error:
                yield question.about | {"backend": backend} | failure(name, error)
