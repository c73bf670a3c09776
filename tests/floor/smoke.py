"""Calls every public function of bird_kernels and the core of bird, forward and backward, and says with what versions.

    python tests/floor/smoke.py torch==2.10 triton==3.6    # and that these are the versions

It needs the package and what that needs, no pytest. Values and gradients of fp32 are held to those of fp64, and
Triton's to the library's.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import torch
from torch import Tensor

import bird
import bird_kernels as b

PAIRS = [("t", "s"), ("u", "v")]
MASK = torch.arange(24) % 5 > 0
LENGTHS = torch.tensor([0, 7, 24])


def _statistics(x: Tensor, y: Tensor) -> Tensor:
    statistics = b.Statistics()
    for rows in (slice(0, 10), slice(10, None)):
        statistics.update(x[rows], y[rows])
    return statistics.cka()


def _bird(loss: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    total: Tensor = loss(x.square().mean(), {"t": y, "u": y[:, :3]}, {"s": x, "v": x[:, :2]})
    return total


# Of every public name, calls with x [24, 6], y [24, 7] that give a tensor or numbers.
CALLS: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
    "RBF": [lambda x, y: b.cka_loss(x, y, kernel=b.RBF()), lambda x, y: b.cka(x, y, kernel=b.RBF(sigma=2.0))],
    "CKALoss": [lambda x, y: b.CKALoss(estimator="unbiased")(x, y)],
    "HSICLoss": [lambda x, y: b.HSICLoss()(x, y)],
    "Plan": [lambda x, y: torch.tensor(float(isinstance(b.explain(x, y), b.Plan)))],
    "Statistics": [_statistics],
    "backend_status": [lambda x, y: torch.tensor(float(len(b.backend_status())))],
    "centered_gram": [lambda x, y: b.centered_gram(x).square().sum()],
    "cka": [lambda x, y: b.cka(x, y), lambda x, y: b.cka(x, y, estimator="unbiased", mask=MASK)],
    "cka_loss": [
        lambda x, y: b.cka_loss(x, y),
        lambda x, y: b.cka_loss(x, y, mask=MASK, sqrt=True),
        lambda x, y: b.cka_loss(x[:5], y[:5], estimator="unbiased"),
        lambda x, y: b.cka_loss(x, y, center=False),
        lambda x, y: b.cka_loss([x, x[:, :2]], [y, y[:, :3]], weights=[1.0, 2.0]),
    ],
    "cka_matrix": [lambda x, y: b.cka_matrix([x, x[:, :3]], [y, y[:, :2]]).sum()],
    "cka_from_grams": [lambda x, y: b.cka_from_grams(x @ x.T, y @ y.T, estimator="unbiased")],
    "explain": [lambda x, y: torch.tensor(float(b.explain(x, y).flops))],
    "gram_mse": [lambda x, y: b.gram_mse(x, y)],
    "hsic": [lambda x, y: b.hsic(x, y, estimator="unbiased")],
    "last_token": [lambda x, y: b.last_token(x.view(4, 6, 6)).sum()],
    "mean_tokens": [lambda x, y: b.mean_tokens(x.view(4, 6, 6)).sum()],
    "token_cka_loss": [
        lambda x, y: b.token_cka_loss(x.view(4, 6, 6), y.view(4, 6, 7)),
        lambda x, y: b.token_cka_loss(x, y, cu_seqlens=LENGTHS, tokens="sequence"),
    ],
    "BirdLoss": [lambda x, y: _bird(bird.BirdLoss(pairs=PAIRS), x, y)],
}
TRITON: list[Callable[[Tensor, Tensor, str], Tensor]] = [
    lambda x, y, backend: b.cka_loss(x, y, backend=backend),
    lambda x, y, backend: b.cka_loss([x, x[:, :2]], [y, y[:, :3]], mask=MASK, backend=backend),
    lambda x, y, backend: b.cka_loss(x, y, kernel="rbf", estimator="unbiased", backend=backend),
]


def evaluate(call: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Value and gradient by x, in fp64; no gradient (zeros) where the value has none."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(24, d, generator=generator, dtype=torch.float64) for d in (6, 7))
    x = x.to(dtype).requires_grad_()
    value = call(x, y.to(dtype))
    if value.requires_grad:
        value.backward()
    return value.detach().double(), torch.zeros(24, 6).double() if x.grad is None else x.grad.double()


def check(name: str, call: Callable[[Tensor, Tensor], Tensor], truth: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A call in fp32 beside the truth in fp64."""
    for found, right in zip(evaluate(call, torch.float32), evaluate(truth, torch.float64), strict=True):
        error = (found - right).abs().max().item()
        assert error <= 1e-4 * max(1.0, right.abs().max().item()), f"{name}: off by {error}"


def main() -> None:
    """Check the versions, call everything."""
    for wanted in sys.argv[1:]:
        name, _, least = wanted.partition("==")
        found = version(name).split("+")[0]
        assert (found + ".").startswith(least + "."), f"{name} is {found}, not {least}"
    missing = set(b.__all__) - set(CALLS)
    assert not missing, f"nothing calls {missing}"
    count = 0
    for name, calls in CALLS.items():
        for call in calls:
            check(name, call, call)
            count += 1
    for launched in TRITON:
        check("triton", lambda x, y, f=launched: f(x, y, "triton"), lambda x, y, f=launched: f(x, y, "library"))
        count += 1
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numpy"))
    print(f"Python {platform.python_version()}, {packages}: {count} calls are right")


if __name__ == "__main__":
    main()
