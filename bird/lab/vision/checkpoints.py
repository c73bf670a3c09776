"""What a training run consists of beside the loop itself, and how it is kept: settings, history, checkpoints.

A file is either whole or not there (it is written beside its place and renamed), and loading runs no code
from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import PARTIAL
from ..recipe import require_within
from ..stages import require_same
from ..tensors import FORMAT, UNREADABLE, load_tensors, require_format, save_tensors

# A shorter last batch is left out of its epoch: unbiased CKA needs four rows, biased CKA two, batch normalisation more
# than one value. All methods leave out the same batches, and every epoch has another order.
MIN_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How an optimizer goes about it. The defaults are the paper's for the transfer.

    Args:
        batch_size: images per step; the last batch of an epoch may be smaller, down to `MIN_BATCH`.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate of the first step; falls to ``final_lr`` along half a cosine, step by step.
        final_lr: where it ends.
        momentum: of SGD; AdamW keeps PyTorch's betas.
        weight_decay: L2 for SGD, decoupled for AdamW.
        amp: None for full precision; ``"bfloat16"``, or ``"float16"`` with loss scaling, for autocast.
        chunk_size: images in memory at a time, at most, for batches that do not fit: the batch's gradient from parts of
            equal size (`bird.chunks`), of which batch normalisation sees one at a time. None for whole batches.
    """

    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.005
    final_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    amp: str | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f'optimizer must be "sgd" or "adamw", not {self.optimizer!r}')
        if self.amp not in (None, "bfloat16", "float16"):
            raise ValueError(f'amp must be None, "bfloat16" or "float16", not {self.amp!r}')
        require_within(self, batch_size=MIN_BATCH, chunk_size=MIN_BATCH, lr=0, final_lr=0, momentum=0, weight_decay=0)


@dataclass(frozen=True, kw_only=True)
class Settings(Optimisation):
    """How `bird.lab.vision.training.fit` trains.

    Args:
        steps: optimiser steps in all.
        seed: decides the order of the data; PyTorch's global generators (dropout) start from it too.
        log_every: steps between two looks at loss, accuracy and CKA.
        save_every: steps between two validations and checkpoints.
        task_weight: of the task's loss where nothing guides.
        compile: call the model compiled (``model.compile()``, which it stays): worth its minute in long runs; rounds
            otherwise, and its dropout draws other numbers.
    """

    steps: int
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    task_weight: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, steps=1, log_every=1, save_every=1, task_weight=0)


