"""beta over the course of training, and the gradients of both terms, against autograd's own of each term alone."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bird import BirdLoss, Taps, Teacher, chunked_backward, cka_loss
from bird.course import MANY
from bird.lab.vision.steps import TransferGuide
from bird.taps import Measured
from tests.bird.loops import Cut, cut_after, same, train
from tests.bird.loops import network as small
from tests.groups import run_ranks

LAYERS = ["0", "3"]
PAIRS = [("0", "0"), ("3", "3")]
ONE = [("0", "3"), ("3", "3")]  # layer of the student, as share asks for


class Net(nn.Sequential):
    """A layer overwrites a tapped output in place; in ``checkpointed`` ones the tapped layers are computed again."""

    checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            again = self.checkpointed and isinstance(layer, (nn.Conv2d, nn.Linear))
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return x


def network(width: int = 6, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, width, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(width * 36, 5), nn.Tanh()
    return Net(*layers)


def images(n: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=dtype)


def alone(model: nn.Sequential, guides: dict[str, Tensor], x: Tensor) -> tuple[float, float]:
    """Norms of the gradients of the task and of the guidance by themselves, with respect to both layers' outputs.

    The first output reaches the second layer, so a part of what guides the second is task for the first: what goes on
    through the network.
    """
    first = model[0](x)
    second = model[3](first.relu().flatten(1))
    at_first = cka_loss(first.mean((2, 3)), guides["0"])
    at_second = cka_loss(second, guides["3"])
    task = 0.3 * second.tanh().square().mean()
    grads = [
        *torch.autograd.grad(task + 0.7 * at_second, first, retain_graph=True),
        *torch.autograd.grad(task, second, retain_graph=True),
        *torch.autograd.grad(0.7 * at_first, first, retain_graph=True),
        *torch.autograd.grad(0.7 * at_second, second),
    ]
    a, b, c, d = (float(g.double().norm()) for g in grads)
    return math.hypot(a, b), math.hypot(c, d)


def guided(loss: BirdLoss, model: Net, teacher: Teacher, x: Tensor, **options: Any) -> list[Tensor]:
    """One backward pass; the gradients of the weights."""
    with Taps(model, LAYERS, **options) as taps:
        model.zero_grad()
        loss(model(x).square().mean(), teacher(x), taps.pop()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradients_of_both_terms_are_those_of_each_alone(dtype: torch.dtype, checkpointed: bool) -> None:
    """And nothing else changes by measuring."""
    model, teacher = network().to(dtype), Teacher(network(7, 1).to(dtype), LAYERS)
    model.checkpointed, x, loss = checkpointed, images(dtype=dtype), BirdLoss(0.3, 0.7, PAIRS)
    plain = guided(loss, model, teacher, x)
    assert not {"task_grad", "guide_grad", "guide_beta"} & loss.last.keys()
    measured = guided(loss, model, teacher, x, gradients=True)
    assert all(a.equal(b) for a, b in zip(measured, plain, strict=True))
    task, guide = alone(model, teacher(x), x)
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert loss.last["task_grad"].item() == pytest.approx(task, rel=bound)
    assert loss.last["guide_grad"].item() == pytest.approx(guide, rel=bound)
    assert loss.last["task_grad"].shape == ()
    with torch.no_grad(), Taps(model, LAYERS, gradients=True) as taps:
        model(x)
        popped = taps.pop()
    assert isinstance(popped, Measured)
    assert popped.norms is None


def test_a_term_that_is_not_there_has_no_gradient() -> None:
    model, teacher, x = network(), Teacher(network(7, 1), LAYERS), images()
    for alpha, beta, name in ((0.0, 1.0, "task_grad"), (1.0, 0.0, "guide_grad")):
        loss = BirdLoss(alpha, beta, [("3", "3")])
        with Taps(model, "3", gradients=True) as taps:
            loss(model(x).mean(), teacher(x), taps.pop()).backward()
        assert loss.last[name] == 0
        assert sum(loss.last[n] for n in ("task_grad", "guide_grad")) > 0


@pytest.mark.parametrize(
    ("schedule", "until", "factors"),
    [
        ("constant", 0.5, [1, 1, 0, 0, 0]),
        ("linear", 1.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0.5, [1, 0.5, 0, 0, 0]),
        ("cosine", 1.0, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
    ],
)
def test_a_schedule_is_its_formula(schedule: str, until: float, factors: list[float]) -> None:
    torch.manual_seed(0)
    x, y, task = torch.randn(16, 4), {"0": torch.randn(16, 5)}, torch.tensor(1.7)
    loss = BirdLoss(0.3, 0.8, [("0", "0")], schedule=schedule, until=until)
    for done, factor in enumerate(factors):
        if done:
            loss.step(done, 4)
        again = BirdLoss(0.3, 0.8, [("0", "0")], schedule=schedule, until=until)
        again.load_state_dict(loss.state_dict())
        for each in (loss, again):
            rows = x.clone().requires_grad_()
            total = each(task, y, {"0": rows})
            total.backward()
            assert rows.grad is not None
            assert total.item() == pytest.approx(0.51 + 0.8 * factor * cka_loss(x, y["0"]).item(), rel=1e-6)
            assert each.last["guide_beta"].item() == pytest.approx(0.8 * factor, rel=1e-6)
            assert bool(rows.grad.abs().max() > 0) == (factor > 0)


def trained(
    loss: BirdLoss, steps: int, begin: int = 0, model: Net | None = None
) -> tuple[Net, list[tuple[float, ...]]]:
    """SGD in a loop of one's own; (beta, task's norm, guidance's norm) of each step."""
    model = network() if model is None else model
    teacher, sgd, found = Teacher(network(7, 1), LAYERS), torch.optim.SGD(model.parameters(), lr=0.01), []
    with Taps(model, "3", gradients=True) as taps:
        for done in range(begin, steps):
            x = images().roll(done, 0)[:12]
            sgd.zero_grad()
            loss((model(x) - 1).square().mean(), teacher(x), taps.pop()).backward()
            sgd.step()
            loss.step(done + 1, 40)
            found.append(tuple(float(loss.last[name]) for name in ("guide_beta", "task_grad", "guide_grad")))
    return model, found


