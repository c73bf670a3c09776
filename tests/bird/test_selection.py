"""Properties of teachers: against the literal formulas, another solver, and known answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import entropy
from torch import Tensor, nn

from bird.lab.vision import selection
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.corruptions import Mixture, corrupt
from bird.lab.vision.data import Images, Splits, to_float
from bird.lab.vision.models import PlainNet
from bird.lab.vision.selection import (
    MeasuredTeacher,
    Views,
    effective_rank,
    extract,
    measure_teacher,
    probe,
    robust_usefulness,
)
from bird.lab.vision.training import fit
from bird.teachers import Teacher
from tests.bird.shipped import fashion

linear_model = pytest.importorskip(
    "sklearn.linear_model", reason="probes are an extra: pip install bird-kernels[vision]"
)

NAMES, SEVERITIES = ("gaussian_noise", "contrast"), (2, 5)


class Net(nn.Module):
    """One convolution to `width` channels, a ReLU-like bend, and a head that nobody asks."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(1, width, 5, 3), nn.GELU(), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 3)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.head(self.body(x).mean(dim=(2, 3)))


class Pixels(nn.Module):
    """The pixels of 1 x 2 pictures are the features."""

    def __init__(self, *signs: float) -> None:
        super().__init__()
        self.signs = nn.Parameter(torch.tensor(signs, dtype=torch.float32))
        self.flat = nn.Flatten()
        self.body = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.flat(x) * self.signs)


@pytest.fixture(scope="module")
def data() -> Splits:
    return fashion([2, 4, 6], limit_per_class=30)


def sides(first: list[int], second: list[int], labels: list[int]) -> Splits:
    """Pictures of two pixels; all three sets are the same."""
    pixels = torch.tensor([first, second], dtype=torch.uint8).T.reshape(-1, 1, 1, 2)
    images = Images(pixels, torch.tensor(labels))
    return Splits(images, images, images)


def versions(net: nn.Module, images: Images) -> list[np.ndarray]:
    """Features of the clean images and of each corrupted version, one whole batch each, fp64."""
    x = to_float(images.images)
    index = torch.arange(len(x))
    views = [x] + [corrupt(x, name, severity, index=index) for name in NAMES for severity in SEVERITIES]
    with torch.no_grad():
        return [net.body(view).mean(dim=(2, 3)).double().numpy() for view in views]


def literal_usefulness(views: list[np.ndarray], labels: np.ndarray, *, worst: bool) -> np.ndarray:
    """The docstring's formula, sample by sample."""
    clean, best = views[0], []
    for j in range(clean.shape[1]):
        f = [(view[:, j] - clean[:, j].mean()) / clean[:, j].std() for view in views]
        gammas = []
        for c in sorted(set(labels)):
            y = [1 if label == c else -1 for label in labels]
            for s in (1, -1):
                gamma = 0.0
                for i in range(len(labels)):
                    values = [y[i] * s * g[i] for g in f]
                    share = 0.5 / y.count(y[i])
                    gamma += share * (min(values) if worst else sum(values) / len(values))
                gammas.append(gamma)
        best.append(max(gammas))
    return np.array(best)


def literal_probe(train: np.ndarray, labels: np.ndarray, held_out: np.ndarray, c: float) -> np.ndarray:
    """The docstring's objective, minimised by SciPy."""
    classes, d = labels.max() + 1, train.shape[1]
    deviation = np.where(train.std(axis=0) > 0, train.std(axis=0), 1)
    x, new = ((part - train.mean(axis=0)) / deviation for part in (train, held_out))
    target = np.eye(classes)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: d * classes].reshape(d, classes), flat[d * classes :]
        logits = x @ w + b
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = c * (np.exp(log_p) - target)
        value = (w**2).sum() / 2 - c * (target * log_p).sum()
        return value, np.concatenate([(w + x.T @ error).ravel(), error.sum(axis=0)])

    found = minimize(objective, np.zeros((d + 1) * classes), jac=True, method="BFGS", options={"gtol": 1e-5})
    return (new @ found.x[: d * classes].reshape(d, classes) + found.x[d * classes :]).argmax(axis=1)


