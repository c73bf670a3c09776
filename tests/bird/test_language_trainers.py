"""BIRD inside the trainers people use, against TRL's and transformers' own and the formula written out."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("trl", reason="the trainers are TRL's")
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from bird.language import BirdDPOTrainer, BirdMixin, BirdSFTTrainer, BirdTrainer, mixin
from bird_kernels.reference import cka
from tests.bird.tiny import guidance, preferences, student, teacher
from tests.bird.trainers import (
    TEXTS,
    BirdRewardTrainer,
    assert_equal,
    ends,
    hidden,
    last,
    logged,
    made,
    means,
    ran,
    read,
    weights,
)  # fmt: skip
from tests.groups import run_ranks
from tests.selection import short

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    ("plain", "guided", "changes"),
    [
        (DPOTrainer, BirdDPOTrainer, {}),
        (DPOTrainer, BirdDPOTrainer, {"loss_type": ["ipo"], "precompute_ref_log_probs": True}),
        (SFTTrainer, BirdSFTTrainer, {}),
        (Trainer, BirdTrainer, {}),
        (RewardTrainer, BirdRewardTrainer, {}),
    ],
    ids=["dpo", "ipo", "sft", "classifier", "reward"],
)
def test_without_guidance_it_trains_as_the_trainer_itself(
    plain: type, guided: type, changes: Any, tmp_path: Path
) -> None:
    alone = ran(plain, tmp_path / "alone", **changes)
    ours = ran(guided, tmp_path / "ours", guidance(alpha=1.0, beta=0.0), **changes)
    assert_equal(weights(ours), weights(alone))
    assert logged(ours, "loss") == logged(alone, "loss") == pytest.approx(logged(ours, "task_loss"))
    assert all(0 < value < 1 for value in logged(ours, "cka"))
    assert logged(ours, "cka_loss") == pytest.approx([1 - value for value in logged(ours, "cka")])


@short(
    "every choice of rows, and the other estimator once",
    lambda rows, estimator: estimator == "biased" or rows == "both",
)
@pytest.mark.parametrize("rows", ["both", "chosen", "rejected", "prompt"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_value_and_gradient_are_the_formulas(rows: str, estimator: str, tmp_path: Path) -> None:
    trainer = made(BirdDPOTrainer, tmp_path, guidance(rows=rows, estimator=estimator))
    alone = made(DPOTrainer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for each in (trainer, alone):
        each.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    model, ids, mask = alone.model, batch["input_ids"], batch["attention_mask"]
    if rows == "prompt":
        mask = mask * (1 - batch["completion_mask"])
    part = {"both": slice(None), "rejected": slice(8, None)}.get(rows, slice(8))
    ours = last(hidden(model, ids[part], batch["attention_mask"][part]), mask[part])
    expected = 0.1 * alone.compute_loss(model, dict(batch))
    expected = expected + 0.9 * (1 - cka(ours.double(), means(read(ids[part], mask[part])), estimator=estimator))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        theirs = model.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


def test_alpha_zero_is_geometry_alone(tmp_path: Path) -> None:
    """The pull on what no row depends on, the head, is none; elsewhere it is there."""
    trainer = made(BirdDPOTrainer, tmp_path, guidance(alpha=0.0, beta=2.0))
    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
    assert trainer.model.lm_head.weight.grad.abs().max() == 0
    assert trainer.model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------- what models come in


def test_adapters_are_guided_and_their_reference_pass_is_not(tmp_path: Path) -> None:
    """Adapters differ from the base from the first step on: rows must be the policy's."""
    trainer = made(BirdDPOTrainer, tmp_path, guidance(alpha=0.0), model=get_peft_model(student(), LORA))
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.train()
    policy = trainer.compute_loss(model, dict(batch))
    policy.backward()
    with torch.no_grad():
        model.eval()
        wanted = 1 - cka(last(hidden(model, ids, mask), mask).double(), means(read(ids, mask)))
        evaluated = trainer.compute_loss(model, dict(batch))
        with model.disable_adapter():
            other = 1 - cka(last(hidden(model, ids, mask), mask).double(), means(read(ids, mask)))
    assert policy.item() == pytest.approx(0.9 * wanted.item(), rel=1e-4)
    assert evaluated.item() == pytest.approx(0.9 * wanted.item(), rel=1e-4)
    assert abs(other.item() - wanted.item()) > 1e-3, "the two passes must be told apart"
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad and ".default." in name]
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_peft_configuration_in_the_trainer(tmp_path: Path) -> None:
    student().save_pretrained(tmp_path / "base")
    base = student().from_pretrained(tmp_path / "base")
    trainer = made(BirdDPOTrainer, tmp_path, guidance(), model=base, peft_config=LORA)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


