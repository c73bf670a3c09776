"""The cost model of docs/explain/scale.md: its tables and its picture, from the formulas that choose what travels.

python -m tools.scale_model writes both anew; tests/repo/test_scale.py holds the page to what comes out here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import duration, size_of, table_text, with_parts, with_unit
from bird_kernels import cka, plan, transport
from bird_kernels.types import Problem, Transport
from tests import accuracy

DOCS = Path(__file__).resolve().parents[1] / "docs/explain"
PAGE, PICTURE = DOCS / "scale.md", DOCS / "scale.png"
WORLDS = (8, 64, 512, 4096)
# Bytes/s that a rank can send, and seconds until a message's first byte is there: assumed.
LINKS = {"NVLink": (450e9, 3e-6), "InfiniBand": (50e9, 5e-6), "Ethernet": (12.5e9, 20e-6)}


@dataclass(frozen=True)
class RankShape:
    """What each rank brings: rows, student's and teacher's width, and the dtype of both."""

    name: str
    n: int
    p: int
    q: int
    dtype: torch.dtype = torch.bfloat16

    def problem(self, rows: int) -> Problem:
        """The problem of so many rows."""
        return Problem(rows, self.p, self.q, self.dtype, torch.device("cuda"))

    def transport(self, world: int) -> Transport:
        """What travels between so many ranks."""
        return transport.cheaper(self.problem(self.n * world), [self.n] * world, "auto")


SHAPES = (
    RankShape("images, narrow", 128, 512, 512, torch.float32),
    RankShape("images, wide", 64, 2048, 2048),
    RankShape("sentences", 32, 768, 4096),
    RankShape("tokens", 16384, 4096, 4096),
)


def both(shape: RankShape, world: int) -> tuple[int, int]:
    """Bytes that each rank sends: merged, gathered."""
    chosen = shape.transport(world)
    sizes = chosen.bytes, chosen.other_bytes
    return sizes if chosen.name == "merged" else (sizes[1], sizes[0])


def ring_and_tree(shape: RankShape, world: int, link: str) -> tuple[float, float]:
    """Seconds of the collectives of an agreed call by what is chosen: two all-reduces, or one all-gather.

    With a(lpha) seconds a message and b(eta) a byte, an all-reduce of B bytes takes 2 (R-1) a + 2 (R-1)/R B b around a
    ring, 2 ceil(log2 R) a + 2 B b up and down a tree; an all-gather (R-1) a or ceil(log2 R) a, beside (R-1)/R B b.
    """
    rate, latency = LINKS[link]
    chosen, slots = shape.transport(world), transport.SLOT * world
    deep, around = (world - 1).bit_length(), world - 1
    if chosen.name == "gathered":
        data = (chosen.bytes + transport.SLOT * around) / rate
        return around * latency + data, deep * latency + data
    total = slots + transport.merged_size(shape.p, shape.q, shape.dtype.itemsize, False)
    return 4 * around * latency + 2 * total * around / world / rate, 4 * deep * latency + 2 * total / rate


def memory_of_rank(shape: RankShape, world: int) -> int:
    """Bytes on each rank beyond its inputs and gradient, biased, gradient of the student.

    Gathered: what the local computation keeps, and what travels, twice.
    """
    rows, size = shape.n * world, shape.dtype.itemsize
    if shape.transport(world).name == "merged":
        return merged_memory(shape)
    travelling = world * transport.block_size(shape.n, shape.p, shape.q, size, False)
    return plan.workspace(shape.problem(rows), plan.choose_route(rows, shape.p, shape.q), "library") + 2 * travelling


def merged_memory(shape: RankShape) -> int:
    """The peak of the merged way: products beside centred rows, products beside what travels, or the backward, in which
    half precision has a wide copy of the teacher's rows first, and a wide gradient then."""
    n, p, q, wide = shape.n, shape.p, shape.q, max(shape.dtype.itemsize, 4)
    half = shape.dtype.itemsize < wide
    rows, products = n * (p + q) * wide, (p * p + p * q + q * q) * wide
    backward = rows + (p * p + p * q + max(max(p * p, p * q) + half * n * p, half * n * q)) * wide
    travelling = transport.merged_size(p, q, shape.dtype.itemsize, False)
    return max(rows + products, products + travelling, backward)


