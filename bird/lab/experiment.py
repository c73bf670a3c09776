"""Recipes run: from a recipe to stages, from stages to the cells of a table, and from these to a page.

A stage's folder is named after everything that decides it, so what cells share is made once and a killed run goes on
where it was. Test data are seen by the last stages alone.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..features import find_layers
from .recipe import grid
from .stages import Stage

Group = tuple[str, str]  # networks, variant
Results = dict[str, dict[int, dict[str, dict[str, Any]]]]  # method, seed: what each of a cell's stages came to


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Args:
        networks: a key of the recipe's.
        variant: the same.
        method: the same; "" for what comes before any.
        seed: the repetition.
        scores: by name, the stages whose results are the entry; `wanted` completes it.
        training: that made the model; None where nothing was trained.
    """

    networks: str
    variant: str
    method: str
    seed: int
    scores: dict[str, Stage]
    training: Stage | None = None

    @property
    def wanted(self) -> list[Stage]:
        """What completes it."""
        return [*self.scores.values()]

    def results(self, root: Path) -> dict[str, dict[str, Any]] | None:
        """Of every score and, where something was trained, of ``training``; None unless all scores are there."""
        found = {name: stage.result(root) for name, stage in self.scores.items()}
        if not all(found.values()):
            return None
        training = {} if self.training is None else {"training": self.training.result(root) or {}}
        return {name: result for name, result in found.items() if result is not None} | training


@dataclass(frozen=True)
class Experiment(ABC):
    """A recipe as stages.

    Args:
        recipe: what to run.
        root: the folder of the stages' folders.
        device: where networks are trained; like the rest from here on it is no part of a stage's name.
        data_root: the folder of the data sets; None: the environment's BIRD_DATA.
        progress: bars; None for on a terminal only.
    """

    recipe: Any
    root: Path
    device: torch.device
    data_root: Path | None = None
    progress: bool | None = None

    libraries: ClassVar[tuple[str, ...]]  # for training, scores and the report in the end

    @property
    @abstractmethod
    def extra(self) -> str:
        """The extra of the package that brings them."""

    def cells(self, **choice: Any) -> list[Cell]:
        """All cells, or those of some networks, variants, methods and seeds: arguments as of `bird.lab.recipe.grid`."""
        return [self.cell(*entry) for entry in grid(self.recipe, **choice)]

    @abstractmethod
    def cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""

    def check(self) -> None:
        """Look before hours of work: is all there that will be needed?

        Raises:
            FileNotFoundError: data or a network is missing: what is expected where.
            ImportError: a library is.
            ValueError: the recipe asks for something that there is not.
        """
        for library in self.libraries:
            self.require_library(library)

    def require_library(self, library: str) -> None:
        """Raises an ImportError, with what to do, where it is not installed."""
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"{library} is not installed: pip install 'bird-kernels[{self.extra}]'")


def require_layer(network: nn.Module, layer: str) -> None:
    """Raises a ValueError unless the network has the layer, by its path: a glob may match many, and is none's name."""
    if layer not in find_layers(network, layer):
        raise ValueError(f"{layer!r} is a glob: name one layer, by its path")


def collect(experiment: Experiment, cells: Sequence[Cell]) -> tuple[dict[Group, Results], list[Cell]]:
    """What is done, of seeds that all methods of a group have; and what is missing.

    Raises:
        ValueError: there is no such seed.
    """
    done: dict[Group, Results] = {}
    missing = []
    for cell in cells:
        of_method = done.setdefault((cell.networks, cell.variant), {}).setdefault(cell.method, {})
        results = cell.results(experiment.root)
        if results is None:
            missing.append(cell)
        else:
            of_method[cell.seed] = results
    groups = {}
    for group, methods in done.items():
        seeds = sorted(set.intersection(*map(set, methods.values())))
        if seeds:
            groups[group] = {method: {seed: of[seed] for seed in seeds} for method, of in methods.items()}
    if not groups:
        done_of = f"{len(cells) - len(missing)} of {len(cells)} cells of {experiment.recipe.name} are done"
        raise ValueError(f"{done_of} in {experiment.root}, and no seed of all methods: bird run it, or choose --method")
    return groups, missing


def named(*parts: str) -> str:
    """What there is of the parts of a name, in a line."""
    return ", ".join(filter(None, parts))


def report_page(
    recipe: Any, sections: Mapping[Group, Sequence[str]], missing: Sequence[Cell], *, closing: Sequence[str] = ()
) -> str:
    """Markdown: a section for each pair of networks and variant, and what is not done."""
    parts = [f"# {recipe.title}\n"]
    for group, section in sections.items():
        parts += [f"## {named(*group)}\n", *section]
    parts += closing
    if missing:
        first = missing[0]
        label = named(first.networks, first.variant, recipe.titles[first.method], f"seed {first.seed}")
        parts.append(f"{len(missing)} cells are not done, the first: {label}.\n")
    return "\n".join(parts)


def repetitions(results: Results) -> str:
    """How many seeds there are."""
    seeds = len(next(iter(results.values())))
    return f"{seeds} seed{'s' if seeds > 1 else ''}"
