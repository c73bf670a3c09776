"""The upper strips of one side's kernel matrix (`library_rbf`): kept in memory, or computed at each iteration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import plan
from ...moments import Scalar
from ...types import Problem
from .. import linalg

# Squared distances up to SAME * eps * (|x_i|^2 + |x_j|^2) are set to zero: they may be rounding alone.
SAME = 16.0


class Bandwidth(NamedTuple):
    """The numbers of one side: ``factor`` f of the scaled features, ``typical`` t, ``level`` c (0: not centred),
    ``scale`` of the features, and ``first`` and ``second``, the rows whose distance is the median (flow only)."""

    factor: Scalar
    typical: Scalar
    level: Scalar
    scale: Scalar
    first: Scalar
    second: Scalar


class Strips:
    """The upper strips of one side: squared distances, from `become_kernel` on K - c (not centred K), diagonal 0.

    They are kept in ``flat``, or computed at each iteration if that is empty. ``filled``: ``flat`` holds them already.
    """

    def __init__(
        self, features: Tensor, mask: Tensor | None, problem: Problem, flat: Tensor, filled: bool = False
    ) -> None:
        self.features, self.mask, self.problem = features, mask, problem
        self.wide, _ = linalg.dtypes(problem)
        n, rows = problem.n, plan.strip_rows(problem)
        self.blocks = [(i, min(i + rows, n)) for i in range(0, n, rows)]
        self.kept: list[Tensor] = []
        self.bandwidth: Bandwidth | None = None
        self.keep = None if mask is None else mask.to(self.wide)
        if flat.numel():
            sizes = [(j - i) * (n - i) for i, j in self.blocks]
            *parts, rest = flat.split([*sizes, len(flat) - sum(sizes)])
            if len(rest) and not filled:
                rest.zero_()
            self.kept = [part.view(j - i, n - i) for part, (i, j) in zip(parts, self.blocks, strict=True)]
        if not (filled and self.kept):
            wide = linalg.to(features, self.wide)
            self.norms = torch.linalg.vecdot(wide, wide)
        if self.kept and not filled:
            for strip, (i, j) in zip(self.kept, self.blocks, strict=True):
                self._distances(i, j, strip)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (i, j, the strip [j - i, n - i] of rows i:j and columns i:)."""
        if self.kept:
            yield from ((i, j, strip) for strip, (i, j) in zip(self.kept, self.blocks, strict=True))
            return
        for i, j in self.blocks:
            strip = self.features.new_empty(j - i, self.problem.n - i, dtype=self.wide)
            self._distances(i, j, strip)
            if self.bandwidth is not None:
                self._kernel(strip, i, j, self.bandwidth)
            yield i, j, strip

    def become_kernel(self, bandwidth: Bandwidth) -> None:
        """Turn squared distances into the kernel: kept strips in place, others from the next iteration on."""
        for strip, (i, j) in zip(self.kept, self.blocks, strict=bool(self.kept)):
            self._kernel(strip, i, j, bandwidth)
        self.bandwidth = bandwidth

    def centred(self, strip: Tensor, i: int, j: int, shift: Tensor) -> Tensor:
        """The strip of Kc as a new tensor, diagonal 0; the strip itself if ``center`` is False."""
        if not self.problem.center:
            return strip
        strip = strip - shift[i:j, None]
        strip -= shift[i:]
        return self.cleared(strip, i, j)

    def cleared(self, strip: Tensor, i: int, j: int) -> Tensor:
        """Set entries of masked rows and the diagonal to zero, in place; returns ``strip``."""
        if self.keep is not None:
            strip.mul_(self.keep[i:j, None]).mul_(self.keep[i:])
        strip[:, : j - i].diagonal().zero_()
        return strip

    def _distances(self, i: int, j: int, out: Tensor) -> None:
        pairs = self.norms[i:j, None] + self.norms[i:]
        torch.sub(pairs, linalg.mm(self.features[i:j], self.features[i:].T), alpha=2, out=out)
        # By a factor of 0 or 1, and NaN stays: `masked_fill_` takes eight times as long on a CPU.
        out.mul_(pairs.mul_(SAME * torch.finfo(self.wide).eps).lt_(out))
        out[:, : j - i].diagonal().zero_()

    def _kernel(self, strip: Tensor, i: int, j: int, bandwidth: Bandwidth) -> None:
        strip.mul_(-bandwidth.factor)
        if self.problem.center:
            strip.add_(bandwidth.typical).expm1_().mul_(bandwidth.level)
        else:
            strip.exp_()
        self.cleared(strip, i, j)
