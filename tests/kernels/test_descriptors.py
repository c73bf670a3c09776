"""The kernels that multiply, where they load by tensor descriptors: blocks that the copy unit finds by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bird_kernels import plan
from bird_kernels.testing import errors, evaluate, features, operator, truth
from bird_kernels.types import Problem

pytest.importorskip("triton", reason="Triton does not exist for this system")
launch = pytest.importorskip("bird_kernels.backends.triton.launch")
routes = pytest.importorskip("bird_kernels.backends.triton.routes")

ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
MATRIX_UNITS = {torch.float32: "tf32x3", torch.bfloat16: None}  # exact fp32 is never described


@pytest.fixture
def described(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Small problems are planned as the largest are, for a GPU that has the copy unit; the matrices described."""
    if device.type == "cpu":
        monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    elif launch.capability(device) < (9, 0):
        pytest.skip("no tensor descriptors before sm_90")
    shapes: list[tuple[int, int]] = []

    def spy(block: tuple[int, int], *tensors: Tensor) -> tuple[object, ...]:
        shapes.extend((t.shape[0], t.shape[1]) for t in tensors)
        return original(block, *tensors)

    original = launch.describe
    monkeypatch.setattr(routes, "describe", spy)
    monkeypatch.setattr(plan, "SMALL", 0)
    monkeypatch.setattr(plan, "PROGRAMS", 1)
    monkeypatch.setattr(launch, "CROWD", 0)
    routes.launches_of.cache_clear()
    yield shapes
    routes.launches_of.cache_clear()


def within_nan(x: Tensor, width: int) -> Tensor:
    """x as the middle rows and first columns of a matrix of NaN, ``width`` columns wide."""
    n, p = x.shape
    whole = x.new_full((n + 8, width), torch.nan)
    whole[4 : n + 4, :p] = x
    return whole[4 : n + 4, :p]


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("route", "n", "p", "q"), [("gram", 68, 61, 35), ("cross", 67, 68, 36)])
def test_what_lies_around_the_features_counts_for_nothing(
    route: str, n: int, p: int, q: int, masked: bool, dtype: torch.dtype, estimator: str, device: torch.device,
    described: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Last blocks stand over every edge; a zero from outside, centred, would be minus the mean of 3."""
    x, y = (within_nan(side, 80) for side in features(n, p, q, dtype, device, mean=3.0))
    mask = torch.arange(n, device=device) % 5 != 3 if masked else None
    found = evaluate(operator(route, "triton", estimator, mask=mask, precision=MATRIX_UNITS[dtype]), x, y)
    if route == "gram":
        backward = [(n, p), (n, q), (n, n), (n, n)] if estimator == "biased" else []
        assert described == [(n, p), (n, q), *backward]
    else:
        sides = [(n, p), (n, q), (p, p), (q, p)], [(n, q), (n, p), (q, q), (q, p)]
        assert described == [(n, p), (n, q), *sides[0], *sides[1]]
    assert max(errors(found, truth(x, y, estimator, mask=mask)).values()) < ALLOWED[dtype]


@pytest.mark.parametrize(
    ("route", "n", "p", "widths", "count"),
    [
        ("gram", 68, 9, (9, 12), 0),  # rows of x are 36 bytes apart
        ("gram", 67, 9, (12, 12), 2),  # rows of K and L: 268
        ("cross", 33, 9, (12, 12), 2),  # rows of X^T X: 36
    ],
)
def test_what_cannot_be_described_is_loaded_by_pointers(
    route: str, n: int, p: int, widths: tuple[int, int], count: int, device: torch.device,
    described: list[tuple[int, int]],
) -> None:  # fmt: skip
    x, y = (within_nan(s, width) for s, width in zip(features(n, p, 12, device=device), widths, strict=True))
    found = evaluate(operator(route, "triton", precision="tf32x3"), x, y)
    assert len(described) == count
    assert max(errors(found, truth(x, y)).values()) < 3e-6


def test_describable() -> None:
    numbers = torch.zeros(16, 32)
    half = numbers.half()
    assert launch.describable(numbers, numbers[3:, :7], numbers[:, 4:9], half[:, :3])
    others = {
        "columns": numbers.T,
        "begins between": numbers[:, 1:9],
        "every other column": numbers[:, ::2],
        "rows begin between": torch.zeros(16, 6),
        "rows of 8 bytes": torch.zeros(16, 4, dtype=torch.float16),
        "one row for all": numbers[:1].expand(16, 32),
        "rows overlap": torch.zeros(100).as_strided((16, 32), (4, 1)),
    }
    assert [name for name, other in others.items() if launch.describable(numbers, other)] == []


def test_large_problems_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """528 tiles: four programs for each of 132 multiprocessors."""

    def chosen(
        route: str, n: int, p: int, q: int, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee"
    ) -> bool:
        found: bool = launch.describes(Problem(n, p, q, dtype, torch.device("cpu")), route, precision)
        return found

    large, small = [("gram", 2048, 64, 64), ("cross", 65536, 1024, 1024)], [("gram", 1984, 4096, 4096)]
    small += [("cross", 65536, 960, 1024), ("gram", 128, 2048, 2048), ("cross", 65536, 64, 64)]
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert [chosen(*sizes) for sizes in large + small] == [True, True, False, False, False, False]
    assert [chosen(*large[1], torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee")] == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(launch, "capability", lambda _: (8, 9))
    assert [chosen(*sizes) for sizes in large] == [False, False]
