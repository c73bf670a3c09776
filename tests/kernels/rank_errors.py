"""Calls that the last rank makes otherwise than the others, or that fail on it before the ranks would have agreed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

import bird
import bird_kernels
from bird_kernels import distributed
from tests.accuracy import features
from tests.kernels.ranks import forced, raised


def sides(pairs: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Student's and teacher's features of so many pairs, 6 rows of 4 and 3."""
    xs, ys = zip(*(features(6, 4, 3, seed=seed) for seed in range(pairs)), strict=True)
    return list(xs), list(ys)


def same(side: Any) -> Any:
    return side


def single(
    odd: bool,
    x: Callable[[Tensor], Any] = same,
    y: Callable[[Tensor], Any] = same,
    function: Callable[..., Any] = bird_kernels.cka_loss,
    **options: Any,
) -> None:
    """The last rank's own features of one pair, function and options."""
    a, b = torch.randn(6, 4), torch.randn(6, 3)
    if odd:
        function(x(a), y(b), group=dist.group.WORLD, **options)
    else:
        bird_kernels.cka_loss(a, b, group=dist.group.WORLD)


def forward_mode(odd: bool) -> None:
    with forward_ad.dual_level() if odd else nullcontext():
        single(odd, lambda x: forward_ad.make_dual(x, torch.ones_like(x)))


def transformed(odd: bool) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    function = functools.partial(bird_kernels.cka_loss, y=y, group=dist.group.WORLD)
    torch.func.grad(function)(x) if odd else function(x)


def few_rows(odd: bool) -> None:
    rows = 3 if odd else 0
    bird_kernels.cka_loss(torch.randn(rows, 4), torch.randn(rows, 3), estimator="unbiased", group=dist.group.WORLD)


def number_of_pairs(odd: bool) -> None:
    bird_kernels.cka_loss(*sides(3 if odd else 2), group=dist.group.WORLD)


def member(odd: bool) -> None:
    xs, ys = sides()
    bird_kernels.cka_loss([xs[0], "x" if odd else xs[1]], ys, group=dist.group.WORLD)  # type: ignore[list-item]


def rows_of_a_pair(odd: bool) -> None:
    xs, ys = sides()
    bird_kernels.cka_loss(xs, [ys[0], ys[1][:5] if odd else ys[1]], group=dist.group.WORLD)


def list_and_tensor(odd: bool) -> None:
    xs, ys = sides()
    bird_kernels.cka_loss(xs, ys[0] if odd else ys, group=dist.group.WORLD)


def lists_and_tensors(odd: bool) -> None:
    xs, ys = sides()
    bird_kernels.cka_loss(*((xs, ys) if odd else (xs[0], ys[0])), group=dist.group.WORLD)


def number_of_weights(odd: bool) -> None:
    bird_kernels.cka_loss(*sides(), weights=[1.0] if odd else [1.0, 2.0], group=dist.group.WORLD)


def kind_of_weights(odd: bool) -> None:
    weights: Any = [1.0, "two"] if odd else [1.0, 2.0]
    bird_kernels.cka_loss(*sides(), weights=weights, group=dist.group.WORLD)


def weights_of_tensors(odd: bool) -> None:
    (x,), (y,) = sides(1)
    bird_kernels.cka_loss(x, y, weights=[1.0] if odd else None, group=dist.group.WORLD)


def mask_of_the_second_pair(odd: bool) -> None:
    """Found where each pair is prepared, after the first one's collectives."""
    xs, ys = sides()
    if odd:
        ys[1] = ys[1].to("meta")
    bird_kernels.cka_loss(xs, ys, group=dist.group.WORLD)


def token_mask(odd: bool) -> None:
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    mask = torch.ones(3, 6 if odd else 5, dtype=torch.bool)
    bird_kernels.token_cka_loss(x, y, mask=mask, group=dist.group.WORLD)


def sequences(odd: bool) -> None:
    """The mode that knows no group."""
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    bird_kernels.token_cka_loss(x, y, tokens="sequence" if odd else "mean", group=dist.group.WORLD)


def layer(odd: bool) -> None:
    xs, ys = sides()
    loss = bird.BirdLoss(pairs=[("t", "s"), ("u", "v")], group=dist.group.WORLD)
    student = {"s": xs[0], "w" if odd else "v": xs[1]}
    loss(torch.zeros(()), {"t": ys[0], "u": ys[1]}, student)


