"""Experiments as TOML files: what is trained on what, for how long, by which methods, and what the paper reports.

The package ships one for every table of the paper (`names`); `read_vision` also takes a path of your own. A file says::

    title = "CIFAR-10 to CIFAR-100"
    methods = ["none", "lp", "ft", "lp-ft", "hints", "lwf", "bird", "ceiling"]  # `METHODS`
    seeds = 3

    [teacher]                                    # a source of images, see `Source`
    data = "cifar10"
    [student]
    data = "cifar100"

    [pretraining]                                # of both, see `Budget`
    epochs = 200
    lr = 0.01
    final_lr = 1e-6
    [teacher_tuning]                                         # of teachers that see corruptions only after it
    epochs = 200
    [transfer]
    epochs = 200
    lr = 0.005

    [scoring]                                    # see `Scoring`

    [networks.mobilenetv2]                       # see `Networks`; any name, or a network's
    paper = { none = 51.31, bird = 54.77 }       # published robust accuracy, in %

    [variants."batch 32"]                        # what differs: see `RecipeVariant`
    batch_size = 32
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ...losses import BirdLoss
from ..claims import Claim, require_claims
from ..duration import steps_to_train
from ..recipe import WHOLE, made, parsed, require_known, require_percents, require_table, require_within, settings_of
from .checkpoints import MIN_BATCH, Optimisation, Settings
from .corruptions import CORRUPTIONS, HELD_OUT_CORRUPTIONS, STRONGEST, TEACHER_CORRUPTIONS
from .datasets import DATASETS
from .methods import METHODS
from .models import MODELS

AUGMENTS = ("none", "crop", "crop-flip")
DEMO = "fashion/demo"  # what `bird demo` runs


@dataclass(frozen=True)
class Source:
    """A source of images.

    Args:
        data: a key of `bird.lab.vision.datasets.DATASETS`.
        classes: which ones, renumbered in this order; None for all.
        limit_per_class: at most so many of each class in each of the three sets; None for all.
        augment: "crop-flip", "crop" (for digits), or "none".
    """

    data: str
    classes: tuple[int, ...] | None = None
    limit_per_class: int | None = None
    augment: str = "crop-flip"

    def __post_init__(self) -> None:
        require_known("data", self.data, DATASETS)
        if self.classes is None and DATASETS[self.data].classes is None:
            raise ValueError(f"how many classes {self.data!r} has is not known: list them, classes = [0, 1, ...]")
        require_known("augment", self.augment, AUGMENTS)
        require_within(self, limit_per_class=1)
        if self.classes is not None:
            most = DATASETS[self.data].classes
            if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
                raise ValueError(f"classes must be at least two, each once, not {[*self.classes]}")
            if min(self.classes) < 0 or (most is not None and max(self.classes) >= most):
                known = "numbers from 0" if most is None else f"0 to {most - 1}"
                raise ValueError(f"classes of {self.data!r} are {known}, not {[*self.classes]}")


@dataclass(frozen=True)
class Budget(Optimisation):
    """How long to train, ``epochs`` or ``steps``; how, says `bird.lab.vision.checkpoints.Optimisation`."""

    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"say epochs or steps, one of them, got epochs={self.epochs}, steps={self.steps}")
        require_within(self, epochs=1, steps=1)
        if not self.lr:
            raise ValueError("lr must be positive, not 0")
        super().__post_init__()

    def settings(self, samples: int, seed: int, **changes: Any) -> Settings:
        """For a training set of so many samples; ``changes`` of the batch size leave the number of steps as it is."""
        steps = self.steps or steps_to_train(samples, self.batch_size, self.epochs or 1, least=MIN_BATCH)
        how = {f.name: getattr(self, f.name) for f in fields(Optimisation)}
        return Settings(steps=steps, seed=seed, save_every=max(100, steps // 10), **(how | changes))


@dataclass(frozen=True)
class Scoring:
    """What models are scored on: test images, clean and corrupted.

    Args:
        corruptions: all that are reported one by one.
        images: at most so many test images, the first of a fixed order, and for the properties of teachers so many
            validation images; None for all.
    """

    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    images: int | None = None

    def __post_init__(self) -> None:
        for name in self.corruptions:
            require_known("corruptions", name, CORRUPTIONS)
        require_within(self, images=MIN_BATCH)  # as the alignment does


@dataclass(frozen=True)
class Networks:
    """A teacher's and a student's network.

    Args:
        teacher: a key of `bird.lab.vision.models.MODELS`.
        student: the same.
        paper: method to the published robust accuracy in %.
        paper_pgr: method to the published share of the gap recovered, in %.
    """

    teacher: str
    student: str
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_pgr: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known("teacher", self.teacher, MODELS)
        require_known("student", self.student, MODELS)
        for method in (*self.paper, *self.paper_pgr):
            require_known("paper", method, METHODS)
        require_percents(self, "paper", "paper_pgr")


@dataclass(frozen=True)
class RecipeVariant:
    """What a transfer, or its teacher, does otherwise than the recipe: None for no change.

    Args:
        teacher: what the teacher is trained on.
        teacher_corruptions: under which corruptions it is; none at all for a teacher that sees clean images. Ceilings
            still see the recipe's.
        teacher_steps: for how many steps, of the same size; of the second stage where teachers have two.
        networks: for which of the recipe's it is; None for all. What names layers is for networks that have them.
        methods: which ones are run; None for the recipe's.
        steps: of the transfer.
        batch_size: with the same number of steps.
        alpha: weight of the task in guided methods, and in ``continued-alpha``.
        beta: weight of the guidance in guided methods.
        views: whether the guidance term of BIRD and Hints is computed on images of other backgrounds, contrast and
            brightness (`bird.lab.vision.augment.PhotometricViews`), while the task keeps its own, and so do the running
            statistics of batch normalisation.
        teacher_layer: guiding layer, a path in the teacher, or several; the default is the network's own.
        student_layer: guided layer; as many, each guided by the one at its place. CKA is reported of the last ones.
        loss, schedule, until, share: of BIRD's methods, as of `bird.BirdLoss`.
        gradients: whether BIRD's methods log the norms of the gradients of task and guidance, as ``share`` does.
    """

    teacher: Source | None = None
    teacher_corruptions: tuple[str, ...] | None = None
    teacher_steps: int | None = None
    networks: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    steps: int | None = None
    batch_size: int | None = None
    alpha: float | None = None
    beta: float | None = None
    views: bool = False
    teacher_layer: str | tuple[str, ...] | None = None
    student_layer: str | tuple[str, ...] | None = None
    loss: str | None = None
    schedule: str | None = None
    until: float | None = None
    share: float | None = None
    gradients: bool | None = None

    def __post_init__(self) -> None:
        require_within(self, teacher_steps=1, steps=1, batch_size=MIN_BATCH, alpha=0, beta=0)
        if {(), ""} & {self.teacher_layer, self.student_layer}:
            raise ValueError("teacher_layer and student_layer must not be empty")

    @property
    def guidance(self) -> dict[str, Any]:
        """What it says of BIRD's loss beside its weights."""
        names = ("loss", "schedule", "until", "share", "gradients")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def require_guidance(self, methods: Iterable[str], networks: Iterable[Networks]) -> None:
        """Raise a ValueError unless BIRD's loss can be as it says in each of the methods, between the networks' layers.

        What it says must be known and in range though none of the methods is BIRD's.
        """
        weights = {name: value for name in ("alpha", "beta") if (value := getattr(self, name)) is not None}
        options = {name: value for name, value in self.guidance.items() if name != "gradients"}
        if self.loss == "cka_difference":
            raise ValueError('loss = "cka_difference" is of preferences, not of images')
        if self.views and (self.share is not None or self.gradients):
            raise ValueError("gradients are of task and guidance at one output, and with views the two have their own")
        guided = [m for m in methods if any(guidance == "bird" for _, guidance in METHODS[m].phases)]
        for pairs in map(self.pairs, networks):
            BirdLoss(pairs=pairs, **weights, **options)
            for method in guided:
                try:
                    BirdLoss(pairs=pairs, **METHODS[method].options, **weights, **options)
                except ValueError as error:
                    raise ValueError(f"the method {method!r} cannot be so: {error}; list methods without it") from error

    def pairs(self, networks: Networks) -> tuple[tuple[str, str], ...]:
        """The guiding and the guided layer of each pair.

        Raises:
            ValueError: they are not equally many.
        """
        chosen = (networks.teacher, self.teacher_layer), (networks.student, self.student_layer)
        theirs, ours = ((MODELS[name].guide if own is None else own) for name, own in chosen)
        theirs, ours = ((side,) if isinstance(side, str) else side for side in (theirs, ours))
        if len(theirs) != len(ours):
            raise ValueError(
                f"{len(theirs)} layers cannot guide {len(ours)}: teacher_layer {theirs}, student_layer {ours}"
            )
        return tuple(zip(theirs, ours, strict=True))


