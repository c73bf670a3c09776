"""`BirdTrainer`: transformers' `Trainer` with a teacher. Those of TRL are in `bird.language.trl_trainers`."""

from __future__ import annotations

from transformers import Trainer

from .mixin import BirdMixin


class BirdTrainer(BirdMixin, Trainer):
    """`transformers.Trainer` with ``guidance=``, see `BirdMixin`: for classifiers, causal language models, ...

    If the labels are per token, tokens whose label is not -100 are the completion.
    """
