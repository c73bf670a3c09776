"""What may happen to a long run: kills, full disks, damaged files, other versions, wrong labels, losses not finite."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from bird import Hints
from bird.files import atomic
from bird.lab import tensors
from bird.lab.tensors import load_tensors, save_tensors
from bird.lab.vision import methods
from bird.lab.vision.checkpoints import History, Settings
from tests.bird.loops import Cut, Run, guided, images, network, same, train

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Kills and disks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks, to import PyTorch once")
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    outcome = json.loads(run(str(ROOT / "tests/bird/killed_training.py"), tmp_path))
    assert outcome.pop("code") == 0
    steps = outcome.pop("steps")
    assert steps == sorted(steps), "no kill loses what was there before it"
    assert 12 < steps[-1] < 120, "the run was killed, and taken up, in its midst"
    assert outcome.pop("partial") == [0, 1, 1, 0] * 3, "what a kill leaves: in a step, torn, written, placed"
    files = ["best.pt", "last.pt", "shapes.json"]
    assert outcome == {"weights": True, "best": True, "history": True, "end": 120, "files": files}


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
    error, left = run(str(script), tmp_path).splitlines()
    assert "best.pt could not be written, as happens when the disk is full" in error
    assert left == "['best.pt']"


@pytest.mark.parametrize("where", ["write", "fsync", "tensors"])
def test_a_write_that_fails_removes_what_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path, failure, whole = tmp_path / "last.pt", OSError(28, "No space left on device"), torch.save
    save_tensors({"step": 1, "weights": torch.ones(3)}, path)

    def refuse(*_: Any) -> None:
        raise failure

    def half(state: Any, target: BinaryIO) -> None:
        whole(state, target)
        target.truncate(100)
        raise Cut

    def write() -> None:
        if where == "tensors":
            save_tensors({"step": 2, "weights": torch.zeros(3)}, path)
        with atomic(path) as partial:
            partial.write_text("half")
            if where == "write":
                refuse()

    with monkeypatch.context() as patch:
        if where == "fsync":
            patch.setattr(os, "fsync", refuse)
        patch.setattr(torch, "save", half)
        with pytest.raises((OSError, Cut)) as caught:
            write()
    assert caught.value is failure or where == "tensors"
    assert load_tensors(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_what_a_killed_write_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    for name in (".partial.0a1b2c3d.best.pt", ".partial.4e5f6a7b.last.pt", "notes.txt"):
        (tmp_path / name).write_text("half")
    train(folder=tmp_path, steps=1, resume=True)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("events")} == {"last.pt", "notes.txt"}


# Damaged files


class Code:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "it ran")


def saved(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def load_weights(whole: bytes) -> bytes:
    """The bytes of the last layer's weights, as they stand in the file."""
    weights = torch.load(io.BytesIO(whole), weights_only=True)["modules"]["model.5.weight"].numpy().tobytes()
    assert whole.count(weights) == 1
    return weights


