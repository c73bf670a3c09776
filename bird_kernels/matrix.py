r"""HSIC and CKA of each layer of one list with each layer of another, from features in memory; no gradients.

With the Gram matrices K_i and L_j of the centred layers, all that is needed are the inner products ``<K_i, L_j>``
(`moments`). Two routes lead to them; the one with fewer operations is taken::

    gram    upper strips of K_i and L_j    n^2 (sum p + sum q) + n^2 |xs| |ys|
    cross   |Y_j^T X_i|^2                  2n sum p sum q + n (sum p^2 + sum q^2)

An upper strip is a block of rows of a symmetric matrix from its diagonal block on. The gram route holds no n x n
matrix: the strips of all Gram matrices, flattened, are the factors of one product ``[|xs|, rows * columns] @ [rows *
columns, |ys|]`` that adds to all inner products at once; sums over strips are fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import backends, inputs, ops
from .backends import linalg
from .backends.dominating import bulk_mean, columns, largest, squared_norms, uneven, without
from .moments import MIN_ROWS, Scalar, combine_all, norm_of
from .types import Estimator, Problem

# Rows of a strip, or fewer where the strips of all layers would have more than LARGEST_STRIPS numbers. On one core of a
# Zen 5 CPU in fp32, the Gram matrices of 18 layers of 1000 rows take 82 ms with strips of 64 rows, 77 with 128, 80 with
# 256, and 141 without strips; with 512 rows 22, 23, 26 and 32.
ROWS, LARGEST_STRIPS = 128, 1 << 24
# Up to so many rows Triton's tiles are preferred to the cross route, which launches three kernels a pair: an estimated
# 4 ms for 18 x 18 layers, in which a GPU multiplies 9,000 rows of 32 features each, and 50 us for 2 x 2.
FEW = 2048


class Hsics(NamedTuple):
    """HSIC of the layers, fp64: ``xy`` [len(xs), len(ys)]; of each with itself, ``xx`` [len(xs)], ``yy`` [len(ys)]."""

    xy: Tensor
    xx: Tensor
    yy: Tensor


@torch.no_grad()
def cka_matrix(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None = None,
    *,
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
) -> Tensor:
    r"""CKA of every layer of ``xs`` with every layer of ``ys``; without gradients.

    .. math::  C_{ij} = \frac{\mathrm{HSIC}(K_i, L_j)}{\sqrt{\mathrm{HSIC}(K_i, K_i)\, \mathrm{HSIC}(L_j, L_j)}}

    (Kornblith et al. 2019, eq. 4; each entry is that of `cka`.) Memory beyond the features: a centred copy of them, and
    at most 64 MB (fp32) of strips of their Gram matrices.

    Args:
        xs: features of one network's layers on the same n samples, each [n, ...]; widths and dtypes may differ.
        ys: features of the other network's layers. None: ``xs`` with itself, which is symmetric and costs half.
        estimator: "biased", or "unbiased" (HSIC_1, Song et al. 2012), which needs n >= 4 and is never clamped. The
            limit of `cka_loss` on the number of rows that dominate holds for those of all layers together.
        mask: bool, shape of the leading ``row_dims`` dimensions; False leaves a row out.
        row_dims: how many leading dimensions index rows.

    Returns:
        Tensor [len(xs), len(ys)], fp32 (fp64 if a layer is). A layer without variance has CKA 0; NaN or Inf in a layer
        gives NaN in its row or column.

    Raises:
        TypeError: layers that are not floating-point tensors, a mask that is not bool.
        ValueError: no layers, row counts or devices that differ, too few rows, an unknown estimator, no fp64.
    """
    m = _measure(xs, ys, estimator, mask, row_dims)
    return (m.pairs(m.value) * m.roots[: m.first, None] * m.roots[m.second :]).to(m.dtype)


@torch.no_grad()
def hsic_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None, **options: Any) -> Hsics:
    """HSIC of each layer of ``xs`` with each layer of ``ys``, and of each with itself; arguments as `cka_matrix`.

    Averages over batches are taken of these. On a GPU nothing is read back. A layer without variance has HSIC 0.
    """
    m = _measure(xs, ys, **options)
    own, norm = m.value.diagonal(), norm_of(m.n, m.estimator)
    own = linalg.unscaled(torch.where(m.roots == 0.0, 0.0 * own, own) / norm, m.scales, m.scales)
    xy = linalg.unscaled(m.pairs(m.value) / norm, m.scales[: m.first, None], m.scales[m.second :])
    return Hsics(xy, own[: m.first], own[m.second :])


class _Measured(NamedTuple):
    """What `combine_all` returns for the scaled layers of xs, the ``first`` ones, and of ys, from ``second`` on."""

    value: Tensor
    roots: Tensor
    n: Scalar
    estimator: Estimator
    scales: Tensor  # [layers], fp64
    first: int
    second: int  # 0 if ys is xs
    dtype: torch.dtype  # of the results

    def pairs(self, values: Tensor) -> Tensor:
        """The block of xs with ys."""
        return values[: self.first, self.second :]


def _measure(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None,
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
) -> _Measured:
    inputs.refuse_tracing()
    inputs.require_choice(estimator=estimator)
    layers = _require_layers("xs", xs, row_dims) + (_require_layers("ys", ys, row_dims) if ys is not None else [])
    rows, device = layers[0].shape[:row_dims], layers[0].device
    for layer in layers:
        if layer.shape[:row_dims] != rows or layer.device != device:
            raise ValueError(
                f"all layers must have the same rows and device, got {tuple(rows)} on {device} and "
                f"{tuple(layer.shape[:row_dims])} on {layer.device} (row_dims={row_dims})"
            )
    linalg.require_fp64("a matrix of layers", device)
    n = rows.numel()
    if n < MIN_ROWS[estimator]:
        raise ValueError(f'estimator="{estimator}" needs at least {MIN_ROWS[estimator]} rows, got {n}')
    if mask is not None:
        inputs.require_mask(mask, rows, device)
        mask = mask.reshape(n)
    known: Estimator = "biased" if estimator == "biased" else "unbiased"
    dtype = reduce(torch.promote_types, (layer.dtype for layer in layers))
    problem = Problem(n, 1, 1, dtype, device, "hsic", known, masked=mask is not None, x_grad=False)
    layers = [layer.reshape(n, -1) for layer in layers]
    count, first, wide = linalg.row_count(layers[0], mask), len(xs), ops.value_dtype(dtype)
    with ops.without_autocast(device):
        inner, sums, scales = _products(layers, first, mask, count, problem)
        if ys is None:
            inner = 0.5 * (inner + inner.T)  # exactly symmetric
        found = combine_all(inner, sums, count, known, torch.finfo(wide).eps)
    return _Measured(*found, known, scales, first, first if ys is not None else 0, wide)


# Inner products of Gram matrices [layers, layers] and (unbiased, their diagonals then count as zero) row sums [layers,
# n]; fp64. Of layers of xs with each other, and of ys, there is each with itself.
Products = tuple[Tensor, Tensor | None]

# Two are unbiased. "plain" centres by the means of all rows, so the row sums of a Gram matrix without its diagonal are
# minus that; accurate if no rows dominate (`backends.dominating`), which a CPU checks. "apart": by rows that do not.
Way = Literal["biased", "plain", "apart"]


def _products(
    layers: list[Tensor], first: int, mask: Tensor | None, count: Scalar, problem: Problem
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`Products` of layers [n, width], of which the ``first`` ones are those of xs; and their scales [layers]."""
    n, widths = problem.n, [layer.shape[1] for layer in layers]
    p, q = sum(widths[:first]), sum(widths[first:])
    if not q:
        gram, cross = n * n * (p + first**2), n * p * p
    else:
        gram = n * n * (p + q + first * (len(layers) - first))
        cross = 2 * n * p * q + n * sum(width**2 for width in widths)
    by_strips = gram <= cross
    if by_strips or n <= FEW:
        room = _strip_rows(n, len(layers)) * n * len(layers)
        found = backends.layers_by_triton([linalg.to(layer, problem.dtype) for layer in layers], mask, problem, room)
        if found is not None:
            return found
    ways: tuple[Way, ...] = ("plain", "apart") if layers[0].is_cpu else ("apart",)
    for way in ("biased",) if problem.estimator == "biased" else ways:
        stacks, scales = _centred(layers, mask, count, problem, way)
        inner, sums = (_by_strips if by_strips else _by_features)(stacks, first, way)
        if way != "plain" or _is_even(sums, count):
            break
    return inner, sums, scales


