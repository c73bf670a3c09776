"""The backends, imported at their first use: which can run here, why others cannot, and which one ``auto`` takes.

A *fused* backend (native, triton) has kernels of its own; the library backend runs PyTorch's matrix products.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from .. import cost, tuning
from ..plan import FEW_ROWS, MOST_PAIRS, are_few, route_of, together, variant
from ..types import RBF, Choice, Cost, Estimator, Precision, Problem, Sheet, Variant
from . import rows, trust

# The modules, best first. Each has why_not(dtype, device), stash_shapes(problem, route), forward(...), backward(...).
_MODULES = {name: f"bird_kernels.backends.{name}" for name in ("native", "triton", "library")}

_ALL: tuple[Variant, ...] = get_args(Variant)
_VARIANTS = {"native": ("linear",), "triton": ("linear", "sqrt=True", 'kernel="rbf"'), "library": _ALL}

# The modules for Gaussian kernels, by backend.
_RBF = {"triton": "bird_kernels.backends.triton", "library": "bird_kernels.backends.library_rbf"}

SHIFTED = "shifted"  # names `backends.shifted`, and its kernels as a kind of `trust.Use`

# "reference" is plain PyTorch under autograd, not an operator: `call` runs it.
NAMES = ("auto", *_MODULES, "reference")


@lru_cache
def module_of(name: str, kernel: str = "linear") -> ModuleType:
    """The module that implements backend ``name`` for a "linear" or an "rbf" kernel."""
    return importlib.import_module((_MODULES if kernel == "linear" else _RBF)[name])


def of(problem: Problem, name: str) -> ModuleType:
    """The module of backend ``name`` that computes this problem. The library's on a GPU is `backends.shifted`, if its
    kernels work here and it takes the problem."""
    if name == "library" and problem.kernel is None and _shifts(problem.dtype, problem.device):
        shifted = importlib.import_module("bird_kernels.backends.shifted")
        if shifted.takes(problem):
            return shifted
    return module_of(name) if problem.kernel is None else module_of(name, "rbf")


@lru_cache
def _shifts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `backends.shifted` can run here: Triton kernels before and after library products."""
    if trust.known_failure("library", SHIFTED, dtype, device) is not None:
        return False
    return device.type == "cuda" and torch.cuda.is_available() and why_not("triton", dtype, device) is None


def shifted_rows(x: Tensor, y: Tensor, mask: Tensor | None, problem: Problem) -> rows.ShiftedRows | None:
    """x [n, p] and y [n, q], with mask bool [n] or None, as shifted operands of products on a GPU: by Triton if its
    kernels work, else by plain PyTorch. None for fp64 and on other devices, where centring first is as accurate."""
    if not rows.wanted(problem):
        return None
    p, q = x.shape[1], y.shape[1]
    kind = problem._replace(n=max(len(x), p + q + 1), p=p, q=q, masked=mask is not None, estimator="biased")
    if not (_shifts(problem.dtype, problem.device) and works("library", kind)):
        return rows.shifted(x, y, mask)
    found: rows.ShiftedRows = of(kind, "library").shift_rows(x, y, mask, kind._replace(n=len(x)))
    return found


def why_not(
    name: str, dtype: torch.dtype, device: torch.device, few_rows: bool = True, variant: Variant = "linear"
) -> str | None:
    """None if backend ``name`` can run products of ``dtype`` on ``device``, else the reason in words.

    ``few_rows``: `plan.are_few` of the problem's rows. ``variant``: `plan.variant` of the problem.
    """
    if variant not in _VARIANTS[name]:
        return f"has no kernels for {variant}"
    if name != "library" and variant in ("linear", "sqrt=True") and not few_rows:
        return f"takes at most {FEW_ROWS} rows"
    try:
        reason: str | None = module_of(name).why_not(dtype, device)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return reason


def choose(
    dtype: torch.dtype, device: torch.device, few_rows: bool, requested: str, variant: Variant = "linear"
) -> tuple[str, dict[str, str]]:
    """(the best backend that can run, {better one: why it cannot}), whatever is faster; arguments as `why_not`.

    Raises:
        ValueError: ``requested`` names a backend that cannot run.
    """
    return _choose(dtype, device, few_rows, requested, variant)


