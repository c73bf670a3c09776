"""One step of training: which samples, at which learning rate, and the gradients of their loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...chunks import chunked_backward
from ...losses import BirdLoss, Hints, LwF
from ...taps import Taps
from ...teachers import Teacher
from ..duration import steps_to_train
from .checkpoints import MIN_BATCH, Settings, TrainingRun
from .data import Images, to_float

# augment(x, index, epoch): images [n, c, h, w] in 0-1, which samples they are (int64 [n]), and which epoch it is. One
# that has a number `ahead` makes the images of so many batches at once: what becomes of a sample must not depend on the
# others, nor on PyTorch's generators.
Augment = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class TransferGuide:
    """What pulls a student: a teacher, taps on the student, and the loss that compares the two.

    Args:
        teacher: sees the student's images; moves to the student's device.
        taps: on the student that is trained.
        loss: its own parameters, if any, are trained too.
        views: what both networks are shown for the loss; the task keeps its own images. None: the same.
    """

    teacher: Teacher
    taps: Taps
    loss: BirdLoss | Hints | LwF
    views: Augment | None = None


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the data in an epoch, int64 ``[samples]``, from seed and epoch alone."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def learning_rate(step: int, settings: Settings) -> float:
    """Cosine: ``final_lr + (lr - final_lr) (1 + cos(pi step / steps)) / 2``, for step 0, 1, ... steps - 1."""
    cosine = (1 + math.cos(math.pi * step / settings.steps)) / 2
    return settings.final_lr + (settings.lr - settings.final_lr) * cosine


class Batches:
    """The batches of a run, step by step; the data is on the device, whole.

    Raises:
        ValueError: fewer than `MIN_BATCH` samples, a negative label.
    """

    def __init__(
        self,
        train: Images,
        settings: Settings,
        augment: Augment | None,
        device: torch.device,
        views: Augment | None = None,
    ) -> None:
        self.per_epoch = steps_to_train(len(train), settings.batch_size, least=MIN_BATCH)
        lowest, highest = torch.stack(train.labels.aminmax()).tolist()
        if lowest < 0:
            raise ValueError(f"labels are numbers from 0, but the training set has {lowest}")
        self.classes = highest + 1  # as far as these data tell
        self.train, self.settings, self.augment, self.views = train.to(device), settings, augment, views
        self._order, self._epoch = torch.empty(0), -1
        self.ahead = 1 if settings.chunk_size else getattr(augment, "ahead", 1)
        self._made, self._first = tuple[Tensor, ...](), 0  # the images of some batches of this epoch, from the first on

    def at(self, step: int) -> Chunks:
        """The batch of step 0, 1, ..."""
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = epoch_order(len(self.train), self.settings.seed, epoch)
            self._order, self._epoch, self._made = order.to(self.train.images.device), epoch, ()
        size = self.settings.batch_size
        chunks = Chunks(self, self._order[batch * size : (batch + 1) * size], epoch)
        if self.ahead > 1:
            if not 0 <= batch - self._first < len(self._made):
                index = self._order[batch * size : min(batch + self.ahead, self.per_epoch) * size]
                self._made, self._first = self.images(index, epoch).split(size), batch
            chunks.images = self._made[batch - self._first]
        return chunks

    def images(self, index: Tensor, epoch: int) -> Tensor:
        """What samples are in an epoch, float32 in 0-1."""
        x = to_float(self.train.images[index])
        return x if self.augment is None else self.augment(x, index, epoch)


class Chunks(Sequence[tuple[Tensor, Tensor, Tensor]]):
    """A batch in parts of equal size, as far as that goes, made when they are asked for: images of the task, labels,
    and images for a guide, the same tensor where there are no views."""

    def __init__(self, batches: Batches, index: Tensor, epoch: int) -> None:
        chunk_size = batches.settings.chunk_size or len(index)
        self.parts = index.tensor_split(math.ceil(len(index) / chunk_size))
        self.batches, self.samples, self.epoch = batches, len(index), epoch
        self.images: Tensor | None = None  # of the one part, if they are made already

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        index, views = self.parts[i], self.batches.views
        labels = self.batches.train.labels[index]
        x = self.batches.images(index, self.epoch) if self.images is None else self.images
        x = x.contiguous(memory_format=torch.channels_last)
        if views is None:
            return x, labels, x
        return x, labels, views(x, index, self.epoch).contiguous(memory_format=torch.channels_last)


def take_step(run: TrainingRun, guide: TransferGuide | None, chunks: Chunks, lr: float) -> dict[str, Tensor]:
    """Train on one batch; returns its loss, accuracy and the guide's terms, 0-d and detached, on the device."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad()
    terms = _backward(run, guide, chunks)
    if run.scaler.is_enabled():
        scale = run.scaler.scale(torch.ones((), device=run.device))
        terms |= {name: terms[name] / scale for name in ("task_grad", "guide_grad") if name in terms}
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return terms


