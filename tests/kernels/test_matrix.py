"""Layer by layer: each entry against the literal formula of its pair in fp64; memory; a peer, where it is right."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bird_kernels
from bird_kernels import matrix, reference

# Widths of two networks' layers: wide (strips of Gram matrices), and so narrow that products of columns are cheaper.
WIDTHS = {"gram": ((5, 90, 33), (70, 4)), "cross": ((3, 2, 4, 1), (1, 5, 2))}


def network(
    widths: Sequence[int],
    n: int,
    seed: int,
    device: torch.device,
    mean: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Layers that share a part of their geometry with those of any other seed."""
    generator = torch.Generator().manual_seed(1000)
    common = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)

    def layer(width: int) -> Tensor:
        entries = torch.randn(n, width, generator=generator, dtype=torch.float64)
        return entries + common @ torch.randn(4, width, generator=generator, dtype=torch.float64) + mean

    return [layer(width).to(device, dtype) for width in widths]


def literal(xs: Sequence[Tensor], ys: Sequence[Tensor], name: str, estimator: str, mask: Tensor | None) -> Tensor:
    function = getattr(reference, name)
    return torch.stack([torch.stack([function(x, y, mask, estimator) for y in ys]) for x in xs])


@pytest.fixture(params=[20, 128])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a strip: 61 are three whole ones and one of a row, or fit into one."""
    monkeypatch.setattr(matrix, "ROWS", request.param)
    return request.param


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("form", WIDTHS)
def test_is_the_literal_formula(
    form: str, mean: float, masked: bool, estimator: str, rows: int, device: torch.device
) -> None:
    xs, ys = (network(widths, 61, seed, device, mean) for seed, widths in enumerate(WIDTHS[form]))
    mask = torch.arange(61, device=device) % 5 != 2 if masked else None
    options: dict[str, Any] = dict(estimator=estimator, mask=mask)
    for others in (ys, None):
        found = bird_kernels.cka_matrix(xs, others, **options)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), literal(xs, others or xs, "cka", estimator, mask), rtol=0, atol=2e-6)
        hsics = matrix.hsic_matrix(xs, others, **options)
        for got, side in ((hsics.xx, xs), (hsics.yy, others or xs)):
            wanted = literal(side, side, "hsic", estimator, mask).diagonal()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
        wanted = literal(xs, others or xs, "hsic", estimator, mask)
        allowed = 2e-6 * torch.outer(hsics.xx, hsics.yy).sqrt()  # HSIC of unrelated layers is a small difference
        assert ((hsics.xy - wanted).abs() <= allowed).all()
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", WIDTHS)
def test_the_forms_are_chosen_by_their_operations(
    form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    for name in ("_by_strips", "_by_features"):
        original = getattr(matrix, name)
        monkeypatch.setattr(matrix, name, lambda *a, name=name, f=original: taken.append(name) or f(*a))
    xs, ys = (network(widths, 61, seed, device) for seed, widths in enumerate(WIDTHS[form]))
    bird_kernels.cka_matrix(xs, ys)
    bird_kernels.cka_matrix(xs)
    assert taken == [{"gram": "_by_strips", "cross": "_by_features"}[form]] * 2


def test_other_numbers(estimator: str, device: torch.device) -> None:
    """fp64 stays fp64, halves are widened or multiplied as they are, scales and rows of tokens do not matter."""
    exact = network((5, 90), 60, 0, device, 3.0, torch.float64)
    truth = literal(exact, exact, "cka", estimator, None)
    torch.testing.assert_close(bird_kernels.cka_matrix(exact, estimator=estimator), truth, rtol=0, atol=1e-13)
    scaled = [(1e-12 * exact[0]).float(), (1e12 * exact[1]).float()]
    found = bird_kernels.cka_matrix([s.unflatten(0, (4, 15)) for s in scaled], estimator=estimator, row_dims=2)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6)
    halves = [x.bfloat16() for x in exact]
    truth = literal(halves, halves, "cka", estimator, None)
    found = bird_kernels.cka_matrix(halves, estimator=estimator)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=2e-6 if device.type == "cpu" else 1e-2)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-162, 1e200])
def test_fp64_whose_squares_leave_its_range(scale: float, estimator: str, device: torch.device) -> None:
    xs = network((5, 90), 60, 0, device, 3.0, torch.float64)
    xs[0][0] *= 1e4  # a row that dominates
    found = bird_kernels.cka_matrix([scale * xs[0]], xs, estimator=estimator)
    torch.testing.assert_close(found, bird_kernels.cka_matrix(xs[:1], xs, estimator=estimator), rtol=0, atol=1e-13)
    constant = matrix.hsic_matrix([torch.full_like(xs[0], scale)], xs, estimator=estimator)
    assert constant.xx.item() == 0.0


@pytest.mark.parametrize("form", WIDTHS)
def test_layers_without_variance_and_nan(form: str, estimator: str, device: torch.device) -> None:
    xs = network(WIDTHS[form][0], 37, 0, device)
    before = bird_kernels.cka_matrix(xs, estimator=estimator)
    xs[0] = torch.full_like(xs[0], 0.1)
    xs[2] = xs[2].clone()
    xs[2][3, 1] = torch.inf
    found = bird_kernels.cka_matrix(xs, estimator=estimator)
    assert (found[0, :2] == 0).all()
    assert found[2].isnan().all()
    assert found[:, 2].isnan().all()
    assert found[1, 1] == before[1, 1]
    xs.append(torch.eye(37, device=device))  # has variance, but no unbiased HSIC with itself but rounding
    hsics = matrix.hsic_matrix(xs, estimator=estimator)
    assert hsics.xx[0] == 0
    assert (hsics.xx[-1] == 0) == (estimator == "unbiased")
    assert (hsics.xy[0, :2] == 0).all()


def test_rows_too_few_under_a_mask_give_nan(device: torch.device) -> None:
    xs = network((5, 7), 9, 0, device)
    mask = torch.arange(9, device=device) < 3
    assert bird_kernels.cka_matrix(xs, estimator="unbiased", mask=mask).isnan().all()


def test_has_no_gradient(device: torch.device) -> None:
    xs = [x.requires_grad_() for x in network((5, 7), 9, 0, device)]
    assert not bird_kernels.cka_matrix(xs).requires_grad


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned, and of the largest batch of products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                if function is torch.ops.aten.bmm.out:
                    self.products = max(self.products, tensor.numel())
        return out


def test_strips_are_the_largest_tensors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No [layers, n, n]; and strips are lower than usual where there is too little room."""
    xs = network((60, 61, 62, 63, 64, 65), 300, 0, device)
    wanted = bird_kernels.cka_matrix(xs)
    for room, rows in ((1 << 24, 128), (6 * 300 * 7, 7)):
        monkeypatch.setattr(matrix, "LARGEST_STRIPS", room)
        with Largest() as seen:
            found = bird_kernels.cka_matrix(xs)
        assert seen.elements == max(6 * 300 * rows, 300 * 375)  # or the features
        assert seen.products == 300 * rows
        torch.testing.assert_close(found, wanted, rtol=0, atol=3e-6)


# Of three draws each: rows, and widths of the two sides.


needs_peer = pytest.mark.skipif(importlib.util.find_spec("cka") is None, reason="pytorch-cka is in the bench extra")


@needs_peer
def test_beside_pytorch_cka() -> None:
    """The same numbers where it is right."""
    from cka import cka_from_features

    cpu = torch.device("cpu")
    xs, ys = network((40, 16), 64, 0, cpu), network((24, 8, 30), 64, 1, cpu)
    found = bird_kernels.cka_matrix(xs, ys, estimator="unbiased")
    torch.testing.assert_close(found, cka_from_features(xs, ys), rtol=0, atol=1e-5)
    assert found.min() > 0.1  # it clamps
