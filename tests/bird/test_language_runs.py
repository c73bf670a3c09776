"""Runs of language models that are kept on the way: kills, checkpoints, folders of other runs, other versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl", reason="the experiments are run by its trainers")
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from bird import files
from bird.lab import tensors
from bird.lab.language import classifiers, training
from bird.lab.language.classifiers import Classifier, certain, train_classifier
from bird.lab.language.data import Preference
from bird.lab.language.generation import generate
from bird.lab.language.policies import restore, train_policy
from bird.lab.language.recipe import Training
from bird.lab.language.training import MARK, Watch, forget_checkpoints, last_checkpoint, mark_whole
from bird.lab.stages import Lines
from bird.language import Guidance
from tests.bird.tiny import Calls, bytes_tokenizer, causal, guidance, llama, student, words_tokenizer

PAIRS = [Preference(f"film {i} is", " good" + "!" * (i % 3), " bad" + "?" * (i % 2)) for i in range(12)]
TEXTS = [pair.prompt + pair.chosen for pair in PAIRS]
TRAINING = Training(epochs=2, batch_size=4, micro_batch=2, lr=1e-3, max_length=60)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 0) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)


def policy(folder: Path, training: Training = TRAINING, model: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    model = student() if model is None else model
    return model, train_policy(model, bytes_tokenizer(), options.pop("rows", PAIRS), training, folder, **options)


def classifier(folder: Path, training: Training = TRAINING, model: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    model = Classifier(llama(dropout=0.3)) if model is None else model
    texts = options.pop("rows", TEXTS)
    targets = certain([i % 2 for i in range(len(texts))])
    return model, train_classifier(model, bytes_tokenizer(), texts, targets, training, folder, **options)


# ---------------------------------------------------------------------------------------------- what is trained


def test_a_policy_is_what_trls_trainer_makes(tmp_path: Path) -> None:
    model, history = policy(tmp_path / "ours", seed=3)
    arguments = DPOConfig(
        str(tmp_path / "theirs"), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-3, beta=0.1,
        lr_scheduler_type="cosine", max_length=60, seed=3, use_cpu=True, report_to="none", save_strategy="no",
        bf16=False, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows, plain = Dataset.from_list([vars(pair) for pair in PAIRS]), student()
    trainer = DPOTrainer(plain, student(), args=arguments, train_dataset=rows, processing_class=bytes_tokenizer())
    trainer.train()
    assert_equal(weights(model), weights(plain), 2e-6)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in history["train"]] == pytest.approx(losses, rel=1e-4)
    assert len(history["train"]) == 6
    restore(again := student(seed=9), tmp_path / "ours")
    assert_equal(weights(again), weights(model))
    assert not list((tmp_path / "ours").glob("checkpoint-*"))


def test_guidance_of_a_frozen_copy(tmp_path: Path) -> None:
    """A student may be guided by what it was; the copy stays."""
    teacher = student()
    _, history = policy(tmp_path, guidance=Guidance(teacher, bytes_tokenizer(), 1.0, 1.0))
    assert history["train"][0]["cka"] == pytest.approx(1, abs=1e-5)
    assert history["train"][-1]["cka"] < 1
    assert_equal(weights(teacher), weights(student()))


@pytest.mark.parametrize(
    ("run", "adapters", "guided"), [(policy, 0, True), (policy, 4, True), (classifier, 0, False), (classifier, 0, True)]
)
def test_a_killed_run_goes_on(
    run: Any, adapters: int, guided: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second epoch, with dropout, and with half a checkpoint left behind."""

    def train(folder: str) -> tuple[nn.Module, Any]:
        guide = guidance() if guided else None
        return run(tmp_path / folder, replace(TRAINING, adapters=adapters), guidance=guide, seed=1, save_every=2)

    whole, history = train("whole")
    log = Watch.on_log

    def killed(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        log(self, args, state, control, **more)
        if state.global_step == 5:
            raise KeyboardInterrupt

    steps: list[int] = []

    def noted(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        steps.append(state.global_step)
        log(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_log", killed)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    (tmp_path / "parts/checkpoint-5").mkdir()
    monkeypatch.setattr(Watch, "on_log", noted)
    resumed, rows = train("parts")
    assert steps[0] == 5, "it went on, and did not begin again"
    assert_equal(weights(resumed), weights(whole))
    assert run is policy or rows == history
    assert not list((tmp_path / "parts").glob("checkpoint-*"))
    monkeypatch.setattr(classifiers, "_trainer", None)  # a complete run is read, not trained
    again, kept = train("parts")
    assert_equal(weights(again), weights(whole))
    assert kept == rows
    if adapters:
        before = dict(student().named_parameters())
        assert any(not torch.equal(after, before[name]) for name, after in whole.named_parameters()), "merged"


@pytest.mark.parametrize("run", [policy, classifier])
def test_folders_of_other_runs_and_damaged_weights_are_refused(run: Any, tmp_path: Path) -> None:
    rows = (PAIRS if run is policy else TEXTS)[:4]
    run(tmp_path, rows=rows)
    for change, said in (
        ({"seed": 1}, r"of another run \(seed was "),
        ({"guidance": guidance()}, r"of another run \(guidance was "),
        ({"training": replace(TRAINING, epochs=3)}, "of another run"),
        ({"rows": [*rows[:3], (PAIRS if run is policy else TEXTS)[5]]}, "of another run"),
    ):
        with pytest.raises(ValueError, match=said):
            run(tmp_path, **{"rows": rows} | change)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged.*delete its folder"):
        run(tmp_path, rows=rows)


@pytest.mark.parametrize("run", [policy, classifier])
def test_a_loss_that_is_not_finite_stops_the_run(run: Any, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step"):
        run(tmp_path, replace(TRAINING, epochs=4, lr=1e30))
    broken = student()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1; a lower lr may help"):
        policy(tmp_path / "broken", model=broken, rows=PAIRS[:4])


def test_a_run_from_before_a_setting_is_its_own(tmp_path: Path) -> None:
    guide, path = Guidance(nn.Linear(2, 2)), tmp_path / "run.json"
    settings = {"training": asdict(Training()), "seed": 0}
    training.claim(tmp_path, [], guide, **settings)
    old = tensors.read_checked(path, "")
    del old["training"]["adapters"], old["guidance"]["whole_batch"]
    files.write_json(old, path)
    training.claim(tmp_path, [], guide, **settings)
    files.write_json(old, path)
    with pytest.raises(ValueError, match=r"training was .*'adapters': 0.*, is .*'adapters': 4"):
        training.claim(tmp_path, [], guide, **settings | {"training": asdict(Training(adapters=4))})
    with pytest.raises(ValueError, match="guidance was"):
        training.claim(tmp_path, [], replace(guide, whole_batch=False), **settings)


# ---------------------------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    """As the trainer writes one; ``trainer_state.json`` is its last file."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if whole:
        mark_whole(path)
    return path


def test_the_latest_with_a_mark_is_taken_and_none_deleted(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 2)
    ninth = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, whole=False)  # killed before its mark, though all of the trainer's files are there
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert last_checkpoint(tmp_path) == str(ninth)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    (ninth / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint-9 is no longer whole \(model\.safetensors .* 63 bytes\): delete"):
        last_checkpoint(tmp_path)


def test_files_are_on_the_disk_before_the_mark_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, 3, whole=False)
    synced: list[bool] = []
    real = training.os.fsync
    monkeypatch.setattr("os.fsync", lambda file: (synced.append((path / MARK).exists()), real(file))[1])
    mark_whole(path)
    assert synced[:3] == [False] * 3  # two files, and the mark before it has its name
    assert json.loads((path / MARK).read_text())["files"] == {"model.safetensors": 21, "trainer_state.json": 18}


def test_a_read_error_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = checkpoint(tmp_path, 4), Path.read_text

    def failing(self: Path, *arguments: Any, **options: Any) -> str:
        if self.name == MARK:
            raise OSError(5, "Input/output error")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(OSError, match="Input/output error"):
            last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path) == str(path)


def test_other_folders_are_nobodys_to_delete(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    checkpoint(folder, 1)
    (folder / "checkpoint-notes").mkdir()
    (folder / "checkpoint-notes/why.md").write_text("mine")
    (folder / "checkpoint-7").symlink_to(outside)
    (folder / "checkpoint-8").write_text("a file")
    forget_checkpoints(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-7", "checkpoint-8", "checkpoint-notes"]
    assert outside.is_dir()
    assert (folder / "checkpoint-notes/why.md").read_text() == "mine"


def test_older_ones_go_once_the_new_one_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4, whole=False)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4)
    with monkeypatch.context() as patch:
        patch.setattr(training, "mark_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            Watch(False).on_save(arguments, state, None)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    Watch(False).on_save(arguments, state, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "save_total_limit" not in training.arguments(Training(), tmp_path, 0, torch.device("cpu"), 1)


# ---------------------------------------------------------------------------------------------- responses

PROMPTS = ["w1", "w2 w3 w4 w5 w6 w7 w8", "w9 w1", "w10 w11 w12 w13", "w4 w4 w4", "w20 w2 w19 w3 w18"]


@pytest.fixture(scope="module")
def say(device: torch.device) -> Callable[..., list[str]]:
    """Responses of one model; ``monkeypatch`` is not needed to count what it starts on: `Calls`."""
    model, words = causal().to(device), words_tokenizer()

    def responses(
        path: Path | None = None, model: Any = model, prompts: list[str] = PROMPTS, **options: Any
    ) -> list[str]:
        return generate(model, words, prompts, path=path, **{"max_new_tokens": 4, "batch_size": 2} | options)

    responses.model = model  # type: ignore[attr-defined]
    return responses


def test_interrupted_responses_go_on_and_repeat_nothing(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "responses.jsonl"
    truth = say(seed=5)
    with monkeypatch.context() as patch:
        calls = Calls(say.model, patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            say(path, seed=5)
        assert calls.prefills == [2, 2]
    whole = path.read_bytes()
    assert whole.count(b"\n") == 5
    for torn in (b"", b'{"index": 4, "prompt": "', whole.splitlines()[-1]):  # the last one lacks its newline only
        path.write_bytes(whole + torn)
        with monkeypatch.context() as patch:
            calls = Calls(say.model, patch)
            assert say(path, seed=5) == say(path, seed=5, batch_size=6) == truth
            assert calls.prefills == [2], "what was kept is not generated again"
        assert path.read_bytes().startswith(whole)
        assert len(Lines(path).rows) == 7
    rows = Lines(path).rows
    rows[2]["response"] = "kept"  # what is there is taken, not made anew
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert say(path, seed=5) == [truth[0], "kept", *truth[2:]]
    path.write_text('{"respon')  # a torn first line starts over
    assert say(path, seed=5) == say(path, seed=5) == truth
    assert len(Lines(path).rows) == 7


def test_a_file_of_something_else_is_refused_and_stays(say: Any, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    say(path)
    head = path.read_text().splitlines()[0]
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = path.read_bytes()
    for change, said in (
        ({"seed": 1}, r"holds other responses \(seed was 0, is 1\): delete it, or choose another path"),
        ({"max_new_tokens": 5}, "max_new_tokens was 4, is 5"),
        ({"temperature": 0.5, "top_p": 0.9}, r"temperature was 1.0, is 0.5; top_p was 1.0, is 0.9"),
        ({"greedy": True}, "greedy was False, is True; seed was 0, is None; temperature was 1.0, is None"),
        ({"prompts": [*PROMPTS[:-1], "w1 w1"]}, "of prompts was"),
        ({"prompts": PROMPTS[:-1]}, "prompts was 6, is 5"),
        ({"model": causal(1).to(say.model.device)}, "of weights was"),
    ):
        with pytest.raises(ValueError, match=said):
            say(path, **change)
    assert path.read_bytes() == before
    for text, said in (
        ("notes\n", "line 1 is not a JSON object"),
        ("[1]\n", "line 1 is not a JSON object"),
        ('{"a": 1}\n', "does not hold responses"),
        (head + '\n{"index": 6}\n', "it answers a prompt that there is not"),
        (head + '\n{"index": 1, "prompt": "x", "response": ""}\n', "it answers a prompt that there is not"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            say(path)
        assert path.read_text() == text


def test_lines_that_a_full_disk_cut_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError("the disk is full")

    lines = Lines(tmp_path / "lines.jsonl")
    lines.append({"a": "\u2028\n"})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk"):
            lines.append({"b": 2}, {"c": 3})
    lines.append({"d": 4})
    assert Lines(tmp_path / "lines.jsonl").rows == [{"a": "\u2028\n"}, {"d": 4}]
