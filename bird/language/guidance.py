"""What guides a language model: a frozen teacher that reads the student's batches as text, and a layer of each."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bird_kernels.moments import MIN_ROWS

from ..features import find_layers, unwrap
from ..losses import BirdLoss
from ..taps import FirstPass
from ..teachers import Teacher
from .pooling import Pooling, pool_tokens, require_pooling, right_padded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedTokenizerBase

    from bird_kernels import RBF

Rows = Literal["both", "chosen", "rejected", "prompt"]


def concatenated(prompt: str, completion: str) -> str:
    """What the teacher reads unless told otherwise: the student's text."""
    return prompt + completion


@dataclass(frozen=True)
class Guidance:
    r"""How a teacher guides a language model in training.

    .. math:: L = \alpha \, L_{task} + \beta \, (1 - \mathrm{CKA}(S, T))

    S and T have a row for each sequence of the batch: a layer's features of the student and of the teacher, pooled over
    the tokens (Pogoncheff and Beyeler, ICLR 2026). What the paper leaves open for language is ours: layers, pooling,
    which rows, and the text that a teacher with a tokenizer of its own is given.

    Args:
        teacher: any network of transformers, an encoder or a decoder with whatever head; it is frozen, and runs no
            further than its guiding layer. `copy.deepcopy` one that you go on training.
        tokenizer: the teacher's, if it is not the student's. It must be a fast one for ``completion_only``.
        alpha: weight of the trainer's own loss.
        beta: weight of the guidance. The published weights of vision, 0.1 and 0.9, are the defaults.
        layer: guided layer, a path in the student as it was before PEFT; None: the backbone's output, which is the
            final hidden state, after the last norm.
        teacher_layer: guiding layer, the same.
        pooling: of the student's tokens, see `bird.language.pool_tokens`. ``"all"`` needs the student's tokenizer on
            both sides.
        teacher_pooling: of the teacher's; None: as the student's. ``"mean"`` suits sentence encoders, ``"first"``
            classifiers of BERT's kind.
        completion_only: pool over the tokens of the completion alone, on both sides.
        rows: of a preference batch, which sequences are rows: ``"both"`` (the default: chosen and rejected, 2 B rows,
            so that the geometry holds what sets them apart), ``"chosen"``, ``"rejected"``, or ``"prompt"`` (its tokens
            alone). Batches of other trainers have ``"both"`` only: all sequences.
        kernel, estimator: as of `bird.cka_loss`. Biased CKA is high for unrelated features of few rows.
        text: makes the teacher's text of prompt and completion, special tokens of the student taken out; for batches
            without a prompt that is ``""``. For ``completion_only`` it must end with the completion.
        whole_batch: CKA compares all rows of an optimizer step: those of all processes, and of all accumulated
            batches, for which the student runs forward once more. False: each batch of each process by itself.

    Raises:
        ValueError: an unknown choice, or weights that are negative or not finite.
    """

    teacher: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    alpha: float = 0.1
    beta: float = 0.9
    layer: str | None = None
    teacher_layer: str | None = None
    pooling: Pooling = "last"
    teacher_pooling: Pooling | None = None
    completion_only: bool = False
    rows: Rows = "both"
    kernel: str | RBF = "linear"
    estimator: str = "biased"
    text: Callable[[str, str], str] = concatenated
    whole_batch: bool = True

    def __post_init__(self) -> None:
        BirdLoss(self.alpha, self.beta, [("teacher", "student")])  # says what is wrong with the weights
        require_pooling("pooling", self.pooling)
        require_pooling("teacher_pooling", self.teacher_pooling or self.pooling)
        for name, choices in (("rows", get_args(Rows)), ("estimator", tuple(MIN_ROWS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        if "all" in (self.pooling, self.teacher_pooling) and (
            self.tokenizer is not None or self.teacher_pooling not in (None, self.pooling)
        ):
            raise ValueError('pooling="all" compares tokens: teacher and student must share it and a tokenizer')
        if self.completion_only and self.rows == "prompt":
            raise ValueError('rows="prompt" leaves no completion to pool: choose it or completion_only')


class Sequences(NamedTuple):
    """The sequences of a batch that are rows: token ids and masks, ``[B, T]``.

    ``completion`` marks the tokens after the prompt; None where that is not known. ``part`` are their places in what
    the student runs on.
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor | None
    part: slice = slice(None)


class Guide:
    """A `Guidance` at work on one student: what trainers call.

    Args:
        guidance: what to do.
        student: the network in training, bare or in PEFT; taps go on it at once.
        tokenizer: the student's.
        group: processes whose rows are compared together.

    Raises:
        ValueError: an unknown layer (the nearest are listed); a teacher of another vocabulary without a tokenizer.
    """

    def __init__(
        self,
        guidance: Guidance,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.guidance, self.tokenizer = guidance, tokenizer
        self.processes = 1 if group is None else group.size()
        core = without_adapters(student)
        self.layer = guidance.layer or backbone(core)
        self.taps = FirstPass(core, [self.layer], pool="none")
        self.network = guide = unwrap(guidance.teacher)
        if guidance.teacher_layer is None and not _has_backbone(guide):
            guide = _Whole(guide)
        self.teacher_layer = guidance.teacher_layer or backbone(guide)
        find_layers(guide, [self.teacher_layer])
        self.teacher = Teacher(guide, [self.teacher_layer], pool="none")
        self.loss = BirdLoss(
            guidance.alpha,
            guidance.beta,
            [(self.teacher_layer, self.layer)],
            kernel=guidance.kernel,
            estimator=guidance.estimator,
            group=group,
        )
        if guidance.tokenizer is None:
            _require_same_vocabulary(core, self.network)
        elif tokenizer is None:
            raise ValueError("the teacher has its own tokenizer, so the student's is needed: give processing_class")

    def student_rows(self, sequences: Sequences) -> Tensor:
        """Rows of the student's first pass since ``taps.listen()``, ``[N, P]``."""
        features = self.taps.pop()[self.layer][sequences.part]
        return pool_tokens(features, self._counted(sequences), self.guidance.pooling)

    def teacher_rows(self, sequences: Sequences) -> Tensor:
        """The teacher's rows of the same sequences, ``[N, Q]``.

        Raises:
            ValueError: a text is empty, or longer than the teacher takes.
        """
        if self.guidance.tokenizer is None:
            mask, ids, counted = right_padded(sequences.mask, sequences.ids, self._counted(sequences))
        else:
            mask, ids, counted = self._read(sequences, self.guidance.tokenizer)
        device = next(self.network.parameters()).device
        takes = inspect.signature(type(self.network).forward).parameters
        options = {"use_cache": False} if "use_cache" in takes else {}
        features = self.teacher(input_ids=ids.to(device), attention_mask=mask.to(device, torch.long), **options)
        pooling = self.guidance.teacher_pooling or self.guidance.pooling
        return pool_tokens(features[self.teacher_layer], counted, pooling)

    def can_compare(self, rows: int) -> bool:
        """Whether the estimator can do with so many rows in every process; warns where it cannot."""
        rows *= self.processes
        needed = MIN_ROWS[self.guidance.estimator]
        if rows < needed:
            warnings.warn(
                f"a step has {rows} rows and CKA needs {needed}: it trains on the task alone "
                "(dataloader_drop_last=True leaves out a small last batch)",
                stacklevel=4,
            )
        return rows >= needed

    def _counted(self, sequences: Sequences) -> Tensor:
        """Which tokens are pooled."""
        only = self.guidance.completion_only
        return sequences.mask * self._after_prompt(sequences) if only else sequences.mask

    def _after_prompt(self, sequences: Sequences) -> Tensor:
        if sequences.completion is None:
            raise ValueError("completion_only: these batches do not say where the completion begins")
        return sequences.completion

    def _read(self, sequences: Sequences, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, ids and what is pooled, of the student's text in the teacher's tokens, padded on the right."""
        only, mask = self.guidance.completion_only, sequences.mask != 0
        known = only or sequences.completion is not None
        completion = mask & (self._after_prompt(sequences) != 0) if known else mask
        prompts, completions = (self._text(sequences.ids, part) for part in (mask & ~completion, completion))
        texts = [self.guidance.text(*both) for both in zip(prompts, completions, strict=True)]
        if empty := [number for number, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"sequences {empty} of the batch have no text for the teacher: an empty text or response")
        read = tokenizer(texts, return_offsets_mapping=only, verbose=False)
        ids: list[list[int]] = read["input_ids"]
        longest, window = max(map(len, ids)), window_of(self.network, tokenizer)
        if longest > window:
            raise ValueError(
                f"a text has {longest} tokens of the teacher's tokenizer, and the teacher takes {window}: shorten what "
                "the student is trained on (max_length), or what the teacher reads of it (text=)"
            )
        ones = [[1] * len(row) for row in ids]
        counted = [*map(_at_the_end, texts, completions, read["offset_mapping"])] if only else ones
        return _table(ones, longest), _table(ids, longest), _table(counted, longest)

    def _text(self, ids: Tensor, chosen: Tensor) -> list[str]:
        assert self.tokenizer is not None
        rows = [row[of].tolist() for row, of in zip(ids.cpu(), chosen.cpu(), strict=True)]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


class _Whole(nn.Module):
    """A bare backbone, whose output has no path of its own, with one."""

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone(*args, **kwargs)


def without_adapters(model: nn.Module) -> nn.Module:
    """The network inside wrappers and PEFT, whose layers have the paths that they had before."""
    model = unwrap(model)
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def backbone(model: nn.Module) -> str:
    """The path of a network's backbone: all but the head; its output is the final hidden state.

    Raises:
        ValueError: it has none that transformers would know.
    """
    if not _has_backbone(model):
        raise ValueError(f"{type(model).__name__} does not say which of its layers is the backbone: name the layer")
    return model.base_model_prefix  # type: ignore[return-value]


def _has_backbone(model: nn.Module) -> bool:
    return getattr(model, "base_model_prefix", "") in dict(model.named_children())


def _require_same_vocabulary(student: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"the student has {ours} token ids and the teacher {theirs}: give the teacher's own tokenizer, tokenizer="
        )


def window_of(teacher: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the teacher takes."""
    positions: Any = getattr(getattr(teacher, "config", None), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _at_the_end(text: str, end: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which tokens of a text, by where each begins and stops, reach into its end."""
    if not text.endswith(end):
        raise ValueError(f"completion_only: text= must end with the completion, {text!r} does not")
    start = len(text) - len(end)
    return [int(stop > start and stop > begin) for begin, stop in offsets]


def _table(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device="cpu")
