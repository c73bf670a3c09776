"""BIRD for language models: guidance by a frozen teacher in the trainers of transformers and TRL.

Names are imported on first access, because the trainers need transformers and TRL:
``pip install 'bird-kernels[language]'``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .guidance import Guidance
    from .mixin import BirdMixin
    from .pooling import pool_tokens
    from .trainers import BirdTrainer
    from .trl_trainers import BirdDPOTrainer, BirdSFTTrainer

__all__ = ["BirdDPOTrainer", "BirdMixin", "BirdSFTTrainer", "BirdTrainer", "Guidance", "pool_tokens"]

_HOMES = {"BirdMixin": "mixin", "BirdTrainer": "trainers", "Guidance": "guidance", "pool_tokens": "pooling"}
_HOMES |= dict.fromkeys(("BirdDPOTrainer", "BirdSFTTrainer"), "trl_trainers")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_HOMES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "trl"):
            raise
        raise ImportError(f"{name} needs {error.name}: pip install 'bird-kernels[language]'") from error
    return getattr(module, name)