def _centred(
    layers: list[Tensor], mask: Tensor | None, count: Scalar, problem: Problem, way: Way
) -> tuple[list[Tensor], Tensor]:
    """As `linalg.centre`, for neighbours of equal width at once: stacks [layers, n, width]; scales [layers], fp64."""
    wide, operand = linalg.dtypes(problem)
    left_out = None if mask is None else ~mask[:, None]
    room = _memory(sum(layer.numel() for layer in layers), wide, layers[0].device)
    stacks, scales = [], []
    for _, group in groupby(layers, lambda layer: layer.shape):
        alike = [linalg.to(layer, wide) for layer in group]
        size = len(alike) * alike[0].numel()
        own, room = room.tensor_split([size])
        x = torch.stack(alike, out=own.view(len(alike), *alike[0].shape))
        if left_out is not None:
            x.masked_fill_(left_out, 0.0)
        unit = _bring_to_one_(x) if way == "apart" else 1.0  # `bulk_mean` squares rows before they are centred
        for _ in range(1 if way == "apart" else 2):  # the second mean is the rounding error of the first
            x -= bulk_mean(x, mask) if way == "apart" else x.sum(1, keepdim=True) / linalg.at_least(1.0, count)
            if left_out is not None:
                x.masked_fill_(left_out, 0.0)
        scales.append(_bring_to_one_(x) * unit)
        stacks.append(linalg.to(x, operand))
    return stacks, torch.cat(scales)


