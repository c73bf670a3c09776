"""BIRD: a teacher's robustness moved into a student by aligning the geometry of their features.

`BirdLoss` is the loss, `Taps` and `Teacher` give it its features, and the operators of `bird_kernels` stand
beside them for loops of your own. Images, language and pictures load when asked for.
"""

from bird_kernels import (
    RBF,
    CKALoss,
    HSICLoss,
    Plan,
    Statistics,
    backend_status,
    centered_gram,
    cka,
    cka_loss,
    cka_matrix,
    explain,
    gram_mse,
    hsic,
    last_token,
    mean_tokens,
    token_cka_loss,
)

from .chunks import chunked_backward
from .compare import Similarity, compare
from .losses import BirdLoss, Hints, LwF
from .taps import Taps
from .teachers import Teacher

__all__ = [
    "RBF",
    "BirdLoss",
    "CKALoss",
    "HSICLoss",
    "Hints",
    "LwF",
    "Plan",
    "Similarity",
    "Statistics",
    "Taps",
    "Teacher",
    "backend_status",
    "centered_gram",
    "chunked_backward",
    "cka",
    "cka_loss",
    "cka_matrix",
    "compare",
    "explain",
    "gram_mse",
    "hsic",
    "last_token",
    "mean_tokens",
    "token_cka_loss",
]
