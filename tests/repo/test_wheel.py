"""The wheel: pure Python, complete, built without a compiler, enough on its own in an empty environment."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("bird", "bird_kernels")
COMPILERS = ("c++", "cc", "clang", "clang++", "g++", "gcc", "nvcc")

pytest.importorskip("build", reason="building the wheel needs the dev extra")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tracked: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a clean copy while each compiler on PATH is one that leaves a trace and fails."""
    folder = tmp_path_factory.mktemp("wheel")
    sources, shims, trace = folder / "sources", folder / "shims", folder / "a-compiler-ran"
    for path in tracked:
        target = sources / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / path).read_bytes())
    shims.mkdir()
    for name in COMPILERS:
        (shims / name).write_text(f"#!/bin/sh\necho {name} >>'{trace}'\nexit 1\n")
        (shims / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("BIRD_BUILD_EXT", None)
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        folder,
        cwd=sources,
        env=environment,
    )
    assert not trace.exists(), f"installing must not compile, but this ran: {trace.read_text()}"
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment that holds the wheel.

    The dependencies are borrowed from the running environment through a path file. Such a path is only
    searched: an editable install of the project in there is not followed, so the project can come from
    nowhere but the wheel.
    """
    venv = tmp_path_factory.mktemp("empty") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    failing = subprocess.run([programs / "python", "-c", "import bird_kernels"], capture_output=True, check=False)
    assert failing.returncode != 0, "the environment is not empty"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    )
    site = Path(run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def run(*command: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """The output of a command that has to succeed, run without the source tree on Python's path."""
    environment = dict(os.environ if env is None else env)
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_is_pure_python(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    native = [
        name for name in zipfile.ZipFile(wheel).namelist() if Path(name).suffix in {".so", ".pyd", ".dylib", ".o"}
    ]
    assert not native


def test_holds_every_file_of_the_packages_and_nothing_else(wheel: Path, tracked: list[Path]) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {path.as_posix() for path in tracked if path.parts[0] in PACKAGES}
    assert held == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_is_enough_in_an_empty_environment(installed: Path, tmp_path: Path) -> None:
    """From another folder: both packages come from the wheel, a gradient is right, the package data loads."""
    script = """
import importlib.metadata, importlib.resources, json, sys
import numpy, torch
import bird, bird_kernels

x = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
bird.cka_loss(x, x.detach() @ torch.randn(5, 7, dtype=torch.float64)).backward()
arrays = 0
for path in importlib.resources.files("bird").rglob("*.npz"):
    with numpy.load(path) as archive:
        arrays += sum(archive[name].size > 0 for name in archive.files)
print(json.dumps({
    "prefix": sys.prefix,
    "files": [bird.__file__, bird_kernels.__file__],
    "version": importlib.metadata.version("bird-kernels"),
    "centred": float(x.grad.mean(0).abs().max()),
    "gradient": float(x.grad.norm()),
    "arrays": arrays,
}))
"""
    seen = json.loads(run(installed / "python", "-c", script, cwd=tmp_path))
    assert all(Path(file).is_relative_to(seen["prefix"]) for file in seen["files"])
    assert seen["version"] == "0.1.0"
    assert seen["gradient"] > 1e-3
    assert seen["centred"] < 1e-12  # CKA ignores a shift of all rows, so the gradient has none
    assert seen["arrays"] > 0


def test_installs_the_command(installed: Path, tmp_path: Path) -> None:
    assert "torch" in run(installed / "bird", "info", cwd=tmp_path).lower()


def build_where_nothing_compiles(choice: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` with a PATH that holds no compiler."""
    environment = {**os.environ, "BIRD_BUILD_EXT": choice, "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "tmp",
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_native_part_that_was_asked_for_is_built_or_an_error(tmp_path: Path) -> None:
    done = build_where_nothing_compiles("1", tmp_path)
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr or "no-such-compiler" in done.stderr


def test_native_part_that_may_be_missing_says_why(tmp_path: Path) -> None:
    done = build_where_nothing_compiles("auto", tmp_path)
    assert done.returncode == 0
    assert "bird_kernels: " in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRD_BUILD_EXT", "maybe")
    with pytest.raises(SystemExit, match="BIRD_BUILD_EXT='maybe' is not understood: use 0, 1 or auto"):
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
