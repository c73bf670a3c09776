"""What else follows from the same moments: 1 - sqrt(CKA), alignment without centring, the mean difference of Grams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import RBF, CKALoss, backends, cka, cka_loss, explain, gram_mse, reference
from tests.accuracy import errors, evaluate, features, operator, poison, truth
from tests.selection import short

N, P, Q = 37, 21, 30
KERNELS = {"linear": None, "rbf": RBF()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> RBF | None:
    return KERNELS[request.param]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poison():
        yield


def literal(name: str, x: Tensor, y: Tensor) -> Tensor:
    """From Gram matrices, as published; fp64."""
    x, y = x.double(), y.double()
    if name == "uncentred":
        k, l = x @ x.T, y @ y.T
        return 1 - (k * l).sum() / (k.norm() * l.norm())
    h = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    if name == "gram_mse":
        return (k - l).square().mean()
    return 1 - ((k * l).sum() / (k.norm() * l.norm())).sqrt()


FUNCTIONS = {
    "sqrt": lambda x, y, **options: cka_loss(x, y, sqrt=True, **options),
    "uncentred": lambda x, y, **options: cka_loss(x, y, center=False, **options),
    "gram_mse": gram_mse,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(37, 21, 30), (61, 5, 3), (2, 4, 3)], ids=str)
def test_the_published_formula(
    shape: tuple[int, int, int], mean: float, backend: str, name: str, device: torch.device
) -> None:
    x, y = features(*shape, torch.float64, device, mean=mean)
    found = evaluate(lambda a, b: FUNCTIONS[name](a, b, backend=backend), x, y)
    true = evaluate(lambda a, b: literal(name, a, b), x, y)
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("statistic", "center"), [("cka_loss", False), ("gram_mse", True), ("gram_mse", False)])
@short("all in fp32; in the other dtypes under a mask", lambda dtype, masked: dtype == torch.float32 or masked)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "route"), [(None, "gram"), (None, "cross"), (RBF(), "gram")], ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, masked: bool, statistic: str, center: bool, kernel: RBF | None, route: str, device: torch.device
) -> None:
    x, y = features(N, P, Q, dtype, device, mean=1.0)
    mask = torch.arange(N, device=device) % 3 != 1 if masked else None
    options = dict(mask=mask, kernel=kernel, center=center)
    found = evaluate(operator(route, "library", statistic=statistic, **options), x, y, upstream=64.0)
    true = truth(x, y, statistic=statistic, **options, upstream=64.0)
    found_errors = errors(found, true)
    found_errors["value"] /= max(1.0, true.value.item())
    allowed = {torch.float64: 1e-12, torch.float32: 3e-6}
    assert max(found_errors.values()) < allowed.get(dtype, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("choice", KERNELS)
def test_derivatives(choice: str, name: str, device: torch.device) -> None:
    x, y = (a.requires_grad_() for a in features(5, 2, 3, torch.float64, device))
    kernel = RBF(flow=True) if choice == "rbf" else "linear"
    assert torch.autograd.gradcheck(lambda a, b: FUNCTIONS[name](a, b, kernel=kernel), (x, y))
    assert torch.autograd.gradgradcheck(lambda a, b: FUNCTIONS[name](a, b, kernel=kernel), (x, y))


# ---------------------------------------------------------------------------------------------- sqrt


@pytest.mark.parametrize("backend", ["library", "triton", "reference"])
def test_sqrt_where_nothing_is_shared(backend: str, device: torch.device) -> None:
    """Orthogonal features: CKA is exactly 0, where the root has no slope."""
    if backend == "triton":
        pytest.importorskip("triton")
    x, y = (torch.tensor(a, device=device)[:, None] for a in ([1.0, -1, 1, -1], [1.0, 1, -1, -1]))
    found = evaluate(lambda a, b: cka_loss(a, b, sqrt=True, backend=backend), x, y)
    assert found.value == 1.0
    assert found.dx.eq(0).all()
    assert found.dy.eq(0).all()


# ---------------------------------------------------------------------------------------------- center


@pytest.mark.parametrize("route", ["gram", "cross"])
@pytest.mark.parametrize("scales", [(1e-12, 1e12), (1e12, 1e12), (1.0, 1e-12)])
def test_uncentred_is_a_cosine(scales: tuple[float, float], route: str, device: torch.device) -> None:
    """Scale does not matter; a common offset does, and as features all alike it is everything."""
    x, y = features(N, P, Q, device=device, mean=1.0)
    function = operator(route, "library", center=False)
    found = evaluate(function, scales[0] * x, scales[1] * y)
    true = truth(scales[0] * x, scales[1] * y, center=False)
    assert max(errors(found, true).values()) < 2e-6
    assert abs(function(x, y) - function(x + 1, y)) > 1e-3
    ones = torch.ones(N, 3, device=device)
    torch.testing.assert_close(function(ones, ones), torch.zeros((), device=device), rtol=0, atol=1e-6)


@pytest.mark.parametrize("route", ["gram", "cross"])
def test_uncentred_zeros_have_no_answer(route: str, device: torch.device) -> None:
    x, y = torch.zeros(N, P, device=device), features(N, P, Q, device=device)[1]
    found = evaluate(operator(route, "library", center=False), x, y)
    assert found.value == 1.0
    assert found.dx.eq(0).all()
    assert found.dy.eq(0).all()


def test_cka_takes_it_too(device: torch.device) -> None:
    x, y = features(N, P, Q, torch.float64, device, mean=1.0)
    for kernel in ("linear", "rbf"):
        options = dict(kernel=kernel, center=False)
        torch.testing.assert_close(cka(x, y, **options), 1 - cka_loss(x, y, **options))


# ---------------------------------------------------------------------------------------------- gram_mse


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_gram_mse_of_nearly_equal_geometry(noise: float, kernel: RBF | None, device: torch.device) -> None:
    """The difference is formed before it is squared: of equal features exactly zero, else right to its own size."""
    x, other = features(N, P, P, device=device)
    y = x + noise * other
    found = evaluate(lambda a, b: gram_mse(a, b, kernel=kernel or "linear"), x, y)
    true = truth(x, y, statistic="gram_mse", kernel=kernel)
    if noise == 0:
        assert found.value == 0
        nothing = evaluate(lambda a, b: gram_mse(a, 0 * b, kernel=kernel or "linear"), x, y)
        assert found.dx.norm() < 1e-6 * nothing.dx.norm()
        return
    assert abs(found.value - true.value) < 2e-6 / noise * true.value
    assert (found.dx - true.dx).norm() < 2e-6 / noise * true.dx.norm()


@pytest.mark.parametrize("route", ["gram", "cross"])
@pytest.mark.parametrize("sizes", [(1e-4, 1.0), (100.0, 1.0), (1e4, 1e4)])
def test_gram_mse_of_different_sizes(sizes: tuple[float, float], route: str, device: torch.device) -> None:
    """With a mean that asks for the careful centring, whose scale both sides must share."""
    x, y = (size * (a + 3000.0) for size, a in zip(sizes, features(N, P, Q, device=device), strict=True))
    found, true = evaluate(operator(route, "library", statistic="gram_mse"), x, y), truth(x, y, statistic="gram_mse")
    found_errors = errors(found, true)
    assert found_errors["value"] < 1e-5 * true.value
    assert max(found_errors["dx"], found_errors["dy"]) < 1e-5


def test_gram_mse_of_a_constant_teacher_has_a_gradient(device: torch.device) -> None:
    """The student's Gram matrix shrinks."""
    x, flat = features(N, P, Q, device=device)[0], torch.full((N, Q), 0.1, device=device)
    found = evaluate(gram_mse, x, flat)
    true = truth(x, flat, statistic="gram_mse")
    assert (found.dx - true.dx).norm() < 1e-6 * true.dx.norm()
    assert found.dy.eq(0).all()


