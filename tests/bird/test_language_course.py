"""Losses by name, beta's course and the gradients of both terms in TRL's trainers, against each term alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the trainers are TRL's")
from trl import DPOTrainer

from bird.language import BirdDPOTrainer, BirdSFTTrainer, BirdTrainer
from bird.structure import named_loss
from bird_kernels.reference import cka
from tests.bird.tiny import guidance
from tests.bird.trainers import assert_equal, hidden, last, logged, made, means, ran, read, weights
from tests.groups import run_ranks

PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def batch_of(trainer: Any) -> Any:
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("loss", ["cka_difference", "rsa", "procrustes", "gram_mse"])
def test_a_loss_by_name_is_of_the_pooled_rows(loss: str, tmp_path: Path) -> None:
    trainer, alone = made(BirdDPOTrainer, tmp_path, guidance(loss=loss)), made(DPOTrainer, tmp_path)
    batch = batch_of(trainer)
    total = trainer.compute_loss(trainer.model, dict(batch))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ours, theirs = last(hidden(alone.model, ids, mask), mask).double(), means(read(ids, mask))
    if loss == "cka_difference":
        expected = 1 - cka(ours[:8] - ours[8:], theirs[:8] - theirs[8:])
    else:
        expected = named_loss(loss)(ours, theirs)
    expected = 0.1 * alone.compute_loss(alone.model, dict(batch)) + 0.9 * expected
    torch.testing.assert_close(total.double(), expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["cka_difference", "rsa"])
def test_batches_that_are_accumulated_are_compared_together(loss: str, tmp_path: Path) -> None:
    """Differences are of pairs, which each batch has in its own halves. With the gradients: of the whole step, too."""
    options = {"loss": loss, "share": 0.4}
    whole = ran(BirdDPOTrainer, tmp_path / "whole", guidance(**options))
    parts = ran(BirdDPOTrainer, tmp_path / "parts", guidance(**options), **PARTS)
    assert_equal(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    for name in (loss, f"{loss}_loss", "task_grad", "guide_grad", "guide_beta"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-3, abs=1e-6)
    assert not logged(whole, "cka")


@pytest.mark.parametrize("layer", [None, "model.layers.0"])
def test_the_gradients_of_both_terms_are_those_of_each_alone(layer: str | None, tmp_path: Path) -> None:
    trainer = made(BirdDPOTrainer, tmp_path, guidance(gradients=True, layer=layer))
    plain = ran(BirdDPOTrainer, tmp_path / "plain", guidance(layer=layer))
    batch, model = batch_of(trainer), trainer.model
    outputs: list[Tensor] = []
    module = model.model if layer is None else model.get_submodule(layer)
    handle = module.register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out))
    )
    norms = []
    for alpha, beta in ((1.0, 0.0), (0.0, 1.0)):
        outputs.clear()
        each = made(BirdDPOTrainer, tmp_path, guidance(layer=layer, alpha=alpha, beta=beta), model=model)
        each.ref_model = trainer.ref_model
        model.train()
        total = each.compute_loss(model, dict(batch))
        (gradient,) = torch.autograd.grad(total, outputs[0])
        norms.append(float(gradient.norm()))
        each.bird_guide.release()
    handle.remove()
    trainer.train()
    assert logged(trainer, "task_grad")[0] == pytest.approx(0.1 * norms[0], rel=1e-3)
    assert logged(trainer, "guide_grad")[0] == pytest.approx(0.9 * norms[1], rel=1e-3)
    assert_equal(weights(trainer), weights(plain))
    assert not logged(plain, "task_grad")
    assert not logged(trainer, "guide_beta")


def test_beta_follows_its_schedule(tmp_path: Path) -> None:
    trainer = ran(BirdSFTTrainer, tmp_path, guidance(schedule="cosine", until=0.75), max_steps=4)
    expected = [0.9 * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)] + [0.0]
    assert logged(trainer, "guide_beta") == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for loss, task, distance, beta in zip(
        *(logged(trainer, name) for name in ("loss", "task_loss", "cka_loss", "guide_beta")), strict=True
    ):
        assert loss == pytest.approx(0.1 * task + beta * distance, rel=1e-3)


def test_a_share_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    guide: dict[str, Any] = {"share": 0.3, "schedule": "linear", "alpha": 0.5}
    whole = ran(BirdSFTTrainer, tmp_path / "whole", guidance(**guide), **options)
    state = json.loads((tmp_path / "whole/checkpoint-3/trainer_state.json").read_text())
    assert all(value > 0 for value in state["stateful_callbacks"]["bird_norms"])
    again = made(BirdSFTTrainer, tmp_path / "again", guidance(**guide), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert_equal(weights(again), weights(whole))
    assert logged(again, "guide_beta") == logged(whole, "guide_beta")
    assert len({*logged(whole, "guide_beta")}) == 6
    again.train()  # from the start: nothing of the last run is left
    assert logged(again, "guide_beta")[:1] == logged(whole, "guide_beta")[:1]


def test_what_cannot_be_is_refused_at_the_start(tmp_path: Path) -> None:
    for options, said in (
        ({"loss": "hsic"}, "loss must be one of 'cka'"),
        ({"loss": "rsa", "estimator": "unbiased"}, "takes no estimator='unbiased'"),
        ({"loss": "cka_difference", "rows": "chosen"}, 'a row each: rows="both"'),
        ({"loss": "cka_difference", "pooling": "all", "teacher_pooling": None}, 'a row each: rows="both"'),
        ({"schedule": "steps"}, "schedule must be one of"),
        ({"share": 2.0}, "between 0 and 1, not 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            guidance(**options)
    with pytest.raises(ValueError, match="cka_difference is of preference batches; BirdTrainer has one kind of rows"):
        made(BirdTrainer, tmp_path, guidance(loss="cka_difference"))
    with pytest.raises(ValueError, match="measured in uncompiled models"):
        made(BirdDPOTrainer, tmp_path, guidance(gradients=True), torch_compile=True)


NAMES = ("cka_difference", "task_grad", "guide_grad", "guide_beta")


def _ranks(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    trainer = ran(BirdDPOTrainer, folder / "out", guidance(loss="cka_difference", share=0.4), **parts)
    with pytest.raises(ValueError, match=r'loss="rsa" .* whole_batch=False.*own, or .*cka_difference'):
        made(BirdDPOTrainer, folder / "out", guidance(loss="rsa"), **parts)
    made(BirdDPOTrainer, folder / "out", guidance(loss="rsa", whole_batch=False), **parts)
    torch.save({name: logged(trainer, name) for name in NAMES} | weights(trainer), folder / f"{rank}.pt")


def test_processes_have_the_gradients_and_the_beta_of_one(tmp_path: Path) -> None:
    run_ranks(_ranks, 2, tmp_path, tmp_path)
    one = ran(BirdDPOTrainer, tmp_path, guidance(loss="cka_difference", share=0.4), max_grad_norm=0.0)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    for name in NAMES:
        assert found.pop(name) == pytest.approx(logged(one, name), rel=1e-3)
    assert_equal(found, weights(one), rtol=1e-3, atol=1e-5)
