"""The exact median of squared distances by the rules of `RBF`: a radix select by histograms, without sort or sync."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...types import RBF
from .strips import Strips

DIGIT = 16  # bits of the median that one pass over the distances determines
# Up to so many rows a CPU, which can read values, selects instead: 0.03 ms (by torch.kthvalue 0.3) against 1.4 by
# histograms at n = 128 on a Zen 5 CPU.
FEW = 256


def median_of(strips: Strips, n: Tensor, kernel: RBF) -> Tensor:
    """The median of the strips' squared distances by the rule of ``kernel``, for ``n`` rows that count; 0-d, 0 of none.

    Every distance occurs twice in the whole matrix: the middle entries m - 1 and m of 2m sorted ones are the entries
    (m-1)//2 and m//2 of the m above the diagonal. With the diagonal's n zeros before them the middle entries of n^2 are
    the entries ((n^2-1)//2 - n)//2 and (n^2//2 - n)//2; a negative rank is on the diagonal.
    """
    if strips.features.is_cpu and strips.problem.n <= FEW:
        return _selected(strips, n, kernel)
    lower, number = _lower_median(strips, n, kernel)
    if kernel.median == "lower":
        return lower
    nonzero = kernel.threshold is None
    rank = number // 2 if nonzero else _rank_among_all(n.long(), upper=True)
    upto, above = torch.zeros_like(rank), torch.full_like(lower, torch.inf)
    for i, j, distances in strips:
        skip = _not_counted(strips, distances, i, j, nonzero)
        upto += ((distances <= lower) & ~skip).sum()
        above = torch.minimum(above, distances.masked_fill(skip | (distances <= lower), torch.inf).amin())
    return torch.where((upto > rank) | (number == 0), lower, 0.5 * lower + 0.5 * above)


def _lower_median(strips: Strips, n: Tensor, kernel: RBF) -> tuple[Tensor, Tensor]:
    """The lower one of the two middle entries, and the number of entries that count above the diagonal; both 0-d.

    Non-negative floats are ordered as their bit patterns, so histograms of the digits, highest first, find those of the
    median.
    """
    integer = torch.int64 if strips.wide == torch.float64 else torch.int32
    bins = 1 << DIGIT
    highest = (8 * integer.itemsize - 1) // DIGIT * DIGIT
    rank = prefix = number = torch.zeros(1, dtype=torch.int64, device=n.device)
    for shift in range(highest, -1, -DIGIT):
        counts = torch.zeros(bins + 1, dtype=torch.int64, device=n.device)
        for i, j, distances in strips:
            pattern = distances.view(integer) & torch.iinfo(integer).max  # clears the sign, which a NaN may have
            digit = (pattern >> shift) & (bins - 1)
            skip = _not_counted(strips, distances, i, j, kernel.threshold is None)
            if shift < highest:
                skip |= (pattern >> (shift + DIGIT)) != prefix
            counts += _histogram(digit.masked_fill_(skip, bins), bins + 1)
        counts = counts[:-1]
        if shift == highest:
            number = counts.sum(0, keepdim=True)
            rank = (number - 1) // 2 if kernel.threshold is None else _rank_among_all(n.long().view(1))
        upto = counts.cumsum(0)
        found = torch.searchsorted(upto, rank, right=True)  # bin 0 for rank -1, that of no distances
        rank = rank - upto[found] + counts[found]
        prefix = (prefix << DIGIT) | found
    return prefix.to(integer).view(strips.wide).squeeze(0), number.squeeze(0)


def _selected(strips: Strips, n: Tensor, kernel: RBF) -> Tensor:
    """`median_of` by NumPy's selection, on a CPU."""
    mask = None if strips.mask is None else strips.mask.numpy()
    parts = []
    for i, j, distances in strips:
        counted = ~np.tri(*distances.shape, dtype=np.bool_)
        if mask is not None:
            counted &= mask[i:j, None] & mask[i:]
        parts.append(distances.numpy()[counted])
    entries = np.concatenate(parts)
    number, zeros = len(entries), 0
    if kernel.threshold is None:
        zeros = number - int(np.count_nonzero(entries))
        ranks = [zeros + (number - zeros - 1) // 2, zeros + (number - zeros) // 2]
    else:
        ranks = [_rank_among_all(int(n), upper=upper) for upper in (False, True)]
    wanted = ranks if kernel.median == "average" else ranks[:1]
    ranks = [rank for rank in wanted if zeros <= rank < number]  # the others are of zeros
    if ranks:
        entries.partition(ranks)
    found = sum(float(entries[rank]) / len(wanted) for rank in ranks)
    return torch.scalar_tensor(found, dtype=strips.wide, device=strips.features.device)


def _rank_among_all(n: Any, upper: bool = False) -> Any:
    """The rank of a middle entry of all n x n distances among those above the diagonal; -1: on the diagonal."""
    return ((n * n - 1 + upper) // 2 - n) // 2


def _not_counted(strips: Strips, distances: Tensor, i: int, j: int, nonzero: bool) -> Tensor:
    """True for a strip's entries not above the diagonal, of masked rows or, where only ``nonzero`` count, zero."""
    skip = distances == 0 if nonzero else torch.zeros_like(distances, dtype=torch.bool)
    block = skip[:, : j - i]
    block |= torch.ones_like(block).tril()
    if strips.mask is not None:
        skip |= ~(strips.mask[i:j, None] & strips.mask[i:])
    return skip


def _histogram(digits: Tensor, size: int) -> Tensor:
    """The count of each of ``size`` digits, int64; unlike `torch.bincount` it does not synchronise."""
    counts = torch.zeros(size, dtype=torch.int64, device=digits.device)
    return counts.scatter_add_(0, digits.flatten().long(), counts.new_ones(1).expand(digits.numel()))


def pair_at(strips: Strips, median: Tensor) -> tuple[Tensor, Tensor]:
    """The first pair of rows whose squared distance is ``median``, as two 0-d int64 tensors; 0, 0 if there is none."""
    rows = torch.zeros(2, dtype=torch.int64, device=median.device)
    missing = torch.ones((), dtype=torch.bool, device=median.device)
    for i, j, distances in strips:
        hits = (distances == median) & ~_not_counted(strips, distances, i, j, True)
        place = hits.flatten().to(torch.uint8).argmax()
        width = distances.shape[1]
        rows = torch.where(missing & hits.any(), torch.stack([i + place // width, i + place % width]), rows)
        missing = missing & ~hits.any()
    return rows[0], rows[1]
