"""A smoke test on the oldest versions that pyproject.toml allows: calls on a CPU, and Triton's kernels interpreted.

The oldest Python, PyTorch, Triton, NumPy and tqdm lie in build/floor: 2.6 GB, of which 1.2 GB are downloaded, and a
minute of one core. PyTorch's wheel is the CUDA build, and its CUDA libraries are another 2.6 GB; only the two that it
calls when it is imported are brought. The rest are empty libraries of the right names: calls are bound when they are
made, and on a CPU none is. The Python is the first of 3.10, 3.11, ... on PATH or under pyenv; if it is not the oldest
one, the first line says so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/floor"
SMOKE = Path(__file__).parent / "smoke.py"
LOADED = re.compile(r"^Requires-Dist: (nvidia-cuda-(?:runtime|cupti)\S*==[\d.]+)", re.MULTILINE)
PLAIN = re.compile(r"^Requires-Dist: ([\w.-]+(?:>=[\d.]+)?)$", re.MULTILINE)


def least() -> tuple[tuple[int, int], dict[str, str]]:
    """The oldest Python, and the oldest version of each package that is always needed, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=(\d+)\.(\d+)"', text)
    needed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert python is not None
    assert needed is not None
    return (int(python[1]), int(python[2])), dict(re.findall(r'"([\w-]+)>=([\d.]+)', needed[1]))


def find_python(oldest: tuple[int, int]) -> tuple[Path, str]:
    """The oldest supported interpreter that runs here, and its version as in 3.10."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for minor in range(oldest[1], sys.version_info.minor):
        version = f"{oldest[0]}.{minor}"
        on_path = shutil.which(f"python{version}")
        for candidate in ([Path(on_path)] if on_path else []) + sorted(pyenv.glob(f"{version}.*/bin/python")):
            if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
                return candidate, version
    return Path(sys.executable), f"{sys.version_info.major}.{sys.version_info.minor}"


def install(folder: Path, python: str, packages: dict[str, str]) -> None:
    """Packages of these versions, and what they need on a CPU, for this Python into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-warn-conflicts"]
    pip += ["--root-user-action=ignore", "--target", str(folder), "--python-version", python, "--only-binary=:all:"]
    pinned = [f"{name}=={version}" for name, version in packages.items()]
    subprocess.run([*pip, "--no-deps", *pinned], check=True)
    (metadata,) = folder.glob("torch-*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    subprocess.run([*pip, "--no-deps", *LOADED.findall(text)], check=True)
    subprocess.run([*pip, *PLAIN.findall(text)], check=True)
    libraries = folder / "torch/lib"
    listed = subprocess.run(["ldd", libraries / "libtorch_python.so"], capture_output=True, text=True, check=True)
    for name in sorted(set(re.findall(r"(\S+) => not found", listed.stdout))):
        command = ["cc", "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", libraries / name]
        subprocess.run(command, check=True)


def bring(python: str, packages: dict[str, str]) -> None:
    """Fills the folder, unless it holds just that; it appears whole or not at all."""
    stamp, wanted = FOLDER / "stamp", f"{python} {packages} {Path(__file__).read_text(encoding='utf-8')}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    partial = FOLDER.with_name(f"partial-floor-{os.getpid()}")
    try:
        install(partial, python, packages)
        (partial / "stamp").write_text(wanted, encoding="utf-8")
        shutil.rmtree(FOLDER, ignore_errors=True)
        partial.rename(FOLDER)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    """Bring the versions, call the package."""
    oldest, packages = least()
    program, python = find_python(oldest)
    if tuple(map(int, python.split("."))) != oldest:
        print(f"there is no Python {oldest[0]}.{oldest[1]} here: this is {python}")
    bring(python, packages)
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}", "TORCH_USE_RTLD_GLOBAL": "1"}
    expected = [f"{name}=={version}" for name, version in packages.items()]
    return subprocess.run([program, SMOKE, *expected], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
