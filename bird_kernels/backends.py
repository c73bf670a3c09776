"""The backends by name, loaded when first used, and why one cannot run."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from .types import Problem

# A module each, with why_not(problem), stash_shapes(problem, route), forward(...) and backward(...). Best first.
_MODULES = {"triton": "bird_kernels.triton", "eager": "bird_kernels.eager"}

# "reference" is plain PyTorch under autograd, not an operator: `functional` calls it directly.
NAMES = ("auto", *_MODULES, "reference")


@lru_cache
def load(name: str) -> ModuleType:
    """The module of a backend that implements the operators."""
    return importlib.import_module(_MODULES[name])


def why_not(name: str, problem: Problem) -> str | None:
    """None if backend ``name`` can run ``problem``, else the reason in words."""
    try:
        reason: str | None = load(name).why_not(problem)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return reason


# Planning is asked for the same few problems over and over; Dynamo takes the answer as a constant instead of tracing
# through device queries.
@torch.compiler.assume_constant_result
@lru_cache(maxsize=4096)
def choose(problem: Problem, requested: str) -> tuple[str, dict[str, str]]:
    """(backend to use, {better backend: why it was not taken}).

    Raises:
        ValueError: ``requested`` names a backend that cannot run ``problem``.
    """
    if requested != "auto":
        reason = None if requested == "reference" else why_not(requested, problem)
        if reason is not None:
            raise ValueError(
                f'backend="{requested}" cannot run here: {reason}. backend="auto" takes the best that can.'
            )
        return requested, {}
    rejected = {}
    for name in _MODULES:
        reason = why_not(name, problem)
        if reason is None and name == "triton":
            reason = load(name).why_not_best(problem)
        if reason is None:
            return name, rejected
        rejected[name] = reason
    raise AssertionError("the eager backend runs everywhere")


def status() -> dict[str, str | None]:
    """For every backend None if it can run on this machine's best device, else why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = Problem(128, 512, 512, torch.float32, device)
    return {**{name: why_not(name, problem) for name in _MODULES}, "reference": None}
