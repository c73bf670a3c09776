r"""The public functions: their arguments, results and errors. `call` implements them.

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

    (Kornblith et al. 2019, eq. 4; the formula above is the biased estimator). Invariant to orthogonal transformations,
    shifts and isotropic scaling of either side.

    Args:
        x: student features, shape [n, ...]; fp64, fp32, bf16 or fp16.
        y: teacher features, shape [n, ...]; their width and dtype may differ (dtypes are promoted). For a side that
            does not require grad no gradient is computed.
            Both may be lists, which are pairs of layers: both tensors of a pair have the same rows, and one mask is
            used for all. The result is the sum of weight * loss over the pairs through one autograd node; on a GPU, if
            all pairs have the same rows and at most 512, they are computed in common launches.
        kernel: "linear"; "rbf", a Gaussian kernel whose sigma is the median distance; or an `RBF`.
        estimator: "biased" is the published loss. "unbiased" is HSIC_1 of Song et al. 2012: for unrelated features the
            expected loss is about 1 for any n; it may exceed 1 and is never clamped. Needs n >= 4. It is accurate if up
            to a quarter of the rows are far larger than the others (at most 64, on CUDA 32, where rows outnumber
            features; at most 10^5 times as large in the fused kernels of a GPU); beyond that it may be wrong, or 1.
        mask: bool, shape of the leading ``row_dims`` dimensions; False leaves a row out (its contents, even NaN, do not
            matter, and its gradient is zero). Equal to the call on the selected rows; shapes do not change and nothing
            is read back from the device, so fewer selected rows than the estimator needs give NaN, not an error.
        row_dims: how many leading dimensions index rows; 2 for tokens [batch, time, width].
        weights: one number for each pair of the lists, or a tensor [pairs], which receives a gradient; None: 1 each.
        group: a torch.distributed ProcessGroup (`torch.distributed.group.WORLD` is all ranks, once initialised): the
            loss of the rows of *all* its ranks, the same number on each. Ranks may have different numbers of rows, even
            none. Every rank must make the call, with the same widths, dtypes and options. None: this process alone.
            See below.
        sqrt: 1 - sqrt(CKA) instead, the hidden-state-matching loss of Dasgupta and Cohn 2025. Biased only.
        center: False leaves the features (for an RBF kernel, the Gram matrices) uncentred: 1 - the cosine of K and L
            (kernel alignment, Cristianini et al. 2001), which depends on a common offset. Biased only.
        backend: "auto" (the best that can run), "native", "triton", "library" or "reference" (the formula in fp64).
        precision: of fp32 products: None (PyTorch's own setting), "ieee", "tf32" or "tf32x3".

    Returns:
        0-d tensor, fp32 (fp64 if either input is), in [0, 1] up to rounding when biased. A side without variance has
        CKA 0: loss 1, zero gradient. NaN or Inf inputs give NaN. Sums are accumulated in fp32 or better.

    Raises:
        TypeError: inputs that are not strided floating-point tensors (sparse, nested, masked, sharded, complex), a mask
            that is not bool.
        ValueError: row counts, devices or mask shapes that do not fit, too few rows, an unknown option, a backend that
            cannot run here (with the reason), ranks that differ; lists that are empty or of different lengths, weights
            without lists.
        RuntimeError: another rank of ``group`` has failed (with its message).

    With ``group`` the gradient is that of the whole batch with respect to this rank's rows, *times the number of
    ranks*: averaged over the ranks, as DDP and FSDP do, it is the gradient of the whole batch. If gradients are summed
    instead, divide the loss by the number of ranks. Either merged sums or the rows themselves are communicated,
    whichever take less time (`explain`, docs/explain/scale.md), of all pairs together; the backward communicates
    nothing. A call that is not like one before it is agreed on first. Wrong or different arguments on one rank raise on
    every rank; a missing rank ends in the group's timeout. The host waits for the other hosts, on a GPU until the first
    collective is done. A CUDA graph cannot capture that, torch.compile breaks its graph there; torch.func and double
    backward are refused.

    Derivatives of any order and `torch.func` transforms work. In forward mode (`torch.func.jvp`, dual tensors) "auto"
    uses the literal formula (fp64, n x n matrices), and other backends are refused. `torch.jit.trace` is refused,
    except with the "reference" backend. Of a replicated DTensor the local tensor is used.

    Example:
        >>> loss = 0.1 * task + 0.9 * cka_loss(student_features, teacher_features)
    """
    statistic: Statistic = "sqrt_cka_loss" if sqrt else "cka_loss"
    options = Options(statistic, kernel, estimator, row_dims, group, center, backend, precision)
    return call.loss(x, y, mask, options, weights)


def cka_losses(
    x: Sequence[Tensor], y: Sequence[Tensor], *, mask: Tensor | None = None, sqrt: bool = False, **options: Any
) -> Tensor:
    """The losses of the pairs of two lists, [pairs], not summed; arguments as `cka_loss`, except weights."""
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
        0-d tensor, fp32 (fp64 if either input is); 1 for representations of equal geometry.
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

    for "biased" (Gretton et al. 2005, eq. 9); Song et al. 2012, eq. 5, for "unbiased". Its unit is the product of the
    squared units of both sides' features; with an RBF kernel it has none.

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

    of centred K and L (``center=False``: uncentred). This is the similarity-preserving loss of Tung and Mori 2019,
    eq. 4, without its normalisation of rows, so it is not invariant to scale. It grows with the fourth power of the
    features and with their width; scale them (``x / x.shape[1] ** 0.5``) or use an RBF kernel, which has no units.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).
    """
    options = Options("gram_mse", kernel, "biased", row_dims, None, center, backend, precision)
    return call.evaluate(x, y, mask, options)


def centered_gram(x: Tensor, *, kernel: str | RBF = "linear") -> Tensor:
    r"""H K H of x [n, ...]: the centred Gram matrix, [n, n], fp32 (fp64 for fp64).

    K is X X^T, where columns are centred before the product, so that a large mean costs no accuracy; or the Gram matrix
    of an `RBF` (of a pair of sigmas the first is used). Differentiable to any order.

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
    """How `cka_loss` would compute this call, without computing it. ``print`` the result.

    The arguments are those of `cka_loss` for one pair; pairs of a list are planned one by one, and share launches.

    With ``group`` every rank must call it; the plan shows what would be communicated, and the work of this rank.

    Returns:
        Plan with route, backend and the reason for it, on a GPU the predicted and measured time of every candidate,
        tiles, floating-point operations, bytes, workspace, the least time on known devices, and why others cannot run.
    """
    statistic: Statistic = "sqrt_cka_loss" if sqrt else "cka_loss"
    options = Options(statistic, kernel, estimator, row_dims, group, center, backend, precision)
    return call.plan_of(x, y, mask, options)
