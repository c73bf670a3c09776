"""What both kinds of recipes of language models share: their checks, networks, and what names a stage's folder."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..experiment import Experiment, require_layer
from ..recipe import settings_of
from .data import Labelled
from .frozen import LowerBlocks, UpperBlocks, require_freezable
from .models import MODELS, load_description, load_network, locate_network
from .recipe import Change, LanguageRecipe, Pair, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .classifiers import Classifier

LATER = ("loss", "schedule", "until", "share", "gradients")  # younger than the names of stages
PROTOCOL = 1  # part of every stage's name; raised when the same settings give other results than before


@dataclass(frozen=True)
class LanguageExperiment(Experiment):
    """What both kinds of recipes of language models share."""

    recipe: LanguageRecipe

    extra = "language"
    libraries = "datasets", "matplotlib", "scipy", "sklearn", "trl"

    def check(self) -> None:
        """Check libraries, and that every network is there and has the layers that the guidance names."""
        super().check()
        for pair in self.recipe.networks.values():
            locate_network(pair.teacher)
            locate_network(pair.student)
            if self.recipe.transfer.frozen:
                require_freezable(load_description(pair.student)[0], self.recipe.transfer.frozen)
            self._check_layers(pair)

    def _check_layers(self, pair: Pair) -> None:
        """Check the layers that the guidance names, in any variant. A network is loaded only if one is named."""
        for name, network in (("layer", pair.student), ("teacher_layer", pair.teacher)):
            layers = {self.guiding(change)[name]: None for change in self.recipe.variants.values()}
            for layer in filter(None, layers):
                if name == "layer" and self.recipe.kind == "preference":
                    model: Any = fresh_network(network, "causal")[0]
                else:
                    frozen = self.recipe.transfer.frozen if name == "layer" else 0
                    model = classifier(network, pair.pooling, 0, frozen)[0]
                try:
                    require_layer(model, layer)
                except ValueError as error:
                    raise ValueError(f"guidance.{name} of {network}: {error}") from error

    def prompts(self, seed: int) -> list[str]:
        """The prompts that students answer, as text; none where texts are classified."""
        return []

    def change(self, pair: Pair, variant: str) -> tuple[Change, Training]:
        """A variant of the recipe, and how students are trained in it."""
        change = self.recipe.variants[variant]
        training = self.recipe.changed(self.recipe.transfer, change)
        return change, training if pair.lr is None or change.lr is not None else replace(training, lr=pair.lr)

    def limit(self, change: Change) -> int | None:
        """How many rows are trained on: the variant's number if it has one, else the recipe's."""
        return self.recipe.data.limit if change.limit is None else change.limit

    def guiding(self, change: Change) -> dict[str, Any]:
        """Options of `Guidance`: the variant's where it has them, else the recipe's."""
        return settings_of(self.recipe.changed(self.recipe.guidance, change), LATER)

    def about(self, seed: int, **more: Any) -> dict[str, Any]:
        """What every stage's results depend on, for its folder's name, and more."""
        data = self.recipe.data
        return {"protocol": PROTOCOL, "data": data.source, "seed": seed} | data.about | more

    def about_training(self, seed: int, change: Change, **more: Any) -> dict[str, Any]:
        """The same for a stage that trains on what is not held out, on as many rows as a variant takes."""
        data = self.recipe.data
        return self.about(seed, limit=self.limit(change), held_out=data.held_out, words=data.words, **more)

    @property
    def surroundings(self) -> dict[str, Any]:
        """Options of both kinds of trainers that change no result: the device, and whether bars are shown."""
        return {"device": self.device, "progress": bool(self.progress)}


def fresh_network(network: str, head: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """A copy of a published network, which the caller may change, and its tokenizer.

    The last two networks are kept in memory: reading SmolLM2's file takes half a minute.
    """
    return deepcopy(_kept(network, head))


@lru_cache(maxsize=2)
def _kept(network: str, head: str) -> tuple[Any, PreTrainedTokenizerBase]:
    return load_network(network, head)


@lru_cache(maxsize=1)
def _lower_blocks(network: str, blocks: int) -> LowerBlocks:
    """Shared by all students of a process, so that a text of the test set passes through them once."""
    return LowerBlocks(fresh_network(network, "encoder")[0], blocks)


def classifier(network: str, pooling: str, seed: int, frozen: int = 0) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A pretrained backbone with a new head for two classes, and its tokenizer; its ``frozen`` lowest blocks apart."""
    from .classifiers import Classifier

    backbone, tokenizer = fresh_network(network, "encoder")
    if frozen:
        backbone = UpperBlocks(backbone, _lower_blocks(network, frozen))
    return Classifier(backbone, pooling, seed=seed), tokenizer  # type: ignore[arg-type]


def trained_classifier(
    network: str, pooling: str, folder: Path, device: torch.device
) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A classifier with the weights that a stage trained, in eval mode, and its tokenizer.

    Raises:
        ValueError: the weights are missing or damaged; the error names the folder to delete.
    """
    from .classifiers import WEIGHTS
    from .training import restore

    model, tokenizer = classifier(network, pooling, 0)
    try:
        restore(model, folder / "training" / WEIGHTS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}\nDelete the whole folder {folder}, and it is made again") from error
    return model.to(device), tokenizer


def pooling_of(network: str) -> str:
    """The pooling of a student's tokens: their mean for encoders, the last one for decoders."""
    return "mean" if network in MODELS and MODELS[network].encoder else "last"


def controlled(method: str) -> dict[str, Any]:
    """The options of `Guidance` that the end of a method's name says."""
    return {
        "estimator": "unbiased" if method.endswith("unbiased") else "biased",
        "permuted": method.endswith("permuted"),
    }


def texts_and_labels(rows: Sequence[Labelled]) -> tuple[list[str], list[int]]:
    """The texts of rows, and their labels."""
    return [row.text for row in rows], [row.label for row in rows]


def pair_title(pair: Pair, seed: int) -> str:
    """A stage's title: its networks and its seed."""
    return f"{pair.teacher}, {pair.student}, seed {seed}"
