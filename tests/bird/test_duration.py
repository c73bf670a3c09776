"""How long to train, against batches that are counted out."""

from __future__ import annotations

import pytest

from bird.lab.duration import steps_to_train


def counted(samples: int, batch_size: int, epochs: int, least: int) -> int:
    sizes = [len(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]
    return sum(size >= least for size in sizes) * epochs


@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("samples", [4, 16, 17, 19, 20, 51, 52, 64])
def test_steps_are_the_batches_of_all_epochs(samples: int, least: int) -> None:
    assert steps_to_train(samples, 16, least=least) == counted(samples, 16, 1, least)
    assert steps_to_train(samples, 16, 3, least=least) == counted(samples, 16, 3, least)


def test_images_leave_out_a_short_last_batch_and_texts_do_not() -> None:
    assert [steps_to_train(n, 16, 2, least=4) for n in (48, 51, 52)] == [6, 6, 8]  # MIN_BATCH of the wing of vision
    assert [steps_to_train(n, 16, 2) for n in (48, 49, 52)] == [6, 8, 8]  # as transformers' trainer counts


def test_too_few_samples_for_a_batch() -> None:
    with pytest.raises(ValueError, match="training needs at least 4 samples, not 3"):
        steps_to_train(3, 16, least=4)
    with pytest.raises(ValueError, match="training needs at least 1 samples, not 0"):
        steps_to_train(0, 16)
