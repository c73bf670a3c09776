"""Every native kernel compiles and links for every target: no spills, shared memory that fits, matrix instructions."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.kernels import nvcc

SHARED = 99  # KB that a block may use on the consumer cards of the sm_80 family, the least of all
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def load_setup() -> ModuleType:
    """setup.py, without doing what it says."""
    spec = importlib.util.spec_from_file_location("native_setup", nvcc.ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SETUP = load_setup()


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ("sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_103\nsm_120\n", "8.0;9.0;10.0+PTX"),
        ("sm_50\nsm_80\nsm_86\nsm_89\nsm_90\nsm_90a\n", "8.0;9.0+PTX"),  # before 12.8
        ("sm_35\nsm_70\nsm_80\nsm_86\n", "8.0+PTX"),  # before 11.8
        ("sm_90\nsm_100\nsm_1000\n", "9.0;10.0+PTX"),  # of a day when 8.0 is gone
    ],
)
def test_builds_for_the_architectures_that_nvcc_knows(listed: str, wanted: str) -> None:
    assert SETUP.architectures(listed) == wanted


@pytest.mark.parametrize(("listed", "named"), [("sm_35\nsm_70\n", "sm_35, sm_70"), ("", r"\(80, 90, 100\)")])
def test_an_nvcc_that_knows_none_is_an_error(listed: str, named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        SETUP.architectures(listed)


@needs_nvcc
@pytest.mark.parametrize("capability", SETUP.ARCHITECTURES)
def test_compiled_kernels(capability: int, tmp_path: Path) -> None:
    rows = nvcc.report(capability, tmp_path)
    variants = {(row["kernel"], row["dtype"], row["tile"], row["precision"]) for row in rows}
    kinds = [("float32", "ieee"), ("float32", "tf32"), ("float16", "tf32"), ("bfloat16", "tf32")]
    wanted = {("partial_grams", dtype, tile, precision) for dtype, precision in kinds for tile in (64, 128)}
    wanted |= {("gradient", dtype, 64, precision) for dtype, precision in kinds}
    wanted |= {("reduce_grams", "any", tile, "") for tile in (64, 128)} | {("sum_rows", "any", 64, "")}
    assert variants == wanted
    assert len(rows) == len(wanted)
    assert [row for row in rows if row["spilled"]] == []
    assert [row for row in rows if row["shared"] > SHARED * 1024] == []
    assert [row for row in rows if row["registers"] > 128] == []  # two blocks on a multiprocessor
    for row in rows:
        assert (row["matrix"] > 0) == (row["precision"] == "tf32"), row
        assert row["halved"] == 0, row
        # A thread has four loads of features under way, of 16 bytes if they are fp32; backward, four of K and L, too.
        least = 4 * (row["dtype"] == "float32") + 4 * (row["kernel"] == "gradient")
        assert row["wide"] >= least, row


@needs_nvcc
@pytest.mark.skipif(importlib.util.find_spec("bird_kernels._native") is None, reason="the native part is not built")
def test_linked_extension_holds_every_target() -> None:
    from bird_kernels import _native

    if not _native.CUDA:
        pytest.skip("this PyTorch is built without CUDA")
    command = [nvcc.TOOLS / "cuobjdump", "--list-elf", _native.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(f"sm_{capability}" in listed for capability in SETUP.ARCHITECTURES), listed
