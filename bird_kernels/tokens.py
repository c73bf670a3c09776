r"""CKA of token features: of all tokens, of one row per sequence, or of each sequence separately.

A token *counts* if it belongs to a sequence, that is, if it is not padding. Two layouts, possible for x and y alike,
give the same values and gradients:

    padded   [B, T, d] with an attention mask [B, T], bool or integer (0 leaves a token out), as tokenizers return it;
             padding on either side or in the middle, no mask where nothing is padded
    packed   [sum of lengths, d] with ``cu_seqlens`` [B + 1], int32 or int64, as in variable-length attention: the
             tokens of sequence b are the rows cu_seqlens[b]:cu_seqlens[b + 1], so it begins with 0, ends with len(x)

Only the mask and ``cu_seqlens`` say where tokens are, never token ids. The contents of padding, even NaN, change
nothing, and their gradient is zero. The only value read back from a GPU is a ``max_seqlen`` that was not given.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from . import distributed, inputs, ops
from .functional import cka_loss
from .moments import MIN_ROWS
from .sequences import mean_cka_loss

Tokens = Literal["all", "last", "mean", "sequence"]
_Given: TypeAlias = tuple[Tensor | None, Tensor | None]  # mask and cu_seqlens of one side, not checked yet


def token_cka_loss(
    x: Tensor,
    y: Tensor,
    *,
    tokens: Tokens = "all",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    y_mask: Tensor | None = None,
    y_cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    estimator: str = "biased",
    **options: Any,
) -> Tensor:
    r"""1 - CKA of token features x and y, padded [B, T, p], [B, T, q] or packed [N, p], [N, q].

    ``tokens`` says what is compared:

    - "all": all tokens of the batch, each of them a row;
    - "last": the last token of each sequence, B rows;
    - "mean": the mean over the tokens of each sequence, B rows;
    - "sequence": the tokens of one sequence at a time; the losses of the sequences are averaged:

    .. math:: \frac{1}{|S|} \sum_{b \in S} (1 - \mathrm{CKA}(X_b, Y_b)), \quad S = \{b : n_b \ge n_{\min}\}

    with X_b, Y_b the n_b tokens of sequence b, centred by their own mean, and n_min the number of rows that the
    estimator needs (biased 2, unbiased 4). Shorter sequences are not part of the average.

    A sequence without tokens is always left out. If fewer rows are left than the estimator needs, or S is empty, the
    loss is NaN, as for any mask: an error would require the rows to be counted on the host.

    Args:
        x: student features; fp64, fp32, bf16 or fp16.
        y: teacher features; their width and dtype may differ.
        tokens: "all", "last", "mean" or "sequence", see above.
        mask: padded layout: attention mask [B, T], bool or integer; None if all tokens count.
        cu_seqlens: packed layout: where sequences begin, [B + 1], int32 or int64.
        y_mask, y_cu_seqlens: the teacher's own layout, if its tokenizer splits text differently (only with "last" and
            "mean", where a sequence is one row; one side may be padded and the other packed). None: as x.
        max_seqlen: packed layout, "mean" and "sequence": an upper bound of both sides' lengths, to which sequences are
            padded internally. None: the longest length is read from the device.
        estimator, and options: as in `bird_kernels.cka_loss`. "sequence" takes the estimator alone: it runs as batched
            matrix products in fp32 (fp64 if either side is), under plain autograd.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).

    Raises:
        TypeError: features, masks or cu_seqlens that are no tensors or have a wrong dtype.
        ValueError: shapes that do not fit the layout, a mask together with cu_seqlens, an option that "sequence" lacks.
        IndexError: a ``max_seqlen`` below the longest sequence (on CUDA a device-side assertion).

    Memory of "sequence": let c = 4 B T (p + q) bytes, the size of the centred copies of both sides in fp32. The
    products take at most 2 c: [B, T, T], or [B, p, p], [B, p, q] and [B, q, q], whichever needs fewer operations. The
    measured peak of forward and backward is 2 c to 3.5 c, and 5 c where T = p + q (8 c with gradients of both sides).
    """
    with distributed.Reported(options.get("group")):
        ours, theirs = _layouts(x, y, tokens, (mask, cu_seqlens), (y_mask, y_cu_seqlens), max_seqlen)
        if tokens == "sequence":
            return _per_sequence(x, y, ours, theirs, estimator, options)
        x, y, mask, row_dims = _rows(x, y, tokens, ours, theirs)
    return _of_rows(x, y, mask, row_dims, estimator, options)


def _layouts(
    x: Tensor, y: Tensor, tokens: Tokens, given: _Given, y_given: _Given, max_seqlen: int | None
) -> tuple[_Layout, _Layout]:
    """Check the arguments and return the layouts of x and of y."""
    inputs.require_choice({"tokens": get_args(Tokens)}, tokens=tokens)
    ours = _layout("x", x, *given, max_seqlen)
    own = any(place is not None for place in y_given)
    if own and tokens in ("all", "sequence"):
        raise ValueError(
            f'tokens="{tokens}" compares token by token, so x and y share their layout: leave out y_mask and '
            'y_cu_seqlens, or take tokens="last" or "mean"'
        )
    if not own:
        _require_same_tokens(x, y, ours)
    return ours, _layout("y", y, *(y_given if own else given), max_seqlen)


def _rows(
    x: Tensor, y: Tensor, tokens: Tokens, ours: _Layout, theirs: _Layout
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The arguments of `cka_loss`: rows of x and of y, their mask or None, and ``row_dims``."""
    if tokens == "all":
        return x, y, ours.mask, 2 if ours.cu_seqlens is None else 1
    pool = _last if tokens == "last" else _mean
    x, y = pool(x, ours), pool(y, theirs)
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same sequences, got {len(x)} for x and {len(y)} for y")
    present = [rows for rows in (_present(ours), _present(theirs)) if rows is not None]
    return x, y, present[0] & present[-1] if present else None, 1


