"""What a training run consists of beside the loop itself, and how it is kept: settings, history, checkpoints.

A file is either whole or not there (it is written beside its place and renamed), and loading runs no code
from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# A shorter last batch is left out of its epoch: unbiased CKA needs four rows, biased CKA two, batch
# normalisation more than one value. All methods leave out the same batches, and every epoch has another
# order.
MIN_BATCH = 4


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it becomes ``path`` in one step if all goes well."""
    partial = path.with_name(f".partial.{path.name}")
    yield partial
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(data: Any, path: Path) -> None:
    """Write plain data as JSON, atomically."""
    with atomic(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def save(state: dict[str, Any], path: Path) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts to ``path``, atomically."""
    with atomic(path) as partial:
        torch.save(state, partial)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults are the paper's for the transfer.

    Args:
        steps: optimiser steps in all.
        batch_size: images per step; the last batch of an epoch may be smaller, down to `MIN_BATCH`.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate of the first step; falls to ``final_lr`` along half a cosine, step by step.
        final_lr: where it ends.
        momentum: of SGD; AdamW keeps PyTorch's betas.
        weight_decay: L2 for SGD, decoupled for AdamW.
        amp: None for full precision; ``"bfloat16"``, or ``"float16"`` with loss scaling, for autocast.
        seed: decides the order of the data; PyTorch's global generators (dropout) start from it too.
        log_every: steps between two looks at loss, accuracy and CKA.
        save_every: steps between two validations and checkpoints.
        chunk_size: images in memory at a time, at most, for batches that do not fit: the batch's gradient from parts of
            equal size (`bird.chunks`), of which batch normalisation sees one at a time. None for whole batches.
    """

    steps: int
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.005
    final_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    amp: str | None = None
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f'optimizer must be "sgd" or "adamw", not {self.optimizer!r}')
        if self.amp not in (None, "bfloat16", "float16"):
            raise ValueError(f'amp must be None, "bfloat16" or "float16", not {self.amp!r}')
        for name, least in (
            ("steps", 1),
            ("log_every", 1),
            ("save_every", 1),
            ("batch_size", MIN_BATCH),
            ("chunk_size", MIN_BATCH),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass
class History:
    """What happened, in plain numbers that go into JSON and checkpoints as they are.

    Attributes:
        train: a row per report: step, lr, and the means since the last report of loss, accuracy and the
            guide's terms.
        validation: a row per validation: step and score.
        best_step: the step of the best score, the earlier of two equal ones; None without validation.
        best_score: that score.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_score: float | None = None


class Run:
    """The state of a training run: everything, beside its position, that decides what the next step does.

    Args:
        modules: ``model``, and ``guide`` if its loss has parameters of its own.
        settings: of the run; kept in the checkpoint, so that another run's is not taken for it.
        samples: size of the training set; kept for the same reason.
        device: where the modules are.
        folder: where ``last.pt`` and ``best.pt`` go; None to keep nothing.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        settings: Settings,
        samples: int,
        device: torch.device,
        folder: Path | None,
    ) -> None:
        self.modules, self.folder = modules, folder
        self.history = History()
        self.optimizer = _optimizer([p for p in modules.parameters() if p.requires_grad], settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self._identity = asdict(settings) | {"samples": samples}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int) -> None:
        """Write ``last.pt``."""
        if self.folder is None:
            return
        state = {
            "identity": self._identity,
            "step": step,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": asdict(self.history),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        save(state, self.folder / "last.pt")

    def restore(self, resume: bool) -> int:
        """Load ``last.pt`` if there is one, and return the number of steps that it has behind it."""
        path = self.folder and self.folder / "last.pt"
        if path is None or not path.exists():
            return 0
        if not resume:
            raise FileExistsError(f"{path} holds an earlier run: pass resume=True, or choose another folder")
        state = load(path)
        old, new = state["identity"], self._identity
        changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
        if changes:
            raise ValueError(f"{path} comes from another run ({'; '.join(changes)}): choose another folder")
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return state["step"]

    def report(self, step: int, lr: float, totals: dict[str, Tensor]) -> dict[str, float]:
        """Add a row of means to the history. The one place where a run waits for its device."""
        since = self.history.train[-1]["step"] if self.history.train else 0
        sums = torch.stack([total.float() for total in totals.values()]).tolist()
        row = {"step": step, "lr": lr} | {n: s / (step - since) for n, s in zip(totals, sums, strict=True)}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"the loss is {row['loss']} by step {step}; a lower lr may help")
        self.history.train.append(row)
        return row

    def select(self, step: int, validate: Callable[[nn.Module], float]) -> float:
        """Score the model; write ``best.pt`` if it was never better."""
        model = self.modules["model"]
        model.eval()
        with torch.no_grad():
            score = validate(model)
        model.train()
        history = self.history
        history.validation.append({"step": step, "score": score})
        if history.best_score is None or score > history.best_score:
            history.best_step, history.best_score = step, score
            if self.folder is not None:
                save({"step": step, "score": score, "model": model.state_dict()}, self.folder / "best.pt")
        return score


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
