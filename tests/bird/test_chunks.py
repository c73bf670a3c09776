"""A batch in chunks: gradient, loss, random state and buffers are those of one graph over all of them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bird import RBF, BirdLoss, Taps, Teacher, chunked_backward, chunks
from bird.chunks import keeps_features
from tests.groups import run_ranks

CUTS = [20, 5, 30, 6]
PAIRS = [("0", "0"), ("3", "4"), ("3", "0")]  # one student layer in two pairs
WEIGHTS = [0.5, 2.0, 0.25]


class Drift(nn.Module):
    """A buffer that every forward changes and reads, as spectral normalisation does."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.state += 0.1 * self.state.cos()
        return x * self.state.clone()


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, width),
        nn.Sequential(nn.BatchNorm1d(width), Drift()),
        nn.Dropout(0.4),
        nn.Linear(width, 7),
        nn.Tanh(),
        nn.Linear(7, 3),
    )


class Setup:
    """A student, a teacher, and a batch in chunks."""

    def __init__(self, width: int = 6, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.model = network(width, 0).to(dtype)
        self.teacher = Teacher(network(width + 1, 1).to(dtype), ["0", "3"])
        self.taps = Taps(self.model, ["0", "4"])
        self.loss = BirdLoss(0.3, 0.7, PAIRS, **options)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(sum(CUTS), 10, dtype=dtype, generator=generator) + 1
        self.chunks: Sequence[tuple[Tensor, Tensor]] = list(
            zip(x.split(CUTS), (torch.arange(len(x)) % 3).split(CUTS), strict=True)
        )
        self.run: nn.Module = self.model

    def student(self, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, labels = chunk
        return F.cross_entropy(self.run(x), labels, reduction="sum") / sum(CUTS), self.taps.pop()

    def guides(self, chunk: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return self.teacher(chunk[0])

    def whole(self) -> Tensor:
        """One graph over all chunks."""
        tasks, ours, theirs = [], [], []
        for i in range(len(self.chunks)):
            chunk = self.chunks[i]
            task, rows = self.student(chunk)
            tasks.append(task)
            ours.append(rows)
            theirs.append(self.guides(chunk))
        total = self.loss(
            torch.stack(tasks).sum(), *({k: torch.cat([a[k] for a in s]) for k in s[0]} for s in (theirs, ours))
        )
        total.backward()
        return total.detach()

    def chunked(self, **options: Any) -> Tensor:
        return chunked_backward(self.student, self.guides, self.chunks, self.loss, model=self.run, **options)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]


def seeded(run: Callable[..., Tensor], **options: Any) -> Tensor:
    torch.manual_seed(7)
    return run(**options)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative error of a gradient."""
    ours, theirs = (torch.cat([part.flatten() for part in side]) for side in (a, b))
    return float((ours - theirs).norm() / theirs.norm())


MERGED_OR_KEPT = pytest.mark.parametrize("width", [6, 80], ids=["merged", "kept"])


@pytest.mark.parametrize("forgets", [False, True])
@MERGED_OR_KEPT
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=str)
def test_it_is_the_gradient_of_the_whole_batch(
    dtype: torch.dtype, bound: float, width: int, estimator: str, forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, batch normalisation and a buffer that steers: each chunk's as in one pass, bit for bit."""
    assert keeps_features(sum(CUTS), width, width + 1) == (width == 80)
    if forgets:
        monkeypatch.setattr(chunks, "TEACHER_BYTES", 0)
    one, two = (Setup(width, dtype, estimator=estimator) for _ in range(2))
    for _ in range(2):  # the second call adds to .grad, and to what the first left in the buffers
        value, after = seeded(one.whole), torch.get_rng_state()
        got = seeded(two.chunked)
        assert torch.equal(torch.get_rng_state(), after)
    for ours, theirs in zip(two.model.buffers(), one.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert distance(two.gradients(), one.gradients()) < bound
    assert (got.shape, got.dtype, got.requires_grad) == ((), dtype, False)
    assert abs(got - value) < bound
    assert two.loss.last.keys() == one.loss.last.keys()
    assert all(abs(two.loss.last[name] - term) < bound for name, term in one.loss.last.items())


@MERGED_OR_KEPT
def test_pairs_may_weigh_differently(width: int) -> None:
    one, two, equal = (Setup(width, weights=weights) for weights in (WEIGHTS, WEIGHTS, None))
    values = [seeded(run) for run in (one.whole, two.chunked, equal.chunked)]
    assert distance(two.gradients(), one.gradients()) < 1e-10
    assert abs(values[1] - values[0]) < 1e-10
    assert distance(equal.gradients(), one.gradients()) > 0.01
    assert abs(values[2] - values[0]) > 1e-3


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 5), min_size=2, max_size=12).filter(lambda cuts: sum(cuts) >= 8),
    width=st.sampled_from([2, 40]),
    seed=st.integers(0, 2**16),
    estimator=st.sampled_from(["biased", "unbiased"]),
    kernel=st.sampled_from(["linear", RBF(), RBF(flow=True)]),
)
def test_any_cuts(cuts: list[int], width: int, seed: int, estimator: str, kernel: str | RBF) -> None:
    """However the batch is cut, with chunks of one row and of none: value and gradient of the whole, in fp64."""
    torch.manual_seed(seed)
    x, y, labels = (torch.randn(sum(cuts), d, dtype=torch.float64) for d in (5, width + 1, 3))
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()
    loss = BirdLoss(0.3, 0.7, [("t", "0")], estimator=estimator, kernel=kernel)

    def student(chunk: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = model[0](chunk[0])
        return (model[1:](rows) - chunk[2]).square().sum() / len(x), {"0": rows}

    task, ours = student((x, y, labels))
    whole = loss(task, {"t": y}, ours)
    expected = torch.autograd.grad(whole, [*model.parameters()])
    parts = list(zip(x.split(cuts), y.split(cuts), labels.split(cuts), strict=True))
    value = chunked_backward(student, lambda chunk: {"t": chunk[1]}, parts, loss, model=model)
    assert abs(value - whole) < 1e-10
    assert distance([p.grad for p in model.parameters() if p.grad is not None], [*expected]) < 1e-10


class _Noisy(Sequence[tuple[Tensor, Tensor]]):
    """Chunks that are augmented when they are fetched."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.parts = parts
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: Any) -> Any:
        self.fetched.append(i)
        x, labels = self.parts[i]
        return x + torch.randn_like(x), labels


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_chunks_may_be_made_on_the_way_and_teachers_draw(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "TEACHER_BYTES", limit)
    one, two = Setup(), Setup()
    for setup in (one, two):
        setup.chunks = _Noisy(setup.chunks)
        guides = setup.guides
        setup.guides = lambda chunk, guides=guides: {k: v + torch.randn_like(v) for k, v in guides(chunk).items()}  # type: ignore[method-assign]
    seeded(one.whole)
    after = torch.get_rng_state()
    seeded(two.chunked)
    assert two.chunks.fetched == 2 * [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert torch.equal(torch.get_rng_state(), after)
    assert distance(two.gradients(), one.gradients()) < 1e-10


@MERGED_OR_KEPT
def test_the_teacher_runs_once_for_a_chunk_if_its_rows_are_kept(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, runs in ((1 << 20, 4), (0, 4 if width == 80 else 8)):
        setup = Setup(width)
        setup.loss.pairs = PAIRS[:1]
        rows: list[weakref.ref[Tensor]] = []
        left: list[int] = []

        def guides(chunk: tuple[Tensor, Tensor], own: Any = setup, rows: Any = rows, left: Any = left) -> Any:
            left.append(sum(ref() is not None for ref in rows))
            features = own.teacher(chunk[0])
            rows.append(weakref.ref(features["0"]))
            return features

        setup.guides = guides  # type: ignore[method-assign]
        monkeypatch.setattr(chunks, "TEACHER_BYTES", limit)
        setup.chunked()
        assert len(left) == runs
        if runs == 8:
            assert max(left) <= 1  # the last chunk's


@MERGED_OR_KEPT
def test_a_factor_reaches_every_gradient_before_it_is_rounded(width: int) -> None:
    """A GradScaler's kind of factor: fp16 gradients that are too small without it."""
    one, two, three = (Setup(width, torch.float32) for _ in range(3))
    seeded(one.chunked)
    seeded(two.chunked, gradient=torch.tensor(2.0**24))
    assert distance([g / 2**24 for g in two.gradients()], one.gradients()) < 1e-6

    seen: list[Tensor] = []
    student = three.student

    def halved(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task, rows = student(chunk)
        half = {name: x.half() for name, x in rows.items()}
        for x in half.values():
            if x.requires_grad:
                x.register_hook(seen.append)
        return task, half

    three.student = halved  # type: ignore[method-assign]
    seeded(three.chunked, gradient=1e-6)
    assert not all(g.any() for g in seen)
    seen.clear()
    three.chunked(gradient=1e2)
    assert all(g.dtype == torch.float16 and (g != 0).all() for g in seen)


@pytest.mark.parametrize("around", [True, False])
@MERGED_OR_KEPT
def test_autocast_is_kept(width: int, around: bool) -> None:
    """Weights that autocast has cast in the first pass have no graph: were they used again, gradients were lost."""
    one, two, plain = (Setup(width, torch.float32) for _ in range(3))
    autocast = lambda on: torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)  # noqa: E731
    student = two.student
    backward: list[bool] = []  # must not run under autocast (PyTorch's advice)

    def inside(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(True):
            task, rows = student(chunk)
        if task.requires_grad:
            task.register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))
        return task, rows

    two.student = inside  # type: ignore[method-assign]
    two.guides = autocast(True)(two.guides)  # type: ignore[method-assign]
    for setup, run, on in ((one, one.whole, True), (two, two.chunked, around), (plain, plain.whole, False)):
        with autocast(on):
            seeded(run)
        assert setup.loss.last["cka/0/0"].dtype == torch.float32
    assert backward == 4 * [False]
    assert distance(two.gradients(), one.gradients()) < 0.004  # bf16: one sums the chunks' gradients in it, two in fp32
    assert distance(two.gradients(), plain.gradients()) > 0.004


