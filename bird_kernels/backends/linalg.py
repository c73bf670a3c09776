"""Library matrix products of centred features: what every computation in plain PyTorch is made of.

Half precision is multiplied as it is and accumulated in fp32 where the library can (CUDA), else widened. Scalars
are Python floats; on CUDA they are tensors, and nothing leaves the device.
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

# Symmetric products of two blocks and more are formed block by block, the upper ones alone. Two cores of a Zen 5 CPU,
# fp32: a product takes 0.9 of the time at m = 256, 0.75 at 512, 0.68 at 1024. With fewer than 256 rows it pays where
# they are long: 1.0 at 128 x 512, 0.86 at 128 x 2048. On CUDA not yet measured.
SMALLEST_BLOCK, LARGEST_BLOCK = {"cpu": 128, "cuda": 2048}, {"cpu": 512, "cuda": 4096}
LONG_ROWS, SMALLEST_BLOCK_OF_LONG_ROWS = 1024, 64
# Up to here a dot product (MKL) and a sum (PyTorch) run on one thread. To wake a second one costs 80 us.
ONE_THREAD_DOT, ONE_THREAD_SUM = 1 << 13, 1 << 15
# Terms of a sum of products that are added up at a time: matrix units truncate, and so do long sums of a CPU.
PART = 16_384
FP32_MAX = torch.finfo(torch.float32).max


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), for nothing where there is nothing to do: the call alone takes 0.8 us."""
    return x if x.dtype == dtype else x.to(dtype)


def kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [n, d] with zeros in the rows that do not count."""
    if mask is None:
        return x
    if x.is_cpu:  # a fourth of the time of `where`, if these rows hold no NaN or Inf
        product = x * mask[:, None]
        if math.isfinite(product.sum().item()):
            return product
    return torch.where(mask[:, None], x, 0.0)


def subtract_mean(x: Tensor, n: float, keep: Tensor | None, ours: bool = False) -> tuple[Tensor, Tensor]:
    """Columns minus their means over ``n`` rows, and their sums; in the memory of x if that is ``ours``.

    ``keep`` [rows]: ones, and zeros for rows that do not count and are zero; None: all count. sum(0) takes half as long
    as mean(0) where x is small.
    """
    total = x.sum(0)
    out = x if ours else None
    if keep is not None:
        return torch.addr(x, keep, total * (1.0 / n), alpha=-1.0, out=out), total
    # In one operator only where each row is cut into vectors and a rest alike: in vectors it is fused, in the rest
    # rounded twice, and the rows of a column-major x, or of one that threads share, would get different residuals.
    alone = x.numel() <= ONE_THREAD_SUM or torch.get_num_threads() == 1
    if alone and x.shape[1] > 1 and x.is_contiguous():
        return torch.sub(x, total, alpha=1.0 / n, out=out), total
    return torch.sub(x, total * (1.0 / n), out=out), total


def centre(
    x: Tensor, mask: Tensor | None, count: Scalar, problem: Problem
) -> tuple[Tensor, Scalar, tuple[Tensor, Tensor]]:
    """Columns minus their means, times a power of two that brings the largest entry near 1; that; the means' two parts.

    The mean is taken twice: the second one is the rounding of the first. It makes a constant column exactly zero, where
    one pass leaves eps * |mean| that looks like variance. Not subtracted if the problem says not to centre.
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
    # Without a mean to subtract x may still be the caller's.
    return to(x.mul_(scale) if problem.center else x * scale, operand), scale, (first, second)


# Exponents of the scales: of fp32 so that a scaled number of 2^-126 is normal, of fp64 so that 2^k is finite.
LIMIT = {torch.float32: 120, torch.float64: 1000}


def power_of_two(x: Tensor) -> Scalar:
    """2^k with 0.5 <= 2^k max|x| < 1; some finite number for zeros, NaN and Inf."""
    limit = LIMIT[x.dtype]
    low, high = torch.aminmax(x)
    if is_host(x.device):
        value = max(-low.item(), high.item())
        return math.ldexp(1.0, -max(-limit, min(limit, math.frexp(value)[1]))) if math.isfinite(value) else 1.0
    exponent = torch.frexp(torch.maximum(low.abs(), high.abs())).exponent.clamp(-limit, limit)
    return torch.ldexp(torch.ones((), dtype=torch.float64, device=x.device), -exponent)