DAMAGES: dict[str, Callable[[bytes, Path], bytes]] = {
    "truncated": lambda whole, _: whole[: len(whole) // 2],
    "empty": lambda whole, _: b"",
    "garbage": lambda whole, _: b"\x93NUMPY or whatever it is" * 50,
    "pickle": lambda whole, target: pickle.dumps(Code(target)),
    "old pickle": lambda whole, target: pickle.dumps({"step": Code(target)}, protocol=2),
    "code in a whole file": lambda whole, target: saved({"step": Code(target)}),
    "flipped weights": lambda whole, _: whole.replace(weights := load_weights(whole), bytes(255 - b for b in weights)),
    "flipped": lambda whole, _: whole[:200] + bytes(255 - b for b in whole[200:400]) + whole[400:],
    "a part": lambda whole, _: saved({"step": 6}),
    "a list": lambda whole, _: saved([1, 2]),
    "a tensor": lambda whole, _: saved(torch.ones(3)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    train(folder=folder, steps=6)
    return (folder / "last.pt").read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_runs_nothing(tmp_path: Path, damage: str, checkpoint: bytes) -> None:
    path, target = tmp_path / "last.pt", tmp_path / "written"
    path.write_bytes(DAMAGES[damage](checkpoint, target))
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint .*: delete it to start over, or choose"):
        train(folder=tmp_path, steps=6, resume=True)
    assert not target.exists()
    if "pickle" in damage:  # the trap is armed
        pickle.loads(path.read_bytes())
        assert target.read_text() == "it ran"


@pytest.mark.smoke
def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "last.pt")


# Other runs and other versions

ABOUT = {"steps": 6, "resume": True, "about": {"method": "continued"}}


def of_old(state: dict[str, Any]) -> None:
    """From before there were these settings."""
    del state["format"], state["seconds"]
    state["identity"]["channels_last"] = True  # was one
    for name in ("about", "chunk_size", "compile", "trained"):
        del state["identity"][name]


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda state: None, {}, None),
        (of_old, {}, None),
        (
            lambda state: state["identity"].update(chunk_size=4),
            {},
            r"another run \(chunk_size was 4, is None\): choose",
        ),
        (
            lambda state: state["history"].update(energy=[1.0]),
            {},
            r"history of another version .*, with energy: update",
        ),
        (lambda state: state.update(format=2), {}, r"last\.pt has format 2, of a later version .*; this one reads 1"),
        (
            lambda state: None,
            {"about": {"method": "bird"}},
            r"about was \{'method': 'continued'\}, is \{'method': 'bird'\}",
        ),
        (lambda state: None, {"lr": 0.5}, "lr was"),
        (lambda state: None, {"trained": ["5"]}, r"trained was None, is \['5'\]"),
        (
            lambda state: None,
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 3))},
            "from another model: choose another",
        ),
    ],
)
def test_checkpoints_of_other_runs_and_versions(change: Any, options: Any, said: str | None, tmp_path: Path) -> None:
    """A setting that is new has its default in old files; what is newer or of another run is refused in words."""
    whole = train(folder=tmp_path, **ABOUT)
    state = load_tensors(tmp_path / "last.pt")
    assert state["format"] == tensors.FORMAT
    change(state)
    save_tensors(state, tmp_path / "last.pt")

    def again() -> Run:
        return train(folder=tmp_path, **ABOUT | options)

    if said is not None:
        with pytest.raises(ValueError, match=said):
            again()
        return
    resumed = again()
    assert same(resumed.model, whole.model)
    assert resumed.history.train == whole.history.train


def test_every_phase_of_a_method_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(methods, "fit", lambda *_, about, **__: said.append(json.loads(json.dumps(about))) or History())
    network = methods.MODELS["plain"].make(1, 2)
    pairs, weights = [("block3", "block3")], {"alpha": 0.5}
    transfer = methods.Transfer(("plain", "plain"), pairs, Settings(steps=6), 2, weights=weights)
    for method in ("lp-ft", "continued"):
        transfer.run(method, network, network, images())
    phases = [("lp-ft", 1), ("lp-ft", 2), ("continued", 1)]
    shared = {"pairs": [["block3", "block3"]], "weights": weights}
    assert said == [{"method": method, "phase": phase} | shared for method, phase in phases]


# Losses that are not finite


