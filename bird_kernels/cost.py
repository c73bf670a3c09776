"""The cost model: predicted microseconds of each candidate on a GPU for which there are no measurements (`tuning`).

A pure function of sizes, dtypes and the data sheet; no device is queried. A kernel takes its launch plus the longest of
its matrix products at the library's efficiency, its traffic at the memory's, and its instructions at the schedulers'.
**No constant below was measured by us on a GPU**: each names its source. Predictions are good to a third at best.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from . import plan
from .plan import FEW_ROWS, ceil_div, choose_route, variant
from .types import Cost, Problem, Sheet

# Vendors' data sheets: dense rates with fp32 accumulation, boost clocks. A device has the sheet with the longest name
# that is part of its own.
SHEETS = {
    sheet.name: sheet
    for sheet in (
        Sheet("A100", 19.5, 156, 312, 2.0, 40, 108, 1.41),
        Sheet("H100", 67, 494, 989, 3.35, 50, 132, 1.83),
        Sheet("H100 PCIe", 51, 378, 756, 2.0, 50, 114, 1.75),
        Sheet("H200", 67, 494, 989, 4.8, 50, 132, 1.83),
        Sheet("GH200", 67, 494, 989, 4.0, 50, 132, 1.83),
        Sheet("B200", 75, 1100, 2250, 8.0, 126, 148, 1.96),
        Sheet("L4", 30.3, 60, 121, 0.3, 48, 58, 2.04),
        Sheet("L40S", 91.6, 183, 362, 0.864, 96, 142, 2.52),
        Sheet("RTX 3090", 35.6, 35.6, 71, 0.936, 6, 82, 1.70),
        Sheet("RTX 4090", 82.6, 82.6, 165, 1.008, 72, 128, 2.52),
        Sheet("RTX 5090", 104.8, 104.8, 209, 1.79, 96, 170, 2.41),
    )
}
UNKNOWN = Sheet("unknown", 15, 30, 60, 0.45, 4, 48, 1.5)  # a guess: half of an RTX 3090


class Constants(NamedTuple):
    """Shares of a data sheet's peaks that kernels reach, and times that no data sheet has; each with its source."""

    # Estimate: us between the starts of two short kernels in a row. Some ten of them, the hand-written loss of
    # 128 x 512 in a CUDA graph, are expected to take 25-32 us.
    launch: float = 2.5
    # Estimates: us of the host for a call through C++ autograd (18 with its launches); through Python's; for a library
    # operator with its allocation; for a cached Triton launch (4 us with a driver that does nothing,
    # docs/explain/kernels.md); for a CUDA launch from C++.
    native_call: float = 12.0
    python_call: float = 35.0
    library_launch: float = 8.0
    triton_launch: float = 7.0
    native_launch: float = 2.0
    # Public: cuBLAS reaches 0.49 (H800), 0.68 (A100), 0.98 (RTX 4090) of this peak at 8192 (flash-muon's README).
    half: float = 0.65
    tf32: float = 0.75  # estimate: 400 of 494 TFLOP/s for large products, less for others
    fp32: float = 0.75  # estimate: 50 of 67
    memory: float = 0.85  # public: copies reach 4.1-4.3 of the H200's 4.8 TB/s
    cache: float = 23.0  # estimate: bytes per clock and multiprocessor from L2; 5.5 TB/s on an H200
    tiles: tuple[int, int] = (128, 64)  # sides of the library's usual tiles; small ones for small results
    depth: int = 256  # estimate: the fewest inner indices of a split, where tiles alone do not fill the device
    sample: int = 1024  # rows from which the shift is found: they are read a second time
    # Estimates from machine code (sm_90): instructions of a warp in an inner step of a 64 x 64 tile, forward and
    # backward; for each block of rows that is centred first; and the share of the issue slots that such loops fill.
    half_loop: tuple[int, int] = (624, 547)  # steps of 64
    tf32_loop: tuple[int, int] = (257, 266)  # steps of 32
    fp32_loop: tuple[int, int] = (1396, 1396)
    centring: int = 75
    issue: float = 0.55
    # The same of features that are read once (128 rows, the instructions of all warps of a scheduler): a step of 128
    # columns of halves and of 64 of tf32, centred and multiplied; half as many columns of a gradient.
    once: tuple[int, int] = (2360, 1752)
    held: tuple[int, int] = (1024, 544)
    # Estimates from machine code: clocks of a native block for 32 features of 128 rows: loads and means (proportional
    # to the rows); the product; the whole backward (to their square). They are of slower kernels than the present ones,
    # with tiles of 64 rows backward and WMMA, until a GPU has measured these.
    native_load: int = 3400
    native_product: int = 2400
    native_backward: int = 16_000
    # Gaussian kernels, by library operations: launches, a constant and a number per strip of 1024 rows, and bytes for
    # each pair of rows, counted with fake tensors (350 launches with 1 strip, 1330 with 8; 21.5 GB at 8192); estimate:
    # clocks for each pair of rows that the atomics of the median's histograms wait. By Triton: bytes of distances,
    # kernels, moments and gradient, and of each digit of the median; from machine code, instructions of a scheduler's
    # two warps that count a tile's digits (Triton 3.6.0; 662 with 3.8.0).
    library_rbf: tuple[int, int] = (210, 140)
    library_rbf_bytes: int = 320
    library_rbf_clocks: float = 0.5
    rbf_bytes: tuple[int, int] = (36, 4)
    digit_loop: int = 2192


