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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import inputs, ops
from .backends import linalg
from .backends.dominating import bulk_mean, columns, largest, squared_norms, uneven, without
from .moments import MIN_ROWS, Moments, Scalar, combine
from .types import Estimator, Problem

# Rows of a strip, or fewer where the strips of all layers would have more than LARGEST_STRIPS numbers. On one core of a
# Zen 5 CPU in fp32, the Gram matrices of 18 layers of 1000 rows take 82 ms with strips of 64 rows, 77 with 128, 80 with
# 256, and 141 without strips; with 512 rows 22, 23, 26 and 32.
ROWS, LARGEST_STRIPS = 128, 1 << 24


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
    value: Tensor = combine(m.moments, m.n, "cka", m.estimator, m.eps).value
    return value.to(m.dtype)


@torch.no_grad()
def hsic_matrix(xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None, **options: Any) -> Hsics:
    """HSIC of each layer of ``xs`` with each layer of ``ys``, and of each with itself; arguments as `cka_matrix`.

    Averages over batches are taken of these. On a GPU nothing is read back. A layer without variance has HSIC 0.
    """
    m = _measure(xs, ys, **options)

    def hsic(moments: Moments) -> Tensor:
        value: Tensor = combine(moments, m.n, "hsic", m.estimator, m.eps).value
        return value

    def own(kk: Tensor, r_kk: Scalar, t_k: Scalar) -> Tensor:
        moments = Moments(kk, kk, kk, r_kk, r_kk, r_kk, t_k, t_k)
        value, dead = hsic(moments), combine(moments, m.n, "cka", m.estimator, m.eps).d_kl == 0
        return torch.where(dead, 0.0 * value, value)

    _, kk, ll, _, r_kk, r_ll, t_k, t_l = m.moments
    xx, yy = (
        linalg.unscaled(own(kk, r_kk, t_k), m.scale_x, m.scale_x),
        linalg.unscaled(own(ll, r_ll, t_l), m.scale_y, m.scale_y),
    )
    return Hsics(linalg.unscaled(hsic(m.moments), m.scale_x, m.scale_y), xx.flatten(), yy.flatten())


class _Measured(NamedTuple):
    """Moments of the scaled layers; like the scales, those of xs alone are [|xs|, 1], those of ys alone [1, |ys|]."""

    moments: Moments
    n: Scalar
    estimator: Estimator
    dtype: torch.dtype  # of the results; eps too
    eps: float
    scale_x: Tensor
    scale_y: Tensor


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

    layers = [layer.reshape(n, -1) for layer in layers]
    count = linalg.row_count(layers[0], mask)
    with ops.without_autocast(device):
        way: Way = "biased" if known == "biased" else "plain" if layers[0].is_cpu else "apart"
        x, y, found = _try(layers, len(xs), mask, count, dtype, way)
        if found is None:
            x, y, found = _try(layers, len(xs), mask, count, dtype, "apart")
        assert found is not None
    wide = ops.value_dtype(dtype)
    return _Measured(found, count, known, wide, torch.finfo(wide).eps, x.scales[:, None], (y or x).scales[None, :])


# Two are unbiased. "plain" centres by the means of all rows, so the row sums of a Gram matrix without its diagonal are
# minus that; accurate if no rows dominate (`backends.dominating`), which a CPU checks. "apart": by rows that do not.
Way = Literal["biased", "plain", "apart"]


def _try(
    layers: list[Tensor], first: int, mask: Tensor | None, count: Scalar, dtype: torch.dtype, way: Way
) -> tuple[_Side, _Side | None, Moments | None]:
    """The sides of xs, which are the ``first`` layers, and of ys; their moments, None if "plain" and rows dominate."""
    x = _side(layers[:first], mask, count, dtype, way)
    y = _side(layers[first:], mask, count, dtype, way) if layers[first:] else None
    return x, y, _moments(x, y, count, way)


