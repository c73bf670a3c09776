"""BIRD inside the trainers of transformers and TRL: their own loss, and a teacher's geometry."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..chunks import random_state, set_random_state
from .guidance import Guidance, Guide, Sequences, without_adapters


class BirdMixin:
    r"""Put before a trainer, it adds the geometry of a teacher to the loss of whatever that trainer trains.

    ::

        class BirdRewardTrainer(BirdMixin, RewardTrainer):
            pass

        trainer = BirdRewardTrainer(model, ..., guidance=Guidance(teacher, tokenizer))

    The trainer's own loss is untouched (``alpha=1, beta=0`` trains as without the mixin); CKA is taken from the pass
    that it runs anyway. It needs batches with ``input_ids`` and ``attention_mask``, so neither packing nor padding-free
    batches. With ``Guidance(whole_batch=True)`` CKA is that of all rows of an optimizer step:

    - of several processes exactly, under DDP (FSDP2, which Accelerate runs on accelerators only, has not been tried;
      tensor, context and sequence parallelism are refused);
    - of accumulated batches exactly, where the student computes a row alike both times: the batches run forward once
      more, first, with the same random states, so dropout repeats its masks (not in compiled models, whose generators
      the two runs do not share).

    A batch with fewer rows than the estimator needs, the last of an epoch say, trains on the task alone.

    Logged with the trainer's own metrics: ``cka`` of teacher and student, ``cka_loss`` (1 - CKA), ``task_loss`` (the
    trainer's own loss); ``eval_cka`` and so on in evaluation, batch by batch.

    Args:
        guidance: what guides; all other arguments are the trainer's.

    Raises:
        ValueError: as of `bird.language.guidance.Guide`; a kind of parallelism that does not fit; batches without mask;
            empty or over-long texts.
    """

    def __init__(self, *args: Any, guidance: Guidance, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _require_plain_parallelism(trainer)
        several = guidance.whole_batch and trainer.args.world_size > 1
        group = torch.distributed.group.WORLD if several else None
        self.guide = Guide(guidance, trainer.model, trainer.processing_class, group)
        self.guide.teacher.to(trainer.args.device)
        self._step: _Accumulated | None = None
        self._logged: dict[str, dict[str, list[Tensor]]] = {"": defaultdict(list), "eval_": defaultdict(list)}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step, as the trainer collects them; remembered where they are several."""
        collected = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        batches = collected[0]
        several = len(batches) > 1 and self.guide.guidance.whole_batch
        self._step = _Accumulated(batches) if several else None
        return collected

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``alpha`` times the trainer's loss, and ``beta`` times the distance of the geometries."""
        sequences = self.sequences(inputs)
        step = self._step if model.training else None
        if step is not None:
            if step.gradients is None:
                step.settle(*self._first_passes(model, step), self.guide)
            set_random_state(step.states[step.number])
        self.guide.taps.listen()
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        task = result[0] if return_outputs else result
        # The trainer divides what it gets by the number of accumulated batches, unless the loss is a share of the
        # whole already; then so must the guidance be.
        batches = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        later = batches if model.training and not self._is_share(num_items_in_batch) else 1
        rows = self.guide.student_rows(sequences)
        if step is not None:
            distance, pull = step.next(rows)
            guided = None if distance is None else later * (pull + (distance / batches))
        else:
            distance = self._distance(rows, sequences)
            guided = None if distance is None else distance * later / batches
        loss = self.guide.loss.alpha * task
        if guided is not None and distance is not None:
            loss = loss + self.guide.loss.beta * guided
        self._note("" if model.training else "eval_", task.detach() * (batches / later), distance)
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own metrics, and what was noted since the last time: means, over processes too."""
        trainer: Any = self
        prefix = "" if trainer.model.training else "eval_"
        for name, values in self._logged[prefix].items():
            mean = trainer.accelerator.gather(torch.stack(values).mean()).mean()
            logs[prefix + name] = mean.item()
        self._logged[prefix].clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def sequences(self, inputs: Mapping[str, Any]) -> Sequences:
        """Which sequences of a batch are rows; override it for batches of another kind.

        Raises:
            ValueError: no ids or mask, or a choice of rows that these batches have not.
        """
        if self.guide.guidance.rows != "both":
            raise ValueError(
                f"rows={self.guide.guidance.rows!r} is of preference batches; {type(self).__name__} has one kind"
            )
        ids, mask = ids_and_mask(inputs)
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_floating_point():
            return Sequences(ids, mask, labels != -100)
        return Sequences(ids, mask, None)

    def _first_passes(self, model: Any, step: _Accumulated) -> tuple[list[Tensor], list[Tensor]]:
        """Rows of student and teacher of every batch of the step, without graphs."""
        trainer: Any = self
        ours, theirs = [], []
        forward = inspect.signature(type(without_adapters(model)).forward).parameters  # a wrapper hides its own
        extra = {"use_cache": False, "logits_to_keep": 1}  # the head's output is not needed
        with torch.no_grad():
            for batch in step.batches:
                inputs = {k: v.to(trainer.args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                sequences = self.sequences(inputs)
                step.states.append(random_state(self._devices()))
                self.guide.taps.listen()
                known = {name: value for name, value in inputs.items() if name in forward and name != "labels"}
                model(**known, **{name: value for name, value in extra.items() if name in forward})
                ours.append(self.guide.student_rows(sequences))
                theirs.append(self.guide.teacher_rows(sequences))
        return ours, theirs

    def _devices(self) -> set[torch.device]:
        device = self.args.device  # type: ignore[attr-defined]
        return set() if device.type == "cpu" else {device}

    def _distance(self, rows: Tensor, sequences: Sequences) -> Tensor | None:
        if not self.guide.can_compare(len(rows)):
            return None
        return self.guide.loss.distance(rows, self.guide.teacher_rows(sequences))

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the trainer's loss of a batch is its share of the optimizer step's: what `Trainer` itself asks."""
        trainer: Any = self
        declared: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or trainer.compute_loss_func is not None

    def _note(self, prefix: Literal["", "eval_"], task: Tensor, distance: Tensor | None) -> None:
        noted = self._logged[prefix]
        noted["task_loss"].append(task)
        if distance is not None:
            noted["cka"].append(1 - distance.detach())
            noted["cka_loss"].append(distance.detach())


