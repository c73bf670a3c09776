"""Kernels that fail on a machine are left out: one warning, right numbers, and errors for who asked for them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bird_kernels import backends, cka_loss, cka_matrix, explain, tuning
from bird_kernels.backends import native, trust
from tests.accuracy import evaluate, features

pytest.importorskip("triton", reason="Triton does not exist for this system")
N, P, Q = 48, 33, 40
LATE = {"late": True, "early": False}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The Triton backend, where ``auto`` takes it as on a GPU without the native part; whoever tests may break it."""
    monkeypatch.setattr(backends, "compares", lambda device: True)
    monkeypatch.setattr(tuning, "key_of", lambda device: tuning.Key("NVIDIA H200", "", "", ""))
    monkeypatch.setattr(native, "why_not", lambda *call: "is not built")
    monkeypatch.delenv("BIRD_STRICT")
    trust._works.clear(), trust._broken.clear()
    backends.forget()
    yield backends.module_of("triton")
    trust._works.clear(), trust._broken.clear()
    backends.forget()


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*call: Any, **named: Any) -> Any:
        first, *rest = function(*call, **named)
        return (first * 1.5, *rest)

    return changed


def fails(function: Callable[..., Any]) -> Callable[..., Any]:
    def compiler(*_: Any, **named: Any) -> Any:
        raise RuntimeError("PassManager::run failed\nand much more")

    return compiler


