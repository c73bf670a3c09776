"""Guidance of a language model: a frozen teacher reads the student's batches, and a layer of each is compared."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bird_kernels.inputs import require_choice
from bird_kernels.moments import MIN_ROWS

from ..features import find_layers, unwrap
from ..losses import BirdLoss
from ..structure import differences
from ..taps import FirstPass
from ..teachers import Teacher
from .pooling import Pooling, pool_tokens, require_pooling

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedTokenizerBase

    from bird_kernels import RBF

Rows = Literal["both", "chosen", "rejected", "prompt"]


def concatenated(prompt: str, completion: str) -> str:
    """The default of ``Guidance.text``: the teacher reads the student's text."""
    return prompt + completion


@dataclass(frozen=True)
class Guidance:
    r"""How a frozen teacher guides a language model in training.

    .. math:: L = \alpha \, L_{task} + \beta \, (1 - \mathrm{CKA}(S, T))

    S and T have a row for each sequence of the batch: a layer's features of the student and of the teacher, pooled over
    the tokens (Pogoncheff and Beyeler, ICLR 2026). From weak to strong the paper compares the last token's final hidden
    states, as the defaults do; for preferences it specifies no layer, pooling or rows, and these choices are ours.

    Args:
        teacher: any network of transformers, an encoder or a decoder with any head; it is frozen and stops after its
            guiding layer. To go on training a network, give a `copy.deepcopy` of it.
        tokenizer: the teacher's; None: the one of its ``name_or_path``. If it has the student's vocabulary and ``text``
            is not given, the teacher reads the student's token ids; otherwise it reads the decoded text, and
            ``completion_only`` then needs a fast tokenizer.
        alpha: weight of the trainer's own loss.
        beta: weight of the guidance. The defaults, 0.1 and 0.9, are those published for vision.
        layer: the student's layer, a path as before PEFT wrapped it; None: the backbone's output, that is the final
            hidden state, after the last norm. In an encoder-decoder network it must be in the encoder.
        teacher_layer: the teacher's guiding layer, in the same way.
        pooling: of the student's tokens, see `bird.language.pool_tokens`. ``"all"`` needs a teacher with the student's
            vocabulary.
        teacher_pooling: of the teacher's tokens; None: as ``pooling``. ``"mean"`` suits sentence encoders, ``"first"``
            classifiers such as BERT.
        completion_only: whether only the tokens of the completion are pooled, for both networks.
        rows: which sequences of a preference batch are rows: ``"both"`` (chosen and rejected, 2 B rows, so that their
            differences are compared, too), ``"chosen"``, ``"rejected"``, or ``"prompt"`` (only the tokens of the
            prompt). Batches of other trainers support ``"both"`` only: all sequences.
        kernel, estimator: as of `bird.cka_loss`. Biased CKA is high for unrelated features of few rows.
        loss: in place of 1 - CKA, a name in `bird.structure`; ``"cka_difference"`` needs ``rows="both"``.
        schedule, until, share: how beta moves, as of `bird.BirdLoss`; kept in the trainer's checkpoints.
        gradients: log the norms of the gradients of both terms at the student's layer; implied by ``share``.
        text: makes the teacher's text from prompt and completion. These are the sequence's decoded text, without the
            student's special tokens, before and from the first token of the completion (with later turns of a
            conversation). In batches that do not mark a completion the prompt is ``""``. For
            ``completion_only`` the result must end with the completion, or be the end of it.
        truncation: the side on which texts too long for the teacher are cut: ``"left"`` drops the beginning,
            ``"right"`` the end; ``teacher_truncated`` in the log counts them. None: such a text is an error.
        whole_batch: whether CKA compares all rows of an optimizer step, those of all processes and of all accumulated
            batches (for which the student runs forward once more). False: each batch of each process by itself.
        permuted: a control that asks whether it is the teacher at all: its rows of each batch are permuted at random,
            none staying in its place, so they keep their geometry, but belong to other sequences than the student's.

    Raises:
        ValueError: an unknown choice, a combination that is excluded, or weights that are negative or not finite.
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
    loss: str = "cka"
    schedule: str = "constant"
    until: float = 1.0
    share: float | None = None
    gradients: bool = False
    text: Callable[[str, str], str] = concatenated
    truncation: Literal["left", "right"] | None = None
    whole_batch: bool = True
    permuted: bool = False

    def __post_init__(self) -> None:
        self.bird_loss([("teacher", "student")])  # validates its options
        require_pooling("pooling", self.pooling)
        require_pooling("teacher_pooling", self.teacher_pooling or self.pooling)
        known = {"rows": get_args(Rows), "estimator": tuple(MIN_ROWS), "truncation": ("left", "right", None)}
        require_choice(known, rows=self.rows, estimator=self.estimator, truncation=self.truncation)
        if "all" in (self.pooling, self.teacher_pooling) and (
            self.truncation is not None or self.teacher_pooling not in (None, self.pooling)
        ):
            raise ValueError('pooling="all" compares tokens: teacher and student must share it, and read all of a text')
        if self.completion_only and self.rows == "prompt":
            raise ValueError('rows="prompt" leaves no completion to pool: choose it or completion_only')
        if self.loss == "cka_difference" and (self.rows != "both" or self.pooling == "all"):
            raise ValueError('loss="cka_difference" is of chosen and rejected responses, a row each: rows="both"')

    def bird_loss(self, pairs: Sequence[tuple[str, str]], group: ProcessGroup | None = None) -> BirdLoss:
        """The loss of these options between the layers of ``pairs``."""
        names = ("kernel", "estimator", "loss", "schedule", "until", "share")
        return BirdLoss(self.alpha, self.beta, pairs, group=group, **{name: getattr(self, name) for name in names})


class Sequences(NamedTuple):
    """The sequences of a batch that are rows: token ids and masks, ``[B, T]``.

    ``completion`` marks the tokens of the student's answer, at any position; None if that is not known. ``part``
    selects these sequences from the batch that the student runs on.
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor | None
    part: slice = slice(None)


