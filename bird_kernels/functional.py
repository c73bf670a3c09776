r"""The functions that users call: what they take, give and raise. `call` has what happens then.

Everywhere, ``x`` has shape [n, ...] and ``y`` [n, ...]: the first ``row_dims`` dimensions index rows (samples), the
rest is flattened to features; the two widths may differ. Columns are centred over the rows of the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import call
from .types import RBF, Options, Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .types import Statistic


def cka_loss(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    *,
    kernel: str | RBF = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    weights: Sequence[float | Tensor] | Tensor | None = None,
    group: ProcessGroup | None = None,
    sqrt: bool = False,
    center: bool = True,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    r"""1 - CKA(x, y): the representation loss of BIRD (ICLR 2026).

    .. math::  1 - \frac{\langle K, L\rangle}{\sqrt{\langle K, K\rangle \langle L, L\rangle}},
               \quad K = X X^\top,\; L = Y Y^\top,\; \text{columns of } X, Y \text{ centred}

    (Kornblith et al. 2019, eq. 4; the formula above is the biased estimator). Exactly invariant to rotations, shifts
    and isotropic scale of either side.

    Args:
        x: student features, shape [n, ...]; fp64, fp32, bf16 or fp16.
        y: teacher features, shape [n, ...]; its width and dtype may differ (dtypes are promoted). A side that does not
            require grad costs no gradient.
            Both may be lists: pairs of layers, the two of a pair with the same rows; one mask for all. The result is
            the sum over the pairs of weight * loss through one autograd node; on a GPU, with the same rows for all and
            up to 512 of them, in common launches.
        kernel: "linear"; "rbf", a Gaussian kernel whose sigma is the median distance; or an `RBF`.
        estimator: "biased" is the published loss. "unbiased" is Song et al. 2012 (HSIC_1): for unrelated features the
            loss is 1 on average, whatever n; it may exceed 1 and is never clamped. Needs n >= 4. It keeps its digits
            where up to a quarter of the rows are far larger than the others (at most 64, on CUDA 32, where rows
            outnumber features; at most 10^5 times as large in the fused kernels of a GPU); else it may be wrong, or 1.
        mask: bool, shape of the leading ``row_dims`` dimensions; False leaves a row out (its contents, NaN too, do not
            matter, its gradient is zero). Equal to the call on the selected rows; shapes do not change and nothing is
            read back from the device, so fewer selected rows than the estimator needs give NaN instead of an error.
        row_dims: how many leading dimensions index rows; 2 for tokens [batch, time, width].
        weights: one number for each pair of the lists, or a tensor [pairs], which gets its gradient; None: 1 each.
        group: a torch.distributed ProcessGroup (`torch.distributed.group.WORLD` is all ranks, once initialised): the
            loss of the rows of *all* its ranks, the same number on each. Ranks may have different numbers of rows, none
            too. Every rank must make the call, with the same widths, dtypes and options. None: this process alone.
            See below.
        sqrt: 1 - sqrt(CKA) instead, the hidden-state-matching loss of Dasgupta and Cohn 2025. Biased only.
        center: False leaves the features (of an RBF kernel, the Gram matrices) as they are: 1 - the cosine of K and L
            (kernel alignment, Cristianini et al. 2001). Then a common offset counts. Biased only.
        backend: "auto" (the best that can run), "native", "triton", "library" or "reference" (fp64, literal, slow).
        precision: of fp32 products: None (PyTorch's own switch), "ieee", "tf32" or "tf32x3".

    Returns:
        0-d tensor, fp32 (fp64 if either input is), in [0, 1] up to rounding when biased. A side without variance has
        CKA 0: loss 1, zero gradient. NaN or Inf in gives NaN. Sums are accumulated in fp32 or better for every dtype.

    Raises:
        TypeError: inputs that are not strided floating-point tensors (sparse, nested, masked, sharded, complex), a mask
            that is not bool.
        ValueError: row counts, devices or mask shapes that do not fit, too few rows, an unknown option, a backend that
            cannot run here (with the reason), ranks that differ; lists that are empty or not of one length, weights
            without lists.
        RuntimeError: another rank of ``group`` has failed (with its message).

    With ``group`` the gradient is that of the whole batch with respect to this rank's rows, *times the number of
    ranks*: the average over ranks, which DDP and FSDP take, is then the gradient of the whole batch. Who sums gradients
    instead divides the loss by the number of ranks. Merged sums or the rows themselves travel, whichever are fewer
    bytes (`explain`, docs/explain/scale.md); the backward communicates nothing. Before anything travels the ranks tell
    each other what they have: one whose arguments are wrong, or different, is an error on every rank; one that never
    comes is left to the group's timeout. So the host waits for the other hosts, and for the GPU too where the group is
    NCCL alone (init_process_group() makes one with gloo beside it). A CUDA graph cannot capture that, torch.compile
    breaks its graph there; torch.func and double backward are refused.

    Any order of derivatives and `torch.func` transforms work. In forward mode (`torch.func.jvp`, dual tensors) "auto"
    takes the literal formula, fp64 and n x n, and other backends are refused. `torch.jit.trace` is refused, but for the
    "reference" backend. A DTensor is taken if it is replicated, as its local tensor.

    Example:
        >>> loss = 0.1 * task + 0.9 * cka_loss(student_features, teacher_features)
    """
    statistic: Statistic = "sqrt_cka_loss" if sqrt else "cka_loss"
    options = Options(statistic, kernel, estimator, row_dims, group, center, backend, precision)
    return call.loss(x, y, mask, options, weights)


def cka_losses(
    x: Sequence[Tensor], y: Sequence[Tensor], *, mask: Tensor | None = None, sqrt: bool = False, **options: Any
) -> Tensor:
    """The losses of the pairs of two lists, [pairs], not summed; arguments as `cka_loss`, without weights."""
    return call.losses(x, y, mask, Options("sqrt_cka_loss" if sqrt else "cka_loss", **options))


def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str | RBF = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    group: ProcessGroup | None = None,
    center: bool = True,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    """Centred kernel alignment of x [n, ...] and y [n, ...] (Kornblith et al. 2019); arguments as `cka_loss`.

    Returns:
        0-d tensor, fp32 (fp64 if either input is): 1 for representations of equal geometry.
    """
    options = Options("cka", kernel, estimator, row_dims, group, center, backend, precision)
    return call.evaluate(x, y, mask, options)


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str | RBF = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    r"""Hilbert-Schmidt independence criterion of x [n, ...] and y [n, ...]; arguments as `cka_loss`.

    .. math::  \mathrm{HSIC} = \frac{\mathrm{tr}(K H L H)}{(n-1)^2}

    for "biased" (Gretton et al. 2005, eq. 9); Song et al. 2012, eq. 5, for "unbiased". In units of the squares of both
    sides' features; of an RBF kernel, without units.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).
    """
    options = Options("hsic", kernel, estimator, row_dims, group, True, backend, precision)
    return call.evaluate(x, y, mask, options)


def gram_mse(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str | RBF = "linear",
    mask: Tensor | None = None,
    row_dims: int = 1,
    center: bool = True,
    backend: str = "auto",
    precision: str | None = None,
) -> Tensor:
    r"""Mean squared difference of the Gram matrices of x [n, ...] and y [n, ...]; arguments as `cka_loss`.

    .. math::  \frac{1}{n^2} \lVert K - L \rVert_F^2 = \frac{\langle K, K\rangle - 2 \langle K, L\rangle
               + \langle L, L\rangle}{n^2}

    of centred K and L (``center=False``: of K and L as they are). This is the similarity-preserving loss of Tung and
    Mori 2019, eq. 4, without its normalisation of rows: sizes count. In units of fourth powers of the features, so wide
    features weigh more; scale them (``x / x.shape[1] ** 0.5``) or take an RBF kernel, which has no units.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).
    """
    options = Options("gram_mse", kernel, "biased", row_dims, None, center, backend, precision)
    return call.evaluate(x, y, mask, options)


def centered_gram(x: Tensor, *, kernel: str | RBF = "linear") -> Tensor:
    r"""H K H of x [n, ...]: the centred Gram matrix, [n, n], fp32 (fp64 for fp64).

    K is X X^T, whose columns are centred before the product, so that a large mean costs no accuracy; or that of an
    `RBF` (a pair of sigmas: the first). Differentiable to any order.

    Raises:
        TypeError, ValueError: as `cka_loss`.
    """
    return call.gram(x, kernel)


def explain(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str | RBF = "linear",
    estimator: str = "biased",
    mask: Tensor | None = None,
    row_dims: int = 1,
    group: ProcessGroup | None = None,
    sqrt: bool = False,
    center: bool = True,
    backend: str = "auto",
    precision: str | None = None,
) -> Plan:
    """How `cka_loss` would compute this call; ``print`` the result. Takes its arguments, runs nothing.

    With ``group`` every rank must call it; what would travel is shown, and the work of this rank.

    Returns:
        Plan with route, backend and the reason for it, on a GPU every candidate's time as predicted and as measured,
        tiles, floating-point operations, bytes, workspace, the floor time on known devices, and why others cannot run.
    """
    statistic: Statistic = "sqrt_cka_loss" if sqrt else "cka_loss"
    options = Options(statistic, kernel, estimator, row_dims, group, center, backend, precision)
    return call.explain(x, y, mask, options)
