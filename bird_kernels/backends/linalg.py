"""Building blocks in plain PyTorch: centring, scaling, matrix products and inner products.

Half-precision operands are multiplied without conversion and accumulated in fp32 where the library can (CUDA), else
converted to fp32. Scalars are Python floats; on CUDA they stay 0-d tensors, so that nothing synchronises.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..moments import Scalar
from ..types import Problem

# Symmetric products of two or more blocks are computed block by block, only the upper ones. On two cores of a Zen 5 CPU
# in fp32 this takes 0.9 of the time at m = 256, 0.75 at 512, 0.68 at 1024; with fewer than 256 rows it is faster only
# if they are long: 1.0 at 128 x 512, 0.86 at 128 x 2048. On CUDA not yet measured.
SMALLEST_BLOCK, LARGEST_BLOCK = {"cpu": 128, "cuda": 2048}, {"cpu": 512, "cuda": 4096}
LONG_ROWS, SMALLEST_BLOCK_OF_LONG_ROWS = 1024, 64
# Up to these sizes a dot product (MKL) and a sum (PyTorch) run on one thread. Waking a second thread costs 80 us.
ONE_THREAD_DOT, ONE_THREAD_SUM = 1 << 13, 1 << 15
# The most terms of a sum of products that are accumulated at a time; longer sums lose accuracy on GPU and CPU.
PART = 16_384
FP32_MAX = torch.finfo(torch.float32).max


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), skipped if x has that dtype already: the call alone takes 0.8 us."""
    return x if x.dtype == dtype else x.to(dtype)


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [n, d] with zeros in the rows where ``mask`` [n] is False."""
    if mask is None:
        return x
    if x.is_cpu:  # takes a fourth of the time of `where`, but is wrong if masked rows hold NaN or Inf
        product = x * mask[:, None]
        if math.isfinite(product.sum().item()):
            return product
    return torch.where(mask[:, None], x, 0.0)


def subtract_mean(x: Tensor, n: float, keep: Tensor | None, ours: bool = False) -> tuple[Tensor, Tensor]:
    """Columns minus their means over ``n`` rows, and their sums; in place if x is ``ours``.

    ``keep`` [rows]: 1, or 0 for masked rows, in which x must be zero; None: no row is masked. For small x sum(0) takes
    half the time of mean(0).
    """
    total = x.sum(0)
    out = x if ours else None
    if keep is not None:
        return torch.addr(x, keep, total * (1.0 / n), alpha=-1.0, out=out), total
    # In one operator only if each row is split into SIMD vectors and a remainder alike: vectors use fused multiply-add,
    # the remainder rounds twice, so a column-major x, or one that threads share, would get different residuals by row.
    alone = x.numel() <= ONE_THREAD_SUM or torch.get_num_threads() == 1
    if alone and x.shape[1] > 1 and x.is_contiguous():
        return torch.sub(x, total, alpha=1.0 / n, out=out), total
    return torch.sub(x, total * (1.0 / n), out=out), total


def centre(
    x: Tensor, mask: Tensor | None, count: Scalar, problem: Problem
) -> tuple[Tensor, Scalar, tuple[Tensor, Tensor]]:
    """Centred columns times a power of two that brings the largest entry near 1, that scale, and the means' two parts.

    The mean is subtracted in two passes; the second removes the rounding error of the first. So a constant column is
    exactly zero, where one pass would leave a variance of eps * |mean|. Nothing is subtracted without `center`.
    """
    wide, operand = dtypes(problem)
    x = to(x, wide)
    if not problem.center:
        x = kept(x, mask)
        first = second = x.new_zeros(x.shape[1])
    elif mask is None:
        first = x.mean(0)
        x = x - first
        second = x.mean(0)
        x -= second
    else:
        keep = mask.to(wide)
        rows = at_least(1.0, count)
        x = kept(x, mask)
        first = x.sum(0) / rows
        x.addr_(keep, first, alpha=-1.0)
        second = x.sum(0) / rows
        x.addr_(keep, second, alpha=-1.0)
    scale = power_of_two(x)
    if is_harmless(scale):
        return to(x, operand), 1.0, (first, second)
    # If no mean was subtracted, x may be the caller's tensor and must not be changed.
    return to(x.mul_(scale) if problem.center else x * scale, operand), scale, (first, second)


# The largest exponents of scales: in fp32 a scaled 2^-126 must be a normal number, in fp64 2^k must be finite.
LIMIT = {torch.float32: 120, torch.float64: 1000}


def power_of_two(x: Tensor) -> Scalar:
    """2^k with 0.5 <= 2^k max|x| < 1; finite for zeros, NaN and Inf, too."""
    low, high = torch.aminmax(x)
    host = is_host(x.device)
    return unit_of(max(-low.item(), high.item()) if host else torch.maximum(low.abs(), high.abs()), LIMIT[x.dtype])


def is_harmless(scale: Scalar) -> bool:
    """Whether fourth powers of what ``scale`` would bring near 1 fit into fp32 unscaled; False for a tensor, unread."""
    return isinstance(scale, float) and 1e-5 < scale < 1e5


def unit_of(peak: Scalar, limit: int) -> Scalar:
    """2^k with 0.5 <= 2^k ``peak`` < 1 and |k| <= ``limit``, fp64; some such power for 0, NaN and Inf.

    Of a tensor of peaks (of any shape) a tensor of powers.
    """
    if isinstance(peak, Tensor):
        exponent = torch.frexp(peak).exponent.clamp(-limit, limit)
        return torch.ldexp(torch.ones_like(peak, dtype=torch.float64), -exponent)
    return math.ldexp(1.0, -max(-limit, min(limit, math.frexp(peak)[1]))) if math.isfinite(peak) else 1.0


def two_factors(scale: Scalar) -> tuple[Scalar, Scalar]:
    """Two factors of ``scale``, which may be outside the range of fp32; the first is a power of two."""
    half: Scalar
    if isinstance(scale, Tensor):
        half = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent // 2)
    else:
        half = math.ldexp(1.0, math.frexp(scale)[1] // 2)
    return half, scale / half


def unscaled(value: Scalar, scale_x: Scalar, scale_y: Scalar) -> Scalar:
    """``value`` divided by the squares of both scales, one by one, since their product may leave fp64's range."""
    for scale in (scale_x, scale_y, scale_x, scale_y):
        value = value / scale
    return value