def _of_rows(
    x: Tensor, y: Tensor, mask: Tensor | None, row_dims: int, estimator: str, options: dict[str, Any]
) -> Tensor:
    """`cka_loss` of the rows that count; a CPU, where reading the mask is cheap, drops others first: 4,096 tokens of
    576 and 384 features then take 0.8 of the time, 256 last tokens 0.7."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if mask is not None and mask.is_cpu and not traced and options.get("group") is None:
        rows = mask.flatten().nonzero().squeeze(1)
        if len(rows) >= MIN_ROWS.get(estimator, 0):  # with fewer the loss is NaN, which without a mask is an error
            if len(rows) < mask.numel():
                x, y = (a.flatten(0, row_dims - 1).index_select(0, rows) for a in (x, y))
                row_dims = 1
            mask = None
    return cka_loss(x, y, mask=mask, row_dims=row_dims, estimator=estimator, **options)


def last_token(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last token of each sequence that is not padding: [B, d], in the dtype of x, differentiable.

    Args:
        x: [B, T, d] with a ``mask`` [B, T] or None, or packed [N, d] with ``cu_seqlens`` [B + 1].

    A sequence without tokens gives a row of NaN.

    Raises:
        TypeError, ValueError: as `token_cka_loss`.
    """
    return _last(x, _layout("x", x, mask, cu_seqlens))


