"""Weak-to-strong generalization (Burns et al., 2023) as stages, with a weak teacher's geometry.

Training rows are cut in two (`data.random_halves`). A weak model learns the first half from true labels, and labels the
second half with its probabilities (`classifiers.class_probabilities`). A strong student learns these, by itself or with
BIRD, where the weak model is the teacher too; the ceiling is a student that learns the true labels. `statistics.pgr` is
the share of the gap between the weak model and the ceiling that a student has closed.

The published runs have batches of 32, Adam, a cosine to zero, two epochs and a learning rate of 5e-5 (1e-5 for large
models). Gradients are not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...language.guidance import Guidance
from ..experiment import Cell
from ..stages import Stage
from .data.questions import Questions, questions
from .experiment import (
    LanguageExperiment,
    classifier,
    controlled,
    pair_title,
    pooling_of,
    texts_and_labels,
    trained_classifier,
)
from .recipe import Change, Pair, Training

_questions = lru_cache(maxsize=4)(questions)


@dataclass(frozen=True)
class WeakToStrong(LanguageExperiment):
    """The experiment, for every pair of networks, variant, method and seed."""

    def check(self) -> None:
        """Check what `LanguageExperiment` checks, and the data.

        Raises:
            FileNotFoundError: the data set is missing; the error says what is expected where.
        """
        super().check()
        self._rows(0, None)

    def _rows(self, seed: int, limit: int | None) -> Questions:
        data = self.recipe.data
        rows = _questions(data.source, seed, self.data_root, words=data.words)
        scored = rows.test if data.part == "test" else rows.validation
        return Questions(rows.weak[:limit], rows.strong[:limit], scored[: data.held_out])

    def cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""
        pair = self.recipe.networks[networks]
        change, training = self.change(pair, variant)
        weak = self._weak(pair, change, seed)
        if method == "weak":
            return Cell(networks, variant, method, seed, {"test": weak}, weak)
        strong = self._strong(pair, change, training, method, weak, seed)
        return Cell(networks, variant, method, seed, {"test": strong}, strong)

    def _weak(self, pair: Pair, change: Change, seed: int) -> Stage:
        """The weak model, trained on half 1; result: its test score, and its labels of half 2 as ``soft``."""
        limit, training = self.limit(change), self.recipe.teacher.about
        about = self.about_training(seed, change, network=pair.teacher, pooling=pair.pooling, training=training)

        def make(folder: Path) -> dict[str, Any]:
            from .classifiers import certain, class_probabilities, train_classifier

            rows = self._rows(seed, limit)
            model, tokenizer = classifier(pair.teacher, pair.pooling, seed)
            texts, labels = texts_and_labels(rows.weak)
            history = train_classifier(
                model, tokenizer, texts, certain(labels), self.recipe.teacher, folder / "training", seed=seed,
                **self.surroundings,
            )  # fmt: skip
            strong, _ = texts_and_labels(rows.strong)
            length = self.recipe.teacher.max_length
            soft = class_probabilities(model, tokenizer, strong, max_length=length)
            return {"history": history, "soft": soft.tolist()} | self._scored(model, tokenizer, rows, length)

        return Stage("weak", about, make, title=pair_title(pair, seed))

    def _strong(self, pair: Pair, change: Change, training: Training, method: str, weak: Stage, seed: int) -> Stage:
        """A strong model, trained on half 2; result: its score on the test set."""
        limit, guiding = self.limit(change), self.guiding(change)
        about = self.about_training(seed, change, network=pair.student, training=training.about, method=method)
        guided = method.startswith("bird")
        if method == "bird-anchored":
            guiding["teacher_layer"] = guiding["layer"]  # the anchor is the student's network, not the weak model's
        if guided:
            about |= {"guidance": guiding, "pooling": pair.pooling}

        def make(folder: Path) -> dict[str, Any]:
            from .classifiers import certain, train_classifier

            rows = self._rows(seed, limit)
            texts, labels = texts_and_labels(rows.strong)
            model, tokenizer = classifier(pair.student, pooling_of(pair.student), seed, training.frozen)
            targets, guidance = certain(labels), None
            if method != "ceiling":
                targets = torch.tensor((weak.result(self.root) or {})["soft"])
            if guided:
                own = pooling_of(pair.student) if guiding["pooling"] == "last" else guiding["pooling"]
                pooled = {"pooling": own, "teacher_pooling": pair.pooling}
                if method == "bird-pretrained":
                    teacher, theirs = classifier(pair.teacher, pair.pooling, seed)
                elif method == "bird-anchored":
                    teacher, theirs = classifier(pair.student, own, seed, training.frozen)
                    pooled["teacher_pooling"] = own
                else:
                    weights = weak.folder(self.root)
                    teacher, theirs = trained_classifier(pair.teacher, pair.pooling, weights, self.device)
                guidance = Guidance(teacher, theirs, **controlled(method) | guiding | pooled)
            history = train_classifier(
                model, tokenizer, texts, targets, training, folder / "training", guidance=guidance, seed=seed,
                **self.surroundings,
            )  # fmt: skip
            return {"history": history} | self._scored(model, tokenizer, rows, training.max_length)

        parents = () if method == "ceiling" else (weak,)
        return Stage(f"strong-{method}", about, make, parents, pair_title(pair, seed))

    def _scored(self, model: Any, tokenizer: Any, rows: Questions, length: int | None) -> dict[str, Any]:
        from .classifiers import class_probabilities

        texts, labels = texts_and_labels(rows.test)
        probabilities = class_probabilities(model, tokenizer, texts, max_length=length)
        right = probabilities.argmax(1) == torch.tensor(labels)
        return {"accuracy": right.double().mean().item(), "right": right.int().tolist()}
