"""Training losses with guidance by a teacher's features: ``alpha * task + beta * sum over pairs of layers``."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bird_kernels import RBF, distributed
from bird_kernels.pairs import weighted_loss

from .course import MANY, Course
from .structure import ERRORS, named_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Weight = float | Tensor  # a tensor, for example an nn.Parameter, receives a gradient
Features = Mapping[str, Tensor]


class _Guided(nn.Module):
    """Base class of the losses: two weights, pairs of layers, and the components of the last call."""

    measures = False  # whether the student's features must be a `bird.taps.Measured`

    def __init__(self, alpha: Weight, beta: Weight, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(_number(weight)) and _number(weight) >= 0):
                raise ValueError(f"{name} must be finite and not negative, not {weight!r}")
        listed = [tuple(pair) for pair in pairs]
        if not listed or any(len(pair) != 2 or isinstance(pair, str) for pair in pairs):
            raise ValueError(f"pairs must list one or more (teacher_layer, student_layer), not {pairs!r}")
        self.alpha, self.beta = (w if isinstance(w, Tensor) else float(w) for w in (alpha, beta))
        self.pairs = [(teacher, student) for teacher, student in listed]
        self.last: dict[str, Tensor] = {}

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        return f"alpha={float(self.alpha)}, beta={float(self.beta)}, pairs={self.pairs}"

    def matched(self, teacher: Features, student: Features) -> list[tuple[str, Tensor, Tensor]]:
        """(name for the log, teacher's features, student's features) of each pair.

        Raises:
            ValueError: a layer is missing or on two devices; with ``share``, not a `bird.taps.Measured` of one layer.
        """
        if self.measures and (not hasattr(student, "norms") or len(student) > 1):
            raise ValueError(_ONE_LAYER.format([*student]) if hasattr(student, "norms") else _NO_NORMS)
        found = []
        for t, s in self.pairs:
            try:
                theirs, ours = teacher[t], student[s]
            except Exception:  # checked only now: each function that a step enters counts
                theirs, ours = _named("teacher_features", teacher, t), _named("student_features", student, s)
            if not ours.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                warnings.warn(_NO_GRADIENT.format(t, s), RuntimeWarning, stacklevel=4)
            if theirs.device != ours.device:
                where = f"{t}/{s}: the teacher's features are on {theirs.device}, the student's on {ours.device}"
                raise ValueError(f"{where}: move one of the two networks, and give both the same images")
            found.append((f"{t}/{s}", theirs, ours))
        return found


class BirdLoss(_Guided):
    r"""BIRD's loss: the task's, plus the distance (1 - CKA) of student layers from layers of a frozen teacher.

    .. math:: L = \alpha \, L_{task} + \beta \sum_{(t, s)} w_{ts} (1 - \mathrm{CKA}(S_s, T_t))

    With one pair, the linear kernel, the biased estimator and the default weights it is the published loss
    (Pogoncheff and Beyeler, ICLR 2026). Under DDP or FSDP give ``group=torch.distributed.group.WORLD``: then the
    samples of all processes are compared; without it each process compares its own only, a different objective.

    Args:
        alpha: weight of the task's loss. An ``nn.Parameter`` becomes a parameter of this module and can be learned;
            the same holds for ``beta`` and ``weights``.
        beta: weight of the guidance.
        pairs: ``(teacher layer, student layer)``, one or more.
        weights: one number for each pair, or a tensor [pairs]; finite and not negative. None: 1 each.
        loss: what stands in place of 1 - CKA: ``"cka"``, or another name in `bird.structure`.
        schedule: what beta is multiplied by over the course of training, see `step`: ``"constant"``, ``"linear"`` or
            ``"cosine"``; the latter two fall from 1 to 0.
        until: the share of the steps after which the guidance is off, and linear and cosine have come to 0.
        share: the share that the guidance has of the gradient at the guided layers' outputs, g / (t + g) with the norms
            g of its gradient and t of the task's; `step` chooses beta so, from running means over the last steps of
            both norms, starting from ``beta``. The schedule multiplies the share then. Needs
            ``bird.Taps(..., gradients=True)`` of one layer: of two that follow each other, what guides the later one
            reaches the earlier one with the task's gradient, and would be measured as the task's. As the student comes
            to resemble the teacher, beta grows. In several processes without ``group`` each has the beta of its own
            rows, which rank 0's checkpoint does not hold: give `step` the group then.
        kernel, estimator, row_dims, group, backend, precision: as in `bird_kernels.cka_loss`; ``row_dims=2`` takes
            the tokens of ``pool="none"``, ``[N, T, D]``, as rows.

    Raises:
        ValueError: an unknown name, weights out of range, or options that ``loss`` does not take.

    Attributes:
        last: the components of the last call, 0-d and detached, without a synchronisation with the device:
            ``"task"``, and for each pair ``"cka/<teacher layer>/<student layer>"`` (of another loss its name, and
            1 - loss; of gram_mse the loss). With a schedule or share also ``"guide_beta"``, and with
            ``Taps(gradients=True)``, once the backward pass has run, ``"task_grad"`` and ``"guide_grad"``: the norms of
            the gradients of both terms, as they are weighted, at the guided layers' outputs (of several layers see
            `bird.taps.Measured`).
        shapes: all (rows, student's width, teacher's width, dtype) so far; for `bird tune --from-run`.
    """

    def __init__(
        self,
        alpha: Weight = 0.1,
        beta: Weight = 0.9,
        pairs: Sequence[tuple[str, str]] = (),
        *,
        weights: Sequence[Weight] | Tensor | None = None,
        loss: str = "cka",
        schedule: str = "constant",
        until: float = 1.0,
        share: float | None = None,
        kernel: str | RBF = "linear",
        estimator: str = "biased",
        row_dims: int = 1,
        group: ProcessGroup | None = None,
        backend: str = "auto",
        precision: str | None = None,
    ) -> None:
        super().__init__(alpha, beta, pairs)
        self.weights = None if weights is None else _one_for_each(weights, self.pairs)
        self.shapes: set[tuple[int, int, int, str]] = set()
        self.loss = loss
        self.distance = named_loss(
            loss, kernel=kernel, estimator=estimator, row_dims=row_dims, group=group, backend=backend,
            precision=precision,
        )  # fmt: skip
        self.course = None if (schedule, until, share) == ("constant", 1.0, None) else Course(schedule, until, share)
        self.measures = share is not None
        some = self.weights is None or any(map(float, self.weights))
        if self.measures and not (_number(alpha) and _number(beta) and some and not getattr(beta, "requires_grad", 0)):
            raise ValueError(
                "share weighs two gradients: alpha, beta and a weight must be above 0, and beta not learned"
            )
        if self.measures and len(layers := {ours for _, ours in self.pairs}) > 1:
            raise ValueError(_ONE_LAYER.format(sorted(layers)))

    def forward(
        self, task_loss: Tensor, teacher_features: Features, student_features: Features, mask: Tensor | None = None
    ) -> Tensor:
        """The weighted sum, a 0-d tensor.

        Args:
            task_loss: 0-d.
            teacher_features: ``{layer: [N, Q]}``, as `bird.Teacher` returns them.
            student_features: ``{layer: [N, P]}`` of the same samples, as `bird.Taps.pop` returns them.
            mask: bool, False leaves a row out: ``[N]``, or ``[N, T]`` (an attention mask) with ``row_dims=2``.

        Raises:
            ValueError: a layer of ``pairs`` is not among the features, or there are no gradients with ``share``; also
                whatever `bird_kernels.cka_loss` raises. With ``group``, on every rank.
        """
        try:
            task_loss = _scalar(task_loss)
            _, teachers, students = zip(*self.matched(teacher_features, student_features), strict=True)
        except Exception as error:
            distributed.report(self.distance.options["group"], error)
            raise
        misaligned = self.distance.each(students, teachers, mask)
        if not torch.compiler.is_compiling():
            for x, y in zip(students, teachers, strict=True):
                self.shapes.add(_shape(x.shape, y.shape, x.dtype, y.dtype, self.distance.options["row_dims"]))
        norms = None if torch.compiler.is_compiling() else getattr(student_features, "norms", None)
        return self.weighed(task_loss, misaligned, norms)

    def weighed(self, task_loss: Tensor, misaligned: Tensor, norms: Tensor | None) -> Tensor:
        """The weighted sum with the distance of each pair [pairs], 0-d; sets `last`. ``norms`` are a `Measured`'s."""
        last, beta = {"task": task_loss.detach()}, self.beta
        if norms is not None:
            last |= {"task_grad": norms[0], "guide_grad": norms[1]}
        if self.course is not None:
            last["guide_beta"] = (beta := self.course.weight(beta)).detach()
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.course.noted.append(norms)
                if len(self.course.noted) == MANY:
                    warnings.warn(_NO_STEP, RuntimeWarning, stacklevel=5)
        shown = misaligned.detach() if self.loss in ERRORS else torch.rsub(misaligned.detach(), 1)
        for (teacher, student), value in zip(self.pairs, shown.unbind(), strict=True):
            last[f"{self.loss}/{teacher}/{student}"] = value
        self.__dict__["last"] = last  # a module's own setattr looks for parameters, for 4 us
        return self.alpha * task_loss + beta * weighted_loss(misaligned, self.weights)

    def current_beta(self) -> Weight:
        """beta as schedule and share have it now; where they move it a 0-d tensor."""
        return self.beta if self.course is None else self.course.weight(self.beta)

    def step(self, done: int, total: int, group: ProcessGroup | None = None) -> None:
        """Take beta to where schedule and share have it when ``done`` of ``total`` steps are done.

        Call it after each step of the optimizer. What it changes is in the ``state_dict`` of this module, with which a
        resumed run goes on exactly. With ``share`` beta follows from the norms of all ranks of ``group``, each of which
        must call it; None: of the loss's own group, and without one of this process alone.

        Raises:
            ValueError: fewer than 0 steps are done, or more than there are.
        """
        if not 0 <= done <= total or total < 1:
            raise ValueError(f"step(done, total) counts steps of the optimizer, from 0 to total, not {done} of {total}")
        if self.course is not None:
            self.course.step(done / total, self.beta, group or self.distance.options["group"])

    def extra_repr(self) -> str:
        """The arguments that ``repr`` shows."""
        shown = super().extra_repr() + ("" if self.loss == "cka" else f", loss={self.loss!r}")
        return shown + ("" if self.weights is None else f", weights={self.weights}")


