"""BIRD inside the trainers of transformers and TRL: a mixin adds guidance by a teacher to their own loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..chunks import random_state, set_random_state
from ..structure import ERRORS, LOSSES
from .guidance import Guidance, Guide, Sequences, without_adapters


class BirdMixin:
    r"""As the first base class of a trainer, adds the distance from a teacher's geometry to the trainer's loss.

    ::

        class BirdRewardTrainer(BirdMixin, RewardTrainer):
            pass

        trainer = BirdRewardTrainer(model, ..., guidance=Guidance(teacher, tokenizer))

    The trainer's own loss is unchanged (``alpha=1, beta=0`` trains as without the mixin); CKA uses the features of the
    trainer's own forward pass. Batches must have ``input_ids`` and ``attention_mask``, so packing and padding-free
    batches are refused. With ``Guidance(whole_batch=True)`` CKA compares all rows of an optimizer step:

    - of several processes exactly, under DDP (FSDP2, which Accelerate runs on accelerators only, has not been tried;
      tensor, context and sequence parallelism are refused);
    - of accumulated batches exactly, if the student computes the same rows twice: before the step all its batches run
      forward once more with the same random states, so dropout repeats its masks (not in compiled models, whose
      generators the two runs do not share).

    A batch with fewer rows than the estimator needs, for example the last of an epoch, trains on the task alone.

    Logged with the trainer's own metrics, over all processes: ``cka`` of teacher and student, ``cka_loss`` (1 - CKA),
    ``task_loss`` (the trainer's own loss), and with ``Guidance(truncation=)`` ``teacher_truncated``, the number of
    texts that were cut; in evaluation and prediction the same of that set's batches, with a prefix: ``eval_cka``.
    Another loss than CKA is logged by its name (1 - loss), and as ``<name>_loss``. In training also, where the guidance
    asks for them, ``task_grad`` and ``guide_grad``, means over optimizer steps of the norms of both terms' gradients at
    the student's layer, over all rows of the step, and ``guide_beta``, the beta of the last step.

    The attributes that the mixin adds to a trainer begin with ``bird_`` or ``_bird_``.

    Args:
        guidance: the teacher and its options; all other arguments are the trainer's.

    Raises:
        ValueError: as of `bird.language.guidance.Guide`; a kind of parallelism or of batches that is not supported; in
            training, batches without a mask, and empty or over-long texts.
    """

    def __init__(self, *args: Any, guidance: Guidance, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _require_plain_parallelism(trainer)
        _require_padded_sequences(trainer)
        if type(self).bird_sequences is BirdMixin.bird_sequences and guidance.loss == "cka_difference":
            raise ValueError(f"cka_difference is of preference batches; {type(self).__name__} has one kind of rows")
        if guidance.rows != "both" and type(self).bird_sequences is BirdMixin.bird_sequences:
            raise ValueError(f"rows={guidance.rows!r} is of preference batches; {type(self).__name__} has one kind")
        several = guidance.whole_batch and trainer.args.world_size > 1
        if several and "group" not in LOSSES[guidance.loss]:
            raise ValueError(
                f'loss="{guidance.loss}" compares the rows of one process: give whole_batch=False, then each compares '
                f"its own, or a loss that compares those of all: {[name for name in LOSSES if 'group' in LOSSES[name]]}"
            )
        group = torch.distributed.group.WORLD if several else None
        self.bird_guide = Guide(guidance, trainer.model, trainer.processing_class, group)
        self.bird_guide.teacher.to(trainer.args.device)
        if self.bird_guide.taps.gradients and trainer.args.torch_compile:
            raise ValueError("gradients and share are measured in uncompiled models: set torch_compile to False")
        self._bird_step: _Accumulated | None = None
        self._bird_begun = False
        self._bird_noted: list[tuple[Tensor, Tensor | None]] = []  # (trainer's loss, distance) of each batch
        self._bird_norms: list[Tensor] = []  # of the gradients of each batch of a step
        self._bird_measured: list[Tensor] = []  # the same of whole steps, since the last log
        self._bird_totals: Tensor | None = None  # sums over training steps since the last log

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own ``train``; afterwards no tap remains on the student."""
        self.bird_guide.release()  # ``model_init`` creates another student
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.bird_guide.release()
            self._bird_step = None
            self._bird_begun = False

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next optimizer step, as the trainer collects them; stored if they are accumulated."""
        collected = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        batches = collected[0]
        several = len(batches) > 1 and self.bird_guide.guidance.whole_batch
        self._bird_step = _Accumulated(batches) if several else None
        return collected

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own step; at the end of an optimizer step the metrics are summed over all processes."""
        if not self._bird_begun:
            self._bird_begin()
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self._bird_noted:
            raise RuntimeError(f"{type(self).__name__} trains without compute_loss, where the guidance would come in")
        if self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            totals = self._bird_sums()
            self._bird_totals = totals if self._bird_totals is None else self._bird_totals + totals
            self._bird_move()
        return loss

    def _bird_begin(self) -> None:
        """Before the first step of a run: beta as it begins, or as a checkpoint has it."""
        self._bird_begun, loss, state = True, self.bird_guide.loss, self.state  # type: ignore[attr-defined]
        if loss.course is not None:
            if loss.measures:
                kept = state.stateful_callbacks.get("bird_norms", [0.0, 0.0])
                loss.course.norms = loss.course.factor.new_tensor(kept)
            loss.step(state.global_step, state.max_steps)

    def _bird_move(self) -> None:
        """After the backward passes of an optimizer step: the norms of its gradients, and beta for the next one."""
        trainer: Any = self
        loss, norms, self._bird_norms = self.bird_guide.loss, self._bird_norms, []
        if norms:
            scale = 1.0 if trainer.accelerator.scaler is None else trainer.accelerator.scaler.get_scale()
            squares = trainer.accelerator.reduce(torch.stack(norms).square().sum(0))
            self._bird_measured.append(squares.sqrt() / (trainer.args.world_size * scale))
        if loss.course is not None:
            self._bird_beta = float(loss.current_beta())
            loss.course.noted.extend(self._bird_measured[-1:] if norms else [])
            loss.course.step((trainer.state.global_step + 1) / trainer.state.max_steps, loss.beta)
            if loss.measures:
                trainer.state.stateful_callbacks["bird_norms"] = loss.course.norms.tolist()  # in trainer_state.json

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The trainer's own loop of evaluation and prediction, with the guidance's metrics of this set added."""
        kept, self._bird_noted = self._bird_noted, []
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
            for name, value in self._bird_metrics(self._bird_sums()).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
            return output
        finally:
            self._bird_noted = kept
            if not self.is_in_train:  # type: ignore[attr-defined]
                self.bird_guide.release()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """``alpha`` times the trainer's loss plus ``beta`` times the distance 1 - CKA, 0-d."""
        guide = self.bird_guide
        if not guide.watches:
            guide.watch(self.model)  # type: ignore[attr-defined]
        sequences = self.bird_sequences(inputs)
        step = self._bird_step if model.training else None
        if step is not None:
            if not step.gradients:
                step.settle(*self._bird_first_passes(model, step), guide)
            set_random_state(step.states[step.number])
        guide.taps.listen()
        if not model.training and "KL_input_ids" in inputs:  # KTO's trainer begins with other sequences
            self._bird_pass(model, inputs)
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        task = result[0] if return_outputs else result
        # The trainer divides the loss by the number of accumulated batches, unless it is normalised over the whole
        # step already; then the guidance must be, too.
        batches = getattr(self, "current_gradient_accumulation_steps", 1) if model.training else 1
        later = batches if model.training and not self._bird_is_share(num_items_in_batch) else 1
        rows, loss = guide.student_rows(sequences), guide.loss.alpha * task
        distance, pull = (self._bird_distance(rows, sequences), 0) if step is None else step.next(rows)
        if distance is not None:
            loss = loss + guide.loss.current_beta() * (later * (pull + distance / batches))
        if guide.norms is not None:
            self._bird_norms.append(guide.norms)
        self._bird_noted.append((task.detach() * (batches / later), None if distance is None else distance.detach()))
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the trainer's metrics, and the guidance's since the last log; no communication between processes."""
        if self._bird_totals is not None and logs.keys() & {"loss", "train_loss"}:
            logs.update(self._bird_metrics(self._bird_totals))
            if self._bird_measured:
                means = torch.stack(self._bird_measured).mean(0).tolist()
                logs.update(zip(("task_grad", "guide_grad"), means, strict=True))
            if self.bird_guide.loss.course is not None:
                logs["guide_beta"] = self._bird_beta
            self._bird_totals, self._bird_measured = None, []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def bird_sequences(self, inputs: Mapping[str, Any]) -> Sequences:
        """The sequences of a batch that are rows, with the mask of their completion; override it for other batches.

        Raises:
            ValueError: the batch has no ``input_ids`` or ``attention_mask``.
        """
        if missing := [name for name in ("input_ids", "attention_mask") if name not in inputs]:
            raise ValueError(
                f"a batch has no {' and no '.join(missing)}, only {[*inputs]}: rows are padded sequences with a mask"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels, completion = inputs.get("labels"), inputs.get("completion_mask")
        config = getattr(self.model, "config", None)  # type: ignore[attr-defined]
        of_tokens = isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_floating_point()
        if completion is None and of_tokens and not getattr(config, "is_encoder_decoder", False):
            completion = labels != -100
        return Sequences(ids, mask, completion)

    def _bird_first_passes(self, model: Any, step: _Accumulated) -> tuple[list[Tensor], list[Tensor]]:
        """For every batch of the step: rows ``[N, P]`` of the student and ``[N, Q]`` of the teacher, without graphs."""
        trainer: Any = self
        ours, theirs = [], []
        others = [trainer.args.device] if trainer.args.device.type != "cpu" else []  # the CPU is included anyway
        for batch in step.batches:
            inputs = trainer._prepare_inputs(batch)
            sequences = self.bird_sequences(inputs)
            step.states.append(random_state(others))
            with torch.no_grad():
                self.bird_guide.taps.listen()
                self._bird_pass(model, inputs)
                ours.append(self.bird_guide.student_rows(sequences))
                theirs.append(self.bird_guide.teacher_rows(sequences).to(ours[-1].device))
        return ours, theirs

    def _bird_pass(self, model: Any, inputs: Mapping[str, Any]) -> None:
        """Run the student forward on a batch, for its features only."""
        core = without_adapters(model)
        forward = inspect.signature(type(core).forward).parameters  # a wrapper hides its signature
        known = {name: value for name, value in inputs.items() if name in forward}
        if not getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            known.pop("labels", None)  # not needed for features; an encoder-decoder needs them as the decoder's input
        extra = {"use_cache": False, "logits_to_keep": 1}  # the head's output is not needed
        model(**known, **{name: value for name, value in extra.items() if name in forward})

    def _bird_distance(self, rows: Tensor, sequences: Sequences) -> Tensor | None:
        guide = self.bird_guide
        many = guide.can_compare(len(rows))
        return guide.loss.distance(rows, guide.teacher_rows(sequences).to(rows.device)) if many else None

    def _bird_is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether a batch's loss is normalised over the whole optimizer step: the condition that `Trainer` uses."""
        trainer: Any = self
        if (declared := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
            return bool(declared)
        by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_items or trainer.compute_loss_func is not None

    def _bird_sums(self) -> Tensor:
        """Sums and counts of the noted losses over all processes, each of which must call this; clears the notes."""
        trainer: Any = self
        noted, self._bird_noted = self._bird_noted, []
        zero = torch.zeros((), device=trainer.args.device)
        tasks, distances = [task for task, _ in noted], [distance for _, distance in noted if distance is not None]
        numbers = torch.tensor([len(tasks), len(distances), self.bird_guide.truncated], device=zero.device)
        self.bird_guide.truncated = 0
        return trainer.accelerator.reduce(torch.cat([torch.stack([sum(tasks, zero), sum(distances, zero)]), numbers]))

    def _bird_metrics(self, sums: Tensor) -> dict[str, float]:
        task, distance, tasks, distances, truncated = sums.tolist()
        found = {"task_loss": task / tasks} if tasks else {}
        name = self.bird_guide.guidance.loss
        if distances:
            found |= {} if name in ERRORS else {name: 1 - distance / distances}
            found |= {f"{name}_loss": distance / distances}
        return found if self.bird_guide.guidance.truncation is None else found | {"teacher_truncated": truncated}


class _Accumulated:
    """An optimizer step of several batches: the distance over all their rows, and its gradient for each batch."""

    def __init__(self, batches: list[Mapping[str, Any]]) -> None:
        self.batches = batches
        self.states: list[Mapping[torch.device | None, Tensor]] = []
        self.gradients: list[Tensor] = []
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
        """For the rows of the next batch: the distance, and a zero whose gradient at these rows is the distance's."""
        pull = (rows * self.gradients[self.number]).sum()
        self.number += 1
        return self.distance, pull - pull.detach()


def _require_plain_parallelism(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "DataParallel splits batches behind the trainer's back: start one process per GPU (accelerate launch, "
            "torchrun), or show one GPU (CUDA_VISIBLE_DEVICES)"
        )
    config: Any = getattr(trainer.accelerator, "parallelism_config", None)
    if split := [name for name in ("tp_size", "cp_size", "sp_size") if (getattr(config, name, 1) or 1) > 1]:
        raise ValueError(f"{', '.join(split)}: BIRD compares whole sequences, so processes may split the data alone")


def _require_padded_sequences(trainer: Any) -> None:
    from transformers import DataCollatorWithFlattening

    names = ("packing", "eval_packing", "padding_free")
    if chosen := [n for n in names for it in (trainer.args, trainer.data_collator) if getattr(it, n, None)]:
        raise ValueError(f"{chosen[0]}: BIRD compares whole sequences, padded and with a mask: set it to False")
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    columns = [getattr(rows, "column_names", None) or () for rows in (trainer.train_dataset, *sets.values())]
    flattens = isinstance(trainer.data_collator, DataCollatorWithFlattening)
    if flattens or any("seq_lengths" in names for names in columns):
        packed = "DataCollatorWithFlattening" if flattens else "a data set with the column seq_lengths"
        raise ValueError(f"{packed}: BIRD compares whole sequences, padded and with a mask: give them one in a row")
    if type(trainer)._prepare_inputs.__module__ != "transformers.trainer":
        raise ValueError(
            f"{type(trainer).__name__} makes its batches while it trains, and BIRD needs those of a data set, with "
            "input_ids and attention_mask, as trainers of SFT, DPO, KTO and rewards have them"
        )