class _Accumulated:
    """An optimizer step of several batches: the gradient of the distance of all their rows, for each batch's own."""

    def __init__(self, batches: list[Mapping[str, Any]]) -> None:
        self.batches = batches
        self.states: list[Mapping[torch.device | None, Tensor]] = []
        self.gradients: list[Tensor] | None = None
        self.distance: Tensor | None = None
        self.number = 0

    def settle(self, ours: list[Tensor], theirs: list[Tensor], guide: Guide) -> None:
        self.gradients = [torch.zeros_like(rows) for rows in ours]
        x = torch.cat(ours).requires_grad_()
        if guide.can_compare(len(x)):
            with torch.enable_grad():
                distance = guide.loss.distance(x, torch.cat(theirs))
                (gradient,) = torch.autograd.grad(distance, x)
            self.gradients = list(gradient.split([len(rows) for rows in ours]))
            self.distance = distance.detach()

    def next(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """The distance, and a zero whose gradient is the distance's for these rows, which are of the next batch."""
        assert self.gradients is not None
        gradient = self.gradients[self.number]
        self.number += 1
        pull = (rows * gradient).sum()
        return self.distance, pull - pull.detach()


def ids_and_mask(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a padded batch.

    Raises:
        ValueError: it has none.
    """
    missing = [name for name in ("input_ids", "attention_mask") if name not in inputs]
    if missing:
        raise ValueError(
            f"a batch has no {' and no '.join(missing)}, only {list(inputs)}: rows are padded sequences, so packing "
            "and padding_free must be off"
        )
    return inputs["input_ids"], inputs["attention_mask"]


def _require_plain_parallelism(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "DataParallel splits batches behind the trainer's back: start one process per GPU (accelerate launch, "
            "torchrun), or show one GPU (CUDA_VISIBLE_DEVICES)"
        )
    config: Any = getattr(trainer.accelerator, "parallelism_config", None)
    names: Iterable[str] = ("tp_size", "cp_size", "sp_size")
    if split := [name for name in names if config is not None and (getattr(config, name, 1) or 1) > 1]:
        raise ValueError(f"{', '.join(split)}: BIRD compares whole sequences, so processes may split the data alone")
