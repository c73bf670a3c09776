"""Compiles the native kernels for GPUs that are not here, and reads from the binary what the assembler made of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
# Triton's package carries the binary tools of the toolkit.
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Dynamic shared memory at the most rows: 512 of 36 floats forward; backward 16 of M, and of the 8 warps' parts
# (csrc/cuda/gram.cuh).
DYNAMIC = {
    "partial_grams": 512 * 36 * 4,
    "reduce_grams": 0,
    "sum_rows": 0,
    "gradient": 16 * (512 + 16) * 4 + 8 * 16 * 36 * 4,
}
ANY = ("reduce_grams", "sum_rows")  # kernels that see no features


def report(capability: int, folder: Path) -> list[dict[str, Any]]:
    """One row for every variant of every kernel; ieee products run on the ordinary cores."""
    cubin = folder / f"sm_{capability}.cubin"
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++20", "-O3", f"-I{include}", f"-arch=sm_{capability}", "-cubin", "-o", cubin]
    done = subprocess.run([*command, ROOT / "csrc/cuda/launch.cu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    def inspect(tool: str, *options: str) -> str:
        return subprocess.run([TOOLS / tool, *options, cubin], capture_output=True, text=True, check=True).stdout

    assembly = {}
    for part in re.split(r"\n\s*Function : ", inspect("cuobjdump", "-sass"))[1:]:
        assembly[part.split(maxsplit=1)[0]] = part
    rows = []
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", inspect("cuobjdump", "-res-usage")
    )
    for name, registers, stack, shared, local in usage:
        kernel = next(kernel for kernel in DYNAMIC if kernel in name)
        dtype = "bfloat16" if "BFloat16" in name else "float16" if "Half" in name else "float32"
        rows.append(
            {
                "kernel": kernel,
                "dtype": "any" if kernel in ANY else dtype,
                "tile": next((int(size) for size in re.findall(r"Li(\d+)E", name)), 64),
                "precision": "" if kernel in ANY else "ieee" if "Lb1E" in name else "tf32",
                "registers": int(registers),
                "spilled": int(stack) + int(local),
                "shared": int(shared) + DYNAMIC[kernel],
                "matrix": assembly[name].count("HMMA.1688"),
                "halved": assembly[name].count("HMMA.1684"),  # instructions of 4 inner indices, not 8
                "wide": len(re.findall(r"LDG\.E\.128(?:\.\w+)*", assembly[name])),
            }
        )
    return rows