def in_chunks(odd: bool, chunks: int = 2, name: str = "s", kernel: str = "linear", width: int = 4) -> None:
    """The last rank has so many chunks, and calls its layer so; in the last chunk it is so wide."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    loss = bird.BirdLoss(pairs=[("t", "s")], group=dist.group.WORLD, kernel=kernel)
    rows, others = features(12, 4, 3, seed=dist.get_rank())
    parts = list(zip(rows.split(6), others.split(6), strict=True))

    def student(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found = model(chunk[0])
        narrow = odd and chunk is parts[-1]
        return found.sum(), {name if odd else "s": found[:, : width if narrow else 4]}

    bird.chunked_backward(student, lambda chunk: {"t": chunk[1]}, parts[: chunks if odd else 2], loss, model=model)


def statistics(odd: bool, width: int = 4, device: str = "cpu") -> None:
    """The last rank has so wide features, and its statistics on this device."""
    found = bird_kernels.Statistics()
    found.update(*features(6, width if odd else 4, 3))
    if odd and device != "cpu":
        state = {name: value.to(device) for name, value in found.state_dict().items() if name != "eps"}
        found = bird_kernels.Statistics.from_state_dict(state | {"eps": torch.ones(())})
    found.all_reduce()


# What the last rank raises, in which words; and whether it alone is to blame, or all ranks find that they differ.
COMPLAINTS: dict[str, tuple[Callable[[bool], None], str, str]] = {
    "width": (lambda odd: single(odd, lambda x: x[:, :2]), "differ", "p is 4 on rank {others}, 2 on rank {last}"),
    "dtype": (
        lambda odd: single(odd, Tensor.double), "differ",
        "dtype is torch.float32 on rank {others}, torch.float64 on rank {last}",
    ),
    "estimator": (
        lambda odd: single(odd, estimator="unbiased"), "differ",
        "estimator is 'biased' on rank {others}, 'unbiased' on rank {last}",
    ),
    "statistic": (
        lambda odd: single(odd, function=bird_kernels.hsic), "differ",
        "statistic is 'cka_loss' on rank {others}, 'hsic' on rank {last}",
    ),
    "mask": (lambda odd: single(odd, mask=torch.ones(6)), "TypeError", "mask must be a bool tensor"),
    "not a tensor": (lambda odd: single(odd, lambda x: "x"), "TypeError", "x must be a torch.Tensor, got str"),
    "rows": (
        lambda odd: single(odd, y=lambda y: y[:5]), "ValueError",
        "x and y must have the same rows, got (6,) for x and (5,) for y",
    ),
    "forward mode": (forward_mode, "RuntimeError", "group= has no forward-mode derivative: use reverse mode"),
    "transform": (transformed, "RuntimeError", "group= does not work inside torch.func transforms: use autograd"),
    "few rows": (few_rows, "differ", "needs at least 4 rows, got 3 in all"),
    "pairs": (number_of_pairs, "differ", "pairs is 2 on rank {others}, 3 on rank {last}"),
    "member": (member, "TypeError", "x[1] must be a torch.Tensor, got str"),
    "rows of a pair": (rows_of_a_pair, "ValueError", "x[1] and y[1] must have the same rows, got (6,) and (5,)"),
    "list and tensor": (list_and_tensor, "TypeError", "x must be a torch.Tensor, got list, because y is no list"),
    "lists and tensors": (lists_and_tensors, "differ", "pairs is 1 on rank {others}, 2 on rank {last}"),
    "weights": (number_of_weights, "ValueError", "weights must have one number for each pair, got 1 for 2"),
    "kind of weights": (kind_of_weights, "ValueError", "could not convert string to float: 'two'"),
    "weights of tensors": (weights_of_tensors, "ValueError", "weights are for lists of pairs"),
    "second pair": (mask_of_the_second_pair, "ValueError", "x and y must be on one device"),
    "token mask": (token_mask, "ValueError", "mask must have the shape of the rows, (3, 5), got (3, 6)"),
    "sequences": (sequences, "ValueError", 'tokens="sequence" takes an estimator and no group'),
    "layer": (layer, "ValueError", "student_features has no layer 'v'"),
    "no chunks": (lambda odd: in_chunks(odd, chunks=0), "ValueError", "chunks is empty"),
    "layer in chunks": (lambda odd: in_chunks(odd, name="z"), "ValueError", "student_features has no layer 's'"),
    "kernel in chunks": (
        lambda odd: in_chunks(odd, kernel="rbf" if odd else "linear"), "differ",
        "kernel is 'linear' on rank {others}, 'rbf' on rank {last}",
    ),
    "widths in chunks": (
        lambda odd: in_chunks(odd, kernel="rbf", width=3), "RuntimeError", "Sizes of tensors must match",
    ),
    "widths of statistics": (
        lambda odd: statistics(odd, width=5), "differ",
        "4 and 3 on cpu (rank 0), {between}5 and 3 on cpu (rank {last})",
    ),
    "no statistics": (lambda odd: bird_kernels.Statistics().all_reduce(), "differ", "they have none (rank 0), "),
    "device of statistics": (
        lambda odd: statistics(odd, device="meta"), "ValueError", "the features are on meta",
    ),
}  # fmt: skip


def complaint(what: str) -> list[tuple[str, str]]:
    """Type and message of this rank's error: where nothing was agreed on, and where the others are in a known call."""
    call, *_ = COMPLAINTS[what]
    found = []
    for before in ("", "merged", "gathered"):
        distributed._HISTORIES.clear()
        with forced(before or "gathered"):
            for _ in range(2 if before else 0):
                single(False)
            found.append(raised(lambda: call(dist.get_rank() == dist.get_world_size() - 1)))
    return found
