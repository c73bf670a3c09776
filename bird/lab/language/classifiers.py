"""Classifiers of texts: any backbone of transformers, its tokens pooled by attention mask, and a linear head.

transformers' own classifiers of decoders look for the last token by the id of padding. SmolLM2 pads with the id that
also ends a text, and GPT-2 has none, so they would read another token, or refuse a batch. These go by the mask alone.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from ...files import atomic, write_json
from ...language.guidance import window_of
from ...language.pooling import Pooling, pool_tokens, require_pooling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Classifier(nn.Module):
    """A backbone, one row of features for each text, and a new linear head in fp32.

    Guidance finds ``backbone`` by itself, as teacher's and as student's layer; its output is the final hidden state.

    Args:
        backbone: what ``AutoModel`` gives, decoder or encoder; it is taken over, not copied.
        pooling: of its tokens: ``"last"`` for decoders, ``"mean"`` or ``"first"`` for encoders, see
            `bird.language.pool_tokens`. With ``"last"`` padding may stand on either side, since positions are counted
            by the mask; encoders count theirs from the first place, so theirs is on the right.
        classes: how many.
        seed: of the head's weights, normal with deviation 0.02 as in transformers; the bias is zero. PyTorch's global
            generators stay where they are.

    Raises:
        ValueError: a pooling that does not give a row for each text.
    """

    base_model_prefix = "backbone"

    def __init__(self, backbone: nn.Module, pooling: Pooling = "last", *, classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        require_pooling("pooling", pooling)
        if pooling == "all":
            raise ValueError('pooling="all" gives a row for each token: a classifier needs one for each text')
        self.backbone, self.pooling, self.classes = backbone, pooling, classes
        config: Any = backbone.config
        self.config = config
        self.head = nn.utils.skip_init(nn.Linear, config.hidden_size, classes, dtype=torch.float32)
        with torch.no_grad():
            self.head.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()
        self.head.to(next(backbone.parameters()).device)
        takes = inspect.signature(backbone.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        self._counts_positions = pooling == "last" and "position_ids" in takes

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits ``[B, C]`` in fp32; with ``labels``, their mean cross-entropy.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, T]``, 0 for padding.
            labels: probabilities ``[B, C]``, or class numbers ``[B]``.
        """
        options: dict[str, Any] = dict(self._options)
        if self._counts_positions:
            options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
        rows = pool_tokens(hidden, attention_mask, self.pooling)
        with torch.autocast(rows.device.type, enabled=False):
            logits = self.head(rows.to(self.head.weight.dtype))
        if labels is not None and labels.is_floating_point():
            labels = labels.to(logits.dtype)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and what else makes the classifier; each file is whole or not there.

        Raises:
            OSError: it could not be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json({"pooling": self.pooling, "classes": self.classes}, folder / "classifier.json")
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with atomic(folder / "classifier.safetensors") as partial:
            save_file(state, partial, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, backbone: nn.Module) -> Classifier:
        """What `save` wrote; no code in it runs.

        Args:
            folder: that one.
            backbone: of the same architecture; it is taken over, and its weights are replaced.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or of another architecture.
        """
        about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        model = cls(backbone, about["pooling"], classes=about["classes"])
        model.restore(folder)
        return model

    def restore(self, folder: Path) -> None:
        """Take the weights that `save` wrote; raises as `load` does."""
        path = folder / "classifier.safetensors"
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it") from error
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} is of another architecture ({error})") from error


def predict(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """Probabilities ``[N, C]`` of the classes, fp32, on the CPU; in eval mode, without gradients.

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
    device = next(model.parameters()).device
    result = torch.empty(len(rows), model.classes)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                batch = {name: x.to(device) for name, x in padded([rows[number] for number in part]).items()}
                result[part] = model(**batch).logits.softmax(1).float().cpu()
    finally:
        model.train(was_training)
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
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"texts {_few(empty)} have no tokens")
    return rows, cut


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, padded on the right with id 0: the mask says what counts."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def accuracy(probabilities: Tensor, labels: Tensor | Sequence[int]) -> float:
    """Share of the rows ``[N, C]`` whose likeliest class is the label ``[N]``.

    Raises:
        ValueError: no rows, or another number of labels.
    """
    labels = torch.as_tensor(labels)
    if labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(f"{list(probabilities.shape)} probabilities and {list(labels.shape)} labels: need [N, C], [N]")
    return (probabilities.argmax(1) == labels.to(probabilities.device)).double().mean().item()


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of the rows on whose likeliest class two networks agree, as of a student with its weak teacher.

    Raises:
        ValueError: as of `accuracy`.
    """
    return accuracy(ours, theirs.argmax(1))


def _few(numbers: Sequence[int]) -> str:
    """The first ones, for a message."""
    return f"{[*numbers[:5]]}{'' if len(numbers) <= 5 else f' and {len(numbers) - 5} more'}"
