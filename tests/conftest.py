"""One suite for every machine: its device and its backends are fixtures, so a GPU runs at least what CI interprets."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from bird_kernels.plan import FEW_ROWS
from tests import selection

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"  # Triton's and CUDA's kernels are emulated, a thousand times slower
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any import of one
    os.environ.setdefault("BIRD_EMULATE", "1")
os.environ.setdefault("BIRD_STRICT", "1")  # a kernel that fails is a failure, not a fallback
os.environ.setdefault("BIRD_TUNING", "off")  # what somebody measured on this machine decides nothing

# No Triton for this system, no native part built: no tests of its kernels.
NEEDS = {"library": "torch", "triton": "triton", "native": "bird_kernels._native"}
BACKENDS = [name for name, module in NEEDS.items() if importlib.util.find_spec(module)]


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: not for emulated kernels, which are slow; compiled ones run it")
    config.addinivalue_line("markers", "smoke: what --quick runs of its file, whose first test takes seconds")
    config.addinivalue_line("markers", "short(why, keep): the cells of a grid that run without --all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Our kernels have no fp64, one route and few rows, and emulation few problems: other tests do not exist, rather
    than skip. Of those that do, tests/selection.py takes what was asked for."""

    def exists(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        if backend not in ("triton", "native"):
            return True
        if params.get("route") == "cross" or params.get("shape", (0,))[0] > FEW_ROWS:
            return False
        return params.get("dtype") != torch.float64 and not (INTERPRETED and item.get_closest_marker("compiled"))

    chosen = selection.select(config, [item for item in items if exists(item)])
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["gram", "cross"])
def route(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["biased", "unbiased"])
def estimator(request: pytest.FixtureRequest) -> str:
    return request.param
