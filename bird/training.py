"""One plain training loop for every method: pre-training, fine-tuning, hints and BIRD.

    history = fit(student, train, Settings(steps=1000), guide=Guide(teacher, taps, loss), validate=score)

The loop waits for the device where it reports, every ``log_every`` steps, and nowhere else (but with float16
PyTorch's loss scaling looks at the gradients in every step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoints import MIN_BATCH, History, Run, Settings
from .chunks import chunked_backward
from .losses import BirdLoss, Hints
from .taps import Taps
from .teachers import Teacher
from .vision.data import Images, to_float

# augment(x, index, epoch): images [n, c, h, w] in 0-1, which samples they are (int64 [n]), and which epoch it
# is.
Augment = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class Guide:
    """What pulls a student: a teacher, taps on the student, and the loss that compares the two.

    Args:
        teacher: sees the student's images.
        taps: on the student that is trained.
        loss: its own parameters, if any, are trained too.
    """

    teacher: Teacher
    taps: Taps
    loss: BirdLoss | Hints


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Batches in one pass over the data; a last one of fewer than `MIN_BATCH` samples does not count."""
    steps = samples // batch_size + (samples % batch_size >= MIN_BATCH)
    if steps == 0:
        raise ValueError(f"training needs at least {MIN_BATCH} samples, not {samples}")
    return steps


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the data in an epoch, int64 ``[samples]``, from seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def learning_rate(step: int, settings: Settings) -> float:
    """Cosine: ``final_lr + (lr - final_lr) (1 + cos(pi step / steps)) / 2``, for step 0, 1, ... steps - 1."""
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return settings.final_lr + (settings.lr - settings.final_lr) * cosine


