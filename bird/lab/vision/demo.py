"""BIRD on real images in minutes: a teacher's robustness moves into a student that sees clean images only.

The teacher learns Fashion-MNIST's classes 0-4 under seven corruptions; the student, of another architecture
and half the width, learns classes 5-9 from clean images. From that student each method then goes on, for the
same number of steps with the same batches:

- *None*: the pre-trained student, untouched.
- *FT*: trained on, on its own task alone. (The paper's FT starts from the teacher's weights, which takes one
  architecture for both; this one shows what the additional steps do by themselves.)
- *Hints*: the task, and learned linear maps from the student's features to the teacher's (FitNets).
- *BIRD*: the task, and CKA with the teacher's features, at the paper's weights 0.1 and 0.9.
- *Ceiling*: the task, under the teacher's corruptions: what a student reaches that may see them.

Hints and BIRD guide the same two layers (the paper guides one). Scores are of the last step, on test images,
clean and under four corruptions that nobody was trained on.

Choices were made on validation images, seeds 0 and 1, among them the number of layers, judged by BIRD, and the
weight of Hints, judged by Hints under the held-out corruptions: 9 is better than 3, while 0.9, BIRD's own, does
little more than FT, and 90 does not train.

Every stage keeps its checkpoint and, once finished, its outcome: a demo that was killed at any moment goes on
with ``resume``, and ends with the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from ...files import atomic, write_json
from ...losses import BirdLoss, Hints
from ...taps import Taps
from ...teachers import Teacher
from ..stages import side_by_side
from .checkpoints import History, Settings
from .comparison import Comparison, Outcome, table, write_results
from .corruptions import Mixture
from .data import Splits, load_fashion
from .evaluation import accuracy, alignment, robustness
from .models import PlainNet, ResNet
from .pictures import picture
from .training import Augment, Guide, fit

PAIRS = (("block2", "layer2"), ("block3", "layer3"))
TEACHER_WIDTHS = {"block2": 64, "block3": 96}
STUDENT_WIDTHS = {"layer2": 24, "layer3": 48}
METHODS = ("FT", "Hints", "BIRD", "Ceiling")
BASELINE, CEILING = "None", "Ceiling"
SEEN = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "brightness", "contrast", "pixelate")
HELD_OUT = ("speckle_noise", "gaussian_blur", "spatter", "fog")  # saturate, the paper's, does nothing to grey images
TITLE = "Robustness moved from a teacher of classes 0-4 to a student of classes 5-9 (Fashion-MNIST)"


@dataclass(frozen=True)
class Plan:
    """What decides a demo's numbers, apart from the seeds: a folder holds one plan only.

    Args:
        steps: optimiser steps of every stage.
        batch_size: images per step.
        lr: learning rate of every stage, falling to 0 along a cosine.
        hints_beta: weight of Hints' distance; that of the task is 0.1, as for BIRD.
        limit_per_class: images of each class in each split at most; None for all.
        chunk_size: images in memory at a time, at most; None for whole batches.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 0.05
    hints_beta: float = 9.0
    limit_per_class: int | None = None
    chunk_size: int | None = None

    def settings(self, seed: int) -> Settings:
        """Of one stage."""
        return Settings(
            self.steps,
            self.batch_size,
            lr=self.lr,
            seed=seed,
            save_every=max(20, self.steps // 10),
            chunk_size=self.chunk_size,
        )


QUICK = Plan(steps=40, limit_per_class=40)


def _quiet(line: str) -> None:
    pass


def run(
    folder: Path,
    plan: Plan,
    seeds: int,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    jobs: int = 1,
    echo: Callable[[str], None] = _quiet,
) -> Comparison:
    """Run the demo, and leave ``results.json``, ``table.md`` and ``results.png`` in ``folder``.

    Args:
        folder: everything goes there.
        plan: how much of everything.
        seeds: how many repetitions, with seeds 0, 1, ...
        device: any PyTorch device.
        resume: go on with what ``folder`` holds. Without it, ``folder`` must not hold a demo.
        jobs: how many repetitions run at a time. More than one run in processes of their own, with this one's number
            of threads each and without progress bars; ``echo`` must then be picklable.
        echo: gets a line of text whenever there is something to say.

    Raises:
        FileExistsError: ``folder`` holds a demo, and ``resume`` is off.
        ChildProcessError: one of several processes failed; it has said why.
        ValueError: ``folder`` holds a demo of another plan; no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    plan.settings(0)  # says what is wrong with them, before anything is written or started
    _claim(folder, plan, resume)
    if jobs > 1:
        _run_ahead(folder, plan, seeds, device, jobs, echo)
    tell = _quiet if jobs > 1 else echo  # then what is left is to read the folder
    outcomes = [o for seed in range(seeds) for o in _Repetition(folder, plan, seed, device, tell).run()]
    comparison = Comparison(outcomes, BASELINE, CEILING)
    about = {"plan": asdict(plan), "seeds": seeds, "torch": torch.__version__, "device": str(device)}
    write_results(comparison, about, folder / "results.json")
    text = table(comparison)
    with atomic(folder / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    over = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    echo(f"\nThe student's accuracy on test images in %{over}:\n\n{text}\n\n{_verdict(comparison)}\n")
    try:
        picture(comparison, folder / "results.png", title=TITLE)
    except ImportError as error:
        echo(f"No picture: {error}")
    return comparison


def _verdict(comparison: Comparison) -> str:
    """Who won, in a sentence that does not depend on who should have."""
    shares = {method: 100 * fmean(comparison.recovered(method)) for method in comparison.contenders}
    best, *others = sorted(shares, key=shares.__getitem__, reverse=True)
    rest = ", ".join(f"{method} {shares[method]:.0f} %" for method in others)
    return f"On corruptions that nobody trained on, {best} recovered {shares[best]:.0f} % of the gap; {rest}."


def _claim(folder: Path, plan: Plan, resume: bool) -> None:
    """Make the folder this plan's own, or say why it cannot be."""
    path, new = folder / "plan.json", asdict(plan)
    if path.exists():
        if not resume:
            state = "a finished" if (folder / "results.json").exists() else "an unfinished"
            raise FileExistsError(f"{folder} holds {state} demo: go on with --resume, or choose another --out")
        old = json.loads(path.read_text(encoding="utf-8"))
        changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
        if changes:
            raise ValueError(f"{folder} holds another demo ({'; '.join(changes)}): choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(new, path)


def _run_ahead(
    folder: Path, plan: Plan, seeds: int, device: torch.device | str, jobs: int, echo: Callable[[str], None]
) -> None:
    """Run all repetitions in ``jobs`` processes, which leave their outcomes in ``folder``."""
    shares = [range(first, seeds, jobs) for first in range(min(jobs, seeds))]
    side_by_side(_run_share, [(folder, plan, share, device, echo) for share in shares])


def _run_share(
    folder: Path, plan: Plan, share: Sequence[int], device: torch.device | str, echo: Callable[[str], None]
) -> None:
    for seed in share:
        _Repetition(folder, plan, seed, device, echo, progress=False).run()


class _Repetition:
    """Everything that happens with one seed."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        seed: int,
        device: torch.device | str,
        echo: Callable[[str], None],
        *,
        progress: bool | None = None,
    ) -> None:
        self.folder, self.plan, self.seed = folder / f"seed{seed}", plan, seed
        self.device, self.echo, self.progress = device, echo, progress
        self.data = self._load(range(5, 10))

    def run(self) -> list[Outcome]:
        """Teacher, student, then every method from that student."""
        torch.manual_seed(self.seed)
        network, student = PlainNet(5), ResNet(5)
        self._fit("Teacher", network, self._load(range(5)), order=0, augment=Mixture(SEEN, seed=self.seed))
        teacher = Teacher(network, list(TEACHER_WIDTHS))
        history = self._fit(BASELINE, student, self.data, order=1)
        outcomes = [self._outcome(BASELINE, student, teacher, lambda: history)]
        for method in METHODS:
            copy = deepcopy(student)
            outcomes.append(self._outcome(method, copy, teacher, partial(self._transfer, method, copy, teacher)))
        return outcomes

    def _transfer(self, method: str, student: nn.Module, teacher: Teacher) -> History:
        augment = Mixture(SEEN, seed=self.seed) if method == CEILING else None
        if method not in ("Hints", "BIRD"):
            return self._fit(method, student, self.data, order=2, augment=augment)
        torch.manual_seed(self.seed)
        loss: BirdLoss | Hints = BirdLoss(pairs=PAIRS)
        if method == "Hints":
            loss = Hints(
                beta=self.plan.hints_beta,
                pairs=PAIRS,
                teacher_widths=TEACHER_WIDTHS,
                student_widths=STUDENT_WIDTHS,
            )
        with Taps(student, list(STUDENT_WIDTHS)) as taps:
            return self._fit(method, student, self.data, order=2, guide=Guide(teacher, taps, loss))

    def _fit(
        self,
        stage: str,
        model: nn.Module,
        data: Splits,
        *,
        order: int,
        augment: Augment | None = None,
        guide: Guide | None = None,
    ) -> History:
        """Train, or go on, or just load what is finished. ``order`` tells the stages' batches apart."""
        start = time.perf_counter()
        history = fit(
            model,
            data.train,
            self.plan.settings(3 * self.seed + order),
            guide=guide,
            augment=augment,
            validate=partial(accuracy, data=data.validation),
            device=self.device,
            folder=self.folder / stage.lower(),
            resume=True,
            progress=self.progress,
            label=f"seed {self.seed}: {stage}",
        )
        score, seconds = 100 * history.validation[-1]["score"], time.perf_counter() - start
        self.echo(f"seed {self.seed}  {stage:8}  validation accuracy {score:5.1f} %  ({seconds:.0f} s)")
        return history

    def _outcome(self, method: str, model: nn.Module, teacher: Teacher, train: Callable[[], History]) -> Outcome:
        """Train and score, once: the second time it is read from the folder."""
        path = self.folder / method.lower() / "outcome.json"
        if path.exists():
            return Outcome.from_json(json.loads(path.read_text()))
        history, test = train(), self.data.test
        outcome = Outcome(
            method=method,
            seed=self.seed,
            held_out=robustness(model, test, HELD_OUT),
            seen=robustness(model, test, SEEN, severities=[3]),
            cka=alignment(teacher, model, *PAIRS[-1], test),
            history=history,
        )
        write_json(asdict(outcome), path)
        return outcome

    def _load(self, classes: Sequence[int]) -> Splits:
        return load_fashion(classes, seed=self.seed, limit_per_class=self.plan.limit_per_class)
