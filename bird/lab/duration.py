"""How long to train: from a recipe's epochs to optimiser steps, the same count in both wings of the laboratory."""

from __future__ import annotations


def steps_to_train(samples: int, batch_size: int, epochs: int = 1, *, least: int = 1) -> int:
    """Optimiser steps in some passes over the data, each of which ends with a shorter batch where it does not divide.

    Args:
        samples: in the training set.
        batch_size: samples in a step.
        epochs: passes over the data.
        least: the fewest samples of a last batch that is trained on; a shorter one is left out of its pass. 1 leaves
            out none.

    Raises:
        ValueError: there are fewer samples than the least batch.
    """
    per_epoch = samples // batch_size + (samples % batch_size >= least)
    if per_epoch == 0:
        raise ValueError(f"training needs at least {least} samples, not {samples}")
    return epochs * per_epoch
