"""What is refused, and in which words: the argument, what came, and what is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import RBF, Statistics, cka, cka_loss, cka_matrix, explain, hsic, token_cka_loss
from tests.accuracy import features
from tests.selection import short

N, P, Q = 37, 21, 30
X, Y = torch.zeros(N, P), torch.zeros(N, Q)
ROWS = torch.ones(N, dtype=torch.bool)

Case = tuple[tuple[Any, ...], dict[str, Any], type[Exception], list[str]]
# Of two matrices: (arguments, options, error, what its message must hold).
MATRICES: dict[str, Case] = {
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
    "three rows": ((X[:3], Y[:3]), {"estimator": "unbiased"}, ValueError, ["unbiased", "at least 4 rows", "got 3"]),
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
    "callable kernel": (
        (X, Y), {"kernel": torch.cdist},
        TypeError, ['kernel must be "linear", "rbf" or an RBF', "feature map", 'kernel="linear"'],
    ),
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
LISTS: dict[str, Case] = {
    "lengths": (([X, X], [Y]), {}, ValueError, ["got 2 and 1 layers"]),
    "empty": (([], []), {}, ValueError, ["at least one pair"]),
    "rows of a pair": (([X, X], [Y, Y[:5]]), {}, ValueError, ["x[1] and y[1] must have the same rows", "37", "5"]),
    "a mask for other rows": (([X, X[:5]], [Y, Y[:5]]), {"mask": ROWS}, ValueError, ["mask must have the shape"]),
    "one list": ((X, [Y]), {}, TypeError, ["y must be a torch.Tensor, got list, because x is no list"]),
    "not tensors": (([X, None], [Y, Y]), {}, TypeError, ["x[1] must be a torch.Tensor"]),
    "weights": (([X, X], [Y, Y]), {"weights": [1.0]}, ValueError, ["one number for each pair, got 1 for 2"]),
    "weights of one pair": ((X, Y), {"weights": [1.0]}, ValueError, ["weights are for lists"]),
    "weights of two dimensions": (
        ([X, X], [Y, Y]), {"weights": torch.ones(1, 2)},
        ValueError, ["weights must be a vector, [pairs], got shape (1, 2)"],
    ),
    "an option": (([X, X], [Y, Y]), {"estimator": "?"}, ValueError, ["estimator must be one of"]),
    "another kernel": (([X, X], [Y, Y]), {"kernel": "?"}, ValueError, ["kernel must be one of"]),
    "sqrt, unbiased": (
        (X, X), {"sqrt": True, "estimator": "unbiased"}, ValueError, ['sqrt=True needs estimator="biased"', "negative"],
    ),
    "uncentred, unbiased": (
        (X, X), {"center": False, "estimator": "unbiased"}, ValueError, ['center=False needs estimator="biased"'],
    ),
    "positional options": ((X, Y, "linear"), {}, TypeError, ["positional"]),
}  # fmt: skip
LAYERS: dict[str, Case] = {
    "a tensor": ((X, None), {}, TypeError, ["xs must be a list of tensors"]),
    "no layers": (([], None), {}, ValueError, ["xs has no layers"]),
    "no other layers": (([X], []), {}, ValueError, ["ys has no layers"]),
    "not tensors": (([X, 3], None), {}, TypeError, ["xs[1] must be a torch.Tensor"]),
    "rows": (([X], [X, X[:5]]), {}, ValueError, ["same rows", "(37,)", "(5,)"]),
    "devices": (([X], [X.to("meta")]), {}, ValueError, ["same rows and device", "cpu", "meta"]),
    "few rows": (([X[:3]], None), {"estimator": "unbiased"}, ValueError, ["at least 4 rows, got 3"]),
    "estimator": (([X], None), {"estimator": "?"}, ValueError, ["estimator must be one of"]),
    "mask": (([X], None), {"mask": ROWS[:8]}, ValueError, ["mask must have the shape"]),
}
A, B, MASK = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
PACKED, CU = torch.zeros(6, 4), torch.tensor([0, 2, 6])
TOKENS: dict[str, Case] = {
    "mode": ((A, B), dict(tokens="first"), ValueError, ["tokens must be one of 'all', 'last'"]),
    "two layouts": ((A, B), dict(mask=MASK, cu_seqlens=CU), ValueError, ["not both"]),
    "rows alone": ((A[0], B[0]), {}, ValueError, ["x has shape (3, 4)", "packed [N, d] need cu_seqlens"]),
    "padded and packed": ((A, B), dict(cu_seqlens=CU), ValueError, ["not packed: [N, d] with cu_seqlens"]),
    "mask of numbers": ((A, B), dict(mask=MASK.float()), TypeError, ["mask must be a bool tensor"]),
    "mask too short": ((A, B), dict(mask=MASK[:, :2]), ValueError, ["shape of the rows, (2, 3)"]),
    "other tokens": ((A, B[:, :2]), dict(mask=MASK, tokens="last"), ValueError, ["y_mask"]),
    "y_mask of all": ((A, B), dict(y_mask=MASK), ValueError, ['tokens="all" compares token by token']),
    "y_cu_seqlens of sequences": (
        (PACKED, PACKED), dict(cu_seqlens=CU, y_cu_seqlens=CU, tokens="sequence"), ValueError, ["share their layout"],
    ),
    "other sequences": ((A, B[:1]), dict(tokens="mean"), ValueError, ["same sequences, got 2 for x and 1"]),
    "other lengths": ((A, B[:, :2]), dict(tokens="sequence"), ValueError, ["same sequences"]),
    "few tokens": (
        (A[:, :1], B[:, :1]), dict(tokens="sequence"), ValueError, ["at least 2 tokens in a sequence, got 1"],
    ),
    "estimator": ((A, B), dict(tokens="sequence", estimator="fair"), ValueError, ["estimator must be one of"]),
    "backend": ((A, B), dict(tokens="sequence", backend="triton"), ValueError, ["no backend"]),
    "other rows": ((PACKED, PACKED[:4]), dict(cu_seqlens=CU), ValueError, ["y_cu_seqlens"]),
    "lengths of numbers": ((PACKED, PACKED), dict(cu_seqlens=CU.float()), TypeError, ["int32 or int64"]),
    "list of lengths": ((PACKED, PACKED), dict(cu_seqlens=[0, 6]), TypeError, ["int32 or int64", "list"]),
    "no lengths": ((PACKED, PACKED), dict(cu_seqlens=CU[:1]), ValueError, ["shape [B + 1]"]),
    "lengths of others": (
        (PACKED, PACKED), dict(cu_seqlens=torch.tensor([2, 4])),
        ValueError, ["rise from 0 to the rows of x, 6; got [2, 4"],
    ),
    "falling lengths": (
        (PACKED, PACKED), dict(cu_seqlens=torch.tensor([0, 5, 4, 6])), ValueError, ["rise from 0"],
    ),
    "too long": ((PACKED, PACKED), dict(cu_seqlens=CU, max_seqlen=3, tokens="mean"), IndexError, ["out of"]),
}  # fmt: skip
NUMBER = torch.tensor(1.0, requires_grad=True)
BANDWIDTHS: dict[str, Case] = {
    "zero": ((), dict(sigma=0.0), ValueError, ["positive and finite"]),
    "nan": ((), dict(sigma=float("nan")), ValueError, ["positive and finite"]),
    "negative": ((), dict(sigma=(1.0, -1.0)), ValueError, ["positive and finite"]),
    "infinite": ((), dict(threshold=float("inf")), ValueError, ["positive and finite"]),
    "two rules": ((), dict(sigma=1.0, threshold=1.0), ValueError, ["fixed sigma"]),
    "fixed and flowing": ((), dict(sigma=1.0, flow=True), ValueError, ["fixed sigma"]),
    "learned sigma": ((), dict(sigma=(NUMBER, 2.0)), TypeError, ["Python numbers", " RBF(sigma=1.0)"]),
    "learned threshold": ((), dict(threshold=NUMBER), TypeError, ["Python numbers", " RBF(sigma=1.0)"]),
}
EVERY: list[tuple[str, Callable[..., Any], str, Case]] = [
    (table, function, name, case)
    for table, function, cases in (
        ("cka_loss", cka_loss, MATRICES), ("lists", cka_loss, LISTS), ("cka_matrix", cka_matrix, LAYERS),
        ("tokens", token_cka_loss, TOKENS), ("RBF", RBF, BANDWIDTHS),
    )
    for name, case in cases.items()
]  # fmt: skip
# One look at what comes in serves all of these, too: a sample.
SAMPLE = ("not a tensor", "three rows", "mask too short")
EVERY += [(f.__name__, f, name, MATRICES[name]) for f in (cka, hsic, explain) for name in SAMPLE]
GRAM = ("not a tensor", "integers", "kernel", "no feature dimension")
EVERY += [
    ("centered_gram", bird_kernels.centered_gram, name, (MATRICES[name][0][:1], *MATRICES[name][1:])) for name in GRAM
]


def assert_refused(function: Callable[..., Any], case: Case) -> None:
    arguments, options, error, words = case
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize(
    ("function", "case"),
    [(f, case) for _, f, _, case in EVERY],
    ids=[f"{table}: {name}" for table, _, name, _ in EVERY],
)
def test_refused_in_words(function: Callable[..., Any], case: Case) -> None:
    assert_refused(function, case)


@pytest.mark.parametrize("name", MATRICES)
def test_native_refuses_in_the_same_words(name: str) -> None:
    """Though it looks at ordinary calls itself, once it has run."""
    pytest.importorskip("bird_kernels._native", reason="the native part is not built")
    cka_loss(X, Y, backend="native")
    arguments, options, error, words = MATRICES[name]
    assert_refused(cka_loss, (arguments, {"backend": "native"} | options, error, words))


# ---------------------------------------------------------------------------------------------- kinds of tensors

CALLS: dict[str, Callable[[Any, Any], object]] = {
    "cka_loss": cka_loss,
    "list": lambda x, y: cka_loss([x, x], [y, y]),
    "gaussian": lambda x, y: cka_loss(x, y, kernel="rbf"),
    "reference": lambda x, y: cka_loss(x, y, backend="reference"),
    "centered_gram": lambda x, y: (bird_kernels.centered_gram(x), bird_kernels.centered_gram(y)),
    "cka_matrix": lambda x, y: cka_matrix([x], [y]),
    "Statistics": lambda x, y: Statistics().update(x, y),
    "explain": explain,
}
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda a: a.to_sparse(), r"a strided tensor, got a sparse_coo one: convert it with \.to_dense\(\)"),
    "csr": (lambda a: a.to_sparse_csr(), r"a strided tensor, got a sparse_csr one: convert it with \.to_dense\(\)"),
    "mkldnn": (lambda a: a.to_mkldnn(), r"a strided tensor, got a _mkldnn one: convert it with \.to_dense\(\)"),
    "nested": (lambda a: torch.nested.nested_tensor([*a.view(4, 6, -1)]), r"got a nested one: pad it"),
    "jagged": (
        lambda a: torch.nested.nested_tensor([*a.view(4, 6, -1)], layout=torch.jagged),
        r"got a nested one: pad it.* give which rows count",
    ),
    "masked": (lambda a: torch.masked.masked_tensor(a, a > 0), r"got a masked one: give its data, and as mask="),
    "complex": (lambda a: torch.complex(a, a), r"got torch\.complex64; convert it with torch\.view_as_real"),
    "float8": (lambda a: a.to(torch.float8_e4m3fn), r"got torch\.float8_e4m3fn; convert it with .*\.float\(\)"),
    "array": (lambda a: a.numpy(), r"must be a torch\.Tensor, got ndarray"),
}


@short(
    "every kind in one function, and two kinds in its siblings, which share the check",
    lambda kind, name, side: name == "cka_loss" or (kind in ("sparse", "array") and side == "y"),
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_kernels_cannot_read_is_refused_in_words(kind: str, name: str, side: str) -> None:
    x, y = features(24, 6, 5, device=torch.device("cpu"))
    make, message = KINDS[kind]
    with pytest.raises(TypeError, match=message):
        CALLS[name](make(x) if side == "x" else x, make(y) if side == "y" else y)
