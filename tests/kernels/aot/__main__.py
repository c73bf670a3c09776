"""Compiles every Triton kernel of the package ahead of time, for GPUs that are not here, and says what came of it.

A line a variant: the GPU, the kernel, the dtype and precision, registers and spilled bytes of a thread, shared bytes of
a block, matrix instructions, and the constants in which the kernel's variants differ. The last line counts. The exit
status is 1 if a variant did not compile; a spill is none of its business.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import environments

ARCHS = (80, 86, 90, 100, 120)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser("./dev aot", description=__doc__)
    parser.add_argument(
        "--triton", default="newest", metavar="oldest|newest|VERSION",
        help="which Triton: the least of pyproject.toml, the installed one (the default), or any, e.g. 3.7.1; another "
        "than the installed one is put into build/ (640 MB) the first time",
    )  # fmt: skip
    parser.add_argument(
        "--arch",
        type=int,
        choices=ARCHS,
        action="append",
        help="a GPU, sm_80 to sm_120; can be repeated (default: all)",
    )
    parser.add_argument("--kernel", default="", type=_pattern, metavar="PATTERN", help="a regular expression of names")
    parser.add_argument(
        "--few", type=int, choices=ARCHS, metavar="ARCH",
        help="half of the variants for this GPU, for the others one of a kernel and dtype: what ./dev test compiles",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows in this file, too")
    return parser.parse_args()


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def interesting(constants: Iterable[tuple[str, dict[str, Any]]]) -> set[tuple[str, str]]:
    """(kernel, constant) wherever the kernel's variants differ in the constant, except in how they multiply."""
    values: dict[tuple[str, str], set[str]] = {}
    for kernel, named in constants:
        for name, value in named.items():
            values.setdefault((kernel, name), set()).add(str(value))
    return {key for key, found in values.items() if len(found) > 1 and key[1] != "PRECISION"}


def line(row: dict[str, Any], wanted: set[tuple[str, str]]) -> str:
    """What is printed of a row."""
    constants = " ".join(f"{k}={v}" for k, v in row["constants"].items() if (row["kernel"], k) in wanted)
    kind = f"sm_{row['arch']:<4}{row['kernel']:24}{row['dtype']:5}{row['precision']:7}"
    if row["error"]:
        return f"{kind}FAILED {constants}\n{row['error']}"
    numbers = "{registers:4} registers {spilled:4} spilled {shared:7} shared {matrix:3} matrix".format(**row)
    return f"{kind}{numbers}  {constants}"


def main() -> int:
    """Find the Triton, go on in a process that has it, compile."""
    options = arguments()
    version = environments.version_of(options.triton)
    try:
        environments.install(version)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"Triton {version} could not be installed: pip has said why above") from error
    environment = environments.environment(version)
    if environment != dict(os.environ):
        program = [sys.executable, "-W", "ignore", "-m", __package__ or "", *sys.argv[1:]]
        os.execve(sys.executable, program, environment)
    from . import compile, launches  # not before: which Triton, and whether it interprets, is decided by an import

    cases, once = dict.fromkeys(ARCHS, launches.CASES), set[int]()
    if options.few:
        cases = dict.fromkeys(ARCHS, launches.FEWEST_CASES) | {options.few: launches.FEW_CASES}
        once = set(ARCHS) - {options.few}
    variants = compile.variants({arch: cases[arch] for arch in options.arch or ARCHS}, options.kernel, once)
    if not variants:
        names = {variant.kernel for variant in compile.variants({ARCHS[0]: launches.CASES})}
        raise SystemExit(f"no kernel's name has {options.kernel!r}; there are {', '.join(sorted(names))}")
    wanted = interesting((variant.kernel, variant.named) for variant in variants)
    rows = []
    for row in compile.inspected(variants):
        rows.append(row)
        print(line(row, wanted), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows), encoding="utf-8")
    failed, spilled = (sum(bool(row.get(key)) for row in rows) for key in ("error", "spilled"))
    print(f"Triton {version}")
    print(f"{len(rows) - failed} compiled, {failed} failed, {spilled} spilled")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