def of_many(function: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    """The change for several pairs alone; one pair is a list of one."""
    return lambda *call: (change(function) if len(call[-1]) > 1 else function)(*call)


def loss_and_gradients(**options: Any) -> tuple[Tensor | None, ...]:
    return tuple(evaluate(lambda a, b: cka_loss(a, b, **options), *features(N, P, Q)))


def of_pairs(**options: Any) -> tuple[Tensor, ...]:
    sides = [a.requires_grad_() for pair in range(2) for a in features(N, P, Q, seed=pair)]
    losses = cka_loss(sides[::2], sides[1::2], **options)
    return losses.detach(), *torch.autograd.grad(losses, sides)


def assert_right(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_works_is_taken_and_tried_once(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = triton.forward
    monkeypatch.setattr(triton, "forward", lambda *call: (calls.append(call[0].shape[0]), forward(*call))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_right(loss_and_gradients(), loss_and_gradients(backend="library"))
    assert calls == [trust.ROWS, N, N]


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_that_does_not_compile(
    part: str, when: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its first use, or, as another variant of it, later."""
    if LATE[when]:
        loss_and_gradients()
    monkeypatch.setattr(triton, part, fails(getattr(triton, part)))
    expected = loss_and_gradients(backend="library")
    with pytest.warns(
        RuntimeWarning, match="triton backend's linear kernels of torch.float32 .*library runs instead"
    ) as seen:
        assert_right(loss_and_gradients(), expected)
    assert len(seen) == 1
    assert "RuntimeError: PassManager::run failed)" in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(loss_and_gradients(), expected)
    text = str(explain(*features(N, P, Q)))
    assert "  backend    library" in text
    assert "  not triton   failed on this machine: RuntimeError: PassManager::run failed" in text
    with pytest.raises(RuntimeError, match="PassManager"):
        loss_and_gradients(backend="triton")


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_computes_wrong_numbers(
    dtype: torch.dtype, part: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, part, wrong(getattr(triton, part)))
    x, y = features(N, P, Q, dtype)
    with pytest.warns(RuntimeWarning, match="its first result is wrong: (value|dx) is off by 0.5") as seen:
        found = evaluate(cka_loss, x, y, "x")
    assert len(seen) == 1
    assert_right(found, evaluate(lambda a, b: cka_loss(a, b, backend="library"), x, y, "x"))


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("many", [False, True], ids=["one", "pairs"])
def test_strict(many: bool, part: str, when: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRD_STRICT", "1")
    call, part = (of_pairs, f"{part}_together") if many else (loss_and_gradients, part)
    if LATE[when]:
        call()
    monkeypatch.setattr(triton, part, fails(getattr(triton, part)))
    with pytest.raises(RuntimeError, match="PassManager"):
        call()


def test_strict_takes_no_wrong_numbers(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRD_STRICT", "1")
    monkeypatch.setattr(triton, "forward", wrong(triton.forward))
    with pytest.raises(ArithmeticError, match=r"value is off by 0\.5"):
        loss_and_gradients()


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("part", ["forward_together", "backward_together"])
def test_pairs_go_one_by_one(part: str, when: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The single calls' kernels are others, and trusted by themselves."""
    if LATE[when]:
        of_pairs()
    monkeypatch.setattr(triton, part, of_many(getattr(triton, part), fails))
    with pytest.warns(RuntimeWarning, match="triton backend's pairs kernels .*, triton runs instead") as seen:
        found = of_pairs()
    assert len(seen) == 1
    assert_right(found, of_pairs(backend="library"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(of_pairs(), found)


def test_pairs_that_are_wrong(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "forward_together", of_many(triton.forward_together, wrong))
    with pytest.warns(RuntimeWarning, match=r"pairs kernels .* value is off by 0\.5"):
        found = of_pairs()
    assert_right(found, of_pairs(backend="library"))


@pytest.mark.parametrize("change", [fails, wrong])
@pytest.mark.parametrize("when", LATE)
def test_a_matrix_of_layers(
    when: str, change: Callable[..., Any], estimator: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, mask = [*features(N, P, Q)], torch.arange(N) % 3 > 0
    expected = cka_matrix([layer.double() for layer in layers], estimator=estimator, mask=mask).float()
    if LATE[when]:
        assert_right((cka_matrix(layers, estimator=estimator, mask=mask),), (expected,))
        if change is wrong:
            return  # what worked is not tried again
    monkeypatch.setattr(triton, "layer_products", change(triton.layer_products))
    with pytest.warns(RuntimeWarning, match="triton backend's layers kernels .*, plain PyTorch runs instead") as seen:
        assert_right((cka_matrix(layers, estimator=estimator, mask=mask),), (expected,))
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right((cka_matrix(layers, estimator=estimator, mask=mask),), (expected,))


def test_each_use_by_itself(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails for one dtype is still taken for another."""
    forward = triton.forward
    monkeypatch.setattr(
        triton, "forward", lambda x, *call: fails(forward)() if x.dtype == torch.float16 else forward(x, *call)
    )
    half, full = (features(N, P, Q, dtype) for dtype in (torch.float16, torch.float32))
    with pytest.warns(RuntimeWarning, match="torch.float16"):
        cka_loss(*half)
    assert explain(*half).backend == "library"
    assert explain(*full).backend == "triton"


@pytest.mark.parametrize("changes", [{"estimator": "unbiased"}, {"mask": torch.arange(N) % 3 > 0}], ids=str)
def test_each_variant_of_the_kernels_is_tried(
    changes: dict[str, Any], triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a first call was right says nothing of kernels compiled for other options."""
    forward = triton.forward

    def broken(x: Tensor, y: Tensor, mask: Tensor | None, problem: Any, route: Any) -> Any:
        is_other = problem.estimator == "unbiased" or mask is not None
        return (wrong(forward) if is_other else forward)(x, y, mask, problem, route)

    monkeypatch.setattr(triton, "forward", broken)
    loss_and_gradients()
    with pytest.warns(RuntimeWarning, match="its first result is wrong"):
        assert_right(loss_and_gradients(**changes), loss_and_gradients(backend="library", **changes))


def test_no_memory_is_no_fault_of_the_kernels(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*call: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loss_and_gradients()
    monkeypatch.setattr(triton, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        loss_and_gradients()
    assert explain(*features(N, P, Q)).backend == "triton"


def test_a_dispatch_mode_or_a_capture_is_not_disturbed(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small problem waits for the next call."""
    tried = []
    monkeypatch.setattr(trust, "_try", lambda *call: tried.append(call))
    x, y = features(N, P, Q)
    with Onlooker():
        cka_loss(x, y)
    problem = explain(x, y).problem
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        on_cuda = problem._replace(device=torch.device("cuda"))
        assert trust.failure_of(triton, triton, on_cuda, trust.use_of("triton", on_cuda)) is None
    assert tried == []
    assert backends.works("triton", problem)
    assert len(tried) == 1


def traced(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    compiled = torch.compile(cka_loss, backend="aot_eager", fullgraph=True)
    return tuple(evaluate(compiled, x, y, "x"))[:2]


def transformed(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    gradient, value = torch.func.grad_and_value(lambda a: cka_loss(a, y))(x)
    return value, gradient


def mapped(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    gradients, values = torch.func.vmap(torch.func.grad_and_value(lambda a: cka_loss(a, y)))(torch.stack([x, 2 * x]))
    return values[0], gradients[0]


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("call", [traced, transformed, mapped])
def test_traced_and_transformed_calls_are_tried_too(
    call: Callable[..., tuple[Tensor, ...]], part: str, triton: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(triton, part, fails(getattr(triton, part)))
    x, y = features(N, P, Q)
    expected = evaluate(lambda a, b: cka_loss(a, b, backend="library"), x, y, "x")[:2]
    with pytest.warns(RuntimeWarning, match="triton backend's linear kernels of torch.float32 .*library runs instead"):
        assert_right(call(x, y), expected)
    torch.compiler.reset()


def test_the_library_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIRD_STRICT")
    monkeypatch.setattr(backends.module_of("library"), "forward", fails(lambda: None))
    with pytest.raises(RuntimeError, match="PassManager"):
        loss_and_gradients()


@pytest.fixture
def shifted(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The library's own kernels, where ``auto`` takes them: for problems that are none of the Triton backend's."""
    monkeypatch.setattr(triton, "why_not", lambda *call: "is not asked")

    def shifts(dtype: torch.dtype, device: torch.device) -> bool:
        return trust.known_failure("library", backends.SHIFTED, dtype, device) is None

    monkeypatch.setattr(backends, "_shifts", lru_cache(shifts))
    return importlib.import_module("bird_kernels.backends.shifted")


@pytest.mark.parametrize("when", LATE)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_the_librarys_own_kernels_give_way_to_plain_pytorch(
    part: str, when: str, shifted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if LATE[when]:
        loss_and_gradients()
    monkeypatch.setattr(shifted, part, fails(getattr(shifted, part)))
    with pytest.warns(RuntimeWarning, match="library backend's shifted .* plain PyTorch runs instead") as seen:
        found = loss_and_gradients()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(loss_and_gradients(), found)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "compares", lambda device: False)
        assert_right(found, loss_and_gradients(backend="library"))


def test_a_backward_belongs_to_its_forward(shifted: ModuleType) -> None:
    """Whatever has been left out between the two."""
    x, y = features(N, P, Q)
    expected = evaluate(lambda a, b: cka_loss(a, b, backend="library"), x, y, "x")
    x.requires_grad_()
    loss = cka_loss(x, y)
    problem = explain(x, y).problem
    with pytest.warns(RuntimeWarning, match="shifted"):
        backends.replace("library", problem, RuntimeError("elsewhere"))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, expected.dx, rtol=1e-4, atol=1e-6)
