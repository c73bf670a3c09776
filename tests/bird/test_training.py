"""The loop: what it does to data, weights and files; and that a run cut short ends like one that was not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bird.lab.tensors import load_tensors
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.steps import TransferGuide, epoch_order, learning_rate
from bird.lab.vision.training import fit
from bird.losses import BirdLoss, Hints
from bird.taps import Taps
from bird.teachers import Teacher


class Cut(Exception):
    """The power goes off."""


def network(width: int = 6) -> nn.Module:
    """Batch normalisation and dropout: both carry state from step to step."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(width * 36, 3),
    )


def images(n: int = 50) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % 3)


def guide(method: str, student: nn.Module) -> TransferGuide | None:
    pairs = [("0", "0")]
    torch.manual_seed(5)
    teacher = Teacher(network(4), ["0"])
    if method == "bird":
        return TransferGuide(teacher, Taps(student, ["0"]), BirdLoss(pairs=pairs))
    if method == "unbiased":
        return TransferGuide(teacher, Taps(student, ["0"]), BirdLoss(pairs=pairs, estimator="unbiased"))
    if method == "hints":
        loss = Hints(pairs=pairs, teacher_widths={"0": 4}, student_widths={"0": 6})
        return TransferGuide(teacher, Taps(student, ["0"]), loss)
    return None


