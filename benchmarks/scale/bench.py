"""group= beside what users could write instead, on gloo ranks of this machine with one thread each.

python -m benchmarks.scale.bench [--ranks 2] [--save] prints the table; --save keeps it in benchmarks/scale/results.

merged, gathered    cka_loss(..., group=...), what travels forced; "*" marks what it would have chosen
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from benchmarks import harness, rows
from benchmarks.harness import Contestant, Verdict
from benchmarks.machine import Machine
from benchmarks.rows import Origin
from benchmarks.scale.model import size_of
from bird_kernels import cka_loss, plan, transport
from bird_kernels.clocks import Run, Take
from bird_kernels.types import Problem
from tests import accuracy

RESULTS = Path(__file__).parent / "results"
SHAPES = ((32, 512, 512), (128, 512, 512), (512, 512, 512), (4096, 512, 512), (128, 64, 64), (4096, 64, 64))
GATE = 1e-4  # relative error of value and gradient, fp32
SHARE, PATIENCE = 2.0, 6.0  # seconds of measuring for one contestant, and the most that few rounds may take
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ScaleRow(Origin):
    """One contestant on one shape: each rank's rows n, bytes that it sends (ours), seconds of forward and backward."""

    ranks: int
    n: int
    p: int
    q: int
    name: str
    chosen: bool
    value: float | None
    whole_value: float
    red: str
    gradient_error: float | None
    sent: int | None
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int | None


def forced(name: str) -> Loss:
    """group= with this transport."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        choose = transport.cheaper
        with mock.patch.object(transport, "cheaper", lambda *args: choose(*args)._replace(name=name)):
            return cka_loss(x, y, group=dist.group.WORLD)

    return loss


def autograd(x: Tensor, y: Tensor) -> Tensor:
    """What a user writes: the rows of all, differentiably, and the better of the two hand-written forms."""
    from torch.distributed.nn.functional import all_gather

    everyone = torch.cat(all_gather(x))
    teachers = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(teachers, y)
    route = plan.choose_route(len(everyone), x.shape[1], y.shape[1])
    return accuracy.plain(route)(everyone, torch.cat(teachers))


CONTESTANTS: dict[str, Loss] = {
    "merged": forced("merged"), "gathered": forced("gathered"), "autograd": autograd, "average": cka_loss,
}  # fmt: skip


def whole_truth(x: Tensor, y: Tensor) -> accuracy.Result:
    """The hand-written loss in fp64, under autograd: the literal formula would take minutes at 8,192 rows."""
    route = plan.choose_route(len(x), x.shape[1], y.shape[1])
    return accuracy.evaluate(accuracy.plain(route), x.double(), y.double(), sides="x")


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


def contest_of(shape: tuple[int, int, int]) -> list[ScaleRow]:
    """All contestants on one shape; every rank runs this, the first one's rows count."""
    rank, world = dist.get_rank(), dist.get_world_size()
    n, p, q = shape
    x, y = accuracy.features(n * world, p, q)
    own = slice(rank * n, (rank + 1) * n)
    whole, parts = whole_truth(x, y), whole_truth(x[own], y[own])
    mine, teacher = x[own].clone().requires_grad_(), y[own].clone()
    chosen = transport.cheaper(Problem(n * world, p, q, x.dtype, x.device), [n] * world, "auto")
    sent = {chosen.name: chosen.bytes, ("gathered" if chosen.name == "merged" else "merged"): chosen.other_bytes}
    values: dict[str, float] = {}

    def call(name: str, loss: Loss) -> tuple[str, Tensor, Tensor]:
        try:
            value = loss(mine, teacher)
            return name, value.detach(), torch.autograd.grad(value, mine)[0]
        except Exception as error:  # on this rank, perhaps on no other: past the harness, they must not wait for it
            raise SystemExit(f"{name}: {rows.message(error)}") from error

    def judge(answer: tuple[str, Tensor, Tensor]) -> Verdict:
        """The largest errors of all ranks, so that all come to the same verdict; and the mean of their values."""
        name, value, dx = answer
        want, gradient, factor = (whole.value, whole.dx[own], world) if name != "average" else (*parts[:2], 1)
        error = ((dx.double() / factor - gradient).norm() / gradient.norm()).item()
        off = max(error, abs(value.item() - want.item()) / want.item())
        worst = torch.tensor([off, error, value.item() / world]).nan_to_num(torch.inf)
        dist.all_reduce(worst[:2], dist.ReduceOp.MAX)
        dist.all_reduce(worst[2:])
        off, error, values[name] = worst.tolist()
        return Verdict.within(off, GATE)._replace(gradient_error=error)

    candidates = [Contestant(name, partial(call, name, loss), captured=False) for name, loss in CONTESTANTS.items()]
    found = harness.contest(Ranks(x.device), candidates, judge, "wall", SHARE, PATIENCE)
    about = rows.origin_of(x.device) | dict(ranks=world, n=n, p=p, q=q, whole_value=whole.value.item())
    return [
        ScaleRow(
            **about, name=name, chosen=name == chosen.name, value=values.get(name), red=found[name].why,
            gradient_error=found[name].verdict.gradient_error, sent=sent.get(name),
            **found[name].timing("wall"),
        )
        for name in CONTESTANTS
    ]  # fmt: skip


