"""What the tests of taps, teachers and losses need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.bird.guided import WIDTHS, features
from tests.bird.tapped import Net


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
