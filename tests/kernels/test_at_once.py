"""The ordinary call goes to C++ at once, every other one through Python: the same numbers, errors and onlookers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bird_kernels
from bird_kernels import backends, functional, ops, reference
from bird_kernels.plan import FEW_ROWS
from bird_kernels.types import Options
from tests.accuracy import evaluate, features

native = pytest.importorskip("bird_kernels._native", reason="the native part is not built")
N, P, Q = 9, 5, 7
MANY = 1 << 40  # numbers
FUNCTIONS = {name: getattr(bird_kernels, name) for name in ("cka_loss", "cka", "hsic")}


class Spy:
    """`ops.at_once`, and for every call whether it was taken."""

    def __init__(self, at_once: Callable[..., Tensor | None]) -> None:
        self.at_once = at_once
        self.taken: list[bool] = []

    def __call__(self, *call: Any) -> Tensor | None:
        value = self.at_once(*call)
        self.taken.append(value is not None)
        return value


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    ops.native_backend()  # as the first native call does
    assert ops.at_once is not None
    spy = Spy(ops.at_once)
    monkeypatch.setattr(ops, "at_once", spy)
    return spy


def by_python(function: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "at_once", None)
        return function()


@pytest.mark.parametrize("statistic", FUNCTIONS)
@pytest.mark.parametrize("sides", ["x", "y", "xy", ""])
@pytest.mark.parametrize("masked", [False, True])
def test_same_bits(masked: bool, sides: str, statistic: str, estimator: str, spy: Spy, device: torch.device) -> None:
    x, y = features(N, P, Q, device=device, mean=1.0)
    mask = torch.arange(2 * N, device=device)[::2] % 3 != 1 if masked else None  # of any stride

    def run() -> Any:
        loss = FUNCTIONS[statistic]
        return evaluate(lambda a, b: loss(a, b, mask=mask, estimator=estimator, backend="native"), x, y, sides, -0.3)

    torch.testing.assert_close(run(), by_python(run), rtol=0, atol=0)
    assert spy.taken == [True]


@pytest.fixture(params=["ieee", "tf32"])
def switch(request: pytest.FixtureRequest) -> Iterator[str]:
    """What PyTorch itself is told about fp32 products."""
    own = torch.backends.cuda.matmul
    before, own.fp32_precision = own.fp32_precision, request.param
    yield request.param
    own.fp32_precision = before


@pytest.mark.parametrize("precision", [None, "ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_in_any_precision(
    dtype: torch.dtype, precision: str | None, switch: str, spy: Spy, device: torch.device
) -> None:
    x, y = features(N, P, Q, dtype, device)

    def run(precision: str | None = precision) -> Any:
        return evaluate(lambda a, b: bird_kernels.cka_loss(a, b, backend="native", precision=precision), x, y)

    found = run()
    assert spy.taken == [True]
    torch.testing.assert_close(found, by_python(run), rtol=0, atol=0)
    rounded = dtype != torch.float32 or (precision or switch) == "tf32"
    assert found.value.equal(run("tf32").value) == rounded


X, Y = features(N, P, Q)
ROWS = torch.ones(N, dtype=torch.bool)


class Own(Tensor):
    """A subclass, which may mean something else by anything."""


def negated(a: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(a), -a).conj().imag


ORDINARY = {
    "plain": ((X, Y), {}),
    "parameter": ((torch.nn.Parameter(X), Y), {}),
    "any strides": ((X.T.contiguous().T, Y[:, ::2]), {}),
    "an auto that means native": ((X, Y), {"backend": "auto"}),
    "mask": ((X, Y), {"mask": ROWS}),
    "most rows": ((torch.ones(FEW_ROWS, 1), torch.ones(FEW_ROWS, 1)), {}),
    "fewest rows": ((X[:2], Y[:2]), {}),
    "fewest rows, unbiased": ((X[:4], Y[:4]), {"estimator": "unbiased"}),
    "lists of one": (([X], [Y]), {}),
    "two lists": (([X, Y], [Y, Y[:, :2]]), {"mask": ROWS}),
    "two tuples": (((X, X), (Y, X)), {"estimator": "unbiased", "backend": "auto"}),
    "as many pairs as fit": (([X] * native.MAX_PAIRS, [Y] * native.MAX_PAIRS), {}),
}
# Right or wrong, but not for C++: it must leave them alone.
OTHERS = {
    "another backend": ((X, Y), {"backend": "library"}),
    "empty lists": (([], []), {}),
    "too many pairs": (([X] * (native.MAX_PAIRS + 1), [Y] * (native.MAX_PAIRS + 1)), {}),
    "lists of two lengths": (([X, X], [Y]), {}),
    "a list and a tensor": (([X, X], Y), {}),
    "a list of no tensors": (([X, None], [Y, Y]), {}),
    "lists of other rows": (([X, X[:-1]], [Y, Y[:-1]]), {}),
    "lists of other types": (([X, X.half()], [Y, Y.half()]), {}),
    "lists of another statistic": (([X, X], [Y, Y]), {"statistic": "cka"}),
    "another statistic": ((X, Y), {"statistic": "gram_mse"}),
    "a group": ((X, Y), {"group": object()}),
    "not centred": ((X, Y), {"center": False}),
    "a centring that is no bool": ((X, Y), {"center": 1}),
    "another kernel": ((X, Y), {"kernel": "rbf"}),
    "a kernel that is no string": ((X, Y), {"kernel": object()}),
    "another estimator": ((X, Y), {"estimator": "debiased"}),
    "another precision": ((X, Y), {"precision": "fp32"}),
    "a precision that is no string": ((X, Y), {"precision": 1}),
    "a lone surrogate": ((X, Y), {"precision": "\ud800"}),
    "no row dimension": ((X, Y), {"row_dims": 0}),
    "two row dimensions": ((X[:, None], Y[:, None]), {"row_dims": 2}),
    "a float of row dimensions": ((X, Y), {"row_dims": 1.0}),
    "too many row dimensions": ((X, Y), {"row_dims": 2**70}),
    "not a tensor": ((X.tolist(), Y), {}),
    "no teacher": ((X, None), {}),
    "subclass": ((X.as_subclass(Own), Y), {}),
    "subclass of teacher": ((X, Y.as_subclass(Own)), {}),
    "meta": ((X.to("meta"), Y.to("meta")), {}),
    "sparse": ((X.to_sparse(), Y), {}),
    "lazy negative": ((negated(X), Y), {}),
    "lazy negative teacher": ((X, negated(Y)), {}),
    "one dimension": ((X[:, 0], Y), {}),
    "three dimensions": ((X[:, :, None], Y), {}),
    "other rows": ((X, Y[:-1]), {}),
    "too many rows": ((torch.ones(FEW_ROWS + 1, 1), torch.ones(FEW_ROWS + 1, 1)), {}),
    "too few rows": ((X[:1], Y[:1]), {}),
    "too few rows, unbiased": ((X[:3], Y[:3]), {"estimator": "unbiased"}),
    "no features": ((X[:, :0], Y), {}),
    "no teacher's features": ((X, Y[:, :0]), {}),
    "fp64": ((X.double(), Y.double()), {}),
    "integers": ((X.long(), Y.long()), {}),
    "other types": ((X, Y.half()), {}),
    "other devices": ((X, Y.to("meta")), {}),
    "mask not a tensor": ((X, Y), {"mask": ROWS.tolist()}),
    "mask of a subclass": ((X, Y), {"mask": ROWS.as_subclass(Own)}),
    "mask of bytes": ((X, Y), {"mask": ROWS.byte()}),
    "mask too short": ((X, Y), {"mask": ROWS[:-1]}),
    "mask of two dimensions": ((X, Y), {"mask": ROWS[:, None]}),
    "mask elsewhere": ((X, Y), {"mask": ROWS.to("meta")}),
}


def call(case: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device) -> tuple[Any, ...]:
    """The arguments as `call.evaluate` has them, tensors on the CPU moved to the device."""
    (x, y), options = case
    mask, asked = options.get("mask"), {"statistic": "cka_loss", "backend": "native"} | options

    def moved(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            return type(a)(map(moved, a)) if a and isinstance(a[0], Tensor) else a
        return a.to(device) if isinstance(a, Tensor) and a.device.type == "cpu" else a

    return *map(moved, (x, y, mask)), Options(**{name: value for name, value in asked.items() if name != "mask"})


@pytest.mark.parametrize("case", ORDINARY)
def test_ordinary(case: str, device: torch.device) -> None:
    at_once = native.at_once_where(lambda *_: MANY, lambda *_: True)
    x, *others = call(ORDINARY[case], device)
    found = at_once(x, *others)
    assert isinstance(found, Tensor)
    assert found.shape == (() if isinstance(x, Tensor) else (len(x),))


@pytest.mark.parametrize("case", OTHERS)
def test_not_ordinary(case: str, device: torch.device) -> None:
    at_once = native.at_once_where(lambda *_: MANY, lambda *_: True)
    assert at_once(*call(OTHERS[case], device)) is None


def test_python_is_asked_once(device: torch.device) -> None:
    """Per backend, dtype and device; its limit of numbers is kept, and an error of its own arrives."""
    asked = []
    limits = {("native", torch.float32): MANY, ("native", torch.float16): 0, ("auto", torch.float32): 2 * N * P}

    def most(*question: Any) -> int:
        asked.append(question)
        return limits[question[:2]]

    at_once = native.at_once_where(most, lambda *_: True)
    x, wider = X.to(device), Y.to(device)
    half = x.half()
    calls = [
        ("native", x, x, True), ("native", half, half, False), ("auto", x, x, True), ("auto", x, wider, False),
        ("native", x, wider, True),
    ]  # fmt: skip
    for _ in range(2):
        for backend, a, b, taken in calls:
            value = at_once(a, b, None, Options("cka", backend=backend))
            assert (value is not None) == taken
    assert asked == [(backend, a.dtype, a.device) for backend, a, _, _ in calls[:3]]

    def broken(*_: Any) -> bool:
        raise RuntimeError("no driver")

    with pytest.raises(RuntimeError, match="no driver"):
        native.at_once_where(broken, broken)(*call(ORDINARY["plain"], device))


def test_python_is_asked_once_of_lists(device: torch.device) -> None:
    """By sizes, wanted gradients, estimator, mask and precision; what it does not share is left to it."""
    asked: list[Any] = []

    def shares(x: Any, y: Any, mask: Any, options: Options) -> bool:
        asked.append((len(x), mask is not None, options))
        return options.precision != "tf32x3"

    at_once = native.at_once_where(lambda *_: 0, shares)
    x, y, mask = X.to(device), Y.to(device), ROWS.to(device)
    usual = Options("cka_loss", backend="native")
    learned = x.clone().requires_grad_()
    calls: list[tuple[Any, ...]] = [
        ([x, x], [y, y], None, usual), ([x, x], [y, y], mask, usual), ([x, y], [y, y], None, usual),
        ([x, learned], [y, y], None, usual), ([x, x], [y, y], None, usual._replace(estimator="unbiased")),
        ([x, x], [y, y], None, usual._replace(precision="tf32x3")), ([x] * 3, [y] * 3, None, usual),
    ]  # fmt: skip
    for _ in range(2):
        for number, arguments in enumerate(calls):
            found = at_once(*arguments)
            assert (found is None) == (number == 5)
            assert found is None or found.shape == (len(arguments[0]),)
    assert asked == [(len(xs), given is not None, options) for xs, _, given, options in calls]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_lists_have_the_bits_of_python(
    masked: bool, count: int, estimator: str, spy: Spy, device: torch.device
) -> None:
    """Values and gradients, of both sides of some pairs and of no side of others; a second backward, too."""
    pairs = [features(N, p, q, device=device, mean=1.0, seed=p) for p, q in ((P, Q), (40, 3), (2, 70))]
    pairs = pairs[:count]
    xs = [x.requires_grad_(k != 1) for k, (x, _) in enumerate(pairs)]
    ys = [y.requires_grad_(k == 2) for k, (_, y) in enumerate(pairs)]
    mask = torch.arange(N, device=device) % 4 != 1 if masked else None
    wanted = [t for t in (*xs, *ys) if t.requires_grad]

    def run() -> Any:
        value = bird_kernels.cka_loss(
            xs, ys, weights=[0.5, 2.0, -1.0][:count], mask=mask, estimator=estimator, backend="native"
        )
        return value.detach(), torch.autograd.grad(value, wanted)

    run()  # the native part is loaded
    spy.taken.clear()
    torch.testing.assert_close(run(), by_python(run), rtol=0, atol=0)
    assert spy.taken == [True]

    def twice() -> Any:
        value = bird_kernels.cka_loss(xs, ys, mask=mask, estimator=estimator, backend="native")
        first = torch.autograd.grad(value, wanted, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    torch.testing.assert_close(twice(), by_python(twice), rtol=1e-5, atol=1e-7)
    batched = functional.cka_losses(xs, ys, mask=mask, estimator=estimator, backend="native")
    upstream = torch.eye(count, device=device)
    found = torch.autograd.grad(batched, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for row in range(count):
        one_by_one = torch.autograd.grad(batched, wanted, upstream[row], retain_graph=True)
        torch.testing.assert_close([g[row] for g in found], list(one_by_one), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 3])
def test_the_losses_of_a_list_may_be_changed_in_place(count: int, spy: Spy, device: torch.device) -> None:
    x, y = X.to(device).requires_grad_(), Y.to(device)
    losses = functional.cka_losses([x] * count, [y] * count, backend="native")
    assert spy.taken == [True]
    losses[0] *= 3.0
    (found,) = torch.autograd.grad(losses.sum(), x)
    (one,) = torch.autograd.grad(bird_kernels.cka_loss(x, y, backend="native"), x)
    torch.testing.assert_close(found, one * (count + 2))


def test_two_tensors_are_no_lists(spy: Spy, device: torch.device) -> None:
    with pytest.raises(TypeError, match="because x is no list"):
        functional.cka_losses(X.to(device), Y.to(device), backend="native")
    assert spy.taken == []


def test_answers_are_asked_for_again_after_a_failure(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """`backends.forget` reaches them; and calls under ``auto`` that fail there go on in Python."""
    asked: list[int] = []

    def shares(*_: Any) -> bool:
        asked.append(1)
        return True

    at_once = native.at_once_where(lambda *_: MANY, shares)
    x, y = [X.to(device)] * 2, [Y.to(device)] * 2
    for again in (False, True):
        for _ in range(2):
            assert at_once(x, y, None, Options("cka_loss", backend="native")) is not None
        assert len(asked) == 1 + again
        backends.forget()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ops, "at_once", broken)
    found = bird_kernels.cka_loss(x, y)
    assert math.isclose(found.item(), 2 * reference.cka_loss(X, Y).item(), rel_tol=1e-5)
    assert math.isclose(bird_kernels.cka_loss(x[0], y[0]).item(), found.item() / 2, rel_tol=1e-5)
    with pytest.raises(RuntimeError, match="no such instruction"):
        bird_kernels.cka_loss(x, y, backend="native")


def test_transforms_see_operators(spy: Spy, device: torch.device) -> None:
    """Also where the features themselves are not transformed."""
    x, y = X.to(device), Y.to(device)

    def loss(weight: Tensor) -> Tensor:
        return weight * bird_kernels.cka_loss(x, y, backend="native")

    found = torch.func.grad(loss)(torch.tensor(2.0, device=device))
    assert found.equal(by_python(lambda: bird_kernels.cka_loss(x, y, backend="native")))
    assert spy.taken == [False]


@pytest.mark.parametrize("where", ["features", "teacher", "upstream"])
def test_lazy_negatives(where: str, backend: str, device: torch.device) -> None:
    """Views that PyTorch negates when somebody reads them, as ``z.conj().imag`` is."""
    x, y = X.to(device), Y.to(device)
    own, other = (negated(a) if name == where else a for name, a in (("features", x), ("teacher", y)))
    assert own.is_neg() or other.is_neg() or where == "upstream"
    leaves = own.detach().requires_grad_(), other.detach().requires_grad_()
    value = bird_kernels.cka_loss(*leaves, backend=backend)
    upstream = torch.tensor(2.0, device=device)
    found = torch.autograd.grad(value, leaves, negated(upstream) if where == "upstream" else upstream)
    expected = evaluate(reference.cka_loss, x.double(), y.double(), upstream=2.0)
    for one, true in zip(found, expected[1:], strict=True):
        assert (one - true).norm() < 1e-5 * true.norm()
    assert math.isclose(value.item(), expected.value.item(), abs_tol=1e-6)
