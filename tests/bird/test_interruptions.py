"""What may happen to a long run: kills, full disks, damaged files, wrong labels, losses that are not finite."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bird import BirdLoss, Hints, LwF, Taps, Teacher
from bird.files import atomic
from bird.lab.tensors import load_tensors, save_tensors
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.steps import TransferGuide
from bird.lab.vision.training import fit

ROOT = Path(__file__).resolve().parents[2]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def images(classes: int = 3) -> Images:
    pixels = torch.randint(0, 256, (48, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Images(pixels, torch.arange(48) % classes)


def train(model: nn.Module, folder: Path | None = None, data: Images | None = None, **options: Any) -> Any:
    rest = {key: options.pop(key) for key in ("augment", "guide", "resume", "validate") if key in options}
    settings = {"steps": 20, "batch_size": 16, "lr": 0.05, "log_every": 3, "save_every": 6} | options
    return fit(model, images() if data is None else data, Settings(**settings), folder=folder, progress=False, **rest)


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


# Kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks, to import PyTorch once")
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = run(str(ROOT / "tests/bird/killed_training.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome.pop("code") == 0, done.stderr
    steps = outcome.pop("steps")
    assert steps == sorted(steps), "no kill loses what was there before it"
    assert 12 < steps[-1] < 120, "the run was killed, and taken up, in its midst"
    assert outcome.pop("partial") == [0, 1, 1, 0] * 3, "what a kill leaves: in a step, torn, written, placed"
    expected = {
        "weights": True,
        "best": True,
        "history": True,
        "end": 120,
        "files": ["best.pt", "last.pt", "shapes.json"],
    }
    assert outcome == expected


# Disks


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.training import fit
from bird.lab.vision.data import Images

folder = Path(sys.argv[1])
small, large = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.Sequential(nn.Flatten(), nn.Linear(64, 30_000))
data = Images(torch.zeros(16, 1, 8, 8, dtype=torch.uint8), torch.arange(16) % 3)
fit(small, data, Settings(steps=2, batch_size=16), folder=folder / "one", progress=False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
(folder / "two").mkdir()
(folder / "one/last.pt").rename(folder / "two/best.pt")
before = (folder / "two/best.pt").read_bytes()
try:
    settings = Settings(steps=2, batch_size=16)
    fit(large, data, settings, validate=lambda model: 1.0, folder=folder / "two", progress=False)
except OSError as error:
    print(error)
assert (folder / "two/best.pt").read_bytes() == before
print(sorted(path.name for path in (folder / "two").iterdir() if not path.name.startswith("events")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_leaves_the_last_good_file_and_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = run(str(script), tmp_path)
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert "best.pt could not be written, as happens when the disk is full" in error
    assert left == "['best.pt']"


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_write_that_fails_removes_what_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "results.json"
    path.write_text("whole")
    failure = OSError(28, "No space left on device")

    def refuse(*_: Any) -> None:
        raise failure

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)

    def write() -> None:
        with atomic(path) as partial:
            partial.write_text("half")
            if where == "write":
                refuse()

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value is failure
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_what_a_killed_write_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    for name in (".partial.0a1b2c3d.best.pt", ".partial.4e5f6a7b.last.pt", "notes.txt"):
        (tmp_path / name).write_text("half")
    train(network(), tmp_path, steps=1, resume=True)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("events")} == {"last.pt", "notes.txt"}


# Damaged files


class Code:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "it ran")


def load_weights(whole: bytes) -> bytes:
    """The bytes of the last layer's weights, as they stand in the file."""
    weights = torch.load(io.BytesIO(whole), weights_only=True)["modules"]["model.4.weight"].numpy().tobytes()
    assert whole.count(weights) == 1
    return weights


