"""``group=`` beside what users could write instead, on gloo ranks of this machine with one thread each.

merged, gathered    cka_loss(..., group=...), what travels forced
autograd            torch.distributed.nn.functional.all_gather of both sides, then the hand-written loss
average             every rank the loss of its own rows, as DDP averages them: another objective, held to its own truth

Each is timed forward and backward, in turns in random order, from a barrier until the slowest rank is done. Before that
its value and this rank's gradient are held to fp64.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from benchmarks.harness import Contestant, GateResult, calling
from benchmarks.kernels import forms
from benchmarks.kernels.forms import Loss
from benchmarks.machine import Machine
from benchmarks.rows import Row, message, size_of
from benchmarks.run import CPU, Benchmark, Contest, Line, any_row
from bird_kernels import cka_loss, distributed, transport
from bird_kernels.clocks import Run, Take
from bird_kernels.types import Problem
from tests import accuracy

SHAPES = (32, 512), (128, 512), (512, 512), (4096, 512), (128, 64), (4096, 64)  # each rank's rows, both widths
FOUR = [(n, d) for n, d in SHAPES if n * d < 1 << 20]
GATE = 1e-4  # relative error of value and gradient, fp32


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    """The better of the two hand-written forms; in fp64 the truth: the literal formula would take minutes."""
    return forms.better_form(*x.shape, y.shape[1])(x, y)


def forced(name: str) -> Loss:
    """group= with this transport, and with a history of its own, as if no other contestant used the group."""
    choose, histories = transport.cheaper, WeakKeyDictionary[Any, Any]()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with (
            mock.patch.object(transport, "cheaper", lambda *args: choose(*args)._replace(name=name)),
            mock.patch.object(distributed, "_HISTORIES", histories),
        ):
            return cka_loss(x, y, group=dist.group.WORLD)

    return loss


def autograd(x: Tensor, y: Tensor) -> Tensor:
    """What a user writes: the rows of all, differentiably, and the better of the two hand-written forms."""
    from torch.distributed.nn.functional import all_gather

    everyone = torch.cat(all_gather(x))
    teachers = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(teachers, y)
    return by_hand(everyone, torch.cat(teachers))


CONTESTANTS: dict[str, Loss] = {
    "merged": forced("merged"), "gathered": forced("gathered"), "autograd": autograd, "average": cka_loss,
}  # fmt: skip


class Ranks(Machine):
    """All ranks as one device: a call begins at a barrier and takes what the slowest rank takes, for everybody."""

    def seconds(self, run: Run) -> float:
        """Of one call on the slowest rank."""
        dist.barrier()
        took = torch.tensor(super().seconds(run), dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()

    def take(self, clock: str, run: Run) -> Take:
        """The same as often as it is called; ranks draw the same order and the same number of rounds."""
        return partial(self.seconds, run)


@dataclass(frozen=True)
class RanksQuestion:
    """A batch of which each of so many ranks has ``n`` rows."""

    ranks: int
    n: int
    p: int
    q: int

    def contest(self) -> Contest:
        """All contestants; every rank runs this, the first one's rows count."""
        rank, world, (n, p, q) = dist.get_rank(), dist.get_world_size(), (self.n, self.p, self.q)
        x, y = accuracy.features(n * world, p, q)
        own = slice(rank * n, (rank + 1) * n)
        whole, part = (calling(partial(by_hand, y=b.double()), a.double())() for a, b in ((x, y), (x[own], y[own])))
        mine, teacher = x[own].clone().requires_grad_(), y[own].clone()
        chosen = transport.cheaper(Problem(n * world, p, q, x.dtype, x.device), [n] * world, "auto")
        sent = {chosen.name: chosen.bytes, ("gathered" if chosen.name == "merged" else "merged"): chosen.other_bytes}
        values: dict[str, float] = {}

        def call(name: str, loss: Loss) -> tuple[str, Tensor, Tensor]:
            try:
                value = loss(mine, teacher)
                return name, value.detach(), torch.autograd.grad(value, mine)[0]
            except Exception as error:  # on this rank, perhaps on no other: past the harness, they must not wait for it
                raise SystemExit(f"{name}: {message(error)}") from error

        def gate(answer: tuple[str, Tensor, Tensor]) -> GateResult:
            """The largest errors of all ranks, so that all come to the same result; and the mean of their values."""
            name, value, dx = answer
            true, rows = (part, slice(None)) if name == "average" else (whole, own)
            want, gradient = true.value.item(), true.gradients[0][rows]
            error = ((dx.double() / (1 if name == "average" else world) - gradient).norm() / gradient.norm()).item()
            off = max(error, abs(value.item() - want) / want)
            worst = torch.tensor([off, error, value.item() / world]).nan_to_num(torch.inf)
            dist.all_reduce(worst[:2], dist.ReduceOp.MAX)
            dist.all_reduce(worst[2:])
            off, error, values[name] = worst.tolist()
            return GateResult.within(off, GATE)._replace(value_error=None, gradient_error=error)

        def more(name: str) -> Row:
            about = {"chosen": name == chosen.name, "sent": sent.get(name)}
            return about | {"value": values.get(name), "whole_value": whole.value.item()}

        candidates = [Contestant(name, partial(call, name, loss)) for name, loss in CONTESTANTS.items()]
        return Contest(candidates, gate, more)


