"""A teacher is frozen, stays in eval mode, stops after its last tap, and is no part of what holds it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bird.teachers import Teacher
from tests.groups import run_ranks

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Net(nn.Module):
    """Dropout and BatchNorm, so that train and eval mode differ; counts how often each part runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 4)
        self.runs: dict[str, int] = {}

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.body(self.drop(self.stem(x * scale)))
        return self.head(x.mean((2, 3)))

    def count(self) -> dict[str, int]:
        """From here on, how often each part has run."""
        self.runs = dict.fromkeys(("stem", "body", "head"), 0)
        for name in self.runs:

            def hook(_module: nn.Module, _args: Any, name: str = name) -> None:
                self.runs[name] += 1

            getattr(self, name).register_forward_pre_hook(hook)
        return self.runs


class Student(nn.Module):
    def __init__(self, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        if teacher is not None:
            self.teacher = teacher

    def forward(self, x: Tensor) -> Tensor:
        rows = self.body(x).mean((2, 3))
        return rows.square().mean() + (rows.mean() - self.teacher(x)["body"].mean()).square()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):  # running statistics that are not the initial ones
        net(torch.randn(8, 3, 8, 8))
    return net


@torch.no_grad()
def by_hand(net: Net, images: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(net).eval()
    stem = net.stem(images)
    return {"stem": stem.mean((2, 3)), "body": net.body(stem).mean((2, 3))}


def test_features_are_those_of_eval_mode_and_carry_no_graph(net: Net, images: Tensor) -> None:
    truth = by_hand(net, images)
    teacher = Teacher(net, ["body", "stem"])
    features = teacher(images.requires_grad_())
    assert list(features) == ["body", "stem"] == list(teacher.names)
    assert not any(value.requires_grad for value in features.values())
    torch.testing.assert_close(features, truth)
    torch.testing.assert_close(teacher(images / 2, scale=2.0), truth)


@pytest.mark.parametrize(
    ("taps", "ran"),
    [("stem", (1, 0, 0)), ("*.0", (1, 1, 0)), (["body", "stem"], (1, 1, 0)), ("head", (1, 1, 1))],
)
def test_the_forward_stops_after_the_last_tap(net: Net, images: Tensor, taps: Any, ran: tuple[int, ...]) -> None:
    teacher = Teacher(net, taps)
    runs = net.count()
    teacher(images)
    assert tuple(runs.values()) == ran


def test_the_model_itself_still_runs_to_its_end(net: Net, images: Tensor) -> None:
    truth = copy.deepcopy(net).eval()(images)
    teacher = Teacher(net, "stem")
    torch.testing.assert_close(net(images), truth)
    teacher(images)
    torch.testing.assert_close(teacher.model(images), truth)


def test_two_teachers_share_a_model(net: Net, images: Tensor) -> None:
    truth = by_hand(net, images)
    early, late = Teacher(net, "stem"), Teacher(net, "body")
    torch.testing.assert_close(late(images) | early(images), truth)


def test_an_inplace_layer_behind_a_tap_changes_nothing(net: Net, images: Tensor) -> None:
    teacher = Teacher(net, ["stem.1", "stem"])
    normed = net.stem[1](net.stem[0](images)).mean((2, 3))
    torch.testing.assert_close(teacher(images)["stem.1"], normed)


def test_the_first_output_of_a_layer_that_runs_again_counts() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    for names in (["0"], ["0", "2"]):
        net = nn.Sequential(layer, layer, nn.Linear(4, 4))
        torch.testing.assert_close(Teacher(net, names)(x)["0"], layer(x))


def test_nothing_changes_the_teacher(net: Net, images: Tensor) -> None:
    teacher = Teacher(net, "body")
    before = copy.deepcopy(net.state_dict())
    truth = teacher(images)
    parent = Student(teacher)
    parent.train()
    teacher.train()
    parent.requires_grad_(True)
    parent.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert not teacher.training
    assert not any(p.requires_grad for p in net.parameters())
    optimizer = torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        parent(images).backward()
        optimizer.step()
    net.train()  # by someone who kept the model
    torch.testing.assert_close(teacher(images), truth, rtol=0, atol=0)
    for name, value in net.state_dict().items():
        assert value.equal(before[name]), name


def test_a_parent_shows_only_its_own_parameters_and_state(net: Net) -> None:
    parent, alone = Student(Teacher(net, "body")), Student()
    assert parent.state_dict().keys() == alone.state_dict().keys()
    assert len(list(parent.parameters())) == len(list(alone.parameters())) == 4
    parent.load_state_dict(alone.state_dict())
    assert repr(parent).count("Teacher(Net, taps=['body'])") == 1


def test_copies_and_pickles_stand_by_themselves(net: Net, images: Tensor) -> None:
    teacher = Teacher(net, "body")
    truth = teacher(images)
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert other.model is not net
        torch.testing.assert_close(other(images), truth)
        with torch.no_grad():
            other.model.stem[0].weight.zero_()
        assert not torch.allclose(other(images)["body"], truth["body"])
    torch.testing.assert_close(teacher(images), truth)


def test_autocast_and_pooling_are_those_of_taps(net: Net, images: Tensor) -> None:
    teacher = Teacher(net, "body")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = teacher(images)["body"]
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), teacher(images)["body"], rtol=0.05, atol=0.05)
    assert Teacher(net, "stem", pool="flatten")(images)["stem"].shape == (5, 6 * 6 * 6)


