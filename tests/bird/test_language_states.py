"""What guidance binds to a trainer comes with a run and goes with it: taps, metrics, names; and what is refused."""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import os
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("trl", reason="the trainers are TRL's")
import transformers
import trl
from datasets import Dataset
from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments
from trl import DPOConfig, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig

from bird.language import BirdDPOTrainer, BirdMixin, BirdSFTTrainer, BirdTrainer
from bird_kernels.reference import cka
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, preferences, settings, student, teacher
from tests.groups import run_ranks


def classes(texts: list[str]) -> Dataset:
    return Dataset.from_list([bytes_tokenizer()(text) | {"labels": i % 2} for i, text in enumerate(texts)])


TEXTS = [f"the {letter * (1 + i % 4)} film is{' very' * (i % 3)} good" for i, letter in enumerate("abcdefghijklmnop")]


def network(seed: int = 0, **changes: Any) -> Any:
    return student(seed, LlamaForSequenceClassification, num_labels=2, **changes)


def of_classes(folder: Path, kind: type = BirdTrainer, guide: Any = None, **changes: Any) -> Any:
    """A trainer of a classifier on 16 texts, evaluated on the first 8; `model` or `model_init` may be given."""
    own = {name: changes.pop(name) for name in ("model", "model_init", "callbacks") if name in changes}
    if "model_init" not in own:
        own.setdefault("model", network())
    return kind(
        args=Arguments(**settings(folder, per_device_eval_batch_size=8, **changes)),
        train_dataset=classes(TEXTS),
        eval_dataset=classes(TEXTS[:8]),
        processing_class=bytes_tokenizer(),
        data_collator=DataCollatorWithPadding(bytes_tokenizer()),
        guidance=guide or guidance(),
        **own,
    )


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def last_rows(model: Any, texts: list[str]) -> torch.Tensor:
    """By transformers' own way, one text at a time."""
    rows = [bytes_tokenizer()(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        return torch.cat([model(**row, output_hidden_states=True).hidden_states[-1][:, -1] for row in rows])


def teachers_rows(texts: list[str]) -> torch.Tensor:
    rows = [letters_tokenizer()(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        return torch.cat([teacher().bert(**row).last_hidden_state.mean(1) for row in rows])


# ---------------------------------------------------------------------------------------------- the student


def test_a_student_that_train_makes_is_guided(tmp_path: Path) -> None:
    """``train()`` calls ``model_init`` again, each time: as hyperparameter_search does with its trials."""
    made: list[Any] = []
    base = network(seed=3)

    def make() -> Any:
        made.append(copy.deepcopy(base))
        return made[-1]

    fresh = of_classes(tmp_path, model_init=make)
    given = of_classes(tmp_path, model=network(seed=3))
    given.train()
    for _ in range(2):
        fresh.train()
        assert logged(fresh, "cka") == logged(given, "cka")
        assert fresh.model is made[-1]
        for ours, theirs in zip(fresh.model.parameters(), given.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert len(made) == 3
    assert fresh.evaluate()["eval_cka"] == pytest.approx(given.evaluate()["eval_cka"])


def test_every_student_is_looked_at(tmp_path: Path) -> None:
    depths = iter([2, 3, 1, 2])
    makes: dict[str, Any] = {"model_init": lambda: network(num_hidden_layers=next(depths))}
    trainer = of_classes(tmp_path, max_steps=1, guide=guidance(layer="model.layers.1"), **makes)
    trainer.train()
    with pytest.raises(ValueError, match=r"no layer is called.*'model\.layers\.1'"):
        trainer.train()
    trainer.train()
    assert next(depths, None) is None


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_stays_on_the_student_or_in_memory(accumulated: int, tmp_path: Path) -> None:
    model = network()
    before = hooks(model)
    few = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = of_classes(tmp_path, model=model, **few)
    seen: list[Any] = []
    handle = model.model.register_forward_hook(lambda *each: seen.append(weakref.ref(each[2].last_hidden_state)))
    batches: list[Any] = []
    collect = trainer.data_collator
    trainer.data_collator = lambda rows: (batch := collect(rows), batches.append(weakref.ref(batch["input_ids"])))[0]
    trainer.train()
    trainer.evaluate()
    trainer.predict(classes(TEXTS[:4]))
    handle.remove()
    model(**bytes_tokenizer()("after", return_tensors="pt"))
    gc.collect()
    assert hooks(model) == before
    assert len(seen) >= 6
    assert not any(one() is not None for one in seen), "hidden states are kept"
    assert not any(one() is not None for one in batches), "batches are kept"


def test_a_run_that_fails_lets_go_too(tmp_path: Path) -> None:
    model = network()
    trainer = of_classes(tmp_path, model=model, guide=guidance(tokenizer=letters_tokenizer()))
    trainer.bird_guide.window = 3
    with pytest.raises(ValueError, match="takes 3"):
        trainer.train()
    assert hooks(model) == 0


def test_a_compiled_student_is_evaluated_after_training(tmp_path: Path) -> None:
    """Compiled code does not see hooks that come later, so those of the next run have to be the same."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    fast, plain = of_classes(tmp_path, **compiled), of_classes(tmp_path, max_steps=2)
    for trainer in (fast, plain):
        trainer.train()
    for _ in range(2):
        assert fast.evaluate()["eval_cka"] == pytest.approx(plain.evaluate()["eval_cka"], rel=1e-4)
    fast.train()
    plain.train()
    assert logged(fast, "cka") == pytest.approx(logged(plain, "cka"), rel=1e-4)


# ---------------------------------------------------------------------------------------------- metrics


def test_prediction_has_its_own_metrics_and_leaves_none(tmp_path: Path) -> None:
    trainer = of_classes(tmp_path)
    alone = trainer.evaluate()
    model = trainer.model.eval()
    wanted = cka(last_rows(model, TEXTS[:8]).double(), teachers_rows(TEXTS[:8]).double()).item()
    assert alone["eval_cka"] == pytest.approx(wanted, rel=1e-4)
    other = ["a", "bad film", "so so, but long enough.", "no", "the end"]
    predicted = trainer.predict(classes(other)).metrics
    wanted = cka(last_rows(model, other).double(), teachers_rows(other).double()).item()
    assert predicted["test_cka"] == pytest.approx(wanted, rel=1e-4)
    assert predicted["test_cka_loss"] == pytest.approx(1 - wanted, rel=1e-4)
    assert "test_task_loss" in predicted
    after = trainer.evaluate()
    assert {n: after[n] for n in alone if "cka" in n} == {n: alone[n] for n in alone if "cka" in n}
    sets = trainer.evaluate({"first": classes(TEXTS[:8]), "other": classes(other)})
    assert sets["eval_first_cka"] == alone["eval_cka"]
    assert sets["eval_other_cka"] == predicted["test_cka"]


def test_evaluation_in_a_run_leaves_the_training_metrics_alone(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainer, alone = of_classes(tmp_path, **often), of_classes(tmp_path, logging_steps=1)
    trainer.train()
    alone.train()
    single = logged(alone, "cka")
    assert logged(trainer, "cka") == pytest.approx([sum(single[:2]) / 2, sum(single[2:]) / 2])
    assert len(logged(trainer, "eval_cka")) == 4


def test_cut_texts_are_counted_in_the_log(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.model_max_length = 22
    few = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 2}
    trainer = of_classes(tmp_path, guide=guidance(tokenizer=tokenizer, truncation="left"), **few)
    trainer.train()
    cut = [len(text) > 22 for text in TEXTS]
    assert 0 < sum(cut) < 16
    assert logged(trainer, "teacher_truncated") == [2 * sum(cut)]
    assert trainer.evaluate()["eval_teacher_truncated"] == sum(cut[:8])


class Speaks(TrainerCallback):
    """Logs on the first process alone."""

    trainer: Any = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.log({"mine": 1.0})


def _ranks(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    speaks = Speaks()
    apart = guidance(whole_batch=False)
    trainer = of_classes(folder / "out", callbacks=[speaks], guide=apart, per_device_train_batch_size=4, max_steps=2)
    speaks.trainer = trainer
    trainer.train()
    found = {"cka": logged(trainer, "cka"), "mine": logged(trainer, "mine"), "eval": trainer.evaluate()["eval_cka"]}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_a_callback_may_log_on_one_process(tmp_path: Path) -> None:
    run_ranks(_ranks, 2, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["mine"] == [1.0, 1.0]
    assert second["mine"] == []
    assert first["cka"] == second["cka"]
    assert first["eval"] == second["eval"]
    alone = of_classes(tmp_path / "out", per_device_train_batch_size=8, max_steps=1)
    batch = next(iter(alone.get_train_dataloader()))
    model = alone.model.eval()
    read = [bytes_tokenizer().decode(row, skip_special_tokens=True) for row in batch["input_ids"]]
    parts = [cka(last_rows(model, part).double(), teachers_rows(part).double()) for part in (read[:4], read[4:])]
    assert first["cka"][0] == pytest.approx(torch.stack(parts).mean().item(), rel=1e-3)


# ---------------------------------------------------------------------------------------------- names


def trainers() -> Iterator[type]:
    """Every trainer that the two libraries export."""
    for library in (transformers, trl):
        for name in dir(library):
            if name.endswith("Trainer"):
                found = getattr(library, name)
                assert inspect.isclass(found)
                yield found


def set_on_self(kind: type) -> set[str]:
    """The names that a class's own code gives to ``self``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}


OVERRIDDEN = {"train", "training_step", "get_batch_samples", "evaluation_loop", "compute_loss", "log"}


def test_no_name_of_ours_is_a_trainers() -> None:
    kinds = (BirdMixin, BirdTrainer, BirdSFTTrainer, BirdDPOTrainer)
    ours = {name for kind in kinds for name in {*vars(kind)} | set_on_self(kind) if not name.startswith("__")}
    ours -= {"_tag_names", "_name", "_paper"}
    assert ours >= OVERRIDDEN
    assert all(name.startswith(("bird_", "_bird_")) for name in ours - OVERRIDDEN), sorted(ours - OVERRIDDEN)
    found = list(trainers())
    assert {Trainer, GRPOTrainer, KTOTrainer} <= {*found}
    for kind in found:
        theirs = {*dir(kind)} | {name for base in kind.__mro__[:-1] for name in set_on_self(base)}
        assert not (ours - OVERRIDDEN) & theirs, kind
        for name in OVERRIDDEN:
            assert callable(getattr(kind, name)), (kind, name)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd"},
        {"eval_packing": True},
        {"padding_free": True},
    ],
)
def test_packing_is_refused_at_construction(changes: dict[str, Any], tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    named = next(iter(changes))
    with pytest.raises(ValueError, match=f"{named}: BIRD compares whole sequences.*set it to False"):
        BirdSFTTrainer(
            student(),
            args=SFTConfig(**settings(tmp_path, max_length=None if "padding_free" in changes else 64, **changes)),
            train_dataset=rows,
            processing_class=bytes_tokenizer(),
            guidance=guidance(),
        )
    if "padding_free" in changes:
        arguments = DPOConfig(**settings(tmp_path, **changes))
        with pytest.raises(ValueError, match="padding_free: BIRD"):
            BirdDPOTrainer(
                student(), student(), args=arguments, train_dataset=preferences(), processing_class=bytes_tokenizer(),
                guidance=guidance(),
            )  # fmt: skip


def test_trainers_that_make_their_batches_are_refused_at_construction(tmp_path: Path) -> None:
    class BirdGRPOTrainer(BirdMixin, GRPOTrainer):
        """Its ``_step`` was overwritten."""

    arguments = GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4))
    with pytest.raises(ValueError, match="BirdGRPOTrainer makes its batches while it trains"):
        BirdGRPOTrainer(
            student(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=bytes_tokenizer(), guidance=guidance(),
        )  # fmt: skip


def test_rows_of_another_kind_of_batch_are_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows='chosen' is of preference batches; BirdTrainer has one kind"):
        of_classes(tmp_path, guide=guidance(rows="chosen"))


def test_a_trainer_that_passes_compute_loss_by_is_no_silent_one(tmp_path: Path) -> None:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = model(**self._prepare_inputs(inputs)).loss
            loss.backward()
            return loss.detach()

    class BirdOwn(BirdMixin, Own):
        pass

    with pytest.raises(RuntimeError, match="BirdOwn trains without compute_loss"):
        of_classes(tmp_path, BirdOwn).train()


# ---------------------------------------------------------------------------------------------- another trainer


def test_kto_trainers_are_guided_by_the_responses(tmp_path: Path) -> None:
    """In evaluation its first pass is of other pairs, which count for its KL term and not for geometry."""

    class BirdKTOTrainer(BirdMixin, KTOTrainer):
        pass

    rows = [{"prompt": "the film", "completion": text[8:], "label": i % 2 == 0} for i, text in enumerate(TEXTS)]
    trainer = BirdKTOTrainer(
        student(),
        copy.deepcopy(student()),
        args=KTOConfig(**settings(tmp_path, per_device_eval_batch_size=8, max_steps=2)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=bytes_tokenizer(),
        guidance=guidance(completion_only=True),
    )
    found = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    assert "KL_input_ids" in batch
    ids, mask, only = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    with torch.no_grad():
        states = trainer.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    ours = torch.stack([row[of.nonzero().max()] for row, of in zip(states, mask, strict=True)])
    theirs = []
    for row, of, marks in zip(ids, mask, only, strict=True):
        text, prompt = (bytes_tokenizer().decode(row[m == 1], skip_special_tokens=True) for m in (of, of * (1 - marks)))
        given = letters_tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            theirs.append(teacher().bert(**given).last_hidden_state[0, len(prompt) :].mean(0))
    wanted = cka(ours.double(), torch.stack(theirs).double()).item()
    assert found["eval_cka"] == pytest.approx(wanted, rel=1e-4)
    trainer.train()
    assert len(logged(trainer, "cka")) == 2
