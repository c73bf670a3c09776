"""A safe reader of pickles that contain only arrays, lists, numbers and strings.

The official CIFAR and ImageNet-32 batches are pickled dicts of a NumPy array and lists. A pickle is a program. Python's
unpickler can restrict which functions it calls, but NumPy's own suffice to write outside an array: they trust the type
and the shape in the file. This reader interprets the program's instructions itself (`pickletools.genops` only lists
them), supports only those that such files need, and makes each array from bytes whose type and size it has checked.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from .layout import require_file

LARGEST_FILE = 1 << 31  # bytes; the largest official batch has 473 MB
MOST_INSTRUCTIONS = 4_000_000  # a batch of ImageNet-32 needs 400,000; each may create an object of about 100 bytes

_CALLABLE = {
    "numpy ndarray": "array",
    "numpy dtype": "dtype",
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",  # NumPy 2
    "_codecs encode": "encode",
}
_NUMBERS = frozenset({"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"})
_TEXTS = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
_TEXTS |= frozenset({"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass
class _Named:
    """A function or type that a pickle names: one of `_CALLABLE`'s values."""

    kind: str


@dataclass
class _Type:
    """A pickled NumPy dtype: ``code`` such as "u1", and the byte order from its state."""

    code: str
    order: str = "|"


@dataclass
class _Array:
    """A pickled array; its value is set by a BUILD instruction."""

    value: np.ndarray | None = None


def load_batch(path: Path) -> dict[str, Any]:
    """Read a pickled dict of arrays, lists, numbers and strings, written by Python 2 or 3.

    Returns:
        The dict, with keys as str. Arrays are read-only.

    Raises:
        ValueError: the file is larger than 2 GiB, is cut short, holds no dict, or needs anything but such
            values; no function that it names is called.
    """
    size = require_file(path).stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{path}: {size} bytes; a batch of images has at most {LARGEST_FILE}")
    try:
        content = _evaluate(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a broken pickle fails in any way: IndexError, KeyError, TypeError, ...
        raise ValueError(f"{path} is no whole pickle of arrays and lists: {error or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a pickled {type(content).__name__}, not a dict")
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: value.value if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _evaluate(data: bytes) -> object:
    """The value of a pickle, with `_Named`, `_Type` and `_Array` in place of NumPy's objects."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    room = len(data)

    def encoded(text: Any) -> bytes:
        """Bytes that were written as text. They are no more than the file, which may name one text many times."""
        nonlocal room
        room -= len(_a(str, text))
        if room < 0:
            raise ValueError("it makes more bytes than it holds: refused")
        return cast(bytes, text.encode("latin1"))

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if number >= MOST_INSTRUCTIONS:
            raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions, which no batch of images needs")
        if name in _NUMBERS or name in _TEXTS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("APPEND", "APPENDS"):
            values = since_mark() if name == "APPENDS" else [stack.pop()]
            _a(list, stack[-1]).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _put(_a(dict, stack[-1]), values)
        elif name in ("LIST", "TUPLE", "DICT"):
            values = since_mark()
            stack.append(values if name == "LIST" else tuple(values) if name == "TUPLE" else _put({}, values))
        elif name in _TUPLES:
            count = _TUPLES[name]
            values = stack[len(stack) - count :]
            if len(values) < count:
                raise ValueError("it is damaged: a tuple of more values than there are")
            stack[len(stack) - count :] = [tuple(values)]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = " ".join(_a(str, part) for part in (stack.pop(-2), stack.pop()))
            if argument not in _CALLABLE:
                raise ValueError(f"it asks for {'.'.join(argument.split(' '))}, which no such file needs: refused")
            stack.append(_Named(_CALLABLE[argument]))
        elif name == "REDUCE":
            arguments = _a(tuple, stack.pop())
            stack.append(_called(_a(_Named, stack.pop()).kind, arguments, encoded))
        elif name == "BUILD":
            state = _a(tuple, stack.pop())
            _restore(stack[-1], state, encoded)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME", "POP"):
            raise ValueError(f"it has the instruction {name}, which no such file needs: refused")
        elif name == "POP":
            stack.pop()
    raise ValueError("it is cut short")


def _a(kind: type[Any], value: Any) -> Any:
    """``value``; raises a ValueError unless its type is exactly ``kind``."""
    if type(value) is not kind:
        raise ValueError(f"it is damaged: a {type(value).__name__} where a {kind.__name__} is needed")
    return value


def _put(into: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Put alternating keys and values into a dict. Keys must be text, since hashing nested tuples may never end."""
    if len(values) % 2:
        raise ValueError("it is damaged: a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, bytes):
            raise ValueError(f"a key is a {type(key).__name__}, and must be text")
        into[key] = value
    return into


def _called(kind: str, arguments: tuple[Any, ...], encoded: Callable[[Any], bytes]) -> object:
    """The result of a call of one of `_CALLABLE`."""
    if kind == "reconstruct":
        return _Array()
    if kind == "dtype":
        code = arguments[0].decode("latin1") if isinstance(arguments[0], bytes) else arguments[0]
        if not re.fullmatch(r"[iu][1248]|f[248]", _a(str, code)):
            raise ValueError(f"an array of {code!r}: refused, it must be of numbers")
        return _Type(code)
    if kind == "encode":  # Python 3 writes bytes as latin-1 text in the older protocols
        text, encoding = arguments
        if _a(str, encoding) != "latin1":
            raise ValueError(f"bytes as {encoding!r} text")
        return encoded(text)
    raise ValueError("it calls numpy.ndarray, which no such file needs: refused")


def _restore(what: object, state: tuple[Any, ...], encoded: Callable[[Any], bytes]) -> None:
    """Set the state of a type, ``(version, byte order, ...)``, or array, ``(version, shape, type, order, bytes)``."""
    if isinstance(what, _Type):
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if _a(str, order) not in ("<", ">", "|", "="):
            raise ValueError(f"a byte order of {order!r}")
        what.order = order
        return
    _, shape, kind, by_columns, raw = state
    shape, kind = _a(tuple, shape), _a(_Type, kind)
    if isinstance(raw, str):  # written by Python 2
        raw = encoded(raw)
    if len(shape) > 4 or not all(0 <= _a(int, size) <= LARGEST_FILE for size in shape):
        raise ValueError(f"an array of the shape {str(shape)[:60]}")
    dtype = np.dtype(kind.order + kind.code)
    if math.prod(shape) * dtype.itemsize != len(_a(bytes, raw)):
        raise ValueError(f"an array {list(shape)} of {kind.code} has {len(raw)} bytes: it is damaged")
    _a(_Array, what).value = np.frombuffer(raw, dtype).reshape(shape, order="F" if by_columns else "C")
