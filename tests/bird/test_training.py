"""The loop: what it does to data, weights and files; and that a run cut short ends like one that was not."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bird import BirdLoss, Taps, Teacher
from bird.lab.tensors import load_tensors
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.models import build
from bird.lab.vision.steps import Batches, TransferGuide, epoch_order, learning_rate
from bird.lab.vision.training import fit
from tests.bird.loops import Cut, cut_after, images, margin, network, same, state, train


@pytest.mark.parametrize(
    ("method", "optimizer"), [("none", "sgd"), ("hints", "adamw"), ("bird", "sgd"), ("bird", "adamw")]
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, method: str, optimizer: str) -> None:
    again: Any = {"validate": margin, "optimizer": optimizer}
    whole = train(method, **again)
    again |= {"folder": tmp_path, "resume": True}
    for steps_until_cut in (2, 8, 7):  # before the first checkpoint; mid-epoch at 6 + 2; again at 6 + 7 = 13
        with pytest.raises(Cut):
            train(method, augment=cut_after(steps_until_cut), **again)
    assert load_tensors(tmp_path / "last.pt")["step"] == 12
    for _ in range(2):  # once it is finished nothing is trained, and the weights are there
        resumed = train(method, **again)
        assert same(resumed.model, whole.model)
        assert resumed.history == whole.history
        assert whole.guide is None or same(resumed.guide.loss, whole.guide.loss)  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk_size", [None, 9])
def test_images_made_ahead_are_those_of_each_batch(chunk_size: int | None) -> None:
    """Three epochs of 16, 16, 16 and 7; a resumed run begins anywhere."""
    data, asked = images(55), list[int]()

    class Ahead:
        ahead = 3

        def __call__(self, x: Tensor, index: Tensor, epoch: int) -> Tensor:
            asked.append(len(index))
            return x + index.view(-1, 1, 1, 1) + 100 * epoch

    settings = Settings(steps=12, batch_size=16, chunk_size=chunk_size)
    ahead = Batches(data, settings, Ahead(), torch.device("cpu"))
    plain = Batches(data, settings, lambda x, *rest: Ahead.__call__(Ahead(), x, *rest), torch.device("cpu"))
    for steps in (range(12), range(6, 10), (1, 0, 5)):
        made = [chunk for step in steps for chunk in ahead.at(step)]
        taken, asked[:] = list(asked), []
        expected = [chunk for step in steps for chunk in plain.at(step)]
        if chunk_size is None and len(steps) == 12:
            assert taken == 3 * [48, 7]
        asked.clear()
        for found, other in zip(made, expected, strict=True):
            assert all(map(torch.equal, found, other))


FAULTS = """
import resource, sys, torch
from bird.lab.vision.training import keep_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_memory()
def step():
    return sum(x.sum() for x in [torch.ones(2**18) for _ in range(40)])  # 40 MB in pieces, freed at once
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other C libraries' memory nothing is asked")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "131072"
    }  # glibc moves it otherwise, as memory happens to lie
    kept, returned = (
        int(
            subprocess.run([sys.executable, "-c", FAULTS, how], env=environment, capture_output=True, check=True).stdout
        )
        for how in ("kept", "as it is")
    )
    assert 10 * kept < returned  # of 40 MB ten times, in pages of 4 kB or more


