"""CKA and HSIC of more rows than fit in memory: statistics that are updated, merged, reduced over ranks and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import distributed, from_sums, inputs, ops, sums
from .backends.linalg import require_fp64
from .moments import Coefficients, Scalar
from .sums import Norms, Sums
from .types import Precision, Problem, Statistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Statistics:
    r"""Sufficient statistics for linear CKA and HSIC of two sets of features, of a size independent of their rows.

    ::

        statistics = Statistics()
        for images in loader:
            statistics.update(student(images), teacher(images))
        statistics.cka(), statistics.cka("unbiased")     # of the whole data set at once

    They are means, products and sums of squared row norms (`bird_kernels.sums`), :math:`p^2 + pq + q^2` numbers in fp64
    and a few vectors. Parts are merged about their common mean (Chan, Golub and LeVeque 1979), so any split of the
    rows over batches, processes or files gives the same value up to rounding. Products of one update are computed in
    the features' precision, at least fp32. Nothing is read back from the device; autograd records nothing (`gradient`).

    The unbiased estimator is accurate if up to a quarter of an update's rows, at most 64 (CUDA 32), are far larger than
    the others, by up to 10^6 times (`gradient`: 10^5): the sums hold fourth powers, in fp64.

    If the sums cannot represent the features' squares (spread below 1e-13 or above 1e13; in fp64 1e-72 and 1e72), all
    results are NaN: multiply the features by a number first, which does not change CKA.

    Args:
        precision: of the fp32 products, as in `bird_kernels.cka_loss`.
    """

    def __init__(self, *, precision: str | None = None) -> None:
        inputs.require_choice(precision=precision)
        self.precision: Precision | None = precision  # type: ignore[assignment]
        self._sums: Sums | None = None
        self._products = torch.float64  # the dtype in which products were computed: fp32 once one update was
        self._derivatives: dict[str, tuple[Coefficients, Sums, Sums]] = {}

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None = None, row_dims: int = 1) -> None:
        """Add any number of rows, even none.

        Args:
            x, y: features [n, ...] of the same samples; fp64, fp32, bf16 or fp16.
            mask: bool, shape of the leading ``row_dims`` dimensions; False leaves a row out, whatever it contains.
            row_dims: how many leading dimensions index rows; 2 for tokens [batch, time, width].

        Raises:
            TypeError, ValueError: as `bird_kernels.cka_loss`; also widths or a device other than before.
        """
        x, y, mask = inputs.as_rows(x, y, mask, row_dims)
        require_fp64("Statistics", x.device)
        if self._sums is not None:
            _require_same("x and y", (x.shape[1], y.shape[1], x.device), self._sums)
        with torch.inference_mode(False), torch.no_grad(), ops.without_autocast(x.device):
            part = sums.sums_of(x, y, mask, self._problem(x, y, "cka", "unbiased"))
            self._add(part, ops.value_dtype(x.dtype))

    def merge(self, other: Statistics) -> None:
        """Add the rows of other statistics, which are not changed.

        Raises:
            ValueError: their features have other widths, or they are on another device.
        """
        if other._sums is None:
            return
        if self._sums is not None:
            _require_same("the other statistics", (*_widths(other._sums), other._sums.n.device), self._sums)
        with torch.inference_mode(False):
            part = other._sums.copy() if self._sums is None else other._sums
            self._add(part, other._products)

    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Merge the statistics of all ranks, on each of them; a rank may have had no updates.

        Args:
            group: the ranks, all of which must call this; None: all ranks (the WORLD group).

        Raises:
            TypeError: ``group`` is not a process group, or torch.distributed is not initialised.
            ValueError: the ranks' features differ in widths or kind of device, or the group's backend does not support
                that device, or no rank has had an update; on every rank.
            RuntimeError: another rank has failed (with its message).
        """
        group = torch.distributed.group.WORLD if group is None else group
        distributed.world_size(group)
        assert group is not None
        kinds = ["none", *distributed.devices(group)]  # kinds of devices are exchanged as indices into this list
        error, mine = None, [0, 0, 0, 0]
        if self._sums is not None:
            try:
                distributed.require_device(self._sums.n.device, group)
                mine = [*_widths(self._sums), self._products.itemsize, kinds.index(self._sums.n.device.type)]
            except ValueError as raised:
                error = raised
        found = distributed.agree(group, error, {"statistic": "Statistics.all_reduce"}, mine)
        updated = [numbers for numbers in found if any(numbers)]
        if len({(p, q, kind) for p, q, _, kind in updated}) != 1:
            theirs = [f"{p} and {q} on {kinds[kind]}" if kind else "none" for p, q, _, kind in found]
            raise ValueError(
                "all ranks must have features of the same widths (x and y) on the same kind of device: they have "
                + ", ".join(f"{features} (rank {rank})" for rank, features in enumerate(theirs))
            )
        p, q, _, kind = updated[0]
        own = self._sums if self._sums is not None else sums.no_rows(p, q, torch.device(kinds[kind]))
        with torch.inference_mode(False):
            (self._sums,) = sums.merged([own], distributed.all_reduce(torch.cat(sums.totals_of(own)), group), group)
        self._products = torch.float32 if min(itemsize for _, _, itemsize, _ in updated) == 4 else torch.float64
        self._derivatives = {}

    @property
    def n(self) -> int:
        """The number of rows so far, without masked ones. Synchronises with the device."""
        return 0 if self._sums is None else int(self._sums.n)

    def cka(self, estimator: str = "biased") -> Tensor:
        """CKA of all rows, as `bird_kernels.cka` defines it: 0-d, fp64; NaN for fewer rows than the estimator needs.

        Raises:
            ValueError: there was no update, or the estimator is unknown.
        """
        return self._value("cka", estimator)

    def hsic(self, estimator: str = "biased") -> Tensor:
        """HSIC of all rows, as `bird_kernels.hsic` defines it: 0-d, fp64; otherwise as `cka`."""
        return self._value("hsic", estimator)

    def gradient(
        self, x: Tensor, y: Tensor, estimator: str = "biased", *, row_dims: int = 1, upstream: Scalar = 1.0
    ) -> Tensor:
        r"""d (1 - CKA of all rows) / dx for some of the rows, to back-propagate a batch part by part.

        .. math:: \frac{2}{\sqrt{bc}} \Big( \frac{a}{b} X X_*^\top X_* - Y Y_*^\top X_* \Big), \quad
                  a = \|Y_*^\top X_*\|^2,\; b = \|X_*^\top X_*\|^2,\; c = \|Y_*^\top Y_*\|^2

        for "biased", with X, Y the given rows and X_*, Y_* all rows, minus the means of all; for "unbiased" see
        `bird_kernels.from_sums`.

        Args:
            x, y, row_dims: rows that were given to `update` before.
            estimator: "biased" or "unbiased".
            upstream: a factor of the result, applied before rounding to the dtype of the result.

        Returns:
            A tensor of the shape of ``x``, in the dtype that ``x`` and ``y`` promote to.

        Raises:
            TypeError, ValueError: as `update` and `cka`.
        """
        shape = x.shape
        x, y, _ = inputs.as_rows(x, y, None, row_dims)
        _require_same("x and y", (x.shape[1], y.shape[1], x.device), self._known())
        with torch.no_grad(), ops.without_autocast(x.device):
            if estimator not in self._derivatives:
                _, coefficients, scaled = self._evaluate("cka_loss", estimator)
                self._derivatives[estimator] = coefficients, scaled.to(self._products), scaled
            coefficients, rounded, scaled = self._derivatives[estimator]
            problem = self._problem(x, y, "cka_loss", estimator)
            own = from_sums.gradient(x, y, None, rounded, coefficients, upstream, problem=problem, exact=scaled)
        return own.view(shape)

    def to(self, device: torch.device | str) -> Statistics:
        """The statistics on another device: a new object, or self if they are there already."""
        if self._sums is None or self._sums.n.device == torch.device(device):
            return self
        moved = {name: value if name == "eps" else value.to(device) for name, value in self.state_dict().items()}
        return Statistics.from_state_dict(moved, precision=self.precision)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name for `torch.save` or safetensors, on the statistics' device; empty before an update.

        Only "eps", the machine epsilon of the products, is on the CPU, where it can be read without synchronisation.
        """
        if self._sums is None:
            return {}
        eps = torch.full((), torch.finfo(self._products).eps, dtype=torch.float64, device="cpu")
        return {name: value.clone() for name, value in self._sums.named().items()} | {"eps": eps}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, precision: str | None = None) -> Statistics:
        """Restore statistics from a `state_dict`.

        Raises:
            ValueError: a name is missing, or what it stands for has no such shape or dtype.
        """
        new = cls(precision=precision)
        if not state:
            return new
        try:
            norms = Norms(**{name: state[f"norms.{name}"] for name in Norms._fields})
            saved = Sums(norms=norms, **{name: state[name] for name in Sums._fields if name != "norms"})
            eps = state["eps"]
        except KeyError as missing:
            raise ValueError(f"no state of Statistics: {missing} is not among {sorted(map(str, state))}") from missing
        _require_state(saved, eps)
        new._products = torch.float64 if eps < 1e-12 else torch.float32
        with torch.inference_mode(False):
            new._sums = saved.copy()
        return new

    def __repr__(self) -> str:
        if self._sums is None:
            return "Statistics(n=0)"
        p, q = _widths(self._sums)
        return f"Statistics(n={self.n}, x={p} features, y={q} features, device={self._sums.n.device})"

    def _add(self, part: Sums, products: torch.dtype) -> None:
        if products == torch.float32:
            self._products = torch.float32
        self._sums = part.to(torch.float64) if self._sums is None else sums.include(self._sums, part)
        self._derivatives = {}

    def _known(self) -> Sums:
        if self._sums is None:
            raise ValueError("there are no statistics yet: call update() first")
        return self._sums

    def _evaluate(self, statistic: Statistic, estimator: str) -> tuple[Scalar, Coefficients, Sums]:
        inputs.require_choice(estimator=estimator)
        s = self._known()
        problem = Problem(0, *_widths(s), self._products, s.n.device, statistic, estimator)  # type: ignore[arg-type]
        wanted = s if estimator == "unbiased" else s._replace(norms=None)
        return from_sums.value_of(wanted.copy(), problem)

    def _value(self, statistic: Statistic, estimator: str) -> Tensor:
        value, _, _ = self._evaluate(statistic, estimator)
        return torch.as_tensor(value, dtype=torch.float64, device=self._known().n.device)

    def _problem(self, x: Tensor, y: Tensor, statistic: Statistic, estimator: str) -> Problem:
        sizes = x.shape[0], x.shape[1], y.shape[1]
        return Problem(*sizes, x.dtype, x.device, statistic, estimator, self.precision)  # type: ignore[arg-type]


def _widths(s: Sums) -> tuple[int, int]:
    return len(s.mean_x), len(s.mean_y)


def _require_same(what: str, kind: tuple[int, int, torch.device], s: Sums) -> None:
    """Raise a ValueError unless ``kind``, i.e. both widths and the device, is that of ``s``."""
    p, q, device = kind
    if (p, q) != _widths(s):
        known = "{} and {}".format(*_widths(s))
        raise ValueError(f"these statistics are of x and y with {known} features; {what} have {p} and {q}")
    if device != s.n.device:
        raise ValueError(f"these statistics are on {s.n.device}, {what} on {device}: move them with .to()")


PRODUCTS = torch.float32, torch.float64


def _require_state(saved: Sums, eps: object) -> None:
    """Raises a ValueError unless shapes, dtypes and devices fit together. Values on a device are not looked at."""
    parts = saved.named()
    for name, value in (parts | {"eps": eps}).items():
        if not isinstance(value, Tensor) or value.dtype not in PRODUCTS or value.layout != torch.strided:
            raise ValueError(f"a damaged state of Statistics: {name} is no tensor of fp32 or fp64")
    assert isinstance(eps, Tensor)
    p, q = saved.mean_x.numel(), saved.mean_y.numel()
    right = sums.no_rows(p, q, torch.device("meta")).named()
    for name, value in parts.items():
        shape, device = right[name].shape, saved.n.device
        if value.shape != shape or value.device != device:
            raise ValueError(
                f"a damaged state of Statistics: {name} is {list(value.shape)} on {value.device}, not "
                f"{list(shape)} on {device}"
            )
        if value.dtype != torch.float64 and name not in ("xx", "xy", "yy"):
            raise ValueError(f"a damaged state of Statistics: {name} is {value.dtype}, not torch.float64")
    if len({saved.xx.dtype, saved.xy.dtype, saved.yy.dtype}) > 1:
        raise ValueError("a damaged state of Statistics: xx, xy and yy are not of one dtype")
    if saved.n.device.type == "cpu" and any((own.diagonal() < 0).any() for own in (saved.xx, saved.yy)):
        raise ValueError("a damaged state of Statistics: a sum of squares is negative")
    if eps.numel() != 1 or eps.device.type != "cpu" or not 0 < float(eps) <= 1:
        raise ValueError("a damaged state of Statistics: eps is no number above 0 on the CPU")
    n = saved.n
    if n.device.type == "cpu" and not (n.item() >= 0 and float(n).is_integer()):
        raise ValueError(f"a damaged state of Statistics: n is {n.item()}, no number of rows")