@pytest.mark.parametrize("beta", [0.9, 1e-3])
def test_a_share_is_kept_from_running_means(beta: float) -> None:
    """Wherever beta starts: from the second step on it is what the means of the norms so far say."""
    loss = BirdLoss(0.5, beta, ONE, share=0.3)
    _, found = trained(loss, 20)
    assert found[0][0] == pytest.approx(beta)
    task = guide = 0.0
    for (now, t, g), (later, *_) in pairwise(found):
        task, guide = 0.5 * task + 0.5 * t, 0.5 * guide + 0.5 * g / now
        assert later == pytest.approx(0.3 / 0.7 * task / guide, rel=1e-4)
    shares = [g / (t + g) for _, t, g in found]
    assert abs(shares[0] - 0.3) > 0.2
    assert all(abs(share - 0.3) < 0.1 for share in shares[5:])  # 0.07: norms of batches of 12 vary


def test_a_share_falls_along_a_schedule() -> None:
    loss = BirdLoss(0.5, 0.9, ONE, share=0.4, schedule="linear", until=0.5)
    _, found = trained(loss, 24)
    shares = [g / (t + g) for _, t, g in found]
    assert all(abs(share - 0.4 * max(0, 1 - done / 20)) < 0.05 for done, share in enumerate(shares) if done > 4)
    assert shares[20:] == [0] * 4
    assert loss.course is not None
    assert loss.course.norms.isfinite().all()


def test_a_run_goes_on_from_the_state_of_its_loss() -> None:
    whole, found = trained(BirdLoss(0.5, 0.9, ONE, share=0.3, schedule="cosine"), 12)
    loss = BirdLoss(0.5, 0.9, ONE, share=0.3, schedule="cosine")
    half, first = trained(loss, 5)
    assert set(loss.state_dict()) == {"course.factor", "course.norms"}
    again = BirdLoss(0.5, 0.9, ONE, share=0.3, schedule="cosine")
    again.load_state_dict(copy.deepcopy(loss.state_dict()))
    model, rest = trained(again, 12, 5, half)
    assert first + rest == found
    assert same(model, whole)


def test_a_measurement_that_is_none_changes_nothing() -> None:
    """A scaler's overflow, a guidance without a gradient, a task that is solved."""
    loss = BirdLoss(pairs=ONE, share=0.5)
    for bad in ([torch.inf, 1.0], [torch.nan, 1.0], [1.0, 0.0], [0.0, 1.0]):
        loss.course.noted.append(torch.tensor(bad))
        loss.step(1, 10)
        assert float(loss.current_beta()) == pytest.approx(0.9)
    for norms in ([3.0, 0.9], [4.0, 1.2]):  # two backward passes of a step
        loss.course.noted.append(torch.tensor(norms))
    loss.step(2, 10)
    assert float(loss.current_beta()) == pytest.approx(5.0 / (1.5 / 0.9))


