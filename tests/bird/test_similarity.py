"""Layer by layer over a loader, against HSICs of the literal formula in fp64, batch by batch; files; modes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bird import Similarity, compare
from bird_kernels import reference


class Net(nn.Sequential):
    """A convolution, a normalisation that has seen data, a map, dropout, a head; counts its calls."""

    def __init__(self, channels: int, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 6, 2),
            nn.Dropout(0.5), nn.Flatten(), nn.Linear(54, 5),
        )  # fmt: skip
        self.calls = 0
        self(torch.randn(20, 3, 6, 6) + 1)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


LAYERS_A, LAYERS_B = ("0", "1", "3", "6"), ("1", "6")


NAMED: dict[str, Any] = dict(layers_a=LAYERS_A, layers_b=LAYERS_B, progress=False)


@pytest.fixture
def nets() -> tuple[Net, Net]:
    return Net(4, 0), Net(7, 1)


@pytest.fixture
def batches() -> list[Tensor]:
    """The last is too small for the unbiased estimator."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 3, 6, 6, generator=generator) + 1 for n in (12, 9, 3)]


def rows(net: Net, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """The layers' features, means over space, by running the layers one by one."""
    net.eval()
    found = {}
    with torch.no_grad():
        for name, layer in net.named_children():
            x = layer(x)
            found[name] = (x.mean((2, 3)) if x.ndim == 4 else x).clone()
    return [found[name] for name in names]


def direct(a: Net, b: Net, batches: list[Tensor], estimator: str) -> Tensor:
    """Sums of HSICs over the batches, then CKA."""

    def hsic(x: Tensor, y: Tensor) -> Tensor:
        return reference.hsic(x, y, None, estimator)

    sums = torch.zeros(3, len(LAYERS_A), len(LAYERS_B), dtype=torch.float64)
    for batch in batches:
        for i, x in enumerate(rows(a, LAYERS_A, batch)):
            for j, y in enumerate(rows(b, LAYERS_B, batch)):
                sums[:, i, j] += torch.stack([hsic(x, y), hsic(x, x), hsic(y, y)])
    return sums[0] / (sums[1] * sums[2]).sqrt()


@pytest.mark.parametrize(("estimator", "used"), [("unbiased", 2), ("biased", 3)])
def test_is_the_ratio_of_summed_hsics(nets: tuple[Net, Net], batches: list[Tensor], estimator: str, used: int) -> None:
    found = compare(*nets, batches, **NAMED, estimator=estimator)
    assert found.matrix.dtype == np.float64
    np.testing.assert_allclose(found.matrix, direct(*nets, batches[:used], estimator), rtol=0, atol=2e-5)
    assert (found.layers_a, found.layers_b, found.estimator) == (LAYERS_A, LAYERS_B, estimator)
    assert (found.batches, found.samples) == (used, sum(map(len, batches[:used])))


def test_a_network_beside_itself_runs_once(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    net, _ = nets
    found = compare(net, net, batches, layers_a=LAYERS_A, layers_b=LAYERS_A, progress=False)
    assert net.calls == len(batches)
    np.testing.assert_allclose(found.matrix, found.matrix.T, rtol=0, atol=1e-15)
    np.testing.assert_allclose(found.matrix.diagonal(), 1, rtol=1e-12)
    some = compare(net, net, batches, **NAMED)
    assert net.calls == 2 * len(batches)
    np.testing.assert_allclose(some.matrix, found.matrix[:, [1, 3]], rtol=0, atol=1e-6)


class Odd(nn.Module):
    """A network whose children are not all layers with features of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Tanh()])
        self.twice = nn.Sigmoid()
        self.score = nn.Linear(4, 1)  # one number a sample
        self.parts = nn.Flatten(0, 1)  # as many rows as samples and channels
        self.head = nn.Linear(4, 5)
        self.largest = nn.Softmax(1)
        self.largest.forward = lambda x: x.argmax(1)  # type: ignore[method-assign]
        self.auxiliary = nn.Linear(4, 5)  # in training only
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.twice(self.twice(x))
        self.parts(x)
        x = x.mean((2, 3))
        logits = self.head(x)
        self.score(x)
        self.largest(logits)
        return self.criterion(logits, self.auxiliary(x)) if self.training else logits


def test_without_names_it_takes_the_outermost_layers(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    net, odd, names = nets[0], Odd(), ("stem", "blocks.0", "blocks.1", "head")
    found = compare(net, odd, iter(batches), progress=False)
    assert (found.layers_a, found.layers_b) == (tuple("0123456"), names)
    assert (found.batches, found.samples, net.calls) == (2, 21, len(batches) + 1)
    named = compare(net, odd, batches, layers_a=tuple("0123456"), layers_b=names, progress=False)
    np.testing.assert_array_equal(found.matrix, named.matrix)
    assert all(module.training and not module._forward_hooks for model in (net, odd) for module in model.modules())
    half = compare(net, odd, batches, layers_b="head", progress=False)
    np.testing.assert_allclose(half.matrix, found.matrix[:, 3:], rtol=0, atol=1e-6)

    net.calls = 0
    itself = compare(net, net, batches, progress=False)
    assert net.calls == len(batches) + 1
    np.testing.assert_allclose(itself.matrix.diagonal(), 1, rtol=1e-12)
    flat = compare(net, net, batches, pool="flatten", progress=False)
    assert flat.layers_a == tuple("0123456")
    assert flat.matrix[1, 0] != itself.matrix[1, 0]


def test_a_compiled_network_shows_its_outermost_layers(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    wanted = compare(*nets, batches, progress=False)
    nets[1].compile(backend="eager")
    found = compare(torch.compile(nets[0], backend="eager"), nets[1], batches, progress=False)  # type: ignore[arg-type]
    torch.compiler.reset()
    used = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval(), backend="eager")
    with torch.no_grad():
        used(batches[0])
    with pytest.raises(RuntimeError, match=r"no features from .*compiled and called before"):
        compare(used, nets[1], batches[:1], progress=False)  # type: ignore[arg-type]
    torch.compiler.reset()
    assert (found.layers_a, found.layers_b) == (tuple("0123456"), tuple("0123456"))
    np.testing.assert_allclose(found.matrix, wanted.matrix, rtol=0, atol=1e-6)


def test_batches_of_other_forms(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    wanted = compare(*nets, batches, **NAMED).matrix
    for form in (lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: {"input": x}):
        np.testing.assert_array_equal(compare(*nets, map(form, batches), **NAMED).matrix, wanted)
        few = compare(*nets, map(form, batches), progress=False)
        np.testing.assert_allclose(few.matrix[np.ix_([0, 1, 3, 6], [1, 6])], wanted, rtol=0, atol=1e-6)


def test_leaves_the_networks_as_they_were(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    """Each module its own mode, no hooks, no gradients, the running statistics untouched; after an error too."""
    a, b = nets
    a.train()
    a[1].eval()
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}

    def failing() -> Iterator[Tensor]:
        yield batches[0]
        raise KeyError("the loader fails")

    compare(a, b, batches, **NAMED)
    with pytest.raises(KeyError, match="the loader fails"):
        compare(a, b, failing(), **NAMED)
    assert [m.training for m in a.modules()] == [True, True, False, True, True, True, True, True]
    assert all(m.training for m in b.modules())
    for module in (*a.modules(), *b.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in a.parameters())
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_constant_layer_has_none(nets: tuple[Net, Net], batches: list[Tensor]) -> None:
    a, b = nets
    nn.init.zeros_(a[6].weight)
    found = compare(a, b, batches, **NAMED).matrix
    assert (found[3] == 0).all()
    assert (found[:3] != 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"estimator": "?"}, "estimator must be one of"),
        ({"layers_a": "9"}, "no layer is called"),
        ({"loader": []}, "no batch of the loader has the 4 rows"),
        ({"loader": [], "layers_a": None}, "no batch of the loader has the 4 rows"),
        ({"model_a": nn.Sequential(nn.Flatten(0, 1)), "layers_a": None}, "no outermost layer of Sequential gives rows"),
    ],
)
def test_what_is_refused(nets: tuple[Net, Net], batches: list[Tensor], change: dict[str, Any], words: str) -> None:
    options = dict(loader=batches, **NAMED)
    with pytest.raises(ValueError, match=words):
        compare(**dict(zip(("model_a", "model_b"), nets, strict=True)) | options | change)


def test_shows_a_bar(nets: tuple[Net, Net], batches: list[Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        for layers in (LAYERS_A, None):
            found = compare(*nets, batches, layers_a=layers, layers_b=LAYERS_B, progress=progress)
            shown = capsys.readouterr().err
            assert ("3/3" in shown) == progress
            assert (f"mean CKA {found.matrix.mean():.4f}" in shown) == progress


FOUND = Similarity(
    np.array([[0.25, -0.125, 1.0], [0.5, np.nan, 0.75]]), ("a, b", "c"), ("x", "y", "z"), "biased", 3, 40
)


def test_saves_data_and_a_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    folder = tmp_path / "new" / "folder"
    FOUND.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cka.csv", "cka.json", "cka.png", "trend.png"]
    with (folder / "cka.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0] == ["layer", "x", "y", "z"]
    assert [row[0] for row in table[1:]] == ["a, b", "c"]
    np.testing.assert_array_equal([[float(cell) for cell in row[1:]] for row in table[1:]], FOUND.matrix)
    about = json.loads((folder / "cka.json").read_text(encoding="utf-8"))
    assert about.pop("cka") == [[0.25, -0.125, 1.0], [0.5, None, 0.75]]  # there is no NaN in JSON
    assert about == dict(
        estimator="biased", batches=3, samples=40, layers_a=["a, b", "c"], layers_b=["x", "y", "z"], names=["a", "b"]
    )  # fmt: skip
    for name in ("cka.png", "trend.png"):
        picture = image.imread(folder / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].reshape(-1, 3).std(0).max() > 0.1  # not blank


def test_the_trend_is_the_largest_of_each_row_and_the_diagonal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    lines = []
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, path, **_: (Path(path).touch(), lines.append(self.axes[0].get_lines()))
    )
    FOUND.trend(tmp_path / "depth.png")
    square = Similarity(np.array([[0.2, 0.4], [0.6, 0.5]]), ("s", "t"), ("u", "v"), "biased", 1, 4, ("one", "two"))
    square.trend(str(tmp_path / "square.png"))
    found = [{line.get_label(): list(line.get_ydata()) for line in drawn} for drawn in lines]
    assert found == [
        {"the most similar layer of b": [1.0, 0.75]},
        {"the most similar layer of two": [0.4, 0.6], "the layer of two at the same place": [0.2, 0.5]},
    ]


def test_without_matplotlib_the_data_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        FOUND.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cka.csv", "cka.json"]
