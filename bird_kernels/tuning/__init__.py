"""Tables of measured times, from which ``auto`` takes the fastest candidate on a GPU; `bird tune` (`tuner`) makes them.

A table is a JSON file: a key of device and versions, and a row for each problem and candidate. The table in the user's
cache folder is used if device, driver, PyTorch and Triton are the same; one in the package, if the device is the same.
The environment variable ``BIRD_TUNING`` names another file to use, or is "off".
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from ..types import Problem

VERSION = 1
SHIPPED = Path(__file__).parent  # where the package's own tables would be; there are none yet
# A measurement is used for problems whose sizes differ from its own by up to this factor, multiplied over n, p and q.
REACH = 8.0


class Key(NamedTuple):
    """What a measurement depends on besides the problem: the device's name, and versions of what runs on it."""

    device: str
    driver: str
    torch: str
    triton: str


class Shape(NamedTuple):
    """Rows and widths of a problem."""

    n: int
    p: int
    q: int

    def distance(self, other: Shape) -> float:
        """The factors between the sizes, each at least 1, multiplied over n, p and q; as a logarithm."""
        return sum(abs(math.log(a / b)) for a, b in zip(self, other, strict=True))


class Measurement(NamedTuple):
    """Forward and backward of one problem by one candidate: microseconds of the host and of the device."""

    n: int
    p: int
    q: int
    dtype: str
    precision: str  # of fp32 products, else ""
    estimator: str
    candidate: str  # a backend, or "symmetric ..." with the configuration of the product kernel
    host: float
    device: float

    def check(self) -> None:
        """Raise a ValueError, TypeError or AttributeError for sizes, times or a candidate that no measurement has."""
        if not (min(self.n, self.p, self.q) > 0 and min(self.host, self.device) > 0 and self.us < math.inf):
            raise ValueError(f"a time or size is not positive: {self}")
        name, *numbers = self.candidate.split()
        count = 6 if name == "symmetric" else 0  # rows, columns, step, warps, stages, specialised
        if len(numbers) != count or not all(map(str.isdigit, numbers)):
            raise ValueError(f"{self.candidate!r} is no candidate")

    @property
    def what(self) -> tuple[object, ...]:
        """Everything but the times."""
        return self[:-2]

    @property
    def us(self) -> float:
        """Microseconds per call in a stream of such calls: the slower of host and device."""
        return max(self.host, self.device)


class Table(NamedTuple):
    """The measurements of one device; ``when`` is a date in ISO form."""

    key: Key
    when: str
    rows: tuple[Measurement, ...]


class Finding(NamedTuple):
    """The nearest problem that was measured, and microseconds by candidate."""

    shape: Shape
    us: dict[str, float]


def key_of(device: torch.device) -> Key:
    """The key of a CUDA device of this process."""
    return Key(torch.cuda.get_device_name(device), _driver(), torch.__version__, _version("triton"))


@lru_cache
def _driver() -> str:
    """The newest CUDA version that the driver supports, "13000" for 13.0, else "unknown"; PyTorch does not have it."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        error = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    return str(version.value) if error == 0 else "unknown"


def user_file(key: Key) -> Path:
    """The file in the user's cache folder that holds the table of this key."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bird-kernels" / "tuning" / f"{_slug('-'.join(key))}.json"


def write_table(path: Path, table: Table) -> None:
    """Write a table atomically: other processes may read or write the same file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"version": VERSION, "key": table.key._asdict(), "when": table.when}
    lines = ",\n".join(json.dumps(row._asdict()) for row in table.rows)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108
        raise
    forget_files()


@lru_cache
def read_table(path: Path) -> Table | None:
    """The table in a file; None if there is no file, or, with one warning, if it cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"version {data['version']}, not {VERSION}")
        rows = tuple(Measurement(**row) for row in data["rows"])
        for row in rows:
            row.check()
        return Table(Key(**data["key"]), str(data["when"]), rows)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warnings.warn(f"bird_kernels ignores the tuning table {path}: {error!r}. `bird tune` makes one", stacklevel=2)
        return None


@lru_cache
def table_of(key: Key) -> Table | None:
    """The table to use: that of ``BIRD_TUNING``, of the user's cache folder or of the package; None without any."""
    override = os.environ.get("BIRD_TUNING")
    if override == "off":
        return None
    if override:
        found = read_table(Path(override))
        if found is None and not Path(override).exists():
            warnings.warn(f"bird_kernels finds no tuning table at BIRD_TUNING={override}", stacklevel=2)
        return found
    own = read_table(user_file(key))
    if own is not None and own.key == key:
        return own
    shipped = read_table(SHIPPED / f"{_slug(key.device)}.json")
    return shipped if shipped is not None and shipped.key.device == key.device else None


def forget_files() -> None:
    """Clear the caches, so that files are read again."""
    _driver.cache_clear()
    read_table.cache_clear()
    table_of.cache_clear()
    _findings.cache_clear()
    product_kernel.cache_clear()


def nearest(key: Key, problem: Problem) -> Finding | None:
    """The measurement of the same dtype, precision and estimator with the nearest sizes; None if beyond `REACH`."""
    shape = Shape(problem.n, problem.p, problem.q)
    findings = _findings(key).get((*number_of(problem), problem.estimator), ())
    best = min(findings, key=lambda finding: shape.distance(finding.shape), default=None)
    return best if best is not None and shape.distance(best.shape) <= math.log(REACH) else None


@lru_cache(maxsize=1024)
def product_kernel(problem: Problem) -> tuple[int, ...] | None:
    """The configuration of the symmetric product kernel if it was measured to be the fastest candidate, else None.

    The problem must be on a GPU, its ``precision`` explicit (`backends.precise`).
    """
    finding = nearest(key_of(problem.device), problem)
    if finding is None:
        return None
    name, *numbers = min(finding.us, key=finding.us.__getitem__).split()
    return tuple(map(int, numbers)) if name == "symmetric" else None


def lost_somewhere(name: str, key: Key, dtype: torch.dtype, candidates: Sequence[str]) -> bool:
    """Whether, in any measurement of this dtype, another of the ``candidates`` was faster than backend ``name``."""
    for (kind, *_), findings in _findings(key).items():
        for finding in findings if kind == str(dtype).removeprefix("torch.") else ():
            known = [candidate for candidate in finding.us if candidate.split()[0] in (*candidates, "symmetric")]
            if name in known and min(known, key=finding.us.__getitem__) != name:
                return True
    return False


def number_of(problem: Problem) -> tuple[str, str]:
    """A problem's dtype and precision as a `Measurement` has them; the latter is "" unless the dtype is "float32"."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return dtype, (problem.precision or "ieee") if dtype == "float32" else ""


@lru_cache
def _findings(key: Key) -> dict[tuple[str, str, str], list[Finding]]:
    us: dict[tuple[str, str, str], dict[Shape, dict[str, float]]] = {}
    found = table_of(key)
    for row in found.rows if found is not None else ():
        of_kind = us.setdefault((row.dtype, row.precision, row.estimator), {})
        of_kind.setdefault(Shape(row.n, row.p, row.q), {})[row.candidate] = row.us
    return {kind: [Finding(*item) for item in shapes.items()] for kind, shapes in us.items()}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