def _backward(run: TrainingRun, guide: TransferGuide | None, chunks: Chunks) -> dict[str, Tensor]:
    model, means = run.modules["model"], dict[str, Tensor]()

    def note(share: float, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            means[name] = means[name] + share * value if name in means else share * value

    def forward(chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[float, Tensor]:
        x, labels, _ = chunk
        share = len(x) / chunks.samples
        logits = model(x)
        _enough(logits, chunks.batches.classes)
        if torch.is_grad_enabled():  # not what only looks ahead
            note(share, {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()})
        return share, F.cross_entropy(logits, labels)

    def features(taps: Taps, chunk: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """Of the student; after `forward`, which has recorded them if the task's images are the guide's too."""
        if chunk[2] is not chunk[0]:
            taps.pop()
            with _statistics_kept(model):
                model(chunk[2])
        return taps.pop()

    if guide is not None and isinstance(guide.loss, BirdLoss) and len(chunks) > 1:
        taps, teacher = guide.taps, guide.teacher

        def student(chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            share, task = forward(chunk)
            return share * task, features(taps, chunk)

        factor: Tensor | float = 1.0  # a tensor only where there is a scale: in fp32 it would round an fp64 model's
        if run.scaler.is_enabled():
            factor = run.scaler.scale(torch.ones((), device=chunks.parts[0].device))
        with run.autocast:
            loss = chunked_backward(
                student,
                lambda chunk: teacher(chunk[2]),
                chunks,
                guide.loss,
                model=model,
                gradient=factor,
            )
        return {"loss": loss} | means | guide.loss.last

    for chunk in chunks:
        with run.autocast:
            share, loss = forward(chunk)
            if guide is None:
                loss = chunks.batches.settings.task_weight * loss
            else:
                loss = guide.loss(loss, guide.teacher(chunk[2]), features(guide.taps, chunk))
        run.scaler.scale(share * loss).backward()
        note(share, {"loss": loss.detach()} | (guide.loss.last if guide is not None else {}))
    return {"loss": means.pop("loss")} | means


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation takes this batch's statistics in training, and leaves the running ones, of the task, alone.

    With views among them students had 40 % right of clean images instead of 97: means of eight seeds (fashion/views).
    """
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    tracking = [module for module in norms if module.training and module.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def _enough(logits: Tensor, classes: int) -> None:
    """A look at shapes, which waits for no device; a GPU's cross-entropy would abort the process instead."""
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise ValueError(
            f"the model gives logits {list(logits.shape)}, but the labels go up to {classes - 1}: "
            f"[n, {classes}] or wider is needed, so build the model for {classes} classes, or renumber the labels"
        )


def placed(model: nn.Module, guide: TransferGuide | None, device: torch.device) -> nn.ModuleDict:
    """What is trained, ``model`` and the loss of a ``guide``, moved to the device in place, with the guide's teacher.

    Convolutions, like images, have channels last in memory.
    """
    modules = nn.ModuleDict({"model": model.to(device).to(memory_format=torch.channels_last)})
    if guide is not None:
        guide.teacher.to(device).to(memory_format=torch.channels_last)
        modules["guide"] = guide.loss.to(device)
    return modules
