"""Recipes run: from a recipe to stages, from stages to the cells of a table.

A cell (networks, variant, method, seed) needs two stages, which score a model and compare it with the teacher; these
need the one that made the model, and that one a teacher, a student or both. What several cells or recipes need is made
once. The test set is read by the last two kinds of stages alone. A candidate is a cell's teacher and student before any
transfer, and needs one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import load, save
from .evaluation import accuracy, alignment
from .methods import METHODS, Transfer
from .recipes import Budget, Recipe, Scoring, Source, Variant
from .selection import rank_teachers
from .stages import Stage
from .teachers import Teacher
from .training import Augment, fit
from .vision.augment import CropFlip
from .vision.corruptions import SEVERITIES, Mixture, corrupt
from .vision.data import Images, Splits, to_float
from .vision.datasets import DATASETS
from .vision.datasets import load as load_data
from .vision.models import MODELS, build

PROTOCOL = 1  # part of every stage's name: raised when the same settings no longer mean the same
KEPT = 4 << 30  # bytes of corrupted test images that a process keeps; more are made anew for each model


@dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    networks: str
    variant: str
    method: str
    seed: int
    score: Stage  # result: {"clean": accuracy, "corrupted": {name: [accuracy of each severity]}}
    alignment: Stage  # result: {"cka": to the teacher, unbiased, over clean test images}
    training: Stage  # that made the model

    @property
    def wanted(self) -> list[Stage]:
        """What completes it."""
        return [self.score, self.alignment]


@dataclass(frozen=True)
class Candidate:
    """A teacher for a student."""

    networks: str
    variant: str
    seed: int
    properties: Stage  # result: {"properties": `bird.selection.Properties`, "student_probe_accuracy": a share of 1}

    @property
    def wanted(self) -> list[Stage]:
        """What completes it."""
        return [self.properties]


@dataclass(frozen=True)
class Made:
    """A network, what it has learned to tell apart, and the stage that trains it."""

    network: str
    source: Source
    stage: Stage

    def model(self, root: Path, device: torch.device) -> nn.Module:
        """With its weights."""
        model = _build(self.network, self.source)
        model.load_state_dict(load(self.stage.folder(root) / "model.pt"))
        return model.to(device).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Experiment:
    """A recipe as stages.

    Args:
        recipe: what to run.
        root: the folder of the stages' folders.
        device: where networks are trained; like the rest from here on it is no part of a stage's name.
        data_root: the folder of the data sets, see `bird.vision.datasets.load`.
        progress: bars for training; None for on a terminal only.
        compile: train compiled models, see `bird.checkpoints.Settings`.
    """

    recipe: Recipe
    root: Path
    device: torch.device
    data_root: Path | None = None
    progress: bool | None = None
    compile: bool = False

    def cells(
        self,
        *,
        networks: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        methods: Sequence[str] | None = None,
        seeds: int | None = None,
    ) -> list[Cell]:
        """All cells, or those of some networks, variants, methods (as far as a variant has them) and seeds."""
        recipe = self.recipe
        return [
            self._cell(name, variant, method, seed)
            for name in (recipe.networks if networks is None else networks)
            for variant in (recipe.variants if variants is None else variants)
            for method in recipe.variants[variant].methods or recipe.methods
            if methods is None or method in methods
            for seed in range(recipe.seeds if seeds is None else seeds)
        ]

    def candidates(
        self,
        *,
        networks: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        seeds: int | None = None,
    ) -> list[Candidate]:
        """The teacher and the student of every pair of networks, variant and seed, or of some."""
        found = []
        for name in self.recipe.networks if networks is None else networks:
            for variant in self.recipe.variants if variants is None else variants:
                for seed in range(self.recipe.seeds if seeds is None else seeds):
                    stage = self._measured(*self._pair(name, variant, seed), seed)
                    found.append(Candidate(name, variant, seed, stage))
        return found

    def _pair(self, name: str, variant: str, seed: int) -> tuple[Made, Made, tuple[str, str]]:
        """Teacher, student, and the layers between which something moves."""
        recipe, pair, change = self.recipe, self.recipe.networks[name], self.recipe.variants[variant]
        corruptions = recipe.corruptions if change.teacher_corruptions is None else change.teacher_corruptions
        budget = recipe.pretraining
        if change.teacher_steps is not None:
            budget = replace(budget, steps=change.teacher_steps, epochs=None)
        teacher = self._pretrained(change.teacher or recipe.teacher, pair.teacher, corruptions, seed, budget)
        student = self._pretrained(recipe.student, pair.student, (), seed, recipe.pretraining)
        layers = (
            change.teacher_layer or MODELS[pair.teacher].guide,
            change.student_layer or MODELS[pair.student].guide,
        )
        return teacher, student, layers

    def _cell(self, name: str, variant: str, method: str, seed: int) -> Cell:
        teacher, student, layers = self._pair(name, variant, seed)
        made = self._moved(teacher, student, layers, self.recipe.variants[variant], method, seed)
        layer = layers[METHODS[method].start == "student"]
        score, aligned = self._scored(made, seed), self._aligned(made, layer, teacher, layers[0], seed)
        return Cell(name, variant, method, seed, score, aligned, made.stage)

    def _pretrained(
        self, source: Source, network: str, corruptions: tuple[str, ...], seed: int, budget: Budget
    ) -> Made:
        """A teacher, which sees corruptions, or a student, which sees none."""
        about = _about(source, seed) | {"network": network, "corruptions": corruptions, "budget": asdict(budget)}

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(source, seed)
            torch.manual_seed(seed)
            model = _build(network, source)
            history = fit(
                model,
                data.train,
                budget.settings(len(data.train), 3 * seed + (not corruptions), compile=self.compile),
                augment=_augment(source, corruptions, seed),
                validate=partial(accuracy, data=data.validation),
                device=self.device,
                folder=folder,
                resume=True,
                progress=self.progress,
                label=f"{network}, seed {seed}",
            )
            save(model.state_dict(), folder / "model.pt")
            return {"histories": [asdict(history)], "steps_per_second": [history.steps_per_second]}

        kind = "teacher" if corruptions else "student"
        return Made(network, source, Stage(kind, about, make, title=f"{network} on {source.data}, seed {seed}"))

    def _moved(
        self, teacher: Made, student: Made, layers: tuple[str, str], change: Variant, method: str, seed: int
    ) -> Made:
        """What a method makes of a teacher and a student."""
        recipe, known = self.recipe, METHODS[method]
        if not known.phases:
            return student
        starts = {"teacher": teacher, "student": student}[known.start]
        guided = any(guidance in ("bird", "hints") for _, guidance in known.phases)
        parents = (teacher.stage, student.stage) if guided else (starts.stage,)
        about = _about(recipe.student, seed) | {
            "method": method,
            "budget": asdict(recipe.transfer),
            "batch_size": change.batch_size,
            "corruptions": recipe.corruptions if known.corrupted else (),
        }
        weights = {"alpha": change.alpha, "beta": change.beta}
        if guided:
            about |= {"layers": layers, "weights": weights}

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(recipe.student, seed)
            changes: dict[str, Any] = {"compile": self.compile}
            changes |= {} if change.batch_size is None else {"batch_size": change.batch_size}
            transfer = Transfer(
                teacher=(teacher.network, layers[0]),
                student=(student.network, layers[1]),
                settings=recipe.transfer.settings(len(data.train), 3 * seed + 2, **changes),
                classes=_classes(recipe.student),
                augment=_augment(recipe.student, recipe.corruptions if known.corrupted else (), seed),
                validate=partial(accuracy, data=data.validation),
                device=self.device,
                folder=folder,
                progress=self.progress,
                weights={name: value for name, value in weights.items() if value is not None},
            )
            guide, start = (m.model(self.root, self.device) if m.stage in parents else None for m in (teacher, student))
            model, histories, times = transfer.run(method, guide, start, data.train)
            save(model.state_dict(), folder / "model.pt")
            return {
                "histories": [asdict(history) for history in histories],
                "steps_per_second": [history.steps_per_second for history in histories],
                "times": times and asdict(times),
            }

        title = f"{student.network} on {recipe.student.data}, seed {seed}"
        return Made(starts.network, recipe.student, Stage(method, about, make, parents, title))

    def _scored(self, made: Made, seed: int) -> Stage:
        source, scoring = self.recipe.student, self.recipe.scoring

        def make(folder: Path) -> dict[str, Any]:
            test = _first(self._data(source, seed).test, scoring.images).to(self.device)
            model = made.model(self.root, self.device)
            corrupted: dict[str, list[float]] = {name: [] for name in scoring.corruptions}
            for name, images in _corrupted(test, scoring, (source, scoring, self.data_root, self.device)):
                corrupted[name].append(accuracy(model, images))
            return {"clean": accuracy(model, test), "corrupted": corrupted}

        return Stage("score", _about(source, None) | {"scoring": asdict(scoring)}, make, (made.stage,), self._of(made))

    def _aligned(self, made: Made, layer: str, teacher: Made, teacher_layer: str, seed: int) -> Stage:
        source = self.recipe.student

        def make(folder: Path) -> dict[str, Any]:
            test = _first(self._data(source, seed).test, self.recipe.scoring.images)
            model, guide = (m.model(self.root, self.device) for m in (made, teacher))
            return {"cka": alignment(Teacher(guide, [teacher_layer]), model, teacher_layer, layer, test)}

        about = _about(source, None) | {"images": self.recipe.scoring.images, "layers": (teacher_layer, layer)}
        return Stage("alignment", about, make, (made.stage, teacher.stage), self._of(made))

    def _measured(self, teacher: Made, student: Made, layers: tuple[str, str], seed: int) -> Stage:
        """What the teacher promises: under the corruptions that the transfer is for, whatever it was trained under."""
        recipe = self.recipe

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(recipe.student, seed)
            few = replace(data, validation=_first(data.validation, recipe.scoring.images))
            guide, model = (m.model(self.root, self.device) for m in (teacher, student))
            ranking = rank_teachers(
                {"teacher": Teacher(guide, [layers[0]])},
                model,
                layers[1],
                few,
                corruptions=recipe.corruptions,
                device=self.device,
                cache=self.root / "features",
                progress=self.progress,
            )
            return {
                "properties": asdict(ranking.rows[0].properties),
                "student_probe_accuracy": ranking.student_probe_accuracy,
            }

        about = _about(recipe.student, seed) | {
            "images": recipe.scoring.images,
            "layers": layers,
            "corruptions": recipe.corruptions,
        }
        return Stage("properties", about, make, (teacher.stage, student.stage), self._of(teacher))

    def _of(self, made: Made) -> str:
        return f"{made.stage.kind}-{made.stage.key}: {made.stage.title}"

    def _data(self, source: Source, seed: int) -> Splits:
        return _splits(source, seed, self.data_root)


def _about(source: Source, seed: int | None) -> dict[str, Any]:
    """What every stage depends on; of the test set, which has no seed, None."""
    return {"protocol": PROTOCOL, "data": asdict(source), "seed": seed}


def _classes(source: Source) -> int:
    known = DATASETS[source.data].classes if source.classes is None else len(source.classes)
    assert known is not None  # a recipe's source has them
    return known


def _build(network: str, source: Source) -> nn.Module:
    return build(network, _classes(source), channels=DATASETS[source.data].channels)


@lru_cache(maxsize=4)
def _splits(source: Source, seed: int, root: Path | None) -> Splits:
    return load_data(source.data, root, classes=source.classes, seed=seed, limit_per_class=source.limit_per_class)


def _augment(source: Source, corruptions: tuple[str, ...], seed: int) -> Augment | None:
    """The corruptions, and then what the source asks for: the order of pictures that come corrupted from a disk."""
    parts: list[Augment] = [Mixture(corruptions, seed=seed)] if corruptions else []
    if source.augment != "none":
        parts.append(CropFlip(seed, flip=source.augment == "crop-flip"))

    def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        for part in parts:
            x = part(x, index, epoch)
        return x

    return augment if parts else None


def _first(data: Images, count: int | None) -> Images:
    """A fixed choice of so many images."""
    if count is None or count >= len(data):
        return data
    return data.select(torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count])


_kept: dict[tuple[Any, ...], list[tuple[str, Images]]] = {}


def _corrupted(data: Images, scoring: Scoring, key: tuple[Any, ...]) -> Iterator[tuple[str, Images]]:
    """Each corruption at each severity, in 8 bits as published ones are. What ``key`` names is kept if it fits."""
    if key in _kept:
        yield from _kept[key]
        return
    _kept.clear()
    views: list[tuple[str, Images]] = []
    for name in scoring.corruptions:
        for severity in SEVERITIES:
            view = name, _quantised(data, name, severity)
            views.append(view)
            yield view
    if data.images.numel() * len(views) <= KEPT:
        _kept[key] = views


def _quantised(data: Images, name: str, severity: int) -> Images:
    parts = []
    for index in torch.arange(len(data), device=data.images.device).split(500):
        view = corrupt(to_float(data.images[index]), name, severity, index=index)
        parts.append(view.mul_(255).round_().to(torch.uint8))
    return Images(torch.cat(parts), data.labels)
