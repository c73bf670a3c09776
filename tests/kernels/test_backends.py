"""Which backend runs, and the reasons of those that do not. No GPU is needed to ask."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import bird_kernels
from bird_kernels import backends

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton does not exist for this system"
)


@pytest.mark.parametrize("device", [CPU, GPU, torch.device("mps"), torch.device("meta")], ids=str)
def test_eager_runs_everything(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert backends.why_not("eager", dtype, device) is None


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "device", "capability", "words"),
    [
        (torch.float64, GPU, (9, 0), "fp64"),
        (torch.float32, torch.device("mps"), (9, 0), "needs an NVIDIA GPU, these tensors are on mps"),
        (torch.float32, GPU, (7, 5), "needs compute capability 8.0 or newer, this GPU has 7.5"),
        (torch.float32, GPU, (8, 0), None),
        (torch.bfloat16, GPU, (10, 0), None),
    ],
    ids=str,
)
def test_why_not_triton(
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = backends.why_not("triton", dtype, device)
    assert reason is None if words is None else words in reason


@needs_triton
def test_triton_wants_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "needs an NVIDIA GPU" in backends.why_not("triton", torch.float32, GPU)


@needs_triton
def test_triton_on_the_cpu_is_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "CPU" in backends.why_not("triton", torch.float32, CPU)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert backends.why_not("triton", torch.float32, CPU) is None


def test_auto_takes_the_best_and_remembers_the_others() -> None:
    name, rejected = backends.choose(torch.float32, CPU, "auto")
    assert name == "eager"
    assert set(rejected) == {"triton"}
    assert rejected["triton"]


def test_a_backend_that_was_asked_for_runs_or_raises() -> None:
    assert backends.choose(torch.float64, CPU, "eager") == ("eager", {})
    assert backends.choose(torch.float64, CPU, "reference") == ("reference", {})
    with pytest.raises(ValueError, match=r'backend="triton" cannot run here: .*backend="auto"'):
        backends.choose(torch.float64, CPU, "triton")


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error of the import, and not of a call that another backend can serve."""

    def load(name: str):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return real(name)

    real = backends.load
    monkeypatch.setattr(backends, "load", load)
    reason = "cannot be imported (No module named 'triton')"
    assert backends.why_not("triton", torch.float32, GPU) == reason
    nowhere_else_asked = torch.device("cuda:63")  # answers are remembered
    assert backends.choose(torch.float32, nowhere_else_asked, "auto") == ("eager", {"triton": reason})


def test_names_are_those_of_the_public_option() -> None:
    assert backends.NAMES == ("auto", "triton", "eager", "reference")
    status = bird_kernels.backend_status()
    assert set(status) == {"triton", "eager", "reference"}
    assert status["eager"] is None
    assert status["reference"] is None
