"""Taps: right values, right gradients, and never a stale, missing or ambiguous feature."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bird.features import find_layers
from bird.taps import Taps
from tests.bird.tapped import Net, by_hand, gradients, guidance, plain_gradients
from tests.groups import run_ranks

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# Values and gradients


def test_features_are_the_layers_means(net: Net, images: Tensor) -> None:
    taps = Taps(net, ["blocks.1", "blocks.0"])
    net(images)
    features, truth = taps.pop(), by_hand(net, images)
    assert list(features) == ["blocks.1", "blocks.0"] == list(taps.names)
    torch.testing.assert_close(features, {name: truth[name] for name in features})
    ours = gradients(guidance(features), net)
    assert len(ours) == 12  # all but the head's two
    torch.testing.assert_close(ours, gradients(guidance({name: truth[name] for name in features}), net))


def test_an_inplace_layer_behind_the_tap_changes_nothing(images: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    for pool in ("mean", "flatten", lambda t: t[:, :3]):
        taps = Taps(net, "0", pool=pool)
        net(x)
        rows = taps.pop()["0"]
        assert (rows < 0).any()
        torch.testing.assert_close(rows, net[0](x)[:, : rows.shape[1]])
        taps.remove()


def test_autocast_keeps_the_layers_dtype(net: Net, images: Tensor) -> None:
    taps = Taps(net, "blocks.*")
    net(images)
    single = taps.pop()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(images)
        half = taps.pop()
    for name in taps.names:
        assert (single[name].dtype, half[name].dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(half[name].float(), single[name], rtol=0.05, atol=0.05)
    ours, truth = (torch.cat([g.flatten() for g in gradients(guidance(f), net)]) for f in (half, single))
    assert (ours - truth).norm() < 0.2 * truth.norm()


# One forward, and no other


def test_pop_forgets(net: Net, images: Tensor) -> None:
    taps = Taps(net, "blocks.0")
    net(images)
    alive = weakref.ref(taps.pop()["blocks.0"])
    assert alive() is None
    with pytest.raises(RuntimeError, match=r"no features from \['blocks.0'\].*once before each pop"):
        taps.pop()


def test_a_forward_replaces_what_was_not_popped(net: Net, images: Tensor) -> None:
    taps = Taps(net, "blocks.*")
    net(torch.zeros_like(images))
    net(images)
    torch.testing.assert_close(taps.pop(), by_hand(net, images))


def test_a_skipped_layer_is_missed_not_remembered(net: Net, images: Tensor) -> None:
    taps = Taps(net, "blocks.*")
    net(images)
    net.skip = True
    net(images)
    with pytest.raises(RuntimeError, match=r"no features from \['blocks.1'\]"):
        taps.pop()


def test_a_forward_that_fails_leaves_nothing_behind(net: Net, images: Tensor) -> None:
    taps = Taps(net, "stem")
    with pytest.raises(RuntimeError):
        net(images[:, :, :2, :2])
    net.head, head = nn.Linear(7, 4), net.head
    with pytest.raises(RuntimeError):
        net(torch.zeros_like(images))
    net.head = head
    net(images)
    torch.testing.assert_close(taps.pop()["stem"], net.stem(images).mean((2, 3)))


def test_a_layer_that_runs_twice_is_ambiguous() -> None:
    layer = nn.ReLU()
    net = nn.Sequential(layer, nn.Linear(4, 4), layer)
    taps = Taps(net, "0")
    with pytest.raises(RuntimeError, match="'0' ran twice"):
        net(torch.randn(3, 4))
    taps.remove()
    net(torch.randn(3, 4))


def test_a_submodule_called_by_itself_is_tapped(net: Net, images: Tensor) -> None:
    taps = Taps(net, "stem")
    for _ in range(2):
        net.stem(images)
        assert taps.pop()["stem"].shape == (5, 6)


def test_removed_taps_leave_the_model_as_it_was(net: Net, images: Tensor) -> None:
    with Taps(net, "blocks.*") as taps:
        net(images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    taps.remove()
    net(images)
    with pytest.raises(RuntimeError, match="with the taps in place"):
        taps.pop()


# Names


def test_a_missing_name_lists_the_nearest(net: Net) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0\.cnv'; of 13 layers the nearest are \['blocks\.0\.conv'"):
        Taps(net, ["stem", "blocks.0.cnv"])
    with pytest.raises(ValueError, match=r"the first are \['stem', 'stem.0'"):
        Taps(net, ["???"])


@pytest.mark.parametrize("names", ["blocks.*.attn", "*.*.*.*", "blocks", "", "module.stem", []])
def test_names_that_match_no_layer_are_refused(net: Net, names: Any) -> None:
    with pytest.raises(ValueError, match="no layer"):
        Taps(net, names)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("blocks.*", ["blocks.0", "blocks.1"]),
        ("blocks.[1]", ["blocks.1"]),
        (["head", "blocks.*.conv"], ["head", "blocks.0.conv", "blocks.1.conv"]),
        (["blocks.1", "blocks.*"], ["blocks.1", "blocks.0"]),
        ("*", ["stem", "head"]),
    ],
)
def test_globs_stop_at_dots(net: Net, names: Any, found: list[str]) -> None:
    assert list(find_layers(net, names)) == found


def test_names_see_through_wrappers(net: Net) -> None:
    conv = net.blocks[0].conv
    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    net.blocks[0] = torch.compile(net.blocks[0])
    model = torch.compile(DataParallel(torch.compile(net)))
    layers = find_layers(model, ["blocks.0.conv", "blocks.0", "blocks.1", "blocks.1.relu"])
    assert layers["blocks.0.conv"] is conv
    assert layers["blocks.0"] is net.blocks[0]  # the wrapper: its output is outside of the compiled region
    assert layers["blocks.1"] is net.blocks[1]


def test_an_own_child_called_module_and_a_shared_layer_have_their_names() -> None:
    linear = nn.Linear(2, 2)
    net = nn.Sequential(OrderedDict(module=nn.Sequential(linear, nn.ReLU(), linear)))
    layers = find_layers(net, ["module", "module.0", "module.2"])
    assert list(layers) == ["module", "module.0", "module.2"]
    assert layers["module.0"] is layers["module.2"] is linear


# Checkpointing


@pytest.mark.parametrize("pool", ["mean", lambda t: t.exp().mean((2, 3))], ids=["mean", "saves-tensors"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole-model"])
def test_checkpointing_changes_no_value_and_records_nothing_in_backward(
    net: Net, images: Tensor, whole: bool, pool: Any
) -> None:
    names = ["blocks.0", "blocks.1.conv"]
    truth = plain_gradients(net, images, names, pool)
    taps = Taps(net, names, pool=pool)
    if whole:
        logits = checkpoint(net, images, use_reentrant=False)
    else:
        net.how = "non-reentrant"
        logits = net(images)
    runs = []
    net.blocks[1].conv.register_forward_hook(lambda *_: runs.append(1))
    features = taps.pop()
    assert all(value.requires_grad for value in features.values())
    torch.testing.assert_close(gradients(logits.sum() + guidance(features), net), truth)
    assert runs, "the layer did not run again, so this shows nothing"
    with pytest.raises(RuntimeError, match="no features"):
        taps.pop()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole-model"])
def test_features_that_were_not_popped_survive_recomputation(net: Net, images: Tensor, whole: bool) -> None:
    taps = Taps(net, "blocks.0")
    if whole:
        logits = checkpoint(net, images, use_reentrant=False)
    else:
        net.how = "non-reentrant"
        logits = net(images)
    kept = taps._passes.now.features["blocks.0"]
    logits.sum().backward()
    rows = taps.pop()["blocks.0"]
    assert rows is kept
    net.how = "plain"
    torch.testing.assert_close(rows, by_hand(net, images)["blocks.0"])


@pytest.mark.parametrize("how", ["reentrant", "no_grad", "whole"])
def test_a_layer_without_graph_in_a_training_step_is_refused(net: Net, images: Tensor, how: str) -> None:
    net.how = "plain" if how == "whole" else how
    taps = Taps(net, "blocks.0")

    def step() -> None:
        if how != "whole":
            net(images)
        else:
            logits = checkpoint(net, images.requires_grad_(), use_reentrant=True)
            taps.pop()
            logits.sum().backward()

    with pytest.raises(RuntimeError, match=r"'blocks.0' ran without a graph.*use_reentrant=False"):
        step()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant checkpoint
@pytest.mark.parametrize("how", ["reentrant", "no_grad", "plain"])
def test_evaluation_without_gradients_is_no_training_step(net: Net, images: Tensor, how: str) -> None:
    net.how = how
    taps = Taps(net, "blocks.0")
    with torch.no_grad():
        net(images)
    assert not taps.pop()["blocks.0"].requires_grad


# Data parallelism


def test_data_parallel_on_one_device_works_and_replicas_are_refused(net: Net, images: Tensor) -> None:
    taps = Taps(DataParallel(net), "blocks.0")
    net(images)
    assert taps.pop()["blocks.0"].shape == (5, 6)
    replica = net.blocks[0]._replicate_for_data_parallel()  # what each of several devices would run
    replica.conv, replica.norm, replica.relu = net.blocks[0].conv, net.blocks[0].norm, net.blocks[0].relu
    with pytest.raises(RuntimeError, match="DistributedDataParallel, or one device"):
        replica(torch.randn(2, 6, 4, 4))


def ddp_worker(rank: int, world: int) -> None:
    """Task and guidance under DDP against the mean of what each process's batch gives by itself."""

    def loss_of(model: nn.Module, taps: Taps, shard: int) -> Tensor:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(shard))
        return F.cross_entropy(model(x), torch.arange(6) % 3) + guidance(taps.pop())

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    alone = copy.deepcopy(plain)
    taps = Taps(alone, "2")
    truth = gradients(torch.stack([loss_of(alone, taps, shard) for shard in range(world)]).mean(), alone)
    wraps = ["ddp", "find-unused", "ddp-of-compiled", "compiled-ddp"]
    for wrap in wraps if world > 1 else wraps[:1]:
        net = copy.deepcopy(plain)
        inner = torch.compile(net, backend="eager") if wrap == "ddp-of-compiled" else net
        model: Any = DistributedDataParallel(inner, find_unused_parameters=wrap == "find-unused")
        if wrap == "compiled-ddp":
            model = torch.compile(model, backend="eager")
        taps = Taps(model, "2")
        for _ in range(2):
            torch.testing.assert_close(gradients(loss_of(model, taps, rank), net), truth, msg=wrap)


@pytest.mark.parametrize("world", [1, 2])
def test_ddp_averages_the_gradients_of_features(world: int, tmp_path: Path) -> None:
    run_ranks(ddp_worker, world, tmp_path, world)
