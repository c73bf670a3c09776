"""Compiles every Triton kernel for GPUs that are not here and prints what the assembler says of each, as JSON.

Run as a program, in a process of its own: it needs Triton without the interpreter. The launchers of
`backends.triton` run on CPU tensors as they would on a GPU; their launches are caught, turned into (kernel,
signature, constants), and compiled for the target. So what is inspected is exactly what a GPU would be given.

    PYTHONPATH=. python tests/kernels/aot.py 90
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bird_kernels.backends import triton as backend
from bird_kernels.backends.triton import gaussian as fused
from bird_kernels.backends.triton import launch
from bird_kernels.types import RBF, Problem

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
    torch.uint8: "u8",
}  # fmt: skip
DTYPES = [
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "tf32x3"),
    (torch.bfloat16, None),
    (torch.float16, None),
]
# n, p, q: split over the inner dimension or not, on each route, and centred by those who multiply (gram, 128); which
# sides need gradients; aligned widths, as in use.
SHAPES = [
    ("gram", 128, 512, 1280, (True, False)),
    ("gram", 128, 512, 1280, (True, True)),
    ("gram", 640, 512, 1024, (True, False)),
    ("gram", 2048, 2048, 2048, (False, True)),
    ("cross", 4096, 64, 128, (True, True)),
    ("cross", 4096, 1024, 1024, (True, True)),
]
PAIRS = ((64, 512), (128, 512), (512, 1280))

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def launches(dtype: torch.dtype, precision: str | None, estimator: str, masked: bool) -> list[Launch]:
    """Everything that forward and backward launch."""
    caught = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        caught.append((self, args, constants))

    original, JITFunction.run = JITFunction.run, catch
    try:
        # One entry into its storage x cannot be described; nothing else depends on where it begins.
        for (route, n, p, q, sides), start in itertools.product(SHAPES, (0, 1)):
            problem = Problem(n, p, q, dtype, torch.device("cpu"), "cka_loss", estimator, precision, masked, *sides)
            x, y = torch.empty(start + n * p, dtype=dtype)[start:].view(n, p), torch.empty(n, q, dtype=dtype)
            mask = torch.ones(n, dtype=torch.bool) if masked else None
            value, stash = backend.forward(x, y, mask, problem, route)
            backend.backward(value, x, y, mask, stash, problem, route)
            if (route, n) == ("gram", 128):
                problem = problem._replace(kernel=RBF(sigma=1.0))  # the median of memory that nobody wrote is nothing
                value, stash = fused.forward(x, y, mask, problem, route)
                fused.backward(value, x, y, mask, stash, problem, route)
        for sides in ((True, False), (True, True)):  # pairs together
            together = tuple(
                Problem(128, p, q, dtype, torch.device("cpu"), "cka_loss", estimator, precision, masked, *sides)
                for p, q in PAIRS
            )
            tensors = [torch.empty(128, d, dtype=dtype) for pair in PAIRS for d in pair]
            mask = torch.ones(128, dtype=torch.bool) if masked else None
            values, group = backend.forward_together(tensors, mask, together)
            backend.backward_together(values, tensors, mask, group, together)
    finally:
        JITFunction.run = original
    return caught


def compile_for(capability: int, kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """The compiled kernel, specialised as a launch would: aligned pointers, ones and multiples of 16 known."""
    signature: dict[str, str | tuple[str, ...]] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    for index, name in enumerate(kernel.arg_names):
        value, position = values[name], (index,)
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[position] = [["tt.divisibility", 16]]
        elif isinstance(value, tuple) and name not in constants:
            signature[name] = tuple("*" + TYPES[tensor.dtype] for tensor in value)
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(len(value))}
        elif name in constants or value == 1:
            signature[name] = "constexpr"
            constexprs[position] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[position] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dtype_of(value: torch.Tensor | TensorDescriptor) -> torch.dtype:
    """Of a tensor, or of the one described."""
    return (value.base if isinstance(value, TensorDescriptor) else value).dtype


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes, shared memory, matrix instructions and copies by descriptor, read from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
    copies = len(re.findall(r"\bcp\.async\.bulk\.tensor", compiled.asm["ptx"]))
    return {
        "registers": fields["REG"],
        "spilled": fields["STACK"] + fields["LOCAL"],
        "shared": compiled.metadata.shared,
        "matrix": matrix,
        "copies": copies,
    }


def report(capability: int) -> list[dict[str, Any]]:
    """One row for every variant of every kernel."""
    launch.capability = lambda device: divmod(capability, 10)  # the launchers choose warps by it
    rows: dict[str, dict[str, Any]] = {}
    for (dtype, precision), estimator, masked in itertools.product(DTYPES, ("biased", "unbiased"), (False, True)):
        if masked and (dtype, estimator) != (torch.bfloat16, "unbiased"):
            continue  # masks add a load and a select; one dtype shows it
        for kernel, args, constants in launches(dtype, precision, estimator, masked):
            # Shapes differ in what is known of them only by accident: one of each kind is enough.
            first = args[0][0] if isinstance(args[0], tuple) else args[0]
            dtypes = [str(dtype_of(a)) for a in args if isinstance(a, torch.Tensor | TensorDescriptor)]
            kind = [kernel.fn.__name__, str(dtype_of(first)), dtypes, constants]
            key = json.dumps(kind, sort_keys=True)
            if key not in rows:
                rows[key] = {
                    "kernel": kernel.fn.__name__,
                    "dtype": str(dtype_of(first)).removeprefix("torch."),
                    "constants": constants,
                    **resources(compile_for(capability, kernel, args, constants)),
                }
    return list(rows.values())


if __name__ == "__main__":
    print(json.dumps(report(int(sys.argv[1])), indent=0))
