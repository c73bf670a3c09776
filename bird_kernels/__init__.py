"""Centred kernel alignment, HSIC and centred Gram matrices, with their gradients, as PyTorch operators.

Public names only; importing this loads neither Triton nor native code.
"""

from .backends import status as backend_status
from .functional import centered_gram, cka, cka_loss, explain, gram_mse, hsic
from .grams import cka_from_grams
from .matrix import cka_matrix
from .modules import CKALoss, HSICLoss
from .statistics import Statistics
from .tokens import last_token, mean_tokens, token_cka_loss
from .types import RBF, Plan

__all__ = [
    "RBF",
    "CKALoss",
    "HSICLoss",
    "Plan",
    "Statistics",
    "backend_status",
    "centered_gram",
    "cka",
    "cka_from_grams",
    "cka_loss",
    "cka_matrix",
    "explain",
    "gram_mse",
    "hsic",
    "last_token",
    "mean_tokens",
    "token_cka_loss",
]
