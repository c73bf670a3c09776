"""Nothing waits for a GPU, seen without one: on fake CUDA tensors nobody can read a number, nor a shape that depends on
one, and copies between host and device are refused here, because they wait as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bird_kernels
from bird_kernels import RBF, Statistics, backends, cka_loss, cka_matrix, ops, token_cka_loss
from bird_kernels.matrix import hsic_matrix
from tests.accuracy import operator

CUDA = torch.device("cuda", 0)
N, P, Q = 37, 21, 30
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class CopyError(Exception):
    """Between host and device, of memory that is not pinned."""


class NoCopies(TorchDispatchMode):
    """Raises a CopyError where an operation has tensors on both sides."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if len({leaf.device for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}) > 1:
            raise CopyError(str(function))
        return out


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors only; and the code that runs is that of plain tensors, as on a GPU that is there."""
    monkeypatch.setattr(ops, "watched", lambda *tensors: False)
    monkeypatch.setattr(backends, "_shifts", lambda dtype, device: False)  # Triton launches nothing on fake tensors
    with FakeTensorMode():
        yield


@pytest.fixture(params=[False, True], ids=["all rows", "masked"])
def mask(request: pytest.FixtureRequest, gpu: None) -> Tensor | None:
    return torch.ones(N, dtype=torch.bool, device=CUDA) if request.param else None


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA, requires_grad=True)


def backward(value: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of every leaf, node by node: autograd's own engine would start a thread for the GPU."""
    assert value.grad_fn is not None
    edges: dict[Any, int] = {}  # that lead to a node and have not been gone yet
    found, unseen = {}, [value.grad_fn]
    while unseen:
        for node, _ in unseen.pop().next_functions:
            if node is not None:
                if node not in edges:
                    unseen.append(node)
                edges[node] = edges.get(node, 0) + 1
    arrived: dict[Any, dict[int, Tensor]] = {value.grad_fn: {0: torch.ones_like(value)}}
    ready = [value.grad_fn]
    while ready:
        node = ready.pop()
        grads = arrived.pop(node)
        if hasattr(node, "variable"):  # a leaf
            found[node.variable] = grads[0]
            continue
        kinds = node._input_metadata
        grads = {i: grad.sum_to_size(kinds[i].shape).to(kinds[i].dtype) for i, grad in grads.items()}
        run = node.apply if isinstance(node, BackwardCFunction) else node
        with torch.no_grad():
            out = run(*(grads.get(i) for i in range(len(kinds))))
        out, following = out if isinstance(out, tuple) else (out,), node.next_functions
        if run != node:  # options have no edge, and every side that wants a gradient gets one
            out, following = [grad for grad in out if grad is not None], [edge for edge in following if edge[0]]
        for (node, i), grad in zip(following, out, strict=True):
            if node is None:
                continue
            if grad is not None:
                into = arrived.setdefault(node, {})
                into[i] = into[i] + grad if i in into else grad
            edges[node] -= 1
            if edges[node] == 0:
                ready.append(node)
    return found


