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

from ...teachers import Teacher
from ..experiment import Cell, Experiment, require_layer
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

AHEAD = 512  # images that are corrupted at once: a third of the time of 64 by 64, which are 15 kinds of a few each
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
        if self.compile and any(change.gradients or change.share is not None for change in changes):
            raise ValueError("gradients and share are measured in hooks, which compiled models do not call")
        for source in dict.fromkeys([recipe.student, recipe.teacher, *(v.teacher for v in changes if v.teacher)]):
            DATASETS[source.data].locate(data_root(self.data_root))
        with torch.device("meta"):
            for name, pair in recipe.networks.items():
                teacher, student = _build(pair.teacher, recipe.teacher), _build(pair.student, recipe.student)
                own = (change for change in changes if name in (change.networks or recipe.networks))
                for guiding, guided in (layers for change in own for layers in change.pairs(pair)):
                    require_layer(teacher, guiding)
                    require_layer(student, guided)

    def candidates(self, *, seeds: int | None = None, **choice: Any) -> list[Cell]:
        """A cell for the teacher and the student of every pair of networks, variant and seed, or of some.

        Its ``properties`` are ``{"properties": of the teacher, see `bird.lab.vision.regression.Properties`,
        "student_probe_accuracy": a share of 1}``.
        """
        first = dict.fromkeys((name, variant) for name, variant, *_ in grid(self.recipe, **choice, seeds=1))
        found = []
        for name, variant in first:
            for seed in seeds_of(self.recipe, seeds):
                own = self._at(seed)
                teacher, student, pairs = own._pair(name, variant, seed)
                stage = own._measured(teacher, student, pairs[-1], seed)
                found.append(Cell(name, variant, "", seed, {"properties": stage}))
        return found

    def _at(self, seed: int) -> VisionExperiment:
        return replace(self, recipe=self.recipe.at(seed))

    def _pair(self, name: str, variant: str, seed: int) -> tuple[Made, Made, tuple[tuple[str, str], ...]]:
        """Teacher, student, and the pairs of layers between which something moves."""
        recipe, pair, change = self.recipe, self.recipe.networks[name], self.recipe.variants[variant]
        corruptions = recipe.corruptions if change.teacher_corruptions is None else change.teacher_corruptions
        budget, source, start = recipe.pretraining, change.teacher or recipe.teacher, None
        if recipe.teacher_tuning is not None:
            start = self._pretrained("teacher", source, pair.teacher, (), seed, budget)
            budget = recipe.teacher_tuning
        if change.teacher_steps is not None:
            budget = replace(budget, steps=change.teacher_steps, epochs=None)
        teacher = self._pretrained("teacher", source, pair.teacher, corruptions, seed, budget, start=start)
        student = self._pretrained("student", recipe.student, pair.student, (), seed, recipe.pretraining)
        return teacher, student, change.pairs(pair)

    def cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""
        own = self._at(seed)
        teacher, student, pairs = own._pair(networks, variant, seed)
        made = own._moved(teacher, student, pairs, own.recipe.variants[variant], method, seed)
        layer = pairs[-1][METHODS[method].start == "student"]
        aligned = own._aligned(made, layer, teacher, pairs[-1][0], seed)
        scores = {"score": own._scored(made, seed), "alignment": aligned}
        return Cell(networks, variant, method, seed, scores, made.stage)

    def _pretrained(
        self,
        role: Literal["teacher", "student"],
        source: Source,
        network: str,
        corruptions: tuple[str, ...],
        seed: int,
        budget: Budget,
        *,
        start: Made | None = None,
    ) -> Made:
        """A teacher or a student; with one seed and network they begin with different weights, or with ``start``'s."""
        about = self._about(source, seed) | {"network": network, "corruptions": corruptions, "budget": as_plain(budget)}
        about |= self._strongest(corruptions)

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(source, seed)
            own = 3 * seed + (role == "student")  # 3 * seed + 2 is the transfer's
            torch.manual_seed(own)
            model = _build(network, source) if start is None else start.model(self.root, self.device)
            history = fit(
                model,
                data.train,
                budget.settings(len(data.train), own, compile=self.compile),
                augment=_augment(source, corruptions, seed, self.recipe.strongest, budget.batch_size),
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

        parents = () if start is None else (start.stage,)
        return Made(network, source, Stage(role, about, make, parents, f"{network} on {source.data}, seed {seed}"))

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
        about |= self._strongest(about["corruptions"])
        weights = {"alpha": change.alpha, "beta": change.beta}
        if guided:
            about |= {"layers": pairs if len(pairs) > 1 else pairs[0], "weights": weights}
            about |= {"views": "statistics apart"} if change.views else {}  # not the runs that mixed them
        if change.guidance and any(guidance == "bird" for _, guidance in known.phases):
            about |= {"guidance": change.guidance}
        elif known.weighted:
            about |= {"weights": {"alpha": change.alpha}}

        def make(folder: Path) -> dict[str, Any]:
            data = self._data(recipe.student, seed)
            changes: dict[str, Any] = {"compile": self.compile}
            changes |= {} if change.batch_size is None else {"batch_size": change.batch_size}
            batch_size = changes.get("batch_size", recipe.transfer.batch_size)
            transfer = Transfer(
                networks=(teacher.network, student.network),
                pairs=pairs,
                settings=budget.settings(len(data.train), 3 * seed + 2, **changes),
                classes=_classes(recipe.student),
                augment=_augment(recipe.student, about["corruptions"], seed, recipe.strongest, batch_size),
                validate=partial(image_accuracy, data=data.validation),
                device=self.device,
                folder=folder,
                progress=self.progress,
                views=PhotometricViews(seed) if change.views else None,
                weights={name: value for name, value in weights.items() if value is not None},
                guidance=change.guidance,
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
            severities = range(1, 1 + self.recipe.strongest)
            return asdict(robustness(made.model(self.root, self.device), test, scoring.corruptions, severities))

        about = self._about(source, None) | {"scoring": asdict(scoring)} | self._strongest(scoring.corruptions)
        return Stage("score", about, make, (made.stage,), self._of(made))

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
            severities = range(1, 1 + recipe.strongest)
            found = measure_teacher(
                *networks, few, corruptions=recipe.corruptions, severities=severities, progress=self.progress
            )
            return found._asdict() | {"properties": asdict(found.properties)}

        about = self._about(recipe.student, seed) | {
            "images": recipe.scoring.images,
            "layers": layers,
            "corruptions": recipe.corruptions,
            "effective_rank": True,  # the stages of before do not say it
        }
        about |= self._strongest(recipe.corruptions)
        return Stage("properties", about, make, (teacher.stage, student.stage), self._of(teacher))

    def _strongest(self, corruptions: tuple[str, ...]) -> dict[str, Any]:
        """For the names of stages: those under published severities alone are older than others."""
        return {"strongest": self.recipe.strongest} if corruptions and self.recipe.strongest > 5 else {}

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


@dataclass(frozen=True)
class _InTurn:
    """Augmentations one after the other."""

    parts: tuple[Augment, ...]
    ahead: int  # see `bird.lab.vision.steps.Augment`

    def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
        for part in self.parts:
            x = part(x, index, epoch)
        return x


def _augment(
    source: Source, corruptions: tuple[str, ...], seed: int, strongest: int, batch_size: int
) -> Augment | None:
    """The corruptions, and then what the source asks for: the order of pictures that come corrupted from a disk."""
    parts: list[Augment] = []
    if corruptions:
        parts.append(Mixture(corruptions, seed=seed, strongest=strongest, batch_size=batch_size))
    if source.augment != "none":
        parts.append(CropFlip(seed, flip=source.augment == "crop-flip"))
    return _InTurn(tuple(parts), ahead=max(1, AHEAD // batch_size) if corruptions else 1) if parts else None
