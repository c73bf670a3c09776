"""Nothing but the optional native extension; all the rest stands in pyproject.toml.

``BIRD_BUILD_EXT`` says what to do about the C++ and CUDA sources in csrc/:

    0     never build them (the default): the package is pure Python
    1     build them, or fail and say why; needs torch installed (``pip install --no-build-isolation``), a C++20
          compiler, and nvcc unless this torch is a CPU build
    auto  build them where that is possible

``TORCH_CUDA_ARCH_LIST`` names the GPUs, as for every PyTorch extension; without it they are those of ARCHITECTURES that
nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ARCHITECTURES = (80, 90, 100)
HEADERS = ["csrc/kernels.h", "csrc/at_once.h", "csrc/cuda/gram.cuh", "csrc/cuda/tile.cuh", "csrc/emulation/cuda.h"]


def toolkit() -> str:
    """The CUDA toolkit's folder, asked of nvcc itself: on PATH there may be a wrapper that is not in the toolkit."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(os.environ.get("CUDA_HOME", ""), "bin")))
    if nvcc is None:
        raise RuntimeError("nvcc was not found on PATH or in $CUDA_HOME/bin, and this torch is built with CUDA")
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ _HERE_=(.*)$", dry.stderr, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{nvcc} --dryrun does not say where its toolkit is: {dry.stderr.strip()}")
    return str(Path(found[1]).parent)


def architectures(listed: str) -> str:
    """``TORCH_CUDA_ARCH_LIST`` for an nvcc whose ``--list-gpu-code`` says ``listed``: what it knows of ARCHITECTURES.

    The newest of them as PTX, too, for GPUs that are newer still. nvcc 12.8 is the first that knows 10.0.
    """
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", listed)}
    chosen = [f"{code // 10}.{code % 10}" for code in ARCHITECTURES if code in known]
    if not chosen:
        raise RuntimeError(
            f"nvcc knows none of the architectures {ARCHITECTURES}: {', '.join(listed.split()) or listed}"
        )
    return ";".join(chosen) + "+PTX"


def extension(required: bool) -> dict:
    """What setup() is told to build the native part."""
    import torch

    if torch.version.cuda:
        folder = os.environ["CUDA_HOME"] = toolkit()  # before torch guesses
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            command = [Path(folder, "bin/nvcc"), "--list-gpu-code"]
            listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(listed)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = ["csrc/bindings.cpp", "csrc/emulation/launch.cpp"]
    flags = ["-O2", "-g0", "-std=c++20", "-Wall", "-Wno-unknown-pragmas"]
    if torch.version.cuda:
        kind, sources = CUDAExtension, [*sources, "csrc/cuda/launch.cu"]
        compile_args = {"cxx": [*flags, "-DBIRD_CUDA"], "nvcc": ["-O3", "-std=c++20"]}
    else:
        kind, compile_args = CppExtension, {"cxx": flags}
    module = kind("bird_kernels._native", sources, extra_compile_args=compile_args, depends=HEADERS)

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # of any kind: compilers, linkers, PyTorch's own checks
                if required:
                    raise
                print(f"bird_kernels: the native part was not built: {error}", file=sys.stderr)

    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def main() -> None:
    """Do what BIRD_BUILD_EXT says."""
    choice = os.environ.get("BIRD_BUILD_EXT", "0")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"BIRD_BUILD_EXT={choice!r} is not understood: use 0, 1 or auto")
    if choice == "0":
        setup()
        return
    try:
        options = extension(required=choice == "1")
    except (ImportError, RuntimeError, OSError) as error:
        if choice == "1":
            raise SystemExit(f"BIRD_BUILD_EXT=1, but the native part cannot be built: {error}") from error
        print(f"bird_kernels: no native part: {error}", file=sys.stderr)
        options = {}
    setup(**options)


if __name__ == "__main__":
    main()
