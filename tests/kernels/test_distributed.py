"""group=: the statistic of the rows of all ranks and its gradient, against one process with the whole batch in fp64.

Ranks are processes over gloo, started once for each world size (tests/kernels/ranks.py); here their results are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bird_kernels import cka_loss, distributed, transport
from bird_kernels.types import Problem
from tests.accuracy import features, truth

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from tests.kernels import rank_calls, rank_errors, ranks
from tests.kernels.ranks import CASES, ROWS, SPLITS, WORLDS, Case
from tests.selection import short

Ask = Callable[..., list[Any]]
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3}  # of gradients; bf16 keeps eight bits


few = short(
    "every case of two ranks, and of three of which one has no rows; of one and of four, fp64 shows a wrong sum",
    lambda case, world: world in (2, 3) or case.dtype == torch.float64,
)


@few
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_whole_batch(case: Case, world: int, ask: Ask) -> None:
    found = ask(world, case)
    x, y, mask = ranks.batch(case)
    true = truth(x, y, case.estimator, case.statistic, mask, upstream=3.0)
    assert all(torch.equal(theirs["value"], found[0]["value"]) for theirs in found)
    assert all(theirs["equal"] for theirs in found), "a call that was agreed on before gives other bits"
    bound = BOUNDS[case.dtype]
    assert abs(found[0]["value"].double() - true.value) <= min(bound, 5e-6) * max(abs(true.value), 1.0)
    for name in ("dx", "dy"):
        parts, want = [theirs[name] for theirs in found], getattr(true, name)
        assert [len(part) for part in parts] == SPLITS[case.split][world]
        got = torch.cat(parts)
        assert got.dtype == case.dtype
        assert (got.double() / world - want).norm() <= bound * want.norm()
        if mask is not None:
            assert not got[~mask].any()


@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_constant_side_stays_constant(world: int, ask: Ask) -> None:
    assert ask(world, "constants") == [0.0] * world


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", rank_calls.OTHERS)
def test_other_kernels_and_relatives(name: str, world: int, ask: Ask) -> None:
    """They see all rows too, though their sums do not merge."""
    found = [theirs[name] for theirs in ask(world, "others")]
    x, y, mask = rank_calls.OTHERS[name].batch()
    x.requires_grad_()
    value = cka_loss(x, y, mask=mask, backend="reference", **rank_calls.OTHERS[name].options)
    (dx,) = torch.autograd.grad(value, x)
    if name.startswith("rbf"):  # the reference lets no gradient through sigma either
        assert value < 0.99
    assert all(abs(theirs[0] - value) < 1e-12 for theirs in found)
    assert [len(theirs[1]) for theirs in found] == SPLITS[rank_calls.OTHERS[name].split][world]
    assert (torch.cat([theirs[1] for theirs in found]) / world - dx).norm() < 1e-10 * dx.norm()


@pytest.mark.parametrize("world", WORLDS[2:])
def test_a_group_is_its_own_ranks(world: int, ask: Ask) -> None:
    """Two groups at once, each of every other rank."""
    x, y, _ = ranks.batch(Case("merged"))
    found, parts = ask(world, "subgroup"), [side.split(SPLITS["even"][world]) for side in (x, y)]
    for rank, (members, *both) in enumerate(found):
        assert members == list(range(rank % 2, world, 2))
        true = truth(*(torch.cat([side[member] for member in members]) for side in parts), "unbiased")
        for value, dx in both:
            assert abs(value - true.value) < 1e-12
            want = true.dx.split([len(parts[0][member]) for member in members])[members.index(rank)]
            assert (dx / len(members) - want).norm() < 1e-12 * true.dx.norm()


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", rank_calls.PAIRS)
def test_lists_of_pairs(name: str, world: int, ask: Ask) -> None:
    """The weighted sum of each pair's loss of all rows; all pairs travel at once."""
    found = [theirs[name] for theirs in ask(world, "lists")]
    mask = ranks.batch(Case("", masked=True))[2]
    options = dict(rank_calls.PAIRS[name])
    pairs = rank_calls.sides(name)
    weights = options.pop("weights", [1.0] * len(pairs))
    leaves = [side.requires_grad_() for pair in pairs for side in pair]
    each = [cka_loss(x, y, mask=mask, backend="reference", **options) for x, y in pairs]
    value = sum(w * loss for w, loss in zip(weights, each, strict=True))
    wanted = torch.autograd.grad(value, leaves[::2] + leaves[1::2])
    for theirs in found:
        assert abs(theirs[0] - value) < 1e-12
        assert [name for name, _ in theirs[2]] == ["all_gather_into_tensor"]
    for i, want in enumerate(wanted):
        got = torch.cat([theirs[1][i] for theirs in found]) / world
        assert (got - want).norm() < 1e-10 * want.norm()


