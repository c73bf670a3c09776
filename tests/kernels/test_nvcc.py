"""Every native kernel compiles and links for every target: no spills, shared memory that fits, matrix instructions."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels import resources
from tests.kernels.resources import CAPABILITIES

SHARED = 99  # KB that a block may use on the consumer cards of the sm_80 family, the least of all
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_kernels(capability: int, tmp_path: Path) -> None:
    from tests.kernels import nvcc

    rows = nvcc.report(capability, tmp_path)
    variants = {(row["kernel"], row["dtype"], row["tile"], row["precision"]) for row in rows}
    kinds = [("float32", "ieee"), ("float32", "tf32"), ("float16", "tf32"), ("bfloat16", "tf32")]
    wanted = {("partial_grams", dtype, tile, precision) for dtype, precision in kinds for tile in (64, 128)}
    wanted |= {("gradient", dtype, 64, precision) for dtype, precision in kinds}
    wanted |= {("reduce_grams", "any", tile, "") for tile in (64, 128)}
    assert variants == wanted
    assert len(rows) == len(wanted)
    assert [row for row in rows if row["spilled"]] == []
    assert [row for row in rows if row["shared"] > SHARED * 1024] == []
    assert [row for row in rows if row["registers"] > 128] == []  # two blocks on a multiprocessor
    for row in rows:
        assert (row["matrix"] > 0) == (row["precision"] == "tf32"), row
    assert resources.differences(resources.summary("native", nvcc.version(), capability, rows)) == []


@needs_nvcc
@pytest.mark.skipif(importlib.util.find_spec("bird_kernels._native") is None, reason="the native part is not built")
def test_linked_extension_holds_every_target() -> None:
    from bird_kernels import _native
    from tests.kernels import nvcc

    if not _native.CUDA:
        pytest.skip("this PyTorch is built without CUDA")
    command = [nvcc.TOOLS / "cuobjdump", "--list-elf", _native.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"sm_{capability}" in listed for capability in CAPABILITIES), listed
