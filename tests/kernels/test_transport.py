"""What ranks send each other, by formulas: bytes counted by hand, blocks of products."""

from __future__ import annotations

import pytest
import torch

from bird_kernels import transport
from bird_kernels.types import Problem


def test_fewer_bytes_are_chosen_and_counted_by_hand() -> None:
    """fp32, 4 ranks: products 2 * 64 * 64 + 64 * 64, means 129; rows of 128 features."""
    problem = Problem(0, 64, 64, torch.float32, torch.device("cpu"))
    merged = 2 * (4 * 3 * 64 * 64 + 8 * 129) * 3 // 4
    few, many = ([rows] * 4 for rows in (40, 200))
    assert transport.cheaper(problem, few, "auto")[:4] == ("gathered", 4, 160, 3 * 40 * 128 * 4)
    assert transport.cheaper(problem, many, "auto") == ("merged", 4, 800, merged, 3 * 200 * 128 * 4)
    assert transport.cheaper(problem, many, "library").name == "merged"
    for backend in ("triton", "native", "reference"):
        assert transport.cheaper(problem, many, backend).name == "gathered"
    unbiased = transport.cheaper(problem._replace(estimator="unbiased"), many, "auto")
    assert unbiased.bytes == merged + 2 * (4 * 3 * 64 * 64 + 8 * (2 * 128 + 5)) * 3 // 4  # in fp64
    assert transport.cheaper(problem._replace(dtype=torch.bfloat16), few, "auto").bytes == 3 * 40 * 128 * 2
    assert transport.cheaper(problem._replace(dtype=torch.float64), many, "auto").bytes == merged + 2 * 3 * 64 * 64 * 3
    masked = transport.cheaper(problem._replace(masked=True), [40, 10, 0, 40], "auto")
    assert masked == ("gathered", 4, 90, 3 * 40 * 129 * 4, merged)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 1024, 1500, 4096])
def test_upper_blocks_cover_each_pair_once(width: int) -> None:
    blocks = transport.upper_blocks(width)
    assert [i for i, _ in blocks] == [0, *(j for _, j in blocks[:-1])]
    assert blocks[-1][1] == width
    assert len(blocks) <= transport.BLOCKS
    inside = sum((j - i) * (j - i - 1) // 2 for i, j in blocks)  # below the diagonal of its own block
    assert transport.upper_size(width) == width * (width + 1) // 2 + inside
    assert width < 1024 or transport.upper_size(width) < 0.57 * width * width