C = Constants()
MARGIN = 1.3  # by which kernels that were never measured must be predicted to win over those that came first
# Public, Hopper, the lowest figures: the speed of a symmetric product kernel over the library's, by the side of its
# result. Others report 1.56 to 1.9 from 4096 on (flash-muon's README: H800, A100, RTX 4090), and losses at 1024.
SYMMETRIC = {4096: 1.26, 8192: 1.46}


def sheet_of(device_name: str) -> Sheet:
    """The data sheet whose name is part, in whole words, of PyTorch's name of the device; `UNKNOWN` if none is."""
    words = [rf"(?<!\w){re.escape(name)}(?!\w)" for name in SHEETS]
    known = [name for name, word in zip(SHEETS, words, strict=True) if re.search(word, device_name, re.IGNORECASE)]
    is_other = "laptop" in device_name.lower()  # a laptop's GPU has the desktop's name and fewer multiprocessors
    return SHEETS[max(known, key=len)] if known and not is_other else UNKNOWN


def predict(problem: Problem, sheet: Sheet) -> dict[str, Cost]:
    """The cost of each candidate that has kernels for the problem, built here or not; empty for fp64, not modelled.

    "symmetric" is the library backend with the symmetric kernel for X^T X or X X^T. ``problem.precision`` None counts
    as "ieee".
    """
    kind = variant(problem)
    if problem.dtype.itemsize == 8:
        return {}
    if kind == 'kernel="rbf"':
        return {"triton": _rbf(problem, sheet, "triton"), "library": _rbf(problem, sheet, "library")}
    if kind not in ("linear", "sqrt=True"):
        return {}
    found = {}
    if problem.n <= FEW_ROWS:
        if kind == "linear":
            found["native"] = native([problem], sheet)
        found["triton"] = fused([problem], sheet)
    found["library"] = _library(problem, sheet, {})
    if side(problem) >= min(SYMMETRIC):
        found["symmetric"] = _library(problem, sheet, SYMMETRIC)
    return found


def best(costs: Mapping[str, Cost], problem: Problem, sheet: Sheet) -> str:
    """The candidate to take. "symmetric" only if the whole call gains as much as its products alone promise: a smaller
    gain is within the model's error, and for a measurement to decide. Features are read once only by `MARGIN`."""
    names = [name for name in costs if name != "symmetric"]
    us = {name: costs[name].us for name in names}
    if "triton" in us and read_once([problem], sheet):
        us["triton"] *= MARGIN
    winner = min(names, key=us.__getitem__)
    if winner == "library" and "symmetric" in costs:
        promised = _speedup(side(problem), SYMMETRIC)
        if costs["library"].us >= promised * costs["symmetric"].us:
            return "symmetric"
    return winner


def shared(problems: Sequence[Problem], sheet: Sheet) -> dict[str, float]:
    """Microseconds of the common launches of pairs by each backend that has them, where they must win by `MARGIN`
    times that."""
    margin = MARGIN if read_once(problems, sheet) else 1.0
    return {"native": MARGIN * native(problems, sheet).us, "triton": margin * fused(problems, sheet).us}


def read_once(problems: Sequence[Problem], sheet: Sheet) -> bool:
    """Whether Triton's kernels read the wide features of these pairs once, which they were never measured to do."""
    linear = problems[0].kernel is None and problems[0].n <= FEW_ROWS
    return linear and plan.small_tiling(problems, sheet.multiprocessors).rows == plan.ROWS_AT_ONCE


