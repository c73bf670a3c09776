"""The public functions and modules: what they accept, what they refuse and in which words, what `explain` says."""

from __future__ import annotations

import math

import pytest
import torch

import bird_kernels
from bird_kernels import CKALoss, HSICLoss, cka_loss, explain, hsic, reference
from tests.accuracy import evaluate, features, operator, truth

N, P, Q = 37, 21, 30

# name: (arguments, options, error, what its message must hold: the argument, what came, what is needed)


@pytest.mark.parametrize("shape", [(N, 3, 4, 4), (N, 6, 5), (N, 7)])
def test_features_of_any_shape_are_flattened(shape: tuple[int, ...], device: torch.device) -> None:
    flat, y = features(N, math.prod(shape[1:]), Q, device=device)
    x = flat.reshape(shape).requires_grad_()
    loss = cka_loss(x, y)
    loss.backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(loss.detach(), cka_loss(flat, y), rtol=0, atol=0)


def test_channels_last_features(device: torch.device) -> None:
    """Rows whose features lie in another order in memory."""
    x, y = features(N, 3 * 4 * 5, Q, device=device)
    image = x.reshape(N, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(cka_loss(image, y), cka_loss(x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_result_dtype(dtype: torch.dtype, device: torch.device) -> None:
    x, y = features(N, P, Q, dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for backend in ("auto", "library", "reference"):
        assert cka_loss(x, y, backend=backend).dtype == wide
    assert bird_kernels.centered_gram(x).dtype == wide


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_centered_gram(dtype: torch.dtype, mean: float, device: torch.device) -> None:
    x = features(N, P, Q, dtype, device, mean=mean)[0].reshape(N, 3, 7)
    found = bird_kernels.centered_gram(x)
    expected = reference.centered_gram(x.flatten(1))
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert (found - expected).norm() < bound * expected.norm()


def test_centered_gram_is_differentiable_twice_and_ignores_autocast(device: torch.device) -> None:
    x = features(6, 3, 3, torch.float64, device)[0].requires_grad_()
    assert torch.autograd.gradgradcheck(bird_kernels.centered_gram, x)
    x = features(N, P, Q, device=device)[0]
    with torch.autocast(device.type, torch.bfloat16):
        found = bird_kernels.centered_gram(x)
    assert found.equal(bird_kernels.centered_gram(x))


@pytest.mark.parametrize(("module", "function"), [(CKALoss, cka_loss), (HSICLoss, hsic)])
def test_modules_are_the_functions(module, function, device: torch.device) -> None:
    x, y = (a.reshape(4, 6, -1) for a in features(24, P, Q, device=device))
    mask = torch.arange(24, device=device).reshape(4, 6) != 5
    options = dict(estimator="unbiased", row_dims=2, backend="library")
    assert module(**options)(x, y, mask).equal(function(x, y, mask=mask, **options))
    assert module()(x, y).equal(function(x, y))


def test_modules_describe_themselves() -> None:
    module = torch.nn.Sequential(CKALoss(estimator="unbiased", precision="ieee"))[0]
    assert repr(module).startswith("CKALoss(")
    for part in ("kernel='linear'", "estimator='unbiased'", "row_dims=1", "backend='auto'", "precision='ieee'"):
        assert part in repr(module)
    assert not list(module.state_dict())


def explained(device: torch.device, **options: object) -> str:
    x, y = (a.to(device) for a in (torch.zeros(128, 512), torch.zeros(128, 300)))
    return str(explain(x.requires_grad_(), y, **options))


def test_explain_says_what_will_happen(device: torch.device) -> None:
    lines = explained(device, estimator="unbiased", mask=torch.ones(128, dtype=torch.bool, device=device)).splitlines()
    named = {line.split()[0]: line for line in lines[1:]}
    where = torch.zeros(1, device=device).device
    assert lines[0] == (f"cka_loss (unbiased, linear) of x [128, 512] and y [128, 300], float32 on {where}, masked")
    assert named["gradient"].split() == ["gradient", "x"]
    assert named["route"].split()[1] == "gram:"
    assert "cross would need" in named["route"]
    assert named["backend"].split()[1].rstrip(",") in ("library", "triton")
    assert {"work", "workspace", "floor"} <= set(named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the best backend runs here, so none is rejected")
def test_explain_says_why_not(device: torch.device) -> None:
    assert any(line.split()[:2] == ["not", "triton"] for line in explained(device).splitlines())


def test_explain_runs_nothing() -> None:
    """Shapes are enough: a problem of 40 GB is planned on tensors without memory."""
    x, y = torch.empty(100_000, 1, device="meta").expand(-1, 100_000), torch.empty(100_000, 512, device="meta")
    plan = explain(x, y, backend="library")
    assert plan.problem.p == 100_000
    assert plan.route == "gram"


def test_explain_knows_whose_gradient(device: torch.device) -> None:
    x, y = features(N, P, Q, device=device)
    for wanted in ("x", "y", "x and y"):
        x.requires_grad_("x" in wanted)
        y.requires_grad_("y" in wanted)
        assert f"gradient   {wanted}\n" in str(explain(x, y))
    with torch.no_grad():
        assert "gradient   none\n" in str(explain(x, y))


@pytest.mark.parametrize("row_dims", [1, 2, 3])
def test_rows_of_tokens(row_dims: int, estimator: str, backend: str, device: torch.device) -> None:
    """Leading dimensions index rows, the rest is features; a mask has the shape of the leading ones."""
    x, y = (a.reshape(3, 5, 2, -1) for a in features(30, 6, 4, device=device))
    rows = x.shape[:row_dims]
    mask = torch.arange(rows.numel(), device=device).reshape(rows) != 1
    options = dict(estimator=estimator, row_dims=row_dims, backend=backend)
    if rows.numel() < 5 and estimator == "unbiased":
        with pytest.raises(ValueError, match="at least 4 rows"):
            bird_kernels.cka_loss(x, y, mask=mask, **options)
        return
    found = evaluate(lambda a, b: bird_kernels.cka_loss(a, b, mask=mask, **options), x, y)
    flat_x, flat_y, flat_mask = x.reshape(rows.numel(), -1), y.reshape(rows.numel(), -1), mask.flatten()
    true = truth(flat_x[flat_mask], flat_y[flat_mask], estimator)
    assert found.dx.shape == x.shape
    torch.testing.assert_close(found.value.double(), true.value, rtol=0, atol=1e-6)
    gradient = found.dx.reshape(flat_x.shape)
    assert (gradient[flat_mask] - true.dx).norm() < 1e-5 * true.dx.norm() + 1e-7
    assert gradient[~flat_mask].eq(0).all()


@pytest.mark.parametrize("scale", [1e-45, 1e-43, 1e-42])
def test_denormal_features_under_a_mask(scale: float, estimator: str, route: str) -> None:
    """A mask that keeps every row changes nothing, not where the means of the columns are denormal either."""
    x, y = features(16, 8, 8)
    mask = torch.ones(16, dtype=torch.bool)
    found = [operator(route, "library", estimator, mask=m)(scale * x, y).item() for m in (mask, None)]
    assert abs(found[0] - found[1]) <= 1e-6


def test_unbiased_cka_is_never_clamped(device: torch.device) -> None:
    """Of unrelated features it lies around 0: some draws are below, and these have a gradient, too."""
    values = []
    for seed in range(16):
        x, y = features(24, 40, 30, device=device, seed=seed)
        y = torch.randn(24, 30, generator=torch.Generator().manual_seed(100 + seed)).to(device)
        found = evaluate(lambda a, b: cka_loss(a, b, estimator="unbiased"), x, y)
        values.append(found.value.item())
        assert found.dx.norm() > 1e-4
    assert 3 <= sum(value > 1 for value in values) <= 13
