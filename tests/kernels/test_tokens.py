"""Token features: every mode and layout against tokens picked one by one in Python, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bird_kernels import last_token, mean_tokens, plan, reference, token_cka_loss
from tests.accuracy import Result, evaluate, features

MODES = ["all", "last", "mean", "sequence"]
LEAST = {"biased": 2, "unbiased": 4}
P, Q = 6, 5
LENGTHS = [9, 3, 0, 7, 1, 9, 5, 8]  # full, short, empty


def attention(padding: str, device: torch.device, steps: int = 9) -> Tensor:
    """bool [8, steps]: tokens begin, end, or are strewn among padding."""
    lengths = torch.tensor(LENGTHS)[:, None]
    places = torch.arange(steps)
    if padding == "strewn":
        order = torch.rand(len(LENGTHS), steps, generator=torch.Generator().manual_seed(0)).argsort(1)
        return (order < lengths).to(device)
    return (places < lengths if padding == "right" else places >= steps - lengths).to(device)


def padded(mask: Tensor, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x [B, T, P] and y [B, T, Q] that share geometry, NaN where there is no token."""
    sides = features(mask.numel(), P, Q, dtype, mask.device, mean)
    x, y = (side.reshape(*mask.shape, -1).masked_fill(~mask[:, :, None], torch.nan) for side in sides)
    return x, y


def packed(mask: Tensor, *sides: Tensor, dtype: torch.dtype = torch.int32) -> tuple[Tensor, ...]:
    """cu_seqlens and the packed sides."""
    ends = mask.sum(1).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(dtype), *(side[mask] for side in sides)


