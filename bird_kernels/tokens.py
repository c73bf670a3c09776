r"""Token features: which tokens count as rows, and CKA of every sequence by itself.

Two layouts, for x and y alike, give the same numbers and gradients:

    padded   [B, T, d] with an attention mask [B, T], bool or integer (0 leaves a token out), as tokenizers return it;
             padding on either side or in the middle, no mask where nothing is padded
    packed   [sum of lengths, d] with ``cu_seqlens`` [B + 1], int32 or int64, as in variable-length attention: tokens
             of sequence b are the rows cu_seqlens[b] to cu_seqlens[b + 1], so it begins with 0 and ends with len(x)

Only the mask and ``cu_seqlens`` say where tokens are, never their ids. What padding holds, NaN too, does not matter,
and its gradient is zero. Nothing is read back from the device but a ``max_seqlen`` that was not given.
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
_Given: TypeAlias = tuple[Tensor | None, Tensor | None]  # mask and cu_seqlens of a side, as users give them


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

    - "all": all tokens of the batch, each a row;
    - "last": the last token of every sequence, B rows;
    - "mean": the mean over the tokens of every sequence, B rows;
    - "sequence": the tokens of one sequence at a time, and the losses averaged:

    .. math:: \frac{1}{|S|} \sum_{b \in S} (1 - \mathrm{CKA}(X_b, Y_b)), \quad S = \{b : n_b \ge n_{\min}\}

    with X_b, Y_b the n_b tokens of sequence b, centred over themselves, and n_min what the estimator needs (biased 2,
    unbiased 4): shorter sequences are left out, and do not count in the average.

    A sequence without tokens is left out everywhere. Where nothing or too little is left (fewer rows than the estimator
    needs; S empty) the loss is NaN, as for any mask: to raise, the rows would have to be counted on the host.

    Args:
        x: student features; fp64, fp32, bf16 or fp16.
        y: teacher features; their width and dtype may differ.
        tokens: "all", "last", "mean" or "sequence", see above.
        mask: padded layout: attention mask [B, T], bool or integer; None if all tokens count.
        cu_seqlens: packed layout: where sequences begin, [B + 1], int32 or int64.
        y_mask, y_cu_seqlens: the teacher's own layout, if its tokenizer cuts otherwise ("last" and "mean" only, where
            a sequence is one row; one side may be padded and the other packed). None: as x.
        max_seqlen: packed layout, "mean" and "sequence": no less than the longest sequence of either side. They pad in
            between, and without it they must read it from the device.
        estimator, and options: as in `bird_kernels.cka_loss`. For "sequence" the estimator only: it runs as batched
            library products, fp32 (fp64 if either side is), under plain autograd.

    Returns:
        0-d tensor, fp32 (fp64 if either input is).

    Raises:
        TypeError: features or masks of a wrong kind.
        ValueError: shapes that do not fit the layout, a mask beside cu_seqlens, an option that "sequence" lacks.

    Memory of "sequence": with c = 4 B T (p + q) bytes for the centred copies of both sides in fp32, the products take
    2 c at most, [B, T, T] or [B, p, p], [B, p, q] and [B, q, q] by the fewer operations. Forward and backward held 2 c
    to 3.5 c at their peak, 5 c where T = p + q (8 c with gradients of both sides). Nothing has (B T)^2 elements.
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
    """Checked: where the tokens of x and those of y are."""
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
    """What `cka_loss` compares: rows of both sides, which of them count, and how many dimensions index them."""
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
    """`cka_loss` of the rows that count.

    A CPU can look at the mask before it pays: without the rows that do not count, and the careful centring that a mask
    takes, 4,096 tokens of 576 and 384 features take 0.8 of the time, 256 last ones 0.7.
    """
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
    """The last token that counts of every sequence: [B, d], in the dtype of x, differentiable.

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
    """The mean over the tokens that count of every sequence: [B, d], differentiable.

    fp32 for half precision too (fp64 for fp64): a mean of bf16 tokens has more digits than bf16.

    Args:
        x: [B, T, d] with a ``mask`` [B, T] or None, or packed [N, d] with ``cu_seqlens`` [B + 1].
        max_seqlen: packed layout: no less than the longest sequence; None reads it from the device.

    A sequence without tokens gives a row of NaN.

    Raises:
        TypeError, ValueError: as `token_cka_loss`.
    """
    return _mean(x, _layout("x", x, mask, cu_seqlens, max_seqlen))


# ---------------------------------------------------------------------------------------------- layouts


class _Layout(NamedTuple):
    """Where the tokens of one side are: ``mask`` bool [B, T] or ``cu_seqlens`` int64 [B + 1]; neither: everywhere."""

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
        ends = cu_seqlens.tolist()  # on the host already
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


def _lengths(side: _Layout) -> Tensor | None:
    """Tokens of every sequence, [B]; None where all count."""
    if side.cu_seqlens is not None:
        return side.cu_seqlens.diff()
    return None if side.mask is None else side.mask.sum(1)


def _present(side: _Layout) -> Tensor | None:
    """Which sequences have tokens, bool [B]; None where all count."""
    lengths = _lengths(side)
    return None if lengths is None else lengths > 0


def _padded(x: Tensor, side: _Layout) -> tuple[Tensor, Tensor | None]:
    """x as [B, T, d] and its mask [B, T]."""
    if side.cu_seqlens is None:
        return x, side.mask
    starts, lengths = side.cu_seqlens[:-1], side.cu_seqlens.diff()
    longest = int(lengths.max()) if side.max_seqlen is None else side.max_seqlen
    rows = torch.arange(len(x), device=x.device)
    sequence = torch.searchsorted(side.cu_seqlens[1:], rows, right=True)
    # Written, not gathered: every row has one place, so the backward is a plain gather, and too small a max_seqlen is
    # an index out of range instead of tokens lost.
    padded = x.new_zeros(len(starts), longest, x.shape[1]).index_put((sequence, rows - starts[sequence]), x)
    return padded, torch.arange(longest, device=x.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------- rows


def _last(x: Tensor, side: _Layout) -> Tensor:
    if side.cu_seqlens is not None:
        if len(x) == 0:  # a rank without tokens: a row to point at, in the same graph
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
    """Rows of sequences without tokens become NaN, and pass no gradient."""
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