def rank_main(rank: int, world: int, shapes: list[tuple[int, int, int]], folder: str) -> None:
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = [row for shape in shapes for row in contest_of(shape)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in found]))
    gc.collect()  # whoever holds on to the group keeps gloo's threads alive, which may abort the process at its end
    dist.destroy_process_group()


def on_ranks(world: int, shapes: list[tuple[int, int, int]]) -> list[ScaleRow]:
    """The contest on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(rank_main, (world, shapes, folder), nprocs=world)
        return [ScaleRow(**row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def scale_page(found: list[ScaleRow]) -> str:
    """Markdown: origin, then a line per shape."""
    names = list(CONTESTANTS)
    cells = [["rows of each rank, p, q", *names, "sent, merged", "sent, gathered", "CKA, whole", "CKA, average"]]
    for shape in dict.fromkeys((row.n, row.p, row.q) for row in found):
        line = {row.name: row for row in found if (row.n, row.p, row.q) == shape}
        base = next(row for row in line.values() if row.chosen)
        shown = [_cell(line[name], base) for name in names]
        sent = [size_of(line[name].sent or 0) for name in ("merged", "gathered")]
        ckas = [f"{1 - value:.3f}" if value is not None else "–" for value in (base.whole_value, line["average"].value)]
        cells.append([", ".join(f"{size:,}" for size in shape), *shown, *sent, *ckas])
    title = f"Global batches: {found[0].ranks} ranks over gloo"
    return f"{rows.heading(title, found)}{EXPLANATION}\n{rows.table_text(cells)}"


EXPLANATION = """\
Forward and backward of the loss and the student's gradient, fp32, biased; median over rounds of the slowest rank. In
brackets: times what `group=` chooses, which is marked *. *merged* and *gathered*: `cka_loss(..., group=...)`;
*autograd*: differentiable all-gather and the hand-written loss; *average*: every rank its own rows, which is *another
objective* (last two columns). Everybody passes a gate against fp64 first.
"""


def _cell(row: ScaleRow, base: ScaleRow) -> str:
    if row.p50 is None or base.p50 is None:
        return row.red or "-"
    return rows.beside(row.p50, base.p50) + " *" * row.chosen


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    found = on_ranks(arguments.ranks, list(SHAPES))
    rows.conclude(path_of(found), found, scale_page(found), arguments.save)
    if any(row.red for row in found):
        raise SystemExit("a contestant is wrong")


def path_of(found: list[ScaleRow]) -> Path:
    """The file of rows, named by device and ranks."""
    return RESULTS / f"{rows.slug(f'{found[0].device} {found[0].ranks} ranks')}.csv"


if __name__ == "__main__":
    main()