def fused(problems: Sequence[Problem], sheet: Sheet) -> Cost:
    """The cost of pairs of one n and dtype by Triton's fused kernels, which share two to four launches."""
    first, units = problems[0], sheet.multiprocessors
    t, g = plan.small_tiling(problems, units), plan.gradient_tiling(problems, units)
    half = first.dtype.itemsize == 2
    loop = C.half_loop if half else C.tf32_loop if first.precision == "tf32" else C.fp32_loop
    tiles, (widths, wanted) = ceil_div(first.n, t.block), _widths(problems)
    once = t.rows == plan.ROWS_AT_ONCE
    step = C.once[not half] if once else loop[0] + C.centring * tiles
    clocks = _issue((1 if once else plan.upper(tiles)) * sum(ceil_div(d, t.step) for d in widths), step, sheet)
    blocks = ceil_div(first.n, g.tall) * sum(ceil_div(d, g.wide) for d in wanted)
    inner = ceil_div(first.n, g.terms) * loop[1] * g.tall * g.wide // 4096
    clocks += _issue(blocks, C.held[not half] * g.tall // 128 if g.share else inner, sheet)
    size = first.n * first.dtype.itemsize
    launches = 2 + (first.estimator == "unbiased") + bool(wanted)
    device = max(clocks / sheet.clock * 1e-3, _cold(size * (sum(widths) + 2 * sum(wanted)), sheet))
    parts = sum(t.splits) * plan.upper(tiles) * 4 * t.block**2
    device += launches * C.launch + _warm(2 * parts, parts, sheet)
    return Cost(C.python_call + launches * C.triton_launch, device, launches)


def _widths(problems: Sequence[Problem]) -> tuple[list[int], list[int]]:
    """The widths of all sides, and of those whose gradients are wanted."""
    sides = [side for p in problems for side in ((p.p, p.x_grad), (p.q, p.y_grad))]
    return [d for d, _ in sides], [d for d, wants in sides if wants]


def one_by_one(costs: Iterable[tuple[str, Cost]]) -> float:
    """Microseconds of several pairs, each with launches of its own, in one autograd node: (backend, cost) of each."""
    per = {"native": C.native_launch, "triton": C.triton_launch, "library": C.library_launch}
    chosen = list(costs)
    host = C.python_call + sum(cost.launches * per[name] for name, cost in chosen)
    return max(host, sum(cost.device for _, cost in chosen))


def native(problems: Sequence[Problem], sheet: Sheet) -> Cost:
    """As `fused`, by the native kernels, whose blocks hold all rows of 32 features (csrc/cuda/gram.cuh)."""
    first, (widths, wanted) = problems[0], _widths(problems)
    slots, tiles, rows = 2 * sheet.multiprocessors, ceil_div(first.n, 128), first.n / 128
    chunks = sum(ceil_div(d, 32) for d in widths) * tiles * (tiles + 1) // 2
    clocks = ceil_div(chunks, slots) * (C.native_product + C.native_load * rows)
    if wanted:
        outputs = sum(ceil_div(d, 32) for d in wanted)
        blocks = outputs * (ceil_div(first.n, 64) if outputs < slots else 1)
        clocks += outputs * C.native_backward * rows**2 / min(blocks, slots)
    launches = 2 + (first.estimator == "unbiased") + bool(wanted)
    moved = first.n * (sum(widths) + 2 * sum(wanted)) * first.dtype.itemsize
    device = max(clocks / sheet.clock * 1e-3, _cold(moved, sheet))
    call = C.native_call if len(problems) == 1 else C.python_call
    return Cost(call + launches * C.native_launch, launches * C.launch + device, launches)


def _library(problem: Problem, sheet: Sheet, symmetric: Mapping[int, float]) -> Cost:
    """The cost of `backends.shifted`: shift, products, finish; backward, for each wanted side, a mix and a product."""
    n, p, q, size = problem.n, problem.p, problem.q, problem.dtype.itemsize
    sides = [d for d, wants in ((p, problem.x_grad), (q, problem.y_grad)) if wants]
    gram = choose_route(n, p, q) == "gram"
    inputs = n * (p + q) * size
    # The shift pass reads a sample, then everything, and writes what the products read.
    device = _cold(inputs * (1 + min(1.0, C.sample / n)), sheet) + _warm(inputs, inputs, sheet)
    if gram:
        products, own, other = 8 * n * n, [(n, n, p), (n, n, q)], []
    elif symmetric:
        products, own, other = 4 * (p * p + q * q + p * q), [(p, p, n), (q, q, n)], [(q, p, n)]
    else:  # [Zy|Zx]^T Zx in one
        products, own, other = 4 * (p * p + q * q + p * q), [(q, q, n)], [(p + q, p, n)]
    device += sum(_product(*shape, 4, problem, sheet, faster=_speedup(shape[0], symmetric)) for shape in own)
    device += sum(_product(*shape, 4, problem, sheet) for shape in other)
    device += _warm(2 * products, products, sheet)
    for d in sides:
        device += _warm(products + products * size // 4, products, sheet)
        device += _product(n, d, n if gram else p + q, size, problem, sheet)
    if problem.estimator == "unbiased" and not gram:  # z is read once more, and fp32 gradients get the rows' terms
        launches = 8 + 4 * len(sides)
        device += _warm(inputs, inputs, sheet) + sum(_warm(n * d * (2 * size + 8), inputs, sheet) for d in sides)
    else:
        fp16 = str(problem.dtype) == "torch.float16"  # scaled and rounded in a launch of its own
        launches = 6 + (2 + fp16) * len(sides)
    return Cost(C.python_call + launches * C.library_launch, launches * C.launch + device, launches)


def _rbf(problem: Problem, sheet: Sheet, backend: str) -> Cost:
    """The cost of Gaussian kernels that are kept in memory."""
    n, wanted = problem.n, problem.x_grad * problem.p + problem.y_grad * problem.q
    work = 2 * n * n * (problem.p + problem.q + wanted) / _rate(problem, sheet) * 1e-6
    if backend == "triton":
        forward, backward = plan.launches(problem)
        count, per, digits = forward + backward, C.triton_launch, forward - 5  # one counts as much if sigma is given
        clocks = _issue(2 * digits * plan.upper(ceil_div(n, 64)), C.digit_loop, sheet)
        moved = (C.rbf_bytes[0] + digits * C.rbf_bytes[1]) * n * n
    else:
        count, per = C.library_rbf[0] + C.library_rbf[1] * ceil_div(n, 1024), C.library_launch
        clocks, moved = n * n * C.library_rbf_clocks, C.library_rbf_bytes * n * n
        work *= 1.5  # estimate: distances and kernels are separate operators
    device = clocks / sheet.clock * 1e-3 + _warm(moved, 8 * n * n, sheet) + work
    return Cost(C.python_call + count * per, count * C.launch + device, count)


def matrix(n: int, widths: Sequence[int], problem: Problem, sheet: Sheet) -> Cost:
    """The cost of `cka_matrix`, unbiased, of n rows and two networks with layers of these ``widths``, by Triton,
    as if its tiles took the time of the library's whole products."""
    layers = 2 * len(widths)
    device = sum(2 * _product(n, n, d, 4, problem, sheet) + _cold(8 * n * d, sheet) for d in widths)
    device += _warm(4 * layers * n * n, 2 * layers * n * n, sheet)
    launches = 21 + 2 * ceil_div(plan.upper(ceil_div(n, 64)), max(n // 32, 1))
    return Cost(C.python_call + launches * C.library_launch, launches * C.launch + device, launches)


def _product(m: int, n: int, k: int, size: int, problem: Problem, sheet: Sheet, *, faster: float = 1.0) -> float:
    """Microseconds of a product [m, k] @ [k, n], its result in numbers of ``size`` bytes, without its launch."""
    units = sheet.multiprocessors
    tiles = max(C.tiles, key=lambda side: (min(ceil_div(m, side) * ceil_div(n, side), units), side))
    count = ceil_div(m, tiles) * ceil_div(n, tiles)
    shares = range(1, min(ceil_div(units, count) + 3, max(1, k // C.depth)) + 1)  # splits of the inner sum
    filled = max(count * s / (ceil_div(count * s, units) * units) for s in shares)
    read = m + n if m != n else m  # a square result is taken for the product of a matrix with itself
    moved = read * k * problem.dtype.itemsize + size * m * n
    return max(2 * m * n * k / (_rate(problem, sheet) * filled * faster) * 1e-6, _warm(moved, moved, sheet))


def _rate(problem: Problem, sheet: Sheet) -> float:
    """TFLOP/s that the library's large products reach."""
    if problem.dtype.itemsize == 2:
        return sheet.half * C.half
    if problem.precision == "tf32":
        return sheet.tf32 * C.tf32
    exact = sheet.fp32 * C.fp32
    return max(exact, sheet.tf32 * C.tf32 / 3) if problem.precision == "tf32x3" else exact


def _speedup(side: int, symmetric: Mapping[int, float]) -> float:
    """How many times as fast a symmetric product with this side is, by ``symmetric``; 1 where it says nothing."""
    return max((factor for least, factor in symmetric.items() if side >= least), default=1.0)


def side(problem: Problem) -> int:
    """The larger side of the symmetric products' results."""
    route = choose_route(problem.n, problem.p, problem.q)
    return problem.n if route == "gram" else max(problem.p, problem.q)


def _issue(programs: int, instructions: int, sheet: Sheet) -> float:
    """Clocks until ``programs`` of so many instructions per warp are issued, spread over the multiprocessors."""
    return max(programs / sheet.multiprocessors, 1.0) * instructions / C.issue


def _cold(size: float, sheet: Sheet) -> float:
    """Microseconds to move so many bytes from or to memory."""
    return size / (sheet.memory * C.memory) * 1e-6


def _warm(size: float, working_set: float, sheet: Sheet) -> float:
    """The same of bytes that were just written: they come from L2 if half of it holds the ``working_set``."""
    if working_set > sheet.cache * 0.5e6:
        return _cold(size, sheet)
    return size / (sheet.multiprocessors * sheet.clock * C.cache) * 1e-3
