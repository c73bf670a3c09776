"""What autograd and its neighbours do around a call: other modes of differentiation, learned weights, other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor

import bird_kernels
from bird_kernels import RBF, Statistics, cka_loss
from tests.accuracy import features

Function = Callable[[Tensor, Tensor], Tensor]
CALLS: dict[str, dict[str, Any]] = {
    "biased": {},
    "unbiased": {"estimator": "unbiased"},
    "gaussian": {"kernel": RBF(1.5)},
    "sqrt": {"sqrt": True},
    "uncentred": {"center": False},
}


def loss_of(name: str) -> Function:
    return lambda x, y: cka_loss(x, y, **CALLS[name])


def pair() -> tuple[Tensor, Tensor]:
    return features(9, 3, 4, torch.float64, torch.device("cpu"), mean=1.0)


def by_differences(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-5) -> Tensor:
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


# ------------------------------------------------------------------------------------ forward mode


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("learned", [False, True])
def test_a_tangent_is_carried(name: str, learned: bool) -> None:
    x, y = pair()
    direction = torch.randn_like(x)
    with forward.dual_level():
        dual = forward.make_dual(x.clone().requires_grad_(learned), direction)
        values = loss_of(name)(dual, y), cka_loss([dual, dual], [y, y], **CALLS[name])
        one, two = (forward.unpack_dual(value).tangent for value in values)
    expected = by_differences(lambda x: loss_of(name)(x, y), x, direction)
    torch.testing.assert_close(one.detach(), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(two.detach(), 2 * expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cka", "hsic", "gram_mse"])
def test_jvp_of_the_other_statistics(name: str) -> None:
    x, y = pair()
    y = y[:, :3]
    function = getattr(bird_kernels, name)
    direction = torch.randn_like(y)
    _, found = torch.func.jvp(lambda y: function(x, y), (y,), (direction,))
    torch.testing.assert_close(found, by_differences(lambda y: function(x, y), y, direction), rtol=1e-6, atol=1e-9)


def test_a_backend_by_name_says_that_it_has_no_forward_mode() -> None:
    x, y = pair()
    with pytest.raises(RuntimeError, match=r'backend="library" has no forward-mode derivative: leave backend="auto"'):
        torch.func.jvp(lambda x: cka_loss(x, y, backend="library"), (x,), (x,))


# ------------------------------------------------------------------------------------ second derivatives


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("way", ["jacrev of grad", "hessian", "jacfwd of grad", "vectorized"])
def test_second_derivatives(name: str, way: str) -> None:
    """Against the literal formula, differentiated twice by PyTorch."""
    x, y = pair()
    function = lambda x: loss_of(name)(x, y)  # noqa: E731
    literal = lambda x: cka_loss(x, y, backend="reference", **CALLS[name])  # noqa: E731
    ways: dict[str, Callable[[], Any]] = {
        "jacrev of grad": lambda: torch.func.jacrev(torch.func.grad(function))(x),
        "hessian": lambda: torch.func.hessian(function)(x),
        "jacfwd of grad": lambda: torch.func.jacfwd(torch.func.grad(function))(x),
        "vectorized": lambda: torch.autograd.functional.hessian(function, x, vectorize=True),
    }
    torch.testing.assert_close(ways[way](), torch.autograd.functional.hessian(literal, x), rtol=1e-9, atol=1e-12)


def test_both_sides_have_second_derivatives() -> None:
    x, y = pair()
    found = torch.func.jacrev(torch.func.grad(cka_loss, argnums=1), argnums=0)(x, y)
    literal = lambda x, y: cka_loss(x, y, backend="reference")  # noqa: E731
    expected = torch.autograd.functional.hessian(literal, (x, y))[1][0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_third_derivatives() -> None:
    x, y = pair()

    def third(**options: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(cka_loss(leaf, y, **options), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first**3).sum(), leaf, create_graph=True)
        return torch.autograd.grad((second**2).sum(), leaf)[0]

    torch.testing.assert_close(third(), third(backend="reference"), rtol=1e-9, atol=1e-15)
    assert third().norm() > 1e-9


# ------------------------------------------------------------------------------------ batches of gradients


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_upstream_gradients(name: str) -> None:
    x, y = pair()
    x.requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (each,) = torch.autograd.grad(loss_of(name)(x, y), x, upstream, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss_of(name)(x, y), x)
    torch.testing.assert_close(each, upstream[:, None, None] * one, rtol=1e-12, atol=0)


def test_a_jacobian_of_many_pairs_at_once() -> None:
    x, y = pair()

    def losses(x: Tensor) -> Tensor:
        return bird_kernels.functional.cka_losses([x, x**2], [y, y])

    found = torch.autograd.functional.jacobian(losses, x, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(losses, x), rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------ traces


@pytest.mark.parametrize("name", ["cka_loss", "cka_matrix"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_keeps_no_number(name: str) -> None:
    x, y = pair()
    calls: dict[str, Function] = {
        "cka_loss": cka_loss,
        "cka_matrix": lambda x, y: bird_kernels.cka_matrix([x], [y]),
    }
    with pytest.raises(RuntimeError, match=r"keep this call's numbers as constants: use torch\.export"):
        torch.jit.trace(calls[name], (x, y))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_literal_formula_can_be_traced() -> None:
    x, y = pair()
    traced = torch.jit.trace(lambda x, y: cka_loss(x, y, backend="reference"), (x, y))
    torch.testing.assert_close(traced(x**2, y), cka_loss(x**2, y), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ learned weights


@pytest.mark.parametrize("kind", ["tensor", "list"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_weights_are_learned(kind: str, compiled: bool) -> None:
    (x, y), logits = pair(), torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    xs, ys = [x.clone().requires_grad_(), x**2], [y, y.float()]

    def total(logits: Tensor) -> Tensor:
        weights = logits.softmax(0)
        return cka_loss(xs, ys, weights=weights if kind == "tensor" else [*weights])

    run = torch.compile(total, backend="aot_eager") if compiled else total
    run(logits).backward()
    each = torch.stack([cka_loss(a, b).double() for a, b in zip(xs, ys, strict=True)]).detach()
    again = logits.detach().requires_grad_()
    (again.softmax(0) * each).sum().backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-6, atol=1e-9)
    (expected,) = torch.autograd.grad(cka_loss(xs[0], y), xs[0])
    torch.testing.assert_close(xs[0].grad, again.softmax(0)[0].detach() * expected, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------ inference mode


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", ["one", "list", "tokens"])
def test_a_teacher_in_inference_mode(name: str, shape: str) -> None:
    """Its rows, and a mask made there, are like any others."""
    x, y = pair()
    mask = torch.arange(len(x)) % 4 != 1

    def gradient(y: Tensor, mask: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        if shape == "one":
            cka_loss(leaf, y, mask=mask, **CALLS[name]).backward()
        elif shape == "list":
            cka_loss([leaf, leaf], [y, y], mask=mask, **CALLS[name]).backward()
        else:
            bird_kernels.token_cka_loss(leaf[None], y[None], mask=mask[None], **CALLS[name]).backward()
        return leaf.grad

    with torch.inference_mode():
        there = y.clone(), mask.clone()
    assert there[0].is_inference()
    assert gradient(*there).equal(gradient(y, mask))


def test_statistics_are_updated_in_inference_mode_and_outside() -> None:
    x, y = features(60, 5, 4, torch.float64, torch.device("cpu"))
    parts = [*zip(x.split(15), y.split(15), strict=True)]
    one, other = Statistics(), Statistics()
    with torch.inference_mode():
        one.update(*parts[0])
        other.update(*(part.clone() for part in parts[1]))
        copy = Statistics.from_state_dict(other.state_dict())
    one.update(*parts[2])
    one.merge(other)
    copy.merge(one)  # in place, on what was loaded there
    with torch.inference_mode():
        one.merge(Statistics())
        gradient = one.gradient(*parts[0])
    one.update(*parts[3])
    torch.testing.assert_close(one.cka(), bird_kernels.cka(x, y), rtol=1e-12, atol=0)
    assert copy.n == 60
    assert gradient.norm() > 0


# ------------------------------------------------------------------------------------ backends


def test_every_backend_takes_them(backend: str, device: torch.device) -> None:
    """The second call of the native backend is C++ from end to end."""
    x, y = features(32, 16, 12, device=device)
    leaf, upstream = x.clone().requires_grad_(), torch.tensor([1.0, -2.0], device=device)
    for _ in range(2):
        (expected,) = torch.autograd.grad(cka_loss(leaf, y, backend=backend), leaf)
    with torch.inference_mode():
        there = y.clone()
    (found,) = torch.autograd.grad(cka_loss(leaf, there, backend=backend), leaf)
    assert found.equal(expected)
    (found,) = torch.autograd.grad(cka_loss(leaf, y, backend=backend), leaf, upstream, is_grads_batched=True)
    torch.testing.assert_close(found, upstream[:, None, None] * expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(RuntimeError, match="keep this call's numbers as constants"):
        torch.jit.trace(lambda x, y: cka_loss(x, y, backend=backend), (x, y))


# ------------------------------------------------------------------------------------ threads


def test_threads_with_a_precision_leave_pytorchs_switch_alone() -> None:
    x, y = features(64, 32, 32, torch.float32, torch.device("cpu"))
    switch: Any = torch.backends.mkldnn.matmul
    before = switch.fp32_precision

    def work(precision: str) -> None:
        for _ in range(60):
            cka_loss(x, y, precision=precision, backend="library")

    for _ in range(3):
        threads = [threading.Thread(target=work, args=(p,)) for p in ("ieee", "tf32", "ieee", "tf32")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert switch.fp32_precision == before