# Dynamo takes the result as a constant instead of tracing into device queries and imports. (It would trace through an
# lru_cache, so that is on `_choose`.) Of the sizes, which may be symbolic, only `few_rows` is passed. The attribute is
# all that torch.compiler.assume_constant_result sets, which would import Dynamo and Triton (1.5 s).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _choose(
    dtype: torch.dtype, device: torch.device, few_rows: bool, requested: str, variant: Variant
) -> tuple[str, dict[str, str]]:
    if requested == "reference":
        return requested, {}
    if requested != "auto":
        reason = why_not(requested, dtype, device, few_rows, variant)
        if reason is not None:
            raise ValueError(
                f'backend="{requested}" cannot run here: {reason}. backend="auto" takes the best that can.'
            )
        return requested, {}
    rejected: dict[str, str] = {}
    for name in _MODULES:
        reason = _why_not_auto(name, dtype, device, few_rows, variant)
        if reason is None:
            return name, rejected
        rejected[name] = reason
    raise AssertionError("the library backend runs everywhere")


def _why_not_auto(name: str, dtype: torch.dtype, device: torch.device, few_rows: bool, variant: Variant) -> str | None:
    """As `why_not`, for ``auto``, which takes no emulated kernels and none that failed on this machine."""
    reason = why_not(name, dtype, device, few_rows, variant)
    if reason is None and name != "library" and device.type == "cpu" and not compares(device):
        reason = "is emulated here, for tests only"
    return reason or trust.known_failure(name, "rbf" if variant == 'kernel="rbf"' else "linear", dtype, device)


def compares(device: torch.device) -> bool:
    """Whether ``auto`` compares times of several backends on a device: on CUDA. Elsewhere it takes the library."""
    return device.type == "cuda"


def resolve(problem: Problem, requested: str) -> str:
    """The backend of a call; ``requested`` is not "reference". Under "auto" kernels are tested at their first use.

    Raises:
        ValueError: as `choose`.
    """
    if requested == "auto" and torch.compiler.is_compiling():
        options = tuple(problem[3:11])  # no sizes, which may be symbolic
        return _within_bounds(_usable(options, are_few(problem.n), variant(problem)), problem)
    if requested != "auto" or not compares(problem.device):
        return choose(problem.dtype, problem.device, are_few(problem.n), requested, variant(problem))[0]
    while True:
        name = decide(problem, requested).backend
        if works(name, problem):
            return name


def _usable(options: tuple[Any, ...], few_rows: bool, variant: Variant) -> str:
    """`choose` under "auto" for a call that is being compiled, after which it cannot change: kernels are tested now, on
    both routes. ``options`` are a `Problem`'s fields from dtype to y_grad."""
    kernel = RBF() if variant == 'kernel="rbf"' else None
    by_rows, by_features = (Problem(n, 1, 1, *options)._replace(kernel=kernel) for n in (2, 4))
    while True:
        name, _ = choose(by_rows.dtype, by_rows.device, few_rows, "auto", variant)
        if not compares(by_rows.device) or (works(name, by_rows) and works(name, by_features)):
            return name


_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _within_bounds(name: str, problem: Problem) -> str:
    """The fused backend ``name`` for sizes up to which it always wins, else the library. Sizes may be symbolic: the
    comparison is a guard of the compiled code, and a constant in it, as in `plan.are_few`."""
    if name == "library" or problem.kernel is not None:
        return name
    limit = largest_fused(name, problem.dtype, problem.device)
    fits = True if problem.n * (problem.p + problem.q) <= limit else False  # noqa: SIM210
    return name if fits else "library"


def decide(problem: Problem, requested: str) -> Choice:
    """The backend of a call and why: as requested, as measured on this device, or as `cost` predicts. Runs nothing.

    Raises:
        ValueError: as `choose`.
    """
    return _decide(precise(problem), requested)


def precise(problem: Problem) -> Problem:
    """The problem with an explicit precision: for fp32 without one, that of PyTorch's own switch."""
    if problem.precision is not None or problem.dtype != torch.float32:
        return problem
    return problem._replace(precision="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee")


