r"""Which way to go, and why: pure functions of shapes, dtypes and device. Never looks at data, never syncs.

Two routes lead to the same numbers, for centred X [n, p] and Y [n, q]:

    gram    K = X X^T, L = Y Y^T;               n^2 (p+q) flops, then 2 n^2 p for dX = (L - (a/b) K) X
    cross   C = Y^T X, A = X^T X, |Y^T Y|;      n (p^2 + q^2 + 2pq), then 2np (p+q) for dX = Y C - (a/b) X A

(symmetric products at half price), so ``gram`` is cheaper exactly where n <= p + q. The terms could also be mixed:
<K,L> from C but <K,K> from K, say. It never pays: a mixed form wins over ``gram`` only where n exceeds the width that
its Gram side has, and over ``cross`` only where it does not (checked by brute force in the tests). With the cheaper
route no workspace exceeds O(n min(n, p+q)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .types import Choice, Plan, Problem, Route, Sheet, Transport, Variant

# Of linear kernels, the limit of the native backend, which holds all rows of some features in shared memory
# (csrc/kernels.h), and of the Triton backend, whose programs read all rows of their columns.
FEW_ROWS = 512

# Kernel matrices of up to so many bytes (both, upper halves; n = 8192 in fp32) are kept from forward to backward.
# Above, each pass computes them again: 5 times the products, and O(strip * n) memory.
KEPT = 1 << 28
# Rows of a strip. Two cores of a Zen 5 CPU, n = 1024: the strips of 256 stay in its cache. On CUDA not yet measured.
STRIP = {"cpu": 256, "cuda": 1024}

# Programs that fill a large GPU (132 multiprocessors on an H100). Not yet measured.
PROGRAMS = 132

# Launch-bound problems: programs wait more than they compute, and so many of them stand on one multiprocessor. Not yet
# measured.
CROWD = 4
MOST_PAIRS = 64  # that share launches: their addresses are arguments of a kernel, which takes 4 KB of them


class Tiling(NamedTuple):
    """How the Triton kernels cut a product: square tiles, inner steps, and the programs that share a tile.

    ``splits`` counts the programs that share a tile of K and of L (of the first pair, of the second, ...), ``chunk``
    the columns that each takes; there are none where a program makes its tiles whole.
    """

    block: int
    step: int
    splits: tuple[int, ...] = ()
    chunk: int = 0


# Of distances and of the RBF gradient. Not split: a kernel is a function of the whole distance. With inner steps of 64
# the gradients of halves spill 56 to 232 bytes on sm_80, sm_90 and sm_100.
RBF_TILING = Tiling(64, 32)


def small_tiling(problems: Sequence[Problem]) -> Tiling:
    """Tiles of the forward's products of launch-bound pairs: the columns are split until the GPU is full."""
    first = problems[0]
    block, step = 64, 64 if first.dtype.itemsize == 2 else 32
    widths = [d for problem in problems for d in (problem.p, problem.q)]
    programs = max(CROWD * PROGRAMS // _upper(ceil_div(first.n, block)), len(widths))
    chunk = ceil_div(sum(ceil_div(d, step) for d in widths), programs) * step
    return Tiling(block, step, tuple(ceil_div(d, chunk) for d in widths), chunk)


def together(problems: Sequence[Problem]) -> bool:
    """Whether several pairs share the Triton backend's launches: not one pair, very many, other rows or dtypes."""
    first = problems[0]
    alike = all((p.n, p.dtype) == (first.n, first.dtype) for p in problems)
    return 2 <= len(problems) <= MOST_PAIRS and alike and first.n <= FEW_ROWS


def launches(problem: Problem) -> tuple[int, int]:
    """Kernels that the Triton backend launches in a forward and in its backward.

    Of an RBF kernel there are the library's besides, which find its bandwidth.
    """
    backward = min(problem.x_grad + problem.y_grad, 1)
    if problem.kernel is not None:  # locations, shift, distances, kernels, moments
        return 5 + problem.masked, backward
    return 2 + (problem.estimator == "unbiased"), backward


def _upper(tiles: int) -> int:
    return tiles * (tiles + 1) // 2


def ceil_div(a: int, b: int) -> int:
    """Rounded up. Not `triton.cdiv`: it is for kernels, and costs 4 us outside of them."""
    return -(-a // b)


def route_flops(route: Route, n: int, p: int, q: int, x_grad: bool, y_grad: bool) -> int:
    """Floating-point operations of one forward and the requested backward."""
    if route == "gram":
        return n * n * (p + q) + 2 * n * n * (x_grad * p + y_grad * q)
    return n * (p * p + q * q + 2 * p * q) + 2 * n * (p + q) * (x_grad * p + y_grad * q)


def are_few(n: int) -> bool:
    """Whether the native and the Triton backend take a linear kernel of n rows."""
    return True if n <= FEW_ROWS else False  # noqa: SIM210 - for torch.compile a constant, where the comparison is not


def choose_route(n: int, p: int, q: int, backend: str = "library") -> Route:
    """The route with fewer operations, whatever sides need gradients: ``gram`` exactly where n <= p + q.

    The native and the Triton backend know no other: their rows are so few that launches count, not operations. Nor does
    the reference, which is the literal formula.

    Every difference of the two counts has the factor n (n - p - q): for a gradient of x, n (n - p - q) (3p + q).
    """
    return "gram" if backend in ("native", "triton", "reference") or n <= p + q else "cross"


def route_of(problem: Problem, backend: str) -> Route:
    """`choose_route`; an RBF kernel is known by its Gram matrix alone."""
    return "gram" if problem.kernel else choose_route(problem.n, problem.p, problem.q, backend)


def variant(problem: Problem) -> Variant:
    """What a backend must be able to do for this problem: the least common of what it asks for."""
    if not problem.center:
        return "center=False"
    if problem.statistic == "gram_mse":
        return "gram_mse"
    if problem.kernel is not None:
        if problem.kernel.flow:
            return "RBF(flow=True)"
        return 'kernel="rbf"' if keeps_kernels(problem) else "RBF kernels too large to be kept"
    return "sqrt=True" if problem.statistic == "sqrt_cka_loss" else "linear"


def keeps_kernels(problem: Problem) -> bool:
    """Whether both kernel matrices (upper halves) stay in memory; else strips of them are computed when needed."""
    return True if problem.n**2 * _wide(problem) <= KEPT else False  # noqa: SIM210 - as in `are_few`


def kernel_passes(problem: Problem) -> int:
    """How many times the kernel matrices are computed: once where they are kept.

    Streamed, for each 16 bits of the median, for the row sums, for the moments, and for the backward.
    """
    if keeps_kernels(problem):
        return 1
    median = _wide(problem) // 2 if problem.kernel and problem.kernel.sigma is None else 0
    return median + 2 + (problem.x_grad or problem.y_grad)


def strip_rows(problem: Problem) -> int:
    """Rows of a kernel matrix that are computed together."""
    return STRIP["cpu" if problem.device.type == "cpu" else "cuda"]


def strips_size(n: int, rows: int) -> int:
    """Numbers that the upper strips of an n x n matrix have at the most, strips of ``rows`` rows and a last of fewer.

    A strip begins at its diagonal block, which is whole.
    """
    return n * n if n <= rows else n * (n + rows) // 2


def minimum_bytes(problem: Problem, route: Route) -> int:
    """Both inputs read once, each wanted gradient written once; and read again for the gradients what they are made of.

    That is a side's own features by Gram matrices, which hold the other's, and both by products of features.
    """
    n, p, q, size = problem.n, problem.p, problem.q, problem.dtype.itemsize
    wanted = problem.x_grad * p + problem.y_grad * q
    again = wanted if route == "gram" else (p + q) * bool(wanted)
    return n * size * (p + q + again + wanted)


def describe(
    problem: Problem, route: Route, choice: Choice, sheet: Sheet | None = None, transport: Transport | None = None
) -> Plan:
    """The plan that ``explain`` prints, with work, traffic and, where the device's ``sheet`` is known, the floor."""
    backend = choice.backend
    n, p, q = problem.n, problem.p, problem.q
    sides = problem.x_grad, problem.y_grad
    other: Route = "cross" if route == "gram" else "gram"
    flops, alternative = (route_flops(r, n, p, q, *sides) for r in (route, other))
    why = f"{flops / 1e9:.3g} Gflop, {other} would need {alternative / 1e9:.3g}"
    if problem.kernel is not None:
        flops += n * n * (p + q) * (kernel_passes(problem) - 1)
        why = f"{flops / 1e9:.3g} Gflop, an RBF kernel has no other"
    traffic = minimum_bytes(problem, route)
    return Plan(
        problem=problem,
        route=route,
        backend=backend,
        tile=_tile(problem, route, backend),
        flops=flops,
        bytes=traffic,
        workspace=workspace(problem, route, backend),
        why=why,
        floor=_floor(problem, flops, traffic, sheet),
        choice=choice,
        transport=transport,
    )


def workspace(problem: Problem, route: Route, backend: str) -> int:
    """Bytes alive between forward and backward beyond inputs and gradients (leading terms)."""
    n, p, q = problem.n, problem.p, problem.q
    wide = 8 if backend == "reference" else _wide(problem)
    if problem.kernel is not None:
        if backend == "triton":
            return 8 * n * n + 16 * n + 8 * n * (ceil_div(p, 8) + ceil_div(q, 8)) * problem.dtype.itemsize
        kept = keeps_kernels(problem)
        kernels = 2 * strips_size(n, strip_rows(problem)) if kept else 0
        return (kernels + n * (p + (problem.y_grad or not kept) * q)) * wide + 16 * n
    products = 2 * n * n if route == "gram" else p * q + p * p + problem.y_grad * q * q
    centred = 0
    if backend == "library":
        half = problem.device.type == "cuda" and problem.dtype.itemsize == 2
        keep_y = problem.y_grad or route == "cross"
        centred = n * (p + keep_y * q) * (2 if half else wide)
    return products * wide + centred


def _wide(problem: Problem) -> int:
    """Bytes of a number in products and statistics."""
    return 8 if problem.dtype.itemsize == 8 else 4


def _tile(problem: Problem, route: Route, backend: str) -> str:
    if backend == "native":
        return f"all rows of 32 features in shared memory at a time, {2 + (problem.x_grad or problem.y_grad)} launches"
    if backend == "reference":
        return "the literal formula in fp64, under autograd"
    if backend != "triton":
        strips = f" in strips of {strip_rows(problem)} rows, {'kept' if keeps_kernels(problem) else 'streamed'}"
        return "library products" + (strips if problem.kernel else "")
    t = RBF_TILING if problem.kernel else small_tiling([problem])
    count = 2 * _upper(ceil_div(problem.n, t.block)) if problem.kernel else _upper(ceil_div(problem.n, t.block))
    split = f", split {' + '.join(map(str, t.splits))} ways" if t.splits else ""
    launched = sum(launches(problem))
    library = " and the library's for the bandwidth" if problem.kernel else ""
    return f"{count} tiles of {t.block} x {t.block}, inner step {t.step}{split}, {launched} launches{library}"


def _floor(problem: Problem, flops: int, traffic: int, sheet: Sheet | None) -> str:
    if sheet is None:
        return "unknown for this device"
    fp32 = sheet.fp32 if problem.precision in (None, "ieee") else sheet.tf32
    peak = sheet.half if problem.dtype.itemsize == 2 else fp32
    times = flops / peak * 1e-6, traffic / sheet.memory * 1e-6
    bound = "arithmetic" if times[0] > times[1] else "memory"
    return f"{max(times):.3g} us, bound by {bound} (data-sheet peaks, {sheet.name})"