class Guide:
    """Applies a `Guidance` to one student; trainers call it.

    Args:
        guidance: its options.
        student: the network in training, bare or in PEFT; its layer is tapped at once.
        tokenizer: the student's.
        group: processes whose rows are compared together.

    Attributes:
        truncated: how many texts were cut for the teacher.
        norms: of the gradients at the student's layer in the last pass, see `bird.taps.Measured`; None: not measured.

    Raises:
        ValueError: an unknown layer (the nearest are listed), or one outside the encoder of an encoder-decoder network;
            a teacher that shares parameters with the student; a tokenizer that is not known, or has another vocabulary
            although tokens are compared.
    """

    def __init__(
        self,
        guidance: Guidance,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.guidance, self.truncated = guidance, 0
        self.processes = 1 if group is None else group.size()
        self.watch(student)
        self.network = guide = unwrap(guidance.teacher)
        layer = guidance.teacher_layer or _backbone(guide)
        if layer is None:
            guide, layer = _Whole(guide), "backbone"
        self.teacher_layer = layer
        _require_encoder(self.network, find_layers(guide, layer))
        self.teacher = Teacher(guide, [self.teacher_layer], pool="none")
        self.differs = guidance.loss == "cka_difference"  # taken in each batch: batches of a step are put together
        like = dataclasses.replace(guidance, loss="cka") if self.differs else guidance
        self.loss = like.bird_loss([(self.teacher_layer, self.layer)], group)
        self.tokenizer: Any = tokenizer or _tokenizer_of(without_adapters(student))
        if self.tokenizer is None:
            raise ValueError("the student's tokenizer is not known: give processing_class")
        reader: Any = copy.copy(guidance.tokenizer or _tokenizer_of(self.network))
        if reader is None:
            raise ValueError("it is not known which tokenizer the teacher reads with: give it, tokenizer=")
        self.hands_on = guidance.text is concatenated and self.tokenizer.get_vocab() == reader.get_vocab()
        if guidance.pooling == "all" and not self.hands_on:
            raise ValueError('pooling="all" compares tokens: give no text=, and a teacher of the student\'s vocabulary')
        reader.truncation_side = guidance.truncation or "right"
        self.reader, self.window = reader, window_of(self.network, reader)

    def watch(self, student: nn.Module) -> None:
        """Tap the layer of a student."""
        core = without_adapters(student)
        if {*student.parameters()} & {*self.guidance.teacher.parameters()}:
            raise ValueError("the teacher has the student's own parameters, and is frozen: give it a copy.deepcopy")
        layer = self.guidance.layer or _backbone(core)
        if layer is None:
            raise ValueError(f"{type(core).__name__} does not say which of its layers is the backbone: name the layer")
        self.layer = layer
        _require_encoder(core, find_layers(core, layer))
        prompt_learning = getattr(unwrap(student), "active_peft_config", None)
        self.virtual: int = getattr(prompt_learning, "num_virtual_tokens", None) or 0
        measured = self.guidance.gradients or self.guidance.share is not None
        self.taps = FirstPass(core, [self.layer], pool="none", gradients=measured)
        self.watches = True

    def release(self) -> None:
        """Remove the taps from the student and clear its features."""
        self.taps.remove()
        self.watches = False

    def student_rows(self, sequences: Sequences) -> Tensor:
        """Pooled features ``[N, P]`` of the student's first pass since ``taps.listen()``; sets ``norms``."""
        popped = self.taps.pop()
        self.norms: Tensor | None = getattr(popped, "norms", None)
        features, mask = popped[self.layer][sequences.part], self._counted(sequences)
        virtual = self.virtual if features.shape[1] > mask.shape[1] else 0  # prefix tuning adds keys and values only
        rows = pool_tokens(features, mask, self.guidance.pooling, virtual=virtual)
        return differences(rows) if self.differs else rows

    def teacher_rows(self, sequences: Sequences) -> Tensor:
        """Run the teacher on the same sequences; its pooled features ``[N, Q]``.

        Raises:
            ValueError: a text is empty, or too long for the teacher and ``truncation`` is None.
        """
        ids, counted = self._handed_on(sequences) if self.hands_on else self._read(sequences)
        device = next(self.network.parameters()).device
        device = sequences.ids.device if device.type == "meta" else device  # offloaded: accelerate moves the inputs
        takes = inspect.signature(type(self.network).forward).parameters
        options = {"use_cache": False} if "use_cache" in takes else {}
        mask = _table([[1] * len(row) for row in ids]).to(device)
        features = self.teacher(input_ids=_table(ids).to(device), attention_mask=mask, **options)
        pooling = self.guidance.teacher_pooling or self.guidance.pooling
        rows = pool_tokens(features[self.teacher_layer], _table(counted), pooling)
        rows = differences(rows) if self.differs else rows
        return rows[_order(sequences, len(rows)).to(rows.device)] if self.guidance.permuted else rows

    def can_compare(self, rows: int) -> bool:
        """Whether ``rows`` in every process suffice for the estimator; warns if not."""
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
        """The mask ``[B, T]`` of the tokens that are pooled."""
        if not self.guidance.completion_only:
            return sequences.mask
        if sequences.completion is None:
            raise ValueError("completion_only: these batches do not say which tokens are the completion")
        return sequences.mask * sequences.completion

    def _handed_on(self, sequences: Sequences) -> tuple[list[list[int]], list[list[int]]]:
        """The student's token ids without padding, and for each whether it is pooled (0 or 1)."""
        ids, counted = (_unpadded(table, sequences.mask) for table in (sequences.ids, self._counted(sequences)))
        if self._are_long(ids):
            kept = slice(-self.window, None) if self.guidance.truncation == "left" else slice(self.window)
            ids, counted = [row[kept] for row in ids], [row[kept] for row in counted]
        return ids, counted

    def _read(self, sequences: Sequences) -> tuple[list[list[int]], list[list[int]]]:
        """The student's text as the teacher's token ids, and for each whether it is pooled (0 or 1)."""
        only = self._counted(sequences) is not sequences.mask
        completion = sequences.mask if sequences.completion is None else sequences.completion
        read = [*map(self._text, *(_unpadded(table, sequences.mask) for table in (sequences.ids, completion)))]
        ends = [text[spans[0][0] if spans else len(text) :] for text, spans in read]
        texts = [self.guidance.text(text.removesuffix(end), end) for (text, _), end in zip(read, ends, strict=True)]
        if empty := [number for number, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"sequences {empty} of the batch have no text for the teacher: an empty text or response")
        tokens = self.reader(texts, return_offsets_mapping=only, verbose=False)
        if self._are_long(tokens["input_ids"]):
            tokens = self.reader(texts, return_offsets_mapping=only, truncation=True, max_length=self.window)
        if not only:
            return tokens["input_ids"], [[1] * len(row) for row in tokens["input_ids"]]
        counted = []
        for text, end, (whole, spans), offsets in zip(texts, ends, read, tokens["offset_mapping"], strict=True):
            if not (text.endswith(end) or end.endswith(text)):
                raise ValueError(f"completion_only: text= must end with the completion, {text!r} does not")
            moved = [(start + len(text) - len(whole), stop + len(text) - len(whole)) for start, stop in spans]
            counted.append([int(any(a < stop and b > max(a, start) for start, stop in moved)) for a, b in offsets])
        return tokens["input_ids"], counted

    def _text(self, ids: list[int], marked: list[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of the student's tokens, and the spans (start, end) of the marked ones in it, in characters."""
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        text: str = decode(ids)
        edges = F.pad(torch.tensor(marked, device="cpu").ne(0).int(), (1, 1)).diff().nonzero().flatten().tolist()
        # A token may be part of a character, or lose its leading space, so tokens are not decoded one by one.
        places = [len(commonprefix([text, decode(ids[:edge])])) for edge in edges]  # noqa: RUF071 -- by character
        return text, [*zip(places[::2], places[1::2], strict=True)]

    def _are_long(self, rows: list[list[int]]) -> bool:
        """Whether any row is too long for the teacher; counts them, and raises a ValueError if none may be cut."""
        long = [len(row) for row in rows if len(row) > self.window]
        if long and self.guidance.truncation is None:
            raise ValueError(
                f"a text has {max(long)} tokens of the teacher's tokenizer, and the teacher takes {self.window}: let "
                'it be cut (truncation="left" keeps the end), or shorten what the student is trained on (max_length) '
                "or what the teacher reads of it (text=)"
            )
        self.truncated += len(long)
        return bool(long)


class _Whole(nn.Module):
    """Wraps a bare backbone, so that its output has a path that can be tapped."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone(*args, **kwargs)


def without_adapters(model: nn.Module) -> nn.Module:
    """The network inside wrappers and PEFT, whose layers have their original paths."""
    model = unwrap(model)
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _backbone(model: nn.Module) -> str | None:
    """The path of a network's backbone, that is all but the head, whose output is the final hidden state; None if
    ``base_model_prefix`` names no child."""
    name: Any = getattr(model, "base_model_prefix", "")
    return name if name in dict(model.named_children()) else None


def _require_encoder(network: Any, layers: dict[str, nn.Module]) -> None:
    """Raise a ValueError for layers outside the encoder of an encoder-decoder: the text's mask does not fit them."""
    if not getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        return
    encoder = network.get_encoder()
    if outside := [name for name, layer in layers.items() if layer not in {*encoder.modules()}]:
        names = [name for name, module in network.named_modules() if module is encoder]
        raise ValueError(
            f"{type(network).__name__} reads with an encoder, and {outside[0]!r} lies outside of it, where the text's "
            f"attention mask is not that of the tokens: name a layer of the encoder, such as {names[0]!r}"
        )


def _tokenizer_of(network: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a network's ``name_or_path``, loaded without running remote code; None if that fails."""
    from transformers import AutoTokenizer

    try:
        name: Any = getattr(network, "name_or_path", None)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False) if name else None
    except (OSError, ValueError, ImportError):
        return None


def window_of(network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a network accepts: the least of its tokenizer's limit and its table of positions.

    RoBERTa and its relatives start counting positions after the padding index: of 514 they use 512.
    """
    positions: Any = getattr(getattr(network, "config", None), "max_position_embeddings", None) or sys.maxsize
    tables = [table for name, table in network.named_modules() if name.endswith("position_embeddings")]
    unused = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return min(tokenizer.model_max_length, positions - max(unused, default=0))


def _order(sequences: Sequences, count: int) -> Tensor:
    """A random cycle of a batch's rows, none in its own place. The batch is its seed: a resumed run draws it again, and
    no generator moves."""
    if count < 2:
        raise ValueError(
            "permuted: one row in a batch would keep its place: give each device more (per_device_train_batch_size "
            'and per_device_eval_batch_size, rows="both"), or leave out a small last batch (dataloader_drop_last=True)'
        )
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(int(sequences.ids.sum())), device="cpu")
    return order.roll(1)[order.argsort()]  # each row's place is taken by the row before it in the random order


def _unpadded(table: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[of].tolist() for row, of in zip(table.cpu(), mask.ne(0).cpu(), strict=True)]


def _table(rows: list[list[int]]) -> Tensor:
    """Rows as ``[B, T]`` int64, padded with 0 on the right always, since networks count positions from the left."""
    tensors = [torch.tensor(row, dtype=torch.long, device="cpu") for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True)
