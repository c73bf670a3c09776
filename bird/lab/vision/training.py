"""The training loop of all methods: pre-training, fine-tuning, hints and BIRD.

    history = fit(student, train, Settings(steps=1000), guide=TransferGuide(teacher, taps, loss), validate=score)

The loop synchronises with the device only where it reports, every ``log_every`` steps (except with float16, where
PyTorch's loss scaling checks the gradients in every step).
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...files import write_json
from ...losses import BirdLoss
from .checkpoints import History, Settings, TrainingRun
from .data import Images
from .freezing import train_only
from .steps import Augment, Batches, TransferGuide, learning_rate, placed, take_step

__all__ = ["Augment", "TransferGuide", "fit"]


def fit(
    model: nn.Module,
    train: Images,
    settings: Settings,
    *,
    guide: TransferGuide | None = None,
    trained: Sequence[str] | None = None,
    augment: Augment | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    label: str = "training",
    progress: bool | None = None,
) -> History:
    """Train ``model`` in place; at the end it is on the device and has the weights of the last step.

    A resumed run ends with bitwise the weights of an uninterrupted one, on the same machine
    with the same number of threads (on a GPU: as far as PyTorch's own kernels are deterministic).

    With ``settings.compile`` taps must exist before the model is compiled; those in ``guide`` do.

    Args:
        model: images ``[n, c, h, w]`` in 0-1 to logits ``[n, classes]``.
        train: the training set, which is moved to the device as a whole.
        settings: steps, learning rate, seed, batch size and others.
        guide: None to train on the task alone.
        trained: module paths or globs of the parts that are trained, ``["head"]`` for a linear probe; all else is
            frozen and stays in eval mode (`bird.lab.vision.freezing.train_only`), only in this call. None to train
            everything.
        augment: changes the images of every batch (with chunks: of every chunk, and with `BirdLoss` twice,
            both times with PyTorch's generators in the same state).
        validate: scores the model, in eval mode and without gradients, on *validation* data, never on test
            data; higher is better.
        device: any PyTorch device.
        folder: where ``last.pt`` (all that resuming needs), ``best.pt`` (the weights of the best validation), with
            `BirdLoss` ``shapes.json`` (for `bird tune --from-run`) are written. None to keep nothing.
        resume: continue from ``last.pt`` if the folder has one.
        about: plain data that tells this run from others with the same settings, such as the name of its method: a
            checkpoint that says something else is refused.
        label: the progress bar's title.
        progress: show the bar; None to show it on a terminal only.

    Raises:
        FileExistsError: the folder has a checkpoint, and ``resume`` is off.
        ValueError: the checkpoint cannot be read, or comes from other settings or data; fewer than `MIN_BATCH`
            samples; labels that the model has no logits for; an unknown layer in ``trained``, or nothing to train;
            ``settings.compile`` or views where the guide's taps measure gradients.
        FloatingPointError: the loss or the weights are not finite; ``last.pt`` is from before that.
    """
    if guide is not None and guide.views is not None and guide.taps.gradients:
        raise ValueError("gradients are of task and guidance at one output, and with views the two have their own")
    device = torch.device(device)
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(settings.seed)
    batches = Batches(train, settings, augment, device, None if guide is None else guide.views)
    modules = placed(model, guide, device)
    if settings.compile:
        if guide is not None and guide.taps.gradients:
            raise ValueError("gradients are measured in hooks, which compiled models do not call")
        torch.compiler.reset()  # else a network of the same class, compiled before, lends its graph without these taps
        model.compile()
    with train_only(model, trained) as to_train:
        run = TrainingRun(
            modules, settings, len(train), device, folder, about=about, trained=trained, to_train=to_train
        )
        done = run.restore(resume)
        to_train()
        hidden = None if progress is None else not progress
        with tqdm(total=settings.steps, initial=done, desc=label, leave=False, disable=hidden) as bar:
            _loop(run, guide, batches, done, validate, bar)
    return run.history


def keep_memory() -> None:
    """Let this process keep up to 256 MB that it frees, where the C library is glibc; elsewhere nothing happens.

    glibc returns the tensors of a step to the system as soon as they are freed, and the next step finds its memory page
    by page again: a fifth of a small network's step.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None:
        for option, size in ((-1, 2**28), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (its largest)
            adjust(option, size)


def _loop(
    run: TrainingRun,
    guide: TransferGuide | None,
    batches: Batches,
    done: int,
    validate: Callable[[nn.Module], float] | None,
    bar: Any,
) -> None:
    settings = batches.settings
    losses: list[Tensor] = []  # of each step since the last report, to find the first that is not finite
    totals: dict[str, Tensor] = {}
    clock = time.perf_counter()
    for step in range(done, settings.steps):
        lr = learning_rate(step, settings)
        terms = take_step(run, guide, batches.at(step), lr)
        if guide is not None and isinstance(guide.loss, BirdLoss):
            guide.loss.step(step + 1, settings.steps)
        losses.append(terms.pop("loss"))
        for name, value in terms.items():
            totals[name] = totals[name] + value if name in totals else value

        done = step + 1
        saving = done % settings.save_every == 0 or done == settings.steps
        if saving or done % settings.log_every == 0:
            row = run.report(done, lr, losses, totals, weights=saving)
            run.history.seconds += time.perf_counter() - clock
            losses, totals = [], {}
            bar.update(done - bar.n)
            bar.set_postfix({name: f"{row[name]:.3f}" for name in row if name not in ("step", "lr", "task")})
            if saving:
                if validate is not None:
                    run.select(done, validate)
                run.save(done)
                _note_shapes(run, guide)
            clock = time.perf_counter()


def _note_shapes(run: TrainingRun, guide: TransferGuide | None) -> None:
    """Write ``shapes.json`` beside the checkpoint: sizes and dtype of every alignment, for `bird tune --from-run`.

    Batches in chunks record no shapes.
    """
    if run.folder is None or guide is None:
        return
    if isinstance(guide.loss, BirdLoss) and guide.loss.shapes:
        write_json(sorted(guide.loss.shapes), run.folder / "shapes.json")
