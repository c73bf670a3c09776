"""What runs of transformers' trainers share here: whose folder it is, where they go on, what they show."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from ...files import write_json
from ..stages import require_same
from .recipe import Training

if TYPE_CHECKING:
    from ...language.guidance import Guidance


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
        "save_total_limit": 1,
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
    networks = ("teacher", "tokenizer", "text")
    choices = None if guidance is None else {k: str(v) for k, v in vars(guidance).items() if k not in networks}
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    run = settings | {"data": digest, "guidance": choices}
    path = folder / "run.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        require_same(old, run, f"{folder} is of another run", "choose another folder")
    write_json(run, path)


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
    """The latest whole one; the trainer writes ``trainer_state.json`` last, so one without it is of a killed run."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return str(max(whole)[1]) if whole else None


def forget_checkpoints(folder: Path) -> None:
    """Of a run that is complete."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


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

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()
