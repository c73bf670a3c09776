"""BIRD inside the trainers people use, against TRL's and transformers' own and the formula written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the trainers are TRL's")
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from bird.language import BirdDPOTrainer, BirdSFTTrainer, BirdTrainer
from bird_kernels.reference import cka
from tests.bird.tiny import (
    bytes_tokenizer,
    guidance,
    preferences,
    student,
    teacher,
)
from tests.bird.trainers import (
    BirdRewardTrainer,
    assert_equal,
    dpo,
    hidden,
    last,
    logged,
    of_classes,
    sft,
    teachers_means,
    weights,
)
from tests.selection import short

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize(
    ("make", "plain", "guided"),
    [
        (lambda kind, folder: lambda **own: dpo(kind, folder, more=own), DPOTrainer, BirdDPOTrainer),
        (sft, SFTTrainer, BirdSFTTrainer),
        (of_classes, Trainer, BirdTrainer),
        (of_classes, RewardTrainer, BirdRewardTrainer),
    ],
    ids=["dpo", "sft", "classifier", "reward"],
)
def test_without_guidance_it_trains_as_the_trainer_itself(make: Any, plain: type, guided: type, tmp_path: Path) -> None:
    alone, ours = make(plain, tmp_path)(), make(guided, tmp_path)(guidance=guidance(alpha=1.0, beta=0.0))
    alone.train()
    ours.train()
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
    trainer = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance(rows=rows, estimator=estimator)})
    alone = dpo(DPOTrainer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    for each in (trainer, alone):
        each.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()

    model, ids, mask = alone.model, batch["input_ids"], batch["attention_mask"]
    tokenizer = bytes_tokenizer()
    if rows == "prompt":
        mask = mask * (1 - batch["completion_mask"])
    part = {"both": slice(None), "rejected": slice(8, None)}.get(rows, slice(8))
    texts = [tokenizer.decode(i[m == 1], skip_special_tokens=True) for i, m in zip(ids[part], mask[part], strict=True)]
    ours = last(hidden(model, ids[part], batch["attention_mask"][part]), mask[part])
    expected = 0.1 * alone.compute_loss(model, dict(batch))
    expected = expected + 0.9 * (1 - cka(ours.double(), teachers_means(texts).double(), estimator=estimator))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}"
        )


def test_alpha_zero_is_geometry_alone(tmp_path: Path) -> None:
    """The pull on what no row depends on, the head, is none; elsewhere it is there."""
    trainer = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance(alpha=0.0, beta=2.0)})
    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).backward()
    assert trainer.model.lm_head.weight.grad.abs().max() == 0
    assert trainer.model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


@short("the losses are TRL's own: that BIRD leaves one alone says it of all", lambda loss_type: loss_type == "ipo")
@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "apo_zero"])
def test_other_losses_and_kept_references(loss_type: str, tmp_path: Path) -> None:
    changes = {"loss_type": [loss_type], "precompute_ref_log_probs": True}
    ours = dpo(BirdDPOTrainer, tmp_path / "a", more={"guidance": guidance(alpha=1.0, beta=0.0)}, **changes)
    alone = dpo(DPOTrainer, tmp_path / "b", **changes)
    ours.train()
    alone.train()
    assert_equal(weights(ours), weights(alone))


# ---------------------------------------------------------------------------------------------- what models come in


def test_adapters_are_guided_and_their_reference_pass_is_not(tmp_path: Path) -> None:
    """Adapters differ from the base from the first step on: rows must be the policy's."""
    model = get_peft_model(student(), LORA)
    trainer = dpo(BirdDPOTrainer, tmp_path, model=model, more={"guidance": guidance(alpha=0.0)})
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    texts = [bytes_tokenizer().decode(i[m == 1], skip_special_tokens=True) for i, m in zip(ids, mask, strict=True)]
    trainer.model.train()
    policy = trainer.compute_loss(trainer.model, dict(batch))
    policy.backward()
    with torch.no_grad():
        trainer.model.eval()
        wanted = 1 - cka(last(hidden(trainer.model, ids, mask), mask).double(), teachers_means(texts).double())
        evaluated = trainer.compute_loss(trainer.model, dict(batch))
        with trainer.model.disable_adapter():
            other = 1 - cka(last(hidden(trainer.model, ids, mask), mask).double(), teachers_means(texts).double())
    assert policy.item() == pytest.approx(0.9 * wanted.item(), rel=1e-4)
    assert evaluated.item() == pytest.approx(0.9 * wanted.item(), rel=1e-4)
    assert abs(other.item() - wanted.item()) > 1e-3, "the two passes must be told apart"
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and ".default." in name}
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_peft_configuration_in_the_trainer(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    student().save_pretrained(folder)
    base = student().from_pretrained(folder)
    trainer = dpo(BirdDPOTrainer, tmp_path, model=base, more={"guidance": guidance(), "peft_config": LORA})
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


@pytest.mark.parametrize("layer", [None, "model.layers.0"])
def test_checkpointed_activations_change_nothing(layer: str | None, tmp_path: Path) -> None:
    ours = {"guidance": guidance(layer=layer, teacher_layer="bert.encoder.layer.0")}
    plain = dpo(BirdDPOTrainer, tmp_path / "a", more=ours, gradient_checkpointing=False)
    saved = dpo(BirdDPOTrainer, tmp_path / "b", more=ours, gradient_checkpointing=True)
    plain.train()
    saved.train()
    assert_equal(weights(saved), weights(plain), rtol=1e-5, atol=1e-6)


def test_a_layer_inside_a_reentrant_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = dpo(
        BirdDPOTrainer,
        tmp_path,
        more={"guidance": guidance(layer="model.layers.1.mlp")},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer.train()


def test_a_compiled_student_trains_alike(tmp_path: Path) -> None:
    plain = dpo(BirdDPOTrainer, tmp_path / "a", more={"guidance": guidance()})
    fast = dpo(
        BirdDPOTrainer, tmp_path / "b", more={"guidance": guidance()}, torch_compile=True, torch_compile_backend="eager"
    )
    plain.train()
    fast.train()
    assert_equal(weights(fast), weights(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [1, 4])
def test_bf16_features_keep_their_digits(batches: int, tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches, "max_steps": 1}
    trainer = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance()}, bf16=True, **changes)
    exact = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance()}, **changes)
    trainer.train()
    exact.train()
    assert logged(trainer, "cka") == pytest.approx(logged(exact, "cka"), abs=0.02)
    assert logged(trainer, "cka") != logged(exact, "cka"), "it ran in bf16"


