"""`BirdTrainer`: transformers' `Trainer` with a teacher. TRL's are in `bird.language.trl_trainers`."""

from __future__ import annotations

from transformers import Trainer

from .mixin import BirdMixin


class BirdTrainer(BirdMixin, Trainer):
    """`transformers.Trainer` with ``guidance=``, see `BirdMixin`: classifiers, causal language models, ...

    With labels for every token, those that are not -100 are the completion.
    """