class _Side(NamedTuple):
    """One network's layers, centred, each scaled to entries near 1, and stacked by width."""

    stacks: list[Tensor]  # [layers of this width, n, width]: their products are one call
    place: list[int]  # the index, in the order of the stacks, of each layer in the caller's order
    scales: Tensor  # of each layer in the caller's order; fp64

    def layers(self) -> list[Tensor]:
        """Each [n, width], in the order of the stacks."""
        return [layer for stack in self.stacks for layer in stack]

    def widths(self) -> list[int]:
        """The widths of `layers`."""
        return [stack.shape[2] for stack in self.stacks for _ in stack]


def _side(layers: list[Tensor], mask: Tensor | None, count: Scalar, dtype: torch.dtype, way: Way) -> _Side:
    """As `linalg.centre`, for all layers of equal width in one call: fewer calls, at whose ends cores wait."""
    wide, device = ops.value_dtype(dtype), layers[0].device
    _, operand = linalg.dtypes(Problem(1, 1, 1, dtype, device))
    groups: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        groups.setdefault(layer.shape[1], []).append(number)
    left_out = None if mask is None else ~mask[:, None]
    stacks, scales = [], []
    for group in groups.values():
        x = torch.stack([layers[number].to(dtype).to(wide) for number in group])
        if left_out is not None:
            x.masked_fill_(left_out, 0.0)
        unit = _bring_to_one_(x) if way == "apart" else 1.0  # `bulk_mean` squares rows before they are centred
        for _ in range(1 if way == "apart" else 2):  # the second mean is the rounding error of the first
            x -= bulk_mean(x, mask) if way == "apart" else x.sum(1, keepdim=True) / linalg.at_least(1.0, count)
            if left_out is not None:
                x.masked_fill_(left_out, 0.0)
        scales.append(_bring_to_one_(x) * unit)
        stacks.append(x.to(operand))
    order = [number for group in groups.values() for number in group]
    place = [order.index(number) for number in range(len(layers))]
    return _Side(stacks, place, _take(torch.cat(scales), place))


def _take(values: Tensor, place: list[int], dim: int = 0) -> Tensor:
    """The entries of ``values`` at these indices, by views: an index tensor would be copied from the host to a GPU."""
    if place == sorted(place):
        return values
    return torch.stack([values.select(dim, i) for i in place], dim)


def _bring_to_one_(x: Tensor) -> Tensor:
    """Multiply each layer of x [layers, n, width] in place by the power of two that brings its largest magnitude into
    [0.5, 1) (`linalg.unit_of`); return these powers, [layers], fp64."""
    scale: Tensor = linalg.unit_of(
        torch.maximum(x.amax((1, 2)), -x.amin((1, 2))), linalg.LIMIT[x.dtype]
    )  # norm(inf): 20 times as long
    x.mul_(scale.to(x.dtype)[:, None, None])
    return scale


def _moments(x: _Side, y: _Side | None, count: Scalar, way: Way) -> Moments | None:
    """The moments of all pairs of layers in the caller's order, y None being x; None if "plain" and rows dominate."""
    widths, others = x.widths(), y.widths() if y else []
    n, p, q = x.stacks[0].shape[1], sum(widths), sum(others)
    if y is None:
        gram, cross = n * n * (p + len(widths) ** 2), n * p * p
    else:
        gram = n * n * (p + q + len(widths) * len(others))
        cross = 2 * n * p * q + n * sum(width**2 for width in widths + others)
    kl, kk, ll, r, t = (_by_strips if gram <= cross else _by_features)(x, y, way)
    if way == "plain" and not (_is_even(r, count) and (y is None or _is_even(t, count))):
        return None
    here, there = x.place, (y or x).place
    kl, kk, ll = _take(_take(kl, here), there, 1), _take(kk, here)[:, None], _take(ll, there)[None, :]
    if way == "biased":
        return Moments(kl, kk, ll)
    r, t = _take(r, here), _take(t, there)
    squares, other_squares = r.square().sum(1), t.square().sum(1)
    return Moments(kl, kk, ll, r @ t.T, squares[:, None], other_squares[None, :], r.sum(1)[:, None], t.sum(1)[None, :])


