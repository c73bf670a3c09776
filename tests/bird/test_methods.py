"""Each method against the same training written out by hand: equal weights, to the bit."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bird import BirdLoss, Hints, Taps, Teacher, cka_loss
from bird.lab.vision import methods
from bird.lab.vision.augment import PhotometricViews
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.corruptions import Mixture
from bird.lab.vision.data import Images
from bird.lab.vision.methods import HINTS, METHODS, Transfer
from bird.lab.vision.models import build, replace_head
from bird.lab.vision.steps import epoch_order, learning_rate
from bird.lab.vision.training import TransferGuide, fit
from bird.losses import LwF
from tests.bird.loops import changes, same, state

SETTINGS = Settings(steps=7, batch_size=8, lr=0.05, seed=3, save_every=100)
NETWORKS = "plain", "resnet-tiny"
PAIRS = [("block3", "layer3")]


@pytest.fixture(scope="module")
def train() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(images, torch.arange(40) % 4)


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return build("plain", 3, channels=1).eval(), build("resnet-tiny", 4, channels=1)


def moved(method: str, networks: tuple[nn.Module, nn.Module], train: Images, **options: object) -> nn.Module:
    before = [state(network) for network in networks]
    transfer = Transfer(NETWORKS, PAIRS, SETTINGS, 4, **options)  # type: ignore[arg-type]
    model, histories, times = transfer.run(method, *networks, train)
    for network, old in zip(networks, before, strict=True):  # left as they were
        assert not changes(network, old)
    assert [history.train[-1]["step"] for history in histories] == {0: [], 1: [7], 2: [4, 3]}[len(histories)]
    assert (times is not None) == (method == "lwf" or method in GUIDED)
    return model


def test_none_continued_and_ceiling(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    assert same(moved("none", networks, train), networks[1])
    for method, augment in (("continued", None), ("ceiling", Mixture(seed=5))):
        by_hand = deepcopy(networks[1])
        fit(by_hand, train, SETTINGS, augment=augment)
        assert same(moved(method, networks, train, augment=augment), by_hand)


def test_continued_at_alpha_is_a_smaller_step(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    """With SGD: alpha times the gradient is alpha times the rate, with the decay of weights, which has its own."""
    for weights, alpha in (({}, 0.1), ({"alpha": 0.5}, 0.5)):
        by_hand = deepcopy(networks[1])
        decay = SETTINGS.weight_decay / alpha
        fit(by_hand, train, replace(SETTINGS, lr=alpha * SETTINGS.lr, weight_decay=decay))
        found = moved("continued-alpha", networks, train, weights=weights).state_dict()
        for name, value in by_hand.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_a_permuted_teacher_gives_no_image_its_own_features(
    networks: tuple[nn.Module, nn.Module], train: Images
) -> None:
    by_hand = deepcopy(networks[1])
    torch.manual_seed(SETTINGS.seed)
    guide = TransferGuide(Teacher(deepcopy(networks[0]), "block3"), Taps(by_hand, "layer3"), GUIDED["bird"])
    rows = guide.teacher.forward
    guide.teacher.forward = lambda x: {k: torch.cat([v[-1:], v[:-1]]) for k, v in rows(x).items()}
    fit(by_hand, train, SETTINGS, guide=guide)
    found = moved("bird-permuted", networks, train)
    assert same(found, by_hand)
    assert not same(found, moved("bird", networks, train))


def test_views_are_seen_by_both_networks_and_not_by_the_task(
    networks: tuple[nn.Module, nn.Module], train: Images
) -> None:
    """The loop written out: the task and its statistics on its images, CKA on views of them, one step on the sum."""
    by_hand, teacher, views = deepcopy(networks[1]).train(), deepcopy(networks[0]), PhotometricViews(5)
    sgd = torch.optim.SGD(by_hand.parameters(), lr=SETTINGS.lr, momentum=0.9, weight_decay=5e-4)
    taps, guide = Taps(by_hand, "layer3"), Teacher(teacher, "block3")
    for step in range(7):
        epoch, batch = divmod(step, 5)
        index = epoch_order(40, SETTINGS.seed, epoch)[8 * batch : 8 * batch + 8]
        x = train.images[index].float() / 255
        task = F.cross_entropy(by_hand(x), train.labels[index])
        taps.pop()
        seen = views(x, index, epoch)
        buffers = {name: buffer.clone() for name, buffer in by_hand.named_buffers()}
        by_hand(seen)
        for name, buffer in by_hand.named_buffers():
            buffer.data.copy_(buffers[name])  # the statistics of batch normalisation are the task's
        loss = 0.1 * task + 0.9 * cka_loss(taps.pop()["layer3"], guide(seen)["block3"])
        sgd.param_groups[0]["lr"] = learning_rate(step, SETTINGS)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    found = moved("bird", networks, train, views=views).state_dict()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    small = replace(SETTINGS, chunk_size=4)
    model = Transfer(NETWORKS, PAIRS, small, 4, views=views).run("bird", *networks, train).model
    assert not same(model, Transfer(NETWORKS, PAIRS, small, 4).run("bird", *networks, train).model)


def headed(teacher: nn.Module) -> nn.Module:
    model = deepcopy(teacher).requires_grad_(True)
    torch.manual_seed(SETTINGS.seed)
    replace_head(model, "plain", 4)
    return model


def test_lp_trains_the_head_alone(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    model = moved("lp", networks, train)
    assert model.state_dict()["head.weight"].shape[0] == 4
    teacher = headed(networks[0])
    assert changes(model, state(teacher)) == {"head.weight", "head.bias"}  # and no batch normalisation's statistics


@pytest.mark.parametrize("method", ["ft", "lp-ft", "lwf"])
def test_what_starts_from_the_teacher(method: str, networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    by_hand = headed(networks[0])
    if method == "ft":
        fit(by_hand, train, SETTINGS)
    else:
        fit(by_hand, train, replace(SETTINGS, steps=4), trained=["head"])
        guide = None
        if method == "lwf":
            loss = LwF(1.0, 0.005, [("block3", "block3")])
            guide = TransferGuide(Teacher(deepcopy(networks[0]), "block3"), Taps(by_hand, "block3"), loss)
        fit(by_hand, train, replace(SETTINGS, steps=3), guide=guide)
    assert same(moved(method, networks, train), by_hand)


GUIDED = {
    "bird": BirdLoss(0.1, 0.9, PAIRS),
    "bird-unbiased": BirdLoss(0.1, 0.9, PAIRS, estimator="unbiased"),
    "bird-rbf": BirdLoss(0.1, 0.9, PAIRS, kernel="rbf"),
    "bird-rbf-unbiased": BirdLoss(0.1, 0.9, PAIRS, kernel="rbf", estimator="unbiased"),
    "bird-permuted": BirdLoss(0.1, 0.9, PAIRS),
    "hints": None,
}


@pytest.mark.parametrize("method", [name for name in GUIDED if name != "bird-permuted"])
def test_what_is_guided(method: str, networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    by_hand, loss = deepcopy(networks[1]), GUIDED[method]
    torch.manual_seed(SETTINGS.seed)
    if loss is None:
        loss = Hints(*HINTS, PAIRS, teacher_widths={"block3": 96}, student_widths={"layer3": 48})
    guide = TransferGuide(Teacher(deepcopy(networks[0]), "block3"), Taps(by_hand, "layer3"), loss)
    fit(by_hand, train, SETTINGS, guide=guide)
    found = moved(method, networks, train)
    assert same(found, by_hand)
    assert not same(found, moved("continued", networks, train))


@pytest.mark.parametrize("method", ["bird", "hints"])
def test_several_layers_are_guided_at_once(method: str, networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    pairs, by_hand = [("block2", "layer2"), *PAIRS], deepcopy(networks[1])
    torch.manual_seed(SETTINGS.seed)
    widths = {"block2": 64, "block3": 96}, {"layer2": 24, "layer3": 48}
    hints = Hints(*HINTS, pairs, teacher_widths=widths[0], student_widths=widths[1])
    loss = hints if method == "hints" else BirdLoss(0.1, 0.9, pairs)
    guide = TransferGuide(
        Teacher(deepcopy(networks[0]), ["block2", "block3"]), Taps(by_hand, ["layer2", "layer3"]), loss
    )
    fit(by_hand, train, SETTINGS, guide=guide)
    assert same(Transfer(NETWORKS, pairs, SETTINGS, 4).run(method, *networks, train).model, by_hand)


def test_the_weights_of_bird(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    with_none = moved("bird", networks, train, weights={"alpha": 1.0, "beta": 0.0})
    assert same(with_none, moved("continued", networks, train))


def test_the_weights_of_hints(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    """The task alone at alpha = 1 and beta = 0; the rate of the maps plays no part in it."""
    with_none = moved("hints", networks, train, weights={"alpha": 1.0, "beta": 0.0})
    assert same(with_none, moved("continued", networks, train))
    assert not same(moved("hints", networks, train, weights={"beta": 1.0}), moved("hints", networks, train))


def test_a_network_that_is_needed_and_missing(networks: tuple[nn.Module, nn.Module], train: Images) -> None:
    transfer = Transfer(NETWORKS, PAIRS, SETTINGS, 4)
    for method, given, said in (
        ("bird", (None, networks[1]), "BIRD is guided by a teacher"),
        ("ft", (None, networks[1]), "FT starts from a teacher"),
        ("hints", (networks[0], None), "Hints starts from a student"),
    ):
        with pytest.raises(ValueError, match=said):
            transfer.run(method, *given, train)


def test_every_method_is_in_the_docstring() -> None:
    assert all(f"``{name}``" in (methods.__doc__ or "") for name in METHODS)
