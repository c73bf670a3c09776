r"""What travels between the ranks of a group, and how many bytes: pure functions of shapes, as `plan` is.

Two ways lead from each rank's rows to the statistic of all rows, for x [n, p], y [n, q] on R ranks::

    merged      the sums of the cross route (`sums`), all-reduced: n and the means in fp64, then the products in fp32
                (fp64 for fp64) about the common mean; for the unbiased estimator in fp64, with the sums of row norms
    gathered    the rows themselves, all-gathered in their own dtype and padded to the longest rank; then every rank
                computes the whole

An all-reduce of B bytes makes each rank send 2 B (R-1)/R (reduce-scatter and all-gather, a lower bound that rings
reach), an all-gather of B bytes in all B (R-1)/R. Before either, ranks compare notes: `HEADER` bytes each. What is
merged does not grow with the ranks, what is gathered does. No backward communicates.
"""

from __future__ import annotations

from collections.abc import Sequence

from .types import Problem, Transport

HEADER = 48  # six 64-bit integers (`distributed.agree`)

# Symmetric products travel as upper blocks, at most this many: 56 % of the bytes, and few enough copies that packing
# costs no more than it saves. Below two of the smallest a matrix travels whole.
BLOCKS, SMALLEST_BLOCK = 8, 128


def upper_blocks(width: int) -> list[tuple[int, int]]:
    """Ranges of rows i:j of a symmetric [width, width]; of each the columns i: are kept."""
    block = max(SMALLEST_BLOCK, -(-width // BLOCKS))
    return [(i, min(i + block, width)) for i in range(0, width, block)]


def upper_size(width: int) -> int:
    """Entries of the upper blocks of a symmetric [width, width]."""
    return sum((j - i) * (width - i) for i, j in upper_blocks(width))


def merged_size(p: int, q: int, itemsize: int, unbiased: bool) -> int:
    """Bytes that are all-reduced; ``itemsize`` of the features.

    Unbiased in fp64: of rows that dominate on one rank fp32 would keep the fourth powers and lose what is left of them.
    """
    products = upper_size(p) + p * q + upper_size(q)
    means = 1 + p + q
    norms = 2 * (p + q) + 5
    return products * (8 if unbiased else max(itemsize, 4)) + 8 * (means + unbiased * norms)


def gathered_size(longest: int, p: int, q: int, itemsize: int, world: int, masked: bool) -> int:
    """Bytes of everybody's rows, padded to the ``longest`` rank's; a mask is one more feature."""
    return world * longest * (p + q + masked) * itemsize


def all_reduce_bytes(size: int, world: int) -> int:
    """Bytes that each rank sends, at the least, where ``size`` bytes are all-reduced."""
    return 2 * size * (world - 1) // world


def all_gather_bytes(size: int, world: int) -> int:
    """Bytes that each rank sends, at the least, where all ranks' parts together are ``size`` bytes."""
    return size * (world - 1) // world


def choose(problem: Problem, rows: Sequence[int], backend: str) -> Transport:
    """The transport with fewer bytes, for ranks with these ``rows``; ``problem`` is that of all rows.

    Merged sums are library products in plain PyTorch: a ``backend`` asked for by another name gets the rows. So does
    whatever is not linear, not centred or not CKA or HSIC.
    """
    world, itemsize = len(rows), problem.dtype.itemsize
    merged = all_reduce_bytes(
        merged_size(problem.p, problem.q, itemsize, problem.estimator == "unbiased"), world
    )  # fmt: skip
    gathered = all_gather_bytes(
        gathered_size(max(rows), problem.p, problem.q, itemsize, world, problem.masked), world
    )  # fmt: skip
    linear = problem.kernel is None and problem.center and problem.statistic in ("cka_loss", "cka", "hsic")
    if linear and backend in ("auto", "library") and merged <= gathered:
        return Transport("merged", world, sum(rows), merged, gathered)
    return Transport("gathered", world, sum(rows), gathered, merged)