@dataclass(frozen=True)
class VisionRecipe:
    """One experiment; the parts are described at their classes.

    Args:
        name: what it is called on the command line.
        title: what tables and pictures are headed by.
        teacher: what teachers are trained on, corrupted.
        student: what students are trained on, clean.
        pretraining: of teachers and students.
        teacher_tuning: of teachers that are pre-trained on clean images, and see the corruptions only then; None for
            teachers that see them from the start.
        transfer: of every method.
        networks: by name; each is run.
        methods: keys of `bird.lab.vision.methods.METHODS`.
        variants: by name; "" is the recipe as it is.
        seeds: how many repetitions, with seeds ``first_seed``, ``first_seed`` + 1, ...
        first_seed: of the repetitions.
        corruptions: the teacher's, at severities 0 to the strongest.
        held_out: what robust accuracy is the mean over.
        scoring: what else is scored.
        paper_pgr: as in `Networks`, where the paper does not say of which.
        claims: registered before the runs, by name; measures are those of `bird.lab.vision.report.measured`.
        split_classes: whether the seed halves the classes at random: the first half the teacher's, the others the
            student's (`at`).
        strongest: severity, in training and in scoring: 5, or up to `bird.lab.vision.corruptions.STRONGEST`.
    """

    name: str
    title: str
    teacher: Source
    student: Source
    pretraining: Budget
    transfer: Budget
    networks: Mapping[str, Networks]
    methods: tuple[str, ...]
    variants: Mapping[str, RecipeVariant] = field(default_factory=lambda: {"": RecipeVariant()})
    seeds: int = 3
    teacher_tuning: Budget | None = None
    first_seed: int = 0
    corruptions: tuple[str, ...] = TEACHER_CORRUPTIONS
    held_out: tuple[str, ...] = HELD_OUT_CORRUPTIONS
    scoring: Scoring = Scoring()
    paper_pgr: Mapping[str, float] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    split_classes: bool = False
    strongest: int = 5

    @property
    def titles(self) -> Mapping[str, str]:
        """Methods as tables call them."""
        return {name: method.title for name, method in METHODS.items()}

    def __post_init__(self) -> None:
        require_within(self, seeds=1, first_seed=0, strongest=(5, STRONGEST))
        sources = (self.teacher, self.student, *(v.teacher for v in self.variants.values() if v.teacher))
        if self.split_classes and any((s.data, s.classes) != (self.student.data, None) for s in sources):
            raise ValueError("split_classes is for a teacher and a student of the same data, and without classes")
        for name in ("networks", "variants", "methods", "corruptions", "held_out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for method in self.paper_pgr:
            require_known("paper_pgr", method, METHODS)
        require_percents(self, "paper_pgr")
        for method in self.methods + sum(((v.methods or ()) for v in self.variants.values()), ()):
            require_known("methods", method, METHODS)
        for name in sum(((v.networks or ()) for v in self.variants.values()), ()):
            require_known("networks of a variant", name, self.networks)
        for name, change in self.variants.items():
            try:
                own = [self.networks[pair] for pair in change.networks or self.networks]
                change.require_guidance(change.methods or self.methods, own)
            except ValueError as error:
                raise ValueError(f"variants.{name}: {error}") from error
        changed = sum(((v.teacher_corruptions or ()) for v in self.variants.values()), ())
        for name in self.corruptions + self.held_out + changed:
            require_known("corruptions", name, CORRUPTIONS)
        if both := {*self.held_out} & {*self.corruptions, *changed}:
            raise ValueError(f"held_out has {sorted(both)}, under which teachers are trained")
        for source in sources:
            theirs, ours = (DATASETS[s.data].channels for s in (source, self.student))
            if theirs != ours:  # teachers see the student's images
                raise ValueError(f"{source.data} has {theirs} channels, {self.student.data} {ours}: they must agree")
        require_claims(self, ("robust", "clean", "net", "all", *self.scoring.corruptions))
        if missing := set(self.held_out) - set(self.scoring.corruptions):
            raise ValueError(f"scoring.corruptions must hold all that are held out; {sorted(missing)} are missing")
        if not {*self.scoring.corruptions} - {*self.held_out}:
            raise ValueError("scoring.corruptions must hold some that are not held out, too: the page shows their mean")

    def at(self, seed: int) -> VisionRecipe:
        """The recipe of a seed: the same, or with the classes that it gives to teacher and student.

        Which classes are in a half depends on the seed and their number alone; a half is in ascending order.
        """
        if not self.split_classes:
            return self
        number = DATASETS[self.student.data].classes
        assert number is not None  # a source without classes has them
        drawn = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
        theirs, ours = (tuple(sorted(half)) for half in (drawn[: number // 2], drawn[number // 2 :]))
        variants = {
            name: v if v.teacher is None else replace(v, teacher=replace(v.teacher, classes=theirs))
            for name, v in self.variants.items()
        }
        teacher, student = replace(self.teacher, classes=theirs), replace(self.student, classes=ours)
        return replace(self, teacher=teacher, student=student, variants=variants, split_classes=False)


def as_plain(part: Budget | VisionRecipe) -> dict[str, Any]:
    """For the names of stages, and reports. They are older than some settings: these are named where they are used."""
    return settings_of(part, ("chunk_size", "split_classes", "strongest"))


def read_vision(recipe: str) -> VisionRecipe:
    """A recipe by its name (`names`), or from a TOML file by its path.

    Raises:
        ValueError: no such recipe, or one that says something it cannot: which key, and what is known.
    """
    return parsed(recipe, parse_vision)


def parse_vision(name: str, data: Mapping[str, Any]) -> VisionRecipe:
    """What a file says, checked."""
    if "kind" in data:
        raise ValueError("it is of language models, not of images")
    if "data" in data or "judges" in data:
        raise ValueError('it is of language models: kind = "preference" or "weak-to-strong" must be there')
    table = {"methods": list(METHODS)} | dict(data) | {"name": name}
    if "networks" in table:
        networks = require_table("networks", table["networks"])
        own = {key: require_table(f"networks.{key}", value) for key, value in networks.items()}
        table["networks"] = {key: {"teacher": key, "student": key} | dict(value) for key, value in own.items()}
    return made(WHOLE, VisionRecipe, table)
