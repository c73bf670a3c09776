"""The public functions and modules: what they accept, what they refuse and in which words, what `explain` says."""

from __future__ import annotations

import math

import pytest
import torch

import bird_kernels
from bird_kernels import CKALoss, HSICLoss, cka, cka_loss, explain, hsic, reference
from tests.accuracy import evaluate, features, operator, truth
from tests.selection import short

N, P, Q = 37, 21, 30
X, Y = torch.zeros(N, P), torch.zeros(N, Q)
ROWS = torch.ones(N, dtype=torch.bool)

# name: (arguments, options, error, what its message must hold: the argument, what came, what is needed)
REFUSED = {
    "not a tensor": ((X.tolist(), Y), {}, TypeError, ["x must be a torch.Tensor", "list"]),
    "y not a tensor": ((X, None), {}, TypeError, ["y must be a torch.Tensor", "NoneType"]),
    "integers": ((X.long(), Y), {}, TypeError, ["x must be float64", "torch.int64", "x.float()"]),
    "y integers": ((X, Y.to(torch.uint8)), {}, TypeError, ["y must be", "torch.uint8", "y.float()"]),
    "booleans": ((X.bool(), Y), {}, TypeError, ["x must be", "torch.bool"]),
    "complex": ((X.to(torch.complex64), Y), {}, TypeError, ["x must be", "torch.complex64"]),
    "fp8": ((X.to(torch.float8_e4m3fn), Y), {}, TypeError, ["x must be", "torch.float8_e4m3fn"]),
    "row counts": ((X, Y[:-1]), {}, ValueError, ["same rows", "(37,)", "(36,)", "(37, 21)", "(36, 30)"]),
    "token rows": (
        (X.reshape(1, N, P), Y.reshape(N, 1, Q)), {"row_dims": 2},
        ValueError, ["same rows", "(1, 37)", "(37, 1)", "row_dims=2"],
    ),
    "one row": ((X[:1], Y[:1]), {}, ValueError, ["biased", "at least 2 rows", "got 1", "(1, 21)"]),
    "no row": ((X[:0], Y[:0]), {}, ValueError, ["at least 2 rows", "got 0"]),
    "three rows": (
        (X[:3], Y[:3]), {"estimator": "unbiased"}, ValueError, ["unbiased", "at least 4 rows", "got 3"],
    ),
    "no feature dimension": ((X[:, 0], Y), {}, ValueError, ["x must have 1 row dimension", "(37,)"]),
    "y without features": ((X, Y[:, :0]), {}, ValueError, ["y has no features", "(37, 0)"]),
    "too many row dimensions": ((X, Y), {"row_dims": 2}, ValueError, ["2 row dimensions", "(37, 21)"]),
    "no row dimension": ((X, Y), {"row_dims": 0}, ValueError, ["0 row dimensions", "row_dims >= 1"]),
    "devices": ((X, Y.to("meta")), {}, ValueError, ["one device", "x on cpu", "y on meta"]),
    "mask of numbers": (
        (X, Y), {"mask": ROWS.float()}, TypeError, ["mask must be a bool", "torch.float32", "mask.bool()"],
    ),
    "mask of integers": ((X, Y), {"mask": ROWS.to(torch.uint8)}, TypeError, ["mask must be a bool", "torch.uint8"]),
    "mask not a tensor": ((X, Y), {"mask": [True] * N}, TypeError, ["mask must be a bool", "list"]),
    "mask too short": ((X, Y), {"mask": ROWS[:-1]}, ValueError, ["mask must have the shape", "(37,)", "(36,)"]),
    "mask of features": (
        (X, Y), {"mask": ROWS[:, None].expand(N, P)}, ValueError, ["mask must have the shape", "(37,)", "(37, 21)"],
    ),
    "mask elsewhere": ((X, Y), {"mask": ROWS.to("meta")}, ValueError, ["mask must be on", "cpu", "meta"]),
    "kernel": ((X, Y), {"kernel": "gaussian"}, ValueError, ["kernel must be one of", "'linear'", "'gaussian'"]),
    "estimator": (
        (X, Y), {"estimator": "debiased"}, ValueError, ["estimator must be", "'biased', 'unbiased'", "'debiased'"],
    ),
    "backend": (
        (X, Y), {"backend": "cuda"}, ValueError, ["backend must be", "'auto'", "'triton'", "'library'", "'cuda'"],
    ),
    "precision": (
        (X, Y), {"precision": "fp32"}, ValueError, ["precision must be", "None", "'ieee'", "'tf32x3'", "'fp32'"],
    ),
    "backend that cannot": (
        (X.double(), Y.double()), {"backend": "triton"},
        ValueError, ['backend="triton" cannot run here', 'backend="auto"'],
    ),
}  # fmt: skip


SAMPLE = ["not a tensor", "row counts", "three rows", "mask too short", "backend"]


@short(
    "one look at what comes in serves all four: every error of one, some of its siblings",
    lambda case, function: function is cka_loss or case in SAMPLE,
)
@pytest.mark.parametrize("function", [cka_loss, cka, hsic, explain], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_words(case: str, function) -> None:
    arguments, options, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("case", REFUSED)
def test_native_refuses_in_the_same_words(case: str) -> None:
    """Though it looks at ordinary calls itself, once it has run."""
    pytest.importorskip("bird_kernels._native", reason="the native part is not built")
    cka_loss(X, Y, backend="native")
    arguments, options, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        cka_loss(*arguments, **{"backend": "native"} | options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("case", ["not a tensor", "integers", "kernel", "no feature dimension"])
def test_centered_gram_refuses_in_the_same_words(case: str) -> None:
    (x, _), options, error, words = REFUSED[case]
    with pytest.raises(error, match=words[0]):
        bird_kernels.centered_gram(x, **options)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        cka_loss(X, Y, "linear")


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