class RanksBenchmark(Benchmark):
    """A question is asked on processes of its own."""

    def ask(self, question: RanksQuestion, pattern: str = "*", timed: bool = True) -> list[Row]:
        """The first rank's rows."""
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        with tempfile.TemporaryDirectory() as folder:
            spawn(_answer, (question, pattern, timed, folder), nprocs=question.ranks)
            return json.loads((Path(folder) / "rows.json").read_text())

    def ask_on_this_rank(self, question: RanksQuestion, pattern: str = "*", timed: bool = True) -> list[Row]:
        """The rows of a process that has its group already."""
        return super().ask(question, pattern, timed)


def _answer(rank: int, question: RanksQuestion, pattern: str, timed: bool, folder: str) -> None:
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=question.ranks)
    found = BENCHMARK.ask_on_this_rank(question, pattern, timed)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(found))
    gc.collect()  # whoever holds on to the group keeps gloo's threads alive, which may abort the process at its end
    dist.destroy_process_group()


def _chosen(line: Line) -> Row | None:
    return next((row for row in line.values() if row["chosen"]), None)


def _sent(line: Line, name: str) -> str:
    return size_of(line.get(name, {}).get("sent") or 0)


def _cka(value: float | None) -> str:
    return "–" if value is None else f"{1 - value:.3f}"


BENCHMARK = RanksBenchmark(
    "Global batches over gloo", "ranks", Path(__file__).parent / "results",
    [RanksQuestion(2, n, d, d) for n, d in SHAPES] + [RanksQuestion(4, n, d, d) for n, d in FOUR],
    """\
Forward and backward of the loss and the student's gradient, fp32, biased, each rank with n rows; median over rounds of
the slowest rank. In brackets: times what `group=` chooses. *merged* and *gathered*: `cka_loss(..., group=...)`;
*autograd*: differentiable all-gather and the hand-written loss; *average*: every rank its own rows, which is *another
objective* (last two columns). Everybody passes a gate against fp64 first.
""",
    ours=set(CONTESTANTS),
    base=_chosen,
    columns={
        "chosen": lambda line: (_chosen(line) or {}).get("provider", "–"),
        "sent, merged": lambda line: _sent(line, "merged"),
        "sent, gathered": lambda line: _sent(line, "gathered"),
        "CKA, whole": lambda line: _cka(any_row(line)["whole_value"]),
        "CKA, average": lambda line: _cka(line.get("average", {}).get("value")),
    },
    share=2.0,
    patience=6.0,
    machine=Ranks(CPU),
)  # fmt: skip
