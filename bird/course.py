"""How the weight of the guidance moves over the course of training: by a schedule, and to a share of the gradient."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What beta, or the share, is multiplied by when a part of the time until the guidance is off has passed.
SCHEDULES = {
    "constant": lambda passed: 1.0,
    "linear": lambda passed: 1 - passed,
    "cosine": lambda passed: (1 + math.cos(math.pi * passed)) / 2,
}
KEPT = 0.5  # of the running means, in each step: they follow within a few steps, and smooth what a batch adds
MANY = 1000  # calls in a step: of more the last count, with a warning, since `step` was forgotten most likely


class Course(nn.Module):
    """beta over the course of training; `bird.BirdLoss` describes ``schedule``, ``until`` and ``share``.

    Attributes:
        factor: what the schedule multiplies by now, 0-d; a buffer.
        norms: with ``share``, [2]: running means of the norms of the task's gradient and of the guidance's, the latter
            for a beta of 1; a buffer. Zero until something is measured.
    """

    factor: Tensor
    norms: Tensor

    def __init__(self, schedule: str, until: float, share: float | None) -> None:
        super().__init__()
        if schedule not in tuple(SCHEDULES):
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}; got {schedule!r}")
        if not (isinstance(until, float | int) and 0 < until <= 1):
            raise ValueError(f"until is a share of the steps, above 0 and at most 1, not {until!r}")
        if share is not None and not (isinstance(share, float | int) and 0 < share < 1):
            raise ValueError(f"share is a share of the gradient, between 0 and 1, not {share!r}")
        self.schedule, self.until, self.share = schedule, until, share
        self.noted: deque[Tensor | None] = deque(maxlen=MANY)  # the calls since the last step: norms, where measured
        self.register_buffer("factor", torch.ones((), device="cpu"))
        if share is not None:
            self.register_buffer("norms", torch.zeros(2, device="cpu"))

    def weight(self, beta: float | Tensor) -> Tensor:
        """What stands for ``beta`` now, 0-d."""
        if self.share is None:
            return beta * self.factor
        share, (task, guide) = self.share * self.factor, self.norms.unbind()
        balanced = share / (1 - share) * task / torch.where(guide > 0, guide, 1.0)
        return torch.where(guide > 0, balanced, beta * self.factor)

    @torch.no_grad()
    def step(self, part: float, beta: float | Tensor, group: ProcessGroup | None = None) -> None:
        """Go to where a ``part`` of all steps is done, with the norms [2] that were `noted` on the ranks of a group."""
        if self.share is not None and (self.noted or group is not None):
            noted = [norms for norms in self.noted if norms is not None]
            noted = noted or [torch.zeros_like(self.norms)]  # a rank without any takes part
            measured = torch.stack(noted).norm(dim=0).to(self.norms.dtype)  # a checkpoint's, and the same on all ranks
            if group is not None:
                torch.distributed.all_reduce(measured.square_(), group=group)
                measured = measured.sqrt()
            self.to(measured.device)
            new = torch.stack([measured[0], measured[1] / self.weight(beta)]).to(self.norms.dtype)
            usable = new.isfinite().all() & (new > 0).all()
            self.norms = torch.where(usable, KEPT * self.norms + (1 - KEPT) * new, self.norms)
        self.noted.clear()
        passed = part / self.until
        self.factor.fill_(SCHEDULES[self.schedule](passed) if passed < 1 else 0.0)

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        return f"schedule={self.schedule!r}, until={self.until}, share={self.share}"
