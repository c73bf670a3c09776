"""Recipes of either wing: where they stand, their tables as dataclasses, and the grid of runs that they describe."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
LONGEST = 60  # characters of a name; those of a network and a variant meet in one file name, of at most 255 bytes


def require_known(what: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError, with the nearest names, unless ``value`` is one of those known."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known) or known
        raise ValueError(f"{what}: there is no {value!r}; there is {', '.join(map(repr, near))}")


def require_name(what: str, name: str) -> None:
    """Raises a ValueError unless a name of the user's can begin the name of a file, in the folder meant for it."""
    if name.startswith(".") or len(name) > LONGEST or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(
            f"{what} {name!r} names files: no slashes, no control characters, no dot at the beginning, and at most "
            f"{LONGEST} characters"
        )


def grid(
    recipe: Any,
    *,
    networks: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
) -> list[tuple[str, str, str, int]]:
    """Networks, variant, method and seed of every entry of a recipe's tables, or of some: None for all.

    Args:
        recipe: of images or of language models.
        networks: keys of the recipe's.
        variants: the same.
        methods: as far as a variant has them.
        seeds: how many; None for the recipe's.
    """
    return [
        (name, variant, method, seed)
        for name in (recipe.networks if networks is None else networks)
        for variant in (recipe.variants if variants is None else variants)
        for method in recipe.variants[variant].methods or recipe.methods
        if methods is None or method in methods
        for seed in range(recipe.seeds if seeds is None else seeds)
    ]


def names() -> list[str]:
    """The recipes that come with the package, as ``folder/name``."""
    folders = [folder for folder in (resources.files(__package__) / "recipes").iterdir() if folder.is_dir()]
    files = [(folder.name, file.name) for folder in folders for file in folder.iterdir()]
    return sorted(f"{folder}/{file.removesuffix('.toml')}" for folder, file in files if file.endswith(".toml"))


def parsed(recipe: str, parse: Callable[[str, Mapping[str, Any]], T]) -> T:
    """What ``parse`` makes of a recipe's name and table; arguments and errors otherwise as of `read`."""
    if recipe.endswith(".toml"):
        path, name = Path(recipe), Path(recipe).stem
        if not path.is_file():
            raise ValueError(f"there is no file {recipe}")
        require_name("the recipe", name)
        text = path.read_text(encoding="utf-8")
    else:
        require_known("recipe", recipe, names())
        name = recipe
        text = (resources.files(__package__) / "recipes").joinpath(f"{recipe}.toml").read_text(encoding="utf-8")
    try:
        return parse(name, tomllib.loads(text))
    except (ValueError, TypeError) as error:  # tomllib's own is a ValueError
        raise ValueError(f"recipe {recipe}: {error}") from error


def made(where: str, kind: type[T], table: Mapping[str, Any]) -> T:
    """The dataclass from a table; lists become tuples, unknown keys are refused with a ValueError that says where."""
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        require_known(f"a key of {where}", key, known)
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def data_root(root: Path | str | None) -> Path:
    """The folder that holds the data sets: `root`, else ``$BIRD_DATA``, else ``data`` in the working directory.

    Raises:
        ValueError: it begins with the home of a user that there is not.
    """
    return at_home(root or os.environ.get("BIRD_DATA") or "data").absolute()


def at_home(path: Path | str) -> Path:
    """The path with ``~`` and ``~name`` at its beginning resolved.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no home of such a user here") from error