@pytest.mark.parametrize("layer", [None, "model.layers.0"])
def test_checkpointed_activations_change_nothing(layer: str | None, tmp_path: Path) -> None:
    guide = guidance(layer=layer, teacher_layer="bert.encoder.layer.0")
    plain, saved = (ran(BirdDPOTrainer, tmp_path, guide, gradient_checkpointing=on) for on in (False, True))
    assert_equal(weights(saved), weights(plain), rtol=1e-5, atol=1e-6)


def test_a_layer_inside_a_reentrant_checkpoint_is_refused(tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        ran(BirdDPOTrainer, tmp_path, guidance(layer="model.layers.1.mlp"), **reentrant)


@pytest.mark.parametrize("batches", [1, 4])
def test_bf16_features_keep_their_digits(batches: int, tmp_path: Path) -> None:
    parts = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches, "max_steps": 1}
    half, exact = (logged(ran(BirdDPOTrainer, tmp_path, guidance(), bf16=on, **parts), "cka") for on in (True, False))
    assert half == pytest.approx(exact, abs=0.02)
    assert half != exact, "it ran in bf16"


# ---------------------------------------------------------------------------------------------- a run


def test_a_run_leaves_the_teacher_alone_and_is_resumed(tmp_path: Path) -> None:
    changes: Any = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_dropout": False}
    changes |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    guide = teacher()
    before = copy.deepcopy(guide.state_dict())
    whole = ran(BirdDPOTrainer, tmp_path, guidance(teacher=guide), model=student(attention_dropout=0.3), **changes)
    assert_equal(dict(guide.state_dict()), dict(before))
    assert not guide.training
    reloaded = student().from_pretrained(tmp_path / "checkpoint-4")
    assert_equal({n: p.detach() for n, p in reloaded.named_parameters()}, weights(whole))
    resumed = made(BirdDPOTrainer, tmp_path, guidance(), model=student(attention_dropout=0.3), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed), weights(whole))
    assert logged(resumed, "cka")[2:] == logged(whole, "cka")[2:]


def test_evaluation_logs_its_own_metrics(tmp_path: Path) -> None:
    often = {"eval_dataset": preferences(12), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = ran(BirdDPOTrainer, tmp_path, guidance(), **often)
    assert len(logged(trainer, "cka")) == 4
    assert len(logged(trainer, "eval_cka")) == 2
    assert all(0 < value < 1 for value in logged(trainer, "eval_cka"))
    terms = zip(logged(trainer, "eval_task_loss"), logged(trainer, "eval_cka_loss"), strict=True)
    # The trainer weighs its batches by their size, 8 and 4.
    assert logged(trainer, "eval_loss") == pytest.approx([0.1 * t + 0.9 * c for t, c in terms], rel=0.1)


def test_a_small_last_batch_trains_on_the_task_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 rows and CKA needs 2"):
        trainer = ran(BirdDPOTrainer, tmp_path, guidance(rows="chosen"), per_device_train_batch_size=15)
    assert (len(logged(trainer, "cka")), len(logged(trainer, "task_loss"))) == (1, 2)


# ---------------------------------------------------------------------------------------------- accumulated batches


@pytest.mark.parametrize("kind", [BirdSFTTrainer, BirdTrainer, BirdDPOTrainer])
def test_accumulation_changes_nothing(kind: type, tmp_path: Path) -> None:
    """8 rows at once or 2 by 2, the trainer's loss divided by it or scaled by the number of tokens already."""
    # transformers' own classifiers do not scale their loss by the number of batches, with BIRD or without.
    task = kind is not BirdTrainer
    whole, parts = (
        ran(kind, tmp_path, guidance(alpha=0.1 if task else 0.0), max_grad_norm=0.0, **changes)
        for changes in ({}, PARTS)
    )
    assert_equal(weights(parts), weights(whole), rtol=1e-4, atol=2e-5)
    for name in ("loss", "cka", *(["task_loss"] if task else [])):
        # Tokens are not spread evenly over batches, so the mean of their means is not SFT's loss.
        tolerance = 0.05 if kind is BirdSFTTrainer and name == "task_loss" else 1e-4
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=tolerance), name
    if kind is BirdDPOTrainer:
        apart = ran(kind, tmp_path, guidance(whole_batch=False), **PARTS)
        assert logged(apart, "cka")[0] > logged(whole, "cka")[0] + 0.02, "fewer rows, more bias"


