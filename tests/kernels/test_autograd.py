"""What autograd gives the plain formula for free: higher derivatives, transforms, any strides, repeated backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import reference
from tests.accuracy import evaluate, features, operator
from tests.selection import short

COMPILED = pytest.mark.compiled
N, P, Q = 37, 21, 30
SIDES = ["x", "y", "xy"]


def small(device: torch.device, sides: str = "xy") -> tuple[Tensor, Tensor]:
    x, y = features(6, 3, 4, torch.float64, device, mean=1.0)
    return x.requires_grad_("x" in sides), y.requires_grad_("y" in sides)


@short(
    "with a mask both sides of either statistic, which have every term; one side alone, and no mask, leaves terms out",
    lambda masked, sides, statistic: masked == (sides == "xy") and (masked or statistic == "cka_loss"),
)
@pytest.mark.parametrize("statistic", ["cka_loss", "hsic"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(
    masked: bool, sides: str, statistic: str, estimator: str, route: str, device: torch.device
) -> None:
    """First and second ones against finite differences; fp64, so on library products."""
    mask = torch.arange(6, device=device) != 2 if masked else None
    function = operator(route, "library", estimator, statistic, mask=mask)
    assert torch.autograd.gradcheck(function, small(device, sides))
    assert torch.autograd.gradgradcheck(function, small(device, sides))


@pytest.mark.parametrize("sides", SIDES)
def test_double_backward(sides: str, estimator: str, route: str, backend: str, device: torch.device) -> None:
    """A gradient penalty in fp32: every backend's second derivative is the reference's."""
    x, y = features(N, P, Q, device=device)

    def penalty(function, x: Tensor, y: Tensor) -> list[Tensor]:
        leaves = [a.detach().requires_grad_() for a, name in ((x, "x"), (y, "y")) if name in sides]
        x, y = leaves if sides == "xy" else ((leaves[0], y) if sides == "x" else (x, leaves[0]))
        first = torch.autograd.grad(function(x, y), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def literal(x: Tensor, y: Tensor) -> Tensor:
        return reference.cka_loss(x, y, None, estimator)

    found = penalty(operator(route, backend, estimator), x, y)
    expected = penalty(literal, x.double(), y.double())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()


def test_func_grad(estimator: str, backend: str, device: torch.device) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return bird_kernels.cka_loss(x, y, estimator=estimator, backend=backend)

    x, y = features(N, P, Q, device=device)
    expected = evaluate(loss, x, y)
    dx, value = torch.func.grad_and_value(loss)(x, y)
    torch.testing.assert_close((value, dx), (expected.value, expected.dx), rtol=0, atol=1e-7)
    both = torch.func.grad(loss, argnums=(0, 1))(x, y)
    torch.testing.assert_close(both, (expected.dx, expected.dy), rtol=0, atol=1e-7)
    assert torch.func.grad(loss, argnums=1)(x, y).equal(evaluate(loss, x, y, "y").dy)


@short(
    "a backend's kernels see one problem after the other, as the library does: each estimator with and without a mask",
    lambda backend, masked, estimator: backend == "library" or masked == (estimator == "unbiased"),
)
@pytest.mark.parametrize("in_dims", [(0, None), *(pytest.param(dims, marks=COMPILED) for dims in ((0, 0), (1, 2)))])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap(
    in_dims: tuple[int, int | None], masked: bool, estimator: str, backend: str, device: torch.device
) -> None:
    """A batch of problems is a batch of losses, and under vmap(grad) of gradients."""
    batch = 2
    pairs = [features(9, 4, 6, device=device, seed=seed) for seed in range(batch)]
    masks = torch.rand(batch, 9, generator=torch.Generator().manual_seed(0)).to(device) > 0.2

    def loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        mask = mask if masked else None
        return bird_kernels.cka_loss(x, y, mask=mask, estimator=estimator, backend=backend)

    def stacked(side: int) -> Tensor:
        dim = in_dims[side]
        return pairs[0][side] if dim is None else torch.stack([pair[side] for pair in pairs], dim)

    xs, ys = stacked(0), stacked(1)
    members = [(pairs[i][0], pairs[0 if in_dims[1] is None else i][1], masks[i]) for i in range(batch)]
    found = torch.vmap(loss, (*in_dims, 0))(xs, ys, masks)
    assert found.shape == (batch,)
    torch.testing.assert_close(found, torch.stack([loss(*member) for member in members]), rtol=0, atol=1e-7)
    gradients = torch.vmap(torch.func.grad(loss), (*in_dims, 0))(xs, ys, masks)
    expected = torch.stack([torch.func.grad(loss)(*member) for member in members])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-7)


def test_backward_twice(estimator: str, route: str, backend: str, device: torch.device) -> None:
    x, y = (a.requires_grad_() for a in features(N, P, Q, device=device))
    value = operator(route, backend, estimator)(x, y)
    first = torch.autograd.grad(value, (x, y), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, (x, y))
    for one, two, then in zip(first, second, kept, strict=True):
        assert two.equal(then)
        assert one.equal(then)  # the second pass must not write over what the first returned
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, (x, y))


def test_two_calls_before_their_backwards(route: str, backend: str, device: torch.device) -> None:
    """Nothing is shared between calls: layers of one model are aligned together."""
    function = operator(route, backend)
    pairs = [features(N, P, Q, device=device, seed=seed) for seed in (0, 1)]
    alone = [evaluate(function, *pair) for pair in pairs]
    leaves = [[a.detach().requires_grad_() for a in pair] for pair in pairs]
    torch.stack([function(*pair) for pair in leaves]).sum().backward()
    for (x, y), expected in zip(leaves, alone, strict=True):
        assert x.grad.equal(expected.dx)
        assert y.grad.equal(expected.dy)


def test_modified_inputs_are_noticed(route: str, backend: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    x.requires_grad_()
    value = operator(route, backend)(x, y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_frozen_side_costs_nothing(route: str, backend: str, device: torch.device) -> None:
    """No gradient for the teacher, and what only its gradient needs is not even kept."""
    x, y = features(N, P, Q, device=device)

    def kept(sides: str) -> int:
        sizes = []
        inputs = [a.detach().clone().requires_grad_(name in sides) for name, a in (("x", x), ("y", y))]
        pointers = {a.data_ptr() for a in inputs}

        def pack(saved: Tensor) -> Tensor:
            sizes.append(saved.nbytes if saved.data_ptr() not in pointers else 0)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            value = operator(route, backend)(*inputs)
        value.backward()
        assert [a.grad is not None for a in inputs] == ["x" in sides, "y" in sides]
        return sum(sizes)

    assert kept("x") <= kept("xy")
    if route == "cross":
        assert kept("xy") - kept("x") >= Q * Q * 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode, estimator: str, backend: str, device: torch.device) -> None:
    x, y = (a.requires_grad_() for a in features(N, P, Q, device=device))
    options = dict(estimator=estimator, backend=backend)
    expected = bird_kernels.cka_loss(x, y, **options)
    with mode():
        found = bird_kernels.cka_loss(x, y, **options)
        made_inside = bird_kernels.cka_loss(x.clone(), y.clone(), **options)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(made_inside, expected.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("inside", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=COMPILED)], ids=str)
def test_autocast_changes_nothing(
    dtype: torch.dtype, inside: str, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Autocast would round fp32 features before their products; the loss stays what it is without."""
    x, y = features(N, P, Q, device=device, mean=3.0)
    function = operator(route, backend, estimator)
    expected = evaluate(function, x, y)
    leaves = [a.clone().requires_grad_() for a in (x, y)]
    with torch.autocast(device.type, dtype):
        value = function(*leaves)
        if inside == "forward and backward":
            value.backward()
    if inside == "forward":
        value.backward()
    assert value.dtype == torch.float32
    assert value.equal(expected.value)
    assert leaves[0].grad.equal(expected.dx)
    assert leaves[1].grad.equal(expected.dy)
