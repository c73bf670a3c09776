"""Which teacher to take for a student: three properties of its features that can be had before any transfer.

After BIRD (Pogoncheff and Beyeler, ICLR 2026), who name the properties and find that over 432 pairs a linear model of
the three (`bird.lab.vision.regression`) explains 74 to 86 % of the variance of the robust accuracy after the transfer,
behavioural relevance alone over half of it. What exactly they computed is not published; the definitions here are this
project's.

Test images are not looked at: probes are trained on training images, and everything is measured on validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...teachers import Teacher
from .corruptions import SEVERITIES, TEACHER_CORRUPTIONS
from .data import Splits
from .extraction import Array, Extractor, student_layer, teacher_layer
from .regression import Properties

PROBE_C = 1.0  # scikit-learn's default, good enough to compare teachers with


class Measured(NamedTuple):
    """A teacher's properties, and the accuracy of a probe on the student's own features, a share of 1."""

    properties: Properties
    student_probe_accuracy: float


def measure_teacher(
    teacher: Teacher,
    student: nn.Module,
    layer: str,
    data: Splits,
    *,
    corruptions: Sequence[str] = TEACHER_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 500,
    device: torch.device | str | None = None,
    cache: Path | None = None,
    progress: bool | None = None,
) -> Measured:
    """The properties of a teacher for a student, from one pass over the images for each network.

    *Probe accuracy*: of `probe` on the teacher's features. *Complementary knowledge*: the share of validation images
    that this probe gets right and the same probe on the student's features gets wrong. *Usefulness*: the mean of
    `robust_usefulness` over the features that vary, with the minimum over all versions of an image (each corruption at
    each severity, and the clean image) and with the mean over them. Features that do not vary are left out: the minimum
    over many corruptions is below 0 even for good teachers, and with zeros the dead would look better than they.

    Args:
        teacher: taps the one layer that would guide.
        student: any network on the student's images; given back in the modes and on the device it had.
        layer: the layer that would be guided, pooled over space; its features are the student's own.
        data: the student's: clean images, at least two classes.
        corruptions: the behaviour that the transfer is for. Not those that students are finally scored on: these are
            to be unseen till then.
        severities: 1 to 5.
        seed: of the corruptions.
        batch_size: images at a time.
        device: where networks run, see `bird.lab.vision.extraction.Extractor`; None: each where it is.
        cache: a folder that keeps features, see there; None: nothing is kept.
        progress: show a bar for each network; None to show it on a terminal only.

    Raises:
        ValueError: a teacher that taps several layers or whose features do not vary, fewer than two classes in the
            training or the validation images, an unknown corruption.
        ImportError: scikit-learn is missing.
    """
    extractor = Extractor(corruptions, severities, seed, batch_size, device, cache, progress)
    own = teacher_layer(teacher)
    student_right = _student_right(student, layer, data, extractor)
    train = extractor.clean(own, data.train, label="teacher: training images")
    views = extractor.views(own, data.validation, label="teacher: validation images")
    labels = data.validation.labels.cpu().numpy()
    worst = robust_usefulness(views.clean, views.lowest, views.highest, labels)
    mean = robust_usefulness(views.clean, views.mean, views.mean, labels)
    if np.isnan(worst).all():
        raise ValueError(f"no feature of the teacher's layer {own.name!r} varies over the validation images")
    right = _right(train, views.clean, data)
    properties = Properties(
        probe_accuracy=float(right.mean()),
        complementary_knowledge=float((right & ~student_right).mean()),
        usefulness_min=float(np.nanmean(worst)),
        usefulness_mean=float(np.nanmean(mean)),
    )
    return Measured(properties, float(student_right.mean()))


def probe(
    train: NDArray[Any], train_labels: NDArray[Any], held_out: NDArray[Any], *, c: float = PROBE_C
) -> NDArray[np.int64]:
    r"""Labels that a linear probe gives to held-out features, int64 ``[m]``.

    Multinomial logistic regression on features standardised by the training images (a feature that does not vary
    stays 0), fitted in fp64 by scikit-learn's L-BFGS:

    .. math::  \min_{W, b}\; \tfrac12 \lVert W \rVert^2 - c \sum_i \log p_{W,b}(y_i \mid x_i)

    Args:
        train: ``[n, d]``.
        train_labels: ``[n]``, at least two classes.
        held_out: ``[m, d]``.
        c: the larger the less regularised.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits  # scikit-learn's own
    except ImportError as error:
        raise ImportError("linear probes need scikit-learn: pip install 'bird-kernels[vision]'") from error
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="lbfgs", max_iter=1000))
    # NumPy's threads spin while they wait: with two processes on two cores a probe took 50 to 310 s that takes a few.
    with threadpool_limits(torch.get_num_threads()):
        model.fit(train.astype(np.float64), train_labels)
        return model.predict(held_out.astype(np.float64))


