"""CKA of each layer of one network with each layer of another over a data set, as a matrix and as a heat map."""

from __future__ import annotations

import csv
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bird_kernels.inputs import require_choice
from bird_kernels.matrix import Hsics, hsic_matrix
from bird_kernels.moments import MIN_ROWS

from .features import Pooler, Pools, evaluating, find_layers, first_tensor, masks_of, top_layers, unwrap
from .files import atomic, write_json
from .taps import Taps

INK, MOST_NUMBERED = "#333333", 14  # with more layers than this on an axis, the cells are too small for numbers


@dataclass(frozen=True)
class Similarity:
    """The result of `compare`.

    Args:
        matrix: CKA of each layer of a (rows) with each of b (columns), fp64.
        layers_a: layers of a, one per row of the matrix.
        layers_b: layers of b, one per column.
        estimator: "biased" or "unbiased", with which HSIC was computed in each batch.
        batches: how many batches were used.
        samples: how many samples these batches held.
        names: display names of the two networks.
    """

    matrix: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    layers_a: tuple[str, ...]
    layers_b: tuple[str, ...]
    estimator: str
    batches: int
    samples: int
    names: tuple[str, str] = ("a", "b")

    @classmethod
    def load(cls, folder: str | Path) -> Similarity:
        """Read what `save` wrote into a folder.

        Raises:
            OSError: ``cka.json`` cannot be read.
            ValueError: its contents are not what `save` writes.
        """
        path = Path(folder) / "cka.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            cells = about.pop("cka")
            if not all(cell is None or type(cell) in (int, float) for row in cells for cell in row):
                raise ValueError("a cell that is no number")
            matrix = np.array(cells, dtype=np.float64)  # None becomes NaN
            fields: dict[str, Any] = {key: tuple(a) if isinstance(a, list) else a for key, a in about.items()}
            found = cls(matrix, **fields)
            if matrix.shape != (len(found.layers_a), len(found.layers_b)):
                raise ValueError(f"a matrix {list(matrix.shape)} of other layers")
            require_choice(estimator=found.estimator)
            if not all(isinstance(about.get(key, []), list) for key in ("layers_a", "layers_b", "names")):
                raise ValueError("names that are no list")
            texts = (*found.layers_a, *found.layers_b, *found.names)
            if len(found.names) != 2 or not all(isinstance(text, str) for text in texts):
                raise ValueError("names that are no texts")
            if any(type(number) is not int or number < 0 for number in (found.batches, found.samples)):
                raise ValueError("numbers of batches and samples that are none")
        except (RecursionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what Similarity.save writes ({error}): compare again") from error
        return found

    def save(self, folder: str | Path, *, title: str = "CKA, layer by layer") -> None:
        """Write ``cka.csv`` (a table with the layers' names), ``cka.json`` (everything), and the pictures ``cka.png``
        (`picture`) and ``trend.png`` (`trend`).

        Each file is written atomically: it is complete or absent. The folder is created.

        Raises:
            ImportError: matplotlib is missing; the CSV and JSON files are written all the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / "cka.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["layer", *self.layers_b])
            writer.writerows([name, *row] for name, row in zip(self.layers_a, self.matrix.tolist(), strict=True))
        about = {name: value for name, value in vars(self).items() if name != "matrix"}
        about["cka"] = [[None if math.isnan(value) else value for value in row] for row in self.matrix.tolist()]
        write_json(about, folder / "cka.json")
        self.picture(folder / "cka.png", title=title)
        self.trend(folder / "trend.png", title=title)

    def picture(self, path: str | Path, *, title: str = "CKA, layer by layer") -> None:
        """Draw the heat map as the PNG file ``path``, atomically; the first layers are in the lower left corner.

        Raises:
            ImportError: matplotlib is missing.
        """
        rows, columns = self.matrix.shape
        numbers = max(rows, columns) <= MOST_NUMBERED
        cell = 0.42 if numbers else 0.18
        lowest = min(0.0, np.nanmin(self.matrix))
        with self._axes(path, title, (2.5 + cell * max(columns, 5), 1.5 + cell * max(rows, 5))) as axes:
            image = axes.imshow(self.matrix, origin="lower", cmap="magma", vmin=lowest, vmax=1.0)
            axes.set_xticks(range(columns), self.layers_b, rotation=90, fontsize=7)
            axes.set_yticks(range(rows), self.layers_a, fontsize=7)
            axes.set_xlabel(self.names[1], color=INK)
            axes.set_ylabel(self.names[0], color=INK)
            if numbers:
                for (i, j), value in np.ndenumerate(self.matrix):
                    colour = "white" if value < 0.6 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            bar = axes.figure.colorbar(image, ax=axes, label="CKA")
            bar.outline.set_visible(False)

    def trend(self, path: str | Path, *, title: str = "CKA over depth") -> None:
        """Draw CKA over the layers of a as the PNG file ``path``, atomically.

        One line is each layer's CKA with the layer of b that is most like it; the other, where both networks have the
        same number of layers, with the layer of b at the same place (the matrix's diagonal).

        Raises:
            ImportError: matplotlib is missing.
        """
        rows, columns = self.matrix.shape
        lines = {f"the most similar layer of {self.names[1]}": np.fmax.reduce(self.matrix, axis=1)}
        if rows == columns:
            lines[f"the layer of {self.names[1]} at the same place"] = self.matrix.diagonal()
        with self._axes(path, title, (2.5 + 0.3 * max(rows, 5), 3.2)) as axes:
            for (label, values), colour in zip(lines.items(), ("#0072B2", "#D55E00"), strict=False):
                axes.plot(range(rows), values, marker="o", markersize=4, label=label, color=colour)
            axes.set_xticks(range(rows), self.layers_a, rotation=90, fontsize=7)
            axes.set_xlabel(self.names[0], color=INK)
            axes.set_ylabel("CKA with", color=INK)
            axes.set_ylim(min(0.0, np.nanmin(self.matrix)), 1.03)
            axes.grid(axis="y", color="#EEEEEE")
            axes.legend(frameon=False, fontsize=8)

    @contextmanager
    def _axes(self, path: str | Path, title: str, size: tuple[float, float]) -> Iterator[Any]:
        """Yield the axes of a figure of ``size`` inches that becomes the PNG file ``path``."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the pictures need matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=size, facecolor="white")
        axes = figure.subplots()
        axes.set_title(f"{title}\n{self.estimator}, {self.samples} samples", fontsize=10, color=INK, loc="left")
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
        yield axes
        with atomic(Path(path)) as partial:
            figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")


@torch.no_grad()
def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    *,
    layers_a: str | Sequence[str] | None = None,
    layers_b: str | Sequence[str] | None = None,
    estimator: str = "unbiased",
    pool: Pools = "mean",
    names: tuple[str, str] = ("a", "b"),
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Similarity:
    r"""CKA of each layer of ``model_a`` with each of ``model_b``, over all the batches of a loader.

    .. math::  \frac{\sum_b \mathrm{HSIC}(K_b, L_b)}
                    {\sqrt{\sum_b \mathrm{HSIC}(K_b, K_b)}\,\sqrt{\sum_b \mathrm{HSIC}(L_b, L_b)}}

    (The minibatch CKA of Nguyen et al. 2021; every batch b has the same weight.) With the unbiased estimator the
    expected sums do not depend on the batch size; with the biased one smaller batches give larger values. Memory is
    that of one batch.

    Both models run in eval mode, without gradients, each on the device of its parameters; afterwards every module is
    back in the mode that it had before.

    Args:
        model_a: a network, wrapped or not, see `bird.Taps`.
        model_b: another network, or the same one, which then runs once per batch.
        loader: batches of inputs: a tensor; a tuple or list, whose first element is used; or a mapping of keyword
            arguments, of which the first tensor is used if a model takes none of these names. Both models run on each
            batch. Means over tokens leave out the padding that a mapping tells of, see `bird.features.masks_of`.
        layers_a: module paths or globs, see `bird.features.find_layers`. None: of the outermost layers (the model's
            children, and the items of a ModuleList) those that run once and whose output ``pool`` turns into one row
            per sample. This is determined with the first batch, which runs once more.
        layers_b: the same for ``model_b``.
        estimator: "unbiased" (HSIC_1, Song et al. 2012) or "biased". Batches of fewer than 4 and 2 rows respectively
            are skipped.
        pool: how a layer's output becomes rows, see `bird.features.pool_rows`; or ``{layer: pool}``.
        names: display names of the two networks, on the axes of the heat map.
        device: where both run; afterwards they are moved back. None: each where its parameters are.
        progress: whether to show a progress bar, and in it the mean of the matrix so far.

    Returns:
        The matrix with the layers' names; its ``save(folder)`` writes the data and the heat map. A layer whose HSIC
        with itself is not positive has CKA 0.

    Raises:
        ValueError: no batch is large enough; a layer does not exist, or no outermost layer gives rows; also whatever
            `bird.Taps` and `bird_kernels.cka_matrix` raise.
    """
    require_choice(estimator=estimator)
    same = unwrap(model_a) is unwrap(model_b)
    total, left = length_hint(loader) or None, iter(loader)
    first = [*islice(left, layers_a is None or layers_b is None)]
    names_a = _names(model_a, layers_a, first, pool, device)
    names_b = names_a if same and layers_a is layers_b else _names(model_b, layers_b, first, pool, device)
    if isinstance(pool, Mapping) and not pool.keys() <= {*names_a, *names_b}:
        raise ValueError(f"pool names {[*pool]}, but the layers are {[*names_a]} and {[*names_b]}")
    runs = [(model_a, names_a), (model_b, names_b)]
    if same:
        runs = [(model_a, tuple(dict.fromkeys(names_a + names_b)))]
    itself = len(runs) == 1 and names_a == names_b
    sums: Hsics | None = None
    batches = samples = 0
    with ExitStack() as stack:
        feature_functions = [stack.enter_context(_tapped(model, layers, pool, device)) for model, layers in runs]
        bar = stack.enter_context(tqdm(total=total, desc="compare", unit="batch", disable=not progress))
        for batch in chain(first, left):
            features = [function(batch) for function in feature_functions]
            xs = [features[0][name] for name in names_a]
            ys = [features[-1][name].to(xs[0].device) for name in names_b]
            drawn = bar.update()  # at most ten times a second
            if len(xs[0]) < MIN_ROWS[estimator]:
                continue
            found = hsic_matrix(xs, None if itself else ys, estimator=estimator)
            sums = found if sums is None else Hsics(*(one + other for one, other in zip(sums, found, strict=True)))
            batches, samples = batches + 1, samples + len(xs[0])
            if drawn:  # reading the mean waits for the device
                bar.set_postfix_str(f"mean CKA {_cka(sums).nanmean().item():.4f}")
        if sums is not None and progress:
            bar.set_postfix_str(f"mean CKA {_cka(sums).nanmean().item():.4f}")
    if sums is None:
        raise ValueError(
            f'no batch of the loader has the {MIN_ROWS[estimator]} rows that estimator="{estimator}" needs'
        )
    return Similarity(_cka(sums).cpu().numpy(), names_a, names_b, estimator, batches, samples, names)


def _names(
    model: nn.Module, layers: str | Sequence[str] | None, first: list[Any], pool: Pools, device: Any
) -> tuple[str, ...]:
    """The requested layers; if None, the outermost ones that give one row per sample of the ``first`` batch, if any."""
    if layers is not None:
        return tuple(find_layers(model, layers))
    outermost = top_layers(model)
    rows: dict[str, list[int]] = {name: [] for name in outermost}
    found = {name: Pooler(model, name, layer, pool) for name, layer in outermost.items()}

    def look(name: str, _layer: nn.Module, _args: Any, output: Any) -> None:
        try:
            rows[name].append(len(found[name](output)))
        except (IndexError, RuntimeError, TypeError, ValueError):  # no features: a loss, a mask, one number a sample
            rows[name].append(-1)

    with ExitStack() as stack:
        for name, layer in outermost.items():
            stack.callback(layer.register_forward_hook(partial(look, name)).remove)
        if "torch._dynamo" in sys.modules:  # code compiled before these hooks existed would skip them: run eagerly
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        run = stack.enter_context(_running(model, device))
        for batch in first:
            run(batch)
    names = tuple(name for name in rows if rows[name] == [len(first_tensor(batch)) for batch in first])
    if first and not names:
        raise ValueError(f"no outermost layer of {type(model).__name__} gives rows of features: name layers inside")
    return names


def _cka(sums: Hsics) -> Tensor:
    """CKA from sums of HSIC, 0 where the HSIC of a layer with itself is not positive; NaN is kept."""
    own = sums.xx[:, None].sqrt() * sums.yy[None, :].sqrt()
    dead = (sums.xx <= 0)[:, None] | (sums.yy <= 0)[None, :]
    return torch.where(dead, 0.0, sums.xy / own)


@contextmanager
def _tapped(
    model: nn.Module, names: Sequence[str], pool: Pools, device: Any
) -> Iterator[Callable[[Any], dict[str, Tensor]]]:
    """Yield a function from a batch to the features ``{layer: [N, D]}`` of the named layers."""
    own = {name: pool[name] for name in names if name in pool} if isinstance(pool, Mapping) else pool
    with _running(model, device) as run, Taps(model, names, pool=own) as taps:

        def features(batch: Any) -> dict[str, Tensor]:
            taps.masks = masks_of(model, names, batch) if isinstance(batch, Mapping) else {}
            run(batch)
            return taps.pop()

        yield features


@contextmanager
def _running(model: nn.Module, device: Any) -> Iterator[Callable[[Any], object]]:
    """Yield a function that runs the model on a batch, in eval mode, on ``device`` if that is not None."""
    home = next((parameter.device for parameter in model.parameters()), None)
    place = home if device is None else torch.device(device)
    parameters = inspect.signature(unwrap(model).forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

    def run(batch: Any) -> object:
        if isinstance(batch, (tuple, list)):
            batch = batch[0]
        if isinstance(batch, Mapping):
            if takes_all or not parameters.keys().isdisjoint(batch):
                return model(**{name: _moved(value, place) for name, value in batch.items()})
            batch = first_tensor(batch)
        return model(_moved(batch, place))

    with evaluating(model), ExitStack() as stack:
        if place != home:
            model.to(place)
            stack.callback(model.to, home)
        yield run


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
