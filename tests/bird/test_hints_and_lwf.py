"""The losses beside BIRD's against their formulas written out, in values, gradients and what they log."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from bird.losses import Hints, LwF
from tests.bird.guided import PAIRS, TASK, WIDTHS, features, wide

# Hints


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.9), (1.0, 2.0)])
def test_hints_are_the_formula(
    teacher: dict[str, Tensor], student: dict[str, Tensor], alpha: float, beta: float
) -> None:
    torch.manual_seed(0)
    loss = Hints(alpha, beta, PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    total = loss(TASK, teacher, student)
    total.backward()
    truth, terms = alpha * TASK.double(), {}
    truth_student, grads = wide(student), {}
    for regressor, (t, s) in zip(loss.regressors, PAIRS, strict=True):
        weight, bias = (p.detach().double().requires_grad_() for p in (regressor.weight, regressor.bias))
        missed = truth_student[s] @ weight.T + bias - teacher[t].double()
        terms[f"hint/{t}/{s}"] = missed.square().sum() / missed.numel()
        truth = truth + beta * terms[f"hint/{t}/{s}"]
        grads[regressor] = weight, bias
    truth.backward()
    torch.testing.assert_close(total.double(), truth)
    for _, s in PAIRS:
        torch.testing.assert_close(student[s].grad.double(), truth_student[s].grad)
    for regressor, (weight, bias) in grads.items():
        torch.testing.assert_close(regressor.weight.grad.double(), weight.grad)
        torch.testing.assert_close(regressor.bias.grad.double(), bias.grad)
    assert list(loss.last) == ["task", *terms]
    for name, value in terms.items():
        torch.testing.assert_close(loss.last[name].double(), value.detach())
        assert not loss.last[name].requires_grad


def test_hints_learn_a_linear_teacher(student: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    rows = student["features.3"].detach()
    teacher = {"layer4": rows @ torch.randn(6, 5) + torch.randn(5)}
    loss = Hints(0.0, 1.0, PAIRS[:1], teacher_widths={"layer4": 5}, student_widths={"features.3": 6})
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(TASK, teacher, {"features.3": rows})
        total.backward()
        return total

    assert closure() > 0.5
    optimizer.step(closure)
    assert closure() < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_hints_of_half_precision_features_are_compared_in_fp32(autocast: bool) -> None:
    teacher, student = (features(seed, widths, torch.bfloat16) for seed, widths in zip((0, 1), WIDTHS, strict=True))
    torch.manual_seed(0)
    loss = Hints(0.0, 1.0, PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total = loss(TASK, teacher, student)
    exact = copy.deepcopy(loss).double()(TASK, teacher, student)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-6)


def test_hints_refuse_what_does_not_fit(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"student_widths has no layer 'features.2'.*\['features.3'\]"):
        Hints(pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths={"features.3": 6})
    with pytest.raises(ValueError, match=r"teacher_widths has no layer 'layer4'"):
        Hints(pairs=PAIRS, teacher_widths={}, student_widths=WIDTHS[1])
    loss = Hints(pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    for wrong in (teacher["layer4"][:1], teacher["layer4"][:, :1], teacher["layer4"][:, :, None]):
        with pytest.raises(ValueError, match=r"hint 'layer4/features.3'.*the same samples, and widths as declared"):
            loss(TASK, teacher | {"layer4": wrong}, student)
    with pytest.raises(ValueError, match=r"\[16, 5\] and \[16, 6\] are needed"):
        loss(TASK, teacher, student | {"features.3": student["features.2"]})


# LwF


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.005), (0.3, 2.0)])
@pytest.mark.parametrize("pairs", [[("features.3", "features.3")], [("features.3",) * 2, ("features.2",) * 2]])
def test_lwf_is_the_formula(student: dict[str, Tensor], pairs: Any, alpha: float, beta: float) -> None:
    source, task = features(2, WIDTHS[1]), TASK.clone().requires_grad_()
    loss = LwF(alpha, beta, pairs)
    total = loss(task, source, student)
    total.backward()
    distances = {
        name: sum(
            abs(a - b) for x, y in zip(student[name], source[name], strict=True) for a, b in zip(x, y, strict=True)
        )
        / 16
        for name, _ in pairs
    }
    torch.testing.assert_close(total, alpha * TASK + beta * sum(distances.values()))
    torch.testing.assert_close(task.grad, torch.tensor(alpha))
    for name, _ in pairs:
        torch.testing.assert_close(student[name].grad, beta / 16 * (student[name] - source[name]).sign().detach())
    assert list(loss.last) == ["task", *(f"l1/{name}/{name}" for name, _ in pairs)]
    for name, distance in distances.items():
        torch.testing.assert_close(loss.last[f"l1/{name}/{name}"], distance.detach())
        assert not loss.last[f"l1/{name}/{name}"].requires_grad


def test_lwf_has_the_published_weight_and_no_distance_at_the_start(student: dict[str, Tensor]) -> None:
    loss, pairs = LwF(pairs=[("features.3", "features.3")]), [("features.3", "features.3")]
    assert (loss.alpha, loss.beta) == (1.0, 0.005)
    assert loss(TASK, {name: x.detach() for name, x in student.items()}, student) == TASK
    half = {"features.3": torch.full((4, 3), 1.0, dtype=torch.bfloat16)}
    near = {"features.3": torch.full((4, 3), 1.0 + 2**-12)}  # which bf16 would round to 1
    torch.testing.assert_close(LwF(0.0, 1.0, pairs)(TASK, half, near), torch.tensor(3 * 2**-12))
    assert not list(loss.parameters())


def test_lwf_refuses_what_does_not_fit(student: dict[str, Tensor]) -> None:
    loss = LwF(pairs=[("features.3", "features.3")])
    for wrong in (torch.zeros(16, 1), torch.zeros(1, 6), torch.zeros(6)):  # all would broadcast
        with pytest.raises(ValueError, match=r"lwf 'features.3/features.3'.*\[16, 6\] came; they must be \[N, D\]"):
            loss(TASK, {"features.3": wrong}, student)
    with pytest.raises(ValueError, match=r"teacher_features has no layer 'features.3'.*it has \['layer4'\]"):
        loss(TASK, {"layer4": wrong}, student)
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        LwF(beta=-1.0, pairs=PAIRS)
    with pytest.raises(ValueError, match="one or more"):
        LwF()
