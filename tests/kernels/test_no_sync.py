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

from bird_kernels import RBF, backends, cka_loss, ops
from tests.accuracy import operator
from tests.kernels.surface import CALLS
from tests.selection import short

CUDA = torch.device("cuda", 0)
N, P, Q = 36, 21, 30
NO_BACKWARD = [name for name in CALLS if "matrix" in name or "statistics" in name]
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
    monkeypatch.setattr(backends, "resolve", lambda problem, requested: "library")
    monkeypatch.setattr(backends, "sharing", lambda problems, requested: None)
    monkeypatch.setattr(backends, "layers_by_triton", lambda *call: None)
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


@short(
    "all in fp32; in the other dtypes, of which only casts know, what has most to do",
    lambda dtype, mask, estimator: dtype == torch.float32 or (mask and estimator == "unbiased"),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, mask: Tensor | None, estimator: str, route: str) -> None:
    x, y = features(N, P, dtype=dtype), features(N, Q, dtype=dtype)
    function = operator(route, "library", estimator, mask=mask)
    assert_never_waits(lambda: function(x, y), x, y)
    assert_never_waits(lambda: function(x, y.detach()), x)
    assert_never_waits(lambda: function(x.detach(), y), y)
    assert_never_waits(lambda: function(x.detach(), y.detach()))


@pytest.mark.parametrize("name", CALLS)
def test_every_call(name: str, mask: Tensor | None) -> None:
    """On both routes. Teachers are often half as precise."""
    for width in (3, P):
        x, y = features(N, width), features(N, Q, dtype=torch.bfloat16)
        wanted = [x] if "centered_gram" in name else [x, y]
        wanted = wanted if name not in NO_BACKWARD else []
        assert_never_waits(lambda: CALLS[name](x, y, mask), *wanted)  # noqa: B023 - called at once


@short(
    "every rule in every memory; the mask and the estimator, which come after the bandwidth, with one rule",
    lambda rule, mask, estimator: rule == "median, flowing" or (not mask and estimator == "biased"),
)
def test_rbf(rule: RBF, memory: str, mask: Tensor | None, estimator: str) -> None:
    """Bandwidths too, which a selection would read."""
    x, y = features(N, P), features(N, Q, dtype=torch.bfloat16)
    assert_never_waits(lambda: cka_loss(x, y, kernel=rule, mask=mask, estimator=estimator, backend="library"), x, y)


def test_weights_that_change_every_step() -> None:
    """Each step's numbers are new to the device."""
    xs, ys = [features(N, P), features(N, 3)], [features(N, Q), features(N, 2)]
    for step in range(5):
        weights = [0.3 + step, 2.0 / (1 + step)]
        assert_never_waits(lambda: cka_loss(xs, ys, weights=weights, backend="library"), *xs, *ys)  # noqa: B023