def _is_even(sums: Tensor, count: Scalar) -> bool:
    """Whether no rows dominate in any layer, judged by the row sums [layers, n] of "plain"; reads from the device."""
    found = zip(sums.square().sum(1).tolist(), sums.sum(1).tolist(), strict=True)
    return not any(uneven(squares, total, count) for squares, total in found)


# kl [|xs|, |ys|], kk [|xs|], ll [|ys|], and (unbiased only) the row sums [layers, n] of the Gram matrices of xs and ys,
# whose diagonals then count as zero; fp64, in the order of the stacks.
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _by_strips(xs: _Side, ys: _Side | None, way: Way) -> Parts:
    """The parts by the gram route, strip by strip."""
    sides = (xs,) if ys is None else (xs, ys)
    like, counts = xs.stacks[0], [len(side.place) for side in sides]
    n, wide = like.shape[1], ops.value_dtype(like.dtype)
    rows = max(min(ROWS, LARGEST_STRIPS // (sum(counts) * n)), 1)
    room = [like.new_empty(count * rows * n, dtype=wide) for count in counts]
    zeros = partial(torch.zeros, dtype=torch.float64, device=like.device)
    kl, kk, ll = zeros(counts[0], counts[-1]), zeros(counts[0]), zeros(counts[-1])
    sums = [zeros(count, n) for count in counts]
    for begin in range(0, n, rows):
        strips = [_strips(side, begin, begin + rows, out) for side, out in zip(sides, room, strict=True)]
        for strip, total in zip(strips, sums, strict=True):
            diagonal = strip.diagonal(dim1=1, dim2=2)
            if way == "plain":
                total[:, begin : begin + rows] = -diagonal
            if way != "biased":
                diagonal.zero_()
            if way == "apart":
                total[:, begin : begin + rows] += strip.sum(2)
                total[:, begin + rows :] += strip[:, :, rows:].sum(1)
            # An entry right of the diagonal block occurs twice in the matrix, one in the block once: half the weight.
            strip[:, :, : strip.shape[1]] *= 0.5**0.5
        x, y = strips[0], strips[-1]
        kl += 2.0 * (x.flatten(1) @ y.flatten(1).T).double()
        if ys is not None:
            kk += 2.0 * _squares(x)
            ll += 2.0 * _squares(y)
    if ys is None:
        kl = 0.5 * (kl + kl.T)  # exactly symmetric
        kk = ll = kl.diagonal()
    return kl, kk, ll, sums[0], sums[-1]


def _squares(strips: Tensor) -> Tensor:
    """The sum of squares of each layer's strip, fp64; a product with itself would allocate a second strip."""
    return torch.linalg.vector_norm(strips, dim=2).double().square().sum(1)


def _strips(side: _Side, begin: int, end: int, room: Tensor) -> Tensor:
    """Rows begin:end, columns begin: of a side's Gram matrices, [layers, rows, n - begin], in ``room``'s memory."""
    n, layers = side.stacks[0].shape[1], len(side.place)
    end = min(end, n)
    out = room[: layers * (end - begin) * (n - begin)].view(layers, end - begin, n - begin)
    done = 0
    for x in side.stacks:
        strips = out[done : done + len(x)]
        if x.dtype == out.dtype:
            torch.bmm(x[:, begin:end], x[:, begin:].mT, out=strips)
        else:  # half-precision operands on CUDA
            strips.copy_(torch.bmm(x[:, begin:end], x[:, begin:].mT, out_dtype=torch.float32))
        done += len(x)
    return out


def _by_features(x_side: _Side, y_side: _Side | None, way: Way) -> Parts:
    """The parts by the cross route, a pair of layers at a time."""
    xs, ys = x_side.layers(), y_side.layers() if y_side else None
    device = xs[0].device
    x_rest, y_rest = _apart(xs, ys) if way == "apart" else (None, None)
    if x_rest is not None:
        xs, ys = x_rest.bulk, y_rest.bulk if y_rest else None

    def squared(x: Tensor, y: Tensor) -> Scalar:
        product = linalg.mm(y.T, x)
        return linalg.inner(product, product)

    kk = ll = linalg.pack(tuple(linalg.self_product_norm(x.T) for x in xs), device)
    if ys is None:
        kl = torch.diag(kk)
        for i in range(1, len(xs)):
            kl[i, :i] = kl[:i, i] = linalg.pack(tuple(squared(xs[i], x) for x in xs[:i]), device)
    else:
        kl = linalg.pack(tuple(squared(x, y) for x in xs for y in ys), device).view(len(xs), -1)
        ll = linalg.pack(tuple(linalg.self_product_norm(y.T) for y in ys), device)
    if way == "plain":
        kappa, lam = (
            torch.stack([squared_norms(x.to(ops.value_dtype(x.dtype))) for x in side]).double()
            for side in (xs, ys or xs)
        )
        kl, kk, ll = kl - kappa @ lam.T, kk - kappa.square().sum(1), ll - lam.square().sum(1)
        return kl, kk, ll, -kappa, -lam
    if x_rest is None:
        return kl, kk, ll, kk, ll
    other = y_rest or x_rest
    kl, kk, ll = (kl + x_rest.rest(other), kk + x_rest.rest(x_rest).diagonal(), ll + other.rest(other).diagonal())
    return kl, kk, ll, x_rest.sums, other.sums


class _Apart(NamedTuple):
    """One network's layers with the k rows that may dominate kept apart, out of the products; fp64 except ``bulk``.

    ``bulk`` are the layers with zeros in these rows, ``norms`` [layers, n] its squared row norms, ``columns``
    [layers, n k] the Gram matrices' columns of these rows, the diagonal zero, ``sums`` [layers, n] the row sums of the
    Gram matrices without diagonals. ``twice`` [n k] is 2 for entries whose mirror image is not in the columns, else 1.
    """

    bulk: list[Tensor]
    norms: Tensor
    columns: Tensor
    sums: Tensor
    twice: Tensor

    def rest(self, other: _Apart) -> Tensor:
        """What must be added to the products of ``bulk`` to give <K_i, L_j> without diagonals, [layers, layers]."""
        return (self.columns * self.twice) @ other.columns.T - self.norms @ other.norms.T


def _apart(xs: list[Tensor], ys: list[Tensor] | None) -> tuple[_Apart, _Apart | None]:
    few = largest(*(squared_norms(x.to(ops.value_dtype(x.dtype))) for x in (*xs, *(ys or ()))))
    rest = without(None, few, len(xs[0]))
    twice = torch.where(rest, 2.0, 1.0).double()[:, None].expand(-1, len(few)).flatten()

    def of(layers: list[Tensor]) -> _Apart:
        bulk = [torch.where(rest[:, None], x, 0.0) for x in layers]
        norms, heavy, sums = [], [], []
        for x, part in zip(layers, bulk, strict=True):
            wide, own = x.to(ops.value_dtype(x.dtype)), part.to(ops.value_dtype(x.dtype))
            norms.append(squared_norms(own).double())
            column = columns(wide, few).double()
            heavy.append(column.flatten())
            sums.append((wide @ own.sum(0)).double() - norms[-1] + column.sum(1))
        return _Apart(bulk, torch.stack(norms), torch.stack(heavy), torch.stack(sums), twice)

    return of(xs), None if ys is None else of(ys)


def _require_layers(name: str, layers: object, row_dims: int) -> list[Tensor]:
    if isinstance(layers, Tensor) or not isinstance(layers, Sequence):
        raise TypeError(f"{name} must be a list of tensors, one a layer, got {type(layers).__name__}")
    if not layers:
        raise ValueError(f"{name} has no layers")
    return inputs.require_features(row_dims, **{f"{name}[{index}]": layer for index, layer in enumerate(layers)})
