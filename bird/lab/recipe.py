"""Recipes of either wing: where they stand, their tables as dataclasses, and the grid of runs that they describe."""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
WHOLE = "the recipe"  # where what stands in no part of it is
MOST = {int: 1e9, float: 1e30}  # of any number in a recipe; float32 ends at 3e38
LONGEST = 60  # characters of a name; those of a network and a variant meet in one file name, of at most 255 bytes


def require_known(what: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError, with the nearest names, unless ``value`` is one of those known."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known) or known
        raise ValueError(f"{what}: there is no {value!r}; there is {', '.join(map(repr, near))}")


def require_name(what: str, name: str) -> None:
    """Raises a ValueError unless a name of the user's can begin the name of a file, in the folder meant for it."""
    if not name or name.startswith(".") or len(name) > LONGEST or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(
            f"{what} {name!r} names files: no slashes, no control characters, no dot at the beginning, and "
            f"1 to {LONGEST} characters"
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
        variants: the same, each for the networks that it has.
        methods: as far as a variant has them.
        seeds: how many; None for the recipe's.
    """
    return [
        (name, variant, method, seed)
        for name in (recipe.networks if networks is None else networks)
        for variant in (recipe.variants if variants is None else variants)
        if name in (getattr(recipe.variants[variant], "networks", None) or recipe.networks)
        for method in recipe.variants[variant].methods or recipe.methods
        if methods is None or method in methods
        for seed in seeds_of(recipe, seeds)
    ]


def seeds_of(recipe: Any, number: int | None = None) -> range:
    """The seeds of a recipe's repetitions, from its ``first_seed`` on: the first ``number`` of them; None for all."""
    return range(recipe.first_seed, recipe.first_seed + (recipe.seeds if number is None else number))


def names() -> list[str]:
    """The recipes that come with the package, as ``folder/name``."""
    folders = [folder for folder in (resources.files(__package__) / "recipes").iterdir() if folder.is_dir()]
    files = [(folder.name, file.name) for folder in folders for file in folder.iterdir()]
    return sorted(f"{folder}/{file.removesuffix('.toml')}" for folder, file in files if file.endswith(".toml"))


def parsed(recipe: str, parse: Callable[[str, Mapping[str, Any]], T]) -> T:
    """What ``parse`` makes of a recipe's name and table; arguments and errors otherwise as of `read`."""
    if recipe.endswith(".toml"):
        path: Any = Path(recipe)
        name = path.stem
        if not path.is_file():
            raise ValueError(f"there is no file {recipe}")
        require_name("the recipe", name)
    else:
        require_known("recipe", recipe, names())
        name = recipe
        path = (resources.files(__package__) / "recipes").joinpath(f"{recipe}.toml")
    try:
        return parse(name, tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:  # tomllib's own is a ValueError
        raise ValueError(f"recipe {recipe}: {error}") from error


def made(where: str, kind: type[T], table: Mapping[str, Any]) -> T:
    """The dataclass from a table, and so the dataclasses in it; lists become tuples.

    Raises:
        ValueError: a key that is unknown or missing, a value of another type or out of range: where it stands.
    """
    require_table(where, table)
    known, hints = {f.name: f for f in fields(kind)}, get_type_hints(kind)  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        require_known(f"a key of {where}", key, known)
        values[key] = _with_parts(key if where == WHOLE else f"{where}.{key}", hints[key], value)
        if not _is(values[key], hints[key]):
            raise ValueError(f"{where}: {key} must be {_called(hints[key])}, not {value!r}")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{where}: {key} must not hold the character \\0")
    needed = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in needed if key not in table]:
        raise ValueError(f"{where}: {', '.join(missing)} must be there")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _with_parts(where: str, hint: Any, value: Any) -> Any:
    """A value whose annotation is a dataclass, or a mapping to one from names of the user's, made of its tables."""
    kinds: list[Any] = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    if not kinds or is_dataclass(value):
        return value
    if get_origin(hint) is not Mapping:
        return made(where, kinds[0], value)
    for name in require_table(where, value):
        if name or where != "variants":  # "" is the recipe as it is
            require_name(f"the {where} of a recipe:", name)
    return {name: _with_parts(f"{where}.{name}", kinds[0], each) for name, each in value.items()}


def require_table(where: str, table: Any) -> Mapping[str, Any]:
    """The same, or a ValueError unless it is a table of TOML."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} must be a table, not {table!r}")
    return table


def require_within(part: Any, **bounds: float | tuple[float, float]) -> None:
    """Raises a ValueError unless numbers of a dataclass are finite and within bounds; None passes.

    Args:
        part: the dataclass.
        bounds: by field: the least value, or the least and the largest.
    """
    for name, bound in bounds.items():
        value = getattr(part, name)
        if value is not None and MOST[int if isinstance(value, int) else float] < value < math.inf:
            raise ValueError(
                f"{name} must be at most {MOST[int if isinstance(value, int) else float]:g}, not {str(value)[:60]}"
            )
        least, most = bound if isinstance(bound, tuple) else (bound, math.inf)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            limit = f"at least {least:g}" if math.isinf(most) else f"{least:g} to {most:g}"
            raise ValueError(f"{name} must be {limit}{'' if isinstance(value, int) else ', and finite'}, not {value}")


def require_percents(part: Any, *names: str) -> None:
    """Raises a ValueError unless the published figures of a dataclass, by method, are from 0 to 100."""
    for name in names:
        for method, value in getattr(part, name).items():
            if not 0 <= value <= 100:
                raise ValueError(f"{name}: {method} must be 0 to 100, in %, not {value}")


def settings_of(part: Any, later: Collection[str]) -> dict[str, Any]:
    """A dataclass as plain data for the names of stages, without settings that are ``later`` than the first recipes
    where they have their defaults: what was trained before they could be said keeps its name."""
    defaults = {f.name: f.default for f in fields(part)}
    return asdict(
        part, dict_factory=lambda items: {k: v for k, v in items if k not in later or v != defaults.get(k, MISSING)}
    )


def _is(value: Any, hint: Any) -> bool:
    """Is it of the annotated type? A whole number is a number too, but true is none."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and all(_is(each, parts[0]) for each in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_is(each, parts[1]) for each in value.values())
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool, str) else isinstance(value, hint)


def _called(hint: Any) -> str:
    """A type in words; None, which TOML cannot say, is left out."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(_called(part) for part in parts if part is not NoneType)
    if kind is tuple:
        return f"a list of {names[parts[0]].split()[-1].replace('number', 'whole number')}s"
    return names.get(hint, "a table")


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