# ---------------------------------------------------------------------------------------------- a run


def test_the_teacher_stays_and_saves_nothing(tmp_path: Path) -> None:
    guide = teacher()
    before = copy.deepcopy(guide.state_dict())
    trainer = dpo(
        BirdDPOTrainer, tmp_path, more={"guidance": guidance(teacher=guide)}, save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert_equal(dict(guide.state_dict()), dict(before))
    reloaded = student().from_pretrained(tmp_path / "checkpoint-4")
    assert_equal({n: p.detach() for n, p in reloaded.named_parameters()}, weights(trainer))
    assert not guide.training


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_dropout": False}

    def run(folder: Path, **own: Any) -> Any:
        model = student(attention_dropout=0.3)
        return dpo(BirdDPOTrainer, folder, model=model, more={"guidance": guidance()}, **changes | own)

    whole = run(tmp_path / "whole")
    whole.train()
    run(tmp_path / "parts", save_strategy="steps", save_steps=2).train()
    resumed = run(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts/checkpoint-2"))
    assert_equal(weights(resumed), weights(whole))
    assert logged(resumed, "cka")[2:] == logged(whole, "cka")[2:]


def test_evaluation_logs_its_own_metrics(tmp_path: Path) -> None:
    trainer = dpo(
        BirdDPOTrainer, tmp_path, more={"guidance": guidance(), "eval_dataset": preferences(12)}, eval_strategy="steps",
        eval_steps=2, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert len(logged(trainer, "eval_cka")) == 2
    assert len(logged(trainer, "cka")) == 4
    assert all(0 < value < 1 for value in logged(trainer, "eval_cka"))
    total = [
        0.1 * t + 0.9 * c
        for t, c in zip(logged(trainer, "eval_task_loss"), logged(trainer, "eval_cka_loss"), strict=True)
    ]
    # The trainer weighs its batches by their size, 8 and 4.
    assert logged(trainer, "eval_loss") == pytest.approx(total, rel=0.1)


def test_a_small_last_batch_trains_on_the_task_alone(tmp_path: Path) -> None:
    changes = {"per_device_train_batch_size": 15, "max_steps": 2}
    trainer = dpo(BirdDPOTrainer, tmp_path, more={"guidance": guidance(rows="chosen")}, **changes)
    with pytest.warns(UserWarning, match="1 rows and CKA needs 2"):
        trainer.train()
    assert len(logged(trainer, "cka")) == 1
    assert len(logged(trainer, "task_loss")) == 2