def train(
    method: str = "none",
    *,
    data: Images | None = None,
    resume: bool = False,
    folder: Path | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    augment: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    **settings: Any,
) -> tuple[nn.Module, Any, TransferGuide | None]:
    torch.manual_seed(0)
    student = network()
    pull = guide(method, student)
    options = {"steps": 20, "batch_size": 16, "lr": 0.05, "log_every": 3, "save_every": 6} | settings
    history = fit(
        student,
        images() if data is None else data,
        Settings(**options),
        guide=pull,
        augment=augment,
        validate=validate,
        folder=folder,
        resume=resume,
        progress=False,
    )
    return student, history, pull


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def margin(model: nn.Module) -> float:
    """A score that depends on every weight."""
    return model(images(9).images.float() / 255).std().item()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["none", "hints", "bird", "unbiased"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, method: str, optimizer: str) -> None:
    whole, history, whole_guide = train(method, validate=margin, optimizer=optimizer)

    def cut_at(last: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        left = iter(range(last))

        def augment(x: Tensor, index: Tensor, epoch: int) -> Tensor:
            if next(left, None) is None:
                raise Cut
            return x

        return augment

    again_and_again = {"folder": tmp_path, "resume": True, "validate": margin, "optimizer": optimizer}
    for steps_until_cut in (2, 8, 7):  # before the first checkpoint; mid-epoch at 6 + 2; again at 6 + 7 = 13
        with pytest.raises(Cut):
            train(method, augment=cut_at(steps_until_cut), **again_and_again)
    assert load_tensors(tmp_path / "last.pt")["step"] == 12
    resumed, rows, resumed_guide = train(method, **again_and_again)
    assert same(resumed, whole)
    assert rows == history
    if whole_guide is not None and resumed_guide is not None:
        assert same(resumed_guide.loss, whole_guide.loss)

    loaded, rows, _ = train(method, **again_and_again)
    assert same(loaded, whole)  # finished: nothing is trained, the weights are there
    assert rows == history


def test_seed_decides_the_result() -> None:
    assert same(train(seed=3)[0], train(seed=3)[0])
    assert not same(train(seed=3)[0], train(seed=4)[0])


def test_batches_cover_the_data_and_a_tiny_tail_is_left_out() -> None:
    seen: list[tuple[int, list[int]]] = []

    def watch(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        assert torch.equal(x, images(51).images[index].float() / 255)
        seen.append((epoch, index.tolist()))
        return x

    train("unbiased", data=images(51), augment=watch, steps=8)  # 51 = 16 + 16 + 16 + 3, and the 3 are left out
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [len(index) for _, index in seen] == [16] * 8
    first, second = ([i for epoch, index in seen for i in index if epoch == e] for e in (0, 1))
    assert len(set(first)) == len(set(second)) == 48
    assert set(first) | set(second) == set(range(51))  # others are left out the next time


def test_a_tail_that_is_large_enough_is_trained_on() -> None:
    sizes = []

    def watch(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        sizes.append(len(index))
        return x

    train("unbiased", data=images(52), augment=watch, steps=4)
    assert sizes == [16, 16, 16, 4]


def test_epoch_order_is_a_new_permutation_each_time() -> None:
    orders = [epoch_order(40, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert epoch_order(40, 1, 2).tolist() == orders[5]


def test_the_learning_rate_is_a_cosine_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=8, lr=0.4, final_lr=0.1)
    expected = [0.1 + 0.15 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [learning_rate(step, settings) for step in range(8)] == pytest.approx(expected)
    assert learning_rate(0, settings) == 0.4
    assert learning_rate(8, settings) == pytest.approx(0.1)

    used, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    _, history, _ = train(steps=8, lr=0.4, final_lr=0.1, log_every=1)
    assert used == pytest.approx(expected)
    assert [row["lr"] for row in history.train] == used


def test_the_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    scores, weights = iter([0.1, 0.7, 0.3, 0.7]), []

    def validate(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    model, history, _ = train(folder=tmp_path, validate=validate, steps=20, save_every=6)
    assert model.training
    scored = ((6, 0.1), (12, 0.7), (18, 0.3), (20, 0.7))
    assert history.validation == [{"step": step, "score": score} for step, score in scored]
    assert (history.best_step, history.best_score) == (12, 0.7)
    best = load_tensors(tmp_path / "best.pt")
    assert (best["step"], best["score"]) == (12, 0.7)
    assert all(torch.equal(best["model"][name], weights[1][name]) for name in weights[1])
    last = load_tensors(tmp_path / "last.pt")["modules"]
    assert all(torch.equal(last[f"model.{name}"], value) for name, value in weights[3].items())


def test_validation_leaves_training_alone() -> None:
    def noisy(model: nn.Module) -> float:
        margin(model)
        return 0.5

    assert same(train(validate=noisy)[0], train()[0])


def test_history_holds_means_over_the_steps_since_the_last_report() -> None:
    _, every, _ = train("bird", log_every=1, save_every=50)
    _, third, _ = train("bird", log_every=3, save_every=50)
    assert [row["step"] for row in third.train] == [3, 6, 9, 12, 15, 18, 20]
    assert set(third.train[0]) == {"step", "lr", "loss", "accuracy", "task", "cka/0/0"}
    for name in ("loss", "accuracy", "cka/0/0"):
        singles = [row[name] for row in every.train]
        groups = [singles[i : i + 3] for i in range(0, 20, 3)]
        assert [row[name] for row in third.train] == pytest.approx([sum(g) / len(g) for g in groups], rel=1e-5)
    first = every.train[0]
    assert first["loss"] == pytest.approx(0.1 * first["task"] + 0.9 * (1 - first["cka/0/0"]), rel=1e-5)


def test_bird_raises_cka_and_hints_train_their_regressor() -> None:
    _, plain, _ = train("bird", steps=60, batch_size=48)
    assert plain.train[-1]["cka/0/0"] > plain.train[0]["cka/0/0"] + 0.02
    _, history, pull = train("hints", steps=60)
    assert pull is not None
    _, _, fresh = train("hints", steps=1, lr=1e-12)
    assert fresh is not None
    assert not same(pull.loss, fresh.loss)
    assert history.train[-1]["hint/0/0"] < history.train[0]["hint/0/0"]


class _Waits(TorchDispatchMode):
    """Counts the reads of a value out of a tensor: each would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(1) or tolist(self))
    with _Waits() as waits:
        train(steps=20, log_every=10, save_every=20, optimizer="sgd")
    assert waits.count == 0
    assert len(lists) == 1 + 2  # the labels at the start, and two reports


def test_a_folder_is_not_used_for_two_runs(tmp_path: Path) -> None:
    train(folder=tmp_path, steps=6)
    with pytest.raises(FileExistsError, match="resume=True"):
        train(folder=tmp_path, steps=6)
    with pytest.raises(ValueError, match=r"lr was 0\.05, is 0\.1; steps was 6, is 8"):
        train(folder=tmp_path, steps=8, lr=0.1, resume=True)
    with pytest.raises(ValueError, match="samples was 50, is 40"):
        train(folder=tmp_path, steps=6, data=images(40), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match=r"became nan at step 1; a lower lr may help$"):
        train(augment=lambda x, index, epoch: x * float("nan"))


def test_low_precision_runs_and_stays_near() -> None:
    _, full, _ = train("bird", steps=3, log_every=1)
    _, low, _ = train("bird", steps=3, log_every=1, amp="bfloat16")
    assert low.train[0]["loss"] == pytest.approx(full.train[0]["loss"], rel=0.05)
    assert low.train[0]["loss"] != full.train[0]["loss"]


@pytest.mark.parametrize("method", ["none", "bird"])
def test_a_compiled_run_is_the_same_run(method: str) -> None:
    _, plain, _ = train(method, steps=6)
    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):  # the same dropout
        student, compiled, _ = train(method, steps=6, compile=True, validate=margin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    assert len(compiled.train) == 2
    for ours, theirs in zip(compiled.train, plain.train, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(student.state_dict()) == list(network().state_dict())  # no wrapper's names


def test_images_and_convolutions_have_channels_last() -> None:
    seen = []
    four = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    four.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    data = images()
    fit(four, Images(data.images.expand(-1, 4, -1, -1), data.labels), Settings(steps=1, batch_size=8), progress=False)
    assert seen == [(64 * 4, 1, 4 * 8, 4)]
    assert four[0].weight.stride(1) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, 'optimizer must be "sgd" or "adamw", not \'lion\''),
        ({"amp": "int8"}, "amp must be"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 3}, "batch_size must be at least 4, not 3"),
        ({"data": images(3)}, "at least 4 samples, not 3"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**change)
