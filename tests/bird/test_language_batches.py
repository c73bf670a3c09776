"""BIRD over whole batches: accumulated, of several processes, of any size, with dropout that repeats."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("trl", reason="the trainers are TRL's")

from bird.language import BirdDPOTrainer, BirdMixin, BirdSFTTrainer, BirdTrainer
from tests.bird.tiny import (
    guidance,
    student,
)
from tests.bird.trainers import assert_equal, dpo, logged, of_classes, sft, weights
from tests.groups import run_ranks


@pytest.mark.parametrize(("make", "kind"), [(sft, BirdSFTTrainer), (of_classes, BirdTrainer), (None, BirdDPOTrainer)])
def test_accumulation_changes_nothing(make: Any, kind: type, tmp_path: Path) -> None:
    """8 rows at once or 2 by 2, the trainer's loss divided by it or scaled by the number of tokens already."""

    def run(batch: int, steps: int) -> Any:
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
        if make is None:
            trainer = dpo(kind, tmp_path, more={"guidance": guidance()}, **changes)
        else:
            # transformers' own classifiers do not scale their loss by the number of batches, with BIRD or without.
            trainer = make(kind, tmp_path, **changes)(guidance=guidance(alpha=0.0 if make is of_classes else 0.1))
        trainer.train()
        return trainer

    whole, parts = run(8, 1), run(2, 4)
    assert_equal(weights(parts), weights(whole), rtol=1e-4, atol=2e-5)
    for name in ("loss", "cka", *(["task_loss"] if make is not of_classes else [])):
        # Tokens are not spread evenly over batches, so the mean of their means is not SFT's loss.
        tolerance = 0.05 if make is sft and name == "task_loss" else 1e-4
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=tolerance), name


def test_batches_by_themselves_are_another_objective(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance()}, **changes)
    apart = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance(whole_batch=False)}, **changes)
    whole.train()
    apart.train()
    assert logged(apart, "cka")[0] > logged(whole, "cka")[0] + 0.02, "fewer rows, more bias"


@pytest.mark.parametrize("kind", [BirdSFTTrainer, BirdDPOTrainer])
def test_batches_by_themselves_count_alike(kind: type, tmp_path: Path) -> None:
    """Their distances' mean is trained, whether the trainer divides by their number afterwards (DPO) or not (SFT)."""
    changes = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 1, "optim": "sgd"}
    changes |= {"per_device_train_batch_size": 4, "learning_rate": 0.1}
    apart = guidance(alpha=0.0, whole_batch=False)
    make = sft(kind, tmp_path, **changes) if kind is BirdSFTTrainer else None
    trainer = make(guidance=apart) if make else dpo(kind, tmp_path, more={"guidance": apart}, **changes)
    before = weights(trainer)
    batches = [dict(batch) for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    trainer.model.train()
    distances = [trainer._bird_distance(*_rows(trainer, batch)) for batch in batches]
    mean = 0.9 * sum(distances) / 2
    gradients = torch.autograd.grad(mean, [*trainer.model.parameters()], allow_unused=True)
    trainer.train()
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        moved = old if gradient is None else old - 0.1 * gradient
        torch.testing.assert_close(trainer.model.get_parameter(name), moved, rtol=1e-4, atol=1e-6, msg=name)


def _rows(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
    trainer.bird_guide.taps.listen()
    trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    sequences = trainer.bird_sequences(batch)
    return trainer.bird_guide.student_rows(sequences), sequences


@pytest.mark.parametrize(
    ("declared", "accepts", "items", "function", "share"),
    [
        (None, True, 8, None, True),
        (None, True, None, None, False),
        (None, False, 8, None, False),
        (None, False, None, print, True),
        (False, True, 8, None, False),
        (True, False, None, None, True),
    ],
)
def test_whose_loss_is_a_share(declared: Any, accepts: bool, items: Any, function: Any, share: bool) -> None:
    """As transformers' `Trainer.training_step` asks before it divides."""
    kind = SimpleNamespace(
        loss_is_scaled_for_ga=declared, model_accepts_loss_kwargs=accepts, compute_loss_func=function
    )
    assert BirdMixin._bird_is_share(kind, items) is share  # type: ignore[arg-type]


def test_dropout_repeats_its_masks_in_accumulated_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bird.language import mixin

    seen: list[tuple[Tensor, Tensor]] = []
    settle, follow = mixin._Accumulated.settle, mixin._Accumulated.next

    def kept(self: Any, ours: list[Tensor], theirs: list[Tensor], guide: Any) -> None:
        self.first = ours
        settle(self, ours, theirs, guide)

    def compared(self: Any, rows: Tensor) -> Any:
        seen.append((self.first[self.number], rows.detach()))
        return follow(self, rows)

    monkeypatch.setattr(mixin._Accumulated, "settle", kept)
    monkeypatch.setattr(mixin._Accumulated, "next", compared)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "disable_dropout": False}
    trainer = dpo(
        BirdDPOTrainer, tmp_path, model=student(attention_dropout=0.5), more={"guidance": guidance()}, **changes
    )
    trainer.train()
    assert len(seen) == 16
    for first, second in seen:
        torch.testing.assert_close(first, second)
    still = dpo(BirdDPOTrainer, tmp_path, model=student(), more={"guidance": guidance()}, **changes)
    still.train()
    assert not torch.allclose(seen[0][0], seen[16][0]), "there is dropout"


def _ranks(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer = dpo(BirdDPOTrainer, folder / "out", more={"guidance": guidance()}, **changes)
    assert trainer.args.world_size == 2
    trainer.train()
    if rank == 0:
        torch.save({"weights": weights(trainer), "cka": logged(trainer, "cka")}, folder / "found.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_processes_change_nothing(tmp_path: Path) -> None:
    run_ranks(_ranks, 2, tmp_path, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    whole = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance()}, max_grad_norm=0.0)
    whole.train()
    assert_equal(found["weights"], weights(whole), rtol=1e-4, atol=2e-5)
    assert found["cka"] == pytest.approx(logged(whole, "cka"), rel=1e-4)