class Reader(nn.Module):
    """Takes tokens and their mask, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.embed(input_ids))


@pytest.mark.parametrize("compiled", [False, True])
def test_padding_of_the_call_does_not_count(compiled: bool) -> None:
    torch.manual_seed(0)
    teacher, ids, lengths = Teacher(Reader(), "embed"), torch.randint(50, (3, 6)), [6, 2, 4]
    if compiled:
        teacher.forward = torch.compile(teacher.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    found = teacher(input_ids=ids, attention_mask=mask)["embed"]
    tokens = teacher.model.embed(ids)
    torch.testing.assert_close(found, torch.stack([row[:t].mean(0) for row, t in zip(tokens, lengths, strict=True)]))
    torch.testing.assert_close(teacher(input_ids=ids)["embed"], tokens.mean(1))  # of that call alone


def test_errors(net: Net, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the nearest are \['body'"):
        Teacher(net, "bodi")
    net.spare = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"did not run \['spare'\]"):
        Teacher(net, ["stem", "spare"])(images)
    teacher = Teacher(net, "body")
    truth = teacher(images)
    with pytest.raises(RuntimeError, match="channels"):
        teacher(images[:, :2])  # the model's own error comes through, and leaves nothing behind
    assert net(images).shape == (5, 4)
    torch.testing.assert_close(teacher(images), truth)


@pytest.mark.parametrize("wrap", [torch.compile, DataParallel])
def test_wrappers_are_taken_off_and_the_forward_is_cut_all_the_same(net: Net, images: Tensor, wrap: Any) -> None:
    teacher = Teacher(wrap(net), "stem")
    assert teacher.model is net
    truth = by_hand(net, images)["stem"]
    runs = net.count()
    torch.testing.assert_close(teacher(images)["stem"], truth)
    assert runs == {"stem": 1, "body": 0, "head": 0}


@pytest.mark.parametrize("calls", ["teacher", "parent"])
def test_a_compiled_teacher_leaves_out_what_is_behind_the_tap(net: Net, images: Tensor, calls: str) -> None:
    from functorch.compile import make_boxed_func  # here, because the processes of the DDP test need not load them
    from torch._dynamo.backends.common import aot_autograd

    convolutions = []

    def inspect(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        convolutions.append(sum("convolution" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=inspect, bw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    model: Any = Teacher(net, "stem") if calls == "teacher" else Student(Teacher(net, "body"))
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(images), model(images))
    assert convolutions == [
        1 if calls == "teacher" else 3
    ]  # the stem's alone, the body's is left out; both and its own


def test_a_teacher_whose_model_is_compiled_in_place(net: Net, images: Tensor) -> None:
    net.compile(backend="eager")
    torch.testing.assert_close(Teacher(net, "stem")(images)["stem"], by_hand(net, images)["stem"])


class Parent(nn.Module):
    """Made without memory, as large models are; its teacher has its weights."""

    def __init__(self, inner: Teacher) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3, device="meta")
        self.teacher = inner


@pytest.mark.parametrize("device", ["cpu", None])
def test_weights_outlive_an_emptied_parent(net: Net, images: Tensor, device: str | None) -> None:
    teacher = Teacher(net, "body")
    before, features = copy.deepcopy(net.state_dict()), teacher(images)["body"]
    parent = Parent(teacher)
    for _ in range(3):  # memory that was in use, and is not zero
        filler = [torch.full_like(tensor, 7.0) for tensor in before.values() if tensor.is_floating_point()]
        del filler
        parent.to_empty(device=device)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(teacher(images)["body"], features)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert parent.own.weight.device.type == ("cpu" if device else "meta")


def test_a_teacher_is_moved_and_cast_with_its_parent(net: Net, images: Tensor) -> None:
    before, truth = copy.deepcopy(net.state_dict()), by_hand(net, images)["body"]
    parent = Student(Teacher(net, "body"))
    parent.double()
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float64)
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name
    torch.testing.assert_close(parent.teacher(images.double())["body"].float(), truth)
    assert not any(p.requires_grad for p in net.parameters())
    parent.to(memory_format=torch.channels_last)
    assert net.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    parent.share_memory()
    assert all(tensor.is_shared() for tensor in net.parameters())
    parent.to("meta")
    assert net.head.weight.is_meta


def test_weights_that_are_not_there_are_no_weights() -> None:
    with torch.device("meta"):
        parent = Parent(Teacher(nn.Sequential(nn.Linear(3, 3)), ["0"]))
    with pytest.raises(RuntimeError, match=r"the teacher has no weights yet.*load them before"):
        parent.to_empty(device="cpu")


def ddp_worker(rank: int) -> None:
    """A student that holds its teacher, under DDP: in step with the other process, the teacher untouched."""
    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net.state_dict())
    model = DistributedDataParallel(Student(Teacher(net, "body")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        model.train()(x).backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert both[0].equal(both[1])
    assert len(mine) == 5 * 3 * 9 + 5 + 10
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_a_teacher_inside_a_ddp_student(tmp_path: Path) -> None:
    run_ranks(ddp_worker, 2, tmp_path)