@pytest.mark.parametrize("kind", [BirdSFTTrainer, BirdDPOTrainer])
def test_batches_by_themselves_count_alike(kind: type, tmp_path: Path) -> None:
    """Their distances' mean is trained, whether the trainer divides by their number afterwards (DPO) or not (SFT)."""
    changes: Any = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 1, "optim": "sgd"}
    changes |= {"per_device_train_batch_size": 4, "learning_rate": 0.1}
    trainer = made(kind, tmp_path, guidance(alpha=0.0, whole_batch=False), **changes)
    before = weights(trainer)
    batches = [dict(batch) for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    trainer.model.train()
    distances = []
    for batch in batches:
        trainer.bird_guide.taps.listen()
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        sequences = trainer.bird_sequences(batch)
        distances.append(trainer._bird_distance(trainer.bird_guide.student_rows(sequences), sequences))
    mean = 0.9 * sum(distances) / 2
    gradients = torch.autograd.grad(mean, [*trainer.model.parameters()], allow_unused=True)
    trainer.train()
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        moved = old if gradient is None else old - 0.1 * gradient
        torch.testing.assert_close(trainer.model.get_parameter(name), moved, rtol=1e-4, atol=1e-6, msg=name)


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
    kind: Any = SimpleNamespace(
        loss_is_scaled_for_ga=declared, model_accepts_loss_kwargs=accepts, compute_loss_func=function
    )
    assert BirdMixin._bird_is_share(kind, items) is share


def test_dropout_repeats_its_masks_in_accumulated_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for dropout in (0.5, 0.0):
        model = student(attention_dropout=dropout)
        ran(BirdDPOTrainer, tmp_path, guidance(), model=model, disable_dropout=False, **PARTS)
    assert len(seen) == 2 * 8
    for first, second in seen:
        torch.testing.assert_close(first, second)
    assert not torch.allclose(seen[0][0], seen[8][0]), "there is dropout"


# ---------------------------------------------------------------------------------------------- processes


class Speaks(TrainerCallback):
    """Logs on the first process alone."""

    trainer: Any = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.log({"mine": 1.0})


def _ranks(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    together = ran(BirdDPOTrainer, folder / "out", guidance(), **parts)
    assert together.args.world_size == 2
    speaks, apart = Speaks(), guidance(whole_batch=False)
    few = {"callbacks": [speaks], "per_device_train_batch_size": 4}
    speaks.trainer = made(BirdTrainer, folder / "out", apart, **few)
    speaks.trainer.train()
    found: dict[str, Any] = {"weights": weights(together), "together": logged(together, "cka")}
    found |= {name: logged(speaks.trainer, name) for name in ("cka", "mine")}
    torch.save(found | {"eval": speaks.trainer.evaluate()["eval_cka"]}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_ranks, 2, folder, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_processes_change_nothing(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    whole = ran(BirdDPOTrainer, tmp_path, guidance(), max_grad_norm=0.0)
    assert_equal(ranks[0]["weights"], weights(whole), rtol=1e-4, atol=2e-5)
    assert ranks[0]["together"] == pytest.approx(logged(whole, "cka"), rel=1e-4)


def test_a_callback_may_log_on_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    assert [found["mine"] for found in ranks] == [[1.0, 1.0], []]
    assert ranks[0]["cka"] == ranks[1]["cka"]
    assert ranks[0]["eval"] == ranks[1]["eval"]
    alone = made(BirdTrainer, tmp_path, guidance())
    batch, model = next(iter(alone.get_train_dataloader())), alone.model.eval()
    texts = read(batch["input_ids"], batch["attention_mask"])
    assert {*texts} < {*TEXTS}
    parts = [cka(ends(model, part), means(part)) for part in (texts[:4], texts[4:])]
    assert ranks[0]["cka"][0] == pytest.approx(torch.stack(parts).mean().item(), rel=1e-3)
