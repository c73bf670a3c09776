"""Students tuned on preferences by TRL's DPO, alone or with guidance by a teacher; a call resumes an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ...language.trl_trainers import BirdDPOTrainer
from .data import Preference
from .recipe import Training
from .training import arguments, claim, finish_run, finished_run, quiet, trained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...language.guidance import Guidance

WEIGHTS = "policy.safetensors"  # in a run's folder


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
    """Train in place by TRL's DPO (Rafailov et al., 2023); the reference is the model before training.

    `bird.lab.language.training` describes how the folder is used, and how a call resumes an earlier one. The weights in
    it are whole, with adapters merged. The reference's log probabilities are computed once, at the start, so no second
    model is in memory.

    Args:
        model: a causal language model; trained in place, in eval mode at the end.
        tokenizer: the model's.
        pairs: of responses to a prompt.
        training: steps, learning rate and other options.
        folder: used by this run only.
        guidance: adds guidance by a teacher; the order of the pairs does not depend on it.
        seed: of the order of the pairs, and of dropout (which TRL turns off).
        device: ``"cpu"`` or a kind of accelerator.
        save_every: steps between checkpoints; None: one for each epoch.
        progress: show bars.

    Returns:
        Plain data: ``train``, a row for each step with TRL's metrics (and ``cka``, ``cka_loss``, ``task_loss`` where
        something guides).

    Raises:
        ValueError: a folder of another run; several processes or GPUs; what `bird.language.BirdMixin` refuses.
        FloatingPointError: the loss is not finite.
    """
    weights = folder / WEIGHTS
    data = _columns(pairs)
    claim(folder, data, guidance, training=asdict(training), seed=seed)
    if (done := finished_run(model, weights, device)) is not None:
        return done
    args = _arguments(training, folder, seed=seed, device=device, save_every=save_every)
    more: dict[str, Any] = {} if guidance is None else {"guidance": guidance}
    if training.adapters:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=training.adapters, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet(progress):
        trainer = (DPOTrainer if guidance is None else BirdDPOTrainer)(
            model, args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer, **more
        )
        history = {"train": trained(trainer, folder, progress)}
    whole: Any = trainer.model
    finish_run(whole.merge_and_unload() if training.adapters else whole, weights, history)
    return history


def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Preference],
    training: Training,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, list[float]]:
    """The log-probabilities of responses given their prompts, summed over tokens, as TRL's DPO counts them.

    Args:
        model: a causal language model, in eval mode; it is moved to the device and not trained.
        tokenizer: the model's.
        pairs: of responses to a prompt.
        training: of which ``max_length``, ``bf16`` and the size of batches count.
        folder: for the trainer.
        device: ``"cpu"`` or a kind of accelerator.
        progress: show bars.

    Returns:
        ``chosen`` and ``rejected``, a number for each pair.
    """
    args = _arguments(training, folder, seed=0, device=device, save_every=None)
    with quiet(progress):
        rows = Dataset.from_dict(_columns(pairs))
        trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    found: Any = trainer.train_dataset
    return {name: [float(value) for value in found[f"ref_{name}_logps"]] for name in ("chosen", "rejected")}


def _columns(pairs: Sequence[Preference]) -> dict[str, list[Any]]:
    return {name: [getattr(pair, name) for pair in pairs] for name in ("prompt", "chosen", "rejected")}


def _arguments(training: Training, folder: Path, **more: Any) -> Any:
    """The arguments of TRL's trainer; the log-probabilities of its start are computed when it is made."""
    clipping: dict[str, Any] = {} if training.max_grad_norm is None else {"max_grad_norm": training.max_grad_norm}
    return arguments(
        DPOConfig,
        training,
        folder,
        beta=training.preference_beta,
        max_length=training.max_length,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=training.micro_batch or training.batch_size,
        gradient_checkpointing=False,
        **clipping,
        **more,
    )