@lru_cache(maxsize=1024)
def _shape(p: torch.Size, q: torch.Size, own: torch.dtype, other: torch.dtype, dims: int) -> tuple[int, int, int, str]:
    """(rows, student's width, teacher's width, dtype) of features; cached, since no step has new ones."""
    prod, dtype = math.prod, str(torch.promote_types(own, other)).removeprefix("torch.")
    return prod(p[:dims]), prod(p[dims:]), prod(q[dims:]), dtype


_NO_STEP = f"{MANY} calls and no step(), so beta stays: call loss.step(done, total) after the optimizer's step"
_ONE_LAYER = "share is measured at one layer of the student, not at {}: tap and guide one, or give beta"
_NO_NORMS = (
    "share needs the gradients at the student's layers: record them with bird.Taps(..., gradients=True), and give the "
    "loss what pop() returns"
)


class Hints(_Guided):
    r"""FitNets' hints: the task, plus the error of a learned linear map from student to teacher features.

    .. math:: L = \alpha \, L_{task} + \beta \sum_{(t, s)} \frac{1}{N Q} \lVert r_{ts}(S_s) - T_t \rVert^2

    (Romero et al., FitNets, ICLR 2015, where hints are a stage before the task; here the two are joint.)
    The maps r are this module's parameters: give them to the optimizer,
    ``[*student.parameters(), *loss.parameters()]``, and save them in the checkpoint. Under DDP wrap this
    module, too, so that its gradients are averaged.

    Args:
        alpha: weight of the task's loss.
        beta: weight of the guidance. Both default to those of `BirdLoss`, so that only the term differs.
        pairs: ``(teacher layer, student layer)``, one or more.
        teacher_widths: ``{layer: Q}``, how many features each teacher layer in ``pairs`` has.
        student_widths: ``{layer: P}``, the same for the student.

    Raises:
        ValueError: the width of a layer of ``pairs`` is missing.

    Attributes:
        last: as in `BirdLoss`: ``"task"``, and for each pair ``"hint/<teacher layer>/<student layer>"``.
    """

    def __init__(
        self,
        alpha: Weight = 0.1,
        beta: Weight = 0.9,
        pairs: Sequence[tuple[str, str]] = (),
        *,
        teacher_widths: Mapping[str, int],
        student_widths: Mapping[str, int],
    ) -> None:
        super().__init__(alpha, beta, pairs)
        self.regressors = nn.ModuleList(
            nn.Linear(_named("student_widths", student_widths, s), _named("teacher_widths", teacher_widths, t))
            for t, s in self.pairs
        )

    def forward(self, task_loss: Tensor, teacher_features: Features, student_features: Features) -> Tensor:
        """The weighted sum, a 0-d tensor; arguments as in `BirdLoss.forward`.

        Raises:
            ValueError: a layer of ``pairs`` is not among the features, or shapes do not fit the widths.
        """
        total, last = self.alpha * _scalar(task_loss), {"task": task_loss.detach()}
        matched = self.matched(teacher_features, student_features)
        for regressor, (name, teacher, student) in zip(self.regressors, matched, strict=True):
            missed = _mean_squares(regressor, name, teacher, student)
            total = total + self.beta * missed
            last[f"hint/{name}"] = missed.detach()
        self.last = last
        return total


