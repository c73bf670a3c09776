"""Plans and compiles: every variant that the launchers ask for, for a GPU that is not here.

Triton itself says what a launch is specialised on: it is given a driver of the target, which has no device, and its
hook before a compilation hands over what would be compiled. So what is inspected is exactly what a GPU would be given.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bird_kernels.backends.triton import launch

from .launches import DRIVERS, Case

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
PRODUCT = re.compile(r"\btt\.dot [^:]*?(?:inputPrecision = (\w+) )?: tensor<[\dx]+(\w+)>")
COPIES = re.compile(r"\bcp\.async\.bulk\.tensor")
LOADS = re.compile(r"\bcp\.async\.c[ag]\.shared\.global \[[^;]*, 0x10,")  # asynchronous ones, of 16 bytes
FORK = multiprocessing.get_context("fork")  # the kernels are imported once


class Variant(NamedTuple):
    """A kernel (``module``, ``name``) and what Triton compiles it with for ``arch``; ``named`` are its constants by
    name, warps and stages among them."""

    arch: int
    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    named: dict[str, Any]

    @property
    def kernel(self) -> str:
        """As it is printed: the module's last name and the kernel's, which alone is not unique."""
        return f"{self.module.rpartition('.')[2]}.{self.name.removesuffix('_kernel')}"

    @property
    def pointers(self) -> list[str]:
        """The dtypes that the arguments point to, in order."""
        return re.findall(r"(?:\*|tensordesc<)(\w+)", str(list(self.signature.values())))

    @property
    def kind(self) -> str:
        """Two variants of a kind differ in what is known of their sizes and strides only: one is enough."""
        return json.dumps([self.arch, self.module, self.name, self.pointers, self.named, self.options], default=str)


class Driver:
    """As much of a Triton driver as it takes to specialise a launch."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def plan(arch: int, cases: Iterable[Case]) -> list[Variant]:
    """Everything that the drivers launch, a variant of each kind. In a process of its own: launchers are kept."""
    found: dict[str, Variant] = {}

    def catch(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel: JITFunction = fn.jit_function
        options = json.loads(compile["specialization_data"])["options"]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        positions = {param.num: param.name for param in kernel.params if param.is_constexpr}
        named = {positions[path[0]]: value for path, value in compile["constants"].items() if path[0] in positions}
        named |= {name: options[name] for name in ("num_warps", "num_stages")}
        variant = Variant(
            arch, fn.module, fn.name, compile["signature"], compile["constants"], compile["configs"][0], options, named
        )
        found.setdefault(variant.kind, variant)
        return True  # nothing is compiled or launched

    pretend(arch)
    knobs.runtime.jit_cache_hook = catch
    for case in cases:
        for driver in DRIVERS:
            driver(case)
    return list(found.values())


def pretend(arch: int) -> None:
    """Makes Triton and the launchers believe in a GPU of this architecture."""
    triton.runtime.driver.set_active(Driver(arch))
    original = launch.capability
    for module in list(sys.modules.values()):
        if getattr(module, "capability", None) is original:
            module.capability = lambda device: divmod(arch, 10)  # type: ignore[attr-defined]


def inspect(variant: Variant) -> dict[str, Any]:
    """Compiles, and says what came of it: ``error``, or the precision of products of fp32, how many products it
    names, registers and spilled bytes of a thread, shared bytes of a block, matrix instructions, asynchronous loads
    of 16 bytes, copies by descriptor, and, of products of a matrix with itself, the length of their `shortest_loop`.
    """
    row = {
        "arch": variant.arch, "kernel": variant.kernel, "function": f"{variant.module}:{variant.name}",
        "dtype": variant.pointers[0], "precision": "", "constants": variant.named, "error": "",
    }  # fmt: skip
    kernel = getattr(importlib.import_module(variant.module), variant.name)
    source = ASTSource(kernel, variant.signature, variant.constants, variant.attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=variant.options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error.__cause__ or error}"}
    products = PRODUCT.findall(compiled.asm["ttir"])
    precisions = {precision or "ieee" for precision, operand in products if operand == "f32"}
    return row | usage(compiled.asm["cubin"]) | {
        "precision": "+".join(sorted(precisions)),
        "products": len(products),
        "shared": compiled.metadata.shared,
        "matrix": len(MATRIX.findall(compiled.asm["ptx"])),
        "loads": len(LOADS.findall(compiled.asm["ptx"])),
        "copies": len(COPIES.findall(compiled.asm["ptx"])),
        "loop": shortest_loop(compiled.asm["cubin"]) if variant.name == "symmetric_kernel" else 0,
    }  # fmt: skip


def shortest_loop(binary: bytes) -> int:
    """The instructions of the shortest loop with matrix instructions, by the disassembler; 0 if there is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary)
        cubin.flush()
        command = [TOOLS / "nvdisasm", "-c", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\w+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\w+)\)", instruction)
        body = code[labels.get(target[1], end + 1) : end + 1] if target else []
        if any(re.search(r"HMMA|GMMA|UTC\w*MMA", each) for each in body):
            loops.append(len(body))
    return min(loops, default=0)


def usage(binary: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, as the assembler wrote them into the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary)
        cubin.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": fields["REG"], "spilled": fields["STACK"] + fields["LOCAL"]}


def variants(cases: Mapping[int, Sequence[Case]], pattern: str = "", once: Collection[int] = ()) -> list[Variant]:
    """The plans of each architecture's cases one after the other, of kernels whose name has ``pattern``.

    Of the architectures in ``once``, the first of each kernel and dtype.
    """
    with FORK.Pool(maxtasksperchild=1) as pool:  # a process for each architecture
        plans = pool.starmap(plan, cases.items(), chunksize=1)
    found = [variant for plan in plans for variant in plan if re.search(pattern, variant.kernel)]
    first = {(variant.arch, variant.kernel, variant.pointers[0]): variant for variant in reversed(found)}
    return [v for v in found if v.arch not in once or first[v.arch, v.kernel, v.pointers[0]] is v]


def inspected(found: Iterable[Variant]) -> Iterator[dict[str, Any]]:
    """What `inspect` says of each, in their order, as soon as it is known; on all cores."""
    with ProcessPoolExecutor(mp_context=FORK) as pool:
        yield from pool.map(inspect, found)
