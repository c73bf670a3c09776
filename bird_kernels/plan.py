r"""The route of a call, its tiles, launches and workspace: pure functions of shapes, dtypes and device, never of data.

Two routes, orders of multiplication, lead to the same value and gradient, for centred X [n, p] and Y [n, q]:

    gram    K = X X^T, L = Y Y^T;               n^2 (p+q) flops, then 2 n^2 p for dX = (L - (a/b) K) X
    cross   C = Y^T X, A = X^T X, |Y^T Y|;      n (p^2 + q^2 + 2pq), then 2np (p+q) for dX = Y C - (a/b) X A

(of symmetric products half is counted), so ``gram`` is cheaper exactly where n <= p + q. The terms could also be
mixed, with <K,L> from C but <K,K> from K, say. That is never cheaper than both: a mixed form has fewer operations than
``gram`` only where n exceeds the width of the side whose Gram matrix it forms, and fewer than ``cross`` only where it
does not (the tests check it by brute force). With the cheaper route no workspace exceeds O(n min(n, p+q)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .types import Choice, Plan, Problem, Route, Sheet, Transport, Variant

# The most rows that the fused kernels take with a linear kernel: the native backend holds all rows of some features in
# shared memory (csrc/kernels.h), and the Triton backend's programs read all rows of their columns.
FEW_ROWS = 512

# RBF kernel matrices of up to so many bytes (the upper halves of both; n = 8192 in fp32) are kept from forward to
# backward. Larger ones are computed again by each pass: 5 times the products, and O(strip * n) memory.
KEPT = 1 << 28
# Rows of a strip (`library_rbf`). On two cores of a Zen 5 CPU at n = 1024, strips of 256 rows stay in the cache. The
# number for CUDA is not measured yet.
STRIP = {"cpu": 256, "cuda": 1024}

# The multiprocessors of a large GPU (132 on an H100), where a device is not asked, and how many programs of a
# launch-bound problem or a median each is given, since they wait more than they compute (not measured yet).
PROGRAMS, CROWD = 132, 4

# The most rows that a program of the Triton backend holds at once: features are read once, M stays on the chip.
ROWS_AT_ONCE = 128

# The most pairs that share launches: kernels take 4 KB of arguments, addresses and, the native ones, strides.
MOST_PAIRS = {"native": 32, "triton": 64}


class Tiling(NamedTuple):
    """How the Triton kernels divide a product: sides of square output tiles, inner steps, and splits of the inner sum.

    ``splits`` counts the programs that share a tile of K, then of L (of the first pair, of the second, ...), ``chunk``
    the feature columns that each sums over. Both are empty where one program computes a whole tile. ``rows``: how many
    rows a program holds if it holds all of them, and computes all tiles; else 0.
    """

    block: int
    step: int
    splits: tuple[int, ...] = ()
    chunk: int = 0
    rows: int = 0


class GradientTiling(NamedTuple):
    """How the backward of the Triton kernels is divided: rows and columns of a tile of a gradient, terms of its sum
    that are multiplied at a time, and, where these are all, how many tiles of the same rows a program computes."""

    tall: int
    wide: int
    terms: int
    share: int = 0


# Of RBF distances. The inner sum is not split: the kernel needs the whole distance. With inner steps of 64 the
# half-precision gradient would spill 56 to 232 bytes on sm_80, sm_90 and sm_100.
RBF_TILING = Tiling(64, 32)


def small_tiling(problems: Sequence[Problem], multiprocessors: int | None = None) -> Tiling:
    """The tiling of K and L of pairs of few rows: columns are split until there are programs enough for a GPU.

    Features that are so wide that reading them takes longest are read once, up to `ROWS_AT_ONCE` rows, by one program
    for each multiprocessor. Exact products take longer than that.
    """
    first, units = problems[0], PROGRAMS if multiprocessors is None else multiprocessors
    block, step = 64, 64 if first.dtype.itemsize == 2 else 32
    widths = [d for problem in problems for d in (problem.p, problem.q)]
    steps = sum(ceil_div(d, step) for d in widths)
    rows = block if first.n <= block else 0
    programs = CROWD * units // upper(ceil_div(first.n, block))
    if block < first.n <= ROWS_AT_ONCE and _rounds(first) and steps >= CROWD * units:
        # Parts in tiles of 32, of which those above the diagonal are 10 of 16: of whole matrices, 1.2 times the least
        # is moved for 100,352 features; with these 1.14.
        block, step, rows, programs = 32, 2 * step, ROWS_AT_ONCE, units + 1 - len(widths)
        steps = sum(ceil_div(d, step) for d in widths)
    chunk = ceil_div(steps, max(programs, len(widths))) * step
    return Tiling(block, step, tuple(ceil_div(d, chunk) for d in widths), chunk, rows)


def gradient_tiling(problems: Sequence[Problem], multiprocessors: int | None = None) -> GradientTiling:
    """The tiling of gradients, in tiles so small that there are programs enough; M stays on the chip where it can."""
    first, units = problems[0], PROGRAMS if multiprocessors is None else multiprocessors
    tall, wide = 64, 64
    terms, held = 64 if first.dtype.itemsize == 2 and first.kernel is None else 32, False
    if first.kernel is None and first.n <= ROWS_AT_ONCE and _rounds(first):
        terms, held = max(16, 1 << (first.n - 1).bit_length()), True
        tall, wide = terms, 64 if first.dtype.itemsize == 2 else 32
    sides = [(p.p, p.x_grad) for p in problems] + [(p.q, p.y_grad) for p in problems]
    wanted = [d for d, wants in sides if wants]

    def tiles() -> int:
        return ceil_div(first.n, tall) * sum(ceil_div(d, wide) for d in wanted)

    while tiles() < units and tall > 16:
        tall //= 2
    if tiles() < units:
        wide = 32
    share = ceil_div(tiles(), max(units + 1 - len(wanted), 1)) if tiles() > CROWD * units else 1
    return GradientTiling(tall, wide, terms, share if held else 0)


def _rounds(problem: Problem) -> bool:
    """Whether the operands of its products have one part only: halves, and tf32."""
    return problem.dtype.itemsize == 2 or problem.precision == "tf32"


def together(problems: Sequence[Problem], backend: str) -> bool:
    """Whether pairs can share a backend's launches: 2 to `MOST_PAIRS`, of one dtype and one n, few rows."""
    first = problems[0]
    alike = all((p.n, p.dtype) == (first.n, first.dtype) for p in problems)
    return 2 <= len(problems) <= MOST_PAIRS[backend] and alike and first.n <= FEW_ROWS


