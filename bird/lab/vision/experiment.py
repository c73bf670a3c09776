"""Recipes run: from a recipe to stages, from stages to the cells of a table.

A cell (networks, variant, method, seed) needs two stages, which score a model and compare it with the teacher; these
need the one that made the model, and that one a teacher, a student or both. What several cells or recipes need is made
once. The test set is read by the last two kinds of stages alone. A candidate is a cell's teacher and student before any
transfer, and needs one stage.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...features import find_layers
from ...teachers import Teacher
from ..experiment import Cell, Experiment
from ..recipe import data_root, grid, seeds_of
from ..stages import Stage
from ..tensors import load_tensors, save_tensors
from .augment import CropFlip, PhotometricViews
from .corruptions import Mixture
from .data import Splits
from .datasets import DATASETS, load_splits
from .evaluation import first, image_accuracy, layer_alignment, robustness
from .methods import METHODS, Transfer
from .models import build
from .recipe import DEMO, Budget, RecipeVariant, Source, VisionRecipe, as_plain
from .selection import measure_teacher
from .training import Augment, fit

PROTOCOL = 2  # part of every stage's name: raised when the same settings no longer mean the same


@dataclass(frozen=True)
class Made:
    """A network, what it has learned to tell apart, and the stage that trains it."""

    network: str
    source: Source
    stage: Stage

    def model(self, root: Path, device: torch.device) -> nn.Module:
        """With its weights.

        Raises:
            ValueError: they are gone or damaged.
        """
        model, folder = _build(self.network, self.source), self.stage.folder(root)
        try:
            model.load_state_dict(load_tensors(folder / "model.pt"))
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{error}\nDelete the whole folder {folder}, and it is made again") from error
        return model.to(device).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class VisionExperiment(Experiment):
    """A recipe of images as stages.

    A cell's ``score`` is ``{"clean": accuracy, "corrupted": {name: [accuracy of each severity]}}``, its ``alignment``
    ``{"cka": to the teacher, unbiased, over clean test images}``.

    Args:
        compile: train compiled models, see `bird.lab.vision.checkpoints.Settings`.
    """

    recipe: VisionRecipe
    compile: bool = False

    libraries = "matplotlib", "scipy"

    @property
    def extra(self) -> str:
        """The demo has one that is small."""
        return "demo" if self.recipe.name == DEMO else "vision"

    def check(self) -> None:
        """As of `Experiment`; also, has every network the layers that are asked of it?"""
        super().check()
        recipe = self.recipe
        changes = recipe.variants.values()
        for source in dict.fromkeys([recipe.student, recipe.teacher, *(v.teacher for v in changes if v.teacher)]):
            DATASETS[source.data].locate(data_root(self.data_root))
        with torch.device("meta"):
            for pair in recipe.networks.values():
                teacher, student = _build(pair.teacher, recipe.teacher), _build(pair.student, recipe.student)
                for guiding, guided in (layers for change in changes for layers in change.pairs(pair)):
                    find_layers(teacher, guiding)
                    find_layers(student, guided)

    def candidates(self, *, seeds: int | None = None, **choice: Any) -> list[Cell]:
        """A cell for the teacher and the student of every pair of networks, variant and seed, or of some.

        Its ``properties`` are ``{"properties": of the teacher, see `bird.lab.vision.regression.Properties`,
        "student_probe_accuracy": a share of 1}``.
        """
        first = dict.fromkeys((name, variant) for name, variant, *_ in grid(self.recipe, **choice, seeds=1))
        found = []
        for name, variant in first:
            for seed in seeds_of(self.recipe, seeds):
                teacher, student, pairs = self._pair(name, variant, seed)
                stage = self._measured(teacher, student, pairs[-1], seed)
                found.append(Cell(name, variant, "", seed, {"properties": stage}))
        return found

    def _pair(self, name: str, variant: str, seed: int) -> tuple[Made, Made, tuple[tuple[str, str], ...]]:
        """Teacher, student, and the pairs of layers between which something moves."""
        recipe, pair, change = self.recipe, self.recipe.networks[name], self.recipe.variants[variant]
        corruptions = recipe.corruptions if change.teacher_corruptions is None else change.teacher_corruptions
        budget = recipe.pretraining
        if change.teacher_steps is not None:
            budget = replace(budget, steps=change.teacher_steps, epochs=None)
        source = change.teacher or recipe.teacher
        teacher = self._pretrained("teacher", source, pair.teacher, corruptions, seed, budget)
        student = self._pretrained("student", recipe.student, pair.student, (), seed, recipe.pretraining)
        return teacher, student, change.pairs(pair)

    def cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""
        teacher, student, pairs = self._pair(networks, variant, seed)
        made = self._moved(teacher, student, pairs, self.recipe.variants[variant], method, seed)
        layer = pairs[-1][METHODS[method].start == "student"]
        aligned = self._aligned(made, layer, teacher, pairs[-1][0], seed)
        return Cell(
            networks, variant, method, seed, {"score": self._scored(made, seed), "alignment": aligned}, made.stage
        )

    def _pretrained(
        self,
        role: Literal["teacher", "student"],
        source: Source,
        network: str,
        corruptions: tuple[str, ...],
        seed: int,
        budget: Budget,
    ) -> Made:
        """A teacher or a student; with one seed and network they begin with different weights."""
        about = self._about(source, seed) | {"network": network, "corruptions": corruptions, "budget": as_plain(budget)}

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(source, seed)
            own = 3 * seed + (role == "student")  # 3 * seed + 2 is the transfer's
            torch.manual_seed(own)
            model = _build(network, source)
            history = fit(
                model,
                data.train,
                budget.settings(len(data.train), own, compile=self.compile),
                augment=_augment(source, corruptions, seed),
                validate=partial(image_accuracy, data=data.validation),
                device=self.device,
                folder=folder,
                resume=True,
                about={"role": role, "network": network},
                progress=self.progress,
                label=f"{network}, seed {seed}",
            )
            save_tensors(model.state_dict(), folder / "model.pt")
            return {"histories": [asdict(history)], "steps_per_second": [history.steps_per_second]}

        return Made(network, source, Stage(role, about, make, title=f"{network} on {source.data}, seed {seed}"))

    def _moved(
        self,
        teacher: Made,
        student: Made,
        pairs: tuple[tuple[str, str], ...],
        change: RecipeVariant,
        method: str,
        seed: int,
    ) -> Made:
        """What a method makes of a teacher and a student."""
        recipe, known = self.recipe, METHODS[method]
        if not known.phases:
            return student
        budget = recipe.transfer if change.steps is None else replace(recipe.transfer, steps=change.steps, epochs=None)
        starts = {"teacher": teacher, "student": student}[known.start]
        guided = any(guidance in ("bird", "hints") for _, guidance in known.phases)
        parents = (teacher.stage, student.stage) if guided else (starts.stage,)
        about = self._about(recipe.student, seed) | {
            "method": method,
            "budget": as_plain(budget),
            "batch_size": change.batch_size,
            "corruptions": recipe.corruptions if known.corrupted else (),
        }
        weights = {"alpha": change.alpha, "beta": change.beta}
        if guided:
            about |= {"layers": pairs if len(pairs) > 1 else pairs[0], "weights": weights}
            about |= {"views": True} if change.views else {}
        elif known.weighted:
            about |= {"weights": {"alpha": change.alpha}}

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(recipe.student, seed)
            changes: dict[str, Any] = {"compile": self.compile}
            changes |= {} if change.batch_size is None else {"batch_size": change.batch_size}
            transfer = Transfer(
                networks=(teacher.network, student.network),
                pairs=pairs,
                settings=budget.settings(len(data.train), 3 * seed + 2, **changes),
                classes=_classes(recipe.student),
                augment=_augment(recipe.student, recipe.corruptions if known.corrupted else (), seed),
                validate=partial(image_accuracy, data=data.validation),
                device=self.device,
                folder=folder,
                progress=self.progress,
                views=PhotometricViews(seed) if change.views else None,
                weights={name: value for name, value in weights.items() if value is not None},
            )
            guide, start = (m.model(self.root, self.device) if m.stage in parents else None for m in (teacher, student))
            model, histories, times = transfer.run(method, guide, start, data.train)
            save_tensors(model.state_dict(), folder / "model.pt")
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
            test = first(self._data(source, seed).test, scoring.images).to(self.device)
            return asdict(robustness(made.model(self.root, self.device), test, scoring.corruptions))

        return Stage(
            "score", self._about(source, None) | {"scoring": asdict(scoring)}, make, (made.stage,), self._of(made)
        )

    def _aligned(self, made: Made, layer: str, teacher: Made, teacher_layer: str, seed: int) -> Stage:
        source = self.recipe.student

        def make(folder: Path) -> dict[str, Any]:
            test = first(self._data(source, seed).test, self.recipe.scoring.images)
            model, guide = (m.model(self.root, self.device) for m in (made, teacher))
            return {"cka": layer_alignment(Teacher(guide, [teacher_layer]), model, teacher_layer, layer, test)}

        about = self._about(source, None) | {"images": self.recipe.scoring.images, "layers": (teacher_layer, layer)}
        return Stage("alignment", about, make, (made.stage, teacher.stage), self._of(made))

    def _measured(self, teacher: Made, student: Made, layers: tuple[str, str], seed: int) -> Stage:
        """What the teacher promises: under the corruptions that the transfer is for, whatever it was trained under."""
        recipe = self.recipe

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(recipe.student, seed)
            few = replace(data, validation=first(data.validation, recipe.scoring.images))
            guide, model = (m.model(self.root, self.device) for m in (teacher, student))
            networks = Teacher(guide, [layers[0]]), Teacher(model, [layers[1]])
            found = measure_teacher(*networks, few, corruptions=recipe.corruptions, progress=self.progress)
            return found._asdict() | {"properties": asdict(found.properties)}

        about = self._about(recipe.student, seed) | {
            "images": recipe.scoring.images,
            "layers": layers,
            "corruptions": recipe.corruptions,
            "effective_rank": True,  # the stages of before do not say it
        }
        return Stage("properties", about, make, (teacher.stage, student.stage), self._of(teacher))

    def _of(self, made: Made) -> str:
        return f"{made.stage.kind}-{made.stage.key}: {made.stage.title}"

    def _data(self, source: Source, seed: int) -> Splits:
        return _splits(source, seed, self.data_root)

    def _about(self, source: Source, seed: int | None) -> dict[str, Any]:
        """What every stage depends on; of the test set, which has no seed, None."""
        files = _fingerprint(source.data, self.data_root)
        return {"protocol": PROTOCOL, "data": asdict(source) | {"files": files}, "seed": seed}


@lru_cache(maxsize=16)
def _fingerprint(data: str, root: Path | None) -> str | None:
    """What tells a folder of images from others, looked at once."""
    return DATASETS[data].fingerprint(data_root(root))


def _classes(source: Source) -> int:
    known = DATASETS[source.data].classes if source.classes is None else len(source.classes)
    assert known is not None  # a recipe's source has them
    return known


def _build(network: str, source: Source) -> nn.Module:
    return build(network, _classes(source), channels=DATASETS[source.data].channels)


@lru_cache(maxsize=4)
def _splits(source: Source, seed: int, root: Path | None) -> Splits:
    return load_splits(source.data, root, classes=source.classes, seed=seed, limit_per_class=source.limit_per_class)


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
