"""What ranks send each other, by formulas: bytes counted by hand, blocks of products."""

from __future__ import annotations

import pytest
import torch

from bird_kernels import transport
from bird_kernels.types import Problem


def test_less_time_is_chosen_and_bytes_are_counted_by_hand() -> None:
    """fp32, 4 ranks: products 2 * 64 * 64 + 64 * 64, means 129; rows of 128 features."""
    problem = Problem(0, 64, 64, torch.float32, torch.device("cpu"))
    merged = 2 * (4 * 3 * 64 * 64 + 8 * 129) * 3 // 4
    few, many = ([rows] * 4 for rows in (900, 920))
    assert transport.cheaper(problem, few, "auto") == ("gathered", 4, 3600, 3 * 900 * 128 * 4, merged)
    assert transport.cheaper(problem, many, "auto") == ("merged", 4, 3680, merged, 3 * 920 * 128 * 4)
    assert transport.cheaper(problem, many, "library").name == "merged"
    for backend in ("triton", "native", "reference"):
        assert transport.cheaper(problem, many, backend).name == "gathered"
    unbiased = transport.cheaper(problem._replace(estimator="unbiased"), many, "auto")
    assert unbiased.other_bytes == merged + 2 * (4 * 3 * 64 * 64 + 8 * (2 * 128 + 5)) * 3 // 4  # in fp64
    assert transport.cheaper(problem._replace(dtype=torch.bfloat16), few, "auto").bytes == 3 * 900 * 128 * 2
    assert transport.cheaper(problem._replace(dtype=torch.float64), many, "auto").bytes == merged + 2 * 3 * 64 * 64 * 3
    masked = transport.cheaper(problem._replace(masked=True), [40, 10, 0, 40], "auto")
    assert masked == ("gathered", 4, 90, 3 * 40 * 129 * 4, merged)
    odd = transport.cheaper(problem._replace(dtype=torch.bfloat16, p=1, q=2), [5] * 4, "auto")
    assert odd.bytes == 3 * 32  # 30 bytes of rows end at a multiple of 8


def test_latency_is_five_more_steps_of_four_ranks_and_shared_by_pairs() -> None:
    """Two all-reduces up and down a tree of four take 8 steps, an all-gather around a ring 3."""
    assert [transport.steps(world) for world in (1, 2, 3, 4, 5, 4096)] == [
        (0, 0), (2, 1), (4, 2), (4, 3), (6, 4), (24, 4095),
    ]  # fmt: skip
    problem, step = Problem(0, 64, 64, torch.float32, torch.device("cpu")), 2**18
    merged = 2 * (4 * 3 * 64 * 64 + 8 * 129) * 3 // 4
    for pairs in (1, 5):
        turn = -(-(merged + 5 * step // pairs) // (3 * 128 * 4))
        names = [transport.cheaper(problem, [rows] * 4, "auto", pairs).name for rows in (turn - 1, turn)]
        assert names == ["gathered", "merged"]


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 1024, 1500, 4096])
def test_upper_blocks_cover_each_pair_once(width: int) -> None:
    blocks = transport.upper_blocks(width)
    assert [i for i, _ in blocks] == [0, *(j for _, j in blocks[:-1])]
    assert blocks[-1][1] == width
    assert len(blocks) <= transport.BLOCKS
    inside = sum((j - i) * (j - i - 1) // 2 for i, j in blocks)  # below the diagonal of its own block
    assert transport.upper_size(width) == width * (width + 1) // 2 + inside
    assert width < 1024 or transport.upper_size(width) < 0.57 * width * width