def literal(tokens: str, mask: Tensor, estimator: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The definition, one sequence and token at a time."""

    def rows(side: Tensor) -> list[Tensor]:
        return [torch.stack([s[t] for t in range(len(m)) if m[t]]) for s, m in zip(side, mask, strict=True) if m.any()]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        xs, ys = rows(x), rows(y)
        if tokens == "sequence":
            pairs = [(a, b) for a, b in zip(xs, ys, strict=True) if len(a) >= LEAST[estimator]]
            return torch.stack([reference.cka_loss(a, b, None, estimator) for a, b in pairs]).mean()
        pool = {"all": lambda s: s, "last": lambda s: s[-1:], "mean": lambda s: s.mean(0, keepdim=True)}[tokens]
        x, y = (torch.cat([pool(s) for s in side]) for side in (xs, ys))
        return reference.cka_loss(x, y, None, estimator)

    return loss


def assert_same(found: Result, true: Result, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found.value.double(), true.value.double(), rtol=0, atol=tolerance)
    for got, want in ((found.dx, true.dx), (found.dy, true.dy)):
        assert want.norm() > 1e-3
        assert (got.double() - want).norm() < 5 * tolerance * want.norm()


# Values and gradients


@pytest.mark.parametrize("padding", ["left", "right", "strewn"])
@pytest.mark.parametrize("tokens", MODES)
def test_is_the_definition(tokens: str, padding: str, estimator: str, device: torch.device) -> None:
    """Padding holds NaN and gets no gradient. The mask is what a tokenizer returns."""
    mask = attention(padding, device)
    x, y = padded(mask, mean=3.0)
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens=tokens, mask=mask.long(), estimator=estimator), x, y)
    true = evaluate(literal(tokens, mask, estimator), x.double(), y.double())
    assert found.value.dtype == torch.float32
    assert_same(found, true)
    assert found.dx[~mask].eq(0).all()
    assert found.dy[~mask].eq(0).all()


@pytest.mark.parametrize("tokens", MODES)
def test_packed_is_padded(tokens: str, estimator: str, device: torch.device) -> None:
    """Up to the order of sums; with and without the longest length."""
    mask = attention("right", device)
    sides = padded(mask, mean=3.0)
    options = dict(tokens=tokens, estimator=estimator)
    expected = evaluate(lambda a, b: token_cka_loss(a, b, mask=mask, **options), *sides)
    for dtype, longest in ((torch.int32, 9), (torch.int64, None), (torch.int32, 12)):
        cu_seqlens, *rows = packed(mask, *sides, dtype=dtype)
        layout = dict(cu_seqlens=cu_seqlens, max_seqlen=longest)
        found = evaluate(lambda a, b, layout=layout: token_cka_loss(a, b, **layout, **options), *rows)
        assert_same(found, Result(expected.value, expected.dx[mask].double(), expected.dy[mask].double()))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("tokens", MODES)
def test_no_nan_on_the_way(tokens: str, estimator: str, device: torch.device) -> None:
    """Empty and short sequences leave none in the backward, where users look with anomaly detection."""
    mask = attention("right", device)
    with torch.autograd.detect_anomaly():
        found = evaluate(
            lambda a, b: token_cka_loss(a, b, tokens=tokens, mask=mask, estimator=estimator), *padded(mask)
        )
    assert found.value.isfinite()


@pytest.mark.parametrize("tokens", MODES)
def test_without_a_mask_all_count(tokens: str, device: torch.device) -> None:
    everywhere = torch.ones(6, 7, dtype=torch.bool, device=device)
    x, y = padded(everywhere)
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens=tokens), x, y)
    assert_same(found, evaluate(literal(tokens, everywhere, "biased"), x.double(), y.double()))


@pytest.mark.parametrize("tokens", MODES)
def test_dtypes_of_the_sides_may_differ(tokens: str, device: torch.device) -> None:
    mask = attention("right", device)
    x, y = padded(mask)
    half = x.bfloat16()
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens=tokens, mask=mask), half, y)
    true = evaluate(literal(tokens, mask, "biased"), half.double(), y.double())
    assert found.dx.dtype == torch.bfloat16
    assert_same(found._replace(dx=true.dx), true)
    assert (found.dx.double() - true.dx).norm() < 4e-3 * true.dx.norm()  # rounded once, to 8 bits
    assert token_cka_loss(half, y.double(), tokens=tokens, mask=mask).dtype == torch.float64


@pytest.mark.parametrize("tokens", MODES)
def test_autocast_rounds_nothing(tokens: str, device: torch.device) -> None:
    mask = attention("left", device)
    x, y = padded(mask)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = token_cka_loss(x, y, tokens=tokens, mask=mask)
    assert found == token_cka_loss(x, y, tokens=tokens, mask=mask)


# One sequence at a time


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_more_tokens_than_features(mean: float, estimator: str, device: torch.device) -> None:
    """The products of features are fewer then."""
    assert plan.choose_route(23, P, Q) == "cross"
    mask = attention("strewn", device, 23)
    x, y = padded(mask, mean)
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens="sequence", mask=mask, estimator=estimator), x, y)
    true = evaluate(literal("sequence", mask, estimator), x.double(), y.double())
    assert_same(found, true, 2e-6 if mean == 0 else 2e-5)


@pytest.mark.parametrize("steps", [9, 23])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_do_not_matter_nor_means_much(scale: float, steps: int, estimator: str, device: torch.device) -> None:
    """Neither the batch's nor one sequence's: each has its own power of two."""
    mask = attention("right", device, steps)
    x, y = padded(mask, mean=10.0)
    scales = torch.full((len(x), 1, 1), scale, device=device)
    scales[::2] = 1.0
    options = dict(tokens="sequence", mask=mask, estimator=estimator)
    expected = token_cka_loss(x, y, **options)
    torch.testing.assert_close(token_cka_loss(x * scales, y / scales, **options), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("steps", [9, 23])
def test_a_constant_sequence_has_loss_one(steps: int, estimator: str, device: torch.device) -> None:
    mask = attention("right", device, steps)
    mask[1:] = False
    x, y = padded(mask)
    x[0] = torch.linspace(0.1, 700.3, P, device=device)
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens="sequence", mask=mask, estimator=estimator), x, y)
    assert found.value == 1.0
    assert found.dx.eq(0).all()
    assert found.dy.eq(0).all()


@pytest.mark.parametrize("steps", [9, 23])
def test_nan_is_hidden_in_short_sequences_only(steps: int, estimator: str, device: torch.device) -> None:
    mask = attention("right", device, steps)
    x, y = padded(mask)
    options = dict(tokens="sequence", mask=mask, estimator=estimator)
    expected = evaluate(lambda a, b: token_cka_loss(a, b, **options), x, y)
    x[4, 0] = torch.nan  # its only token
    found = evaluate(lambda a, b: token_cka_loss(a, b, **options), x, y)
    assert found.value == expected.value
    assert found.dx.equal(expected.dx)
    assert found.dy.equal(expected.dy)
    x[0, 0, 0] = torch.nan
    assert token_cka_loss(x, y, **options).isnan()


@pytest.mark.parametrize("tokens", MODES)
def test_nothing_to_compare_is_nan(tokens: str, estimator: str, device: torch.device) -> None:
    """It cannot raise: counting would wait for the device."""
    mask = attention("right", device)
    x, y = (side.nan_to_num() for side in padded(mask))
    assert token_cka_loss(x, y, tokens=tokens, mask=torch.zeros_like(mask), estimator=estimator).isnan()
    short = torch.arange(9, device=device).expand(8, 9) < LEAST[estimator] - 1
    if tokens == "sequence":
        assert token_cka_loss(x, y, tokens=tokens, mask=short, estimator=estimator).isnan()


# Rows


def test_the_last_token_is_found_by_the_mask(device: torch.device) -> None:
    x = torch.arange(4 * 5 * 2.0, device=device).reshape(4, 5, 2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], device=device)
    nothing = [torch.nan, torch.nan]
    expected = torch.tensor([[4.0, 5.0], [18.0, 19.0], [26.0, 27.0], nothing], device=device)
    torch.testing.assert_close(last_token(x, mask), expected, rtol=0, atol=0, equal_nan=True)
    cu_seqlens, rows = packed(mask.bool(), x)
    torch.testing.assert_close(last_token(rows, cu_seqlens=cu_seqlens), expected, rtol=0, atol=0, equal_nan=True)
    assert last_token(x).equal(x[:, 4])
    assert last_token(x.half(), mask).dtype == torch.float16


def test_a_mean_counts_tokens_only(device: torch.device) -> None:
    x = torch.arange(3 * 4 * 2.0, device=device).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    expected = torch.tensor([[1.0, 2.0], [12.0, 13.0], [torch.nan, torch.nan]], device=device)
    torch.testing.assert_close(mean_tokens(x, mask), expected, rtol=0, atol=0, equal_nan=True)
    cu_seqlens, rows = packed(mask.bool(), x)
    torch.testing.assert_close(mean_tokens(rows, cu_seqlens=cu_seqlens), expected, rtol=0, atol=0, equal_nan=True)
    assert mean_tokens(x).equal(x.mean(1))


@pytest.mark.parametrize("masked", [False, True])
def test_a_mean_of_half_precision_is_wide(masked: bool, device: torch.device) -> None:
    x = torch.full((2, 300, 3), 60_000.0, dtype=torch.float16, device=device)
    x[:, 0] = 0.0
    mask = torch.ones(2, 300, device=device, dtype=torch.bool) if masked else None
    found = mean_tokens(x, mask)
    torch.testing.assert_close(found, torch.full((2, 3), 60_000.0 * 299 / 300, device=device))
    assert mean_tokens(x.double(), mask).dtype == torch.float64


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_the_teacher_may_have_its_own_tokens(tokens: str, device: torch.device) -> None:
    """Another tokenizer: other lengths, another T, padded on the other side, packed; and absent where ours is not."""
    mask, theirs = attention("left", device), attention("right", device, 11).roll(1, 0)
    (x, _), (_, y) = padded(mask), padded(theirs)
    both = mask.any(1) & theirs.any(1)
    assert both.sum() == len(LENGTHS) - 2
    pool = last_token if tokens == "last" else mean_tokens

    def true(a: Tensor, b: Tensor) -> Tensor:
        return reference.cka_loss(pool(a, mask)[both], pool(b, theirs)[both])

    expected = evaluate(true, x.double(), y.double())
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens=tokens, mask=mask, y_mask=theirs), x, y)
    assert_same(found, expected)
    cu_seqlens, rows = packed(theirs, y)
    layout = dict(mask=mask, y_cu_seqlens=cu_seqlens)
    found = evaluate(lambda a, b: token_cka_loss(a, b, tokens=tokens, **layout), x, rows)
    assert_same(found, expected._replace(dy=expected.dy[theirs]))


# Transformations


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("tokens", MODES)
def test_autograd_to_second_order_func_vmap_and_compile(tokens: str, layout: str, device: torch.device) -> None:
    """``fullgraph`` also says that nothing is read from the device."""
    mask = attention("right", device)[[0, 1, 2, 6]]
    x, y = (side.nan_to_num() for side in padded(mask, dtype=torch.float64))
    options: dict[str, Any] = dict(tokens=tokens, mask=mask)
    if layout == "packed":
        cu_seqlens, x, y = packed(mask, x, y)
        options = dict(tokens=tokens, cu_seqlens=cu_seqlens, max_seqlen=9)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return 100 * token_cka_loss(a, b, **options)  # above the absolute tolerance of the checks

    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (a, b))
    assert torch.autograd.gradgradcheck(loss, (a, b), fast_mode=True)
    gradient = evaluate(loss, x, y).dx
    torch.testing.assert_close(torch.func.grad(loss)(x, y), gradient)
    both = torch.stack([x, 3 * y[..., :1] + x])
    torch.testing.assert_close(torch.vmap(loss, (0, None))(both, y), torch.stack([loss(both[0], y), loss(both[1], y)]))
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate(compiled, x, y).dx, gradient)
