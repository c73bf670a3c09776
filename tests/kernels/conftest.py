"""What the tests of the kernels need around them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bird_kernels import RBF
from tests.kernels.gaussian import MEMORIES, RULES


@pytest.fixture(scope="session", autouse=True)
def interpreter_multiplies_bfloat16() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as 16-bit integers, and `tl.dot` multiplies those (Triton 3.9)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(operand: TensorHandle) -> TensorHandle:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        return original(builder, widened(a), widened(b), *rest)

    original = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="module")
def interpreter_rounds_bfloat16() -> Iterator[None]:
    """A GPU rounds fp32 to the nearest bfloat16; Triton's interpreter (3.8) cuts."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return original(data, source, target, mode)
        return torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> RBF:
    return RULES[request.param]


@pytest.fixture(params=MEMORIES)
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    with MEMORIES[request.param]():
        yield request.param


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """ask(world, case): what each rank returned."""
    from tests.groups import start
    from tests.kernels import ranks

    folder = tmp_path_factory.mktemp("ranks")
    results: dict[int, list[dict[str, Any]]] = {}

    def asked(world: int, case: object) -> list[Any]:
        if world not in results:
            start(ranks.work, (world, str(folder)), world)
            results[world] = [torch.load(folder / f"{world}-{rank}.pt", weights_only=False) for rank in range(world)]
        found = []
        for rank, theirs in enumerate(results[world]):
            assert str(case) in theirs, f"rank {rank} stopped at: {list(theirs.items())[-1]}"
            found.append(theirs[str(case)])
            assert not (isinstance(found[-1], str) and "Traceback" in found[-1]), f"rank {rank}: {found[-1]}"
        return found

    return asked