def flops_of_rank(shape: RankShape, world: int, name: str) -> int:
    """Floating-point operations of each rank, forward and backward: its own rows' if merged, the whole if gathered."""
    rows = shape.n if name == "merged" else shape.n * world
    route = "cross" if name == "merged" else plan.choose_route(rows, shape.p, shape.q)
    return plan.route_flops(route, rows, shape.p, shape.q, True, False)


def crossover(shape: RankShape) -> int:
    """The fewest ranks from which on sums are chosen."""
    return next(world for world in range(2, 1 << 20) if shape.transport(world).name == "merged")


def costs() -> str:
    """A line for each shape and number of GPUs."""
    cells = [["each rank's rows", "GPUs", "rows in all", "merged", "gathered", *LINKS, "memory"]]
    for shape in SHAPES:
        for world in WORLDS:
            chosen = shape.transport(world)
            sent = dict(zip(("merged", "gathered"), map(size_of, both(shape, world)), strict=True))
            sent[chosen.name] = f"**{sent[chosen.name]}**"
            times = [" / ".join(map(duration, ring_and_tree(shape, world, link))) for link in LINKS]
            counts = f"{world:,}", f"{shape.n * world:,}"
            cells.append([label(shape), *counts, *sent.values(), *times, size_of(memory_of_rank(shape, world))])
    return table_text(cells)


def turning_points() -> str:
    """Where sums begin to win, and what rows would cost in arithmetic there."""
    cells = [["each rank's rows", "sums are chosen from", "work of each rank, merged", "gathered, there"]]
    for shape in SHAPES:
        world = crossover(shape)
        amounts = [
            with_unit(flops_of_rank(shape, world, name) / 1e9, ("Gflop", "Tflop")) for name in ("merged", "gathered")
        ]
        cells.append([label(shape), f"{world:,} ranks, {world * shape.n:,} rows", *amounts])
    return table_text(cells)


def objectives() -> str:
    """CKA of the whole batch beside the average of the ranks' own: 512 rows on ever more ranks, mean of 20 draws."""
    draws = [accuracy.features(512, 64, 64, torch.float64, seed=seed) for seed in range(20)]
    cells = [["rows per rank", "ranks", "biased, average", "biased, whole", "unbiased, average", "unbiased, whole"]]
    for rows in (512, 128, 32, 8):
        values = [
            fmean([split_cka(x, y, part, estimator) for x, y in draws])
            for estimator in ("biased", "unbiased")
            for part in (rows, 512)
        ]
        cells.append([str(rows), str(512 // rows), *(f"{value:.3f}" for value in values)])
    return table_text(cells)


def split_cka(x: Tensor, y: Tensor, rows: int, estimator: str) -> float:
    """The average of the CKA of parts of so many rows."""
    parts = zip(x.split(rows), y.split(rows), strict=True)
    return fmean([cka(a, b, estimator=estimator).item() for a, b in parts])


def label(shape: RankShape) -> str:
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[shape.dtype]
    return f"{shape.name}: {shape.n:,} x {shape.p:,} and {shape.q:,}, {dtype}"


def sections() -> Iterator[tuple[str, str]]:
    """The names of the page's generated parts, and their text."""
    for function in (costs, turning_points, objectives):
        yield function.__name__, function()


def draw_picture(path: Path) -> None:
    """Bytes that each rank sends against the number of ranks, both transports, for each shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(SHAPES), sharey=True)
    worlds = [2**k for k in range(1, 13)]
    for ax, shape in zip(axes, SHAPES, strict=True):
        merged, gathered = zip(*(both(shape, world) for world in worlds), strict=True)
        ax.loglog(worlds, merged, "C0", label="merged sums")
        ax.loglog(worlds, gathered, "C1", label="gathered rows")
        ax.loglog(worlds, [shape.transport(world).bytes for world in worlds], "k.", markersize=4, label="chosen")
        ax.set_title(f"{shape.name}\n{shape.n:,} x ({shape.p:,} + {shape.q:,})", fontsize=9)
        ax.set_xlabel("ranks")
        ax.set_xticks([2, 16, 128, 1024], ["2", "16", "128", "1024"])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("bytes sent by each rank")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(with_parts(PAGE.read_text(encoding="utf-8"), sections()), encoding="utf-8")
    draw_picture(PICTURE)
