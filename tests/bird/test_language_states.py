"""What guidance binds to a trainer comes with a run and goes with it: taps, metrics, names; and what is refused."""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="the trainers are TRL's")
import transformers
import trl
from datasets import Dataset
from transformers import DataCollatorWithFlattening, Trainer
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from bird.language import BirdDPOTrainer, BirdMixin, BirdSFTTrainer, BirdTrainer
from bird_kernels.reference import cka
from tests.bird.tiny import bytes_tokenizer, guidance, letters_tokenizer, settings, student
from tests.bird.trainers import (
    TEXTS,
    classes,
    classifier,
    ends,
    hidden,
    last,
    logged,
    made,
    means,
    ran,
    states,
    weights,
)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


# ---------------------------------------------------------------------------------------------- the student


def test_a_student_that_train_makes_is_guided(tmp_path: Path) -> None:
    """``train()`` calls ``model_init`` again, each time: as hyperparameter_search does with its trials."""
    students: list[Any] = []
    base = classifier(seed=3)

    def make() -> Any:
        students.append(copy.deepcopy(base))
        return students[-1]

    fresh = made(BirdTrainer, tmp_path, guidance(), model_init=make)
    given = ran(BirdTrainer, tmp_path, guidance(), model=classifier(seed=3))
    for _ in range(2):
        fresh.train()
        assert logged(fresh, "cka") == logged(given, "cka")
        assert fresh.model is students[-1]
        for ours, theirs in zip(fresh.model.parameters(), given.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert len(students) == 3
    assert fresh.evaluate()["eval_cka"] == pytest.approx(given.evaluate()["eval_cka"])


def test_every_student_is_looked_at(tmp_path: Path) -> None:
    depths = iter([2, 3, 1, 2])
    makes: dict[str, Any] = {"model_init": lambda: classifier(num_hidden_layers=next(depths)), "max_steps": 1}
    trainer = ran(BirdTrainer, tmp_path, guidance(layer="model.layers.1"), **makes)
    with pytest.raises(ValueError, match=r"no layer is called.*'model\.layers\.1'"):
        trainer.train()
    trainer.train()
    assert next(depths, None) is None


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_stays_on_the_student_or_in_memory(accumulated: int, tmp_path: Path) -> None:
    model = classifier()
    before = hooks(model)
    few = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer = made(BirdTrainer, tmp_path, guidance(), model=model, max_steps=4, **few)
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
    trainer = made(BirdTrainer, tmp_path, guidance())
    trainer.bird_guide.window = 3
    with pytest.raises(ValueError, match="takes 3"):
        trainer.train()
    assert hooks(trainer.model) == 0


def test_a_compiled_student_trains_alike_and_is_evaluated_after_training(tmp_path: Path) -> None:
    """Compiled code does not see hooks that come later, so those of the next run have to be the same."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    fast, plain = (
        ran(BirdTrainer, tmp_path, guidance(), model=classifier(num_hidden_layers=1), **changes)
        for changes in (compiled, {})
    )
    for name, ours in weights(fast).items():
        torch.testing.assert_close(ours, weights(plain)[name], rtol=1e-4, atol=1e-5)
    for _ in range(2):
        assert fast.evaluate()["eval_cka"] == pytest.approx(plain.evaluate()["eval_cka"], rel=1e-4)
    fast.train()
    plain.train()
    assert logged(fast, "cka") == pytest.approx(logged(plain, "cka"), rel=1e-4)


# ---------------------------------------------------------------------------------------------- metrics


def test_prediction_has_its_own_metrics_and_leaves_none(tmp_path: Path) -> None:
    trainer = made(BirdTrainer, tmp_path, guidance())
    alone = trainer.evaluate()
    model = trainer.model.eval()
    other = ["a", "bad film", "so so, but long enough.", "no", "the end"]
    predicted = trainer.predict(classes(other)).metrics
    for found, texts in ((alone["eval_cka"], TEXTS[:8]), (predicted["test_cka"], other)):
        assert found == pytest.approx(cka(ends(model, texts), means(texts)).item(), rel=1e-4)
    assert predicted["test_cka_loss"] == pytest.approx(1 - predicted["test_cka"], rel=1e-4)
    assert "test_task_loss" in predicted
    after = trainer.evaluate()
    assert {n: after[n] for n in alone if "cka" in n} == {n: alone[n] for n in alone if "cka" in n}
    sets = trainer.evaluate({"first": classes(TEXTS[:8]), "other": classes(other)})
    assert sets["eval_first_cka"] == alone["eval_cka"]
    assert sets["eval_other_cka"] == predicted["test_cka"]


def test_evaluation_in_a_run_leaves_the_training_metrics_alone(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainer, alone = (ran(BirdTrainer, tmp_path, guidance(), max_steps=4, **changes) for changes in (often, {}))
    single = logged(alone, "cka")
    assert logged(trainer, "cka") == pytest.approx([sum(single[:2]) / 2, sum(single[2:]) / 2])
    assert len(logged(trainer, "eval_cka")) == 4


def test_cut_texts_are_counted_in_the_log(tmp_path: Path) -> None:
    tokenizer = letters_tokenizer()
    tokenizer.model_max_length = 22
    few = {"gradient_accumulation_steps": 2, "logging_steps": 2}
    trainer = ran(BirdTrainer, tmp_path, guidance(tokenizer=tokenizer, truncation="left"), **few)
    cut = [len(text) > 22 for text in TEXTS]
    assert 0 < sum(cut) < 16
    assert logged(trainer, "teacher_truncated") == [2 * sum(cut)]
    assert trainer.evaluate()["eval_teacher_truncated"] == sum(cut[:8])


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
        assert all(callable(getattr(kind, name)) for name in OVERRIDDEN), kind


# ---------------------------------------------------------------------------------------------- what is refused


class BirdGRPOTrainer(BirdMixin, GRPOTrainer):
    """Its ``_step`` was overwritten."""


class Own(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = model(**self._prepare_inputs(inputs)).loss
        loss.backward()
        return loss.detach()


class BirdOwn(BirdMixin, Own):
    pass


PACKED = [{"packing": True, "packing_strategy": "wrapped"}, {"packing": True, "packing_strategy": "bfd"}]
PACKED += [{"eval_packing": True}, {"padding_free": True}]


@pytest.mark.parametrize("changes", PACKED)
def test_packing_is_refused_at_construction(changes: dict[str, Any], tmp_path: Path) -> None:
    said = f"{next(iter(changes))}: BIRD compares whole sequences.*set it to False"
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    length = None if "padding_free" in changes else 64
    with pytest.raises(ValueError, match=said):
        made(BirdSFTTrainer, tmp_path, guidance(), train_dataset=rows, max_length=length, **changes)
    if "padding_free" in changes:
        with pytest.raises(ValueError, match=said):
            made(BirdDPOTrainer, tmp_path, guidance(), **changes)


def packed() -> Dataset:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "seq_lengths": [3, 1]}] * 4
    return Dataset.from_list(rows)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "several"])
def test_data_sets_that_come_packed_are_refused_at_construction(which: str, tmp_path: Path) -> None:
    sets = {"eval_dataset": {"plain": packed().remove_columns("seq_lengths"), "packed": packed()}}
    sets = sets if which == "several" else {which: packed()}
    sets = {"train_dataset": packed().remove_columns("seq_lengths")} | sets
    with pytest.raises(ValueError, match="column seq_lengths: BIRD compares whole sequences"):
        made(BirdSFTTrainer, tmp_path, guidance(), dataset_kwargs={"skip_prepare_dataset": True}, **sets)


def test_a_collator_that_flattens_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DataCollatorWithFlattening: BIRD compares whole sequences"):
        made(BirdTrainer, tmp_path, guidance(), data_collator=DataCollatorWithFlattening())


def test_trainers_that_make_their_batches_are_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BirdGRPOTrainer makes its batches while it trains"):
        BirdGRPOTrainer(
            student(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4)),
            train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=bytes_tokenizer(),
            guidance=guidance(),
        )


def test_other_trainers_and_rows_that_cannot_be_guided(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows='chosen' is of preference batches; BirdTrainer has one kind"):
        made(BirdTrainer, tmp_path, guidance(rows="chosen"))
    with pytest.raises(RuntimeError, match="BirdOwn trains without compute_loss"):
        ran(BirdOwn, tmp_path, guidance())


# ---------------------------------------------------------------------------------------------- another trainer


def test_kto_trainers_are_guided_by_the_responses(tmp_path: Path) -> None:
    """In evaluation its first pass is of other pairs, which count for its KL term and not for geometry."""

    class BirdKTOTrainer(BirdMixin, KTOTrainer):
        pass

    rows = [{"prompt": "the film", "completion": text[8:], "label": i % 2 == 0} for i, text in enumerate(TEXTS)]
    trainer = BirdKTOTrainer(
        student(),
        copy.deepcopy(student()),
        args=KTOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=bytes_tokenizer(),
        guidance=guidance(completion_only=True),
    )
    found = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    assert "KL_input_ids" in batch
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        ours = last(hidden(trainer.model, ids, mask), mask).double()
    whole = [
        bytes_tokenizer().decode(row[of == 1], skip_special_tokens=True) for row, of in zip(ids, mask, strict=True)
    ]
    theirs = torch.stack([states(text)[len("the film") :].mean(0) for text in whole]).double()
    assert found["eval_cka"] == pytest.approx(cka(ours, theirs).item(), rel=1e-4)
    trainer.train()
    assert len(logged(trainer, "cka")) == 2
