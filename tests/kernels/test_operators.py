"""What PyTorch believes about the operators, and torch.compile, which relies on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bird_kernels
from bird_kernels import ops
from tests.accuracy import described, evaluate, features, operator, poison
from tests.selection import short

COMPILED = pytest.mark.compiled
N, P, Q = 37, 21, 30
# Not test_autograd_registration: autograd is attached by functions around the operators, see ops.py.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.fixture
def mask(device: torch.device) -> Tensor:
    return torch.arange(N, device=device) % 3 != 1


@short(
    "a mask and both sides are in every check; the rest once",
    lambda masked, sides, estimator, route: (
        (masked and sides in ("x", "xy")) or (estimator == "biased" and route == "gram")
    ),
)
@pytest.mark.parametrize("sides", ["x", "xy", *(pytest.param(sides, marks=COMPILED) for sides in ("y", ""))])
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=COMPILED)])
def test_opcheck(
    masked: bool, sides: str, mask: Tensor, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Schema (nothing aliased, nothing written to), and shapes, dtypes and strides without data against real ones."""
    x, y = features(N, P, Q, device=device)
    inputs = x, y, mask if masked else None
    call = described(route, backend, estimator, ("x" in sides, "y" in sides))
    torch.library.opcheck(torch.ops.bird.alignment.default, (*inputs, *call), test_utils=CHECKS)
    value, *stash = torch.ops.bird.alignment(*inputs, *call)
    if sides:
        arguments = torch.ones_like(value), *inputs, *stash, *call
        torch.library.opcheck(torch.ops.bird.alignment_backward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("center", [True, False])
def test_opcheck_of_columns(center: bool, estimator: str, route: str, device: torch.device) -> None:
    """Features that lie column by column: the operators' outputs lie as their fake kernels say."""
    if not center and estimator == "unbiased":
        return
    inputs = *(side.T.contiguous().T for side in features(N, P, Q, device=device)), None
    call = described(route, "library", estimator, (True, True), center=center)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bird.alignment.default, (*inputs, *call), test_utils=checks)
    value, *stash = torch.ops.bird.alignment(*inputs, *call)
    arguments = torch.ones_like(value), *inputs, *stash, *call
    torch.library.opcheck(torch.ops.bird.alignment_backward.default, arguments, test_utils=checks)


@COMPILED
def test_compiled_columns(estimator: str, device: torch.device) -> None:
    x, y = (side.T.contiguous().T for side in features(N, P, Q, device=device))
    loss = operator("gram", "library", estimator)
    found = evaluate(torch.compile(loss), x, y)
    torch.testing.assert_close(found, evaluate(loss, x, y), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shapes_without_data(dtype: torch.dtype, estimator: str, route: str, backend: str) -> None:
    """On meta tensors: what a value and its gradients will be, of problems that would not fit in memory."""
    x, y = (torch.empty(50_000, width, dtype=dtype, device="meta") for width in (100_000, 512))
    found = evaluate(operator(route, backend, estimator), x, y)
    assert (found.value.shape, found.value.dtype) == ((), ops.value_dtype(dtype))
    assert (found.dx.shape, found.dx.dtype, found.dx.device.type) == (x.shape, dtype, "meta")
    assert (found.dy.shape, found.dy.dtype, found.dy.device.type) == (y.shape, dtype, "meta")


class Record(TorchDispatchMode):
    """The names of the package's own operators, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "bird":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_whoever_looks_on_sees_operators(estimator: str, route: str, backend: str, device: torch.device) -> None:
    """Under plain autograd the dispatcher is left out; a dispatch mode (fake tensors, tracing, counting) must not
    notice, whether it comes for the forward or only for the backward."""
    x, y = features(N, P, Q, device=device)
    loss = operator(route, backend, estimator)
    plain = evaluate(loss, x, y)
    with Record() as both:
        seen = evaluate(loss, x, y)
    assert both.names == ["bird::alignment", "bird::alignment_backward"]
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)

    leaf = x.clone().requires_grad_()
    value = loss(leaf, y)
    with Record() as backward:
        value.backward()
    assert backward.names == ["bird::alignment_backward"]
    torch.testing.assert_close(leaf.grad, plain.dx, rtol=0, atol=0)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@short(
    "a mask changes nothing about sizes",
    lambda dynamic, masked: dynamic == masked,
)
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, masked: bool, mask: Tensor, backend: str, device: torch.device) -> None:
    """One graph, forward and backward, and the numbers of the call that is not compiled."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        options = dict(mask=mask if masked else None, estimator="unbiased", backend=backend)
        return 2 * bird_kernels.cka_loss(x.sin(), y, **options)

    # aot_eager: the graphs of forward and backward are captured as for any compiler, nothing is generated.
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, y = features(N, P, Q, device=device)
    for sides in ("x", "xy"):
        found, expected = evaluate(compiled, x, y, sides), evaluate(loss, x, y, sides)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("row_dims", [1, 2])
def test_dynamic_shapes_compile_once(row_dims: int, backend: str, device: torch.device) -> None:
    """Batches of other sizes run in the same graph: a last partial batch does not compile again."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return bird_kernels.cka_loss(x, y, row_dims=row_dims, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for n in (24, 36, 30):
        shape = (n,) if row_dims == 1 else (2, n // 2)
        x, y = (a.reshape(*shape, -1) for a in features(n, P, Q, device=device))
        torch.testing.assert_close(compiled(x, y), loss(x, y), rtol=0, atol=1e-6)
    assert len(graphs) == 1


@short(
    "to Inductor a backend is a word among the operator's arguments",
    lambda backend: backend == "library",
)
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="Inductor generates C++ for the CPU, and there is no compiler for it",
)
def test_compile_with_inductor(backend: str, device: torch.device) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 2 * bird_kernels.cka_loss(x.sin(), y, backend=backend)

    x, y = features(N, P, Q, device=device)
    # Its cache does not see a change of the operators' shape functions.
    with torch._inductor.config.patch(force_disable_caches=True):
        found = evaluate(torch.compile(loss, fullgraph=True), x, y)
    torch.testing.assert_close(found, evaluate(loss, x, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_all_coefficients_are_written(
    masked: bool, mask: Tensor, estimator: str, route: str, backend: str, device: torch.device
) -> None:
    """Those that no backward reads, too: what an operator returns is compared, copied and saved."""
    x, y = features(N, P, Q, device=device)
    call = described(route, backend, estimator)
    with poison():
        _, coefficients, *_ = torch.ops.bird.alignment(x, y, mask if masked else None, *call)
    assert coefficients.isfinite().all()


def test_poison_reaches_into_operators(device: torch.device) -> None:
    """The fixture of the accuracy tests would be worth nothing otherwise."""
    seen = []

    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            seen.extend([torch.empty_like(x), x.new_empty(5), torch.empty(2, 3, dtype=torch.half, device=device)])
            return x.clone()

    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with poison():
        Leaky.apply(torch.ones(4, device=device))
        counters = torch.empty(3, dtype=torch.int32, device=device)
    assert all(tensor.isnan().all() for tensor in seen)
    assert counters.ne(0).all()
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert before == after
