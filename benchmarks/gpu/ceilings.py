"""What this device reaches at its best: copies, library products at the sizes that matter, launches, replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.context import Context, Item, Row
from benchmarks.harness import Timing
from benchmarks.kernels.ceilings import copying, multiplying
from benchmarks.kernels.problems import fp32_switched

# m, n, k of a product [m, k] x [k, n]: a square one, and those that the eleven problems are made of.
PRODUCTS = (
    (8192, 8192, 8192),
    (1024, 1024, 65_536),
    (2048, 1024, 65_536),
    (1024, 1024, 4096),
    (4096, 4096, 16_384),
    (128, 128, 802_816),
    (512, 512, 2048),
)
NUMBERS = ("bfloat16", "bfloat16 to float32", "float16 to float32", "float32 tf32", "float32 ieee")
COPIED = 2**32  # bytes read and written, past the cache, which is cold
ROUNDS = 7


def ceiling_items(context: Context) -> Sequence[Item]:
    """Copies, products of every number at every size, and what launching costs."""
    products = [
        Item(f"{number} {'x'.join(map(str, sizes))}", partial(_product, number, sizes))
        for sizes in (((24, 16, 40),) if context.rehearse else PRODUCTS)
        for number in NUMBERS
        if not (number == "float32 ieee" and sizes[0] == 8192)  # a fiftieth of a second a call
    ]
    return [Item("copy", _copy), *products[:5], Item("launches", _launches), *products[5:]]


def _copy(context: Context) -> Iterator[Row]:
    moved = 2**16 if context.rehearse else COPIED
    yield _timed(context, "copy", copying(context.machine.device, moved), moved=moved)


def _product(number: str, sizes: tuple[int, int, int], context: Context) -> Iterator[Row]:
    m, n, k = sizes
    kind, _, rest = number.partition(" ")
    multiply = multiplying(context.machine.device, getattr(torch, kind), *sizes, wide=rest == "to float32")
    with fp32_switched(rest):
        yield _timed(context, f"mm {number} {m}x{n}x{k}", multiply, flops=2 * m * n * k) | dict(
            n=k, p=n, q=m, dtype=kind, precision=rest * (kind == "float32")
        )


def _launches(context: Context) -> Iterator[Row]:
    """Of an empty kernel, of a graph of three, and of autograd's machinery."""
    one = torch.zeros(1, device=context.machine.device, requires_grad=True)
    other = torch.zeros_like(one)
    replay, _ = context.machine.captured(lambda: [other.add_(1) for _ in range(3)])
    for clock in ("host", "device"):
        yield _timed(context, "empty launch", lambda: other.add_(1), clock)
        yield _timed(context, "replay of 3 empty kernels", replay, clock)
    yield _timed(context, "multiply and its backward", lambda: torch.autograd.grad(one * 2, one), "host")


def _timed(
    context: Context, candidate: str, run: Callable[[], object], clock: str = "device", moved: int = 0, flops: int = 0
) -> Row:
    """A row with the rate that follows from the bytes moved, or from the operations."""
    context.machine.seconds(run)
    take = context.machine.take(clock, run)
    timing = Timing.of([take() for _ in range(ROUNDS)])
    row: Row = {"candidate": candidate, "status": "ok", "timer": clock, **vars(timing)}
    if moved or flops:
        row |= {"rate": (moved or flops) / timing.p50, "unit": "B/s" if moved else "flop/s"}
    return row
