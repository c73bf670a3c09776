"""The backends by name, loaded when first used, and why one cannot run."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import get_args

import torch

from .. import timings
from ..plan import FEW_ROWS, are_few, variant
from ..types import Problem, Variant

# A module each, with why_not(dtype, device), stash_shapes(problem, route), forward(...) and backward(...). Best first.
_MODULES = {name: f"bird_kernels.backends.{name}" for name in ("native", "triton", "library")}

_ALL: tuple[Variant, ...] = get_args(Variant)
_VARIANTS = {"native": ("linear",), "triton": ("linear", "sqrt=True", 'kernel="rbf"'), "library": _ALL}

# Those that compute Gaussian kernels, by the backend they belong to.
_RBF = {"triton": "bird_kernels.backends.triton.gaussian", "library": "bird_kernels.backends.library_rbf"}

# "reference" is plain PyTorch under autograd, not an operator: `functional` calls it directly.
NAMES = ("auto", *_MODULES, "reference")


@lru_cache
def load(name: str, kernel: str = "linear") -> ModuleType:
    """The module of a backend that implements the operators for a "linear" or "rbf" kernel."""
    return importlib.import_module((_MODULES if kernel == "linear" else _RBF)[name])


def of(problem: Problem, name: str) -> ModuleType:
    """The module of backend ``name`` that computes this problem."""
    if name == "library" and _shifts(problem.dtype, problem.device) and problem.kernel is None:
        shifted = importlib.import_module("bird_kernels.backends.shifted")
        if shifted.takes(problem):
            return shifted
    return load(name) if problem.kernel is None else load(name, "rbf")


@lru_cache
def _shifts(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether library products are prepared and finished by Triton here."""
    return device.type == "cuda" and torch.cuda.is_available() and why_not("triton", dtype, device) is None


def why_not(
    name: str, dtype: torch.dtype, device: torch.device, few_rows: bool = True, variant: Variant = "linear"
) -> str | None:
    """None if backend ``name`` can run products of ``dtype`` on ``device``, else the reason in words.

    ``few_rows``: the problem has at most `plan.FEW_ROWS`. ``variant``: `plan.variant` of it.
    """
    if variant not in _VARIANTS[name]:
        return f"has no kernels for {variant}"
    if name != "library" and variant in ("linear", "sqrt=True") and not few_rows:
        return f"takes at most {FEW_ROWS} rows"
    try:
        reason: str | None = load(name).why_not(dtype, device)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return reason


def choose(
    dtype: torch.dtype, device: torch.device, few_rows: bool, requested: str, variant: Variant = "linear"
) -> tuple[str, dict[str, str]]:
    """(backend to use, {better backend: why it was not taken}); ``few_rows`` and ``variant`` as in `why_not`.

    Raises:
        ValueError: ``requested`` names a backend that cannot run.
    """
    return _choose(dtype, device, few_rows, requested, variant)


# Dynamo takes the answer as a constant instead of tracing into device queries and imports. (It would look through an
# lru_cache, so that is one call further down.) Of the sizes, which may be symbolic, it is told one bit.
# This is all that torch.compiler.assume_constant_result does, but for importing Dynamo (and Triton) along the way: 1.5
# s.
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
        reason = why_not(name, dtype, device, few_rows, variant)
        if reason is None and name != "library" and device.type == "cpu":
            reason = "is emulated here, for tests only"
        if reason is None:
            return name, rejected
        rejected[name] = reason
    raise AssertionError("the library backend runs everywhere")


def resolve(problem: Problem, requested: str) -> str:
    """The backend of a call: `choose`, and on a GPU what was measured; not for "reference".

    Raises:
        ValueError: as `choose`.
    """
    name, _ = choose(problem.dtype, problem.device, are_few(problem.n), requested, variant(problem))
    if requested == "auto" and problem.device.type == "cuda" and not torch.compiler.is_compiling():
        name, _ = prefer(problem, name)  # compiled, sizes may be symbolic
    return name


def prefer(problem: Problem, default: str) -> tuple[str, str]:
    """(the backend that was fastest nearest to this problem on this device, in words why); else (``default``, "")."""
    if problem.device.type != "cuda" or variant(problem) != "linear":  # nothing else is measured
        return default, ""
    return _prefer(problem, default, torch.backends.cuda.matmul.fp32_precision)


@lru_cache(maxsize=1024)
def _prefer(problem: Problem, default: str, switch: str) -> tuple[str, str]:
    candidates = [name for name in _MODULES if why_not(name, problem.dtype, problem.device, are_few(problem.n)) is None]
    precision: str = problem.precision or ("tf32" if switch == "tf32" else "ieee")
    dtype = str(problem.dtype).removeprefix("torch.")
    finding = timings.nearest(
        torch.cuda.get_device_name(problem.device), dtype, precision if dtype == "float32" else "", problem.estimator,
        timings.Shape(problem.n, problem.p, problem.q),
    )  # fmt: skip
    name = timings.fastest(finding, candidates)
    if name is None or finding is None:
        return default, ""
    measured = ", ".join(f"{candidate} {finding.seconds[candidate] * 1e6:.3g} us" for candidate in candidates)
    return name, f"fastest at {' x '.join(map(str, finding.shape))}: {measured}"


def is_always_native(requested: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every problem of few rows that asks for ``requested`` goes to the native backend, whatever its sizes.

    Not where another was faster at some of them on this device: there ``auto`` compares.
    """
    if why_not("native", dtype, device) is not None:
        return False
    if requested == "auto" and device.type == "cuda":
        candidates = [name for name in _MODULES if why_not(name, dtype, device) is None]
        kind = str(dtype).removeprefix("torch.")
        if not timings.is_always_fastest("native", torch.cuda.get_device_name(device), kind, candidates):
            return False
    return choose(dtype, device, True, requested)[0] == "native"


def status() -> dict[str, str | None]:
    """For every backend None if it can run on this machine's best device, else why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**{name: why_not(name, torch.float32, device) for name in _MODULES}, "reference": None}
