"""Which teacher to take for a student: properties of its features that can be had before any transfer.

After BIRD (Pogoncheff and Beyeler, ICLR 2026), who name three of them and find that over 432 pairs a linear model of
the three (`bird.lab.vision.regression`) explains 74 to 86 % of the variance of the robust accuracy after the transfer,
behavioural relevance alone over half of it. What exactly they computed is not published; the definitions here are this
project's, and so is the effective rank beside them.

Test images are not looked at: probes are trained on training images, and everything is measured on validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...teachers import Teacher
from .corruptions import SEVERITIES, TEACHER_CORRUPTIONS, corrupt
from .data import Images, Splits, to_float
from .regression import Properties

Float32Array = NDArray[np.float32]

PROBE_C = 1.0  # scikit-learn's default, good enough to compare teachers with


class MeasuredTeacher(NamedTuple):
    """A teacher's properties, and the accuracy of a probe on the student's own features, a share of 1."""

    properties: Properties
    student_probe_accuracy: float


class Views(NamedTuple):
    """Features of clean images, and statistics over all versions (the clean one included); float32 ``[n, d]`` each.

    Features of single versions are not kept, so that memory does not depend on the number of corruptions.
    """

    clean: Float32Array
    lowest: Float32Array
    highest: Float32Array
    mean: Float32Array


def measure_teacher(
    teacher: Teacher,
    student: Teacher,
    data: Splits,
    *,
    corruptions: Sequence[str] = TEACHER_CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 500,
    progress: bool | None = None,
) -> MeasuredTeacher:
    """The properties of a teacher for a student, from one pass over the images for each network.

    *Probe accuracy*: of `probe` on the teacher's features. *Complementary knowledge*: the share of validation images
    that this probe gets right and the same probe on the student's features gets wrong. *Usefulness*: the mean of
    `robust_usefulness` over the features that vary, with the minimum over all versions of an image (each corruption at
    each severity, and the clean image) and with the mean over them. Features that do not vary are left out: the minimum
    over many corruptions is below 0 even for good teachers, and with zeros the dead would look better than they.
    *Effective rank*: `effective_rank` of the clean validation images' features.

    Args:
        teacher: taps the one layer that would guide; runs where it is.
        student: the student before the transfer, frozen likewise; taps the one layer that would be guided.
        data: the student's: clean images, at least two classes.
        corruptions: the behaviour that the transfer is for. Not those that students are finally scored on: these are
            to be unseen till then.
        severities: 1 to 5.
        batch_size: images at a time.
        progress: show a bar for each network; None to show it on a terminal only.

    Raises:
        ValueError: a network that taps several layers; features that are not finite, or of the teacher do not vary;
            fewer than two classes in the training or the validation images; an unknown corruption or severity.
        ImportError: scikit-learn is missing.
    """
    for name, images in (("training", data.train), ("validation", data.validation)):
        if (classes := len(images.labels.unique())) < 2:
            raise ValueError(f"{name} images of at least two classes are needed, got {classes} in {len(images)} images")

    def seen(network: Teacher, images: Images, label: str, versions: Sequence[tuple[str, int]] = ()) -> Views:
        return extract(network, images, versions, batch_size=batch_size, label=label, progress=progress)

    train = seen(student, data.train, "student: training images").clean
    student_right = _right(train, seen(student, data.validation, "student: validation images").clean, data)
    train = seen(teacher, data.train, "teacher: training images").clean
    versions = [(name, severity) for name in corruptions for severity in severities]
    views = seen(teacher, data.validation, "teacher: validation images", versions)
    labels = data.validation.labels.cpu().numpy()
    worst = robust_usefulness(views.clean, views.lowest, views.highest, labels)
    mean = robust_usefulness(views.clean, views.mean, views.mean, labels)
    if np.isnan(worst).all():
        raise ValueError(f"no feature of the teacher's layer {teacher.names[0]!r} varies over the validation images")
    right = _right(train, views.clean, data)
    properties = Properties(
        probe_accuracy=float(right.mean()),
        complementary_knowledge=float((right & ~student_right).mean()),
        usefulness_min=float(np.nanmean(worst)),
        usefulness_mean=float(np.nanmean(mean)),
        effective_rank=effective_rank(views.clean),
    )
    return MeasuredTeacher(properties, float(student_right.mean()))


@torch.no_grad()
def extract(
    network: Teacher,
    images: Images,
    versions: Sequence[tuple[str, int]] = (),
    *,
    batch_size: int,
    label: str,
    progress: bool | None,
) -> Views:
    """Features of the one layer that a frozen network taps, and their statistics over corrupted versions.

    Args:
        network: on any device; images are moved there batch by batch.
        images: clean.
        versions: corruption and severity of each.
        batch_size: affects speed and memory only.
        label: of the bar, and in errors.
        progress: as of `measure_teacher`.

    Raises:
        ValueError: the network taps several layers, or a feature is not finite.
    """
    if len(network.names) != 1:
        tapped = ", ".join(network.names)
        raise ValueError(f"features of one layer are compared, but {len(network.names)} are tapped ({tapped})")
    name, hidden = network.names[0], None if progress is None else not progress
    first = next(chain(network.model.parameters(), network.model.buffers()), images.images)
    parts: list[list[Float32Array]] = []  # by batches, of what a `Views` holds; without versions its first alone
    total = len(images) * (1 + len(versions))
    with tqdm(total=total, desc=label, unit="image", leave=False, disable=hidden) as bar:

        def rows(x: Tensor) -> Tensor:
            bar.update(len(x))
            return network(x.contiguous(memory_format=torch.channels_last))[name].float()

        for index in torch.arange(len(images)).split(batch_size):
            x = to_float(images.images[index.to(images.images.device)].to(first.device))
            clean = lowest = highest = mean = rows(x)
            for done, (corruption, severity) in enumerate(versions, start=1):
                new = rows(corrupt(x, corruption, severity, index=index))
                lowest, highest = torch.minimum(lowest, new), torch.maximum(highest, new)
                mean = mean + (new - mean) / (done + 1)
            kept = (clean, lowest, highest, mean) if versions else (clean,)
            parts.append([values.cpu().numpy() for values in kept])
    found = [np.concatenate(values) for values in zip(*parts, strict=True)]
    if not all(np.isfinite(values).all() for values in found):
        raise ValueError(f"{label}: layer {name!r} gives features that are not finite")
    return Views(*(found if versions else 4 * found))


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


def effective_rank(features: NDArray[Any]) -> float:
    r"""The exponential of the entropy of the singular values' shares (Roy and Vetterli, EUSIPCO 2007).

    .. math::  \exp\Big(-\sum_i p_i \log p_i\Big), \qquad p_i = \sigma_i / \sum_j \sigma_j

    for the singular values of the centred features: d for equal spread in all directions, 1 for one direction.

    Args:
        features: ``[n, d]``, some of which vary.
    """
    values = np.linalg.svd(features - features.mean(axis=0, dtype=np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _class_means(values: NDArray[np.float64], labels: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Means inside and outside of each class, ``[classes, d]``, in one pass however many classes there are."""
    _, first, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
    sums, counts = np.add.reduceat(values[np.argsort(labels)], first), counts[:, None]
    return sums / counts, (values.sum(axis=0) - sums) / (len(labels) - counts)


def _right(train: Float32Array, held_out: Float32Array, data: Splits) -> NDArray[np.bool_]:
    """Which validation images a probe on some features gets right, ``[m]``."""
    return probe(train, data.train.labels.cpu().numpy(), held_out) == data.validation.labels.cpu().numpy()
