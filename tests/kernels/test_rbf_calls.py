"""Gaussian kernels as PyTorch and users meet them: derivatives, transforms, operators, the plan and the words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bird_kernels
from bird_kernels import RBF, backends, cka_loss, plan, reference
from bird_kernels.backends.library_rbf import median
from bird_kernels.types import Problem
from tests.accuracy import described, evaluate, features, operator, poison
from tests.kernels.gaussian import RULES, N, P, Q, centred

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


@pytest.mark.parametrize(
    ("statistic", "masked"), [("cka_loss", False), ("cka_loss", True), ("hsic", False)], ids=["cka", "masked", "hsic"]
)
def test_derivatives(masked: bool, statistic: str, rule: RBF, estimator: str, device: torch.device) -> None:
    """Of both orders against finite differences, where sigma is not a constant that these would see moving."""
    x, y = (a.requires_grad_() for a in features(5, 2, 2, torch.float64, device, mean=1.0))
    mask = torch.arange(5, device=device) != 2 if masked else None
    function = operator("gram", "library", estimator, statistic, mask=mask, kernel=rule)
    if rule.flow or rule.sigma is not None:
        assert torch.autograd.gradcheck(function, (x, y))
        assert torch.autograd.gradgradcheck(function, (x, y))
        return

    def penalty(f) -> list[Tensor]:
        first = torch.autograd.grad(f(x, y), (x, y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    expected = penalty(lambda a, b: getattr(reference, statistic)(a, b, mask, estimator, rule))
    torch.testing.assert_close(penalty(function), expected, rtol=1e-9, atol=1e-14)


def test_transforms(rule: RBF, estimator: str, device: torch.device) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return cka_loss(x, y, kernel=rule, estimator=estimator)

    pairs = [features(9, 4, 6, device=device, seed=seed) for seed in range(2)]
    x, y = (torch.stack(side) for side in zip(*pairs, strict=True))
    expected = [evaluate(loss, *pair) for pair in pairs]
    torch.testing.assert_close(torch.vmap(loss)(x, y), torch.stack([e.value for e in expected]), rtol=0, atol=1e-7)
    gradients = torch.vmap(torch.func.grad(loss))(x, y)
    torch.testing.assert_close(gradients, torch.stack([e.dx for e in expected]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 2 * cka_loss(x.sin(), y, kernel=RBF(threshold=0.7, flow=True), estimator="unbiased")

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, y = features(N, P, Q, device=device)
    torch.testing.assert_close(evaluate(compiled, x, y), evaluate(loss, x, y), rtol=0, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("sides", ["x", "y"])
@pytest.mark.parametrize("rule", [RULES["fixed"], RULES["median"]], ids=str)
def test_operator_is_registered_right(sides: str, rule: RBF, memory: str, device: torch.device) -> None:
    """What the fake operators promise is what comes out, kept or streamed."""
    x, y = features(N, P, Q, device=device)
    call = described("gram", "library", wanted=(sides == "x", sides == "y"), kernel=rule)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bird.alignment.default, (x, y, None, *call), test_utils=tests)


def test_repeated_backwards_and_one_side(rule: RBF, estimator: str, memory: str, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    both = evaluate(operator("gram", "library", estimator, kernel=rule), x, y)
    for sides in ("x", "y"):
        found = evaluate(operator("gram", "library", estimator, kernel=rule), x, y, sides)
        gradient, expected = (found.dx, both.dx) if sides == "x" else (found.dy, both.dy)
        assert gradient.equal(expected)
    leaf = x.clone().requires_grad_()
    value = cka_loss(leaf, y, kernel=rule, estimator=estimator)
    first, second = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


# ---------------------------------------------------------------------------------------------- the plan, the words


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sides", [(True, False), (True, True)])
def test_workspace_is_what_is_kept(sides: tuple[bool, bool], streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streamed:
        monkeypatch.setattr(plan, "KEPT", 0)
    problem = Problem(700, 300, 200, torch.float32, CPU, x_grad=sides[0], y_grad=sides[1], kernel=RBF())
    shapes = backends.module_of("library", "rbf").stash_shapes(problem, "gram")
    kept = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
    assert plan.workspace(problem, "gram", "library") == pytest.approx(kept, rel=0.02)
    assert (kept < 700 * 700 * 4) == streamed


def test_streaming_holds_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a streamed call is a strip, not n x n."""
    monkeypatch.setattr(plan, "KEPT", 0)
    monkeypatch.setattr(plan, "STRIP", {"cpu": 16, "cuda": 16})
    monkeypatch.setattr(median, "DIGIT", 8)
    monkeypatch.setattr(median, "FEW", 0)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for a in out if isinstance(out, (tuple, list)) else [out]:
                largest = max(largest, a.untyped_storage().nbytes() // a.itemsize if isinstance(a, Tensor) else 0)
            return out

    x, y = features(256, 3, 4)
    with Largest():
        value, stash = backends.module_of("library", "rbf").forward(x, y, None, _problem(256), "gram")
        backends.module_of("library", "rbf").backward(torch.ones(()), x, y, None, stash, _problem(256), route="gram")
    assert 16 * 256 <= largest <= 2 * 16 * 256
    assert value.isfinite()


def _problem(n: int) -> Problem:
    return Problem(n, 3, 4, torch.float32, CPU, x_grad=True, y_grad=True, kernel=RBF())


def test_explain(device: torch.device) -> None:
    x, y = torch.zeros(2000, 30, device=device), torch.zeros(2000, 40, device=device)
    found = bird_kernels.explain(x.requires_grad_(), y, kernel=RBF(threshold=0.5))
    assert (found.route, found.backend) == ("gram", "library")
    assert "RBF(sigma=None, threshold=0.5, flow=False, median='lower')" in str(found)
    assert "kept" in found.tile
    assert found.flops == 2000**2 * (70 + 2 * 30)
    big = torch.empty(1, 1, device=device).expand(100_000, 8)
    streamed = bird_kernels.explain(big, big, kernel="rbf")
    assert "streamed" in streamed.tile
    assert streamed.flops == 100_000**2 * 16 * 4  # two passes for the median, row sums, moments


def test_the_native_backend_says_no() -> None:
    x, y = features(N, P, Q)
    with pytest.raises(ValueError, match='backend="native" cannot run here: has no kernels for kernel="rbf"'):
        cka_loss(x, y, kernel="rbf", backend="native")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(sigma=0.0), "positive and finite"),
        (dict(sigma=float("nan")), "positive and finite"),
        (dict(sigma=(1.0, -1.0)), "positive and finite"),
        (dict(threshold=float("inf")), "positive and finite"),
        (dict(sigma=1.0, threshold=1.0), "fixed sigma"),
        (dict(sigma=1.0, flow=True), "fixed sigma"),
    ],
)
def test_bandwidths_that_make_no_sense(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RBF(**options)


@pytest.mark.parametrize("function", [cka_loss, bird_kernels.hsic, bird_kernels.gram_mse, bird_kernels.explain])
def test_a_callable_is_refused_in_words(function) -> None:
    x, y = features(N, P, Q)
    with pytest.raises(TypeError, match=r'kernel must be "linear", "rbf" or an RBF.*feature map.*kernel="linear"'):
        function(x, y, kernel=torch.cdist)


def test_centered_gram(rule: RBF, device: torch.device) -> None:
    x = features(N, P, Q, device=device, mean=100.0)[0].reshape(N, 3, 7)
    found = bird_kernels.centered_gram(x, kernel=rule)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), centred(x.flatten(1).cpu(), rule), rtol=0, atol=1e-6)


def test_modules_take_it(device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    kernel = RBF(threshold=0.5)
    assert bird_kernels.CKALoss(kernel=kernel)(x, y).equal(cka_loss(x, y, kernel=kernel))
    assert bird_kernels.HSICLoss(kernel="rbf")(x, y).equal(bird_kernels.hsic(x, y, kernel=RBF()))
    assert "kernel=RBF(sigma=None, threshold=0.5" in repr(bird_kernels.CKALoss(kernel=kernel))