@pytest.mark.parametrize("width", [6, 200], ids=["merged", "kept"])
def test_tokens_are_rows(width: int) -> None:
    """Two tokens of half the features: twice the rows."""
    one, two = Setup(width, row_dims=2), Setup(width, row_dims=2)
    for setup in (one, two):
        setup.loss.pairs = PAIRS[:1]
        student, guides = setup.student, setup.guides

        def halves(chunk: tuple[Tensor, Tensor], student: Any = student) -> tuple[Tensor, dict[str, Tensor]]:
            task, rows = student(chunk)
            return task, {"0": rows["0"].unflatten(1, (2, -1))}

        setup.student = halves  # type: ignore[method-assign]
        setup.guides = lambda chunk, guides=guides: {"0": guides(chunk)["0"][:, :width].unflatten(1, (2, -1))}  # type: ignore[method-assign]
        seeded(setup.whole if setup is one else setup.chunked)
    assert distance(two.gradients(), one.gradients()) < 1e-10
    assert abs(two.loss.last["cka/0/0"] - one.loss.last["cka/0/0"]) < 1e-12


def test_a_part_without_gradients_is_left_out() -> None:
    one, two = Setup(), Setup()
    for setup in (one, two):
        setup.model[0].requires_grad_(False)
        setup.model[1][0].requires_grad_(False)
    seeded(one.whole)
    seeded(two.chunked)
    assert distance(two.gradients(), one.gradients()) < 1e-10
    for p in two.model.parameters():
        p.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter requires grad"):
        two.chunked()


