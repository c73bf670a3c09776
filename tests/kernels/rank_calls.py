"""What else takes a group, on its ranks: other kernels, groups of some ranks, lists of pairs, tokens, statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import bird_kernels
from bird_kernels import distributed
from tests.accuracy import features
from tests.kernels.ranks import ROWS, SPLITS, Case, batch, counted, forced, own


class Other(NamedTuple):
    """What is not linear CKA or HSIC: options of `cka_loss`, which rank has how many rows, and whether some are out."""

    options: dict[str, Any]
    split: str = "uneven"
    masked: bool = False

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return batch(Case("gathered", masked=self.masked, mean=1.0))


OTHERS = {
    "rbf": Other(dict(kernel="rbf"), "even"),
    "rbf uneven": Other(dict(kernel="rbf")),
    "rbf unbiased": Other(dict(kernel="rbf", estimator="unbiased")),
    "rbf masked": Other(dict(kernel="rbf"), masked=True),
    "rbf unbiased masked": Other(dict(kernel="rbf", estimator="unbiased"), masked=True),
    "rbf of one": Other(dict(kernel="rbf", estimator="unbiased"), "one has all", True),
    "rbf threshold": Other(dict(kernel=bird_kernels.RBF(threshold=0.5), estimator="unbiased"), masked=True),
    "sqrt": Other(dict(sqrt=True), masked=True),
    "raw": Other(dict(center=False), masked=True),
}


def others() -> dict[str, Any]:
    """Each rank's value and dX. Only the ranks with rows that are left out have a mask."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, other in OTHERS.items():
        x, y, mask = (own(side, SPLITS[other.split][world], rank) for side in other.batch())
        mask = None if mask is None or mask.all() else mask
        x.requires_grad_()
        value = bird_kernels.cka_loss(x, y, mask=mask, group=dist.group.WORLD, **other.options)
        found[name] = value.detach(), torch.autograd.grad(value, x)[0]
    return found


def subgroup() -> list[Any]:
    """Every other rank in one group, the rest in another: members, and for each transport value and dX."""
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [(members, dist.new_group(members)) for members in (list(range(world))[i::2] for i in range(2))]
    members, group = groups[rank % 2]
    x, y, _ = (own(side, SPLITS["even"][world], rank) for side in batch(Case("merged")))
    found: list[Any] = [members]
    for name in ("merged", "gathered"):
        x.requires_grad_()
        with forced(name):
            value = bird_kernels.cka_loss(x, y, estimator="unbiased", group=group)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    return found


PAIRS: dict[str, dict[str, Any]] = {
    "several": dict(weights=[1.0, 0.25, 2.0]),
    "unbiased": dict(weights=[1.0, 0.25, 2.0], estimator="unbiased"),
    "unweighted rbf": dict(kernel="rbf"),
    "one": dict(),
}


def sides(name: str) -> list[tuple[Tensor, Tensor]]:
    """All rows of the pairs of a list, of different widths."""
    widths = [(7, 5), (3, 9), (70, 2)][: 1 if name == "one" else 3]
    return [features(ROWS, p, q, torch.float64, mean=2.0, seed=seed) for seed, (p, q) in enumerate(widths)]


def lists() -> dict[str, Any]:
    """Lists of pairs: value, the gradient of both sides of each, and what travelled when the call was known."""
    rank, world = dist.get_rank(), dist.get_world_size()
    split, mask = SPLITS["uneven"][world], own(batch(Case("", masked=True))[2], SPLITS["uneven"][world], rank)
    found = {}
    for name, options in PAIRS.items():
        pairs = [tuple(own(side, split, rank).requires_grad_() for side in pair) for pair in sides(name)]
        xs, ys = zip(*pairs, strict=True)
        for _ in range(2):
            with counted() as seen:
                value = bird_kernels.cka_loss(xs, ys, mask=mask, group=dist.group.WORLD, **options)
        found[name] = value.detach(), torch.autograd.grad(value, (*xs, *ys)), seen
    return found


SEQUENCES = {2: [5, 2], 3: [4, 0, 3], 4: [3, 0, 2, 2]}
TOKENS = [
    (tokens, layout, estimator)
    for tokens in ("all", "last", "mean")
    for layout in ("padded", "packed")
    for estimator in ("biased", "unbiased")
]


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    """x [7, 5, 4], y [7, 5, 3] and their mask [7, 5]; one sequence has no tokens, some begin with padding."""
    x, y = (side.view(7, 5, -1) for side in features(35, 4, 3, torch.float64, mean=2.0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0] * 5, [1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1] * 5, [1] * 5])
    return x, y, mask


def tokens() -> list[Any]:
    """`token_cka_loss` in its modes and layouts: value, and dX as padded."""
    rank, split = dist.get_rank(), SEQUENCES[dist.get_world_size()]
    found = []
    for mode, layout, estimator in TOKENS:
        x, y, mask = (own(side, split, rank) for side in sequences())
        x.requires_grad_()
        there = mask.bool()
        a, b, form = x, y, dict[str, Any](mask=mask)
        if layout == "packed":  # which has one sequence at least: one without tokens
            lengths = mask.sum(1) if len(mask) else mask.new_zeros(1)
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            a, b, form = x[there], y[there], dict(cu_seqlens=ends, max_seqlen=5)
        value = bird_kernels.token_cka_loss(a, b, tokens=mode, estimator=estimator, group=dist.group.WORLD, **form)
        found.append((value.detach(), torch.autograd.grad(value, x)[0]))
    return found


def reduced() -> dict[str, Any]:
    """`Statistics.all_reduce`, of uneven rows and of those of one rank; in the second the others had no update."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    distributed._HISTORIES.clear()
    for split in ("uneven", "one has all"):
        statistics = bird_kernels.Statistics()
        x, y, mask = (own(side, SPLITS[split][world], rank) for side in batch(Case("", masked=True)))
        if split == "uneven" or len(x):
            statistics.update(x, y, mask)
        with counted() as seen:
            statistics.all_reduce()
        values = [statistics.cka(e) for e in ("biased", "unbiased")] + [statistics.hsic("unbiased")]
        found[split] = values, statistics.n, [name for name, _ in seen]
    return found
