"""The methods that are compared, by name: whose weights each starts from, what it trains, and which loss guides it.

======================= ======= ============ ====================================================================
name                    start   batch norm   what happens with the transfer's steps
======================= ======= ============ ====================================================================
``none``                student              nothing: the pre-trained student without further steps
``continued``           student learns       its own task: the effect of more steps alone (a control, not in the paper)
``continued-alpha``     student learns       the same at the weight that guided methods give the task, alpha: with SGD a
                                             tenth of it is a tenth of the learning rate (a control)
``lp``                  teacher frozen       a new head is trained, the frozen body stays in eval mode (linear probe)
``ft``                  teacher learns       a new head, and everything is trained (fine-tuning)
``lp-ft``               teacher frozen, then ``lp`` for the first half, ``ft`` for the second (Kumar et al. 2022)
                                learns
``hints``               student learns       the task, and learned linear maps to the teacher's layer (Romero et al.
                                             2015)
``lwf``                 teacher frozen, then ``lp`` for the first half; then all is trained, and the penultimate
                                learns       features stay near the teacher's (Shafahi et al. 2019)
``bird``                student learns       the task, and CKA with the teacher's layer, biased as published
``bird-unbiased``       student learns       the same with the unbiased estimator
``bird-rbf``            student learns       the same with Gaussian kernels, sigma from the median
``bird-rbf-unbiased``   student learns       both
``bird-permuted``       student learns       BIRD, but every image is given the teacher's features of another: is it the
                                             teacher at all? (a control)
``ceiling``             student learns       the task, with the teacher's corruptions as augmentation: an upper bound
                                             for methods without them
======================= ======= ============ ====================================================================

All have the same number of steps, batches and learning rates; two halves have a cosine schedule each. Methods that
start from the teacher have the teacher's architecture. Batch normalisation that "learns" is in train mode: its weights
are trained, batches are normalised by their own statistics, and running statistics are updated; "frozen" is in eval
mode with the teacher's statistics, like a guiding teacher. No checkpoint is selected: the last step is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...losses import BirdLoss, Hints, LwF
from ...taps import Taps
from ...teachers import Teacher
from .checkpoints import History, Settings
from .data import Images, to_float
from .models import MODELS, replace_head
from .profiling import StepTimes, step_times
from .training import Augment, TransferGuide, fit

GuidanceLoss = Literal["bird", "hints", "lwf"]


@dataclass(frozen=True)
class Method:
    """One of `METHODS`.

    Args:
        title: its display name in tables and figures.
        start: whose weights it starts from.
        phases: equal shares of the steps, each (whether only the head is trained, guidance or None).
        options: of `BirdLoss`.
        corrupted: whether it is trained with the teacher's corruptions.
        weighted: whether the task has the weight alpha of BIRD though nothing guides.
        permuted: whether the teacher's features of a batch are those of other images of it.
    """

    title: str
    start: Literal["student", "teacher"] = "student"
    phases: tuple[tuple[bool, GuidanceLoss | None], ...] = ((False, None),)
    options: Mapping[str, Any] = field(default_factory=dict)
    corrupted: bool = False
    weighted: bool = False
    permuted: bool = False


# alpha and beta of Hints, chosen on validation images of a fifth of Fashion-MNIST, under the held-out corruptions: with
# the published weights of BIRD the hints have little effect, and with 0.1 and 90 training fails.
HINTS = 0.1, 9.0
ALPHA = 0.1  # of BIRD, as published and as of `BirdLoss`
_BIRD: tuple[tuple[bool, GuidanceLoss | None], ...] = ((False, "bird"),)
METHODS = {
    "none": Method("None", phases=()),
    "continued": Method("Continued"),
    "continued-alpha": Method("Continued, alpha", weighted=True),
    "lp": Method("LP", "teacher", ((True, None),)),
    "ft": Method("FT", "teacher"),
    "lp-ft": Method("LP-FT", "teacher", ((True, None), (False, None))),
    "hints": Method("Hints", phases=((False, "hints"),)),
    "lwf": Method("LwF", "teacher", ((True, None), (False, "lwf"))),
    "bird": Method("BIRD", phases=_BIRD),
    "bird-unbiased": Method("BIRD, unbiased", phases=_BIRD, options={"estimator": "unbiased"}),
    "bird-rbf": Method("BIRD, RBF", phases=_BIRD, options={"kernel": "rbf"}),
    "bird-rbf-unbiased": Method(
        "BIRD, RBF, unbiased", phases=_BIRD, options={"kernel": "rbf", "estimator": "unbiased"}
    ),
    "bird-permuted": Method("BIRD, permuted teacher", phases=_BIRD, permuted=True),
    "ceiling": Method("Ceiling", corrupted=True),
}


class Transferred(NamedTuple):
    """A trained network, the history of each phase, and the times of a step (None without guidance)."""

    model: nn.Module
    histories: list[History]
    times: StepTimes | None


@dataclass(frozen=True)
class Transfer:
    """What all methods have in common; other arguments are those of `bird.lab.vision.training.fit`.

    Args:
        networks: of the teacher and of the student, keys of `bird.lab.vision.models.MODELS`.
        pairs: (guiding layer, guided layer), one or more.
        settings: of all phases together.
        classes: the number of classes of the student's task.
        weights: ``alpha`` and ``beta`` of BIRD, if they are not the published ones, and of Hints, if not `HINTS`.
        guidance: other options of `BirdLoss`; and ``gradients``, of `Taps`, which ``share`` implies.
        views: images for the guidance term of BIRD and Hints; None: those of the task.
        folder: a folder for each phase is created in it; None: nothing is kept.
    """

    networks: tuple[str, str]
    pairs: Sequence[tuple[str, str]]
    settings: Settings
    classes: int
    weights: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, Any] = field(default_factory=dict)
    views: Augment | None = None
    augment: Augment | None = None
    validate: Callable[[nn.Module], float] | None = None
    device: torch.device | str = "cpu"
    folder: Path | None = None
    progress: bool | None = None

    def run(self, method: str, teacher: nn.Module | None, student: nn.Module | None, train: Images) -> Transferred:
        """Train by a method; ``teacher`` and ``student`` are not changed.

        Args:
            method: a key of `METHODS`.
            teacher: may be None if the method neither starts from it nor is guided by it.
            student: may be None if the method starts from the teacher.
            train: the student's training images.

        Raises:
            ValueError: a network that the method needs is missing; also whatever `fit` raises.
        """
        known = METHODS[method]
        start = teacher if known.start == "teacher" else student
        if start is None:
            raise ValueError(f"{known.title} starts from a {known.start}: give one")
        model = deepcopy(start).requires_grad_(True)
        network = self.networks[known.start == "student"]
        torch.manual_seed(self.settings.seed)
        if known.start == "teacher":
            replace_head(model, network, self.classes)
        histories, times = [], None
        for number, (head_alone, guidance) in enumerate(known.phases):
            steps = len(range(number, self.settings.steps, len(known.phases)))  # the first may have one more
            guide = None if guidance is None else self._guide(guidance, known, teacher, model, train)
            history = fit(
                model,
                train,
                replace(self.settings, steps=steps, task_weight=self._task_weight(known)),
                guide=guide,
                trained=[MODELS[network].head] if head_alone else None,
                augment=self.augment,
                validate=self.validate,
                device=self.device,
                folder=None if self.folder is None else self.folder / f"phase{number + 1}",
                resume=True,
                about={"method": method, "phase": number + 1, "pairs": self.pairs, "weights": dict(self.weights)}
                | ({} if self.views is None else {"views": "statistics apart"})
                | ({"guidance": dict(self.guidance)} if self.guidance and guidance == "bird" else {}),
                label=f"{known.title}, seed {self.settings.seed}",
                progress=self.progress,
            )
            histories.append(history)
            if guide is not None:
                times = step_times(model, train, self.settings, guide, augment=self.augment, device=self.device)
                guide.taps.remove()
        return Transferred(model, histories, times)

    def _task_weight(self, known: Method) -> float:
        return float(self.weights.get("alpha", ALPHA)) if known.weighted else 1.0

    def _guide(
        self, guidance: GuidanceLoss, known: Method, teacher: nn.Module | None, model: nn.Module, train: Images
    ) -> TransferGuide:
        if teacher is None:
            raise ValueError(f"{known.title} is guided by a teacher: give one")
        pairs, (network, _) = self.pairs, self.networks
        if guidance == "lwf":
            pairs = [(MODELS[network].guide, MODELS[network].guide)]
        guiding, guided = ([*dict.fromkeys(side)] for side in zip(*pairs, strict=True))
        loss: BirdLoss | Hints | LwF
        if guidance == "bird":
            options = {name: value for name, value in self.guidance.items() if name != "gradients"}
            loss = BirdLoss(pairs=pairs, **known.options, **self.weights, **options)
        elif guidance == "hints":
            theirs, ours = _widths(teacher, guiding, train), _widths(model, guided, train)
            alpha, beta = (self.weights.get(name, own) for name, own in zip(("alpha", "beta"), HINTS, strict=True))
            loss = Hints(alpha, beta, pairs, teacher_widths=theirs, student_widths=ours)
        else:
            loss = LwF(pairs=pairs)
        views = None if guidance == "lwf" else self.views
        measured = guidance == "bird" and bool(self.guidance.get("gradients") or self.guidance.get("share"))
        kind = PermutedTeacher if known.permuted else Teacher
        return TransferGuide(kind(deepcopy(teacher), guiding), Taps(model, guided, gradients=measured), loss, views)


class PermutedTeacher(Teacher):
    """Gives each image of a batch the features of the one before it; batches come in random orders."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """By layer, [n, features]: the same rows as of the `Teacher`, none in its own place."""
        return {layer: rows.roll(1, 0) for layer, rows in super().forward(*args, **kwargs).items()}


def _widths(network: nn.Module, layers: Sequence[str], images: Images) -> dict[str, int]:
    """The number of features of each layer after pooling."""
    look = Teacher(deepcopy(network).cpu(), layers)
    return {layer: rows.shape[1] for layer, rows in look(to_float(images.images[:1].cpu())).items()}
