"""Bytes as a stranger may send them, and how much memory it takes to read them."""

from __future__ import annotations

import gc
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

NUMBERS = [
    *(struct.pack("<Q", 2**n) for n in (16, 31, 32, 48, 62)),
    *(b"0", b"-1", b"99999999999999999999", b"1e999", b"NaN", b"null", b"[]", b'""', b"true", b"2147483648"),
    *(b"\xff" * 8, b"\x00" * 8, b"\r\n", b'"', b"{", b"}", b"[[[[", b"\xc3\xa9", b"\\ud800", b"=", b"-", b",", b"../"),
]


@st.composite
def mutated(draw: Any, seeds: Sequence[bytes]) -> bytes:
    """One of ``seeds`` after some of: a flip, a cut, a piece left out or doubled, a splice of two, another number."""
    body = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        at, to = sorted((draw(st.integers(0, len(body))), draw(st.integers(0, len(body)))))
        piece = body[at:to]
        what = draw(st.sampled_from(["flip", "cut", "drop", "double", "many", "splice", "number", "swap"]))
        if what == "flip" and at < len(body):
            body = body[:at] + bytes([body[at] ^ draw(st.integers(1, 255))]) + body[at + 1 :]
        elif what == "cut":
            body = body[:at]
        elif what == "drop":
            body = body[:at] + body[to:]
        elif what == "double":
            body = body[:to] + piece + body[to:]
        elif what == "many":
            body = body[:at] + piece[:64] * draw(st.integers(2, 50)) + body[to:]
        elif what == "splice":
            other = draw(st.sampled_from(seeds))
            body = body[:at] + other[draw(st.integers(0, len(other))) :]
        elif what == "number":
            body = body[:at] + draw(st.sampled_from(NUMBERS)) + body[min(to, at + 20) :]
        else:
            body = body[:at] + piece[::-1] + body[to:]
    return body


def foreign(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """What may come where one of ``seeds`` is expected: mostly something like it."""
    like = mutated(seeds)
    return st.one_of(like, like, like, st.binary(max_size=300), st.sampled_from(seeds))


def peak_of(what: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives (an exception too), and the most bytes that it held at once."""
    gc.disable()
    tracemalloc.start()
    try:
        found: Any = what()
    except Exception as error:
        found = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
    return found, peak
