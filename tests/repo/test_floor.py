"""The smoke test of the oldest supported versions (`./dev floor`), here on those of this environment."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from tests.floor import __main__ as floor


def run(*expected: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(floor.ROOT), "PATH": "/usr/bin:/bin"}
    program = [sys.executable, floor.SMOKE, *expected]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


def test_versions_are_those_of_the_project() -> None:
    python, packages = floor.least()
    assert python == (3, 10)
    assert set(packages) == {"torch", "numpy", "tqdm", "triton", "filelock", "tomli"}
    assert all(found.replace(".", "").isdigit() for found in packages.values())
    program, found = floor.find_python(python)
    seen = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert seen.startswith(f"Python {found}.")


@pytest.mark.slow
def test_every_call_is_right() -> None:
    done = run(f"torch=={version('torch').split('+')[0]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("calls are right\n")


def test_other_versions_than_expected_are_an_error() -> None:
    done = run("torch==1.2")
    assert done.returncode == 1
    assert f"torch is {version('torch').split('+')[0]}, not 1.2" in done.stderr
