"""Classifiers trained on soft labels by transformers' `Trainer`, alone or with a teacher's geometry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from ...files import write_json
from ...language.trainers import BirdTrainer
from .classifiers import Classifier, padded, tokenize
from .settings import Training
from .training import arguments, claim, forget_checkpoints, quiet, trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...language.guidance import Guidance


def train_classifier(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    targets: Tensor,
    training: Training,
    folder: Path,
    *,
    guidance: Guidance | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    save_every: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train in place on soft labels, by transformers' `Trainer`, or by `BirdTrainer` where something guides.

    The folder gets ``classifier.safetensors`` and, last of all, ``history.json``. Called again, it goes on from its
    last whole checkpoint, and a complete one is only read. It unpickles nothing: weights are safetensors, the trainer's
    state is JSON, and for the states of optimizer, schedule and generators transformers calls ``torch.load`` with
    ``weights_only=True``. (Its checkpoints also hold a ``training_args.bin``, a pickle that nobody reads; they go when
    the run is complete.)

    Args:
        model: is on the device at the end, in eval mode.
        tokenizer: the model's.
        texts: N of them.
        targets: probabilities ``[N, 2]``: a weak model's, or those of `bird.language.weak_to_strong.certain`.
        training: how long and how. Without dropout micro-batches change nothing but rounding.
        folder: of this run alone.
        guidance: adds a teacher's geometry; None to train on the targets alone. The order of the texts and the start of
            the generators are the same with it.
        seed: of the order of the texts, and where PyTorch's, NumPy's and Python's generators (dropout) begin.
        device: ``"cpu"``, or a kind of accelerator, of which the environment chooses which (CUDA_VISIBLE_DEVICES); None
            for the kind that the model is on.
        save_every: steps between checkpoints; None: one for each epoch.
        progress: show a bar.

    Returns:
        Plain data: ``train``, a row for each step (``step``, ``loss``, ``grad_norm``, ``learning_rate``; with guidance
        ``task_loss``, ``cka``, ``cka_loss``), and ``cut``, the numbers of the texts that were longer than
        ``max_length``, of which there is also a warning.

    Raises:
        ValueError: texts and targets that do not fit together; targets that are no probabilities; an empty text; a
            folder of another run; several processes or GPUs; what `bird.language.BirdMixin` refuses.
        FloatingPointError: the loss is no longer finite.
    """
    _require_targets(texts, targets)
    if training.adapters:
        raise ValueError("adapters are for students that are tuned on preferences, not for classifiers")
    rows, cut = tokenize(model, tokenizer, texts, training.max_length)
    claim(folder, [list(texts), targets.tolist()], guidance, training=asdict(training), seed=seed)
    finished = folder / "history.json"
    place = torch.device(device) if device is not None else next(model.parameters()).device
    if finished.exists():
        model.to(place).restore(folder)
        model.eval()
        return json.loads(finished.read_text(encoding="utf-8"))
    examples = [{"ids": ids, "target": target} for ids, target in zip(rows, targets.float().cpu(), strict=True)]
    with quiet(progress):
        more: dict[str, Any] = dict(guidance=guidance, seed=seed, device=place, save_every=save_every)
        trainer = _trainer(model, tokenizer, examples, training, folder, **more)
        history = {"train": trained(trainer, folder, progress), "cut": cut}
    model.eval()
    model.save(folder)
    write_json(history, finished)
    forget_checkpoints(folder)
    return history


class _Order(Sampler[int]):
    """Another order for each epoch, which follows from seed and epoch alone: no generator that dropout draws from."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        yield from torch.randperm(self.count, generator=generator).tolist()


class _Ordered:
    def _get_train_sampler(self, *_: Any) -> _Order:
        trainer: Any = self
        return _Order(len(trainer.train_dataset), trainer.args.seed)


class _Plain(_Ordered, Trainer):
    pass


class _Guided(_Ordered, BirdTrainer):
    pass


def _trainer(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    training: Training,
    folder: Path,
    *,
    guidance: Guidance | None,
    seed: int,
    device: torch.device,
    save_every: int | None,
) -> Trainer:
    args = TrainingArguments(
        **arguments(training, folder, seed, device, save_every),
        optim="adamw_torch",  # without decay it is Adam
        weight_decay=0.0,
        max_grad_norm=0.0,
        remove_unused_columns=False,
    )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError("one process on one GPU: show one only (CUDA_VISIBLE_DEVICES)")
    common: dict[str, Any] = dict(
        model=model, args=args, train_dataset=examples, data_collator=_collate, compute_loss_func=_share_of_loss
    )
    if guidance is None:
        return _Plain(**common)
    return _Guided(**common, processing_class=tokenizer, guidance=guidance)


def _collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return padded([each["ids"] for each in examples]) | {"labels": torch.stack([each["target"] for each in examples])}


def _share_of_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Soft cross-entropy, this batch's share of the mean over the rows of an optimizer step.

    The trainer counts labels, of which a row has one for each class. Means of batches would not do: the last one of an
    epoch may be smaller.
    """
    rows = len(labels) if num_items_in_batch is None else num_items_in_batch / labels.shape[1]
    return F.cross_entropy(outputs.logits, labels.to(outputs.logits.dtype), reduction="sum") / rows


def _require_targets(texts: Sequence[str], targets: Tensor) -> None:
    if targets.shape != (len(texts), 2):
        raise ValueError(f"{len(texts)} texts need targets [{len(texts)}, 2], got {list(targets.shape)}")
    whole = targets.double()
    wrong = ~((whole >= 0).all(1) & ((whole.sum(1) - 1).abs() <= 1e-4))  # NaN is wrong too
    if wrong.any():
        raise ValueError(f"targets {wrong.nonzero().flatten().tolist()[:5]} are no probabilities that sum to one")
