r"""What the ranks of a group send each other, and how many bytes: pure functions of shapes, like `plan`.

There are two transports from each rank's rows, x [n, p] and y [n, q] on R ranks, to the statistic of all rows::

    merged      the sums of the cross route (`sums`) are all-reduced: n and the means in fp64, then the products about
                the common mean in fp32 (fp64 for fp64); for the unbiased estimator in fp64, with the sums of row norms
    gathered    the rows themselves are all-gathered in their own dtype, padded to the largest number of rows of a rank;
                then every rank computes the statistic of all rows

In an all-reduce of B bytes each rank sends 2 B (R-1)/R (reduce-scatter and all-gather, a lower bound that rings reach),
in an all-gather of B bytes in all B (R-1)/R. Merged bytes do not grow with the number of ranks, gathered bytes do. Of
small messages the latency counts, in steps: an all-reduce takes 2 log2 R of them over trees, an all-gather R - 1 over a
ring. No backward communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

from .types import Problem, Transport

HEADER = 48  # six 64-bit integers (`distributed.agree`)
SLOT = 8  # of each rank for each pair, in the first collective (`distributed.take`)
# How many bytes a link carries in the time of a step. Assumed: 5 us at 50 GB/s (InfiniBand), 100 us at 2.6 GB/s (gloo).
STEP = 1 << 18

# Symmetric products are sent as upper blocks of rows, at most BLOCKS of them: 56 % of the bytes, and so few copies that
# packing costs no more than it saves. A matrix of up to SMALLEST_BLOCK rows is one block, sent whole.
BLOCKS, SMALLEST_BLOCK = 8, 128


def upper_blocks(width: int) -> list[tuple[int, int]]:
    """The ranges of rows i:j of a symmetric [width, width] matrix; of each the columns i: are sent."""
    block = max(SMALLEST_BLOCK, -(-width // BLOCKS))
    return [(i, min(i + block, width)) for i in range(0, width, block)]


def upper_size(width: int) -> int:
    """The number of entries in the upper blocks of a symmetric [width, width] matrix."""
    return sum((j - i) * (width - i) for i, j in upper_blocks(width))


def merged_size(p: int, q: int, itemsize: int, unbiased: bool) -> int:
    """Bytes that are all-reduced, for features of ``itemsize`` bytes.

    Unbiased sums are fp64: if rows dominate on one rank, the estimator is a small difference of their fourth powers.
    """
    products = upper_size(p) + p * q + upper_size(q)
    means = 1 + p + q
    norms = 2 * (p + q) + 5
    return products * (8 if unbiased else max(itemsize, 4)) + 8 * (means + unbiased * norms)


def block_size(longest: int, p: int, q: int, itemsize: int, masked: bool) -> int:
    """Bytes of the rows of a rank, padded to ``longest`` rows and to 8 bytes; a mask is sent as one more feature."""
    return -(-longest * (p + q + masked) * itemsize // 8) * 8


def steps(world: int) -> tuple[int, int]:
    """The messages that follow each other in an all-reduce over trees, and in an all-gather over a ring."""
    return 2 * (world - 1).bit_length(), world - 1


def cheaper(problem: Problem, rows: Sequence[int], backend: str, pairs: int = 1) -> Transport:
    """The transport that takes less time; ``rows`` is each rank's number, ``problem`` that of all rows together.

    All ``pairs`` of a call share its steps. Merged sums are library products in plain PyTorch, of linear, centred CKA
    and HSIC alone. Rows are gathered for all other problems, and for a ``backend`` of another name than "library".
    """
    world, itemsize = len(rows), problem.dtype.itemsize
    others = world - 1  # each rank sends at least 2 B others / world of B bytes that are all-reduced, or half
    merged = 2 * merged_size(problem.p, problem.q, itemsize, problem.estimator == "unbiased") * others // world
    gathered = block_size(max(rows), problem.p, problem.q, itemsize, problem.masked) * others
    reduce, gather = steps(world)
    slower = (2 * reduce - gather) * STEP // pairs
    linear = problem.kernel is None and problem.center and problem.statistic in ("cka_loss", "cka", "hsic")
    if linear and backend in ("auto", "library") and merged + slower <= gathered:
        return Transport("merged", world, sum(rows), merged, gathered)
    return Transport("gathered", world, sum(rows), gathered, merged)