def is_host(device: torch.device) -> bool:
    """Whether scalars are Python floats: on all devices except CUDA, where nothing may synchronise."""
    return device.type != "cuda"


def has_fp64(device: torch.device) -> bool:
    """Whether the device certainly supports fp64. Apple's GPUs do not, and not all of Intel's do."""
    return device.type in ("cpu", "cuda", "meta")


def exact(x: Tensor) -> Tensor:
    """x in fp64, on its device or, where that has no fp64, on the CPU."""
    return x.double() if has_fp64(x.device) else x.cpu().double()


def require_fp64(what: str, device: torch.device) -> None:
    """Raise a ValueError if the device lacks the fp64 that ``what`` needs."""
    if not has_fp64(device):
        raise ValueError(f"{what} needs fp64, which {device.type} devices may lack: move the features to the CPU")


def at_least(least: float, count: Scalar) -> Scalar:
    """max(least, count)"""
    return count.clamp(min=least) if isinstance(count, Tensor) else max(count, least)


def lesser(a: Scalar, b: Scalar) -> Scalar:
    """min(a, b)"""
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)


def row_count(x: Tensor, mask: Tensor | None) -> Scalar:
    """The number of rows that are not masked."""
    if mask is None:
        return float(x.shape[0])
    return float(mask.count_nonzero().item()) if is_host(x.device) else mask.sum(dtype=torch.float64)


def dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of products and statistics, dtype of the matrix operands)."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    # Half-precision products with fp32 results exist on CUDA only; the CPU would round results to half precision.
    return wide, problem.dtype if problem.device.type == "cuda" else wide


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or of batches of them; the result is fp32 for half-precision operands.

    Sums longer than `PART` are split on a CPU, whose library adds all terms of a narrow result sequentially: with 10^6
    rows of 8 features X^T X has an error of 4.5e-4 in one product, in parts 8.5e-7, in less time.
    """
    times = torch.mm if a.dim() == 2 else torch.bmm
    if a.shape[-1] > PART and a.is_cpu and a.dtype != torch.float64:
        first, *others = (mm(left, right) for left, right in zip(a.split(PART, -1), b.split(PART, -2), strict=True))
        return sum(others, first)
    if a.dtype.itemsize > 2:
        return times(a, b)
    return times(a, b, out_dtype=torch.float32) if a.is_cuda else times(a.float(), b.float())


def padded(size: int, multiple: int = 8) -> int:
    """``size`` rounded up to a multiple of ``multiple``."""
    return -(-size // multiple) * multiple


def scaled_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where an fp32 side is rounded to the half precision of the other one, if that has it.

    It is scaled near 1 first: at n = 128 the entries of L - (a/b) K over sqrt(bc) are below fp16's normal range.
    """
    if a.dtype == b.dtype:
        return a @ b
    if a.dtype == torch.float32:
        scale = power_of_two(a)
        return mm((a * scale).to(b.dtype), b) / scale
    scale = power_of_two(b)
    return mm(a, (b * scale).to(a.dtype)) / scale


def weighted_sum(a: Tensor, s: Scalar, b: Tensor, t: Scalar) -> Tensor:
    """s a + t b"""
    if isinstance(t, Tensor) or abs(t) > 1e38:  # PyTorch raises for an alpha outside fp32's range
        return a * s + b * t
    return torch.mul(a, s).add_(b, alpha=t)


def weighted_sum_mm(a: Tensor, s: Scalar, b: Tensor, t: Scalar, c: Tensor) -> Tensor:
    """(s a + t b) @ c; on a CPU as s ((a + t/s b) @ c), which saves one pass over memory."""
    if isinstance(s, float) and 1e-30 < abs(s) < 1e30 and abs(t) < 1e30 * abs(s):
        return torch.addmm(c, torch.add(a, b, alpha=t / s), c, beta=0.0, alpha=s)
    return scaled_mm(weighted_sum(a, s, b, t), c)


