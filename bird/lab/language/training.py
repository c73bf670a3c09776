"""What runs of transformers' trainers share here: whose folder it is, where they go on, what they show."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from ...files import atomic
from ..stages import require_same
from ..tensors import file_checksum, read_checked, write_checked
from .recipe import Training

if TYPE_CHECKING:
    from ...language.guidance import Guidance


NETWORKS = "teacher", "tokenizer", "text"  # of a guidance: what is no plain data
MARK = "whole.json"  # in a checkpoint that is
ADVICE = "delete its folder, and it is trained again"
CHECKPOINT = re.compile("checkpoint-([0-9]+)")


def arguments(
    training: Training, folder: Path, seed: int, device: torch.device, save_every: int | None
) -> dict[str, Any]:
    """What every run's `transformers.TrainingArguments` say; kinds of trainers add their own.

    Nothing is reported anywhere, each step is logged, and a loss that is not finite is not hidden.
    """
    micro = training.micro_batch or training.batch_size
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": training.batch_size // micro,
        "num_train_epochs": training.epochs,
        "learning_rate": training.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": training.warmup,  # a share of the steps while it is below 1
        "bf16": training.bf16,
        "seed": seed,
        "use_cpu": device.type == "cpu",
        "save_strategy": "epoch" if save_every is None else "steps",
        "save_steps": save_every or 500,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Without the bars of datasets, transformers and TRL, unless progress is shown."""
    if progress:
        yield
        return
    import datasets
    from transformers.utils import logging

    ours, theirs = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    disabled = os.environ.get("TQDM_DISABLE")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"  # which TRL asks
    try:
        yield
    finally:
        if disabled is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = disabled
        if not ours:
            datasets.enable_progress_bars()
        if theirs:
            logging.enable_progress_bar()


def claim(folder: Path, data: Any, guidance: Guidance | None, **settings: Any) -> None:
    """Write down whose folder it is, as far as that is plain data: the networks are for the caller to keep apart.

    Raises:
        ValueError: it is another run's: what changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    choices = None if guidance is None else {k: str(v) for k, v in vars(guidance).items() if k not in NETWORKS}
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    run = settings | {"data": digest, "guidance": choices}
    path = folder / "run.json"
    if path.exists():
        old = read_checked(path, f"delete the folder {folder} to start over, or choose another")
        require_same(_completed(old, guidance), run, f"{folder} is of another run", "choose another folder")
    write_checked(run, path)


def _completed(old: dict[str, Any], guidance: Guidance | None) -> dict[str, Any]:
    """What an earlier version wrote, with the defaults of what could not be set then."""
    found = dict(old)
    if isinstance(old.get("training"), dict):
        found["training"] = asdict(Training()) | old["training"]
    if isinstance(old.get("guidance"), dict) and guidance is not None:
        defaults = {f.name: str(f.default) for f in fields(guidance) if f.default is not MISSING}
        defaults = {name: value for name, value in defaults.items() if name not in NETWORKS}
        found["guidance"] = defaults | old["guidance"]
    return found


def finished(model: nn.Module, weights: Path, device: torch.device | str) -> dict[str, Any] | None:
    """The history of a run that is complete, whose weights are then loaded into the model; None of any other.

    Raises:
        ValueError: the history or the weights are damaged; what to do.
    """
    path = weights.with_name("history.json")
    if not path.exists():
        return None
    history = read_checked(path, ADVICE)
    history.pop("weights", None)
    restore(model, weights)
    nn.Module.to(model, device)
    return history


def finish(model: nn.Module, weights: Path, history: dict[str, Any]) -> None:
    """Write the weights of a trained model and, when they are on the disk, ``history.json`` with their checksum.

    The model is in eval mode then, and its checkpoints are deleted.
    """
    with atomic(weights) as partial:
        save_model(model, str(partial))
    model.eval()
    write_checked(history | {"weights": file_checksum(weights)}, weights.with_name("history.json"))
    forget_checkpoints(weights.parent)


def restore(model: nn.Module, weights: Path) -> None:
    """Load what `finish` wrote into a model of the same architecture, which is in eval mode then. No code is run.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not the file that was written, or of another architecture; what to do.
    """
    history = weights.with_name("history.json")
    said = read_checked(history, ADVICE).get("weights") if history.exists() else None
    if said is not None and file_checksum(weights) != said:
        raise ValueError(f"{weights} is damaged (its checksum is of other contents): {ADVICE}")
    try:
        load_model(model, str(weights))
    except OSError:
        raise
    except Exception as error:  # a damaged header fails in any way
        raise ValueError(f"{weights} is damaged, or of another architecture ({error}): {ADVICE}") from error
    model.eval()


def trained(trainer: Any, folder: Path, progress: bool) -> list[dict[str, Any]]:
    """Run a trainer from where its folder stands; what it logged of every step.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    watch = Watch(progress)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        watch.close()
    return [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history if "loss" in row]


def last_checkpoint(folder: Path) -> str | None:
    """The latest whole one: with the mark that is set when all else of it is on the disk. None is deleted here.

    Raises:
        OSError: one cannot be read, now; nothing is lost.
        ValueError: one has lost files since it was whole.
    """
    for _, path in reversed(_checkpoints(folder)):
        mark = path / MARK
        if not mark.exists():
            continue  # of a killed run; the trainer writes it anew when it is there again
        kept = read_checked(mark, f"delete the folder {path}")
        for name, size in kept["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise ValueError(f"{path} is no longer whole ({name} is not the file of {size} bytes): delete {path}")
        return str(path)
    return None


def mark_whole(checkpoint: Path) -> None:
    """Bring a checkpoint to the disk, and then its mark."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_checked({"files": sizes}, checkpoint / MARK)


def forget_checkpoints(folder: Path, before: int | None = None) -> None:
    """Of a run that is complete, or those of fewer than so many steps; folders of other names are somebody else's."""
    for step, path in _checkpoints(folder):
        if before is None or step < before:
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders as transformers' trainer names them, in the order of the steps."""
    named = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(name[1]), path) for name, path in named if name and path.is_dir() and not path.is_symlink())


class Watch(TrainerCallback):
    """A bar, and an end to a run whose loss is not finite."""

    def __init__(self, progress: bool) -> None:
        self.bar: Any = tqdm(desc="training", unit="step", leave=False, disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar's length, and where a resumed run stands."""
        self.bar.total, self.bar.n = state.max_steps, state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """One step on.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = more["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {state.global_step}; a lower lr may help")
        self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint is whole, and those before it can go."""
        folder = Path(args.output_dir)
        mark_whole(folder / f"checkpoint-{state.global_step}")
        forget_checkpoints(folder, before=state.global_step)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
