"""BIRD: a frozen teacher's robustness is transferred to a student by aligning the geometry of their features.

`BirdLoss` is the loss, `Taps` and `Teacher` record the features it compares; the operators of `bird_kernels` are
re-exported. Trainers for language models are in `bird.language`, experiments that reproduce the paper in `bird.lab`.
"""

import bird_kernels
from bird_kernels import *  # noqa: F403

from .chunks import chunked_backward
from .compare import Similarity, compare
from .losses import BirdLoss, Hints, LwF
from .taps import Taps
from .teachers import Teacher

__all__ = ["BirdLoss", "Hints", "LwF", "Similarity", "Taps", "Teacher", "chunked_backward", "compare"]
__all__ += bird_kernels.__all__