@lru_cache(maxsize=1024)
def _decide(problem: Problem, requested: str) -> Choice:
    few, kind = are_few(problem.n), variant(problem)
    name, rejected = choose(problem.dtype, problem.device, few, requested, kind)
    if not compares(problem.device) or name == "reference":
        return Choice(name, "asked for" if requested != "auto" else "the only one that runs here", rejected)
    key = tuning.key_of(problem.device)
    sheet = cost.sheet_of(key.device)
    costs = cost.predict(problem, sheet)
    finding = tuning.nearest(key, problem) if kind == "linear" else None
    us = finding.us if finding is not None else {}
    if requested != "auto":
        return Choice(name, "asked for", rejected, costs, us)
    reasons = {other: _why_not_auto(other, problem.dtype, problem.device, few, kind) for other in _MODULES}
    rejected = {other: reason for other, reason in reasons.items() if reason is not None}
    costs = {other: known for other, known in costs.items() if other not in rejected}
    us = {other: time for other, time in us.items() if other not in rejected}
    if finding is not None and all(other in us for other in costs if other != "symmetric"):
        name, why = min(us, key=us.__getitem__), f"measured fastest at {' x '.join(map(str, finding.shape))}"
    elif costs:
        name, why = cost.best(costs, problem, sheet), f"predicted fastest, by the data sheet of: {sheet.name}"
    else:
        name, why = "library", "the only one that has it"
    if name.startswith("symmetric"):
        name, why = "library", f"{why}, with the product kernel: {name}"
    return Choice(name, why, rejected, costs, us)


def device_sheet(x: Tensor) -> Sheet | None:
    """The data sheet of a tensor's device; None if it is not known."""
    sheet = cost.sheet_of(torch.cuda.get_device_name(x.device)) if x.is_cuda else cost.UNKNOWN
    return None if sheet is cost.UNKNOWN else sheet


def works(name: str, problem: Problem, kind: str = "") -> bool:
    """Whether the kernels of a backend work here: tested at their first use (`trust.failure_of`); warns if not."""
    module = of(problem, name)
    if name == "library":
        if not module.__name__.endswith(SHIFTED):
            return True
        kind = f"{SHIFTED} {route_of(problem, name)}"
    use, problem = trust.use_of(name, problem, kind), precise(problem)
    plain = module_of("library", "rbf" if problem.kernel else "linear")
    error = trust.failure_of(module, plain, problem, use)
    if error is not None:
        replace(name, problem, error, kind)
    return error is None


