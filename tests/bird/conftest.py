"""What the tests of taps, teachers and losses need around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bird.tapped import WIDTHS, Net, features


@pytest.fixture(autouse=True, scope="module")
def statistics_of_few_rows() -> Iterator[None]:
    """Chunks keep statistics also where their features would take few bytes, as they do in all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bird.chunks.FEW_BYTES", 0)
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What a test compiled is forgotten."""
    yield
    torch.compiler.reset()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher() -> dict[str, Tensor]:
    return features(0, WIDTHS[0])


@pytest.fixture
def student() -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in features(1, WIDTHS[1]).items()}


@pytest.fixture
def expect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lowers the official numbers of a data set to those of its tiny copy."""
    from bird.lab.vision.datasets import DATASETS

    def change(name: str, **changes: Any) -> None:
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], **changes))

    return change
