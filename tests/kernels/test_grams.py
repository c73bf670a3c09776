"""`cka_from_grams`: Gram matrices as they are given, against CKA of features and other packages' HSIC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import cka, cka_from_grams, reference
from tests.accuracy import features

ESTIMATORS = ["biased", "unbiased"]


def grams(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features x [n, 5] and y [n, 7] in fp64, and their Gram matrices in ``dtype``."""
    x, y = features(n, 5, 7, torch.float64, mean=1.0)
    return x, y, (x @ x.T).to(dtype), (y @ y.T).to(dtype)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [4, 5, 64])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_is_the_cka_of_the_features(n: int, scale: float, estimator: str) -> None:
    x, y, k, l = grams(n)
    found = cka_from_grams(k * scale, l, estimator=estimator)
    torch.testing.assert_close(found, reference.cka(x, y, None, estimator), rtol=1e-10, atol=1e-12)
    if estimator == "biased":
        assert cka_from_grams(k[:2, :2], l[:2, :2]).item() == pytest.approx(1.0)  # two rows have one distance


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_is_as_exact_as_the_entries(dtype: torch.dtype, bar: float, estimator: str) -> None:
    x, y, k, l = grams(64, dtype)
    found = cka_from_grams(k, l, estimator=estimator)
    assert found.dtype == torch.float32
    assert abs(found - reference.cka(x, y, None, estimator)) < bar
    same = cka_from_grams(k.double(), l, estimator=estimator)
    assert same.dtype == torch.float64
    torch.testing.assert_close(same.float(), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients(estimator: str) -> None:
    """Of K they are finite differences; through K = X X^T they are those of `cka`."""
    x, y, k, l = grams(6)
    k.requires_grad_(), l.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: cka_from_grams(a, b, estimator=estimator), (k, l))
    x.requires_grad_(), y.requires_grad_()
    expected = torch.autograd.grad(cka(x, y, estimator=estimator), (x, y))
    found = torch.autograd.grad(cka_from_grams(x @ x.T, y @ y.T, estimator=estimator), (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_without_variance(dtype: torch.dtype, estimator: str) -> None:
    _, _, k, _ = grams(8, dtype)
    row = torch.tensor([[0.1, 1e3, -0.3]], dtype=dtype)
    equal = row.expand(8, 3) @ row.expand(8, 3).T
    for flat in (torch.zeros(8, 8, dtype=dtype), torch.full((8, 8), 0.1, dtype=dtype), equal):
        own = flat.clone().requires_grad_()
        value = cka_from_grams(own, k, estimator=estimator)
        value.backward()
        assert value == 0
        assert own.grad is not None
        assert own.grad.eq(0).all()


def test_a_far_diagonal_hides_nothing() -> None:
    """HSIC_1 leaves the diagonal out, so entries beside a large one are no rounding of it."""
    _, _, k, l = grams(16, torch.float32)
    expected = cka_from_grams(k, l, estimator="unbiased")
    found = cka_from_grams(k + 1e12 * torch.eye(16), l, estimator="unbiased")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_nan_stays_visible_and_inputs_unchanged() -> None:
    _, _, k, l = grams(8)
    copies = k.clone(), l.clone()
    for estimator in ESTIMATORS:
        cka_from_grams(k, l, estimator=estimator)
        bad = k.clone()
        bad[0, 1] = torch.nan
        assert cka_from_grams(bad, l, estimator=estimator).isnan()
    assert k.equal(copies[0])
    assert l.equal(copies[1])


K = torch.eye(4)
REFUSED = {
    "no tensor": (([[1.0]], K), {}, TypeError, "k must be a dense tensor of fp64, fp32, bf16 or fp16, got list"),
    "integers": ((K, K.long()), {}, TypeError, r"l must be a dense tensor of .* got torch.int64 \[4, 4\] on cpu"),
    "sparse": ((K.to_sparse(), K), {}, TypeError, r"got torch.float32 \[4, 4\] in torch.sparse_coo on cpu"),
    "float8": ((K.to(torch.float8_e4m3fn), K), {}, TypeError, "got torch.float8_e4m3fn"),
    "features": ((K[:, :3], K), {}, ValueError, r"k must be a Gram matrix \[n, n\], got \[4, 3\]; of features"),
    "sizes": ((K, torch.eye(5)), {}, ValueError, "same size and device"),
    "device": ((K, K.to("meta")), {}, ValueError, "same size and device"),
    "rows": ((K[:3, :3], K[:3, :3]), {"estimator": "unbiased"}, ValueError, "at least 4 rows, got 3"),
    "estimator": ((K, K), {"estimator": "u"}, ValueError, "estimator must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    args, options, error, words = REFUSED[case]
    grams_: Any = args
    with pytest.raises(error, match=words):
        cka_from_grams(*grams_, **options)