def halves(scale: Scalar) -> tuple[Scalar, Scalar]:
    """Two numbers, the first a power of two, whose product is ``scale``, which may leave the range of fp32."""
    half: Scalar
    if isinstance(scale, Tensor):
        half = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent // 2)
    else:
        half = math.ldexp(1.0, math.frexp(scale)[1] // 2)
    return half, scale / half


def unscaled(value: Scalar, scale_x: Scalar, scale_y: Scalar) -> Scalar:
    """``value`` over the squares of both scales, one after the other: their product may leave fp64's range."""
    for scale in (scale_x, scale_y, scale_x, scale_y):
        value = value / scale
    return value


def is_host(device: torch.device) -> bool:
    """Whether scalars are Python floats: everywhere but on CUDA, where nothing may wait for the device."""
    return device.type != "cuda"


def has_fp64(device: torch.device) -> bool:
    """Whether fp64 tensors can live there. Apple's GPUs have none and not all of Intel's do."""
    return device.type in ("cpu", "cuda", "meta")


def exact(x: Tensor) -> Tensor:
    """x in fp64, on its device or, where that has no fp64, on the CPU."""
    return x.double() if has_fp64(x.device) else x.cpu().double()


def require_fp64(what: str, device: torch.device) -> None:
    """Raises a ValueError where ``what`` needs numbers that the device does not have."""
    if not has_fp64(device):
        raise ValueError(f"{what} needs fp64, which {device.type} devices may lack: move the features to the CPU")


def at_least(least: float, count: Scalar) -> Scalar:
    """max(least, count)"""
    return count.clamp(min=least) if isinstance(count, Tensor) else max(count, least)


def lesser(a: Scalar, b: Scalar) -> Scalar:
    """min(a, b)"""
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)


def row_count(x: Tensor, mask: Tensor | None) -> Scalar:
    """How many rows count."""
    if mask is None:
        return float(x.shape[0])
    return float(mask.count_nonzero().item()) if is_host(x.device) else mask.sum(dtype=torch.float64)


