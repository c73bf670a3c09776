"""Tensors that are not plain numbers in memory: each kind is taken, or refused in words; and the default device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bird_kernels
from bird_kernels import RBF, Statistics, cka_loss
from tests.accuracy import features
from tests.kernels.test_errors import CALLS

ROOT = Path(__file__).resolve().parents[2]
N, P, Q = 24, 6, 5


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
def test_a_replicated_dtensor_is_its_local_tensor(name: str, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    x, y = features(N, P, Q, device=torch.device("cpu"))
    spread = [distribute_tensor(side, mesh, [Replicate()]) for side in (x, y)]
    torch.testing.assert_close(CALLS[name](*spread), CALLS[name](x, y), rtol=0, atol=0)
    torch.testing.assert_close(CALLS[name](spread[0], y), CALLS[name](x, y), rtol=0, atol=0)


def test_the_gradient_of_a_replicated_dtensor_is_one(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    x, y = features(N, P, Q, device=torch.device("cpu"))
    spread, plain = distribute_tensor(x, mesh, [Replicate()]).requires_grad_(), x.clone().requires_grad_()
    mask = torch.arange(N) % 5 != 2
    cka_loss(spread, y, mask=distribute_tensor(mask, mesh, [Replicate()])).backward()
    cka_loss(plain, y, mask=mask).backward()
    assert isinstance(spread.grad, DTensor)
    assert spread.grad.to_local().equal(plain.grad)


def test_a_sharded_dtensor_is_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x, y = features(N, P, Q, device=torch.device("cpu"))
    spread = distribute_tensor(x, mesh, [Shard(0)])
    for call in CALLS.values():
        with pytest.raises(TypeError, match=r"got a sharded .*redistribute it to Replicate\(\), or .* with group="):
            call(spread, y)


# ------------------------------------------------------------------------------------ the default device


def test_the_default_device_is_not_taken() -> None:
    """Numbers that a call makes for itself are where its features are, wherever other tensors are made by default."""
    x, y = features(N, P, Q, device=torch.device("cpu"))
    mask, state = torch.arange(N) % 5 != 2, Statistics()
    state.update(x, y)

    def everything() -> list[Tensor]:
        found = []
        for options in ({}, {"kernel": "rbf"}, {"kernel": RBF(2.0)}, {"estimator": "unbiased"}, {"sqrt": True}):
            for rows in (None, mask):
                leaf = x.clone().requires_grad_()
                value = cka_loss([leaf, leaf], [y, y], weights=[1.25, 2.5], mask=rows, **options)
                value.backward()
                found += [value.detach(), leaf.grad]
        for statistic in (bird_kernels.hsic, bird_kernels.gram_mse, bird_kernels.cka):
            found.append(statistic(x, y))
        for tokens in ("all", "last", "mean", "sequence"):
            sequences = x.view(4, 6, P), y.view(4, 6, Q)
            found.append(bird_kernels.token_cka_loss(*sequences, mask=mask.view(4, 6), tokens=tokens))
        for estimator in ("biased", "unbiased"):
            found.append(bird_kernels.cka_matrix([x, x * 2], [y], estimator=estimator))
            statistics = Statistics.from_state_dict(state.state_dict())
            statistics.update(x, y, mask)
            found += [statistics.cka(estimator), statistics.gradient(x, y, estimator)]
        return [*found, bird_kernels.centered_gram(x), bird_kernels.centered_gram(x, kernel="rbf")]

    with torch.device("meta"):
        found = everything()  # first: nothing that is kept is there yet
    expected = everything()
    assert {value.device.type for value in found} == {"cpu"}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


MAKERS = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn"}
MAKERS |= {"randperm", "scalar_tensor", "tensor", "zeros", "empty_strided", "logspace", "tril_indices", "triu_indices"}


def without_device(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls of `torch` that make a tensor wherever the default device is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function, *arguments = [node.func, *node.args]
            if isinstance(function, ast.Name) and function.id == "partial":
                function = arguments[0]
            named = {keyword.arg for keyword in node.keywords}
            made = isinstance(function, ast.Attribute) and ast.unparse(function.value) == "torch"
            if made and function.attr in MAKERS and not named & {"device", None}:  # type: ignore[attr-defined]
                yield node


def test_no_tensor_is_made_without_a_device() -> None:
    assert len([*without_device(ast.parse("torch.ones(3); torch.ones(3, device=x.device); partial(torch.zeros)"))]) == 2
    core = [path for path in (ROOT / "bird").rglob("*.py") if "lab" not in path.relative_to(ROOT).parts]
    paths = [*sorted((ROOT / "bird_kernels").rglob("*.py")), *sorted(core)]
    assert len(paths) > 60
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path in paths
        for node in without_device(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)
