"""`fit` by several processes against one with all of it: equal weights, one writer, errors on all of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bird import BirdLoss, Hints, Taps, Teacher
from bird.lab.tensors import load
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.training import Guide, fit
from tests.groups import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
SETTINGS = Settings(steps=9, batch_size=12, lr=0.1, seed=2, save_every=4, log_every=3)


def data(samples: int = 41) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(images, torch.arange(samples) % 3)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 3)).double()


class Double(nn.Module):
    """Images to fp64, in which one process and several differ by rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x.double())
        return logits


def train(kind: str, group: dist.ProcessGroup | None, folder: Path | None, settings: Settings = SETTINGS) -> nn.Module:
    model = Double()
    teacher = Teacher(copy.deepcopy(Double()), "body.1")
    torch.manual_seed(3)
    loss: BirdLoss | Hints = BirdLoss(pairs=[("body.1", "body.2")], group=group)
    if kind == "hints":
        loss = Hints(
            pairs=[("body.1", "body.2")], teacher_widths={"body.1": 10}, student_widths={"body.2": 10}
        ).double()
    guide = None if kind == "task" else Guide(teacher, Taps(model, "body.2"), loss)

    def validate(model: nn.Module) -> float:
        return float(next(model.parameters()).sum())

    history = fit(
        model, data(), settings, guide=guide, validate=validate, folder=folder, resume=True, progress=False, group=group
    )
    assert [row["step"] for row in history.train] == [3, 4, 6, 8, 9]
    return model


def difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def together(rank: int, folder: Path, kind: str, chunk_size: int | None, samples: int, batch_size: int) -> None:
    """The last batch of an epoch can be shared equally too, so one process sees the same samples in each step."""
    plain = Settings(**{**vars(SETTINGS), "batch_size": batch_size})
    settings = Settings(**{**vars(plain), "chunk_size": chunk_size})
    group = dist.group.WORLD
    whole = data(samples)
    globals()["data"] = lambda: whole
    mine = train(kind, group, folder / "together", settings)
    alone = train(kind, None, None, plain)
    assert difference(mine, alone) < 1e-12
    assert difference(mine, Double()) > 1e-3
    dist.barrier()
    again = train(kind, group, folder / "together", settings)  # nothing is left to do
    assert difference(again, mine) == 0
    kept = load(folder / "together" / "last.pt")
    assert kept["step"] == 9
    assert set(kept["modules"]) >= {"model.body.1.weight"}  # as of one process, which can go on with it


@pytest.mark.parametrize(
    ("world", "kind", "chunk_size", "samples", "batch_size"),
    [
        (2, "task", None, 44, 12),
        (2, "bird", None, 44, 12),
        (2, "bird", 4, 44, 12),
        (2, "hints", None, 44, 12),
        (3, "bird", 4, 84, 24),  # two chunks a process, but of the last batch, of 12, one
        (4, "bird", 4, 88, 24),
    ],
)
def test_processes_train_as_one(
    world: int, kind: str, chunk_size: int | None, samples: int, batch_size: int, tmp_path: Path
) -> None:
    run_ranks(together, world, tmp_path, tmp_path, kind, chunk_size, samples, batch_size)
    files = {path.name for path in (tmp_path / "together").iterdir()}
    assert {"last.pt", "best.pt"} <= files
    assert not any(name.startswith(".") for name in files)


class Cut(Exception):
    """The power goes off."""


def drop(folder: Path, group: dist.ProcessGroup | None, cut: int = 99) -> tuple[nn.Module, list[Tensor]]:
    """A run with dropout until step ``cut``; the model, the masks, and the state of the generator at the end."""
    model, masks, left = Double(), list[Tensor](), iter(range(cut))
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda module, args, out: masks.append((out != 0).double()))
    model.body.insert(3, dropout)

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        if next(left, None) is None:
            raise Cut
        return x

    try:
        fit(model, data(), SETTINGS, augment=augment, folder=folder, resume=True, progress=False, group=group)
    except Cut:
        assert len(masks) == cut
    return model, [*masks, torch.get_rng_state().double()]


def alike(mine: Tensor) -> bool:
    """Whether it is the same on both ranks."""
    both = [torch.empty_like(mine), torch.empty_like(mine)]
    dist.all_gather(both, mine)
    return torch.equal(*both)


def dropping(rank: int, folder: Path) -> None:
    group = dist.group.WORLD
    whole, masks = drop(folder / "whole", group)
    assert len(masks) == 9 + 1
    assert not any(map(alike, masks))
    assert all(map(alike, whole.parameters()))

    _, before = drop(folder / "cut", group, 6)  # save_every is 4
    resumed, after = drop(folder / "cut", group)
    assert len(after) == 5 + 1
    assert all(map(torch.equal, before[:4] + after, masks))
    assert difference(resumed, whole) == 0

    if rank == 0:  # a run that was begun by one process, which had rank 0's stream and all rows
        drop(folder / "alone", None, 6)
    dist.barrier()
    _, more = drop(folder / "alone", group)
    assert len(more) == 5 + 1
    assert not any(map(alike, more))


def test_each_process_has_its_own_dropout_and_goes_on_with_it(tmp_path: Path) -> None:
    run_ranks(dropping, 2, tmp_path, tmp_path)


def poisoned(rank: int, folder: Path) -> None:
    model = Double()
    if rank == 1:
        model.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss became nan at step 1;"):
        fit(model, data(), SETTINGS, progress=False, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="batch_size 13 cannot be shared equally by 2"):
        fit(Double(), data(), Settings(steps=1, batch_size=13), progress=False, group=dist.group.WORLD)


def test_a_nan_of_one_stops_all(tmp_path: Path) -> None:
    run_ranks(poisoned, 2, tmp_path, tmp_path)