def mean_tokens(
    x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> Tensor:
    """The mean over the tokens of each sequence, padding left out: [B, d], differentiable.

    The result is fp32 (fp64 for fp64), also of half precision: a mean of bf16 tokens has more digits than bf16 holds.

    Args:
        x: [B, T, d] with a ``mask`` [B, T] or None, or packed [N, d] with ``cu_seqlens`` [B + 1].
        max_seqlen: packed layout: an upper bound of the sequences' lengths; None reads the longest from the device.

    A sequence without tokens gives a row of NaN.

    Raises:
        TypeError, ValueError: as `token_cka_loss`.
    """
    return _mean(x, _layout("x", x, mask, cu_seqlens, max_seqlen))


# ---------------------------------------------------------------------------------------------- layouts


class _Layout(NamedTuple):
    """Where the tokens of one side are: ``mask`` bool [B, T] or ``cu_seqlens`` int64 [B + 1]; neither: no padding."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def _layout(
    name: str, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None = None
) -> _Layout:
    packed = cu_seqlens is not None
    if packed and mask is not None:
        raise ValueError("give a mask (padded features [B, T, d]) or cu_seqlens (packed features [N, d]), not both")
    inputs.require_features(1, **{name: x})
    if x.dim() != (2 if packed else 3):
        need = "packed: [N, d] with cu_seqlens" if packed else "padded: [B, T, d]; packed [N, d] need cu_seqlens"
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which is not {need}")
    if cu_seqlens is not None:
        _require_cu_seqlens(name, x, cu_seqlens)
        return _Layout(None, cu_seqlens.long(), max_seqlen)
    if isinstance(mask, Tensor) and not (mask.dtype.is_floating_point or mask.dtype.is_complex):
        mask = mask != 0  # tokenizers return int64
    if mask is not None:
        inputs.require_mask(mask, x.shape[:2], x.device)
    return _Layout(mask, None, max_seqlen)


def _require_cu_seqlens(name: str, x: Tensor, cu_seqlens: object) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on the features' device {x.device}, got {cu_seqlens.device}")
    if cu_seqlens.is_cpu and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()  # needs no synchronisation: the tensor is on the host
        if ends[0] != 0 or ends[-1] != len(x) or sorted(ends) != ends:
            raise ValueError(f"cu_seqlens must rise from 0 to the rows of {name}, {len(x)}; got {ends}")


def _require_same_tokens(x: Tensor, y: Tensor, side: _Layout) -> None:
    """Raises a ValueError unless y can share the layout of x."""
    if side.mask is None and side.cu_seqlens is None:
        return
    rows = 2 if side.cu_seqlens is None else 1
    if isinstance(y, Tensor) and y.shape[:rows] != x.shape[:rows]:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}: other tokens. Give its own layout as y_mask or "
            'y_cu_seqlens, which tokens="last" and "mean" can compare'
        )


def _present(side: _Layout) -> Tensor | None:
    """Which sequences have tokens, bool [B]; None if all have."""
    if side.cu_seqlens is not None:
        return side.cu_seqlens.diff() > 0
    return None if side.mask is None else side.mask.any(1)


def _padded(x: Tensor, side: _Layout) -> tuple[Tensor, Tensor | None]:
    """x in the padded layout, [B, T, d], and its mask [B, T] or None."""
    if side.cu_seqlens is None:
        return x, side.mask
    starts, lengths = side.cu_seqlens[:-1], side.cu_seqlens.diff()
    longest = int(lengths.max()) if side.max_seqlen is None else side.max_seqlen
    rows = torch.arange(len(x), device=x.device)
    sequence = torch.searchsorted(side.cu_seqlens[1:], rows, right=True)
    # Rows are scattered, not gathered: each has one place, so the backward is a plain gather, and a max_seqlen that is
    # too small is an index out of range instead of a silent loss of tokens.
    padded = x.new_zeros(len(starts), longest, x.shape[1]).index_put((sequence, rows - starts[sequence]), x)
    return padded, torch.arange(longest, device=x.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------- rows


def _last(x: Tensor, side: _Layout) -> Tensor:
    if side.cu_seqlens is not None:
        if len(x) == 0:  # a rank without tokens: the index below needs a row, and the result must stay in the graph
            x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        rows = x[side.cu_seqlens[1:] - 1]
    elif side.mask is not None:
        places = torch.arange(x.shape[1], device=x.device)
        last = torch.where(side.mask, places, 0).amax(1)
        rows = x[torch.arange(x.shape[0], device=x.device), last]
    else:
        rows = x[:, -1]
    return _without_absent(rows, side)


def _mean(x: Tensor, side: _Layout) -> Tensor:
    x, mask = _padded(x, side)
    wide = ops.value_dtype(x.dtype)
    if mask is None:
        return x.mean(1, dtype=wide)
    total = torch.where(mask[:, :, None], x, 0.0).sum(1, dtype=wide)
    return _without_absent(total / mask.sum(1, keepdim=True).clamp(min=1), side)


def _without_absent(rows: Tensor, side: _Layout) -> Tensor:
    """``rows`` [B, d] with NaN for sequences without tokens, through which no gradient passes."""
    present = _present(side)
    return rows if present is None else torch.where(present[:, None], rows, torch.nan)


def _per_sequence(
    x: Tensor, y: Tensor, ours: _Layout, theirs: _Layout, estimator: str, options: dict[str, Any]
) -> Tensor:
    if options:
        raise ValueError(f'tokens="sequence" takes an estimator and no {", ".join(options)}: it is linear CKA')
    inputs.require_choice(estimator=estimator)
    (x, mask), (y, _) = _padded(x, ours), _padded(y, theirs)
    if x.shape[:2] != y.shape[:2] or x.device != y.device:
        raise ValueError(
            f"x and y must have the same sequences on one device, got {tuple(x.shape)} on {x.device} and "
            f"{tuple(y.shape)} on {y.device}"
        )
    if x.shape[1] < MIN_ROWS[estimator]:
        raise ValueError(
            f'estimator="{estimator}" needs at least {MIN_ROWS[estimator]} tokens in a sequence, got {x.shape[1]}'
        )
    with ops.without_autocast(x.device):
        return mean_cka_loss(x, y, mask, estimator)  # type: ignore[arg-type]
