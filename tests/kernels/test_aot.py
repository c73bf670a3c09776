"""Every Triton kernel compiles for GPUs that are not here, with the oldest supported Triton and the installed one.

A variant takes 0.7 s of a core, and differs in few lines from the next: what they have in common fails in all of them.
So half of them (`launches.FEW_CASES`) are compiled for one GPU, sm_90 or what a slice of the tests chooses, and of each
kernel and dtype one (of `launches.FEWEST_CASES`) for the others: 133 + 4 x 26 with each Triton. --all compiles all.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bird_kernels import cost, plan
from tests.kernels.aot import environments
from tests.kernels.aot.__main__ import ARCHS

pytestmark = pytest.mark.slow

Row = dict[str, Any]

# Shared memory that a block may use, KB: 99 on the consumer cards of the sm_80 family (163 on an A100) and on sm_120,
# 227 on sm_90 and sm_100.
DEVICES = {80: "A100", 86: "RTX 3090", 90: "H100", 100: "B200", 120: "RTX 5090"}  # of each architecture one
SHARED = {80: 99, 86: 99, 90: 227, 100: 227, 120: 99}

# Bytes that a thread spills, at the most: one pair of registers without a name, since the compilers shuffle those from
# version to version, and what is named here by Triton, architecture, kernel, dtype and precision.
PAIR = 8
SPILLS = {
    # Three products for each of fp32's: three parts of both operands wait in registers, 255 a thread.
    ("3.8.0", 120, "gaussian.distances", "fp32", "tf32x3"): 40,
}


def rows_of(triton: str, file: Path, few: list[str]) -> tuple[list[str], list[Row]]:
    """What `./dev aot` prints, by lines, and its rows."""
    program = [sys.executable, "-m", "tests.kernels.aot", *few, "--triton", triton, "--json", file]
    done = subprocess.run(program, cwd=environments.ROOT, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr[-3000:]
    return done.stdout.splitlines(), json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["oldest", "newest"])
def version(request: pytest.FixtureRequest) -> str:
    found = environments.version_of(request.param)
    folder = environments.folder_of(found)
    if folder is not None and not folder.is_dir():
        pytest.skip(f"Triton {found} is not in build/; `./dev aot --triton {found}` brings it")
    return found


@pytest.fixture(scope="module")
def report(
    version: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[Row]]:
    part = int(os.environ.get("BIRD_SLICE", "2").partition("/")[0])
    few = [] if request.config.getoption("--all") else ["--few", str(ARCHS[part % len(ARCHS)])]
    return rows_of(version, tmp_path_factory.mktemp("aot") / "rows.json", few)


@pytest.fixture(scope="module")
def rows(report: tuple[list[str], list[Row]]) -> list[Row]:
    return [row for row in report[1] if not row["error"]]


def kernels_in_the_source() -> set[str]:
    """module:name of every function that Triton compiles and a host launches."""
    found = set()
    for file in sorted((environments.ROOT / "bird_kernels").rglob("*.py")):
        module = ".".join(file.relative_to(environments.ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found |= {f"{module}:{node.name}" for d in node.decorator_list if "jit" in ast.unparse(d)}
    return found


def test_every_kernel_of_the_source_is_compiled_for_every_architecture(rows: list[Row]) -> None:
    kernels = kernels_in_the_source()
    assert len(kernels) > 5
    for arch in ARCHS:
        assert {row["function"] for row in rows if row["arch"] == arch} == kernels


def test_nothing_fails(report: tuple[list[str], list[Row]]) -> None:
    lines, rows = report
    assert [row for row in rows if row["error"]] == []
    spilled = sum(row["spilled"] > 0 for row in rows)
    assert lines[-1] == f"{len(rows)} compiled, 0 failed, {spilled} spilled"


def test_only_named_variants_spill(version: str, rows: list[Row]) -> None:
    found: dict[tuple[int, str, str, str], int] = {}
    for row in rows:
        key = row["arch"], row["kernel"], row["dtype"], row["precision"]
        found[key] = max(found.get(key, PAIR), row["spilled"])
    named = {key[1:]: size for key, size in SPILLS.items() if key[0] == version}
    if not named:  # a Triton of another day
        named = {key[1:]: size for key, size in SPILLS.items()}
    assert {key: size for key, size in found.items() if size > named.get(key, PAIR)} == {}


def test_shared_memory_fits(rows: list[Row]) -> None:
    assert [row for row in rows if row["shared"] > SHARED[row["arch"]] * 1024] == []


def test_products_use_matrix_units_unless_they_are_exact(rows: list[Row]) -> None:
    products = [row for row in rows if row["products"]]
    assert {row["precision"] for row in products} == {"ieee", "tf32", "tf32x3", ""}  # of fp32, and of halves
    for row in products:
        assert (row["matrix"] > 0) == (row["precision"] != "ieee"), row


def test_descriptors_are_read_by_the_copy_unit(rows: list[Row]) -> None:
    described = [row for row in rows if row["constants"].get("DESCRIBED")]
    assert {row["arch"] for row in described} == {90, 100, 120}
    assert [row for row in rows if (row["copies"] > 0) != (row in described)] == []


def test_features_that_are_read_once_are_loaded_asynchronously(rows: list[Row]) -> None:
    """All of them: a thread's share of a tile, 16 bytes at a time, once for each stage (and, by 3.6.0, locations)."""
    found = set()
    for row in rows:
        c = row["constants"]
        if row["kernel"] == "whole.whole" and c["HELD"] == plan.ROWS_AT_ONCE:
            numbers = c["HELD"] * c["STEP"]
        elif row["kernel"] == "gradient.backward" and c["ALL"]:
            numbers = c["TERMS"] * c["WIDE"]
        else:
            continue
        size = 4 if row["dtype"] == "fp32" else 2
        assert row["loads"] >= c["num_stages"] * numbers * size // (16 * 32 * c["num_warps"]), row
        found.add(row["kernel"])
    assert found == {"whole.whole", "gradient.backward"}


