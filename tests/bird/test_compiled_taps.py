"""Taps and torch.compile: the same features and gradients, and words where hooks would be lost."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bird.taps import Taps
from tests.bird.tapped import Net, by_hand, gradients, guidance, plain_gradients

pytestmark = pytest.mark.usefixtures("fresh_compiler")


INDUCTOR = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("compiler", "first"),
    [
        ("eager", "compile"),
        ("aot_eager", "compile"),
        ("aot_eager", "tap"),
        pytest.param("inductor", "compile", marks=INDUCTOR),
    ],
)
def test_a_compiled_model_gives_the_same(net: Net, images: Tensor, compiler: str, first: str) -> None:
    truth = plain_gradients(net, images, "blocks.*")
    taps = Taps(net, "blocks.*") if first == "tap" else None
    model = torch.compile(net, backend=compiler, fullgraph=True)
    taps = taps or Taps(model, "blocks.*")
    for _ in range(2):
        loss = model(images).sum() + guidance(taps.pop())
        torch.testing.assert_close(gradients(loss, net), truth, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="no features"):
        taps.pop()


def test_one_compiled_step_holds_model_taps_and_loss(net: Net, images: Tensor) -> None:
    truth = plain_gradients(net, images, "blocks.*")
    taps = Taps(net, "blocks.*")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return net(x).sum() + guidance(taps.pop())

    torch.testing.assert_close(gradients(step(images), net), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_compiled_block_is_tapped(net: Net, images: Tensor, where: str) -> None:
    truth = by_hand(net, images)["blocks.0"]
    net.blocks[0] = torch.compile(net.blocks[0], backend="aot_eager")
    taps = Taps(net, "blocks.0" if where == "outside" else "blocks.0.relu")
    net(images)
    torch.testing.assert_close(*taps.pop().values(), truth)


@pytest.mark.parametrize("inplace", [False, True])
def test_taps_made_after_a_compiled_call_say_what_to_do(net: Net, images: Tensor, inplace: bool) -> None:
    model = net
    if inplace:
        net.compile(backend="eager")
    else:
        model = torch.compile(net, backend="eager")
    model(images)
    taps = Taps(model, "blocks.0")
    model(images)
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset\(\)"):
        taps.pop()
    torch.compiler.reset()
    model(images)
    torch.testing.assert_close(taps.pop()["blocks.0"], by_hand(net, images)["blocks.0"])


def test_taps_removed_from_a_compiled_model_stop_recording(net: Net, images: Tensor) -> None:
    model = torch.compile(net, backend="eager")
    taps = Taps(model, "blocks.0")
    model(images)
    taps.remove()
    model(images)
    assert not taps._passes.now.features


def test_checkpoints_in_a_compiled_model(net: Net, images: Tensor) -> None:
    truth = plain_gradients(net, images, "blocks.0")
    net.how = "non-reentrant"
    model = torch.compile(net, backend="aot_eager")
    taps = Taps(model, "blocks.0")
    loss = model(images).sum() + guidance(taps.pop())
    torch.testing.assert_close(gradients(loss, net), truth, rtol=1e-4, atol=1e-4)


def test_a_compiled_block_in_a_checkpoint_records_nothing_in_backward() -> None:
    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.rest = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)

        def both(self, x: Tensor) -> Tensor:
            return self.rest(self.block(x)).tanh()  # so that recomputation goes on after the block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.both, x, use_reentrant=False)

    net = Segment()
    net.block.compile(backend="aot_eager")
    taps = Taps(net, "block.0")
    for _ in range(2):
        x = torch.randn(3, 4)
        logits = net(x)
        torch.testing.assert_close(taps.pop()["block.0"], net.block[0](x))
        taps._passes.now.features.clear()  # of the line above
        logits.sum().backward()
        with pytest.raises(RuntimeError, match="no features"):
            taps.pop()
