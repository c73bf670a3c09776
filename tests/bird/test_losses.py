"""The guided losses against their formulas written out: values, gradients, what they log, what they refuse."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bird
import bird_kernels
from bird.losses import BirdLoss, Hints, LwF
from tests.bird.tapped import PAIRS, TASK, WIDTHS, features, wide

pytestmark = pytest.mark.usefixtures("fresh_compiler")
Features = dict[str, Tensor]
SAME = [("features.3", "features.3"), ("features.2", "features.2")]  # of a teacher with the student's layers, as LwF's


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Biased linear CKA from n x n Gram matrices, in fp64."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centre @ (z.double() @ z.double().T) @ centre for z in (x, y))
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


def check(
    loss: nn.Module, alpha: float, teacher: Features, student: Features, truth: Tensor, wide: Features, terms: Features
) -> None:
    """Value, gradients and terms of a loss beside those of its formula without the task."""
    task = TASK.clone().requires_grad_()
    total = loss(task, teacher, student)
    total.backward()
    (alpha * TASK.double() + truth).backward()
    assert total.shape == ()
    torch.testing.assert_close(total.double(), (alpha * TASK.double() + truth).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.grad, torch.tensor(alpha))
    for name, value in wide.items():
        if value.grad is not None:
            torch.testing.assert_close(student[name].grad.double(), value.grad, rtol=1e-4, atol=1e-7)
    assert list(loss.last) == ["task", *terms]
    for name, value in ({"task": TASK} | terms).items():
        torch.testing.assert_close(loss.last[name].double(), value.detach().double(), rtol=1e-5, atol=1e-6)
        assert loss.last[name].shape == ()
        assert not loss.last[name].requires_grad


@pytest.mark.parametrize("pairs", [PAIRS, PAIRS[:1], [("layer4", "features.3"), ("layer4", "features.2")]])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.9), (0.0, 3.0)])
def test_bird_is_the_formula(teacher: Features, student: Features, pairs: Any, alpha: float, beta: float) -> None:
    ours = wide(student)
    terms = {f"cka/{t}/{s}": cka(teacher[t], ours[s]) for t, s in pairs}
    truth = beta * sum(1 - value for value in terms.values())
    check(BirdLoss(alpha, beta, pairs), alpha, teacher, student, truth, ours, terms)


@pytest.mark.parametrize("compiled", [False, True])
def test_pairs_may_weigh_differently(teacher: Features, student: Features, compiled: bool) -> None:
    """What is logged is CKA, whatever its weight."""
    loss, ours = BirdLoss(0.2, 3.0, PAIRS, weights=[0.25, 1.5]), wide(student)
    assert repr(loss).splitlines()[1].endswith("weights=[0.25, 1.5]")
    terms = {f"cka/{t}/{s}": cka(teacher[t], ours[s]) for t, s in PAIRS}
    truth = 3.0 * sum(weight * (1 - value) for weight, value in zip((0.25, 1.5), terms.values(), strict=True))
    if compiled:
        loss.forward = torch.compile(loss.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    check(loss, 0.2, teacher, student, truth, ours, terms)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.9), (1.0, 2.0)])
def test_hints_are_the_formula(teacher: Features, student: Features, alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    loss = Hints(alpha, beta, PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    ours, terms, grads = wide(student), {}, {}
    for regressor, (t, s) in zip(loss.regressors, PAIRS, strict=True):
        weight, bias = (p.detach().double().requires_grad_() for p in (regressor.weight, regressor.bias))
        missed = ours[s] @ weight.T + bias - teacher[t].double()
        terms[f"hint/{t}/{s}"] = missed.square().sum() / missed.numel()
        grads[regressor] = weight, bias
    check(loss, alpha, teacher, student, beta * sum(terms.values()), ours, terms)
    for regressor, (weight, bias) in grads.items():
        torch.testing.assert_close(regressor.weight.grad.double(), weight.grad)
        torch.testing.assert_close(regressor.bias.grad.double(), bias.grad)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.005), (0.3, 2.0)])
@pytest.mark.parametrize("pairs", [SAME, SAME[:1]])
def test_lwf_is_the_formula(student: Features, pairs: Any, alpha: float, beta: float) -> None:
    source, ours = features(2, WIDTHS[1]), wide(student)
    terms = {f"l1/{name}/{name}": sum((ours[name] - source[name]).abs().flatten()) / 16 for name, _ in pairs}
    check(LwF(alpha, beta, pairs), alpha, source, student, beta * sum(terms.values()), ours, terms)


def test_lwf_has_the_published_weight_and_no_distance_at_the_start(student: Features) -> None:
    loss = LwF(pairs=SAME[:1])
    assert (loss.alpha, loss.beta) == (1.0, 0.005)
    assert loss(TASK, {name: x.detach() for name, x in student.items()}, student) == TASK
    half = {"features.3": torch.full((4, 3), 1.0, dtype=torch.bfloat16)}
    near = {"features.3": torch.full((4, 3), 1.0 + 2**-12)}  # which bf16 would round to 1
    torch.testing.assert_close(LwF(0.0, 1.0, SAME[:1])(TASK, half, near), torch.tensor(3 * 2**-12))


def test_hints_learn_a_linear_teacher(student: Features) -> None:
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
def test_half_precision(autocast: bool, teacher: Features, student: Features) -> None:
    """Hints are compared, and pairs are weighed, in fp32."""
    torch.manual_seed(0)
    weighed = BirdLoss(0.0, 1.0, PAIRS, weights=[0.3, 0.7])
    loss = Hints(0.0, 1.0, PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    half = [{k: v.detach().bfloat16() for k, v in side.items()} for side in (teacher, student)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hints, guided, total = loss(TASK, *half), BirdLoss(pairs=PAIRS)(TASK, *half), weighed(TASK, teacher, student)
    assert hints.dtype == guided.dtype == total.dtype == torch.float32
    exact = copy.deepcopy(loss).double()(TASK, *half)
    torch.testing.assert_close(hints.double(), exact, rtol=1e-5, atol=1e-6)
    truth = 0.1 * TASK + 0.9 * sum(1 - cka(half[0][t], half[1][s]).float() for t, s in PAIRS)
    torch.testing.assert_close(guided, truth, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(total, weighed(TASK, teacher, student), rtol=1e-6, atol=0)


def test_defaults_and_options(teacher: Features, student: Features) -> None:
    rows = teacher["layer4"], student["features.3"]
    published = BirdLoss(pairs=PAIRS[:1])(TASK, teacher, student)
    torch.testing.assert_close(published, 0.1 * TASK + 0.9 * (1 - cka(*rows).float()))
    unbiased = BirdLoss(0.0, 1.0, PAIRS[:1], estimator="unbiased")(TASK, teacher, student)
    truth = bird_kernels.cka_loss(*rows, estimator="unbiased", backend="reference")
    torch.testing.assert_close(unbiased, truth)
    assert abs(unbiased - (1 - cka(*rows))) > 0.05
    for option in ("kernel", "estimator", "backend", "precision"):
        with pytest.raises(ValueError, match=rf"{option}.*\?"):
            BirdLoss(pairs=PAIRS, **{option: "?"})(TASK, teacher, student)


def test_tokens_are_rows_and_the_mask_counts_them() -> None:
    """Two pairs of [B, T, D] features under one attention mask, whose padding holds NaN."""
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2])[:, None]
    teacher, student = (
        {name: rows.reshape(4, 4, -1).masked_fill(~mask[..., None], torch.nan) for name, rows in side.items()}
        for side in (features(0, WIDTHS[0]), features(1, WIDTHS[1]))
    )
    total = BirdLoss(0.1, 0.9, PAIRS, row_dims=2)(TASK, teacher, student, mask)
    truth = 0.1 * TASK.double() + 0.9 * sum(1 - cka(teacher[t][mask], student[s][mask]) for t, s in PAIRS)
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([True] * 15 + [False])
    teacher, student = features(0, WIDTHS[0]), features(1, WIDTHS[1])
    assert BirdLoss(pairs=PAIRS)(TASK, teacher, student, rows) != BirdLoss(pairs=PAIRS)(TASK, teacher, student)


# ------------------------------------------------------------------------------------ all of them


def losses(pairs: Any = SAME) -> dict[str, nn.Module]:
    return {
        "bird": BirdLoss(pairs=pairs),
        "hints": Hints(pairs=pairs, teacher_widths=WIDTHS[1], student_widths=WIDTHS[1]),
        "lwf": LwF(pairs=pairs),
    }


@pytest.mark.parametrize("kind", ["bird", "hints", "lwf"])
def test_compiled_losses_log_and_differentiate(kind: str, student: Features) -> None:
    loss, teacher = losses()[kind], features(2, WIDTHS[1])
    truth = loss(TASK, teacher, student)
    truth_grads = torch.autograd.grad(truth, list(student.values()))
    truth_last, loss.last = loss.last, {}
    total = torch.compile(loss, backend="aot_eager", fullgraph=True)(TASK, teacher, student)
    torch.testing.assert_close(total, truth)
    torch.testing.assert_close(torch.autograd.grad(total, list(student.values())), truth_grads)
    torch.testing.assert_close(loss.last, truth_last)


@pytest.mark.parametrize("kind", ["bird", "hints", "lwf"])
def test_features_that_cannot_be(kind: str, student: Features) -> None:
    """With a task loss for each of 8 samples, the sum of what comes out would have 8 times the guidance."""
    loss, teacher = losses()[kind], features(2, WIDTHS[1])
    elsewhere = {name: value.to("meta") for name, value in teacher.items()}
    some = {"features.3": teacher["features.3"]}
    for kinds, arguments, said in (
        (
            ValueError,
            (torch.ones(8), teacher, student),
            r"task_loss must be .*, got torch.float32 \[8\]: average",
        ),
        (
            ValueError,
            (TASK + 0j, teacher, student),
            "a 0-d tensor of real numbers, got torch.complex64",
        ),
        (ValueError, (1.0, teacher, student), "task_loss must be a 0-d tensor of real numbers, got 1.0: average it"),
        (TypeError, (TASK, teacher["features.3"], student), "teacher_features must be a dict of layers, got Tensor"),
        (TypeError, (TASK, teacher, [student["features.3"]]), "student_features must be a dict of layers, got list"),
        (ValueError, (TASK, elsewhere, student), "the teacher's features are on meta, the student's on cpu"),
        (ValueError, (TASK, some, student), r"teacher_features has no layer 'features.2'.*it has \['features.3'\]"),
        (ValueError, (TASK, teacher, some), r"student_features has no layer 'features.2'.*it has \['features.3'\]"),
    ):
        with pytest.raises(kinds, match=said):
            loss(*arguments)
    if kind == "bird":
        return
    for wrong in (torch.zeros(1, 6), torch.zeros(16, 1), torch.zeros(16, 6, 1), torch.zeros(6)):  # most would broadcast
        with pytest.raises(ValueError, match=r"(hint|lwf) 'features.3/features.3'.*\[16, 6\]"):
            loss(TASK, teacher | {"features.3": wrong}, student)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        *[
            (lambda w=w: BirdLoss(alpha=w, pairs=PAIRS), "alpha must be finite and not neg")
            for w in (-0.1, float("nan"))
        ],
        (lambda: LwF(beta=float("inf"), pairs=PAIRS), "beta must be finite and not negative"),
        (
            lambda: Hints(beta=-1.0, pairs=SAME, teacher_widths={}, student_widths={}),
            "beta must be finite and not negative",
        ),
        (
            lambda: Hints(pairs=PAIRS, teacher_widths={}, student_widths=WIDTHS[1]),
            "teacher_widths has no layer 'layer4'",
        ),
        (lambda: Hints(pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths={}), "student_widths has no layer"),
        (lambda: BirdLoss(pairs=PAIRS, weights=[1.0]), "weights must .*one number for each pair, got 1 for 2"),
        (lambda: BirdLoss(pairs=PAIRS, weights=[]), "weights must .*one number for each pair, got 0 for 2"),
        (
            lambda: BirdLoss(pairs=PAIRS, weights=[1.0, -0.5]),
            r"weights must .*finite and not negative, not \[1.0, -0.5\]",
        ),
        (lambda: BirdLoss(pairs=PAIRS, weights=[1.0, float("nan")]), "weights must .*finite and not negative"),
        # A pair is no text: two letters would be taken for two layers.
        *[
            (lambda pairs=pairs: BirdLoss(pairs=pairs), "pairs must list one or more")
            for pairs in ((), ("layer4", "features.3"), [("layer4",)], [("a", "b", "c")], ["ab"], {"l3": "f8"})
        ],
        (LwF, "one or more"),
    ],
)
def test_losses_that_cannot_be(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_weight_is_no_text(name: str) -> None:
    with pytest.raises(TypeError, match=r"a weight must be a real number or a 0-d tensor of one, got '0\.1'"):
        BirdLoss(pairs=PAIRS, **{name: "0.1"})


@pytest.mark.parametrize(
    "changes",
    [{name: weight} for name in ("alpha", "beta") for weight in (torch.tensor([0.1]), torch.tensor(0.1 + 0j))]
    + [{"weights": torch.tensor(weights)} for weights in ([[1.0], [2.0]], [[1.0, 2.0], [1.0, 2.0]], [1j, 1.0])]
    + [{"weights": [torch.tensor([1.0]), 2.0]}],
)
def test_a_weight_is_one_real_number(changes: dict[str, Any]) -> None:
    """Weights [2, 1] would be broadcast against the two losses."""
    with pytest.raises(TypeError, match=r"a weight must be a real number or a 0-d tensor"):
        BirdLoss(pairs=PAIRS, **changes)


@pytest.mark.parametrize("kind", ["bird", "hints", "lwf"])
def test_features_without_a_gradient_are_told(kind: str, student: Features) -> None:
    """Such a pair would train nothing in silence; in an evaluation it need not."""
    loss, teacher, said = (
        losses(SAME[:1])[kind],
        features(2, WIDTHS[1]),
        "features carry no gradient, so this pair trains",
    )
    with pytest.warns(RuntimeWarning, match=f"features.3/features.3: the student's {said}"):
        loss(TASK.clone().requires_grad_(), teacher, features(1, WIDTHS[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            loss(TASK, teacher, features(1, WIDTHS[1]))
        loss(TASK, teacher, student)


def test_a_teacher_s_layers_are_its_network_s() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    teacher = bird.Teacher(net, ["0"])
    words = "Teacher has no layers inside; of a bird.Teacher give the network that it was made of"
    with pytest.raises(ValueError, match=words):
        bird.Taps(teacher, ["0"])
    with pytest.raises(ValueError, match=words):
        bird.compare(net, teacher, [torch.randn(8, 4)], progress=False)


def test_only_hints_have_parameters() -> None:
    hints = Hints(pairs=PAIRS, teacher_widths=WIDTHS[0], student_widths=WIDTHS[1])
    assert [tuple(p.shape) for p in hints.parameters()] == [(5, 6), (5,), (7, 4), (7,)]
    for loss in (BirdLoss(pairs=PAIRS), LwF(pairs=PAIRS)):
        assert not [*loss.parameters(), *loss.state_dict()]
    assert "pairs=[('layer4', 'features.3'), ('layer3', 'features.2')]" in repr(BirdLoss(pairs=PAIRS))


# ------------------------------------------------------------------------------------ the package


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
