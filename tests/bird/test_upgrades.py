"""Files of other versions: a setting that is new has its default in old ones; what is newer is refused in words."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bird import files
from bird.lab import tables, tensors
from bird.lab.stages import Stage
from bird.lab.tensors import load_tensors, save_tensors
from bird.lab.vision.checkpoints import History, Settings
from bird.lab.vision.data import Images
from bird.lab.vision.training import fit

SETTINGS = Settings(steps=6, batch_size=4, save_every=2, log_every=2)
IMAGES = Images(torch.arange(8 * 16, dtype=torch.uint8).reshape(8, 1, 4, 4), torch.arange(8) % 2)


def trained(folder: Path, settings: Settings = SETTINGS, **about: Any) -> tuple[History, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    return fit(model, IMAGES, settings, folder=folder, resume=True, progress=False, about=about), model


def rewritten(path: Path, change: Any) -> None:
    state = load_tensors(path)
    change(state)
    save_tensors(state, path)


def test_a_checkpoint_from_before_a_setting_is_gone_on_with(tmp_path: Path) -> None:
    whole, model = trained(tmp_path, method="bird")

    def of_old(state: dict[str, Any]) -> None:
        del state["format"], state["identity"]["about"], state["identity"]["chunk_size"], state["identity"]["compile"]
        state["identity"]["channels_last"] = True  # was a setting
        state["step"] = 6

    rewritten(tmp_path / "last.pt", of_old)
    again, other = trained(tmp_path, method="bird")
    assert asdict(again) == asdict(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    rewritten(tmp_path / "last.pt", of_old_with_chunks)
    with pytest.raises(ValueError, match=r"another run \(chunk_size was 4, is None\): choose another folder"):
        trained(tmp_path, method="bird")


def of_old_with_chunks(state: dict[str, Any]) -> None:
    state["identity"]["chunk_size"] = 4


def test_a_later_format_and_its_history_are_refused_in_words(tmp_path: Path) -> None:
    trained(tmp_path)
    assert load_tensors(tmp_path / "last.pt")["format"] == tensors.FORMAT
    rewritten(tmp_path / "last.pt", lambda state: state["history"].update(energy=[1.0]))
    with pytest.raises(ValueError, match=r"last\.pt has a history of another version .*, with energy: update"):
        trained(tmp_path)
    rewritten(tmp_path / "last.pt", lambda state: state.update(format=2))
    with pytest.raises(ValueError, match=r"last\.pt has format 2, of a later version .*; this one reads 1"):
        trained(tmp_path)


def test_one_methods_checkpoint_is_refused_in_anothers_folder(tmp_path: Path) -> None:
    trained(tmp_path, method="continued")
    with pytest.raises(ValueError, match=r"about was \{'method': 'continued'\}, is \{'method': 'ceiling'\}"):
        trained(tmp_path, method="ceiling")
    with pytest.raises(ValueError, match="lr was"):
        trained(tmp_path, replace(SETTINGS, lr=0.5), method="continued")


def test_every_phase_of_a_method_says_which_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bird.lab.vision import methods

    said: list[Any] = []
    monkeypatch.setattr(methods, "fit", lambda *_, about, **__: said.append(json.loads(json.dumps(about))) or History())
    network = methods.MODELS["plain"].make(1, 2)
    transfer = methods.Transfer(("plain", "plain"), [("block3", "block3")], SETTINGS, 2, weights={"alpha": 0.5})
    for method in ("lp-ft", "continued"):
        transfer.run(method, network, network, IMAGES)
    shared = {"pairs": [["block3", "block3"]], "weights": {"alpha": 0.5}}
    phases = [("lp-ft", 1), ("lp-ft", 2), ("continued", 1)]
    assert said == [{"method": method, "phase": phase} | shared for method, phase in phases]


def test_a_stage_in_anothers_folder_is_refused(tmp_path: Path) -> None:
    ours, theirs = (Stage("score", {"lr": lr}, lambda folder: {"clean": 1}) for lr in (1, 2))
    ours.folder(tmp_path).mkdir()
    ours._complete(tmp_path)
    assert ours.result(tmp_path) == {"clean": 1}
    ours.folder(tmp_path).rename(theirs.folder(tmp_path))
    for read in (theirs.result, theirs._complete):
        with pytest.raises(ValueError, match=rf"is of score-{ours.key}, copied into this folder: delete the folder"):
            read(tmp_path)


def test_a_stages_result_of_before_versions_is_read(tmp_path: Path) -> None:
    stage = Stage("score", {}, lambda folder: {})
    path = stage.folder(tmp_path) / "result.json"
    path.parent.mkdir()
    files.write_json({"clean": 0.5}, path)
    assert stage.result(tmp_path) == {"clean": 0.5}
    files.write_json({"clean": 0.5, "format": 2}, path)
    with pytest.raises(ValueError, match=r"result\.json has format 2, of a later version"):
        stage.result(tmp_path)


def test_reports_say_their_version(tmp_path: Path) -> None:
    tables.write_report(tmp_path, "page", {"cells": []})
    assert json.loads((tmp_path / "results.json").read_text()) == {"format": 1, "cells": []}


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