# ---------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("options", "native", "triton"),
    [
        (dict(sqrt=True), "has no kernels for sqrt=True", None),
        (dict(center=False), "has no kernels for center=False", "has no kernels for center=False"),
        (dict(center=False, kernel="rbf"), "has no kernels for center=False", "has no kernels for center=False"),
    ],
)
def test_who_says_no(options: dict[str, object], native: str, triton: str | None) -> None:
    rejected = explain(torch.zeros(N, P), torch.zeros(N, P), **options).rejected
    assert rejected["native"] == native
    assert triton is None or rejected["triton"] == triton


def test_gram_mse_runs_eager() -> None:
    name, rejected = backends.choose(torch.float32, torch.device("cuda:63"), True, "auto", "gram_mse")
    assert name == "library"
    assert set(rejected.values()) == {"has no kernels for gram_mse"}
    with pytest.raises(ValueError, match='backend="triton" cannot run here: has no kernels for gram_mse'):
        gram_mse(torch.zeros(N, P), torch.zeros(N, P), backend="triton")


def test_explain_and_modules(device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    assert str(explain(x, y, sqrt=True, center=False)).startswith("sqrt_cka_loss (biased, linear, not centred) of x")
    module = CKALoss(sqrt=True, center=False)
    assert module(x, y).equal(cka_loss(x, y, sqrt=True, center=False))
    assert "sqrt=True, center=False" in repr(module)
    assert bird_kernels.gram_mse(x, y, mask=torch.arange(N, device=device) < 9).shape == ()
    assert reference.gram_mse(x, x) == 0