class LwF(_Guided):
    r"""Robust transfer by "learning without forgetting": the task, plus the L1 distance from a frozen source network.

    .. math:: L = \alpha \, L_{task} + \beta \sum_{(t, s)} \frac{1}{N} \sum_{i=1}^N \lVert S_{s,i} - T_{t,i} \rVert_1

    (Shafahi et al., Adversarially robust transfer learning, ICLR 2020. Their text does not define the distance; their
    code uses this one: summed over features, averaged over samples.) The student starts as a copy of the source with a
    new head; the layer is the penultimate one. The default weight 0.005 is that of BIRD's authors.

    Args:
        alpha: weight of the task's loss.
        beta: weight of the distance.
        pairs: ``(teacher layer, student layer)``, one or more; both layers of a pair have the same width.

    Attributes:
        last: as in `BirdLoss`: ``"task"``, and for each pair ``"l1/<teacher layer>/<student layer>"``.
    """

    def __init__(self, alpha: Weight = 1.0, beta: Weight = 0.005, pairs: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(alpha, beta, pairs)

    def forward(self, task_loss: Tensor, teacher_features: Features, student_features: Features) -> Tensor:
        """The weighted sum, a 0-d tensor; arguments as in `BirdLoss.forward`.

        Raises:
            ValueError: a layer of ``pairs`` is missing, or its features are not ``[N, D]`` of the same shape.
        """
        total, last = self.alpha * _scalar(task_loss), {"task": task_loss.detach()}
        for name, teacher, student in self.matched(teacher_features, student_features):
            if teacher.ndim != 2 or teacher.shape != student.shape:
                raise ValueError(
                    f"lwf {name!r}: teacher and student features {list(teacher.shape)} and {list(student.shape)} came; "
                    "they must be [N, D] of the same samples and as wide as each other, as of two networks of one kind"
                )
            wide = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
            distance = (student.to(wide) - teacher.to(wide)).abs().sum(1).mean()
            total = total + self.beta * distance
            last[f"l1/{name}"] = distance.detach()
        self.last = last
        return total


def _mean_squares(regressor: nn.Module, name: str, teacher: Tensor, student: Tensor) -> Tensor:
    """Mean of (r(student) - teacher)^2, 0-d, in the dtype of the map r: bf16 would round the difference away."""
    assert isinstance(regressor, nn.Linear)
    wide = regressor.weight.dtype
    needed = [len(teacher), regressor.out_features], [len(teacher), regressor.in_features]
    if (list(teacher.shape), list(student.shape)) != needed:
        raise ValueError(
            f"hint {name!r}: teacher and student features {list(teacher.shape)} and {list(student.shape)} "
            f"came, {needed[0]} and {needed[1]} are needed: the same samples, and widths as declared"
        )
    with torch.autocast(teacher.device.type, enabled=False):
        # Tensors from torch.inference_mode() are copied, since autograd refuses to save them.
        copy = not torch.compiler.is_compiling() and teacher.is_inference()
        return F.mse_loss(regressor(student.to(wide)), teacher.to(wide, copy=copy))


def _scalar(task_loss: Tensor) -> Tensor:
    """The loss of the task; one for each sample would multiply the guidance by their number in a sum."""
    if not isinstance(task_loss, Tensor) or task_loss.ndim > 0 or task_loss.is_complex():
        found = f"{task_loss.dtype} {list(task_loss.shape)}" if isinstance(task_loss, Tensor) else repr(task_loss)
        raise ValueError(f"task_loss must be a 0-d tensor of real numbers, got {found}: average it (reduction='mean')")
    return task_loss


_NO_GRADIENT = (
    "{}/{}: the student's features carry no gradient, so this pair trains nothing: the layer is frozen or its features "
    "were detached. To evaluate, wrap the call in torch.no_grad()"
)


def _number(weight: Weight) -> float:
    number: object = weight.item() if isinstance(weight, Tensor) and weight.ndim == 0 else weight
    if not isinstance(number, numbers.Real):
        raise TypeError(f"a weight must be a real number or a 0-d tensor of one, got {weight!r}")
    return float(number)


def _one_for_each(weights: Sequence[Weight] | Tensor, pairs: Sequence[tuple[str, str]]) -> list[float] | Tensor:
    listed = [*map(_number, weights)]
    if len(listed) != len(pairs):
        raise ValueError(f"weights must have one number for each pair, got {len(listed)} for {len(pairs)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in listed):
        raise ValueError(f"weights must be finite and not negative, not {listed}")
    if isinstance(weights, Tensor):
        return weights
    if any(isinstance(weight, Tensor) and weight.requires_grad for weight in weights):
        raise TypeError("weights that are learned come as one tensor [pairs], not as a list of tensors")
    return listed


def _named(what: str, mapping: Mapping[str, T], layer: str) -> T:
    if type(mapping) is not dict and not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must be a dict of layers, got {type(mapping).__name__}")
    if layer not in mapping:
        raise ValueError(f"{what} has no layer {layer!r}, which pairs names; it has {list(mapping)}")
    return mapping[layer]