def measured(network: nn.Module, student: nn.Module, data: Splits, **options: object) -> MeasuredTeacher:
    few = {"corruptions": NAMES, "severities": SEVERITIES}
    networks = Teacher(network, "body"), Teacher(student, "body")
    return measure_teacher(*networks, data, **(few | options))  # type: ignore[arg-type]


def seen(network: nn.Module, images: Images, batch_size: int = 500, label: str = "", *, versions: bool = True) -> Views:
    which = [(name, severity) for name in NAMES for severity in SEVERITIES] if versions else []
    return extract(Teacher(network, "body"), images, which, batch_size=batch_size, label=label, progress=None)


@pytest.mark.parametrize("batch_size", [500, 7])
def test_views_are_reduced_sample_by_sample(data: Splits, batch_size: int) -> None:
    stack = np.stack(versions(Net(4, 0).eval(), data.validation))
    found = seen(Net(4, 0), data.validation, batch_size)
    truth = stack[0], stack.min(axis=0), stack.max(axis=0), stack.mean(axis=0)
    for values, expected in zip(found, truth, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, atol=2e-6)
    assert (found.lowest < found.clean).any()
    assert (found.highest > found.clean).any()
    bare = seen(Net(4, 0), data.validation, versions=False)
    assert all(np.array_equal(values, bare.clean) for values in bare)
    np.testing.assert_allclose(bare.clean, stack[0], atol=2e-6)


def test_features_must_be_finite(data: Splits) -> None:
    broken = Net(4, 0)
    with torch.no_grad():
        broken.body[0].bias[0] = float("inf")
    with pytest.raises(ValueError, match="mine: layer 'body' gives features that are not finite"):
        seen(broken, data.validation, label="mine")


@pytest.mark.parametrize("c", [1.0, 0.01])
def test_the_probe_minimises_the_stated_objective(data: Splits, c: float) -> None:
    net = Net(6, 0).eval()
    train, held_out = (versions(net, part)[0] for part in (data.train, data.validation))
    train[:, 2] = held_out[:, 2] = 0.25  # a feature that does not vary
    labels = data.train.labels.numpy()
    truth = literal_probe(train, labels, held_out, c)
    assert len(set(truth.tolist())) == 3
    np.testing.assert_array_equal(probe(train, labels, held_out, c=c), truth)


def test_the_regularisation_matters(data: Splits) -> None:
    net = Net(6, 0).eval()
    train, held_out = (versions(net, part)[0] for part in (data.train, data.validation))
    labels = data.train.labels.numpy()
    assert (probe(train, labels, held_out, c=0.01) != probe(train, labels, held_out)).any()


@pytest.mark.parametrize("batch_size", [500, 7])
def test_properties_are_what_literal_computations_give(data: Splits, batch_size: int) -> None:
    network, student = Net(6, 0).eval(), Net(2, 1)
    student_copy = deepcopy(student).eval()
    right = []
    for net in (network, student_copy):
        train, held_out = (versions(net, part)[0] for part in (data.train, data.validation))
        guesses = literal_probe(train, data.train.labels.numpy(), held_out, 1.0)
        right.append(guesses == data.validation.labels.numpy())
    views, labels = versions(network, data.validation), data.validation.labels.numpy()
    worst, mean = (literal_usefulness(views, labels, worst=worst).mean() for worst in (True, False))
    assert right[0].mean() != right[1].mean()
    found, of_student = measured(network, student, data, batch_size=batch_size)
    assert of_student == right[1].mean()
    assert found.probe_accuracy == right[0].mean()
    assert found.complementary_knowledge == sum(a and not b for a, b in zip(*right, strict=True)) / len(labels) > 0
    assert found.usefulness_min == pytest.approx(worst, abs=2e-5)
    assert found.usefulness_mean == pytest.approx(mean, abs=2e-5)
    clean = views[0].astype(np.float64)
    roots = np.sqrt(np.linalg.eigvalsh(np.cov(clean.T)).clip(0))  # of the covariance, in proportion to singular values
    assert found.effective_rank == pytest.approx(np.exp(entropy(roots)), rel=1e-4)
    assert worst < mean - 0.1


