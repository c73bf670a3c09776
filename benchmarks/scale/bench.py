"""group= beside what users could write instead, on gloo ranks of this machine with one thread each.

python -m benchmarks.scale.bench [--ranks 2] [--save] prints the table; --save keeps it in benchmarks/scale/results.

merged, gathered    cka_loss(..., group=...), what travels forced; "*" marks what it would have chosen
autograd            torch.distributed.nn.functional.all_gather of both sides, then the hand-written loss
average             every rank the loss of its own rows, as DDP averages them: another objective, held to its own truth

Each is timed forward and backward, in turns in random order, from a barrier until the slowest rank is done. Before that
its value and this rank's gradient are held to fp64.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import os
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import spawn

from benchmarks.kernels import results
from benchmarks.kernels.tables import markdown
from benchmarks.scale.model import size_of, time_of
from bird_kernels import cka_loss, plan, transport
from bird_kernels.types import Problem
from tests import accuracy

RESULTS = Path(__file__).parent / "results"
SHAPES = ((32, 512, 512), (128, 512, 512), (512, 512, 512), (4096, 512, 512), (128, 64, 64), (4096, 64, 64))
GATE = 1e-4  # relative error of value and gradient, fp32
MOST, SHARE = 40, 2.0  # rounds; seconds that each contestant may take
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row(results.Origin):
    """One contestant on one shape: each rank's rows n, bytes that it sends (ours), seconds of forward and backward."""

    ranks: int
    n: int
    p: int
    q: int
    name: str
    chosen: bool
    value: float
    whole_value: float
    red: str
    gradient_error: float
    sent: int | None
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int


def forced(name: str) -> Loss:
    """group= with this transport."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        choose = transport.choose
        with mock.patch.object(transport, "choose", lambda *args: choose(*args)._replace(name=name)):
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


def truth(x: Tensor, y: Tensor) -> accuracy.Result:
    """The hand-written loss in fp64, under autograd: the literal formula would take minutes at 8,192 rows."""
    route = plan.choose_route(len(x), x.shape[1], y.shape[1])
    return accuracy.evaluate(accuracy.plain(route), x.double(), y.double(), sides="x")


def compete(shape: tuple[int, int, int], origin: results.Origin) -> list[Row]:
    """All contestants on one shape; every rank runs this, the first one's rows count."""
    rank, world = dist.get_rank(), dist.get_world_size()
    n, p, q = shape
    x, y = accuracy.features(n * world, p, q)
    own = slice(rank * n, (rank + 1) * n)
    whole, parts = truth(x, y), truth(x[own], y[own])
    mine, teacher = x[own].clone().requires_grad_(), y[own].clone()
    chosen = transport.choose(Problem(n * world, p, q, x.dtype, x.device), [n] * world, "auto")
    sent = {chosen.name: chosen.bytes, ("gathered" if chosen.name == "merged" else "merged"): chosen.other_bytes}

    def call(loss: Loss) -> tuple[Tensor, Tensor]:
        value = loss(mine, teacher)
        return value.detach(), torch.autograd.grad(value, mine)[0]

    judged, errors = {}, {}
    for name, loss in CONTESTANTS.items():
        value, dx = call(loss)
        want, gradient, factor = (whole.value, whole.dx[own], world) if name != "average" else (*parts[:2], 1)
        error = ((dx.double() / factor - gradient).norm() / gradient.norm()).item()
        off = max(error, abs(value.item() - want.item()) / want.item())
        worst = torch.tensor([off, error, value.item() / world])
        dist.all_reduce(worst[:2], dist.ReduceOp.MAX)
        dist.all_reduce(worst[2:])
        judged[name] = worst[2].item()
        errors[name] = worst[0].item(), worst[1].item()
    green = {name: loss for name, loss in CONTESTANTS.items() if errors[name][0] <= GATE}
    seconds = in_turns({name: lambda loss=loss: call(loss) for name, loss in green.items()})
    rows = []
    for name in CONTESTANTS:
        times = sorted(seconds.get(name, []))
        cuts = statistics.quantiles(times, n=10) if len(times) > 1 else []
        values = dict(value=judged[name], whole_value=whole.value.item(), gradient_error=errors[name][1])
        red = "" if name in green else f"off by {errors[name][0]:.1e}"
        p20, p50, p80 = (cuts[1], statistics.median(times), cuts[7]) if cuts else (None, None, None)
        about = dict(asdict(origin), ranks=world, n=n, p=p, q=q, name=name, chosen=name == chosen.name)
        timing = dict(sent=sent.get(name), p20=p20, p50=p50, p80=p80, rounds=len(times))
        rows.append(Row(**about, **values, red=red, **timing))  # type: ignore[arg-type]
    return rows


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each round until the slowest rank is done. Ranks draw the same order and the same number of rounds."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent, budget = 0.0, SHARE * len(calls)
    while (len(next(iter(seconds.values()))) < MOST and spent < budget) or len(next(iter(seconds.values()))) < 3:
        for name in order.sample(list(calls), len(calls)):
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds[name].append(took.item())
            spent += took.item()
    return seconds


