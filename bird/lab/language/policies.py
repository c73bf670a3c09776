"""Students tuned on preferences: TRL's DPO, by itself or with a teacher's geometry, as one call that resumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors.torch import load_model, save_model
from torch import nn
from trl import DPOConfig, DPOTrainer

from ...files import atomic
from ...language.trl_trainers import BirdDPOTrainer
from .data import Preference, columns
from .recipe import Training
from .training import arguments, claim, forget_checkpoints, quiet, read_history, reading, trained, write_history

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...language.guidance import Guidance


def train_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Preference],
    training: Training,
    folder: Path,
    *,
    guidance: Guidance | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    save_every: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Train in place by DPO (Rafailov et al., 2023) as TRL has it; its reference is the model as it comes.

    The folder gets ``policy.safetensors`` (whole weights, adapters merged) and, last of all, ``history.json``. Called
    again with the model as it came, it goes on from its last whole checkpoint, and a complete one is only read. Nothing
    is unpickled but what ``torch.load(weights_only=True)`` admits. The reference's log probabilities are computed once,
    at the start, so no second model is held.

    Args:
        model: a causal language model; trained in place, in eval mode at the end.
        tokenizer: the model's.
        pairs: of responses to a prompt.
        training: how long and how.
        folder: of this run alone.
        guidance: adds a teacher's geometry; the order of the pairs is the same with it.
        seed: of the order of the pairs, and of dropout (which TRL turns off).
        device: ``"cpu"`` or a kind of accelerator.
        save_every: steps between checkpoints; None: one for each epoch.
        progress: show bars.

    Returns:
        Plain data: ``train``, a row for each step with TRL's metrics (and ``cka``, ``cka_loss``, ``task_loss`` where
        something guides).

    Raises:
        ValueError: a folder of another run; what `bird.language.BirdMixin` refuses.
        FloatingPointError: the loss is no longer finite.
    """
    data = columns(pairs)
    claim(folder, data, guidance, training=asdict(training), seed=seed)
    finished = folder / "history.json"
    if finished.exists():
        restore(model, folder)
        nn.Module.to(model, device)
        return read_history(finished)
    more: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
    if training.adapters:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=training.adapters, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet(progress):
        trainer = (DPOTrainer if guidance is None else BirdDPOTrainer)(
            model,
            args=DPOConfig(
                **arguments(training, folder, seed, torch.device(device), save_every),
                beta=training.preference_beta,
                max_length=training.max_length,
                precompute_ref_log_probs=True,
                precompute_ref_batch_size=training.micro_batch or training.batch_size,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
            **more,
        )
        rows = trained(trainer, folder, progress)
    whole: Any = trainer.model
    if training.adapters:
        whole = whole.merge_and_unload()
    with atomic(folder / "policy.safetensors") as partial:
        save_model(whole, str(partial))
    whole.eval()
    history = {"train": rows}
    write_history(history, folder / "policy.safetensors")
    forget_checkpoints(folder)
    return history


def restore(model: nn.Module, folder: Path) -> None:
    """Give a model of the same architecture the weights that `train_policy` left; eval mode.

    Raises:
        OSError: there are none.
        ValueError: they are damaged, or of another architecture.
    """
    path = folder / "policy.safetensors"
    with reading(path):
        load_model(model, str(path))
    model.eval()
