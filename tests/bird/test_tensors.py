"""Files of tensors: whole or as they were, and never code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from bird.lab.tensors import load_tensors, save_tensors


class Cut(Exception):
    """The power goes off."""


def test_a_write_cut_short_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_tensors({"step": 1, "weights": torch.ones(3)}, path)
    whole = torch.save

    def half(state: Any, target: BinaryIO) -> None:
        whole(state, target)
        target.truncate(100)
        raise Cut

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Cut):
        save_tensors({"step": 2, "weights": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert load_tensors(path)["step"] == 1
    save_tensors({"step": 3, "weights": torch.zeros(3)}, path)
    assert load_tensors(path)["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"step": Cut()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt is not a whole checkpoint"):
        load_tensors(tmp_path / "last.pt")
