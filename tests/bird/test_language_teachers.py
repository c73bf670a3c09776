"""A teacher may be moved and cast with its parent, nothing else; one that accelerate has placed stays where it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("trl", reason="the tiny networks of these tests come with it")
from pathlib import Path

from accelerate import cpu_offload, dispatch_model
from trl import DPOConfig

from bird import Teacher
from bird.language import BirdDPOTrainer
from bird.language.guidance import Guide
from tests.bird.test_language_texts import marked
from tests.bird.tiny import bytes_tokenizer, guidance, preferences, settings, student, teacher


class Parent(nn.Module):
    """Made without memory, as large models are; its teacher has its weights."""

    def __init__(self, inner: Teacher) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3, device="meta")
        self.teacher = inner


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).double()


@pytest.mark.parametrize("device", ["cpu", None])
def test_weights_outlive_an_emptied_parent(device: str | None) -> None:
    teacher = Teacher(network(), ["3"], pool="none")
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    before = copy.deepcopy(teacher.model.state_dict())
    features = teacher(x)["3"]
    parent = Parent(teacher)
    for _ in range(3):  # memory that was in use, and is not zero
        filler = [torch.full_like(tensor, 7.0) for tensor in before.values() if tensor.is_floating_point()]
        del filler
        parent.to_empty(device=device)
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(teacher(x)["3"], features)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert parent.own.weight.device.type == ("cpu" if device else "meta")


def test_a_teacher_is_moved_and_cast_with_its_parent() -> None:
    inner = Teacher(network(), ["3"], pool="none")
    parent = nn.ModuleDict({"teacher": inner, "own": nn.Linear(3, 3)})
    before = copy.deepcopy(inner.model.state_dict())
    parent.float()
    assert {tensor.dtype for tensor in inner.model.parameters()} == {torch.float32}
    for name, tensor in inner.model.state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    parent.to(memory_format=torch.channels_last)
    assert inner.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    parent.share_memory()
    assert all(tensor.is_shared() for tensor in inner.model.parameters())
    assert inner.model[1].num_batches_tracked.dtype == torch.int64


def test_weights_that_are_not_there_are_no_weights() -> None:
    with torch.device("meta"):
        parent = Parent(Teacher(nn.Sequential(nn.Linear(3, 3)), ["0"]))
    with pytest.raises(RuntimeError, match=r"the teacher has no weights yet.*load them before"):
        parent.to_empty(device="cpu")


def placed(kind: str) -> Any:
    model = teacher()
    if kind == "offloaded":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    spread = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    raise_if = {"offload_dir": kind}
    return dispatch_model(model, spread, main_device="cpu", **raise_if)


@pytest.mark.parametrize("kind", ["offloaded", "spread"])
def test_what_accelerate_has_placed_stays_there(kind: str, tmp_path: Path) -> None:
    model = placed(kind if kind == "offloaded" else str(tmp_path / "weights"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    places = {name: parameter.device.type for name, parameter in model.named_parameters()}
    trainer: Any = BirdDPOTrainer(
        student(),
        student(),
        args=DPOConfig(**settings(tmp_path, max_steps=1)),
        train_dataset=preferences(),
        processing_class=bytes_tokenizer(),
        guidance=guidance(teacher=model),
    )
    trainer.train()
    nn.ModuleList([trainer.bird_guide.teacher]).to("cpu", torch.float32)
    assert {name: parameter.device.type for name, parameter in model.named_parameters()} == places
    sequences = marked(["a good film", "bad"], [[], []])
    plain = Guide(guidance(), student(), bytes_tokenizer()).teacher_rows(sequences)
    torch.testing.assert_close(trainer.bird_guide.teacher_rows(sequences), plain)