DAMAGES: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated": lambda whole, _: whole[: len(whole) // 2],
    "empty": lambda whole, _: b"",
    "garbage": lambda whole, _: b"\x93NUMPY or whatever it is" * 50,
    "pickle": lambda whole, target: pickle.dumps(Code(target)),
    "old pickle": lambda whole, target: pickle.dumps({"step": Code(target)}, protocol=2),
    "flipped weights": lambda whole, _: whole.replace(weights := load_weights(whole), bytes(255 - b for b in weights)),
    "flipped": lambda whole, _: whole[:200] + bytes(255 - b for b in whole[200:400]) + whole[400:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_runs_nothing(tmp_path: Path, damage: str) -> None:
    train(network(), tmp_path, steps=6)
    path, target = tmp_path / "last.pt", tmp_path / "written"
    path.write_bytes(DAMAGES[damage](path.read_bytes(), target))
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint .*: delete it to start over, or choose"):
        train(network(), tmp_path, steps=6, resume=True)
    assert not target.exists()
    if "pickle" in damage:  # the trap is armed
        pickle.loads(path.read_bytes())
        assert target.read_text() == "it ran"


def test_code_in_a_whole_file_does_not_run_either(tmp_path: Path) -> None:
    torch.save({"step": Code(tmp_path / "written")}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint"):
        train(network(), tmp_path, resume=True)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [{"step": 6}, [1, 2], torch.ones(3)])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint"):
        train(network(), tmp_path, resume=True)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    train(network(), tmp_path, steps=6)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"last\.pt comes from another model: choose another folder"):
        train(other, tmp_path, steps=6, resume=True)


@pytest.mark.smoke
def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "last.pt")
    save_tensors({"step": 1}, tmp_path / "last.pt")
    assert load_tensors(tmp_path / "last.pt") == {"step": 1}


# Labels


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_labels_beyond_the_logits_are_refused_before_anything_is_trained(
    tmp_path: Path, chunk_size: int | None
) -> None:
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"gives logits \[(16|8), 3\], but the labels go up to 3: \[n, 4\] or wider"):
        train(model, tmp_path, images(4), chunk_size=chunk_size)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert not (tmp_path / "last.pt").exists()
    train(model, data=images(2), steps=1)  # a head for more classes than these data show is none of its business


def test_labels_are_not_negative_and_logits_have_two_dimensions() -> None:
    data = images()
    with pytest.raises(ValueError, match="labels are numbers from 0, but the training set has -1"):
        train(network(), data=Images(data.images, data.labels - 1))
    with pytest.raises(ValueError, match=r"gives logits \[16, 3, 1\]"):
        train(nn.Sequential(*network(), nn.Unflatten(1, (3, 1))))


# Losses that are not finite


