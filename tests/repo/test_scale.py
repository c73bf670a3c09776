"""docs/explain/scale.md says what the formulas give, and its objectives differ as it says."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import run
from benchmarks.rows import load_rows
from benchmarks.scale import ranks
from bird_kernels import transport
from bird_kernels.call import across
from bird_kernels.types import Options
from tools import scale_model


def test_the_page_is_what_the_formulas_give() -> None:
    page = scale_model.PAGE.read_text(encoding="utf-8")
    assert scale_model.with_parts(page, scale_model.sections()) == page, "python -m tools.scale_model writes it anew"
    assert scale_model.PICTURE.exists()


def test_crossover_by_hand() -> None:
    """fp32, 512 + 512 features, 128 rows a rank: upper blocks 163,840. Of 12 ranks two all-reduces take 16 steps, an
    all-gather 11, of 11 ranks 16 and 10; a step is worth 2^18 bytes."""
    merged = 2 * (4 * (2 * 163_840 + 512 * 512) + 8 * 1025)
    rows = 128 * 1024 * 4
    assert merged * 10 // 11 + (16 - 10) * 2**18 > 10 * rows
    assert merged * 11 // 12 + (16 - 11) * 2**18 <= 11 * rows
    assert scale_model.crossover(scale_model.SHAPES[0]) == 12
    assert scale_model.both(scale_model.SHAPES[0], 8) == (merged * 7 // 8, 7 * rows)


def test_latency_by_hand() -> None:
    """Of 512 ranks a ring has 511 steps, a tree 9 levels; 5 us and 1/50 ns a byte of InfiniBand."""
    narrow, few = scale_model.SHAPES[0], scale_model.SHAPES[1]
    total = 8 * 512 + 8 * 1025 + 4 * (2 * 163_840 + 512 * 512)
    assert scale_model.ring_and_tree(narrow, 512, "InfiniBand") == pytest.approx(
        (4 * 511 * 5e-6 + 2 * total * 511 / 512 / 50e9, 4 * 9 * 5e-6 + 2 * total / 50e9)
    )
    rows = 7 * (64 * 4096 * 2 + 8) / 50e9
    assert scale_model.ring_and_tree(few, 8, "InfiniBand") == pytest.approx((7 * 5e-6 + rows, 3 * 5e-6 + rows))


class Allocations(TorchDispatchMode):
    """Storages that operators make and that die, in order: (which, bytes, negative where it dies)."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.living = {tensor.untyped_storage()._cdata: -1 for tensor in known}
        self.events: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.living:
                self.living[storage._cdata] = which = len(self.events)
                self.events.append((which, storage.nbytes()))
                weakref.finalize(storage, self.dies, storage._cdata, which, storage.nbytes())
        return out

    def dies(self, key: int, which: int, size: int) -> None:
        del self.living[key]
        self.events.append((which, -size))

    def peak(self, without: torch.Tensor) -> int:
        excluded = self.living[without.untyped_storage()._cdata]
        live = peak = 0
        for which, size in self.events:
            live += size * (which != excluded)
            peak = max(peak, live)
        return peak


@pytest.mark.parametrize(
    ("n", "p", "q", "dtype"),
    [
        (128, 512, 512, torch.float32),  # products and what travels
        (64, 640, 1024, torch.bfloat16),
        (4096, 64, 64, torch.float32),  # rows
        (4096, 96, 64, torch.bfloat16),  # the backward
        (2048, 32, 256, torch.bfloat16),  # the teacher's rows
    ],
)
def test_merging_takes_the_memory_that_the_model_says(
    n: int, p: int, q: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = transport.cheaper
    monkeypatch.setattr(transport, "cheaper", lambda *args: choose(*args)._replace(name="merged"))
    x, y = torch.randn(n, p).to(dtype).requires_grad_(), torch.randn(n, q).to(dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Allocations(x, y) as allocations:
            value = across([(x, y)], None, Options("cka_loss", group=dist.group.WORLD))[0]
            (dx,) = torch.autograd.grad(value, x)
    finally:
        dist.destroy_process_group()
    assert 1 <= allocations.peak(dx) / scale_model.merged_memory(scale_model.RankShape("", n, p, q, dtype)) < 1.03


def test_a_wrong_contestant_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**ranks.CONTESTANTS, "autograd": lambda x, y: ranks.cka_loss(x, y) + 1e-3 * x.sum()}
    monkeypatch.setattr(ranks, "CONTESTANTS", wrong)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        quick = replace(ranks.BENCHMARK, share=0.0, patience=torch.inf)
        rows = quick.ask_on_this_rank(ranks.RanksQuestion(1, 12, 5, 4))
    finally:
        dist.destroy_process_group()
    by_name = {row["provider"]: row for row in rows}
    assert {name for name, row in by_name.items() if row["red"]} == {"autograd"}
    assert (by_name["autograd"]["p50"], by_name["autograd"]["rounds"]) == (None, None)
    assert all(by_name[name]["rounds"] == 5 for name in ("merged", "gathered", "average"))
    assert "off by" in ranks.BENCHMARK.page(rows)


def test_ranks_take_turns_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, from the command line to the file."""
    tiny = replace(ranks.BENCHMARK, folder=tmp_path, questions=[ranks.RanksQuestion(2, 12, 5, 4)])
    monkeypatch.setattr(ranks, "BENCHMARK", tiny)
    assert run.main(["ranks", "--save"]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = load_rows(path)
    assert [(row["provider"], row["red"], row["ranks"]) for row in rows] == [(n, None, 2) for n in ranks.CONTESTANTS]
    assert all(row["rounds"] >= 3 for row in rows)
    assert "# Global batches over gloo" in capsys.readouterr().out