def fit(
    model: nn.Module,
    train: Images,
    settings: Settings,
    *,
    guide: Guide | None = None,
    augment: Augment | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    resume: bool = False,
    label: str = "training",
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place; at the end it is on the device and holds the weights of the last step.

    A run that is resumed ends with bitwise the weights of one that was never interrupted, on the same machine
    with the same number of threads (on a GPU: as far as PyTorch's own kernels are deterministic).

    Args:
        model: images ``[n, c, h, w]`` in 0-1 to logits ``[n, classes]``.
        train: the training set; moves to the device whole.
        settings: how long, how fast, in which order, and how much at a time.
        guide: None to train on the task alone.
        augment: changes the images of every batch; of every chunk, where there are chunks, and with `BirdLoss` twice,
            both times with PyTorch's generators in the same state.
        validate: scores the model, in eval mode and without gradients, on *validation* data, never on test
            data; higher is better.
        device: any PyTorch device.
        folder: gets ``last.pt`` (all that resuming needs), ``best.pt`` (the weights of the best validation),
            and logs for TensorBoard where that is installed. None to keep nothing.
        resume: go on from ``last.pt`` if the folder has one.
        label: the progress bar's title.
        progress: show the bar; None to show it on a terminal only.

    Raises:
        FileExistsError: the folder has a checkpoint, and ``resume`` is off.
        ValueError: the checkpoint comes from other settings or data; fewer than `MIN_BATCH` samples.
        FloatingPointError: the loss is no longer finite.
    """
    device = torch.device(device)
    torch.manual_seed(settings.seed)
    per_epoch = steps_per_epoch(len(train), settings.batch_size)
    train = train.to(device)
    modules = nn.ModuleDict({"model": _place(model, device)})
    if guide is not None:
        _place(guide.teacher, device)
        modules["guide"] = guide.loss.to(device)
    run = Run(modules, settings, len(train), device, folder)
    done = run.restore(resume)
    writer = _tensorboard(folder, done)
    precision = torch.float32 if settings.amp is None else getattr(torch, settings.amp)
    autocast = torch.autocast(device.type, dtype=precision, enabled=settings.amp is not None)
    totals: dict[str, Tensor] = {}
    order, order_epoch = torch.empty(0), -1

    model.train()
    hidden = None if progress is None else not progress
    with tqdm(total=settings.steps, initial=done, desc=label, leave=False, disable=hidden) as bar:
        for step in range(done, settings.steps):
            epoch, batch = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(len(train), settings.seed, epoch).to(device), epoch
            index = order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
            chunks = _Chunks(train, index, settings.chunk_size, augment, epoch)

            lr = learning_rate(step, settings)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.zero_grad()
            for name, value in _backward(run, guide, chunks, autocast).items():
                totals[name] = totals[name] + value if name in totals else value
            run.scaler.step(run.optimizer)
            run.scaler.update()

            done = step + 1
            saving = done % settings.save_every == 0 or done == settings.steps
            if saving or done % settings.log_every == 0:
                row = run.report(done, lr, totals)
                totals = {}
                bar.update(done - bar.n)
                bar.set_postfix({name: f"{row[name]:.3f}" for name in row if name not in ("step", "lr", "task")})
                _log(writer, done, {f"train/{name}": row[name] for name in row if name != "step"})
            if saving:
                if validate is not None:
                    _log(writer, done, {"validation/score": run.select(done, validate)})
                run.save(done)
    if writer is not None:
        writer.close()
    return run.history


class _Chunks(Sequence[tuple[Tensor, Tensor]]):
    """A batch in parts of equal size, as far as that goes: images and labels, made when they are asked for."""

    def __init__(
        self, train: Images, index: Tensor, chunk_size: int | None, augment: Augment | None, epoch: int
    ) -> None:
        self.parts = index.tensor_split(math.ceil(len(index) / (chunk_size or len(index))))
        self.samples = len(index)
        self.train, self.augment, self.epoch = train, augment, epoch

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        index = self.parts[i]
        x, labels = to_float(self.train.images[index]), self.train.labels[index]
        if self.augment is not None:
            x = self.augment(x, index, self.epoch)
        return x.contiguous(memory_format=torch.channels_last), labels


def _backward(run: Run, guide: Guide | None, chunks: _Chunks, autocast: torch.autocast) -> dict[str, Tensor]:
    """The gradients of one batch; returns its loss, accuracy and the guide's terms, detached."""
    model, means = run.modules["model"], dict[str, Tensor]()

    def note(share: float, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            means[name] = means[name] + share * value if name in means else share * value

    def forward(chunk: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
        x, labels = chunk
        share = len(x) / chunks.samples
        logits = model(x)
        if torch.is_grad_enabled():  # not what only looks ahead
            note(share, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()})
        return share, F.cross_entropy(logits, labels)

    if guide is not None and isinstance(guide.loss, BirdLoss) and len(chunks) > 1:
        taps, teacher = guide.taps, guide.teacher

        def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            share, task = forward(chunk)
            return share * task, taps.pop()

        one = torch.ones((), device=chunks.parts[0].device)
        with autocast:
            loss = chunked_backward(
                student,
                lambda chunk: teacher(chunk[0]),
                chunks,
                guide.loss,
                model=model,
                gradient=run.scaler.scale(one),
            )
        return {"loss": loss} | means | guide.loss.last

    for chunk in chunks:
        with autocast:
            share, loss = forward(chunk)
            if guide is not None:
                loss = guide.loss(loss, guide.teacher(chunk[0]), guide.taps.pop())
        run.scaler.scale(share * loss).backward()
        note(share, {"loss": loss.detach()} | (guide.loss.last if guide is not None else {}))
    return {"loss": means.pop("loss")} | means


def _place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to the device, in place, convolutions in channels-last layout."""
    return module.to(device).to(memory_format=torch.channels_last)


def _tensorboard(folder: Path | None, done: int) -> Any:
    """A writer that drops what an interrupted run logged after its checkpoint; None where none can be."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=done + 1)


def _log(writer: Any, step: int, values: dict[str, float]) -> None:
    for name, value in values.items() if writer is not None else ():
        writer.add_scalar(name, value, step)