def assert_never_waits(function: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Not the function, nor its backward to ``leaves``; and neither writes to one."""
    versions = [leaf._version for leaf in leaves]
    with NoCopies():
        value = function()
        assert value.device == CUDA
        if leaves:
            found = backward(value)
            assert {(g.shape, g.dtype, g.device) for g in found.values()} <= {(x.shape, x.dtype, CUDA) for x in leaves}
            assert [leaf for leaf in leaves if leaf not in found] == []
    assert [leaf._version for leaf in leaves] == versions


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "a backward that reads": lambda x: _Reading.apply(x),
    "nonzero": lambda x: x.nonzero(),
    "rows of a mask": lambda x: x[x[:, 0] > 0],
    "bincount": lambda x: torch.bincount(x[:, 0].long()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: x + torch.tensor([1.0, 2.0], device=CUDA),
    "an index of the host": lambda x: x[torch.tensor([1, 0])],
    "an index in Python": lambda x: x[[1, 0]],
}


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_full((5, 2), grad.item())


@pytest.mark.parametrize("name", READS)
def test_whoever_waits_is_found(name: str) -> None:
    x = features(5, 2)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, CopyError)):
        assert_never_waits(lambda: READS[name](x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, mask: Tensor | None, estimator: str, route: str) -> None:
    x, y = features(N, P, dtype=dtype), features(N, Q, dtype=dtype)
    function = operator(route, "library", estimator, mask=mask)
    assert_never_waits(lambda: function(x, y), x, y)
    assert_never_waits(lambda: function(x, y.detach()), x)
    assert_never_waits(lambda: function(x.detach(), y), y)
    assert_never_waits(lambda: function(x.detach(), y.detach()))


def test_rbf(rule: RBF, memory: str, mask: Tensor | None, estimator: str) -> None:
    """Bandwidths too, which a selection would read. Teachers are often half as precise."""
    x, y = features(N, P), features(N, Q, dtype=torch.bfloat16)
    assert_never_waits(lambda: cka_loss(x, y, kernel=rule, mask=mask, estimator=estimator, backend="library"), x, y)


@pytest.mark.parametrize("name", ["sqrt", "uncentred", "gram_mse", "gram_mse, uncentred", "hsic", "cka"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_relatives(kernel: str, name: str, mask: Tensor | None) -> None:
    function, _, rest = name.partition(", ")
    options: dict[str, Any] = {"sqrt": {"sqrt": True}, "uncentred": {"center": False}}.get(rest or function, {})
    options |= dict(mask=mask, kernel=kernel, backend="library")
    call = getattr(bird_kernels, function, cka_loss)
    for width in (3, Q):  # of the linear kernel both routes
        x, y = features(N, width), features(N, width)
        assert_never_waits(lambda: call(x, y, **options), x, y)  # noqa: B023 - called at once


def test_lists_of_pairs(mask: Tensor | None, estimator: str) -> None:
    xs, ys = [features(N, P), features(N, 3)], [features(N, Q), features(N, 2)]
    options: dict[str, Any] = dict(mask=mask, estimator=estimator, backend="library")
    assert_never_waits(lambda: cka_loss(xs, ys, weights=[0.3, 2.0], **options), *xs, *ys)


def test_weights_that_change_every_step() -> None:
    """Each step's numbers are new to the device."""
    xs, ys = [features(N, P), features(N, 3)], [features(N, Q), features(N, 2)]
    for step in range(100):
        weights = [0.3 + step, 2.0 / (1 + step)]
        assert_never_waits(lambda: cka_loss(xs, ys, weights=weights, backend="library"), *xs, *ys)  # noqa: B023


def test_statistics(mask: Tensor | None, estimator: str) -> None:
    """Updates, merging, values, and the gradient of some rows."""
    x, y = features(N, P), features(N, Q)

    def function() -> Tensor:
        total, other = Statistics(), Statistics()
        for statistics in (total, total, other):
            statistics.update(x, y, mask)
        total.merge(other)
        return total.cka(estimator) + total.hsic(estimator) + total.gradient(x, y, estimator).sum()

    assert_never_waits(function)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("widths", [(P, Q, P), (2, 3, 2)], ids=["gram", "cross"])
def test_matrices(widths: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None, estimator: str) -> None:
    """Layers of equal width are computed together, and put back in their places afterwards."""
    xs, ys = ([features(N, width, dtype=dtype) for width in side] for side in (widths, widths[:2]))
    for others in (None, ys):
        assert_never_waits(lambda: cka_matrix(xs, others, estimator=estimator, mask=mask))  # noqa: B023
        assert_never_waits(lambda: hsic_matrix(xs, others, estimator=estimator, mask=mask).xy)  # noqa: B023


@pytest.mark.parametrize("layout", ["padded", "masked", "packed"])
@pytest.mark.parametrize("tokens", ["all", "last", "mean", "sequence"])
def test_tokens(tokens: Any, layout: str, estimator: str) -> None:
    batch, time = 4, 9
    rows = (batch * time,) if layout == "packed" else (batch, time)
    x, y = features(*rows, P), features(*rows, Q)
    options: dict[str, Any] = {
        "padded": {},
        "masked": dict(mask=torch.ones(batch, time, dtype=torch.int64, device=CUDA)),
        "packed": dict(cu_seqlens=torch.arange(0, batch * time + 1, time, device=CUDA), max_seqlen=time),
    }[layout]
    options |= {} if tokens == "sequence" else {"backend": "library"}
    assert_never_waits(lambda: token_cka_loss(x, y, tokens=tokens, estimator=estimator, **options), x, y)