def work(rank: int, world: int, shapes: list[tuple[int, int, int]], folder: str) -> None:
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    origin = results.origin(torch.device("cpu"))
    rows = [row for shape in shapes for row in compete(shape, origin)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    gc.collect()  # whoever holds on to the group keeps gloo's threads alive, which may abort the process at its end
    dist.destroy_process_group()


def measured(world: int, shapes: list[tuple[int, int, int]]) -> list[Row]:
    """The contest on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (world, shapes, folder), nprocs=world)
        return [Row(**row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def page(rows: list[Row]) -> str:
    """Markdown: origin, then a line per shape."""
    first = rows[0]
    names = list(CONTESTANTS)
    cells = [["rows of each rank, p, q", *names, "sent, merged", "sent, gathered", "CKA, whole", "CKA, average"]]
    shapes = dict.fromkeys((row.n, row.p, row.q) for row in rows)
    for shape in shapes:
        line = {row.name: row for row in rows if (row.n, row.p, row.q) == shape}
        base = next(row for row in line.values() if row.chosen)
        shown = [cell(line[name], base) for name in names]
        sent = [size_of(line[name].sent or 0) for name in ("merged", "gathered")]
        ckas = [f"{1 - base.whole_value:.3f}", f"{1 - line['average'].value:.3f}"]
        cells.append([", ".join(f"{size:,}" for size in shape), *shown, *sent, *ckas])
    about = (
        f"{first.ranks} ranks over gloo, {first.device}; torch {first.torch}, commit {first.commit}, {first.date}, "
        f"load {first.load}, OMP_WAIT_POLICY {first.omp_wait_policy or 'not set'}."
    )
    return f"# Global batches\n\n{about}\n\n{EXPLANATION}\n{markdown(cells)}"


EXPLANATION = """\
Forward and backward of the loss and the student's gradient, fp32, biased; median over rounds of the slowest rank. In
brackets: times what `group=` chooses, which is marked *. *merged* and *gathered*: `cka_loss(..., group=...)`;
*autograd*: differentiable all-gather and the hand-written loss; *average*: every rank its own rows, which is *another
objective* (last two columns). Everybody passes a gate against fp64 first.
"""


def cell(row: Row, base: Row) -> str:
    if row.p50 is None or base.p50 is None:
        return row.red or "-"
    return f"{time_of(row.p50)} ({row.p50 / base.p50:.2f}×){' *' if row.chosen else ''}"


def saved(rows: list[Row]) -> Path:
    """The CSV and the page beside it, named by device and ranks."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{rows[0].device} {rows[0].ranks} ranks".lower()).strip("-")
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.name for column in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    )
    path = RESULTS / f"{name}.csv"
    results.write_text(path, text.getvalue())
    results.write_text(path.with_suffix(".md"), page(rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="keep the results in benchmarks/scale/results")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rows = measured(arguments.ranks, list(SHAPES))
    print(page(rows))
    if arguments.save:
        print(saved(rows))
    if any(row.red for row in rows):
        raise SystemExit("a contestant is wrong")


if __name__ == "__main__":
    main()