def add_scaled_mm(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to ``d``, at least fp32, in place."""
    if a.dtype == b.dtype == d.dtype:
        return torch.addmm(d, a, b, out=d)
    return d.add_(scaled_mm(a, b)) if a.numel() else d


def _blocks(a: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of ``a`` whose products are computed together; the last one includes the remainder."""
    m, k = a.shape
    device = "cpu" if a.is_cpu else "cuda"
    smallest = SMALLEST_BLOCK[device]
    if a.is_cpu and k >= LONG_ROWS:
        smallest = SMALLEST_BLOCK_OF_LONG_ROWS
    if m < 2 * smallest:
        return [(0, m)]
    block = min(max(m // 4, smallest), LARGEST_BLOCK[device])
    starts = range(0, m - block + 1, block)
    return list(zip(starts, (*starts[1:], m), strict=True))


def self_product(a: Tensor) -> Tensor:
    """a @ a.T for a [m, k]: [m, m], at least fp32; upper blocks are computed and mirrored."""
    blocks = _blocks(a)
    if len(blocks) < 2:
        return mm(a, a.T)
    out = torch.empty(a.shape[0], a.shape[0], dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    for i, j in blocks:
        out[i:j, i:] = mm(a[i:j], a[i:].T)
        out[j:, i:j] = out[i:j, j:].T
    return out


def self_product_norm(a: Tensor, turned: Tensor | None = None) -> Scalar:
    """|a @ a.T|^2 (Frobenius) with one row of upper blocks in memory at a time; ``turned`` is a.T, if that is known."""
    turned, blocks = a.T if turned is None else turned, _blocks(a)
    if len(blocks) < 2:
        product = mm(a, turned)
        return inner(product, product)
    total: Scalar = 0.0
    for i, j in blocks:
        strip = mm(a[i:j], turned[:, i:])
        diagonal = strip[:, : j - i]
        total = total + 2.0 * inner(strip, strip) - inner(diagonal, diagonal)
    return total


def inner(a: Tensor, b: Tensor) -> Scalar:
    """sum(a * b). Long sums are per row in the dtype of ``a`` (pairwise), then over rows in fp64: no fp64 copy."""
    if a.is_cpu and (size := a.numel()) < ONE_THREAD_SUM:
        if (size <= ONE_THREAD_DOT or torch.get_num_threads() == 1) and a.is_contiguous() and b.is_contiguous():
            flat = a.view(-1)
            return torch.dot(flat, flat if a is b else b.view(-1)).item()
        return (a * b).sum().item()
    if a is b and a.is_cuda:  # reads a once
        return torch.linalg.vector_norm(a, dtype=torch.float64).square()
    rows = torch.linalg.vecdot(a, b)
    return scalar(rows.sum(dtype=torch.float64) if has_fp64(rows.device) else exact(rows).sum())


def inner_products(a: Tensor, b: Tensor) -> tuple[Scalar, Scalar, Scalar]:
    """<a,b>, <a,a> and <b,b>"""
    return inner(a, b), inner(a, a), inner(b, b)


_UNCHANGED = contextlib.nullcontext()


def fp32_products(problem: Problem) -> contextlib.AbstractContextManager[None]:
    """A context with the requested precision of fp32 products; None keeps PyTorch's setting, tf32x3 runs as ieee."""
    if problem.precision is None or problem.dtype != torch.float32:
        return _UNCHANGED
    switch: Any = torch.backends.cuda.matmul if problem.device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _switched(switch, "tf32" if problem.precision == "tf32" else "ieee")


_SWITCHING = threading.RLock()


@contextlib.contextmanager
def _switched(switch: Any, precision: str) -> Iterator[None]:
    with _SWITCHING:  # the setting is global: a second thread would mistake the first one's for the user's
        before = switch.fp32_precision
        switch.fp32_precision = precision
        try:
            yield
        finally:
            switch.fp32_precision = before


def scalar(value: Tensor) -> Scalar:
    """A 0-d tensor as a scalar: a Python float, or a 0-d fp64 tensor on a CUDA device."""
    return value.item() if value.is_cpu or is_host(value.device) else value.double()


def read(values: Tensor) -> tuple[Scalar, ...]:
    """The entries of a vector as scalars."""
    return tuple(values.tolist()) if values.is_cpu or is_host(values.device) else values.unbind()


def write(value: Scalar, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar as a 0-d tensor of ``dtype``; beyond fp32's range it becomes Inf."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if abs(value) > FP32_MAX and dtype == torch.float32:
        value = math.copysign(math.inf, value)  # PyTorch would raise
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def as_tensor(value: Scalar, device: torch.device) -> Tensor:
    """A scalar as a 0-d fp64 tensor; not by torch.tensor, whose copy from the host breaks CUDA graph capture."""
    return value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


def pack(scalars: tuple[Scalar, ...], device: torch.device) -> Tensor:
    """Scalars as an fp64 vector, on the CPU if the device has no fp64."""
    if device.type == "cpu" or is_host(device):
        packed = torch.from_numpy(np.array(scalars))  # a third of torch.tensor's time
        return packed.to(device) if device.type != "cpu" and has_fp64(device) else packed
    return torch.stack([as_tensor(s, device) for s in scalars])