def dtypes(problem: Problem) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of products and statistics, dtype of the matrix operands)."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    # Half-precision products with fp32 results exist on CUDA only; the CPU would round them to half.
    return wide, problem.dtype if problem.device.type == "cuda" else wide


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or of batches of them, in fp32 for half operands, whose products are exact on a CPU as well.

    Longer sums than `PART` go in parts on a CPU, whose library adds up all terms of a narrow result one after the
    other: with 10^6 rows of 8 features X^T X is 4.5e-4 off in one product, in parts 8.5e-7, in less time.
    """
    times = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cpu and a.shape[-1] > PART and a.dtype != torch.float64:
        first, *others = (mm(left, right) for left, right in zip(a.split(PART, -1), b.split(PART, -2), strict=True))
        return sum(others, first)
    if a.dtype not in (torch.float16, torch.bfloat16):
        return times(a, b)
    return times(a, b, out_dtype=torch.float32) if a.is_cuda else times(a.float(), b.float())


def padded(size: int, multiple: int = 8) -> int:
    """The least multiple that is not smaller."""
    return -(-size // multiple) * multiple


def scaled_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b where one side may be a wide matrix that has yet to be rounded to the other's half precision.

    It is brought near 1 first: at n = 128 the entries of L - (a/b) K over sqrt(bc) are below fp16's normal range.
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
    if isinstance(t, Tensor) or abs(t) > 1e38:  # PyTorch takes an alpha beyond fp32 for a mistake
        return a * s + b * t
    return torch.mul(a, s).add_(b, alpha=t)


def weighted_sum_mm(a: Tensor, s: Scalar, b: Tensor, t: Scalar, c: Tensor) -> Tensor:
    """(s a + t b) @ c; on a CPU as s ((a + t/s b) @ c), which takes one pass less."""
    if isinstance(s, float) and 1e-30 < abs(s) < 1e30 and abs(t) < 1e30 * abs(s):
        return torch.addmm(c, torch.add(a, b, alpha=t / s), c, beta=0.0, alpha=s)
    return scaled_mm(weighted_sum(a, s, b, t), c)


def add_scaled_mm(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """d + a @ b, in the memory of ``d`` where the product needs no scaling."""
    return torch.addmm(d, a, b, out=d) if a.dtype == b.dtype else d + scaled_mm(a, b)


def _blocks(a: Tensor) -> list[tuple[int, int]]:
    """Ranges of rows of ``a`` whose products are formed together; the last one takes what is left."""
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
    """a @ a.T for a [m, k], upper blocks computed and mirrored."""
    blocks = _blocks(a)
    if len(blocks) < 2:
        return mm(a, a.T)
    out = torch.empty(a.shape[0], a.shape[0], dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    for i, j in blocks:
        out[i:j, i:] = mm(a[i:j], a[i:].T)
        out[j:, i:j] = out[i:j, j:].T
    return out


def self_product_norm(a: Tensor) -> Scalar:
    """|a @ a.T|^2, one row of upper blocks in memory at a time."""
    total: Scalar = 0.0
    for i, j in _blocks(a):
        strip = mm(a[i:j], a[i:].T)
        diagonal = strip[:, : j - i]
        total = total + 2.0 * inner(strip, strip) - inner(diagonal, diagonal)
    return total


def inner(a: Tensor, b: Tensor) -> Scalar:
    """sum(a * b). Long sums go by rows in the dtype of ``a`` (pairwise) and from there on in fp64: no fp64 copy."""
    if a.is_cpu and a.numel() < ONE_THREAD_SUM:
        if a.numel() <= ONE_THREAD_DOT and a.is_contiguous() and b.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1)).item()
        return (a * b).sum().item()
    if a is b and a.is_cuda:  # in one pass
        return torch.linalg.vector_norm(a, dtype=torch.float64).square()
    rows = torch.linalg.vecdot(a, b)
    return scalar(rows.sum(dtype=torch.float64) if has_fp64(rows.device) else exact(rows).sum())


def inner_products(a: Tensor, b: Tensor) -> tuple[Scalar, Scalar, Scalar]:
    """<a,b>, <a,a> and <b,b>"""
    if a.is_cpu and a.numel() <= ONE_THREAD_DOT:
        a, b = a.view(-1), b.view(-1)
        return torch.dot(a, b).item(), torch.dot(a, a).item(), torch.dot(b, b).item()
    return inner(a, b), inner(a, a), inner(b, b)


_UNCHANGED = contextlib.nullcontext()


def fp32_products(problem: Problem) -> contextlib.AbstractContextManager[None]:
    """Run with the requested fp32 precision; None leaves PyTorch's own switch alone. tf32x3 is honoured by ieee."""
    if problem.precision is None or problem.dtype != torch.float32:
        return _UNCHANGED
    switch: Any = torch.backends.cuda.matmul if problem.device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return _switched(switch, "tf32" if problem.precision == "tf32" else "ieee")


_SWITCHING = threading.RLock()


@contextlib.contextmanager
def _switched(switch: Any, precision: str) -> Iterator[None]:
    with _SWITCHING:  # the switch is the whole process's: a second thread would take the first one's for the user's
        before = switch.fp32_precision
        switch.fp32_precision = precision
        try:
            yield
        finally:
            switch.fp32_precision = before


def scalar(value: Tensor) -> Scalar:
    """A 0-d tensor as what the other scalars are: a Python float, or 0-d fp64 on a CUDA device."""
    return value.item() if value.is_cpu or is_host(value.device) else value.double()


def read(values: Tensor) -> tuple[Scalar, ...]:
    """The entries of a vector as scalars."""
    return tuple(values.tolist()) if values.is_cpu or is_host(values.device) else values.unbind()


def write(value: Scalar, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar as a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if abs(value) > FP32_MAX and dtype == torch.float32:
        value = math.copysign(math.inf, value)  # which PyTorch takes for a mistake
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def as_tensor(value: Scalar, device: torch.device) -> Tensor:
    """A scalar as a 0-d tensor, fp64; not by tensor(): a copy from the host would break CUDA graph capture."""
    return value.double() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device=device)


def pack(scalars: tuple[Scalar, ...], device: torch.device) -> Tensor:
    """Scalars as a vector, fp64; on the CPU where the device has no fp64."""
    if device.type == "cpu" or is_host(device):
        packed = torch.from_numpy(np.array(scalars))  # a third of torch.tensor's time
        return packed.to(device) if device.type != "cpu" and has_fp64(device) else packed
    return torch.stack([as_tensor(s, device) for s in scalars])
