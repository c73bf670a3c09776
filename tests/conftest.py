"""One suite for every machine: its device and its backends are fixtures, so a GPU runs at least what CI interprets."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"  # Triton kernels run in its interpreter, a thousand times slower
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any import of one


# No Triton for this system: no tests of its kernels.
BACKENDS = ["eager", "triton"] if importlib.util.find_spec("triton") else ["eager"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: not for interpreted kernels, which are slow; compiled ones run it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton kernels have no fp64, and the interpreter few problems: other tests do not exist, rather than skip."""

    def exists(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") != "triton":
            return True
        return params.get("dtype") != torch.float64 and not (INTERPRETED and item.get_closest_marker("compiled"))

    config.hook.pytest_deselected(items=[item for item in items if not exists(item)])
    items[:] = [item for item in items if exists(item)]


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