def at_step(number: int, value: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Images are multiplied by ``value`` in one step, counted from 1."""
    count = iter(range(1, 1000))
    return lambda x, index, epoch: x * value if next(count) == number else x


@pytest.mark.parametrize(("bad", "value"), [(7, "nan"), (8, "inf"), (11, "inf"), (12, "nan")])
def test_the_first_bad_step_is_named_and_the_last_good_state_kept(tmp_path: Path, bad: int, value: str) -> None:
    scored: list[int] = []
    said = rf"became (nan|inf) at step {bad}; .*last\.pt is as it was after step 6"
    with pytest.raises(FloatingPointError, match=said):
        train(folder=tmp_path, augment=at_step(bad, float(value)), validate=lambda model: scored.append(1) or 1.0)
    kept = load_tensors(tmp_path / "last.pt")
    assert kept["step"] == 6
    assert all(tensor.isfinite().all() for tensor in kept["modules"].values())
    assert len(scored) == 1
    good, again = (train(folder=folder, resume=True, validate=lambda model: 1.0) for folder in (None, tmp_path))
    assert same(again.model, good.model)  # on healthy data it goes on


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


@pytest.mark.parametrize(
    ("bad", "step", "message"),
    [
        (6, None, r"the weights became NaN or infinite by step 6; a lower lr may help$"),
        (12, 6, r"the weights became NaN or infinite by step 12; .*last\.pt is as it was after step 6"),
        (9, 6, r"the loss became nan at step 10; .* after step 6"),  # the weights after 9
    ],
)
def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, bad: int, step: int | None, message: str) -> None:
    """At step 6, where a checkpoint is due, the loss is finite, and its gradient is not."""
    _BadGradient.count, _BadGradient.bad = 0, bad
    with pytest.raises(FloatingPointError, match=message):
        train(model=nn.Sequential(*network(), Fragile()), folder=tmp_path, validate=lambda model: 1.0)
    kept = [tmp_path / name for name in ("best.pt", "last.pt")]
    assert [load_tensors(path)["step"] if path.exists() else None for path in kept] == [step] * 2


@pytest.mark.parametrize(
    ("method", "weight", "options"),
    [
        ("hints", 1e30, {"lr": 0.0, "log_every": 1}),
        ("bird", float("nan"), {}),
        ("bird", float("nan"), {"chunk_size": 8}),
    ],
)
def test_a_guides_loss_that_is_not_finite_stops_the_run_too(
    method: str, weight: float, options: dict[str, Any]
) -> None:
    teacher, student = network(), network()
    nn.init.constant_(teacher[0].weight, weight)
    with pytest.raises(FloatingPointError, match=r"became (inf|nan) at step 1; a lower lr may help$"):
        train(model=student, guide=guided(method, student, teacher), **options)


# Devices, compilers, speed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bird", "hints", "lwf"])
def test_all_that_a_run_needs_moves_to_its_device(method: str) -> None:
    run = train(method, steps=3, device="cuda")
    assert run.guide is not None
    parameters = [*run.model.parameters(), *run.guide.teacher.model.parameters(), *run.guide.loss.parameters()]
    assert {parameter.device.type for parameter in parameters} == {"cuda"}


def test_everything_of_a_guide_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Module] = []
    to = nn.Module.to
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: moved.append(self) or to(self, *args, **kwargs))
    run = train("hints", steps=1)
    assert isinstance(run.guide.loss, Hints)  # type: ignore[union-attr]
    assert {id(run.model), id(run.guide.teacher), id(run.guide.loss)} <= {*map(id, moved)}  # type: ignore[union-attr]


def test_a_compiled_model_trains_like_any_other() -> None:
    graphs: list[Any] = []
    student = network(dropout=0.0)
    torch.compiler.reset()
    student.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled, plain = (train("bird", model=model, steps=6) for model in (student, network(dropout=0.0)))
    assert graphs
    torch.testing.assert_close([*compiled.model.parameters()], [*plain.model.parameters()])
    for ours, theirs in zip(compiled.history.train, plain.history.train, strict=True):
        assert ours["cka/0/0"] == pytest.approx(theirs["cka/0/0"])
    torch.compiler.reset()


def test_history_tells_the_speed_without_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bird.lab.vision.training.time.perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    first = train(
        folder=tmp_path, augment=lambda x, *_: (x, wait(0.25))[0], validate=lambda model: (1.0, wait(100.0))[0]
    ).history
    assert (first.seconds, first.steps_per_second) == (5.0, 4.0)
    assert train(folder=tmp_path, resume=True).history.seconds == 5.0
    one = train(steps=1).history
    assert (one.seconds, one.steps_per_second) == (0.0, None)
