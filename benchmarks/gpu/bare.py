"""A rehearsal's world: only the packages that a bare machine has, and Triton's kernels in its interpreter.

The imports of everything else fail as they would where it is not installed. This must run before torch is imported.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from typing import Any

# torch, triton and numpy with what they depend on; transformers with its own; what builds an extension; ourselves.
INSTALLED = re.compile(
    "torch|torchgen|functorch|triton|numpy|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|sympy|typing_extensions|"
    "nvidia|setuptools|pkg_resources|packaging|ninja|transformers|tokenizers|safetensors|huggingface_hub|regex|yaml|"
    "requests|bird|bird_kernels|benchmarks|tests"
)
VARIABLES = {
    "TRITON_INTERPRET": "1",
    "BIRD_EMULATE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",
}


class Visible(PathFinder):
    """Finds on the path what is Python's own or on the list, and nothing else."""

    @classmethod
    def find_spec(cls, fullname: str, *where: Any) -> ModuleSpec | None:
        """None where a bare machine has no such package."""
        top = fullname.partition(".")[0]
        visible = INSTALLED.fullmatch(top) or top in sys.stdlib_module_names or top.startswith("_")
        return super().find_spec(fullname, *where) if visible else None


def enter() -> None:
    """Hide the packages and set the variables, for this process; those it starts see the variables alone."""
    if "torch" in sys.modules:
        raise RuntimeError("a rehearsal must hide packages before torch is imported")
    os.environ.update(VARIABLES)
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Visible]
