"""The median of squared distances by the rules of `RBF`, exact, without a sort, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...types import RBF
from .strips import Strips

DIGIT = 16  # bits of a distance that one pass settles
# A CPU may look, and with few rows a selection is faster than a histogram: n = 128, two cores of a Zen 5 CPU, 0.13 ms
# against 1.4.
FEW = 256


def lower_median(strips: Strips, n: Tensor, kernel: RBF) -> Tensor:
    """The rule's median of the squared distances; 0-d. No sort and no sync, 0 of nothing.

    The bits of numbers that are not negative are in their order, so digit by digit a histogram tells in which bin the
    wanted one lies. In the whole matrix every distance stands twice: of 2m sorted entries the lower middle one is entry
    (m-1)//2 of the m above the diagonal. With the diagonal's n zeros before them it is ((n^2-1)//2 - n)//2.
    """
    if strips.features.is_cpu and strips.problem.n <= FEW:
        return _selected(strips, n, kernel)
    integer = torch.int64 if strips.wide == torch.float64 else torch.int32
    bins = 1 << DIGIT
    highest = (8 * integer.itemsize - 1) // DIGIT * DIGIT
    rank = prefix = torch.zeros(1, dtype=torch.int64, device=n.device)
    for shift in range(highest, -1, -DIGIT):
        counts = torch.zeros(bins + 1, dtype=torch.int64, device=n.device)
        for i, j, distances in strips:
            pattern = distances.view(integer) & torch.iinfo(integer).max  # a NaN's sign is anything
            digit = (pattern >> shift) & (bins - 1)
            skip = _not_counted(strips, distances, i, j, kernel.threshold is None)
            if shift < highest:
                skip |= (pattern >> (shift + DIGIT)) != prefix
            counts += _histogram(digit.masked_fill_(skip, bins), bins + 1)
        counts = counts[:-1]
        if shift == highest:
            entries = n.long().view(1)
            rank = (counts.sum(0, keepdim=True) - 1) // 2
            if kernel.threshold is not None:
                rank = _rank_among_all(entries)
        upto = counts.cumsum(0)
        found = torch.searchsorted(upto, rank, right=True)  # the first bin for rank -1: of nothing
        rank = rank - upto[found] + counts[found]
        prefix = (prefix << DIGIT) | found
    return prefix.to(integer).view(strips.wide).squeeze(0)


def _selected(strips: Strips, n: Tensor, kernel: RBF) -> Tensor:
    """The same, read from the device."""
    nonzero = kernel.threshold is None
    entries = torch.cat([d[~_not_counted(strips, d, i, j, nonzero)] for i, j, d in strips])
    rank = (len(entries) - 1) // 2 if nonzero else _rank_among_all(int(n))
    return entries.kthvalue(rank + 1).values if rank >= 0 else n.new_zeros((), dtype=strips.wide)


def _rank_among_all(n: Any) -> Any:
    """Where the lower median of n x n distances stands above the diagonal; -1: on it."""
    return ((n * n - 1) // 2 - n) // 2


def _not_counted(strips: Strips, distances: Tensor, i: int, j: int, nonzero: bool) -> Tensor:
    """True where a strip's distance is not above the diagonal, of rows that do not count, or zero if those do not."""
    skip = distances == 0 if nonzero else torch.zeros_like(distances, dtype=torch.bool)
    block = skip[:, : j - i]
    block |= torch.ones_like(block).tril()
    if strips.mask is not None:
        skip |= ~(strips.mask[i:j, None] & strips.mask[i:])
    return skip


def _histogram(digits: Tensor, size: int) -> Tensor:
    """How many there are of each of ``size`` digits; `torch.bincount` would wait for the device."""
    counts = torch.zeros(size, dtype=torch.int64, device=digits.device)
    return counts.scatter_add_(0, digits.flatten().long(), counts.new_ones(1).expand(digits.numel()))


def rows_of(strips: Strips, median: Tensor) -> tuple[Tensor, Tensor]:
    """The first two rows whose squared distance is ``median``; 0-d."""
    rows = torch.zeros(2, dtype=torch.int64, device=median.device)
    missing = torch.ones((), dtype=torch.bool, device=median.device)
    for i, j, distances in strips:
        hits = (distances == median) & ~_not_counted(strips, distances, i, j, True)
        place = hits.flatten().to(torch.uint8).argmax()
        width = distances.shape[1]
        rows = torch.where(missing & hits.any(), torch.stack([i + place // width, i + place % width]), rows)
        missing = missing & ~hits.any()
    return rows[0], rows[1]
