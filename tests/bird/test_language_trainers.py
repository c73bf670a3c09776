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
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from bird.language import BirdDPOTrainer, BirdMixin, BirdSFTTrainer, BirdTrainer
from bird_kernels.reference import cka
from tests.bird.tiny import (
    bytes_tokenizer,
    guidance,
    letters_tokenizer,
    preferences,
    settings,
    student,
    teacher,
)
from tests.groups import run_ranks

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


class BirdRewardTrainer(BirdMixin, RewardTrainer):
    """Any trainer takes the mixin."""


def dpo(kind: type, folder: Path, model: Any = None, more: Any = None, **changes: Any) -> Any:
    model = student() if model is None else model
    reference = None if getattr(model, "peft_config", None) or "peft_config" in (more or {}) else copy.deepcopy(model)
    arguments = DPOConfig(**settings(folder, **changes))
    return kind(
        model, reference, args=arguments, train_dataset=preferences(), processing_class=bytes_tokenizer(), **more or {}
    )


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance or {"rtol": 0, "atol": 0}, msg=name)


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def hidden(model: Any, ids: Tensor, mask: Tensor, layer: int = -1) -> Tensor:
    """Hidden states by transformers' own way."""
    return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def last(features: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[of.nonzero().max()] for row, of in zip(features, mask, strict=True)])


def teachers_means(texts: list[str], model: Any = None) -> Tensor:
    """One text at a time, so no padding: the mean of the last hidden states."""
    model, tokenizer = model or teacher(), letters_tokenizer()
    rows = [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        return torch.cat([hidden(model, row["input_ids"], row["attention_mask"])[0].mean(0)[None] for row in rows])


def texts_of(rows: Any) -> list[str]:
    return [row["prompt"] + row[kind] for kind in ("chosen", "rejected") for row in rows]


# ---------------------------------------------------------------------------------------------- the loss


def of_classes(kind: type, folder: Path, **changes: Any) -> Any:
    tokenizer = bytes_tokenizer()
    rows = [tokenizer(text) | {"labels": i % 2} for i, text in enumerate(texts_of(preferences()))]
    if kind in (BirdTrainer, Trainer):
        data, arguments = Dataset.from_list(rows), TrainingArguments(**settings(folder, **changes))
        more = {"data_collator": DataCollatorWithPadding(tokenizer)}
    else:
        data, arguments, more = preferences(), RewardConfig(**settings(folder, **changes)), {}
    labels = 2 if kind in (BirdTrainer, Trainer) else 1
    model = student(kind=LlamaForSequenceClassification, num_labels=labels)
    return lambda **own: kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more, **own)


def sft(kind: type, folder: Path, **changes: Any) -> Any:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()]
    arguments = SFTConfig(**settings(folder, **changes))
    return lambda **own: kind(
        student(), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=bytes_tokenizer(), **own
    )


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


# ---------------------------------------------------------------------------------------------- whole batches


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