def test_mistakes_are_named() -> None:
    setup = Setup()
    with pytest.raises(ValueError, match="chunks is empty"):
        chunked_backward(setup.student, setup.guides, [], setup.loss, model=setup.model)
    setup.loss.pairs = [("0", "9")]
    with pytest.raises(ValueError, match="student_features has no layer '9'"):
        setup.chunked()


def test_the_route_is_a_function_of_sizes() -> None:
    assert [keeps_features(n, 512, 512) for n in (1, 1024, 1025, 32768)] == [True, True, False, False]
    assert keeps_features(1025, 512, 513)
    assert keeps_features(32768, 512, 512, kernel="rbf")
    assert keeps_features(32768, 512, 512, kernel="rbf", group=object())
    assert not keeps_features(1, 512, 512, group=object())  # another rank may have more
    kept = [keeps_features(32768, 8, 8, backend=name) for name in ("auto", "library", "triton", "reference")]
    assert kept == [False, False, True, True]


# Several processes: one batch of all ranks, by statistics and by gathered features, under DDP


def _rank(rank: int) -> None:
    for kernel in ("linear", "rbf"):  # by statistics, by gathered features
        _compare(rank, kernel)


def _compare(rank: int, kernel: str) -> None:
    truth = Setup(kernel=kernel, weights=WEIGHTS)
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    # Each rank has the dropout of its own seed; both start from rank 0's buffers, by which DDP begins.
    tasks, ours, theirs = [], [], []
    start = copy.deepcopy(truth.model.state_dict())
    for other, part in ((0, slice(0, 3)), (1, slice(3, 4))):
        torch.manual_seed(other)
        for name, buffer in truth.model.named_buffers():
            buffer.data = start[name].clone()
        for chunk in truth.chunks[part]:
            task, rows = truth.student(chunk)
            tasks.append(task)
            ours.append(rows)
            theirs.append(truth.guides(chunk))
    rows = [{k: torch.cat([a[k] for a in side]) for k in side[0]} for side in (theirs, ours)]
    truth.loss(torch.stack(tasks).sum() / 2, *rows).backward()  # DDP averages the ranks' tasks

    setup = Setup(kernel=kernel, weights=WEIGHTS, group=dist.group.WORLD)
    setup.chunks = setup.chunks[mine]
    if rank == 1:
        setup.model[1][1].state.fill_(5.0)
    setup.run = DistributedDataParallel(setup.model)
    with torch.no_grad():
        setup.run(setup.chunks[0][0])  # DDP has taken rank 0's buffers now, so undo
    if rank == 1:
        setup.model[1][1].state.fill_(5.0)
    else:
        setup.model.load_state_dict(start)
    setup.run.require_forward_param_sync = True  # as after a step
    messages: list[int] = []

    def average(state, bucket):  # DDP reads annotations, and would not know ours, which are strings
        messages.append(bucket.index())
        dist.all_reduce(bucket.buffer().div_(2))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    setup.run.register_comm_hook(None, average)
    torch.manual_seed(rank)
    setup.chunked()
    assert distance(setup.gradients(), truth.gradients()) < 1e-10
    assert len(messages) == len(set(messages))
    for pair in setup.loss.pairs:
        name = "cka/{}/{}".format(*pair)
        assert abs(setup.loss.last[name] - truth.loss.last[name]) < 1e-12


def test_ranks_compare_all_their_samples(tmp_path: Path) -> None:
    run_ranks(_rank, 2, tmp_path)
