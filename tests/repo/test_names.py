"""What a reader may rely on: a name is one thing, private ones stay in their file, and long calls are by keyword."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("bird", "bird_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}
MOST_POSITIONAL = 6


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def made(tree: ast.AST) -> set[str]:
    """The private names that a file gives to functions, classes, variables and attributes."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def taken(tree: ast.AST) -> Iterator[str]:
    """The private names that a file imports, or takes of a module or an object that another file made."""
    own = made(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            of_import = isinstance(node.value, ast.Name) and node.value.id in imported
            if of_import or node.attr not in own:
                yield node.attr


def test_private_names_stay_in_their_file() -> None:
    """Names that no file of ours makes are PyTorch's or Python's, as ``torch._C`` and ``_replace`` are."""
    ours = {file: made(tree) for file, tree in TREES.items()}
    wrong = [
        f"{file} takes {name} of {', '.join(other for other in ours if other != file and name in ours[other])}"
        for file, tree in TREES.items()
        for name in sorted(set(taken(tree)))
        if any(name in names for other, names in ours.items() if other != file)
    ]
    assert not wrong, "\n".join(wrong)


def is_kernel(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_few_positional_parameters() -> None:
    """Of a method, without the object itself; of an autograd function, without its context."""
    wrong = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
                if count > MOST_POSITIONAL:
                    wrong.append(f"{file}:{node.lineno} {node.name} takes {count}")
    assert not wrong, "\n".join(wrong)


# The functions that every backend's module has, the one that asks them (`backends.why_not`), and those of backends in
# which pairs share launches.
OF_BACKENDS = {"why_not", "stash_shapes", "forward", "backward", "forward_together", "backward_together"}


def public(tree: ast.Module) -> Iterator[str]:
    """The classes, type aliases and public functions at the top of a file."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found = [node.name]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found = [target.id for target in targets if isinstance(target, ast.Name) and not target.id.isupper()]
            found = [name for name in found if name[0].isupper()]
        yield from (name for name in found if not name.startswith("_"))


def test_classes_and_public_functions_have_one_name_each() -> None:
    """In the packages, the benchmarks and the tools together: who reads a name finds one thing of that name.

    Three rules leave names out: a program's ``main``; the functions that make a module a backend; and `reference`,
    whose functions are the literal definitions of what `functional` exports under the same names. Examples stand alone:
    each may say ``train``.
    """
    homes: dict[str, set[str]] = {}
    for folder in ("bird", "bird_kernels", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            of_backends = OF_BACKENDS if file.startswith("bird_kernels/backends/") else set()
            if file != "bird_kernels/reference.py":
                for name in public(ast.parse(path.read_text(encoding="utf-8"))):
                    if name != "main" and name not in of_backends:
                        homes.setdefault(name, set()).add(file)
    assert len(homes) > 800
    assert {"Pooler", "GateResult", "Layout"} <= homes.keys()
    assert {name: sorted(files) for name, files in homes.items() if len(files) > 1} == {}
