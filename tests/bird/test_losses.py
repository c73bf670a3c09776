"""The guided losses against their formulas written out, in values, gradients and what they log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bird
import bird_kernels
from bird.losses import BirdLoss, Hints, LwF
from tests.bird.guided import PAIRS, TASK, WIDTHS, features, wide

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Biased linear CKA from n x n Gram matrices, in fp64."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


# BIRD


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], [("layer4", "features.3"), ("layer4", "features.2")]])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.9), (1.0, 3.0), (0.0, 1.0)])
def test_bird_is_the_formula(
    teacher: dict[str, Tensor], student: dict[str, Tensor], pairs: Any, alpha: float, beta: float
) -> None:
    task = TASK.clone().requires_grad_()
    loss = BirdLoss(alpha, beta, pairs)
    total = loss(task, teacher, student)
    total.backward()

    truth_student = wide(student)
    alignments = {(t, s): cka(teacher[t], truth_student[s]) for t, s in pairs}
    truth = alpha * TASK.double() + beta * sum(1 - value for value in alignments.values())
    truth.backward()

    assert total.shape == ()
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.grad, torch.tensor(alpha))
    for _, name in pairs:
        torch.testing.assert_close(student[name].grad.double(), truth_student[name].grad, rtol=1e-4, atol=1e-7)
    assert list(loss.last) == ["task", *(f"cka/{t}/{s}" for t, s in pairs)]
    torch.testing.assert_close(loss.last["task"], TASK)
    for (t, s), value in alignments.items():
        torch.testing.assert_close(loss.last[f"cka/{t}/{s}"].double(), value.detach(), rtol=1e-5, atol=1e-6)
    assert all(value.shape == () and not value.requires_grad for value in loss.last.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_may_weigh_differently(teacher: dict[str, Tensor], student: dict[str, Tensor], compiled: bool) -> None:
    loss = BirdLoss(0.2, 3.0, PAIRS, weights=[0.25, 1.5])
    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    total = call(TASK, teacher, student)
    total.backward()
    truth_student = wide(student)
    values = [cka(teacher[t], truth_student[s]) for t, s in PAIRS]
    truth = 0.2 * TASK.double() + 3.0 * (0.25 * (1 - values[0]) + 1.5 * (1 - values[1]))
    truth.backward()
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-6)
    for _, name in PAIRS:
        torch.testing.assert_close(student[name].grad.double(), truth_student[name].grad, rtol=1e-4, atol=1e-7)
    for (t, s), value in zip(PAIRS, values, strict=True):  # what is logged is CKA, whatever its weight
        torch.testing.assert_close(loss.last[f"cka/{t}/{s}"].double(), value.detach(), rtol=1e-5, atol=1e-6)
    assert repr(loss).splitlines()[1].endswith("weights=[0.25, 1.5]")


def test_weights_of_pairs_are_not_rounded_under_autocast(
    teacher: dict[str, Tensor], student: dict[str, Tensor]
) -> None:
    loss = BirdLoss(0.0, 1.0, PAIRS, weights=[0.3, 0.7])
    truth = loss(TASK, teacher, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = loss(TASK, teacher, student)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0], "one number for each pair, got 1 for 2"),
        ([], "one number for each pair, got 0 for 2"),
        ([1.0, -0.5], r"finite and not negative, not \[1.0, -0.5\]"),
        ([1.0, float("nan")], "finite and not negative"),
    ],
)
def test_weights_of_pairs_are_checked(weights: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=f"weights must .*{words}"):
        BirdLoss(pairs=PAIRS, weights=weights)


def test_the_default_weights_are_the_published_ones(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    total = BirdLoss(pairs=PAIRS[:1])(TASK, teacher, student)
    truth = 0.1 * TASK + 0.9 * (1 - cka(teacher["layer4"], student["features.3"]).float())
    torch.testing.assert_close(total, truth)


def test_options_reach_the_operator(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    rows = teacher["layer4"], student["features.3"]
    unbiased = BirdLoss(0.0, 1.0, PAIRS[:1], estimator="unbiased")(TASK, teacher, student)
    truth = bird_kernels.cka_loss(*rows, estimator="unbiased", backend="reference")
    torch.testing.assert_close(unbiased, truth)
    assert abs(unbiased - (1 - cka(*rows))) > 0.05
    for option in ({"kernel": "?"}, {"estimator": "?"}, {"backend": "?"}, {"precision": "?"}):
        with pytest.raises(ValueError, match=rf"{next(iter(option))}.*\?"):
            BirdLoss(pairs=PAIRS, **option)(TASK, teacher, student)


def test_half_precision_features(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    half = [{k: v.detach().bfloat16() for k, v in side.items()} for side in (teacher, student)]
    total = BirdLoss(pairs=PAIRS)(TASK, *half)
    truth = 0.1 * TASK + 0.9 * sum(1 - cka(half[0][t], half[1][s]).float() for t, s in PAIRS)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, truth, rtol=1e-2, atol=1e-2)


def test_tokens_are_rows_and_the_mask_counts_them() -> None:
    """Two pairs of [B, T, D] features under one attention mask, whose padding holds NaN."""
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2])[:, None]
    teacher, student = (
        {name: rows.reshape(4, 4, -1).masked_fill(~mask[..., None], torch.nan) for name, rows in side.items()}
        for side in (features(0, WIDTHS[0]), features(1, WIDTHS[1]))
    )
    loss = BirdLoss(0.1, 0.9, PAIRS, row_dims=2)
    total = loss(TASK, teacher, student, mask)
    truth = 0.1 * TASK.double() + 0.9 * sum(1 - cka(teacher[t][mask], student[s][mask]) for t, s in PAIRS)
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([True] * 15 + [False])
    teacher, student = features(0, WIDTHS[0]), features(1, WIDTHS[1])
    assert BirdLoss(pairs=PAIRS)(TASK, teacher, student, rows) != BirdLoss(pairs=PAIRS)(TASK, teacher, student)


# Both


def both() -> list[nn.Module]:
    return [BirdLoss(pairs=PAIRS), Hints(pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])]


@pytest.mark.parametrize("loss", both(), ids=["bird", "hints"])
def test_a_missing_layer_names_those_that_are_there(
    loss: nn.Module, teacher: dict[str, Tensor], student: dict[str, Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"teacher_features has no layer 'layer3'.*it has \['layer4'\]"):
        loss(TASK, {"layer4": teacher["layer4"]}, student)
    with pytest.raises(ValueError, match=r"student_features has no layer 'features.3'.*it has \['layer4', "):
        loss(TASK, teacher, teacher)


@pytest.mark.parametrize("loss", both(), ids=["bird", "hints"])
def test_compiled_losses_log_and_differentiate(
    loss: nn.Module, teacher: dict[str, Tensor], student: dict[str, Tensor]
) -> None:
    truth = loss(TASK, teacher, student)
    truth_grads = torch.autograd.grad(truth, list(student.values()))
    truth_last, loss.last = loss.last, {}
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    total = compiled(TASK, teacher, student)
    torch.testing.assert_close(total, truth)
    torch.testing.assert_close(torch.autograd.grad(total, list(student.values())), truth_grads)
    torch.testing.assert_close(loss.last, truth_last)


@pytest.mark.parametrize("kind", ["bird", "hints", "lwf"])
def test_devices_must_agree(kind: str, teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    pair = PAIRS[:1]
    loss = {
        "bird": lambda: BirdLoss(pairs=pair),
        "hints": lambda: Hints(pairs=pair, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1]),
        "lwf": lambda: LwF(pairs=pair),
    }[kind]()
    elsewhere = {name: value.to("meta") for name, value in teacher.items()}
    with pytest.raises(ValueError, match="the teacher's features are on meta, the student's on cpu"):
        loss(TASK, elsewhere, student)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_are_checked(weight: float) -> None:
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        BirdLoss(alpha=weight, pairs=PAIRS)
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        Hints(beta=weight, pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])


@pytest.mark.parametrize("pairs", [(), ("layer4", "features.3"), [("layer4",)], [("a", "b", "c")]])
def test_pairs_are_checked(pairs: Any) -> None:
    with pytest.raises(ValueError, match="one or more"):
        BirdLoss(pairs=pairs)


def test_only_hints_have_parameters() -> None:
    guided, hints = both()
    assert not list(guided.parameters())
    assert not guided.state_dict()
    assert [tuple(p.shape) for p in hints.parameters()] == [(5, 6), (5,), (7, 4), (7,)]
    assert "pairs=[('layer4', 'features.3'), ('layer3', 'features.2')]" in repr(guided)


# The package


def test_bird_offers_its_own_names_and_all_operators() -> None:
    own = {"BirdLoss", "Hints", "LwF", "Similarity", "Taps", "Teacher", "chunked_backward", "compare"}
    assert set(bird_kernels.__all__) | own == set(bird.__all__)
    assert all(getattr(bird, name) is getattr(bird_kernels, name) for name in bird_kernels.__all__)


def test_tokens_reach_a_loss_unpooled() -> None:
    """Student and teacher of other widths, their features as they are: ``pool="none"`` on both sides."""
    torch.manual_seed(0)
    student, guide = (nn.Sequential(nn.Embedding(11, d), nn.Linear(d, d), nn.ReLU(inplace=True)) for d in (6, 4))
    ids = torch.randint(11, (3, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    truth = [model[1](model[0](ids)).detach() for model in (student, guide)]
    teacher = bird.Teacher(guide, "1", pool="none")
    with bird.Taps(student, "1", pool="none") as taps:
        task = student(ids).sum()
        x, y = taps.pop()["1"], teacher(ids)["1"]
        assert x.equal(truth[0])  # and not what the ReLU has made of it in place
        assert y.equal(truth[1])
        loss = bird.BirdLoss(0.0, 1.0, [("1", "1")], row_dims=2)
        loss(task, {"1": y}, {"1": x}, mask).backward()
    torch.testing.assert_close(loss.last["cka/1/1"], bird.cka(truth[0][mask], truth[1][mask]))
    assert student[1].weight.grad.norm() > 0


def test_a_training_step_end_to_end() -> None:
    """The README's loop in small: guidance raises the alignment that it is about."""
    torch.manual_seed(0)
    teacher = bird.Teacher(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)), "1")
    student = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    taps, loss = bird.Taps(student, "1"), BirdLoss(pairs=[("1", "1")])
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    x, labels = torch.randn(64, 8), torch.randint(3, (64,))
    alignments = []
    for _ in range(40):
        optimizer.zero_grad()
        task = nn.functional.cross_entropy(student(x), labels)
        loss(task, teacher(x), taps.pop()).backward()
        optimizer.step()
        alignments.append(loss.last["cka/1/1"])
    assert alignments[-1] > alignments[0] + 0.1
