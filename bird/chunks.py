"""Batches larger than memory: the exact gradient of BIRD's loss, computed chunk by chunk.

CKA compares every sample with every other, so the CKA losses of chunks do not add up to that of the batch, as task
losses do. But the gradient of a sample's features depends on the other samples only through statistics of all of them
(`bird_kernels.Statistics`). Hence two passes, as GradCache (Gao et al. 2021) makes them for contrastive losses:

1. student and teacher run chunk by chunk without graphs; statistics of their features are kept, or all the features;
2. the student runs again, chunk by chunk with a graph, and the batch's gradient is back-propagated through each chunk.

Only one chunk's graph is in memory at a time. The price is a second forward pass of the student.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from bird_kernels import CKALoss, Statistics, distributed, inputs
from bird_kernels.pairs import stack
from bird_kernels.plan import choose_route

from .losses import BirdLoss, Features
from .structure import named_loss

Chunk = TypeVar("Chunk")

# If a pair's teacher rows take more bytes (65,536 x 1,024 in fp32), they are not kept: the teacher runs again.
TEACHER_BYTES = 1 << 28
FEW_BYTES = 1 << 24  # features of a pair that take no more are kept: one loss is faster than statistics of chunks
RANGE = "bird: CKA"  # the name under which torch.profiler shows the time of CKA and its gradient


def chunked_backward(
    student: Callable[[Chunk], tuple[Tensor, Features]],
    teacher: Callable[[Chunk], Features],
    chunks: Sequence[Chunk],
    loss: BirdLoss,
    *,
    model: nn.Module,
    gradient: Tensor | float = 1.0,
) -> Tensor:
    r"""Add to ``.grad`` the gradient of ``loss`` over a batch of which one chunk at a time is in memory.

    ::

        def forward(chunk):
            x, y = chunk
            return F.cross_entropy(model(x), y, reduction="sum") / len(images), taps.pop()

        chunks = list(zip(images.split(512), labels.split(512)))
        optimizer.zero_grad()
        loss = chunked_backward(forward, lambda chunk: teacher(chunk[0]), chunks, criterion, model=model)
        optimizer.step()

    It is the gradient of ``loss(sum of the tasks, all teacher rows, all student rows)`` with the model run on each
    chunk by itself: batch normalisation uses the chunk's statistics. Before a chunk runs again, the global random
    generators (Python's, NumPy's, PyTorch's of the CPU and of the model's devices) and the model's buffers are reset to
    their state before its first run, so dropout repeats its masks; in the end both have advanced by one pass only.
    Random numbers from other generators, or from a worker, do not repeat; a comparison of sampled features detects it
    where features differ by more than some 5 %. Autocast works both around the call and inside the functions.

    Under `DistributedDataParallel` gradients are communicated in the last chunk's backward only. With a ``group``, CKA
    compares the samples of all its ranks, each of which needs a chunk, and the gradient is scaled for DDP's average.

    Args:
        student: runs ``model`` on a chunk; returns the chunk's part of the task loss (0-d; the parts are summed) and
            the features ``{layer: [m, P]}``, as `bird.Taps.pop` does. Rows that do not count, padding for example, must
            be left out here and by ``teacher``. Called twice for each chunk, first without a graph.
        teacher: returns ``{layer: [m, Q]}`` of the same samples. Called again in the second pass for batches whose
            teacher rows take more than `TEACHER_BYTES`.
        chunks: items that the functions accept. Each is indexed once per pass, under the same random state, so a
            sequence may load and augment lazily.
        loss: its weights, pairs and options are used, and ``loss.last`` is set. CKA with the "linear" kernel keeps
            statistics if the batch has more samples than both layers together have features and these take more than
            `FEW_BYTES`, and always in a group; otherwise all features ``[n, P + Q]`` are kept.
        model: the student, bare or in DDP.
        gradient: multiplies all gradients, as in `torch.Tensor.backward`: ``scaler.scale(torch.ones(()))`` with a
            GradScaler, ``1 / k`` where k batches make a step.

    Returns:
        The loss, 0-d and detached, without the factor ``gradient``; its task part is this rank's alone.

    Raises:
        ValueError: ``chunks`` is empty; ``loss="cka_difference"``; also whatever ``loss`` raises. With ``group`` every
            rank raises, and so it does for other errors of the first pass (if DDP broadcasts buffers: from the second
            chunk on).
        RuntimeError: nothing that ``student`` returns requires grad; or the features of the second pass differ from
            those of the first, and what was added to ``.grad`` is wrong.
    """
    _start(chunks, loss)
    replay = _Replay(model)
    with distributed.Reported(loss.distance.options["group"]):
        pairs = _first_pass(student, teacher, chunks, loss, replay)
    beta = loss.current_beta()
    shares = [beta * weight for weight in ([1.0] * len(pairs) if loss.weights is None else loss.weights)]
    with torch.no_grad():  # learned weights get their own gradient at the end, from total.backward
        upstream, *upstreams = (share * gradient for share in (loss.alpha, *shares))
    with record_function(RANGE):
        distances = [pair.settle(factor) for pair, factor in zip(pairs, upstreams, strict=True)]
    task, norms = _second_pass(student, teacher, chunks, loss, replay, pairs, upstream=upstream)

    total = loss.weighed(task, stack(distances), norms)
    if total.requires_grad:
        total.backward(torch.ones_like(total).mul_(gradient))
    return total.detach()


def _start(chunks: Sequence[object], loss: BirdLoss) -> None:
    """Raise a ValueError if there are no chunks or ranks disagree, before any forward: DDP may communicate in one."""
    options: dict[str, Any] = dict(loss.distance.options) | {"loss": loss.loss}
    group = options.pop("group")
    with distributed.Reported(group):
        if loss.loss == "cka_difference":
            raise ValueError('loss="cka_difference" pairs the halves of a batch, which chunks do not have: take others')
        if len(chunks) == 0:
            raise ValueError("chunks is empty: a batch has at least one")
    if group is not None and distributed.world_size(group) > 1:
        distributed.agree(group, None, {"statistic": "chunked_backward", "pairs": len(loss.pairs)} | options, ())


@torch.no_grad()
def _first_pass(
    student: Callable[[Chunk], tuple[Tensor, Features]],
    teacher: Callable[[Chunk], Features],
    chunks: Sequence[Chunk],
    loss: BirdLoss,
    replay: _Replay,
) -> list[_Kept | _Merged]:
    """Run all chunks without graphs; return the kept features or statistics of each pair of layers."""
    pairs: list[_Kept | _Merged] = []
    for i in range(len(chunks)):
        replay.record()
        chunk = chunks[i]
        _, ours = student(chunk)
        rows = [(x, y) for _, y, x in loss.matched(teacher(chunk), ours)]
        pairs = pairs or [_pair(loss, x, y, len(chunks)) for x, y in rows]
        with record_function(RANGE):
            for pair, (x, y) in zip(pairs, rows, strict=True):
                pair.add(x, y)
        replay.samples.append(_samples(rows, pairs))
    return pairs


@torch.enable_grad()
def _second_pass(
    student: Callable[[Chunk], tuple[Tensor, Features]],
    teacher: Callable[[Chunk], Features],
    chunks: Sequence[Chunk],
    loss: BirdLoss,
    replay: _Replay,
    pairs: Sequence[_Kept | _Merged],
    *,
    upstream: Tensor | float,
) -> tuple[Tensor, Tensor | None]:
    """Back-propagate chunk by chunk; return the task loss and the norms of the gradients, see `bird.taps.Measured`.

    ``upstream`` is the gradient with respect to the task loss.
    """
    tasks, norms, others = [], [], []
    for i in replay.rewound():
        with replay.silence() if i + 1 < len(chunks) else contextlib.nullcontext():
            chunk = chunks[i]
            task, ours = student(chunk)
            theirs = teacher(chunk) if any(pair.forgets for pair in pairs) else {}
            roots, gradients, rows = [task], [torch.ones_like(task).mul_(upstream)], []
            for (t, s), pair in zip(loss.pairs, pairs, strict=True):
                roots.append(ours[s])
                rows.append((ours[s].detach(), theirs.get(t)))
                with record_function(RANGE):
                    gradients.append(pair.gradient(i, *rows[-1]))
            _backward(roots, gradients)
        if (measured := getattr(ours, "norms", None)) is not None:
            norms.append(measured)
        tasks.append(task.detach())
        others.append(torch.stack([*map(_differ, replay.samples[i], _samples(rows, pairs))]).any())
    if any(different := torch.stack(others).tolist()):  # the only place where the host waits for the device
        raise RuntimeError(_NOT_REPEATED.format(different.index(True)))
    return torch.stack(tasks).sum(), torch.stack(norms).norm(dim=0) if norms else None


_NOT_REPEATED = (
    "chunk {}, and perhaps others, gave other features in the second pass than in the first, so the gradients that it "
    "added are wrong: zero them. Something draws from a generator of its own, or keeps a state outside of the model's "
    "buffers: augment before chunked_backward, or from torch's, NumPy's or Python's global generator"
)


def _samples(rows: Sequence[tuple[Tensor, Tensor | None]], pairs: Sequence[_Kept | _Merged]) -> list[Tensor]:
    """Copies (fp32) of up to 8,191 numbers of each tensor that both passes compute, in columns at all places (an odd
    step). A view would keep all features in memory, and follow a buffer that the next chunk reuses."""
    both = 1 + any(pair.forgets for pair in pairs)
    sides = [side for row in rows for side in row[:both] if side is not None]
    return [side.reshape(-1)[:: side.numel() // 4096 | 1].to(torch.float32, copy=True) for side in sides]


def _differ(before: Tensor, after: Tensor) -> Tensor:
    """Whether two samples differ by more than rounding, 0-d bool: kernels may round differently with a graph."""
    if (other := len(before) != len(after)) or (before.is_cpu and torch.equal(before, after)):  # a GPU would wait
        return torch.full((), other, dtype=torch.bool, device=before.device)
    return (after - before).norm() > 0.05 * (before - before.mean()).norm() + 0.01 * before.norm()


def _backward(roots: list[Tensor], gradients: list[Tensor]) -> None:
    """Run backward from all roots at once, so that each layer runs once; roots without a graph are skipped."""
    chosen = [root.requires_grad for root in roots]
    if not any(chosen):
        raise RuntimeError("neither the task nor the features of a chunk have a graph: no parameter requires grad")
    with torch.autocast(roots[0].device.type, enabled=False):
        torch.autograd.backward([*compress(roots, chosen)], [*compress(gradients, chosen)])


def keeps_features(
    n: int, p: int, q: int, kernel: object = "linear", backend: str = "auto", group: object = None
) -> bool:
    """Whether the features of a pair of layers (n samples; p and q features) are kept, and not their statistics.

    Statistics exist for the linear kernel only, in plain PyTorch. Otherwise keeping the features is cheaper exactly
    where the route over Gram matrices is (`bird_kernels.plan`); ranks of a group, whose n may differ, must agree.
    """
    if kernel != "linear" or backend not in ("auto", "library"):
        return True
    return group is None and choose_route(n, p, q) == "gram"


def _pair(loss: BirdLoss, x: Tensor, y: Tensor, chunks: int) -> _Kept | _Merged:
    """What to keep of a pair of layers between the passes, decided by the sizes of its first chunk."""
    options, row_dims = loss.distance.options, loss.distance.options["row_dims"]
    n = math.prod(x.shape[:row_dims]) * chunks
    p, q = (math.prod(side.shape[row_dims:]) for side in (x, y))
    few = options["group"] is None and n * (p * x.element_size() + q * y.element_size()) <= FEW_BYTES
    if loss.loss != "cka" or few or keeps_features(n, p, q, options["kernel"], options["backend"], options["group"]):
        return _Kept(loss)
    return _Merged(options, n * q * y.element_size() > TEACHER_BYTES)


class _Kept:
    """A pair of layers of which all features are kept between the passes."""

    forgets = False

    def __init__(self, loss: BirdLoss) -> None:
        self.options = loss.distance.options
        alone = {name: value for name, value in self.options.items() if name != "sqrt"} | {"row_dims": 1}
        self.distance: CKALoss = named_loss(loss.loss, **alone)
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y, _ = inputs.as_rows(x, y, None, self.options["row_dims"])
        self.x.append(x.clone())  # a view may keep far more in memory (one token of all), or the memory be used again
        self.y.append(y.clone())

    def settle(self, upstream: Tensor | float) -> Tensor:
        """Return the distance 1 - CKA, 0-d, and compute the gradients, multiplied by ``upstream``."""
        with torch.enable_grad():
            with distributed.Reported(self.options["group"]):
                x, y = torch.cat(self.x).requires_grad_(), torch.cat(self.y)
            value = self.distance(x, y)
        (dx,) = torch.autograd.grad(value, x, torch.ones_like(value).mul_(upstream))
        self.dx = dx.split([len(part) for part in self.x])
        return value.detach()

    def gradient(self, i: int, x: Tensor, y: Tensor | None) -> Tensor:
        """The gradient of chunk i's student features x, in their shape; y may be None where it was kept."""
        return self.dx[i].view_as(x)