def at_step(number: int, value: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Images are multiplied by ``value`` in one step, counted from 1."""
    count = iter(range(1, 1000))
    return lambda x, index, epoch: x * value if next(count) == number else x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [7, 8, 11, 12])
def test_the_first_bad_step_is_named_and_the_last_good_state_kept(tmp_path: Path, bad: int, value: float) -> None:
    good = network()
    train(good, tmp_path / "good", validate=lambda model: 1.0)
    scored: list[int] = []
    with pytest.raises(
        FloatingPointError, match=rf"became (nan|inf) at step {bad}; .*last\.pt is as it was after step 6"
    ):
        train(network(), tmp_path / "bad", augment=at_step(bad, value), validate=lambda model: scored.append(1) or 1.0)
    kept = load_tensors(tmp_path / "bad/last.pt")
    assert kept["step"] == 6
    assert all(tensor.isfinite().all() for tensor in kept["modules"].values())
    assert len(scored) == 1
    train(model := network(), tmp_path / "bad", resume=True, validate=lambda model: 1.0)  # on healthy data it goes on
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), good.parameters(), strict=True))


class _BadGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN at one step."""

    count, bad = 0, 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _BadGradient.count += 1
        return gradient * float("nan") if _BadGradient.count == _BadGradient.bad else gradient


class Fragile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _BadGradient.apply(x)


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """At step 6, where a checkpoint is due, the loss is finite, and its gradient is not."""
    for bad, step, message in [
        (6, None, r"the weights became NaN or infinite by step 6; a lower lr may help$"),
        (12, 6, r"the weights became NaN or infinite by step 12; .*last\.pt is as it was after step 6"),
        (9, 6, r"the loss became nan at step 10; .* after step 6"),  # the weights after 9
    ]:
        _BadGradient.count, _BadGradient.bad = 0, bad
        folder = tmp_path / str(bad)
        with pytest.raises(FloatingPointError, match=message):
            train(nn.Sequential(*network(), Fragile()), folder, validate=lambda model: 1.0)
        assert (folder / "best.pt").exists() == (folder / "last.pt").exists() == (step is not None)
        if step is not None:
            assert load_tensors(folder / "last.pt")["step"] == load_tensors(folder / "best.pt")["step"] == step


def test_an_infinite_loss_is_named() -> None:
    student, teacher = network(), network()
    nn.init.constant_(teacher[0].weight, 1e30)
    loss = Hints(pairs=[("0", "0")], teacher_widths={"0": 4}, student_widths={"0": 4})
    with pytest.raises(FloatingPointError, match="became inf at step 1;"):
        train(student, guide=TransferGuide(Teacher(teacher, "0"), Taps(student, "0"), loss), lr=0.0, log_every=1)


def test_a_guides_loss_that_is_not_finite_stops_the_run_too() -> None:
    for chunk_size in (None, 8):
        student, teacher = network(), network()
        nn.init.constant_(teacher[0].weight, float("nan"))
        guide = TransferGuide(Teacher(teacher, "0"), Taps(student, "0"), BirdLoss(pairs=[("0", "0")]))
        with pytest.raises(FloatingPointError, match="became nan at step 1;"):
            train(student, guide=guide, chunk_size=chunk_size)


# Devices and compilers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bird", "hints", "lwf"])
def test_all_that_a_run_needs_moves_to_its_device(method: str) -> None:
    student, pairs = network(), [("0", "0")]
    losses = {
        "bird": BirdLoss(pairs=pairs),
        "hints": Hints(pairs=pairs, teacher_widths={"0": 4}, student_widths={"0": 4}),
        "lwf": LwF(pairs=pairs),
    }
    guide = TransferGuide(Teacher(network(), "0"), Taps(student, "0"), losses[method])
    fit(student, images(), Settings(steps=3, batch_size=16), guide=guide, device="cuda", progress=False)
    parameters = [*student.parameters(), *guide.teacher.model.parameters(), *guide.loss.parameters()]
    assert {parameter.device.type for parameter in parameters} == {"cuda"}


def test_everything_of_a_guide_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves is cast as well: in place of a second device, a second dtype."""
    student, pairs = network(), [("0", "0")]
    loss = Hints(pairs=pairs, teacher_widths={"0": 4}, student_widths={"0": 4})
    guide = TransferGuide(Teacher(network(), "0"), Taps(student, "0"), loss)
    moved: list[nn.Module] = []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: moved.append(self) or to(self, *args, **kwargs))
    train(student, guide=guide, steps=1)
    assert {id(student), id(guide.teacher), id(loss)} <= {id(module) for module in moved}


def test_a_compiled_model_trains_like_any_other() -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        student = network()
        guide = TransferGuide(Teacher(network(), "0"), Taps(student, "0"), BirdLoss(pairs=[("0", "0")]))
        graphs: list[Any] = []
        if compiled:
            student.compile(backend=lambda graph, _inputs, seen=graphs: seen.append(graph) or graph.forward)
        history = train(student, guide=guide, steps=6)
        assert bool(graphs) == compiled
        results.append([*student.parameters(), torch.tensor([row["cka/0/0"] for row in history.train])])
    torch.testing.assert_close(*results)
    torch.compiler.reset()


# Speed


def test_history_tells_the_speed_without_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bird.lab.vision.training.time.perf_counter", lambda: now[0])

    def tick(x: Tensor, index: Tensor, epoch: int) -> Tensor:
        now[0] += 0.25
        return x

    def slow(model: nn.Module) -> float:
        now[0] += 100.0
        return 1.0

    first = train(network(), tmp_path, augment=tick, validate=slow)
    assert (first.seconds, first.steps_per_second) == (5.0, 4.0)
    again = train(network(), tmp_path, resume=True)
    assert again.seconds == 5.0
    assert train(network(), steps=1).seconds == 0.0
    assert train(network(), steps=1).steps_per_second is None
