"""Small, odd problems for a checker of memory to look at: each route, lists of pairs, a Gaussian kernel.

Run as a program, below NVIDIA's compute-sanitizer (test_cuda.py):

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize triton
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bird_kernels import RBF, cka_loss
from bird_kernels.plan import FEW_ROWS
from tests.accuracy import Function, evaluate, features, operator

SHAPES = [(5, 3, 70), (37, 61, 29), (130, 65, 33)]
MORE_ROWS = (520, 65, 33)  # than FEW_ROWS, whose launches are others


class Call(NamedTuple):
    """``function(x, y)``, and what `tests.accuracy.truth` takes to say what it should give."""

    function: Function
    x: Tensor
    y: Tensor
    estimator: str
    mask: Tensor | None
    kernel: RBF | None = None
    pairs: int = 1  # so many losses are summed, of x and y and of y and x


def calls(backend: str, device: torch.device) -> Iterator[Call]:
    """All that ``backend`` can run."""
    routes = ["gram"] if backend == "native" else ["gram", "cross"]
    kinds = [*product(SHAPES, [torch.float32, torch.bfloat16], ["biased", "unbiased"], routes)]
    if backend != "native":
        kinds += [(MORE_ROWS, torch.float32, "unbiased", route) for route in routes]
    for (n, p, q), dtype, estimator, route in kinds:
        mask = torch.arange(n, device=device) % 5 != 1
        function = operator(route, backend, estimator, mask=mask)
        yield Call(function, *features(n, p, q, dtype, device), estimator, mask)
    for (n, p, q), estimator in product(SHAPES[1:], ["biased", "unbiased"]):
        mask = torch.arange(n, device=device) % 5 != 1
        x, y = features(n, p, q, device=device)
        yield Call(_both_ways(estimator, mask, backend), x, y, estimator, mask, pairs=2)
        if backend != "native":
            function = operator("gram", backend, estimator, mask=mask, kernel=RBF())
            yield Call(function, x, y, estimator, mask, RBF())


def _both_ways(estimator: str, mask: Tensor, backend: str) -> Function:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return cka_loss([x, y], [y, x], estimator=estimator, mask=mask, backend=backend)

    return function


def main() -> None:
    assert MORE_ROWS[0] > FEW_ROWS
    for call in calls(sys.argv[1], torch.device("cuda")):
        evaluate(call.function, call.x, call.y)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