class _Merged:
    """A pair of layers of which statistics are kept and, unless ``forgets``, the teacher's features for gradients."""

    def __init__(self, options: dict[str, Any], forgets: bool) -> None:
        self.statistics, self.options = Statistics(precision=options["precision"]), options
        self.forgets = forgets
        self.y: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        self.statistics.update(x, y, row_dims=self.options["row_dims"])
        self.dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        if not self.forgets:
            self.y.append(y.clone())

    def settle(self, upstream: Tensor | float) -> Tensor:
        """As `_Kept.settle`."""
        group = self.options["group"]
        if group is not None:
            self.statistics.all_reduce(group)
        upstream = upstream.to(self.dtype) if isinstance(upstream, Tensor) else upstream
        self.upstream = upstream if group is None else upstream * distributed.world_size(group)
        return (1 - self.statistics.cka(self.options["estimator"])).to(self.dtype)

    def gradient(self, i: int, x: Tensor, y: Tensor | None) -> Tensor:
        """As `_Kept.gradient`."""
        y = self.y[i] if y is None else y
        estimator, row_dims = self.options["estimator"], self.options["row_dims"]
        return self.statistics.gradient(x, y, estimator, row_dims=row_dims, upstream=self.upstream)


class _Replay:
    """The state that a forward pass reads and changes: random generators, buffers, DDP's flag to broadcast them."""

    def __init__(self, model: nn.Module) -> None:
        self.devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
        self.states: list[dict[Any, Any]] = []
        self.samples: list[list[Tensor]] = []  # of each chunk: `_samples` of its features
        self.buffers = [
            (module._buffers, name, buffer, None if buffer is None else buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self.parallel = model if isinstance(model, DistributedDataParallel) else None
        # Whether DDP broadcasts rank 0's buffers at the start of the next forward.
        self.takes_buffers = self.parallel is not None and self.parallel.require_forward_param_sync

    def record(self) -> None:
        """Save the state of the random generators before the next chunk's first run."""
        self.states.append(random_state(self.devices))

    @torch.no_grad()
    def rewind(self) -> None:
        for owner, name, buffer, value in self.buffers:
            if buffer is not None and value is not None:
                buffer.copy_(value)
            owner[name] = buffer
        if self.parallel is not None:
            self.parallel.require_forward_param_sync = self.takes_buffers
        torch.clear_autocast_cache()  # older PyTorch keeps weights in it that were cast without a graph (#158232)

    def rewound(self) -> Iterator[int]:
        """Yield each chunk's index with the state before its first run restored; at the end, restore the last one."""
        end = random_state(self.devices)
        self.rewind()
        for i, state in enumerate(self.states):
            set_random_state(state)
            yield i
        set_random_state(end)

    def silence(self) -> contextlib.AbstractContextManager[None]:
        """A context in which DDP does not communicate gradients."""
        return contextlib.nullcontext() if self.parallel is None else self.parallel.no_sync()


# How the state of each global generator is read and set.
_GLOBAL: dict[object, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "numpy": (np.random.get_state, np.random.set_state),
    "python": (random.getstate, random.setstate),
}


def random_state(devices: Iterable[torch.device]) -> dict[Any, Any]:
    """The states of the global random generators: Python's, NumPy's, PyTorch's of the CPU and of ``devices``."""
    own: dict[Any, Any] = {name: read() for name, (read, _) in _GLOBAL.items()}
    return own | {d: torch.get_device_module(d).get_rng_state(d) for d in devices}


def set_random_state(state: Mapping[Any, Any]) -> None:
    """Restore the states that `random_state` returned."""
    for name, own in state.items():
        if isinstance(name, torch.device):
            torch.get_device_module(name).set_rng_state(own, name)
        else:
            _GLOBAL[name][1](own)
