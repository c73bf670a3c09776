"""Bytes of a file, cut or changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


def mutated(data: bytes, seed: int) -> bytes:
    """Cut, or with some bytes flipped, overwritten, left out, doubled or put in."""
    draw = random.Random(seed)
    out, kind = bytearray(data), seed % 6
    if kind == 0:
        return bytes(out[: draw.randrange(len(out))])
    for _ in range(draw.choice((1, 1, 1, 4))):
        # Headers stand first, and are most of what can go wrong.
        at = draw.randrange(min(len(out), 200)) if draw.random() < 0.5 else draw.randrange(len(out))
        if kind == 1:
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            out[at] = draw.randrange(256)
        elif kind == 3:
            del out[at : at + draw.randint(1, 9)]
            out = out or bytearray(b"\0")
        elif kind == 4:
            out[at:at] = out[at : at + draw.randint(1, 9)]
        else:
            out[at:at] = bytes([draw.choice(b'{}[]",:0e-\\\xff\0')])
    return bytes(out)


def complaint(read: Callable[[], Any], kinds: tuple[type[Exception], ...] = (ValueError,)) -> str | None:
    """What is said of a file, in an error of one of the kinds; None if it is read."""
    try:
        read()
    except kinds as error:
        return str(error)
    return None