def test_a_step_that_nobody_calls_is_told() -> None:
    """Only after more calls than are accumulated in a step; then the last of them count, and no more wait."""
    called = torch.tensor(1.0), torch.tensor([0.5, 0.5])
    for options in ({"share": 0.5}, {"schedule": "linear"}):
        loss = BirdLoss(pairs=ONE, **options)
        norms = torch.tensor([3.0, 0.9]) if loss.measures else None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(MANY - 1):
                loss.weighed(*called, norms)
        with pytest.warns(RuntimeWarning, match=rf"{MANY} calls and no step.* call loss\.step\(done, total\) after"):
            loss.weighed(*called, norms)
        loss.step(1, 10)
        assert float(loss.current_beta()) == pytest.approx(3.0 if loss.measures else 0.81, rel=1e-5)


def test_a_share_needs_the_gradients() -> None:
    model, teacher, x, loss = network(), Teacher(network(7, 1), LAYERS), images(), BirdLoss(pairs=ONE, share=0.5)
    with pytest.raises(ValueError, match=r"share needs the gradients.*Taps\(\.\.\., gradients=True\)"):
        guided(loss, model, teacher, x)
    with Taps(model, LAYERS, gradients=True) as taps:
        model(x)
        with pytest.raises(ValueError, match=r"at one layer of the student, not at \['0', '3'\]"):
            loss(torch.ones(()), teacher(x), taps.pop())
    assert not BirdLoss(pairs=PAIRS).state_dict()
    BirdLoss(pairs=PAIRS).step(1, 2)  # has nothing to move
    for done, total in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match=rf"from 0 to total, not {done} of {total}"):
            BirdLoss(pairs=PAIRS).step(done, total)


def test_packed_sequences_are_not_measured() -> None:
    """The tensor that is recorded of them is a copy, which the task does not use."""
    model = nn.Sequential(nn.LSTM(3, 4))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    with Taps(model, "0", gradients=True), pytest.raises(ValueError, match="layer '0' returns sequences of many len"):
        model(packed)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_models_are_not_measured() -> None:
    model = network()
    with Taps(model, "0", gradients=True) as taps:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="a compiled model does not call"):
            compiled(images())
        taps.remove()


# ------------------------------------------------------------------------------------ chunks and ranks


@pytest.mark.parametrize("loss", ["cka", "sqrt_cka", "cosine_cka", "gram_mse", "rsa", "procrustes"])
def test_chunks_have_the_gradients_of_the_batch(loss: str) -> None:
    """By name, with a share: weights, terms, norms and the next beta."""
    results = []
    for cut in (False, True):
        model, teacher, x = network().double(), Teacher(network(7, 1).double(), LAYERS), images(20, torch.float64)
        guidance = BirdLoss(0.3, 0.7, ONE, weights=[0.5, 2.0], loss=loss, share=0.4)
        with Taps(model, "3", gradients=True) as taps:

            def forward(part: Tensor, model: Net = model, taps: Taps = taps) -> tuple[Tensor, dict[str, Tensor]]:
                return model(part).square().sum() / 100, taps.pop()

            if cut:
                total = chunked_backward(forward, teacher, x.split([8, 7, 5]), guidance, model=model)
            else:
                task, rows = forward(x)
                total = guidance(task, teacher(x), rows)
                total.backward()
        guidance.step(1, 10)
        terms = {name: value.detach().double() for name, value in guidance.last.items()}
        results.append((total.detach(), terms, guidance.current_beta(), [p.grad for p in model.parameters()]))
        assert guidance.state_dict()["course.norms"].dtype == torch.float32  # as in a new one, which loads it
    assert {"task_grad", "guide_grad", "guide_beta"} < results[0][1].keys()
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_pairs_of_rows_are_refused_in_chunks() -> None:
    model, teacher = network(), Teacher(network(7, 1), LAYERS)
    loss = BirdLoss(pairs=PAIRS, loss="cka_difference")
    with pytest.raises(ValueError, match="pairs the halves of a batch, which chunks do not have"):
        chunked_backward(lambda _: (torch.ones(()), {}), teacher, images().split(8), loss, model=model)


