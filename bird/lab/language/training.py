"""What both kinds of training share: arguments of transformers' trainers, a run's folder, checkpoints, weights.

A run writes its weights to its folder and, at the very end, ``history.json``. A call with the same folder and initial
model resumes from the last complete checkpoint; a finished run is only read. Nothing is unpickled: weights are
safetensors, the trainer's state is JSON, and for the states of optimizer, schedule and generators transformers calls
``torch.load`` with ``weights_only=True``. (Checkpoints also hold a ``training_args.bin``, a pickle that nobody reads;
they are deleted when the run is finished.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


NETWORKS = "teacher", "tokenizer", "text"  # the fields of a guidance that are not plain data
MARK = "whole.json"  # the file that marks a checkpoint as complete
ADVICE = "delete its folder, and it is trained again"
CHECKPOINT = re.compile("checkpoint-([0-9]+)")


def arguments(
    kind: Callable[..., Any],
    training: Training,
    folder: Path,
    *,
    seed: int,
    device: torch.device | str,
    save_every: int | None,
    **more: Any,
) -> Any:
    """The arguments of a trainer.

    Nothing is reported anywhere, each step is logged, and a loss that is not finite is not hidden.

    Args:
        kind: `transformers.TrainingArguments`, or TRL's for a trainer of its own.
        training, folder, seed, device, save_every: as of the functions that train.
        more: arguments that are particular to the trainer.

    Raises:
        ValueError: there are several processes, or several GPUs, whose batches transformers would put together.
    """
    micro = training.micro_batch or training.batch_size
    made = kind(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // micro,
        num_train_epochs=training.epochs,
        learning_rate=training.lr,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup,  # a share of the steps while it is below 1
        bf16=training.bf16,
        seed=seed,
        use_cpu=torch.device(device).type == "cpu",
        save_strategy="epoch" if save_every is None else "steps",
        save_steps=save_every or 500,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        **more,
    )
    if made.world_size > 1 or made.n_gpu > 1:
        raise ValueError("a run takes one process and one GPU: show it one only (CUDA_VISIBLE_DEVICES)")
    return made


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """A context in which datasets, transformers and TRL show no progress bars, unless ``progress`` is true."""
    import datasets
    from transformers.utils import logging

    with ExitStack() as restored:
        if not progress:
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                restored.callback(datasets.enable_progress_bars)
            if logging.is_progress_bar_enabled():
                logging.disable_progress_bar()
                restored.callback(logging.enable_progress_bar)
            if "TQDM_DISABLE" not in os.environ:
                os.environ["TQDM_DISABLE"] = "1"  # which TRL asks
                restored.callback(os.environ.pop, "TQDM_DISABLE")
        yield


def claim(folder: Path, data: Any, guidance: Guidance | None, **settings: Any) -> None:
    """Write a run's settings and a digest of its data into its folder, or compare them with what is there.

    The networks are not compared: the name of the folder must tell them apart, as a stage's does.

    Raises:
        ValueError: the folder is another run's; the error says what differs.
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
    """The settings that an earlier version wrote, with defaults for those that it did not have."""
    found = dict(old)
    if isinstance(old.get("training"), dict):
        found["training"] = asdict(Training()) | old["training"]
    if isinstance(old.get("guidance"), dict) and guidance is not None:
        defaults = {f.name: str(f.default) for f in fields(guidance) if f.default is not MISSING}
        defaults = {name: value for name, value in defaults.items() if name not in NETWORKS}
        found["guidance"] = defaults | old["guidance"]
    return found


def finished_run(model: nn.Module, weights: Path, device: torch.device | str) -> dict[str, Any] | None:
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


def finish_run(model: nn.Module, weights: Path, history: dict[str, Any]) -> None:
    """Write the weights of a trained model and, when they are on the disk, ``history.json`` with their checksum.

    The model is in eval mode then, and its checkpoints are deleted.
    """
    with atomic(weights) as partial:
        save_model(model, str(partial))
    model.eval()
    write_checked(history | {"weights": file_checksum(weights)}, weights.with_name("history.json"))
    forget_checkpoints(weights.parent)


def restore(model: nn.Module, weights: Path) -> None:
    """Load what `finish_run` wrote into a model of the same architecture, which is in eval mode then. No code is run.

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
    """Train from the last checkpoint in the folder, or from the start; returns what was logged at each step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    watch = Watch(progress)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    finally:
        watch.bar.close()
    return [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history if "loss" in row]


def last_checkpoint(folder: Path) -> str | None:
    """The path of the latest complete checkpoint, None if there is none; nothing is deleted.

    A checkpoint is complete if it has the mark, which is written when all of its files are on the disk.

    Raises:
        OSError: a mark cannot be read at the moment.
        ValueError: a complete checkpoint has lost a file since.
    """
    for _, path in reversed(_checkpoints(folder)):
        mark = path / MARK
        if not mark.exists():
            continue  # left by a killed run; the trainer overwrites it at that step
        files = read_checked(mark, advice := f"delete the folder {path}").get("files")
        if not files or not isinstance(files, dict):
            raise ValueError(f"{mark} is damaged (it lists no files): {advice}")
        for name, size in files.items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise ValueError(f"{path} is no longer whole ({name} is not the file of {size} bytes): delete {path}")
        return str(path)
    return None


def mark_whole(checkpoint: Path) -> None:
    """Wait until a checkpoint's files are on the disk, then write its mark."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_checked({"files": sizes}, checkpoint / MARK)


def forget_checkpoints(folder: Path, before: int | None = None) -> None:
    """Delete a run's checkpoints, or those before a step: whatever has the mark, and empty folders.

    Files without the mark may be somebody else's and stay; the trainer overwrites its own half checkpoint at that step.
    """
    for step, path in _checkpoints(folder):
        if (before is None or step < before) and ((path / MARK).exists() or not any(path.iterdir())):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The steps and folders of checkpoints, which have the names of transformers' trainer, by rising step."""
    named = [(CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*")]
    return sorted((int(name[1]), path) for name, path in named if name and path.is_dir() and not path.is_symlink())


class Watch(TrainerCallback):
    """A callback that shows a bar, stops a run whose loss is not finite, and marks checkpoints as complete."""

    def __init__(self, progress: bool) -> None:
        self.bar: Any = tqdm(desc="training", unit="step", leave=False, disable=not progress)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the bar's length, and the step at which a resumed run begins."""
        self.bar.total, self.bar.n = state.max_steps, state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Move the bar to the step that was logged.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = more["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {state.global_step}; a lower lr may help")
        self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the new checkpoint as complete, and delete those before it."""
        folder = Path(args.output_dir)
        mark_whole(folder / f"checkpoint-{state.global_step}")
        forget_checkpoints(folder, before=state.global_step)
