"""Calls of a group that were agreed on before: collectives and bytes counted by hand, values, and errors on every rank.

The ranks' side is tests/kernels/rank_rides.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels import rank_rides as rides
from tests.kernels.rank_rides import CHANGING, GATHERED, WIDTHS, whole
from tests.kernels.ranks import WORLDS

Ask = Callable[..., list[Any]]
Seen = list[tuple[str, int]]
pytestmark = pytest.mark.parametrize("world", WORLDS[1:])
TYPES = {
    "unbiased": [8],
    "two pairs": [4, 4],
    "layers": [4, 4],
    "cosines": [4, 4],
    "six pairs": [4] * 6,
    "two dtypes": [4, 8],
}


def header(world: int, pairs: int = 1) -> Seen:
    """Six numbers of each rank, and those of more than four pairs once more."""
    names = [("all_gather_into_tensor", 48 * world)]
    return names + [("all_gather_into_tensor", 8 * pairs * world)] * (pairs > 4)


def by_hand(
    transport: str, widths: list[tuple[int, int]], types: list[int], world: int, unbiased: bool = False
) -> Seen:
    """What 20 rows of each rank send: first a slot for each pair and rank, and what it rides with."""
    pairs = len(widths)
    if transport == "gathered":
        rows = sum(20 * (p + q) * size for (p, q), size in zip(widths, types, strict=True))
        return [("all_gather_into_tensor", world * (8 * pairs + rows))]
    means = sum(1 + p + q for p, q in widths)
    products = sum(p * p + p * q + q * q for p, q in widths) + unbiased * sum(2 * (p + q) + 5 for p, q in widths)
    return [("all_reduce", 8 * (world * pairs + means)), ("all_reduce", max(types) * products)]


@pytest.mark.parametrize("transport", ["merged", "gathered"])
@pytest.mark.parametrize("name", rides.CALLS)
def test_an_agreed_call_sends_no_header(name: str, transport: str, world: int, ask: Ask) -> None:
    types = TYPES.get(name, [4])
    call = by_hand(transport, WIDTHS[: len(types)], types, world, name == "unbiased")
    other = by_hand(transport, [(4, 3)], [8], world)
    for found in ask(world, "traffic"):
        first, again, changed, once_more = found[name, transport]
        assert first == header(world, len(types)) + call
        assert again == call
        assert changed == call[:1] + header(world) + other
        assert once_more == other


def test_pairs_of_a_list_travel_by_both_transports_at_once(world: int, ask: Ask) -> None:
    merged = [("all_reduce", 8 * (2 * world + 1 + 2 + 1)), ("all_reduce", 8 * (4 + 2 + 1))]
    call = [*merged, ("all_gather_into_tensor", world * 20 * 12 * 8)]
    true = [whole([20000] * world, 2, 1), whole([20] * world, *WIDTHS[1], seed=1)]
    for collectives, values in ask(world, "mixed"):
        assert collectives == [header(world) + call, call]
        assert values == pytest.approx(true, rel=1e-12)


def test_values_of_lists(world: int, ask: Ask) -> None:
    true = [whole([20] * world, p, q, seed=seed) for seed, (p, q) in enumerate(WIDTHS)]
    for theirs in ask(world, "values_of_lists"):
        for values in theirs:
            assert values[::2] == pytest.approx(true[::2], rel=1e-12)
            assert values[1::2] == pytest.approx(true[1::2], rel=1e-5)
        assert theirs[0] == theirs[1]
        assert theirs[2] == theirs[3]


def test_two_losses_in_turns_ride_once_the_turns_are_known(world: int, ask: Ask) -> None:
    true = [whole([20] * world, *WIDTHS[i], seed=i, estimator=("biased", "unbiased")[i]) for i in (0, 1)]
    for steps in ask(world, "alternating"):
        assert [len(seen) for seen, _ in steps] == [2, 3, 3, 1, 1, 1, 1, 1]
        assert [value for _, value in steps] == pytest.approx(true * 4, rel=1e-12)


def test_rows_that_fit_ride_with_what_was_agreed(world: int, ask: Ask) -> None:
    found = ask(world, "last_batches")
    assert [len(seen) for seen, *_ in found[0]] == [2, 1, 1, 1, 3, 1, 3, 1, 1]
    for step, (n, masked) in enumerate(GATHERED):
        mask = torch.arange(20 * (world - 1) + n) != 20 * (world - 1) + 3 if masked else None
        true = whole([20] * (world - 1) + [n], mask=mask)
        assert all(theirs[step][1] == pytest.approx(true, rel=1e-12) for theirs in found)
        assert (found[-1][step][2] > 0) == (n > 0)
    for theirs in found:  # the bits of the same rows, at first, again, and with room for a mask
        assert theirs[0][1] == theirs[1][1] == theirs[5][1] == theirs[8][1] != theirs[6][1]


def test_what_travels_follows_the_rows(world: int, ask: Ask) -> None:
    for theirs in ask(world, "changing"):
        kinds = [[name.split("_")[1] for name, _ in seen] for seen, _ in theirs]
        assert kinds == [
            ["gather", "reduce", "reduce"],
            ["reduce", "reduce"],
            ["reduce", "reduce"],  # fewer rows of the same transport
            ["reduce", "gather", "gather"],
            ["gather"],
            ["gather", "gather", "reduce", "reduce"],
        ]
        assert [value for _, value in theirs] == pytest.approx(
            [whole([n] * world, 2, 1) for n in CHANGING], rel=1e-11
        )  # fmt: skip


@pytest.mark.parametrize("before", ["after 0", "after 2"])
@pytest.mark.parametrize("transport", ["merged", "gathered"])
def test_an_error_amid_the_work_of_one_rank(transport: str, before: str, world: int, ask: Ask) -> None:
    *others, own = [theirs[transport, before] for theirs in ask(world, "failures")]
    assert own[:2] == ["MemoryError", "no memory for this"]
    for kind, message, _ in others:
        assert kind == "RuntimeError"
        assert f"rank {world - 1}: MemoryError: no memory for this" in message
    assert [theirs[2] for theirs in (*others, own)] == pytest.approx([whole([20] * world)] * world, rel=1e-12)


def test_ranks_whose_histories_differ_agree_anew(world: int, ask: Ask) -> None:
    true = whole([20] * world)
    for theirs in ask(world, "another_history"):
        assert [value for value, _ in theirs] == pytest.approx([true] * 5, rel=1e-12)
        assert [count for _, count in theirs] == [3, 2, 4, 2, 2]


def test_nan_rides_like_any_number(world: int, ask: Ask) -> None:
    for theirs in ask(world, "nan_rides"):
        for steps in (theirs[:4], theirs[4:]):
            values, counts = zip(*steps, strict=True)
            assert torch.tensor(values).isnan().tolist() == [False, False, True, False]
            assert len(set(counts[1:])) == 1
            assert values[3] == values[0]


def test_each_group_has_its_own_history(world: int, ask: Ask) -> None:
    for counts in ask(world, "new_groups"):
        assert counts == [2, 2, 1, 1, 2]


def test_explaining_is_no_call_to_travel_with(world: int, ask: Ask) -> None:
    for kind, message in ask(world, "explained_beside"):
        assert kind == "ValueError"
        assert "explain is " in message


def test_any_order_of_calls_and_errors(world: int, ask: Ask) -> None:
    assert ask(world, "random_calls") == [[]] * world