def _in_ranks(rank: int, folder: Path) -> None:
    """Each has half of the rows; beta is that of one process with all of them, by gradients that DDP averages."""
    x, betas = images(24, torch.float64), []
    for part, group in ((x[12 * rank : 12 * rank + 12], dist.group.WORLD), (x, None)):
        model, teacher = network().double(), Teacher(network(7, 1).double(), LAYERS)
        loss = BirdLoss(0.3, 0.7, ONE, share=0.4, loss="cosine_cka", group=group)
        with Taps(model, "3", gradients=True) as taps:
            loss(model(part).square().mean(), teacher(part), taps.pop()).backward()
        loss.step(1, 10)
        betas.append(float(loss.current_beta()))
    assert betas[0] == pytest.approx(betas[1], rel=1e-6)
    _each_by_itself(rank, x)
    _none_noted(rank)


def _none_noted(rank: int) -> None:
    """A rank that has measured nothing takes part in `step`; where no rank has, nothing changes."""
    one, both = (BirdLoss(pairs=ONE, share=0.4) for _ in range(2))
    for loss in (one, both)[: 2 - rank]:
        loss.course.noted.append(torch.tensor([3.0, 0.9]))
    one.step(1, 10)
    for done in (1, 2):
        both.step(done, 10, group=dist.group.WORLD)
        assert float(both.current_beta()) == pytest.approx(float(one.current_beta()))


def _each_by_itself(rank: int, x: Tensor) -> None:
    """Each rank has its own beta, unless `step` is told whose norms count; then rank 0's checkpoint is every rank's."""
    part = x[12 * rank : 12 * rank + 12]
    for group in (None, dist.group.WORLD):
        model, teacher = network().double(), Teacher(network(7, 1).double(), LAYERS)
        loss = BirdLoss(0.3, 0.7, ONE, share=0.4, loss="procrustes")
        with Taps(model, "3", gradients=True) as taps:
            loss(model(part).square().mean(), teacher(part), taps.pop()).backward()
        loss.step(1, 10, group=group)
        mine = torch.stack([*loss.state_dict()["course.norms"], loss.current_beta()])
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        assert theirs[0].equal(theirs[1]) == (group is not None)


def test_ranks_of_a_group_have_one_beta(tmp_path: Path) -> None:
    run_ranks(_in_ranks, 2, tmp_path, tmp_path)


# ------------------------------------------------------------------------------------ in the laboratory's loop


def transfer(student: nn.Module, **options: Any) -> TransferGuide:
    torch.manual_seed(5)
    return TransferGuide(
        Teacher(small(6, seed=5), "0"),
        Taps(student, "0", gradients=True),
        BirdLoss(0.5, 0.9, [("0", "0")], **options),
    )


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 8}, {"amp": "float16"}], ids=["whole", "chunks", "float16"])
def test_a_run_that_was_cut_goes_on_to_the_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"share": 0.3, "schedule": "cosine", "loss": "procrustes"}
    runs = []
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        model = small()
        if folder.name == "cut":
            augment = cut_after(30 if "chunk_size" in settings else 14)
            with pytest.raises(Cut):
                train(folder=folder, model=model, guide=transfer(model, **options), augment=augment, **settings)
            model = small()
        runs.append(train(folder=folder, model=model, guide=transfer(model, **options), resume=True, **settings))
    whole, cut = runs
    assert str(cut.history.train) == str(whole.history.train)  # with float16 the first steps overflow, and are NaN
    assert same(cut.model, whole.model)
    names = {"procrustes/0/0", "guide_beta", "task_grad", "guide_grad"}
    assert all(names < row.keys() for row in whole.history.train)
    assert whole.history.train[-1]["guide_beta"] < whole.history.train[1]["guide_beta"]


def test_half_precision_logs_what_is_not_scaled() -> None:
    rows = []
    for amp in (None, "float16"):
        model = small(dropout=0.0)
        rows.append(train(model=model, guide=transfer(model), amp=amp, steps=60).history.train[-1])
    for name in ("task_grad", "guide_grad"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.05)


def test_a_compiled_run_is_not_measured() -> None:
    model = small()
    with pytest.raises(ValueError, match="gradients are measured in hooks"):
        train(model=model, guide=transfer(model), compile=True)
