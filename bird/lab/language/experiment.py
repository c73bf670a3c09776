"""Recipes of language models run: from a recipe to stages, and to the cells of a table.

As for images, a stage's folder is named after everything that decides it, so what cells share is made once
and a killed run goes on where it was. The test prompts and rows are seen by the last stages alone.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...language.guidance import Guidance
from ..recipe import grid
from ..stages import Stage
from .data import Labelled
from .models import MODELS, locate
from .models import load as load_network
from .recipe import Change, Pair, Recipe, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .classifiers import Classifier

LIBRARIES = "datasets", "matplotlib", "scipy", "sklearn", "trl"  # for training, judges, and the report in the end
PROTOCOL = 1  # part of every stage's name: raised when the same settings no longer mean the same


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Args:
        networks: a key of the recipe's.
        variant: the same.
        method: the same.
        seed: the repetition.
        scores: by name, the stages whose results are the entry; `wanted` completes it.
        training: that made the model; None where nothing was trained.
    """

    networks: str
    variant: str
    method: str
    seed: int
    scores: dict[str, Stage]
    training: Stage | None

    @property
    def wanted(self) -> list[Stage]:
        """What completes it."""
        return [*self.scores.values()]

    def results(self, root: Path) -> dict[str, dict[str, Any]] | None:
        """Of every score; None unless all are there."""
        found = {name: stage.result(root) for name, stage in self.scores.items()}
        return {k: v for k, v in found.items() if v is not None} if all(found.values()) else None


@dataclass(frozen=True)
class Experiment(ABC):
    """What both kinds of recipes share; arguments as of `bird.lab.vision.experiment.Experiment`.

    Args:
        recipe: what to run.
        root: the folder of the stages' folders.
        device: where networks are trained; like the rest from here on it is no part of a stage's name.
        data_root: the folder of the data sets; None: the environment's BIRD_DATA.
        progress: bars for training and generation.
    """

    recipe: Recipe
    root: Path
    device: torch.device
    data_root: Path | None = None
    progress: bool = False

    def cells(self, **choice: Any) -> list[Cell]:
        """All cells, or those of some networks, variants, methods and seeds: arguments as of `bird.lab.recipe.grid`."""
        return [self._cell(*entry) for entry in grid(self.recipe, **choice)]

    def check(self) -> None:
        """Look before hours of work: are the networks there, and the libraries?

        Raises:
            FileNotFoundError: a network is missing: what to install.
            ImportError: a library is.
        """
        for library in LIBRARIES:
            if importlib.util.find_spec(library) is None:
                raise ImportError(f"{library} is not installed: pip install 'bird-kernels[language]'")
        for pair in self.recipe.networks.values():
            locate(pair.teacher)
            locate(pair.student)

    def prompts(self, seed: int) -> list[str]:
        """What is asked of students, as text; nothing where texts are classified."""
        return []

    @abstractmethod
    def _cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""

    def change(self, pair: Pair, variant: str) -> tuple[Change, Training]:
        """A variant, and how its students are trained."""
        change = self.recipe.variants[variant]
        own = {"lr": pair.lr} | {name: getattr(change, name) for name in ("epochs", "batch_size")}
        return change, replace(
            self.recipe.transfer, **{name: value for name, value in own.items() if value is not None}
        )

    def limit(self, change: Change) -> int | None:
        """How many rows count: the variant's number before the recipe's."""
        return self.recipe.data.limit if change.limit is None else change.limit

    def guiding(self, change: Change) -> dict[str, Any]:
        """Options of `Guidance`, the variant's before the recipe's."""
        own = {name: getattr(change, name) for name in ("alpha", "beta", "rows", "completion_only")}
        return asdict(self.recipe.guidance) | {name: value for name, value in own.items() if value is not None}

    def about(self, seed: int | None, **more: Any) -> dict[str, Any]:
        """What a stage's results depend on, for its folder."""
        return {"protocol": PROTOCOL, "data": self.recipe.data.source, "seed": seed} | more

    def trained(
        self,
        model: Classifier,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        targets: torch.Tensor,
        training: Training,
        folder: Path,
        *,
        seed: int,
        guidance: Guidance | None = None,
    ) -> dict[str, Any]:
        """A classifier trained in place; its history."""
        from .classifiers import train_classifier

        return train_classifier(
            model,
            tokenizer,
            texts,
            targets,
            training,
            folder / "training",
            guidance=guidance,
            seed=seed,
            device=self.device,
            progress=self.progress,
        )


def load(network: str, head: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A network of one's own, as it was published. Reading SmolLM2's file takes half a minute, so two are kept."""
    return deepcopy(_kept(network, head))


@lru_cache(maxsize=2)
def _kept(network: str, head: str) -> tuple[Any, PreTrainedTokenizerBase]:
    return load_network(network, head)


def classifier(network: str, pooling: str, seed: int) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A pretrained backbone with a new head for two classes, and its tokenizer."""
    from .classifiers import Classifier

    backbone, tokenizer = load(network, "encoder")
    return Classifier(backbone, pooling, seed=seed), tokenizer  # type: ignore[arg-type]


def trained_classifier(
    network: str, pooling: str, folder: Path, device: torch.device
) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """The same with the weights that a stage left in its folder, in eval mode.

    Raises:
        ValueError: they are gone or damaged; which folder to delete.
    """
    model, tokenizer = classifier(network, pooling, 0)
    try:
        model.restore(folder / "training")
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}\nDelete the whole folder {folder}, and it is made again") from error
    return model.to(device).eval(), tokenizer


def pooling_of(network: str) -> str:
    """How a student is read: encoders by the mean of their tokens, decoders by the last one."""
    return "mean" if network in MODELS and MODELS[network].encoder else "last"


def texts_and_labels(rows: Sequence[Labelled]) -> tuple[list[str], list[int]]:
    """Rows as two columns."""
    return [row.text for row in rows], [row.label for row in rows]


def pair_title(pair: Pair, seed: int) -> str:
    """What a stage is called."""
    return f"{pair.teacher}, {pair.student}, seed {seed}"
