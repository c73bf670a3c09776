"""The cost model: what it must choose, how its predictions move with sizes and devices, and the table in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bird_kernels import RBF, cost
from bird_kernels.tuning import __main__ as predictions
from bird_kernels.types import Cost, Problem

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda:0")
H200 = cost.SHEETS["H200"]
DEVICES = ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA L40S", "somebody's GPU"]


def problem(n: int, p: int, q: int, dtype: torch.dtype = torch.float32, **options: object) -> Problem:
    return Problem(n, p, q, dtype, GPU, **options)


def choice(asked: Problem, device: str, built: bool = True) -> str:
    costs = cost.predict(asked, cost.sheet_of(device))
    if not built:
        costs.pop("native", None)
    return cost.best(costs, asked, cost.sheet_of(device))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "unknown"),  # not an L4
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "unknown"),
        ("nvidia a100-sxm4-80gb", "A100"),
        ("Tesla T4", "unknown"),
    ],
)
def test_data_sheets(name: str, row: str) -> None:
    assert cost.sheet_of(name).name == row


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_launch_bound_problems_are_fused(dtype: torch.dtype, device: str) -> None:
    for n, p, q in ((8, 16, 16), (64, 512, 512), (128, 512, 1280), (256, 512, 512)):
        assert choice(problem(n, p, q, dtype), device) == "native"
        assert choice(problem(n, p, q, dtype), device, built=False) == "triton"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_large_problems_are_the_librarys(precision: str, dtype: torch.dtype, device: str) -> None:
    """The symmetric kernel too must wait for a measurement: of a whole call it saves less than this model errs."""
    for n in (513, 1024, 4096, 16_384, 65_536):
        for d in (64, 1024, 4096, 8192):
            assert choice(problem(n, d, d, dtype, precision=precision), device) == "library"


def test_the_symmetric_kernel_is_offered_where_its_result_is_large() -> None:
    for n, p, q, offered in ((4096, 4096, 64, True), (4096, 1024, 1024, False), (16_384, 64, 4096, True)):
        found = cost.predict(problem(n, p, q, torch.bfloat16), H200)
        assert ("symmetric" in found) == offered
        if offered:
            assert found["symmetric"].device < found["library"].device


@pytest.mark.parametrize(("side", "promised"), [(4096, 1.26), (8192, 1.46), (10_000, 1.46)])
def test_the_symmetric_kernel_must_win_by_what_it_promises(side: int, promised: float) -> None:
    asked = problem(side, side, side, torch.bfloat16)
    for gain, taken in ((promised + 0.001, "symmetric"), (promised - 0.001, "library")):
        assert cost.best({"library": Cost(1, 1000 * gain, 8), "symmetric": Cost(1, 1000, 9)}, asked, H200) == taken


def test_who_has_no_kernels_is_not_predicted() -> None:
    def candidates(asked: Problem) -> set[str]:
        return set(cost.predict(asked, H200))

    assert candidates(problem(128, 512, 512)) == {"native", "triton", "library"}
    assert candidates(problem(512, 64, 64)) == {"native", "triton", "library"}
    assert candidates(problem(513, 512, 512)) == {"library"}
    assert candidates(problem(128, 512, 512, statistic="sqrt_cka_loss")) == {"triton", "library"}
    assert candidates(problem(128, 512, 512, kernel=RBF())) == {"triton", "library"}
    for options in (
        dict(dtype=torch.float64),
        dict(center=False),
        dict(statistic="gram_mse"),
        dict(kernel=RBF(flow=True)),
    ):
        assert candidates(problem(128, 512, 512)._replace(**options)) == set()


def test_times_by_hand() -> None:
    """One product of 8192^3 in bf16 on an H200, 0.65 of 989 TFLOP/s; 4096 tiles, in four shares 125 waves of 132."""
    asked = problem(8192, 8192, 8192, torch.bfloat16)
    filled = 4 * 4096 / (125 * 132)
    assert cost._product(8192, 8192, 8192, 2, asked, H200) == pytest.approx(2 * 8192**3 / (989e6 * 0.65 * filled))
    small = cost.predict(problem(16, 16, 16), H200)
    assert small["native"].host == 12 + 3 * 2  # the call, and three launches
    assert small["triton"].launches == 3
    assert cost.predict(problem(16, 16, 16, x_grad=False), H200)["triton"].launches == 2
    assert cost.predict(problem(4096, 512, 512, y_grad=True), H200)["library"].launches == 6 + 2 + 2
    read = 2 * 128 * 802_816 * 2  # bytes of both sides: no call can be faster than to read them, and x to write dx
    floor = (read + read / 2) / 4.8e6
    assert all(
        known.device > floor for known in cost.predict(problem(128, 802_816, 802_816, torch.bfloat16), H200).values()
    )


def test_more_work_takes_longer() -> None:
    for device in DEVICES:
        sheet = cost.sheet_of(device)
        for n, d in ((128, 512), (512, 2048), (4096, 1024), (16_384, 4096)):
            less = cost.predict(problem(n, d, d, torch.bfloat16), sheet)
            for more in (problem(n, 2 * d, 2 * d, torch.bfloat16), problem(n, d, d, torch.bfloat16, y_grad=True)):
                costs = cost.predict(more, sheet)
                assert all(costs[name].device >= less[name].device for name in costs.keys() & less.keys())


def test_pairs_share_launches_where_that_is_predicted_to_win() -> None:
    one = problem(128, 512, 512)
    alone = cost.predict(one, H200)
    assert cost.fused([one] * 8, H200).us < cost.one_by_one([("triton", alone["triton"])] * 8)
    assert cost.fused([one] * 8, H200).us < cost.one_by_one([("native", alone["native"])] * 8)
    wide = problem(512, 100_352, 100_352, torch.bfloat16)
    library = cost.predict(wide, H200)["library"]
    assert cost.fused([wide] * 2, H200).us > cost.one_by_one([("library", library)] * 2)


@pytest.mark.parametrize("device", ["NVIDIA H200", "A100", "RTX 4090", "an unknown device"])
def test_the_table_in_the_docs_is_what_is_printed(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    predictions.main(["--device", device])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    text = (ROOT / "docs/explain/kernels.md").read_text(encoding="utf-8")
    match = re.search(rf"<!-- predicted: {re.escape(device)} -->\n(.*?)<!-- end predicted -->", text, re.DOTALL)
    assert match is not None
    assert [line for line in match[1].splitlines() if line.startswith("|")] == printed
    assert len(printed) == 2 + 11


@pytest.mark.parametrize("device", ["NVIDIA H200", "A100", "RTX 4090", "an unknown device"])
def test_the_table_chooses_the_library_for_large_halves_and_tf32(device: str) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in predictions.lines(device)][2:]
    large = [row for row in rows if row[1] in ("bfloat16", "tf32") and re.match(r"(4,096|16,384|65,536) x", row[0])]
    assert len(large) == 4
    assert {row[-1] for row in large} == {"library"}