@dataclass
class History:
    """What happened, in plain numbers that go into JSON and checkpoints as they are.

    Attributes:
        train: a row per report: step, lr, and the means since the last report of loss, accuracy and the
            guide's terms.
        validation: a row per validation: step and score.
        best_step: the step of the best score, the earlier of two equal ones; None without validation.
        best_score: that score.
        seconds: that the steps took, without validation and checkpoints. Not a field: equal runs are equal, and are
            written to the same bytes, however long they took.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_score: float | None = None

    def __post_init__(self) -> None:
        self.seconds = 0.0

    @property
    def steps_per_second(self) -> float | None:
        """Mean over the run, interruptions left out; None before the first report."""
        return self.train[-1]["step"] / self.seconds if self.train and self.seconds else None


# What a last.pt holds at least.
_PARTS = {"identity", "step", "modules", "optimizer", "scaler", "history", "rng", "cuda_rng"}


class TrainingRun:
    """The state of a training run: everything, beside its position, that decides what the next step does.

    Args:
        modules: ``model``, and ``guide`` if its loss has parameters of its own.
        settings: of the run; kept in the checkpoint, so that another run's is not taken for it.
        samples: size of the training set; kept for the same reason.
        device: where the modules are.
        folder: where ``last.pt`` and ``best.pt`` go; None to keep nothing.
        about: plain data that tells the run from others of the same settings; kept for the same reason.
        trained: paths of the parts that are trained, kept for the same reason; None for everything.
        to_train: puts the model in training mode, or those parts; None for ``model.train``.

    Raises:
        ValueError: no parameter requires gradients.
    """

    def __init__(
        self,
        modules: nn.ModuleDict,
        settings: Settings,
        samples: int,
        device: torch.device,
        folder: Path | None,
        *,
        about: Mapping[str, Any] | None = None,
        trained: Sequence[str] | None = None,
        to_train: Callable[[], object] | None = None,
    ) -> None:
        self.modules, self.folder, self.device = modules, folder, device
        self.to_train = to_train or modules["model"].train
        self.history = History()
        parameters = [p for p in modules.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("nothing to train: no parameter of the model requires gradients")
        self.optimizer = _optimizer(parameters, settings)
        precision = torch.float32 if settings.amp is None else getattr(torch, settings.amp)
        self.autocast = torch.autocast(device.type, dtype=precision, enabled=settings.amp is not None)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "float16")
        self._identity = asdict(settings) | {"samples": samples, "trained": None if trained is None else [*trained]}
        self._identity |= {"about": json.loads(json.dumps(about or {}, sort_keys=True))}
        self._saved: int | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("last.pt", "best.pt", "shapes.json"):  # of a run that was killed while it wrote
                for left in folder.glob(f"{PARTIAL}*.{name}"):
                    left.unlink(missing_ok=True)

    def save(self, step: int) -> None:
        """Write ``last.pt``."""
        self._saved = step
        if self.folder is None:
            return
        state = {
            "format": FORMAT,
            "identity": self._identity,
            "step": step,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": asdict(self.history),
            "seconds": self.history.seconds,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        save_tensors(state, self.folder / "last.pt")

    def restore(self, resume: bool) -> int:
        """Load ``last.pt`` if there is one, and return the number of steps that it has behind it."""
        path = self.folder and self.folder / "last.pt"
        if path is None or not path.exists():
            return 0
        if not resume:
            raise FileExistsError(f"{path} holds an earlier run: pass resume=True, or choose another folder")
        state = load_tensors(path)
        require_format(state, path)
        if not state.keys() >= _PARTS:
            raise ValueError(UNREADABLE.format(path))
        old = self._before() | state["identity"]
        old.pop("channels_last", None)  # could be set once, and decides no more than how images lie in memory
        require_same(old, self._identity, f"{path} comes from another run", "choose another folder")
        known = {f.name for f in fields(History)}
        if unknown := sorted(state["history"].keys() - known):
            raise ValueError(
                f"{path} has a history of another version of bird-kernels, with {', '.join(unknown)}: "
                "update, or choose another folder"
            )
        try:
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} comes from another model: choose another folder ({error})") from error
        self.scaler.load_state_dict(state["scaler"])
        self.history = History(**state["history"])
        self.history.seconds = state.get("seconds", 0.0)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self._saved = state["step"]
        return state["step"]

    def _before(self) -> dict[str, Any]:
        """What a checkpoint of an earlier version does not say: a setting that there was not had its default."""
        defaults = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}
        return defaults | {"about": self._identity["about"]}

    def report(
        self, step: int, lr: float, losses: list[Tensor], totals: dict[str, Tensor], *, weights: bool
    ) -> dict[str, float]:
        """Add a row of means to the history. The one place where a run waits for its device.

        Args:
            step: how many steps are done.
            lr: of the last one.
            losses: of each step since the last report, 0-d.
            totals: sums over the same steps, 0-d.
            weights: look at the weights too, as it must be done before they are kept.

        Raises:
            FloatingPointError: a loss, or the weights, are not finite.
        """
        looks = [*losses, *totals.values(), *([self._finite()] if weights else [])]
        numbers = torch.stack([look.float() for look in looks]).tolist()
        count = len(losses)
        for done, loss in enumerate(numbers[:count], start=step - count + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} at step {done}; {self._advice()}")
        if weights and numbers[-1] < 1:
            raise FloatingPointError(f"the weights became NaN or infinite by step {step}; {self._advice()}")
        row = {"step": step, "lr": lr, "loss": sum(numbers[:count]) / count}
        row |= {name: total / count for name, total in zip(totals, numbers[count:], strict=False)}
        self.history.train.append(row)
        return row

    def _finite(self) -> Tensor:
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return torch.stack([parameter.detach().isfinite().all() for parameter in trained]).all()

    def _advice(self) -> str:
        kept = "" if self._saved is None else f", and {self.folder}/last.pt is as it was after step {self._saved}"
        return f"a lower lr may help{kept}"

    def select(self, step: int, validate: Callable[[nn.Module], float]) -> None:
        """Score the model; write ``best.pt`` if it was never better."""
        model = self.modules["model"]
        model.eval()
        with torch.no_grad():
            score = validate(model)
        self.to_train()
        history = self.history
        history.validation.append({"step": step, "score": score})
        if history.best_score is None or score > history.best_score:
            history.best_step, history.best_score = step, score
            if self.folder is not None:
                save_tensors(
                    {"format": FORMAT, "step": step, "score": score, "model": model.state_dict()},
                    self.folder / "best.pt",
                )


def _optimizer(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
