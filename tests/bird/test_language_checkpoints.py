"""Checkpoints of transformers' trainers: whole with a mark written last, and nobody else's folder is deleted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("transformers", reason="an extra: pip install bird-kernels[language]")

from transformers import TrainingArguments

from bird import files
from bird.lab import tensors
from bird.lab.language import training
from bird.lab.language.training import MARK, Watch, forget_checkpoints, last_checkpoint, mark_whole


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


def test_files_are_on_the_disk_before_the_mark_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, 3, whole=False)
    synced: list[bool] = []
    real = training.os.fsync

    def watched(descriptor: int) -> None:
        synced.append((path / MARK).exists())
        real(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    mark_whole(path)
    assert synced[:3] == [False] * 3  # two files, and the mark before it has its name
    assert json.loads((path / MARK).read_text())["files"] == {"model.safetensors": 21, "trainer_state.json": 18}


def test_a_read_error_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, 4)
    real = Path.read_text

    def failing(self: Path, *arguments: Any, **options: Any) -> str:
        if self.name == MARK:
            raise OSError(5, "Input/output error")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", failing)
        with pytest.raises(OSError, match="Input/output error"):
            last_checkpoint(tmp_path)
    assert last_checkpoint(tmp_path) == str(path)


def test_one_that_lost_a_file_is_refused_by_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    (path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint-4 is no longer whole \(model\.safetensors .* 28 bytes\): delete"):
        last_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", "null", "3", '{"files": 3}', '{"files": {}}', '{"files": null}', '{"x": 1}'])
def test_a_mark_that_lists_no_files_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    (path / MARK).write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-4/whole\.json is damaged .*: delete the folder .*checkpoint-4"):
        last_checkpoint(tmp_path)


def test_other_folders_are_nobodys_to_delete(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "run"
    checkpoint(folder, 1)
    (folder / "checkpoint-notes").mkdir()
    (folder / "checkpoint-notes/why.md").write_text("mine")
    (folder / "checkpoint-7").symlink_to(outside)
    (folder / "checkpoint-8").write_text("a file")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9/mine.txt").write_text("mine")
    forget_checkpoints(folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-{name}" for name in (7, 8, 9, "notes")]
    assert (folder / "checkpoint-9/mine.txt").read_text() == "mine"
    assert outside.is_dir()
    assert (folder / "checkpoint-notes/why.md").read_text() == "mine"


def test_older_ones_go_once_the_new_one_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4, whole=False)
    arguments, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=4)
    with monkeypatch.context() as patch:
        patch.setattr(training, "mark_whole", _dies)
        with pytest.raises(KeyboardInterrupt):
            Watch(False).on_save(arguments, state, None)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    Watch(False).on_save(arguments, state, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    arguments = training.arguments(TrainingArguments, training.Training(), tmp_path, seed=0, device="cpu", save_every=1)
    assert arguments.save_total_limit is None


@pytest.mark.parametrize("kind", ["TrainingArguments", "DPOConfig"])
@pytest.mark.parametrize("what", ["n_gpu", "world_size"])
def test_several_gpus_or_processes_are_refused(
    kind: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would spread a batch over them, and an optimizer step would be of another size."""
    module: Any = pytest.importorskip("trl") if kind == "DPOConfig" else pytest.importorskip("transformers")
    options: dict[str, Any] = {"seed": 0, "device": "cpu", "save_every": 1}
    training.arguments(getattr(module, kind), training.Training(), tmp_path, **options)
    monkeypatch.setattr(TrainingArguments, what, property(lambda self: 2))
    with pytest.raises(ValueError, match=r"one process and one GPU: show it one only \(CUDA_VISIBLE_DEVICES\)"):
        training.arguments(getattr(module, kind), training.Training(), tmp_path, **options)


def test_a_language_run_from_before_a_setting_is_its_own(tmp_path: Path) -> None:
    runs: Any = pytest.importorskip("bird.lab.language.training", reason="an extra: bird-kernels[language]")
    from bird.language import Guidance

    guidance = Guidance(nn.Linear(2, 2))
    settings = {"training": asdict(runs.Training()), "seed": 0}
    runs.claim(tmp_path, [], guidance, **settings)
    path = tmp_path / "run.json"
    old = tensors.read_checked(path, "")
    del old["training"]["adapters"], old["guidance"]["whole_batch"]
    files.write_json(old, path)
    runs.claim(tmp_path, [], guidance, **settings)
    changed = settings | {"training": asdict(runs.Training(adapters=4))}
    files.write_json(old, path)
    with pytest.raises(ValueError, match=r"training was .*'adapters': 0.*, is .*'adapters': 4"):
        runs.claim(tmp_path, [], guidance, **changed)
    with pytest.raises(ValueError, match="guidance was"):
        runs.claim(tmp_path, [], replace(guidance, whole_batch=False), **settings)


def _dies(path: Path) -> None:
    raise KeyboardInterrupt
