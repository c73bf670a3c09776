"""The meaning of every argument of a kernel stands beside it: an argument a line, with a comment."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "bird_kernels").rglob("*.py"))}


def launched() -> set[str]:
    """The names of all kernels that a `Launch` is made of."""
    calls = (node for source in SOURCES.values() for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {ast.unparse(call.args[0]).rsplit(".")[-1] for call in calls if ast.unparse(call.func) == "Launch"}


def comments_of(source: str) -> dict[int, str]:
    """The comments of a Python file by their lines."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


def test_every_parameter_of_a_kernel_has_its_meaning_beside_it() -> None:
    wanted, found, wrong = launched(), set(), []
    for path, source in SOURCES.items():
        comments = comments_of(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                found.add(node.name)
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                lines = [parameter.lineno for parameter in parameters]
                for parameter, line in zip(parameters, lines, strict=True):
                    said = comments.get(line, "").removeprefix("#").strip()
                    if lines.count(line) > 1 or len(said) < 3:
                        wrong.append(f"{path.relative_to(ROOT)}:{line} {node.name}({parameter.arg})")
    assert found == wanted
    assert len(found) >= 16
    assert not wrong, "\n".join(wrong)


def test_every_argument_of_a_native_kernel_has_its_meaning_beside_it() -> None:
    """They take one structure each, whose members csrc/kernels.h declares."""
    kernels = (ROOT / "csrc/cuda/gram.cuh").read_text(encoding="utf-8")
    taken = set(re.findall(r"__global__ void __launch_bounds__\([^)]*\) \w+\(const (\w+) call\)", kernels))
    assert len(re.findall("__global__", kernels)) == 4
    assert taken == {"Forward", "Backward"}
    header = (ROOT / "csrc/kernels.h").read_text(encoding="utf-8")
    wrong, members = [], 0
    for name in (*taken, "Features", "Shape"):
        (body,) = re.findall(rf"^struct {name} {{\n(.*?)^}};", header, re.MULTILINE | re.DOTALL)
        for line in body.splitlines():
            declared, _, said = line.partition("//")
            if declared.count(";") and declared.strip() != "};":
                members += 1
                if declared.count(";") > 1 or "," in declared or len(said.strip()) < 3:
                    wrong.append(f"{name}: {line.strip()}")
    assert members >= 30
    assert not wrong, "\n".join(wrong)