def replace(name: str, problem: Problem, error: Exception, kind: str = "") -> str:
    """The backend to continue with after one that ``auto`` chose failed with ``error``; warns once.

    Raises:
        Exception: ``error`` itself, if it is not about the kernels (memory; plain PyTorch) or under ``BIRD_STRICT=1``.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if name == "library":
        if not of(problem, name).__name__.endswith(SHIFTED):
            raise error
        kind = SHIFTED
    use = trust.use_of(name, problem, kind)
    is_new = trust.leave_out(use, error)
    forget()
    backend = decide(problem, "auto").backend
    if is_new:
        trust.warn(use, "plain PyTorch" if name == "library" or kind == "layers" else backend)
    return backend


def most_at_once(requested: str, dtype: torch.dtype, device: torch.device) -> int:
    """Up to how many numbers in x and y together C++ may run a call of few rows without asking `resolve`; 0: never.

    For all smaller calls with the backend ``requested`` and this dtype and device, `resolve` would take native.
    """
    if why_not("native", dtype, device) is not None:
        return 0
    if requested == "native":
        return 1 << 62
    if requested != "auto" or not compares(device):
        return 0
    precisions: tuple[Precision | None, ...] = ("ieee", "tf32") if dtype == torch.float32 else (None,)
    probes = (
        Problem(4, 1, 1, dtype, device, "cka_loss", estimator, precision, masked, y_grad=True)
        for estimator, precision, masked in itertools.product(get_args(Estimator), precisions, (False, True))
    )
    return largest_fused("native", dtype, device) if all(resolve(probe, "auto") == "native" for probe in probes) else 0


def forget() -> None:
    """Clear the caches of decisions, after something was measured or failed."""
    for answers in (_decide, _choose, _largest, _shares, _shifts):
        answers.cache_clear()
    if (native := sys.modules.get(f"{__name__}.native")) is not None:
        native.ask_again()


def runs(name: str, problem: Problem) -> bool:
    """Whether backend ``name`` can run a problem here."""
    return why_not(name, problem.dtype, problem.device, are_few(problem.n), variant(problem)) is None


def sharing(problems: Sequence[Problem], requested: str) -> str | None:
    """The backend by whose shared launches several pairs run; None if they run one by one.

    Raises:
        ValueError: as `choose`.
    """
    first = problems[0]
    if requested in MOST_PAIRS:
        return resolve(first, requested) if together(problems, requested) else None
    if requested != "auto" or not compares(first.device):
        return None
    name = _shares(tuple(map(precise, problems)))
    return name if name is not None and works(name, first, "pairs") else None


@lru_cache(maxsize=1024)
def _shares(problems: tuple[Problem, ...]) -> str | None:
    kind = problems[0].dtype, problems[0].device
    names = [name for name in MOST_PAIRS if together(problems, name)]
    names = [name for name in names if _why_not_auto(name, *kind, True, "linear") is None]
    names = [name for name in names if trust.known_failure(name, "pairs", *kind) is None]
    if not names:
        return None
    sheet = cost.sheet_of(tuning.key_of(kind[1]).device)
    us = cost.shared(problems, sheet)
    name = min(names, key=us.__getitem__)
    choices = [decide(problem, "auto") for problem in problems]
    if any(choice.backend not in choice.predicted for choice in choices):
        return name
    single = cost.one_by_one((choice.backend, choice.predicted[choice.backend]) for choice in choices)
    return name if us[name] <= single else None


def layers_by_triton(
    layers: Sequence[Tensor], mask: Tensor | None, problem: Problem, room: int
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Triton's `layer_products` of layers [n, width] with the dtype and options of ``problem``; None where its kernels
    cannot run, fail, or would take too many addresses."""
    of = problem.dtype, problem.device
    if not compares(problem.device) or len(layers) > 2 * MOST_PAIRS["triton"] or why_not("triton", *of) is not None:
        return None
    if trust.known_failure("triton", "layers", *of) is not None or not works("triton", problem, "layers"):
        return None
    try:
        found: tuple[Tensor, Tensor | None, Tensor] = module_of("triton").layer_products(layers, mask, problem, room)
    except Exception as error:
        replace("triton", problem, error, "layers")
        return None
    return found


def largest_fused(name: str, dtype: torch.dtype, device: torch.device) -> int:
    """The largest n (p + q) up to which ``auto`` takes the fused backend ``name`` for all linear problems of few rows.

    A power of two, by the cost model; 0 if another backend was faster in any measurement on this device.
    """
    return _largest(name, dtype, device)


largest_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _largest(name: str, dtype: torch.dtype, device: torch.device) -> int:
    key = tuning.key_of(device)
    usable = [other for other in _MODULES if why_not(other, dtype, device) is None]
    if name not in usable or tuning.lost_somewhere(name, key, dtype, usable):
        return 0
    sheet = cost.sheet_of(key.device)

    def wins(size: int) -> bool:
        problems = _probes(name, usable, dtype, device, size, sheet)
        return all(cost.best(costs, problem, sheet) == name for problem, costs in problems)

    return max(itertools.takewhile(wins, (1 << bits for bits in range(10, 40))), default=0)


def _probes(
    name: str, usable: list[str], dtype: torch.dtype, device: torch.device, size: int, sheet: Sheet
) -> Iterator[tuple[Problem, dict[str, Cost]]]:
    """Problems of few rows and ``size`` numbers, each with the predicted costs of the ``usable`` backends."""
    for n, grads in itertools.product((8, 32, 64, 128, 256, FEW_ROWS), ((True, False), (True, True), (False, False))):
        width = size // n
        for p in (width // 2, width // 8, width - width // 8):
            if p < 1 or width - p < 1:
                continue
            precisions: tuple[Precision | None, ...] = ("ieee", "tf32") if dtype == torch.float32 else (None,)
            for precision in precisions:
                problem = Problem(n, p, width - p, dtype, device, "cka_loss", "biased", precision, False, *grads)
                yield problem, {n: c for n, c in cost.predict(problem, sheet).items() if n in usable}


def status() -> dict[str, str | None]:
    """For each backend: None if it can run fp32 on this machine's GPU (without one, its CPU), else the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**{name: why_not(name, torch.float32, device) for name in _MODULES}, "reference": None}
