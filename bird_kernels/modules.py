"""`cka_loss` and `hsic` as nn.Modules without parameters or state, for configurations and containers.

Their options are checked when they are made: a ValueError or TypeError says which is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import distributed, inputs
from .functional import cka_loss, cka_losses, hsic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .types import RBF


class _Statistic(nn.Module):
    def __init__(
        self,
        *,
        kernel: str | RBF = "linear",
        estimator: str = "biased",
        row_dims: int = 1,
        group: ProcessGroup | None = None,
        backend: str = "auto",
        precision: str | None = None,
        **more: bool,
    ) -> None:
        super().__init__()
        inputs.parse_kernel(kernel)
        inputs.require_choice(estimator=estimator, backend=backend, precision=precision)
        if row_dims < 1:
            raise ValueError(f"row_dims must be at least 1, got {row_dims}")
        self.options: dict[str, Any] = dict(
            kernel=kernel, estimator=estimator, row_dims=row_dims, group=group, backend=backend, precision=precision,
            **more,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: a process group is replaced by its name."""
        group = self.options["group"]
        return self.__dict__ | {"options": self.options | {"group": None if group is None else group.group_name}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, with this process's group of the saved name.

        Raises:
            RuntimeError: this process has no group of that name.
        """
        super().__setstate__(state)
        name = self.options["group"]
        self.options = self.options | {"group": None if name is None else distributed.group_named(name)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class CKALoss(_Statistic):
    """`cka_loss` as a module: ``CKALoss(estimator="unbiased")(x, y, mask=None)``; also ``sqrt`` and ``center``."""

    def forward(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """1 - CKA of x [n, ...] and y [n, ...], or its sum over the pairs of two lists; 0-d."""
        return cka_loss(x, y, mask=mask, **self.options)

    def each(self, xs: Sequence[Tensor], ys: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """1 - CKA of each pair of two lists, [pairs]."""
        return cka_losses(xs, ys, mask=mask, **self.options)


class HSICLoss(_Statistic):
    """`hsic` as a module. Its value is HSIC itself, not its negative: minimising it makes x and y independent."""

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """HSIC of x [n, ...] and y [n, ...]; 0-d."""
        return hsic(x, y, mask=mask, **self.options)