def robust_usefulness(
    clean: NDArray[Any], lowest: NDArray[Any], highest: NDArray[Any], labels: NDArray[Any]
) -> NDArray[np.float64]:
    r"""How useful each feature stays when images may change, after Ilyas et al. (2019): fp64 ``[d]``.

    They call a feature f of mean 0 and variance 1 :math:`\gamma`-robustly useful if
    :math:`\mathbb E_{(x, y)}[\inf_{\delta} y f(x + \delta)] \ge \gamma`, y being +1 or -1. This is the largest such
    :math:`\gamma` of feature j for the best of the questions "class c or not" and the better sign s of the feature:

    .. math::  \gamma_j = \max_{c,\, s = \pm 1}\;
               \tfrac12\, \mathbb E_{x \in c} \min_v\, s f_j(v(x)) +
               \tfrac12\, \mathbb E_{x \notin c} \min_v\, {-s} f_j(v(x)),
               \qquad f_j = (\phi_j - \mu_j) / \sigma_j

    with mean and standard deviation over the clean images, and v over the versions that are allowed. Both answers
    count half, however rare c is: else with many classes a feature would be judged by "not c" alone. Without changes
    :math:`\gamma_j` is half the largest distance, in standard deviations, between the means inside and outside of a
    class: 1 for two classes of equal size that the feature tells apart without fail. A feature that does not vary over
    the clean images cannot be standardised: NaN.

    For the mean over versions in place of the minimum, give the mean as both ``lowest`` and ``highest``.

    Args:
        clean: features of the clean images, ``[n, d]``.
        lowest: the lowest value of each over the versions, ``[n, d]``.
        highest: the highest.
        labels: ``[n]``, at least two classes.
    """
    mean, deviation = clean.mean(axis=0, dtype=np.float64), clean.std(axis=0, dtype=np.float64)
    varies = deviation > 1e-6 * np.abs(clean).max(axis=0)  # by more than what fp32 rounds
    low, high = ((values - mean) / np.where(varies, deviation, 1) for values in (lowest, highest))
    low_inside, low_outside = _class_means(low, labels)
    high_inside, high_outside = _class_means(high, labels)
    best = np.maximum(low_inside - high_outside, low_outside - high_inside).max(axis=0) / 2
    return np.where(varies, best, np.nan)


def _class_means(values: NDArray[np.float64], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means inside and outside of each class, ``[classes, d]``, in one pass however many classes there are."""
    _, first, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
    sums, counts = np.add.reduceat(values[np.argsort(labels)], first), counts[:, None]
    return sums / counts, (values.sum(axis=0) - sums) / (len(labels) - counts)


def _student_right(student: nn.Module, layer: str, data: Splits, extractor: Extractor) -> NDArray[np.bool_]:
    """Which validation images a probe on the student's own features gets right, ``[m]``."""
    for name, images in (("training", data.train), ("validation", data.validation)):
        if (classes := len(images.labels.unique())) < 2:
            raise ValueError(f"{name} images of at least two classes are needed, got {classes} in {len(images)} images")
    with student_layer(student, layer) as own:
        train = extractor.clean(own, data.train, label="student: training images")
        held_out = extractor.clean(own, data.validation, label="student: validation images")
    return _right(train, held_out, data)


def _right(train: Array, held_out: Array, data: Splits) -> NDArray[np.bool_]:
    return probe(train, data.train.labels.cpu().numpy(), held_out) == data.validation.labels.cpu().numpy()