@pytest.mark.parametrize("world", WORLDS[1:])
def test_tokens_of_all_ranks(world: int, ask: Ask) -> None:
    """Padded and packed, ranks with other numbers of sequences: rows picked one by one, and the literal formula."""
    x, y, mask = rank_calls.sequences()
    there = mask.bool()
    found = ask(world, "tokens")
    present = [i for i in range(len(x)) if there[i].any()]
    for i, (mode, _, estimator) in enumerate(rank_calls.TOKENS):
        leaf = x.clone().requires_grad_()
        pick = {
            "all": lambda side: torch.cat([side[i][there[i]] for i in present]),
            "last": lambda side: torch.stack([side[i][there[i]][-1] for i in present]),
            "mean": lambda side: torch.stack([side[i][there[i]].mean(0) for i in present]),
        }[mode]
        value = cka_loss(pick(leaf), pick(y), estimator=estimator, backend="reference")
        (dx,) = torch.autograd.grad(value, leaf)
        assert all(abs(theirs[i][0] - value) < 1e-12 for theirs in found)
        assert (torch.cat([theirs[i][1] for theirs in found]) / world - dx).norm() < 1e-10 * dx.norm()


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("split", ["uneven", "one has all"])
def test_statistics_of_all_ranks(split: str, world: int, ask: Ask) -> None:
    x, y, mask = ranks.batch(Case("", masked=True))
    assert mask is not None
    true = [
        truth(x, y, estimator, statistic, mask).value.item()
        for statistic, estimator in (("cka", "biased"), ("cka", "unbiased"), ("hsic", "unbiased"))
    ]
    for theirs in ask(world, "reduced"):
        values, n, collectives = theirs[split]
        assert [value.item() for value in values] == pytest.approx(true, rel=1e-12)
        assert n == mask.sum()
        assert collectives == ["all_gather_into_tensor", "all_reduce", "all_reduce"]


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("kernel", ["", " rbf"])
def test_chunks_of_all_ranks(kernel: str, world: int, ask: Ask) -> None:
    assert max(ask(world, f"chunks{kernel}")) < 1e-10


@few
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_are_those_of_the_plan(case: Case, world: int, ask: Ask) -> None:
    rows = SPLITS[case.split][world]
    problem = Problem(ROWS, case.width, ranks.Q, case.dtype, torch.device("cpu"), case.statistic, case.estimator)
    problem = problem._replace(masked=case.masked)
    sizes = case.width, ranks.Q, case.dtype.itemsize
    for theirs in ask(world, case):
        (name, header), *data = theirs["forward"]
        assert (name, header) == ("all_gather_into_tensor", transport.HEADER * world)
        assert (theirs["again"], theirs["backward"]) == (data, [])
        moved = sum(size for _, size in data) - transport.SLOT * world
        if case.transport == "merged":
            assert [name for name, _ in data] == ["all_reduce"] * 2
            assert moved == transport.merged_size(*sizes, case.estimator == "unbiased")
        else:
            assert [name for name, _ in data] == ["all_gather_into_tensor"]
            assert moved == transport.block_size(max(rows), *sizes, case.masked) * world
        chosen = transport.cheaper(problem, rows, "auto")
        said = chosen.bytes if chosen.name == case.transport else chosen.other_bytes
        sent = {"all_reduce": 2, "all_gather_into_tensor": 1}[data[0][0]] * moved * (world - 1) / world
        assert 0 <= sent - said < 1


TRAININGS = (
    "ddp biased", "ddp unbiased", "ddp uneven", "accumulation",
    "fsdp", "fsdp accumulation", "fsdp accumulation, silent",
)  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("training", TRAININGS)
def test_averaged_gradients_are_those_of_one_big_batch(training: str, world: int, ask: Ask) -> None:
    assert max(ask(world, training)) < 1e-10


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_is_a_call_without_a_group(world: int, ask: Ask) -> None:
    assert ask(world, "one rank") == [dict(equal=True, seen=[])] * world


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("what", rank_errors.COMPLAINTS)
def test_an_error_of_one_rank_is_an_error_on_every_rank(what: str, world: int, ask: Ask) -> None:
    """Of one call, of lists, tokens, layers and chunks: an error of one rank is one on every rank, and names it; ranks
    that differ are named on all. Also where before it the ranks were in a call that they knew."""
    _, kind, shown = rank_errors.COMPLAINTS[what]
    between = "".join(f"4 and 3 on cpu (rank {rank}), " for rank in range(1, world - 1))
    shown = shown.format(others=" ".join(map(str, range(world - 1))), last=world - 1, between=between)
    for *others, own in zip(*ask(world, f"complaint {what}"), strict=True):  # after nothing, merged, gathered
        assert shown in own[1]
        if kind == "differ":
            assert own[0] == "ValueError"
            assert others == [own] * (world - 1)
            continue
        assert own[0] == kind
        for theirs in others:
            assert theirs[0] == "RuntimeError"
            assert f"rank {world - 1}: {kind}: {own[1]}" in theirs[1]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_group_works_after_errors(world: int, ask: Ask) -> None:
    x, y = (torch.cat([side] * world) for side in features(6, 4, 3))
    true = truth(x, y).value.item()
    assert ask(world, "whole again") == pytest.approx([true] * world, rel=1e-5)


