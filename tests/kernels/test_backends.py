"""Which backend runs, and the reasons of those that do not. No GPU is needed to ask."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bird_kernels
from bird_kernels import backends, tuning
from bird_kernels.backends import native
from bird_kernels.types import Problem

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")

ROOT = Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(
    importlib.util.find_spec("bird_kernels._native") is None, reason="the native part is not built"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton does not exist for this system"
)


@pytest.mark.parametrize("device", [CPU, GPU, torch.device("mps"), torch.device("meta")], ids=str)
def test_eager_runs_everything(device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert backends.why_not("library", dtype, device) is None


@pytest.mark.parametrize(
    "name", [pytest.param("triton", marks=needs_triton), pytest.param("native", marks=needs_native)]
)
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
def test_why_not_kernels(
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
    words: str | None,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    if name == "native":
        monkeypatch.setattr(native._module, "CUDA", True)
    reason = backends.why_not(name, dtype, device)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    "name", [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
def test_our_linear_kernels_take_few_rows(name: str) -> None:
    assert backends.why_not(name, torch.float32, CPU, few_rows=False) == "takes at most 512 rows"
    x = torch.zeros(513, 2)
    with pytest.raises(ValueError, match=f'backend="{name}" cannot run here: takes at most 512 rows'):
        bird_kernels.cka_loss(x, x, backend=name)


@needs_native
def test_native_on_the_cpu_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIRD_EMULATE", raising=False)
    assert "CPU" in backends.why_not("native", torch.float32, CPU)
    monkeypatch.setenv("BIRD_EMULATE", "1")
    assert backends.why_not("native", torch.float32, CPU) is None


def test_native_that_is_not_built_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Python that cannot see the extension; asked in another process, because an import is remembered."""
    code = (
        "import sys, torch; sys.modules['bird_kernels._native'] = None\n"
        "from bird_kernels import backends\n"
        "print(backends.why_not('native', torch.float32, torch.device('cuda:0')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "is not built: BIRD_BUILD_EXT=1 pip install --no-build-isolation ."


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
    name, rejected = backends.choose(torch.float32, CPU, True, "auto")
    assert name == "library"
    assert set(rejected) == {"native", "triton"}
    assert all(rejected.values())


def test_a_backend_that_was_asked_for_runs_or_raises() -> None:
    assert backends.choose(torch.float64, CPU, True, "library") == ("library", {})
    assert backends.choose(torch.float64, CPU, True, "reference") == ("reference", {})
    with pytest.raises(ValueError, match=r'backend="triton" cannot run here: .*backend="auto"'):
        backends.choose(torch.float64, CPU, True, "triton")


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error of the import, and not of a call that another backend can serve."""

    def load(name: str):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return real(name)

    real = backends.module_of
    monkeypatch.setattr(backends, "module_of", load)
    reason = "cannot be imported (No module named 'triton')"
    assert backends.why_not("triton", torch.float32, GPU) == reason
    nowhere_else_asked = torch.device("cuda:63")  # answers are remembered
    assert backends.choose(torch.float32, nowhere_else_asked, False, "auto") == (
        "library",
        {"native": "takes at most 512 rows", "triton": "takes at most 512 rows"},
    )


def test_names_are_those_of_the_public_option() -> None:
    assert backends.NAMES == ("auto", "native", "triton", "library", "reference")
    status = bird_kernels.backend_status()
    assert set(status) == {"native", "triton", "library", "reference"}
    assert status["library"] is None
    assert status["reference"] is None


@pytest.mark.parametrize(
    ("size", "missing", "expected"),
    [
        ((128, 512, 4), "", "native"),  # launches decide: 41 us of the host, 1.3 times that below Triton's 56
        ((128, 512, 33), "", "triton"),  # more pairs than the native kernels take
        ((512, 512, 12), "", "triton"),  # each feature is centred ten times by the native kernels
        ((128, 512, 4), "triton", "native"),
        ((512, 512, 12), "triton", "native"),  # still less than 12 pairs by launches of their own
        ((128, 512, 4), "native", "triton"),
        ((128, 512, 4), "native triton", None),
        ((128, 512, 65), "", None),
    ],
)
def test_whose_launches_pairs_share(
    size: tuple[int, int, int], missing: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted for an H200; asked for by name, a backend shares its own up to its limit."""
    n, d, pairs = size
    monkeypatch.setattr(backends, "_why_not_auto", lambda name, *kind: "gone" if name in missing.split() else None)
    monkeypatch.setattr(backends, "why_not", lambda name, *kind: None)
    monkeypatch.setattr(backends, "works", lambda *use: True)
    monkeypatch.setattr(tuning, "key_of", lambda device: tuning.Key("NVIDIA H200", "", "", ""))
    problems = [Problem(n, d, d, torch.float32, torch.device("cuda:61"), precision="tf32")] * pairs
    backends.forget()
    assert backends.sharing(problems, "auto") == expected
    backends.forget()
    assert backends.sharing(problems, "native") == ("native" if pairs <= 32 else None)
    assert backends.sharing(problems, "triton") == ("triton" if pairs <= 64 else None)
    assert backends.sharing(problems, "library") is None
    on_the_cpu = [problem._replace(device=CPU) for problem in problems]
    assert backends.sharing(on_the_cpu, "auto") is None
