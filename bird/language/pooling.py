"""Pools the hidden states of tokens to one row per sequence, by attention mask and never by token id."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from bird_kernels import last_token, mean_tokens

Pooling = Literal["last", "first", "mean", "all"]


def pool_tokens(features: Tensor, mask: Tensor, pooling: Pooling = "last", *, virtual: int = 0) -> Tensor:
    """Pool token features to rows; padding may be on either side and contain anything.

    Args:
        features: ``[B, V + T, D]``.
        mask: ``[B, T]``, bool or integer; tokens with 0 are left out.
        pooling: ``"last"``, ``"first"``: that token of each sequence, ``[B, D]``; ``"mean"``: over its tokens,
            ``[B, D]``, in fp32 or wider; ``"all"``: every token is a row, ``[number of tokens, D]``, in order.
        virtual: V, the number of virtual tokens (prompt learning) at the front, outside of the mask; they are left out.

    Raises:
        ValueError: an unknown ``pooling``, shapes that do not fit, or a sequence without tokens.
    """
    require_pooling("pooling", pooling)
    if features.ndim != 3 or mask.ndim != 2 or features.shape[:2] != (len(mask), virtual + mask.shape[1]):
        raise ValueError(
            f"features must be [B, {virtual} + T, D] and the mask [B, T], got {[*features.shape]} and {[*mask.shape]}: "
            "tap a layer whose output keeps the tokens, such as a decoder block or the whole backbone"
        )
    features, mask = features[:, virtual:], mask.to(features.device) != 0
    if empty := (~mask.any(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"sequences {empty} of the batch have no token to pool: an empty text or response, or one that was cut"
        )
    if pooling == "all":
        return features[mask]
    if pooling == "mean":
        return mean_tokens(features, mask=mask)
    if pooling == "first":
        mask = mask & (mask.cumsum(1) == 1)
    return last_token(features, mask=mask)


def require_pooling(name: str, pooling: str) -> None:
    """Raise a ValueError unless ``pooling`` is known."""
    if pooling not in get_args(Pooling):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(Pooling)))}, not {pooling!r}")