def test_effective_rank_of_known_spreads() -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(50, 6)))[0]
    q = np.linalg.qr(q - q.mean(0))[0]  # centred orthonormal columns
    assert effective_rank(q + 100) == pytest.approx(6, rel=1e-6)
    assert effective_rank(np.outer(rng.normal(size=50), rng.normal(size=6))) == pytest.approx(1, abs=1e-6)
    assert effective_rank(q * [2, 1, 1, 0, 0, 0]) == pytest.approx(2 * np.sqrt(2))  # shares 1/2, 1/4, 1/4: 1.5 bits


def test_usefulness_of_every_feature_with_unequal_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [3, 17, 9, 1])
    views = [3 + 2 * rng.normal(size=(30, 5)) + labels[:, None] * rng.normal(size=5) for _ in range(4)]
    low, high, mean = np.min(views, axis=0), np.max(views, axis=0), np.mean(views, axis=0)
    worst = robust_usefulness(views[0], low, high, labels)
    np.testing.assert_allclose(worst, literal_usefulness(views, labels, worst=True), rtol=1e-12)
    average = robust_usefulness(views[0], mean, mean, labels)
    np.testing.assert_allclose(average, literal_usefulness(views, labels, worst=False), rtol=1e-12)


def test_usefulness_of_known_features() -> None:
    labels = np.array([0] * 4 + [1] * 4)
    y = np.where(labels == 0, -1.0, 1.0)
    blind = np.array([1.0, -1, 1, -1, 1, -1, 1, -1])
    constant = np.full(8, 0.1)
    clean = np.stack([5 + 3 * y, -y, blind, constant, constant + 1e-8 * y], axis=1).astype(np.float32)
    assert np.ptp(clean[:, 4]) > 0
    # the label itself, its negative, a feature that knows nothing, one that does not vary, and one that only rounds
    truth = [1, 1, 0, np.nan, np.nan]
    np.testing.assert_allclose(robust_usefulness(clean, clean, clean, labels), truth, rtol=1e-6)
    # turned over by one of two versions: the worst is -1 for either sign, the mean 0
    flipped = 10 - clean
    low, high = np.minimum(clean, flipped), np.maximum(clean, flipped)
    middle = (clean + flipped) / 2
    assert robust_usefulness(clean, low, high, labels)[0] == pytest.approx(-1)
    assert robust_usefulness(clean, middle, middle, labels)[0] == pytest.approx(0, abs=1e-12)
    # turned over by all versions: as useful as before, with the other sign
    assert robust_usefulness(clean, flipped, flipped, labels)[0] == pytest.approx(1)


def test_rare_classes_count_half() -> None:
    """One of ten: f is 3 inside and -1/3 outside, so half of 3 + 1/3; unbalanced, it would be 0.1 * 3 + 0.9 / 3."""
    labels = np.array([0] + [1] * 9)
    f = (labels == 0).astype(np.float64)[:, None]
    assert robust_usefulness(f, f, f, labels) == pytest.approx([5 / 3])


def test_perfect_and_blind_probes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], 100))
    useless = rng.integers(0, 256, 200)
    teller = np.where(labels == 1, 200, 30)
    data = sides(teller.tolist(), useless.tolist(), labels.tolist())
    student = Pixels(0, 1)
    found, _ = measured(Pixels(1, 1), student, data, corruptions=[])
    assert found.probe_accuracy == 1
    assert found.usefulness_min == found.usefulness_mean > 0.5  # 1 for the first pixel, next to nothing for the other
    blind = float((probe(useless[:, None], labels, useless[:, None]) == labels).mean())
    assert 0.4 < blind < 0.6
    assert found.complementary_knowledge == pytest.approx(1 - blind)
    # the other way round the teacher knows nothing that the student does not
    assert measured(student, Pixels(1, 1), data, corruptions=[]).properties.complementary_knowledge == 0


