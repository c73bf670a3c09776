"""Classifiers of texts: a backbone of transformers, its tokens pooled by attention mask, a linear head for two classes.

They are trained on soft labels by transformers' `Trainer`, alone or with guidance by a teacher.

transformers' own classifiers of decoders find the last token by the padding's id. SmolLM2 pads with the id that
also ends a text, and GPT-2 has none, so they would use another token, or raise. These use the attention mask only.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from ...features import evaluating
from ...language.guidance import window_of
from ...language.pooling import Pooling, pool_tokens, require_pooling
from ...language.trainers import BirdTrainer
from .data import padded_batch
from .recipe import Training
from .training import arguments, claim, finish_run, finished_run, quiet, trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...language.guidance import Guidance

WEIGHTS = "classifier.safetensors"  # in a run's folder


class Classifier(nn.Module):
    """A backbone whose tokens are pooled to a row for each text, and a new linear head for two classes in fp32.

    Guidance finds ``backbone`` by itself, as teacher's and as student's layer; its output is the final hidden state.

    Args:
        backbone: what ``AutoModel`` gives, decoder or encoder; it is used itself, not copied.
        pooling: of its tokens: ``"last"`` for decoders, ``"mean"`` or ``"first"`` for encoders, see
            `bird.language.pool_tokens`. With ``"last"`` padding may stand on either side, since positions are counted
            by the mask; encoders count theirs from the first place, so theirs is on the right.
        seed: of the head's weights, normal with deviation 0.02 as in transformers; the bias is zero. PyTorch's global
            generators stay where they are.

    Raises:
        ValueError: a pooling that does not give a row for each text.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, pooling: Pooling = "last", *, seed: int = 0) -> None:
        super().__init__()
        require_pooling("pooling", pooling)
        if pooling == "all":
            raise ValueError('pooling="all" gives a row for each token: a classifier needs one for each text')
        self.backbone, self.pooling = backbone, pooling
        config: Any = backbone.config
        self.config = config
        self.head = nn.utils.skip_init(nn.Linear, config.hidden_size, 2, dtype=torch.float32)
        with torch.no_grad():
            self.head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()
        self.head.to(next(backbone.parameters()).device)
        takes = inspect.signature(backbone.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        self._counts_positions = pooling == "last" and "position_ids" in takes

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits ``[B, 2]`` in fp32, of token ids ``[B, T]`` and a mask ``[B, T]``, 0 for padding."""
        options: dict[str, Any] = dict(self._options)
        if self._counts_positions:
            options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        rows = pool_tokens(hidden, attention_mask, self.pooling)
        with torch.autocast(rows.device.type, enabled=False):
            return SequenceClassifierOutput(logits=self.head(rows.to(self.head.weight.dtype)))


def class_probabilities(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """Probabilities ``[N, 2]`` of the classes, fp32, on the CPU; in eval mode, without gradients.

    Texts of similar length share a batch, and the order of the rows is that of the texts. Batches differ by rounding
    alone.

    Args:
        model: runs where it is, and is left in the mode that it was in.
        tokenizer: the model's.
        texts: one or more; longer ones are cut as in training, see `tokenize`.
        batch_size: texts at a time.
        max_length: see `tokenize`.

    Raises:
        ValueError: as of `tokenize`.
    """
    rows, _ = tokenize(model, tokenizer, texts, max_length)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    result = torch.empty(len(rows), 2)
    with evaluating(model) as device:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = padded_batch([rows[number] for number in part], device=device)
            result[part] = model(**batch).logits.softmax(1).float().cpu()
    return result


def tokenize(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each text, special tokens as the tokenizer adds them, and the numbers of the texts that were cut.

    Args:
        model: whose window it is.
        tokenizer: the model's. It cuts on its ``truncation_side``, the end unless somebody chose otherwise.
        texts: one or more.
        max_length: tokens that are kept of a text, special ones included; None for the model's window.

    Raises:
        ValueError: no texts, an empty one, or a ``max_length`` beyond the window.
    """
    if not texts:
        raise ValueError("there are no texts")
    if empty := [number for number, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"texts {_few(empty)} are empty")
    window = window_of(model, tokenizer)
    if max_length is not None and not 1 <= max_length <= window:
        raise ValueError(f"max_length must be 1 to {window}, the model's window, not {max_length}")
    limit = window if max_length is None else max_length
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    cut = [number for number, row in enumerate(rows) if len(row) > limit]
    if cut:
        warnings.warn(f"texts {_few(cut)} are longer than {limit} tokens and were cut", stacklevel=3)
        short = tokenizer([texts[number] for number in cut], truncation=True, max_length=limit)["input_ids"]
        for number, row in zip(cut, short, strict=True):
            rows[number] = row
    return rows, cut


def certain(labels: Sequence[int]) -> Tensor:
    """True labels, 0 or 1, as targets ``[N, 2]``."""
    return F.one_hot(torch.tensor(labels), 2).float()


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
    device: torch.device | str = "cpu",
    save_every: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train in place on soft labels, by transformers' `Trainer`, or by `BirdTrainer` where something guides.

    `bird.lab.language.training` describes how the folder is used, and how a call resumes an earlier one.

    Args:
        model: trained in place; it is on the device at the end, in eval mode.
        tokenizer: the model's.
        texts: N of them.
        targets: probabilities ``[N, 2]``: a weak model's, or those of `certain`.
        training: steps, learning rate and other options. Without dropout micro-batches change nothing but rounding.
        folder: used by this run only.
        guidance: adds guidance by a teacher; None to train on the targets alone. The order of the texts and the seeds
            of the random generators do not depend on it.
        seed: of the order of the texts, and of PyTorch's, NumPy's and Python's generators (dropout).
        device: ``"cpu"``, or a kind of accelerator, of which the environment chooses which (CUDA_VISIBLE_DEVICES).
        save_every: steps between checkpoints; None: one for each epoch.
        progress: show a bar.

    Returns:
        Plain data: ``train``, a row for each step (``step``, ``loss``, ``grad_norm``, ``learning_rate``; with guidance
        ``task_loss``, ``cka``, ``cka_loss``), and ``cut``, the numbers of the texts that were longer than
        ``max_length``, of which there is also a warning.

    Raises:
        ValueError: texts and targets that do not fit together; targets that are no probabilities; an empty text; a
            folder of another run; several processes or GPUs; what `bird.language.BirdMixin` refuses.
        FloatingPointError: the loss is not finite.
    """
    _require_targets(texts, targets)
    if training.adapters:
        raise ValueError("adapters are for students that are tuned on preferences, not for classifiers")
    rows, cut = tokenize(model, tokenizer, texts, training.max_length)
    claim(folder, [list(texts), targets.tolist()], guidance, training=asdict(training), seed=seed)
    weights = folder / WEIGHTS
    if (done := finished_run(model, weights, device)) is not None:
        return done
    args = arguments(
        TrainingArguments,
        training,
        folder,
        seed=seed,
        device=device,
        save_every=save_every,
        optim="adamw_torch",  # without decay it is Adam
        weight_decay=0.0,
        max_grad_norm=training.max_grad_norm or 0.0,
        remove_unused_columns=False,
    )
    examples = [{"ids": ids, "target": target} for ids, target in zip(rows, targets.float().cpu(), strict=True)]
    more: dict[str, Any] = {} if guidance is None else {"guidance": guidance, "processing_class": tokenizer}
    with quiet(progress):
        trainer = (Trainer if guidance is None else BirdTrainer)(
            model=model,
            args=args,
            train_dataset=examples,
            data_collator=_collate,
            compute_loss_func=_share_of_loss,
            **more,
        )
        trainer._get_train_sampler = lambda *_: _Order(len(examples), seed)  # type: ignore[method-assign]
        history = {"train": trained(trainer, folder, progress), "cut": cut}
    finish_run(model, weights, history)
    return history


class _Order(Sampler[int]):
    """A new order for each epoch, determined by seed and epoch only, without the generators that dropout uses."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        yield from torch.randperm(self.count, generator=generator).tolist()


def _collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return padded_batch([each["ids"] for each in examples]) | {
        "labels": torch.stack([each["target"] for each in examples])
    }


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


def _few(numbers: Sequence[int]) -> str:
    """The first five numbers as text, and how many more there are."""
    return f"{[*numbers[:5]]}{'' if len(numbers) <= 5 else f' and {len(numbers) - 5} more'}"
