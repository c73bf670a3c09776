"""Scripts in processes of their own, forked from one that has imported PyTorch, torchvision and TRL.

Those imports take 8 s of a core, and most scripts take less than one for themselves. A fork runs a script as Python
would, as __main__ and with its folder on the path, and then what was registered for the end. It leaves out to take the
interpreter apart, which would copy all that the imports have made.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = "torch._dynamo", "torchvision", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "bird.language"
SECONDS = 300  # that a script may take


class Forks:
    """The process that forks; leaving the ``with`` block ends it."""

    def __enter__(self) -> Forks:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._words = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen([sys.executable, __file__, self._words.name], env=environment, **pipes)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()
        self._words.cleanup()

    def run(self, folder: Path, script: Path, *arguments: str) -> str:
        """What a script prints, started in a folder with these arguments. Its errors fail the test."""
        files = [Path(self._words.name, name) for name in ("out", "err")]
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([str(folder), str(script), *arguments]) + "\n")
        self._server.stdin.flush()
        status = self._server.stdout.readline()
        text, complaint = (file.read_text(encoding="utf-8") for file in files)
        assert status == "0\n", f"{script}: {complaint}"
        return text


def begin(folder: str, script: str, *arguments: str) -> None:
    """What is a script's own: folder, arguments, path, and where its words go."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(sys.argv[1], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = int(bool(ended.code))
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Fork for every line; it is a JSON list of a folder, a script and its arguments."""
    for module in MODULES:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(module)
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            begin(*json.loads(line))
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())


if __name__ == "__main__":
    main()