def test_a_rank_that_never_comes_is_a_timeout(ask: Ask) -> None:
    waited, absent = ask(2, "silence")
    assert absent is None
    assert "timed out" in waited[1].lower() or "timeout" in waited[1].lower()


def test_a_rank_that_dies_is_an_error(ask: Ask) -> None:
    """A broken connection ends the waiting at once: the timeout is a minute."""
    *others, dead = ask(3, "death")
    assert dead is None
    for kind, message, seconds in others:
        assert kind != "none"
        assert message
        assert seconds < 30


# ---------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("world", WORLDS[1:])
def test_explain_says_what_travels(world: int, ask: Ask) -> None:
    for (merged, merged_route, merged_line), (gathered, _, gathered_line) in ask(world, "explained"):
        assert (merged.name, merged_route, merged.rows) == ("merged", "cross", 20000 * world + world * (world - 1) // 2)
        assert (gathered.name, gathered.rows) == ("gathered", 4 * world + world * (world - 1) // 2)
        for t, line in ((merged, merged_line), (gathered, gathered_line)):
            assert t.bytes < t.other_bytes
            assert f"{world} ranks, {t.rows} rows: {t.name}" in line


@pytest.mark.parametrize("world", WORLDS[1:])
def test_what_does_not_go_with_a_group_says_so(world: int, ask: Ask) -> None:
    for found in ask(world, "refusals"):
        for name in ("merged", "gathered"):
            assert found[f"double backward, {name}"] == (
                "RuntimeError", "group= has no double backward: call without create_graph=True",
            )  # fmt: skip
        assert found["torch.func"] == (
            "RuntimeError",
            "group= does not work inside torch.func transforms: use autograd",
        )
        assert found["no group"][0] == "TypeError"
        assert "torch.distributed.group.WORLD" in found["no group"][1]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_that_want_other_gradients_and_autocast_get_the_same_bits(world: int, ask: Ask) -> None:
    x, y = (torch.cat(sides) for sides in zip(*(features(12, 4, 3, seed=rank) for rank in range(world)), strict=True))
    true = truth(x, y).value.item()
    found = ask(world, "some gradients")
    for rank, theirs in enumerate(found):
        for (value, autocast, missing), (first, *_) in zip(theirs, found[0], strict=True):
            assert value == autocast == first == pytest.approx(true, rel=2e-6)
            assert missing == [rank != 0, rank == 0]


@pytest.mark.parametrize("world", WORLDS[1:])
def test_what_one_rank_wants_all_compute(world: int, ask: Ask) -> None:
    first, *others = ask(world, "last bits")
    assert all(theirs == first for theirs in others)


def test_compiled_code_breaks_its_graph_at_the_call(ask: Ask) -> None:
    for found in ask(2, "compiled"):
        assert (found["value"], found["gradient"]) == (0.0, 0.0)
        assert "the ranks of a group agree on the host" in found["fullgraph"][1]


@pytest.mark.skipif(not ranks.INTERPRETED, reason="needs Triton's interpreter: the ranks compute on the CPU")
def test_a_backend_that_is_asked_for_gets_the_rows(ask: Ask) -> None:
    assert max(ask(2, "triton")) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("travels", ["merged", "gathered"])
def test_one_rank_of_nccl(travels: str, estimator: str, device: torch.device) -> None:
    """The collectives' calls, dtypes and devices: one GPU can host one rank."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x, y = features(40, 9, 7, device=device, mean=3.0)
        x.requires_grad_()
        y.requires_grad_()
        mask = torch.arange(40, device=device) % 3 != 1
        case = Case(travels, estimator)
        with ranks.forced(travels):
            value = ranks.grouped(x, y, mask, case, dist.group.WORLD)
        true = truth(x.detach(), y.detach(), estimator, mask=mask)
        assert value.item() == pytest.approx(true.value.item(), rel=1e-5)
        for got, want in zip(torch.autograd.grad(value, (x, y)), (true.dx, true.dy), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()
    finally:
        dist.destroy_process_group()


def test_no_collective_is_one_that_pytorch_warns_of() -> None:
    for name in (distributed.GATHER, "all_reduce", "all_gather_object"):
        assert not hasattr(getattr(dist, name), "__deprecated__")
