"""The functions as nn.Modules, for configuration and containers. No parameters, no state."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import cka_loss, hsic


class _Statistic(nn.Module):
    def __init__(
        self,
        *,
        kernel: str = "linear",
        estimator: str = "biased",
        row_dims: int = 1,
        backend: str = "auto",
        precision: str | None = None,
    ) -> None:
        super().__init__()
        self.options = dict(kernel=kernel, estimator=estimator, row_dims=row_dims, backend=backend, precision=precision)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CKALoss(_Statistic):
    """`cka_loss` as a module: ``CKALoss(estimator="unbiased")(x, y, mask=None)``."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """1 - CKA of x [n, ...] and y [n, ...]; 0-d."""
        return cka_loss(x, y, mask=mask, **self.options)  # type: ignore[arg-type]


class HSICLoss(_Statistic):
    """`hsic` as a module: minimising it makes x and y independent (the sign is HSIC's own)."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """HSIC of x [n, ...] and y [n, ...]; 0-d."""
        return hsic(x, y, mask=mask, **self.options)  # type: ignore[arg-type]