def launches(problem: Problem) -> tuple[int, int]:
    """The numbers of kernels that the Triton backend launches in a forward and in its backward."""
    backward = min(problem.x_grad + problem.y_grad, 1)
    if problem.kernel is not None:  # locations, shift, distances, four digits of the median, kernels, moments
        return 9 if problem.kernel.sigma is None else 6, backward
    return 2 + (problem.estimator == "unbiased"), backward


def upper(tiles: int) -> int:
    """The tiles on and above the diagonal of tiles x tiles."""
    return tiles * (tiles + 1) // 2


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv` is for kernels, and costs 4 us outside of them."""
    return -(-a // b)


def route_flops(route: Route, n: int, p: int, q: int, x_grad: bool, y_grad: bool) -> int:
    """Floating-point operations of one forward and the requested backward."""
    if route == "gram":
        return n * n * (p + q) + 2 * n * n * (x_grad * p + y_grad * q)
    return n * (p * p + q * q + 2 * p * q) + 2 * n * (p + q) * (x_grad * p + y_grad * q)


def are_few(n: int) -> bool:
    """Whether the native and the Triton backend can take n rows with a linear kernel."""
    return True if n <= FEW_ROWS else False  # noqa: SIM210 - for torch.compile a constant, where the comparison is not


def choose_route(n: int, p: int, q: int, backend: str = "library") -> Route:
    """The route with fewer operations, whichever sides need gradients: ``gram`` exactly where n <= p + q.

    The native and the Triton backend have ``gram`` alone: with so few rows launches cost more than operations. So has
    the reference, the literal formula.

    Every difference of the two counts has the factor n (n - p - q): for a gradient of x, n (n - p - q) (3p + q).
    """
    return "gram" if backend in ("native", "triton", "reference") or n <= p + q else "cross"


def route_of(problem: Problem, backend: str) -> Route:
    """`choose_route`, or `route_on_cpu`; an RBF kernel, which is no product of features, has ``gram`` alone."""
    n, p, q, *_ = problem
    if problem.kernel:
        return "gram"
    # The difference of Gram matrices is exact where they agree.
    plain = backend == "library" and problem.device.type == "cpu" and problem.statistic != "gram_mse"
    return route_on_cpu(n, p, q) if plain else choose_route(n, p, q, backend)


def route_on_cpu(n: int, p: int, q: int) -> Route:
    """The library's route on a CPU, where symmetric products count whole: its blocks of them are large, and moments of
    n x n numbers take their time (512 x 256, one thread: forward 4.3 ms by ``gram``, 2.4 by ``cross``; with backward
    8.9 and 5.7; at 112 x 64 it is a draw)."""
    return "gram" if n * (p + q) <= p * p + p * q + q * q else "cross"


def variant(problem: Problem) -> Variant:
    """What a backend must support for this problem: of all that it asks for, what the fewest backends have."""
    if not problem.center:
        return "center=False"
    if problem.statistic == "gram_mse":
        return "gram_mse"
    if problem.kernel is not None:
        if problem.kernel.flow:
            return "RBF(flow=True)"
        if problem.kernel.median != "lower":
            return 'RBF(median="average")'
        return 'kernel="rbf"' if keeps_kernels(problem) else "RBF kernels too large to be kept"
    return "sqrt=True" if problem.statistic == "sqrt_cka_loss" else "linear"


def keeps_kernels(problem: Problem) -> bool:
    """Whether both kernel matrices (upper halves) stay in memory; else strips of them are computed when needed."""
    return True if problem.n**2 * _wide(problem) <= KEPT else False  # noqa: SIM210 - as in `are_few`


def kernel_passes(problem: Problem) -> int:
    """How many times the RBF kernel matrices are computed: once if they are kept.

    Otherwise once for each 16 bits of the median, for the row sums, for the moments, and for the backward.
    """
    if keeps_kernels(problem):
        return 1
    median = _wide(problem) // 2 if problem.kernel and problem.kernel.sigma is None else 0
    return median + 2 + (problem.x_grad or problem.y_grad)


def strip_rows(problem: Problem) -> int:
    """The rows of a strip: of an RBF kernel matrix so many are computed together."""
    return STRIP["cpu" if problem.device.type == "cpu" else "cuda"]


def strips_size(n: int, rows: int) -> int:
    """An upper bound of the numbers in the upper strips, of up to ``rows`` rows, of an n x n matrix.

    A strip has the columns from its diagonal block, all of it, to the end.
    """
    return n * n if n <= rows else n * (n + rows) // 2


def minimum_bytes(problem: Problem, route: Route) -> int:
    """The least traffic: inputs are read once, wanted gradients written once, and features read again for them.

    A gradient by ``gram`` reads its own side's features again, by ``cross`` those of both sides.
    """
    n, p, q, size = problem.n, problem.p, problem.q, problem.dtype.itemsize
    wanted = problem.x_grad * p + problem.y_grad * q
    again = wanted if route == "gram" else (p + q) * bool(wanted)
    return n * size * (p + q + again + wanted)


def describe(
    problem: Problem, route: Route, choice: Choice, sheet: Sheet | None = None, transport: Transport | None = None
) -> Plan:
    """The plan that ``explain`` prints; its floor, the least possible time, needs the device's ``sheet``."""
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
        tile=_tile(problem, route, backend, sheet),
        flops=flops,
        bytes=traffic,
        workspace=workspace(problem, route, backend),
        why=why,
        floor=_floor(problem, flops, traffic, sheet),
        choice=choice,
        transport=transport,
    )


def workspace(problem: Problem, route: Route, backend: str) -> int:
    """Bytes that are allocated from forward to backward beyond inputs and gradients (leading terms)."""
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
        on_gpu = problem.device.type == "cuda"
        keep_y = problem.y_grad or route == "cross"
        centred = n * (p + keep_y * q) * (2 if on_gpu and problem.dtype.itemsize == 2 else wide)
        if on_gpu and wide == 4 and route == "cross" and problem.estimator == "unbiased":
            # The 32 rows that may dominate (`dominating.APART`) and the means; and products with them, norms and sums.
            centred += (33 * (p + q) + n * (2 * 32 + 5)) * wide
    return products * wide + centred


def _wide(problem: Problem) -> int:
    """Bytes of a number in products and sums: fp32, or fp64 for fp64."""
    return 8 if problem.dtype.itemsize == 8 else 4


def _tile(problem: Problem, route: Route, backend: str, sheet: Sheet | None) -> str:
    if backend == "native":
        return f"all rows of 32 features in shared memory at a time, {2 + (problem.x_grad or problem.y_grad)} launches"
    if backend == "reference":
        return "the literal formula in fp64, under autograd"
    if backend != "triton":
        strips = f" in strips of {strip_rows(problem)} rows, {'kept' if keeps_kernels(problem) else 'streamed'}"
        return "library products" + (strips if problem.kernel else "")
    t = RBF_TILING if problem.kernel else small_tiling([problem], sheet and sheet.multiprocessors)
    count = 2 * upper(ceil_div(problem.n, t.block)) if problem.kernel else upper(ceil_div(problem.n, t.block))
    split = f", split {' + '.join(map(str, t.splits))} ways" if t.splits else ""
    launched = sum(launches(problem))
    shape = "all rows" if t.rows else f"{count} tiles of {t.block} x {t.block}"
    return f"{shape}, inner step {t.step}{split}, {launched} launches"


def _floor(problem: Problem, flops: int, traffic: int, sheet: Sheet | None) -> str:
    if sheet is None:
        return "unknown for this device"
    fp32 = sheet.fp32 if problem.precision in (None, "ieee") else sheet.tf32
    peak = sheet.half if problem.dtype.itemsize == 2 else fp32
    times = flops / peak * 1e-6, traffic / sheet.memory * 1e-6
    bound = "arithmetic" if times[0] > times[1] else "memory"
    return f"{max(times):.3g} us, bound by {bound} (data-sheet peaks, {sheet.name})"
