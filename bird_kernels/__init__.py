"""Centred kernel alignment, HSIC and centred Gram matrices, with their gradients, as PyTorch operators.

Public names only; importing this loads neither Triton nor native code.
"""

from .backends import status as backend_status
from .functional import centered_gram, cka, cka_loss, explain, hsic
from .modules import CKALoss, HSICLoss
from .types import Plan

__all__ = [
    "CKALoss",
    "HSICLoss",
    "Plan",
    "backend_status",
    "centered_gram",
    "cka",
    "cka_loss",
    "explain",
    "hsic",
]
