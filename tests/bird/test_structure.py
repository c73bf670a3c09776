"""Losses by name against their definitions: SciPy's, or the formula written out in fp64; and what they must survive."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bird import RBF, BirdLoss, Taps, Teacher, cka_loss
from bird.structure import ERRORS, LOSSES, StructureLoss, named_loss

pytest.importorskip("scipy", reason="an extra: the truth is SciPy's")
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr

OTHERS = [name for name in LOSSES if name != "cka"]
TASK = torch.tensor(1.75)


def literal_cka(x: Tensor, y: Tensor) -> Tensor:
    """Biased linear CKA by n x n matrices."""
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, l = (centre @ z @ z.T @ centre for z in (x, y))
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


def truth(loss: str, x: Tensor, y: Tensor) -> float:
    """The definition, in fp64."""
    x, y = x.detach().double(), y.detach().double()
    if loss == "rsa":
        return 1 - pearsonr(pdist(x.numpy()), pdist(y.numpy())).statistic
    if loss == "procrustes":
        x, y = ((z - z.mean(0)).numpy() for z in (x, y))
        wide = max(x.shape[1], y.shape[1])  # SciPy takes matrices of one shape: columns of zeros change nothing
        padded = [np.pad(z, ((0, 0), (0, wide - z.shape[1]))) for z in (x, y)]
        return 1 - orthogonal_procrustes(*padded)[1] / np.linalg.norm(x) / np.linalg.norm(y)
    if loss == "gram_mse":
        k, l = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
        return ((k - l) ** 2).mean().item()
    if loss == "cosine_cka":
        return 1 - literal_cka(*(torch.stack([row / row.square().sum().sqrt() for row in z]) for z in (x, y))).item()
    if loss == "cka_difference":
        half = len(x) // 2
        return 1 - literal_cka(*(torch.stack([z[i] - z[half + i] for i in range(half)]) for z in (x, y))).item()
    value = literal_cka(x, y).item()
    return 1 - (value**0.5 if loss == "sqrt_cka" else value)


def rows(n: int, p: int, q: int, dtype: torch.dtype = torch.float32, offset: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + p + q)
    base = torch.randn(n, p, generator=generator, dtype=torch.float64)
    other = 0.6 * base[:, :1] + torch.randn(n, q, generator=generator, dtype=torch.float64)
    return tuple((z + offset).to(dtype) for z in (base, other))  # type: ignore[return-value]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "p", "q"), [(16, 5, 7), (6, 20, 9), (6, 4, 30), (4, 3, 3)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
def test_a_loss_is_its_definition(loss: str, n: int, p: int, q: int, dtype: torch.dtype, bound: float) -> None:
    x, y = rows(n, p, q, dtype)
    value = named_loss(loss)(x, y)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(truth(loss, x, y), rel=bound, abs=bound)
    assert named_loss(loss)(x, x).item() == pytest.approx(0, abs=10 * bound)


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize(("n", "p", "q"), [(8, 3, 5), (6, 9, 4), (6, 4, 12)])
def test_gradients_of_both_sides_are_those_of_the_value(loss: str, n: int, p: int, q: int) -> None:
    x, y = (z.requires_grad_() for z in rows(n, p, q, torch.float64))
    assert torch.autograd.gradcheck(named_loss(loss), (x, y))
    mask = torch.arange(n) % (n // 2) > 0  # one pair less
    assert torch.autograd.gradcheck(lambda a, b: named_loss(loss)(a, b, mask), (x, y))


@pytest.mark.parametrize("loss", OTHERS)
def test_a_second_derivative_is_right_or_an_error(loss: str) -> None:
    x, y = (z.requires_grad_() for z in rows(8, 3, 5, torch.float64))
    if loss != "procrustes":
        assert torch.autograd.gradgradcheck(named_loss(loss), (x, y))
        return
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)  # of a network
    for inputs, other in (((x, y), y), ((x, y.detach()), x), ((x.detach() @ weight, y), weight)):
        first = torch.autograd.grad(named_loss(loss)(*inputs), other, create_graph=True)
        assert torch.autograd.grad(named_loss(loss)(*inputs), other)[0].equal(first[0])
        with pytest.raises(RuntimeError, match='loss="procrustes" has first derivatives only'):
            torch.autograd.grad(first[0].square().sum(), other)
    (there,) = torch.autograd.grad(named_loss(loss)(x, y), x)
    assert torch.func.grad(lambda a: named_loss(loss)(a, y.detach()))(x.detach()).equal(there)


@pytest.mark.parametrize("loss", ["rsa", "procrustes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_of_low_rank_has_the_smallest_gradient(loss: str, dtype: torch.dtype) -> None:
    """Rank 2 of 6 columns beside a teacher of rank 6: numerical differences are the truth where the rank is kept, and
    in directions that no row has there is no gradient, which the singular vectors of rounding would make up."""
    generator = torch.Generator().manual_seed(0)
    x, wide, y = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((12, 2), (2, 6), (12, 6)))
    assert torch.autograd.gradcheck(lambda a: named_loss(loss)(a @ wide, y), x.requires_grad_())
    rows = (x.detach().to(dtype) @ wide.to(dtype)).requires_grad_()
    (gradient,) = torch.autograd.grad(named_loss(loss)(rows, y.to(dtype)), rows)
    outside = gradient.double() @ (torch.eye(6, dtype=torch.float64) - torch.linalg.pinv(wide) @ wide)
    assert gradient.norm() > 0.01
    assert outside.norm() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_left_out_whatever_it_holds(loss: str, dtype: torch.dtype) -> None:
    x, y = rows(16, 5, 7, dtype)
    mask = torch.arange(16) % 8 < 5
    kept = named_loss(loss)(x[mask], y[mask])
    x[~mask], y[~mask] = torch.nan, torch.inf
    x.requires_grad_()
    value = named_loss(loss)(x, y, mask)
    torch.testing.assert_close(value, kept, rtol=1e-5, atol=1e-6)
    value.backward()
    assert x.grad is not None
    assert x.grad[~mask].abs().max() == 0
    assert x.grad[mask].isfinite().all()
    assert x.grad[mask].abs().max() > 0


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "cka_difference"])
def test_tokens_are_rows(loss: str) -> None:
    x, y = rows(24, 5, 7)
    mask = (torch.arange(6) < torch.tensor([6, 2, 5, 4])[:, None]) & True
    value = named_loss(loss, row_dims=2)(x.view(4, 6, 5), y.view(4, 6, 7), mask)
    torch.testing.assert_close(value, named_loss(loss)(x[mask.flatten()], y[mask.flatten()]), rtol=1e-5, atol=1e-6)


def collapsed() -> dict[str, Tensor]:
    """Students without variance, some but for rounding."""
    torch.manual_seed(0)
    row = torch.randn(1, 6)
    return {
        "zero": torch.zeros(8, 6),
        "constant": row.repeat(8, 1),
        "large": 3e4 * row.repeat(8, 1),
        "beyond squares": 1e30 * row.repeat(8, 1),
        "rounded": row.repeat(8, 1) * (1 + 6e-8 * torch.randint(-1, 2, (8, 6))),
        "bf16": row.repeat(8, 1).bfloat16(),
    }


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize("kind", collapsed())
def test_a_collapsed_student_has_similarity_zero_and_no_gradient(loss: str, kind: str) -> None:
    x, y = collapsed()[kind].requires_grad_(), torch.randn(8, 4)
    value = named_loss(loss)(x, y)
    value.backward()
    assert x.grad is not None
    if loss in ERRORS:
        l = y.double() - y.double().mean(0)
        if kind not in ("large", "beyond squares"):
            torch.testing.assert_close(value.double(), (l @ l.T).square().mean(), rtol=1e-4, atol=1e-5)
            assert x.grad.isfinite().all()
        return
    if loss not in ("rsa", "procrustes") and kind == "rounded":
        assert -1e-3 <= value <= 1.001  # the kernels know their own rounding alone, not that of what they are given
        assert x.grad.isfinite().all()
        return
    assert value == 1
    assert x.grad.abs().max() == 0


@pytest.mark.parametrize("loss", OTHERS)
def test_a_teacher_without_variance_pulls_nowhere(loss: str) -> None:
    x = torch.randn(8, 6, requires_grad=True)
    value = named_loss(loss)(x, torch.ones(8, 3))
    value.backward()
    if loss not in ERRORS:
        assert value == 1
        assert x.grad is not None
        assert x.grad.abs().max() == 0


@pytest.mark.parametrize("loss", OTHERS)
def test_numbers_that_are_none_are_not_hidden(loss: str) -> None:
    """Nor by a side without variance: a collapsed student has no loss of 1 beside a teacher that has diverged."""
    for bad in (torch.nan, torch.inf):
        for other in (rows(8, 5, 7)[1], torch.ones(8, 7)):
            x, y = rows(8, 5, 7)[0], other
            x[3, 2] = bad
            for pair in ((x, y), (y, x)):
                assert named_loss(loss)(*pair).isnan() or (loss in ERRORS and bad == torch.inf)


def test_equal_distances_have_no_correlation() -> None:
    """Of orthonormal rows all distances are equal, up to rounding; two rows have one distance."""
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(9, 9))
    x = q.clone().requires_grad_()
    value = named_loss("rsa")(x, torch.randn(9, 4))
    value.backward()
    assert value == 1
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    assert named_loss("rsa")(torch.randn(2, 3), torch.randn(2, 3)) == 1


@pytest.mark.parametrize("loss", ["rsa", "procrustes"])
def test_rows_at_any_scale_and_offset(loss: str) -> None:
    """Both are invariant to shifts and scales, where squares are beyond fp32; equal rows have a finite gradient."""
    x, y = rows(12, 5, 7, offset=0)
    plain = named_loss(loss)(x, y)
    for scale in (1e-30, 1e25):
        torch.testing.assert_close(named_loss(loss)(scale * x, y), plain, rtol=1e-4, atol=1e-5)
    for n, p, q in ((4, 3, 5), (12, 5, 7)):
        ours, theirs = rows(n, p, q, offset=1000)
        value, true = named_loss(loss)(ours.requires_grad_(), theirs), ours.detach().double().requires_grad_()
        (found,) = torch.autograd.grad(value, ours)
        (wanted,) = torch.autograd.grad(named_loss(loss)(true, theirs.double()), true)
        assert value.item() == pytest.approx(truth(loss, ours, theirs), abs=2e-6)
        assert (found - wanted).norm() <= 5e-6 * wanted.norm()  # 7e-5 where the largest value divided the rows
    twice = torch.cat([x, x[:4]]).requires_grad_()
    named_loss(loss)(twice, torch.cat([y, y[4:8]])).backward()
    assert twice.grad is not None
    assert twice.grad.isfinite().all()


@pytest.mark.parametrize(("n", "p", "q", "spread"), [(256, 192, 128, 1e4), (512, 400, 300, 1e4)])
def test_one_feature_of_large_spread_leaves_the_others_their_gradient(n: int, p: int, q: int, spread: float) -> None:
    """The singular values span five decades, and each of them counts alike in the gradient of their sum."""
    x, y = rows(n, p, q, offset=0)
    x[:, 3] *= spread
    gradients = []
    for dtype in (torch.float32, torch.float64):
        ours = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(named_loss("procrustes")(ours, y.to(dtype)), ours)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 3e-3 * gradients[1].norm()  # plain fp32 8e-4 at most


def test_rows_that_are_close_keep_their_direction() -> None:
    """A distance of 1e-4 among those of about 1, in fp32: by products of rows it would be rounding."""
    x, y = rows(8, 5, 7, torch.float64, offset=0)
    x[1] = x[0] + 1e-4 * torch.randn(5, generator=torch.Generator().manual_seed(0))
    x = x.float().double()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        ours = x.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad(named_loss("rsa")(ours, y.to(dtype)), ours)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-5)


def test_a_zero_row_has_no_direction_and_no_gradient() -> None:
    x, y = rows(8, 5, 7)
    x[2] = 0
    x.requires_grad_()
    value = named_loss("cosine_cka")(x, y)
    value.backward()
    assert x.grad is not None
    assert x.grad[2].abs().max() == 0
    units = x.detach() / x.detach().norm(dim=1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(value, cka_loss(units, y / y.norm(dim=1, keepdim=True)))
    tiny = (1e-30 * rows(8, 5, 7)[0]).requires_grad_()
    torch.testing.assert_close(named_loss("cosine_cka")(tiny, y), named_loss("cosine_cka")(1e30 * tiny, y))


# ------------------------------------------------------------------------------------ in BirdLoss


def sides(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    (a, b), (c, d) = rows(16, 5, 7, dtype), rows(16, 6, 4, dtype)
    return {"t": b, "u": d}, {"s": a.requires_grad_(), "v": c.requires_grad_()}


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_weighed_and_logged(loss: str, dtype: torch.dtype) -> None:
    teacher, student = sides(dtype)
    guided = BirdLoss(0.2, 3.0, [("t", "s"), ("u", "v")], weights=[0.25, 1.5], loss=loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = guided(TASK, teacher, student)
    each = [truth(loss, student["s"], teacher["t"]), truth(loss, student["v"], teacher["u"])]
    assert total.item() == pytest.approx(0.2 * 1.75 + 3 * (0.25 * each[0] + 1.5 * each[1]), rel=1e-4)
    logged = each if loss in ERRORS else [1 - value for value in each]
    assert [*guided.last] == ["task", f"{loss}/t/s", f"{loss}/u/v"]
    assert [guided.last[f"{loss}/{pair}"].item() for pair in ("t/s", "u/v")] == pytest.approx(logged, rel=1e-4)
    total.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in student.values())
    assert loss in repr(guided)
    for copied in (copy.deepcopy(guided), pickle.loads(pickle.dumps(guided))):
        assert copied(TASK, teacher, student) == guided(TASK, teacher, student)


def test_options_reach_the_loss() -> None:
    teacher, student = sides()
    for loss in ("sqrt_cka", "cosine_cka", "gram_mse", "cka_difference"):
        plain = named_loss(loss)(student["s"], teacher["t"])
        other = named_loss(loss, kernel=RBF(sigma=2.0), backend="library")(student["s"], teacher["t"])
        assert abs(plain - other) > 1e-3
    unbiased = BirdLoss(0.0, 1.0, [("t", "s")], loss="cosine_cka", estimator="unbiased")(TASK, teacher, student)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (student["s"], teacher["t"])]
    torch.testing.assert_close(unbiased, cka_loss(*unit, estimator="unbiased"))


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("hsic", {}, "loss must be one of 'cka', 'sqrt_cka', .*'cka_difference'; got 'hsic'"),
        ("rsa", {"kernel": "rbf"}, "loss=\"rsa\" takes no kernel='rbf'; cka, sqrt_cka, cosine_cka, gram_mse, cka_diff"),
        ("procrustes", {"estimator": "unbiased"}, "takes no estimator='unbiased'; cka, cosine_cka, cka_difference can"),
        ("gram_mse", {"group": "world"}, "takes no group='world'; cka, sqrt_cka, cosine_cka, cka_difference can"),
        ("sqrt_cka", {"estimator": "unbiased"}, "takes no estimator='unbiased'"),
        ("cka_difference", {"row_dims": 2}, "takes no row_dims=2; cka, .*, procrustes can"),
        ("procrustes", {"backend": "triton", "precision": "tf32"}, "takes no backend='triton', precision='tf32'"),
        ("cka", {"kernel": "foo"}, "kernel must be one of 'linear', 'rbf'; got 'foo'"),
        ("cosine_cka", {"estimator": "foo"}, "estimator must be one of 'biased', 'unbiased'; got 'foo'"),
        ("cka", {"backend": "foo"}, "backend must be one of .*; got 'foo'"),
        ("cka", {"precision": "foo"}, "precision must be one of .*; got 'foo'"),
        ("cka", {"row_dims": 0}, "row_dims must be at least 1, got 0"),
    ],
)
def test_what_a_loss_does_not_take_is_refused_when_it_is_made(loss: str, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BirdLoss(pairs=[("t", "s")], loss=loss, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "exponential"}, "schedule must be one of 'constant', 'linear', 'cosine'; got 'exponential'"),
        ({"until": 0.0}, "until is a share of the steps, above 0 and at most 1, not 0.0"),
        ({"until": 1.5}, "until is a share of the steps"),
        ({"share": 0.5, "pairs": [("0", "0"), ("0", "3")]}, r"one layer of the student, not at \['0', '3'\]"),
        ({"share": 1.0}, "share is a share of the gradient, between 0 and 1, not 1.0"),
        ({"share": 0.5, "alpha": 0.0}, "alpha, beta and a weight must be above 0, and beta not learned"),
        ({"share": 0.5, "beta": torch.ones((), requires_grad=True)}, "and beta not learned"),
        ({"share": 0.5, "weights": [0.0, 0.0]}, "alpha, beta and a weight must be above 0"),
        ({"share": "0.5"}, "share is a share of the gradient, between 0 and 1, not '0.5'"),
        ({"until": "0.5", "schedule": []}, r"schedule must be one of .*; got \[\]"),
        ({"until": "0.5"}, "until is a share of the steps, above 0 and at most 1, not '0.5'"),
    ],
)
def test_courses_that_cannot_be(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BirdLoss(**{"pairs": [("0", "3"), ("3", "3")]} | options)


def test_batches_that_are_too_small_are_refused() -> None:
    for loss in ("rsa", "procrustes"):
        with pytest.raises(ValueError, match=f'loss="{loss}" needs at least 2 rows, got 1'):
            named_loss(loss)(torch.randn(1, 4), torch.randn(1, 4))
        x = torch.randn(4, 3)
        assert named_loss(loss)(x, x, torch.tensor([True, False, False, False])).isnan()
    with pytest.raises(ValueError, match="as many chosen rows as rejected ones, got 7 in all"):
        named_loss("cka_difference")(torch.randn(7, 4), torch.randn(7, 4))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        named_loss("cka_difference")(torch.randn(2, 4), torch.randn(2, 4))


def test_a_teacher_in_inference_mode() -> None:
    teacher, student = sides()
    with torch.inference_mode():
        there = {name: value.clone() for name, value in teacher.items()}
    for loss in OTHERS:
        grads = [
            torch.autograd.grad(named_loss(loss)(student["s"], side["t"]), student["s"])[0] for side in (there, teacher)
        ]
        assert grads[0].equal(grads[1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("loss", OTHERS)
def test_compiled(loss: str) -> None:
    teacher, student = sides()
    guided = BirdLoss(0.2, 3.0, [("t", "s"), ("u", "v")], loss=loss)
    plain = guided(TASK, teacher, student)
    truths = torch.autograd.grad(plain, [*student.values()])
    total = torch.compile(guided, backend="aot_eager")(TASK, teacher, student)
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(torch.autograd.grad(total, [*student.values()]), truths)


def test_the_default_is_cka_by_the_kernels() -> None:
    assert not isinstance(BirdLoss(pairs=[("t", "s")]).distance, StructureLoss)
    assert [*named_loss("cka").options] == [*named_loss("rsa").options]


def test_taps_and_teacher_feed_a_loss() -> None:
    torch.manual_seed(0)
    student, teacher = torch.nn.Sequential(torch.nn.Linear(4, 6)), torch.nn.Sequential(torch.nn.Linear(4, 5))
    x = torch.randn(10, 4)
    with Taps(student, "0") as taps:
        task = student(x).mean()
        BirdLoss(pairs=[("0", "0")], loss="rsa")(task, Teacher(teacher, "0")(x), taps.pop()).backward()
    assert student[0].weight.grad.norm() > 0
