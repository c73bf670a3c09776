"""BIRD: a teacher's robustness moved into a student by aligning the geometry of their features.

`BirdLoss` is the loss, `Taps` and `Teacher` give it its features, and the operators of `bird_kernels` stand
beside them for loops of your own. Images, language and pictures load when asked for.
"""

from bird_kernels import (
    CKALoss,
    HSICLoss,
    Plan,
    backend_status,
    centered_gram,
    cka,
    cka_loss,
    explain,
    hsic,
)

from .losses import BirdLoss, Hints
from .taps import Taps
from .teachers import Teacher

__all__ = [
    "BirdLoss",
    "CKALoss",
    "HSICLoss",
    "Hints",
    "Plan",
    "Taps",
    "Teacher",
    "backend_status",
    "centered_gram",
    "cka",
    "cka_loss",
    "explain",
    "hsic",
]