def _memory(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for so many numbers; a CPU's by NumPy, which asks for large pages, where the system offers them."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(count, dtype=np.float64 if dtype == torch.float64 else np.float32))
    return torch.empty(count, dtype=dtype, device=device)


def _bring_to_one_(x: Tensor) -> Tensor:
    """Multiply each layer of x [layers, n, width] in place by the power of two that brings its largest magnitude into
    [0.5, 1) (`linalg.unit_of`); return these powers, [layers], fp64."""
    peaks = torch.maximum(x.amax((1, 2)), -x.amin((1, 2)))  # norm(inf), aminmax: 20 times as long
    scale: Tensor = linalg.unit_of(peaks, linalg.LIMIT[x.dtype])
    x.mul_(scale.to(x.dtype)[:, None, None])
    return scale


def _is_even(sums: Tensor | None, count: Scalar) -> bool:
    """Whether no rows dominate in any layer, judged by the row sums [layers, n] of "plain"; reads from the device."""
    assert sums is not None
    found = zip(sums.square().sum(1).tolist(), sums.sum(1).tolist(), strict=True)
    return not any(uneven(squares, total, count) for squares, total in found)


def _strip_rows(n: int, layers: int) -> int:
    return max(min(ROWS, LARGEST_STRIPS // (layers * n)), 1)


def _by_strips(stacks: list[Tensor], first: int, way: Way) -> Products:
    """By the gram route, strip by strip."""
    like, n, sizes = stacks[0], stacks[0].shape[1], [len(stack) for stack in stacks]
    count = sum(sizes)
    wide, rows = ops.value_dtype(like.dtype), _strip_rows(n, count)
    room = _memory(count * rows * n, wide, like.device)
    zeros = partial(torch.zeros, dtype=torch.float64, device=like.device)
    inner, sums = zeros(count, count), zeros(count, n)
    for begin in range(0, n, rows):
        end = min(begin + rows, n)
        strips = room[: count * (end - begin) * (n - begin)].view(count, end - begin, n - begin)
        for x, own in zip(stacks, strips.split(sizes), strict=True):
            if x.dtype == wide:
                torch.bmm(x[:, begin:end], x[:, begin:].mT, out=own)
            else:  # half-precision operands on CUDA
                torch.bmm(x[:, begin:end], x[:, begin:].mT, out_dtype=torch.float32, out=own)
        diagonal = strips.diagonal(dim1=1, dim2=2)
        if way == "plain":
            sums[:, begin:end] = -diagonal
        if way != "biased":
            diagonal.zero_()
        if way == "apart":
            sums[:, begin:end] += strips.sum(2)
            sums[:, end:] += strips[:, :, end - begin :].sum(1)
        # An entry right of the diagonal block occurs twice in the matrix, one in the block once: half the weight.
        strips[:, :, : end - begin] *= 0.5**0.5
        flat = strips.flatten(1)
        if first == count:
            inner += 2.0 * linalg.mm(flat, flat.T).double()
        else:
            inner[:first, first:] += 2.0 * linalg.mm(flat[:first], flat[first:].T).double()
            # A product with itself would compute all pairs.
            inner.diagonal().add_(torch.linalg.vector_norm(strips, dim=2).double().square().sum(1), alpha=2.0)
    return inner, None if way == "biased" else sums


def _by_features(stacks: list[Tensor], first: int, way: Way) -> Products:
    """By the cross route, a pair of layers at a time."""
    layers = [layer for stack in stacks for layer in stack]
    device, count = layers[0].device, len(layers)
    extra, sums = None, None
    if way == "apart":
        layers, extra, sums = _apart(layers)
    elif way == "plain":
        sums = -torch.stack([squared_norms(x.to(ops.value_dtype(x.dtype))) for x in layers]).double()
        extra = -sums @ sums.T

    def squared(x: Tensor, y: Tensor) -> Scalar:
        product = linalg.mm(y.T, x)
        return linalg.inner(product, product)

    inner = torch.diag(linalg.pack(tuple(linalg.self_product_norm(x.T) for x in layers), device))
    for i in range(first == count, first):
        others = slice(0, i) if first == count else slice(first, count)
        inner[i, others] = inner[others, i] = linalg.pack(tuple(squared(layers[i], y) for y in layers[others]), device)
    return inner if extra is None else inner + extra, sums


def _apart(layers: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The layers with zeros in the k rows that may dominate; what must be added to the products of these to give those
    without diagonals, [layers, layers], and the row sums of the Gram matrices without diagonals, [layers, n]; fp64."""
    wide = [x.to(ops.value_dtype(x.dtype)) for x in layers]
    few = largest(*map(squared_norms, wide))
    rest = without(None, few, len(wide[0]))
    # Twice: entries whose mirror image is not among the columns of these rows.
    twice = torch.where(rest, 2.0, 1.0).double()[:, None].expand(-1, len(few)).flatten()
    bulk, norms, heavy, sums = [], [], [], []
    for x, own in zip(layers, wide, strict=True):
        bulk.append(torch.where(rest[:, None], x, 0.0))
        part = bulk[-1].to(own.dtype)
        norms.append(squared_norms(part).double())
        column = columns(own, few).double()
        heavy.append(column.flatten())
        sums.append((own @ part.sum(0)).double() - norms[-1] + column.sum(1))
    entries, kappa = torch.stack(heavy), torch.stack(norms)
    return bulk, (entries * twice) @ entries.T - kappa @ kappa.T, torch.stack(sums)


def _require_layers(name: str, layers: object, row_dims: int) -> list[Tensor]:
    if isinstance(layers, Tensor) or not isinstance(layers, Sequence):
        raise TypeError(f"{name} must be a list of tensors, one a layer, got {type(layers).__name__}")
    if not layers:
        raise ValueError(f"{name} has no layers")
    return inputs.require_features(row_dims, **{f"{name}[{index}]": layer for index, layer in enumerate(layers)})