def test_a_feature_that_a_corruption_turns_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "corrupt", lambda x, name, severity, *, index: 1 - x)
    labels = [0, 0, 1, 1]
    data = sides([0, 0, 255, 255], [0, 255, 0, 255], labels)
    net = Pixels(2, 0)  # the second feature is dead, and does not count
    found, _ = measured(net, Pixels(1, 1), data, corruptions=["fog"], severities=[1])
    assert found.usefulness_min == pytest.approx(-1)
    assert found.usefulness_mean == pytest.approx(0, abs=1e-6)
    assert found.probe_accuracy == 1
    with pytest.raises(ValueError, match="no feature of the teacher's layer 'body' varies"):
        measured(Pixels(0, 0), Pixels(1, 1), data, corruptions=[])


def test_the_students_own_features_add_nothing(data: Splits) -> None:
    student = Net(4, 0)
    found, own = measured(deepcopy(student), student, data)
    assert found.complementary_knowledge == 0
    assert found.probe_accuracy == own


def test_each_image_is_seen_once_per_version(data: Splits) -> None:
    network, student = Net(4, 0), Net(4, 1)
    measured(network, student, data)
    assert network.seen == len(data.train) + len(data.validation) * (1 + len(NAMES) * len(SEVERITIES))
    assert student.seen == len(data.train) + len(data.validation)


def test_bad_input_is_refused(data: Splits) -> None:
    student, teacher = Net(4, 9), Net(4, 0)
    with pytest.raises(ValueError, match=r"2 are tapped \(body.0, body\)"):
        measure_teacher(Teacher(teacher, ["body.0", "body"]), Teacher(student, "body"), data)
    with pytest.raises(ValueError, match=r"2 are tapped \(body.0, body\)"):
        measure_teacher(Teacher(teacher, "body"), Teacher(student, ["body.0", "body"]), data)
    with pytest.raises(ValueError, match="unknown corruption 'rain'; known are "):
        measured(teacher, student, data, corruptions=["rain"])
    with pytest.raises(ValueError, match="severity must be 0 to 7, got 8"):
        measured(teacher, student, data, severities=[8])
    for part in ("train", "validation"):
        few = getattr(data, part).select((getattr(data, part).labels == 1).nonzero().squeeze(1))
        one_class = Splits(**{**vars(data), part: few})
        with pytest.raises(ValueError, match="at least two classes are needed, got 1 in 30 images"):
            measured(teacher, student, one_class)


def test_without_scikit_learn_the_probe_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'bird-kernels\[vision\]'"):
        probe(np.zeros((2, 2)), np.array([0, 1]), np.zeros((2, 2)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a network gains nothing from more, and waits for them where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_robust_teacher_is_told_from_one_of_clean_images_and_from_an_untrained_one() -> None:
    corruptions = ("gaussian_noise", "defocus_blur", "contrast")
    own, data = (fashion(classes, limit_per_class=60) for classes in (range(5), range(5, 10)))
    found = {}
    for name, steps, augment in (("untrained", 0, None), ("clean", 80, None), ("robust", 80, Mixture(corruptions))):
        torch.manual_seed(0)
        network = PlainNet(5)
        if steps:
            fit(network, own.train, Settings(steps=steps, batch_size=32, lr=0.05), augment=augment, progress=False)
        of = Teacher(network, "block3"), Teacher(PlainNet(5), "block3"), data
        found[name] = measure_teacher(*of, corruptions=corruptions, severities=[2, 4], progress=False).properties
    usefulness = [found[name].usefulness_min for name in ("robust", "clean", "untrained")]
    assert usefulness == sorted(usefulness, reverse=True)
    assert usefulness[0] > usefulness[1] + 0.1
    assert all(properties.probe_accuracy > 0.5 for properties in found.values())