def test_seed_decides_the_result() -> None:
    first, again, other = (train(seed=seed, steps=6).model for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize(("samples", "sizes"), [(51, [16] * 3), (52, [16, 16, 16, 4])])
def test_batches_cover_the_data_and_a_tiny_tail_is_left_out(samples: int, sizes: list[int]) -> None:
    """51 = 16 + 16 + 16 + 3, and the 3 are too few for the unbiased estimator."""
    data = images(samples)
    seen: list[tuple[int, list[int]]] = []

    def watch(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        assert torch.equal(x, data.images[index].float() / 255)
        seen.append((epoch, index.tolist()))
        return x

    train("unbiased", data=data, augment=watch, steps=2 * len(sizes))
    assert [(epoch, len(index)) for epoch, index in seen] == [(epoch, size) for epoch in (0, 1) for size in sizes]
    first, second = ([i for epoch, index in seen for i in index if epoch == e] for e in (0, 1))
    assert len(set(first)) == len(set(second)) == sum(sizes)
    assert set(first) | set(second) == set(range(samples))  # others are left out the next time


def test_epoch_order_is_a_new_permutation_each_time() -> None:
    orders = [epoch_order(40, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert epoch_order(40, 1, 2).tolist() == orders[5]


def test_the_learning_rate_is_a_cosine_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(steps=8, lr=0.4, final_lr=0.1)
    expected = [0.1 + 0.15 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert [learning_rate(step, settings) for step in range(9)] == pytest.approx(expected)
    used, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: used.append(self.param_groups[0]["lr"]) or step(self))
    history = train(steps=8, lr=0.4, final_lr=0.1, log_every=1).history
    assert used == pytest.approx(expected[:8])
    assert [row["lr"] for row in history.train] == used


def test_the_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    scores, weights = iter([0.1, 0.7, 0.3, 0.7]), []

    def validate(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        weights.append(state(model))
        return next(scores)

    model, history, _ = train(folder=tmp_path, validate=validate)
    assert model.training
    scored = ((6, 0.1), (12, 0.7), (18, 0.3), (20, 0.7))
    assert history.validation == [{"step": step, "score": score} for step, score in scored]
    assert (history.best_step, history.best_score) == (12, 0.7)
    best, last = load_tensors(tmp_path / "best.pt"), load_tensors(tmp_path / "last.pt")["modules"]
    assert (best["step"], best["score"]) == (12, 0.7)
    assert all(torch.equal(best["model"][name], value) for name, value in weights[1].items())
    assert all(torch.equal(last[f"model.{name}"], value) for name, value in weights[3].items())


def test_validation_leaves_training_alone() -> None:
    assert same(train(validate=lambda model: margin(model) * 0).model, train().model)


def test_history_holds_means_over_the_steps_since_the_last_report() -> None:
    every, third = (train("bird", log_every=often, save_every=50).history.train for often in (1, 3))
    assert [row["step"] for row in third] == [3, 6, 9, 12, 15, 18, 20]
    assert set(third[0]) == {"step", "lr", "loss", "accuracy", "task", "cka/0/0"}
    for name in ("loss", "accuracy", "cka/0/0"):
        singles = [row[name] for row in every]
        groups = [singles[i : i + 3] for i in range(0, 20, 3)]
        assert [row[name] for row in third] == pytest.approx([sum(g) / len(g) for g in groups], rel=1e-5)
    assert every[0]["loss"] == pytest.approx(0.1 * every[0]["task"] + 0.9 * (1 - every[0]["cka/0/0"]), rel=1e-5)


def test_bird_raises_cka_and_hints_train_their_regressor() -> None:
    rows = train("bird", steps=60, batch_size=48).history.train
    assert rows[-1]["cka/0/0"] > rows[0]["cka/0/0"] + 0.02
    run, fresh = train("hints", steps=60), train("hints", steps=1, lr=1e-12)
    assert not same(run.guide.loss, fresh.guide.loss)  # type: ignore[union-attr]
    assert run.history.train[-1]["hint/0/0"] < run.history.train[0]["hint/0/0"]


class _Waits(TorchDispatchMode):
    """Counts the reads of a value out of a tensor: each would make a GPU's host wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, tolist = [], Tensor.tolist
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
    with pytest.raises(ValueError, match="samples was 48, is 40"):
        train(folder=tmp_path, steps=6, data=images(40), resume=True)


@pytest.mark.parametrize(
    "changes", [{"amp": "bfloat16"}, {"amp": "bfloat16", "chunk_size": 16}, {"amp": "float16", "chunk_size": 16}]
)
def test_low_precision_runs_and_stays_near(changes: dict[str, Any]) -> None:
    """float16 with loss scaling, which must reach both passes."""
    full, low = (
        train("bird", model=plain_network(), steps=3, log_every=1, batch_size=48, **more).history.train
        for more in (changes | {"amp": None}, changes)
    )
    assert low[2]["loss"] == pytest.approx(full[2]["loss"], rel=0.05)
    assert low[0]["loss"] != full[0]["loss"]


@pytest.mark.parametrize("method", ["none", "bird"])
def test_a_compiled_run_is_the_same_run(method: str) -> None:
    plain = train(method, steps=6).history
    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):  # the same dropout
        model, compiled, _ = train(method, steps=6, compile=True, validate=margin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    assert len(compiled.train) == 2
    for ours, theirs in zip(compiled.train, plain.train, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(model.state_dict()) == list(network().state_dict())  # no wrapper's names


def test_views_have_no_gradients_to_compare() -> None:
    """The guidance's are of another pass: the share would never be kept."""
    teacher, model = (build("plain", 3, channels=1) for _ in range(2))
    loss = BirdLoss(pairs=[("block3", "block3")], share=0.5)
    guide = TransferGuide(Teacher(teacher, "block3"), Taps(model, "block3", gradients=True), loss, lambda x, *_: x)
    with pytest.raises(ValueError, match="with views the two have their own"):
        train(model=model, guide=guide, steps=2)


def test_a_compiled_run_after_another_is_guided(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """As one process of `bird run --compile` trains a student, and then a method that taps a network of its kind."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    teacher, first, second = (build("plain", 3, channels=1) for _ in range(3))
    train("none", model=first, steps=2, compile=True)
    loss = BirdLoss(pairs=[("block3", "block3")])
    guide = TransferGuide(Teacher(teacher, "block3"), Taps(second, "block3"), loss)
    history = train(model=second, guide=guide, steps=3, compile=True).history
    assert 0 < history.train[-1]["cka/block3/block3"] < 1


def test_images_and_convolutions_have_channels_last() -> None:
    seen = []
    four = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    four.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].stride()))
    train(model=four, data=Images(images().images.expand(-1, 4, -1, -1), images().labels), steps=1, batch_size=8)
    assert seen == [(64 * 4, 1, 4 * 8, 4)]
    assert four[0].weight.stride(1) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, 'optimizer must be "sgd" or "adamw", not \'lion\''),
        ({"amp": "int8"}, "amp must be"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 3}, "batch_size must be at least 4, not 3"),
        ({"chunk_size": 3}, "chunk_size must be at least 4, not 3"),
        ({"data": images(3)}, "at least 4 samples, not 3"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**change)


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_labels_beyond_the_logits_are_refused_before_anything_is_trained(
    tmp_path: Path, chunk_size: int | None
) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"gives logits \[(16|8), 3\], but the labels go up to 3: \[n, 4\] or wider"):
        train(model=model, folder=tmp_path, data=images(classes=4), chunk_size=chunk_size)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    assert not (tmp_path / "last.pt").exists()
    train(model=model, data=images(classes=2), steps=1)  # a head for more classes than these data show is no mistake


def test_labels_are_not_negative_and_logits_have_two_dimensions() -> None:
    with pytest.raises(ValueError, match="labels are numbers from 0, but the training set has -1"):
        train(data=Images(images().images, images().labels - 1))
    with pytest.raises(ValueError, match=r"gives logits \[16, 3, 1\]"):
        train(model=nn.Sequential(*network(), nn.Unflatten(1, (3, 1))))


# ---------------------------------------------------------------------------------------------- in chunks


def plain_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))


CHUNKED = {"steps": 8, "batch_size": 32, "save_every": 3}


@pytest.mark.parametrize("method", ["none", "hints", "bird"])
def test_fit_in_chunks_is_fit(method: str) -> None:
    """50 images: batches of 32 and 18 in chunks of at most 7."""
    sizes = []
    watch = lambda x, index, epoch: (x, sizes.append(len(index)))[0]  # noqa: E731
    whole = train(method, model=plain_network(), data=images(50), **CHUNKED)
    cut = train(method, model=plain_network(), data=images(50), chunk_size=7, augment=watch, **CHUNKED)
    passes = 2 if method == "bird" else 1
    assert sizes[: 8 * passes] == passes * [7, 7, 6, 6, 6] + passes * [6, 6, 6]
    for ours, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    for row, truth in zip(cut.history.train, whole.history.train, strict=True):
        assert list(row) == list(truth)
        assert row == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("method", "fetched"), [("hints", 19), ("bird", 38)])
def test_a_resumed_run_in_chunks_ends_with_the_same_bits(tmp_path: Path, method: str, fetched: int) -> None:
    """The power goes off within the fifth step, once ``fetched`` chunks of 5 + 3 + 5 + 3 + 5 were made."""
    again: Any = {"data": images(50), "chunk_size": 7, **CHUNKED}
    whole = train(method, **again)
    again |= {"folder": tmp_path, "resume": True}
    with pytest.raises(Cut):
        train(method, augment=cut_after(fetched), **again)
    assert load_tensors(tmp_path / "last.pt")["step"] == 3
    resumed = train(method, **again)
    assert same(resumed.model, whole.model)
    assert resumed.history == whole.history


# ---------------------------------------------------------------------------------------------- shapes


def test_a_run_notes_the_shapes_of_its_loss(tmp_path: Path) -> None:
    """For `bird tune --from-run`: batches of 32 and 18; pooled features of 6 and 5 channels."""
    student = network(6)
    guide = TransferGuide(Teacher(network(5), ["0"]), Taps(student, ["0"]), BirdLoss(pairs=[("0", "0")]))
    fit(student, images(50), Settings(steps=4, batch_size=32), guide=guide, folder=tmp_path, progress=False)
    assert json.loads((tmp_path / "shapes.json").read_text()) == [[18, 6, 5, "float32"], [32, 6, 5, "float32"]]


@pytest.mark.parametrize("kind", ["none", "hints", "lwf", "chunks"])
def test_other_runs_note_nothing(kind: str, tmp_path: Path) -> None:
    changes = {"chunk_size": 7} if kind == "chunks" else {}
    train("bird" if kind == "chunks" else kind, folder=tmp_path, steps=2, batch_size=32, **changes)
    assert not (tmp_path / "shapes.json").exists()


def test_rows_and_features_of_any_number_of_dimensions() -> None:
    loss = BirdLoss(pairs=[("t", "s"), ("u", "s")], row_dims=2)
    teacher = {"t": torch.randn(4, 5, 7), "u": torch.randn(4, 5, 2, 3).bfloat16()}
    loss(torch.zeros(()), teacher, {"s": torch.randn(4, 5, 6).bfloat16()})
    assert loss.shapes == {(20, 6, 7, "float32"), (20, 6, 6, "bfloat16")}