def test_loops_of_products_leave_the_matrix_units_busy(rows: list[Row]) -> None:
    """The schedulers have issued a step's instructions before the matrix units have multiplied: units can be filled.

    A scheduler issues an instruction of a warp a clock; there are four. Loops of specialised warps are short anyway.
    """
    sheets = {arch: cost.SHEETS[name] for arch, name in DEVICES.items()}
    found = {}
    for row in rows:
        c, sheet = row["constants"], sheets[row["arch"]]
        if row["kernel"] == "symmetric.symmetric" and not c["SPECIALISED"]:
            rate = (sheet.tf32 if c["TF32"] else sheet.half) * 1e3 / (sheet.multiprocessors * sheet.clock)
            multiplying = 2 * c["M"] * c["N"] * c["K"] / rate
            found[row["arch"], row["dtype"], c["M"], c["N"]] = multiplying / (row["loop"] * c["num_warps"] / 4)
    assert {key[0] for key in found} == set(ARCHS)
    assert {key: share for key, share in found.items() if share < (0.6 if key[2] == 128 else 0.5)} == {}


PROGRAM = """
import sys
import torch, triton
import triton.language as tl
from tests.kernels.aot import __main__, launches

@triton.jit
def right_kernel(out, n):
    for i in range(n):
        tl.store(out + i, 1.0)

@triton.jit
def wrong_kernel(out, n):
    for i in tl.static_range(n):
        tl.store(out + i, 1.0)

def drive(case):
    for kernel in (right_kernel, wrong_kernel):
        kernel[(1,)](torch.zeros(8), 8)

launches.DRIVERS = (drive,)
sys.exit(__main__.main())
"""


def test_a_kernel_that_does_not_compile_is_named_and_fails_the_program(tmp_path: Path) -> None:
    """The rest is compiled all the same."""
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    environment = environments.environment(environments.version_of("newest"))
    program = [sys.executable, "-W", "ignore", script, "--arch", "90"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "1 compiled, 1 failed, 0 spilled"
    (failed,) = [line for line in lines if "FAILED" in line]
    assert "__main__.wrong" in failed
    assert "start value is not a constexpr" in done.stdout


def test_the_oldest_is_the_least_of_the_project() -> None:
    assert environments.version_of("3.7.1") == "3.7.1"
    least = environments.version_of("oldest")
    assert f'"triton>={least.removesuffix(".0")}' in (environments.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert least.count(".") == 2
