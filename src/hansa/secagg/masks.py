"""Masks: streams of AES-128 in counter mode, added to words and taken away from them again, as fast as they are made.

The mask of a key is its stream, read as little-endian words of the array's own size; word ``i`` is always the same,
whichever part of the row is asked for. Sums are modulo ``2**32`` or ``2**64``. Words are walked in chunks that stay in
a processor's cache with the piece of stream that is added to them, so that a mask costs little more than its AES.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import CipherContext

from hansa.core.errors import InputError
from hansa.secagg.primitives import stream

Words = npt.NDArray[np.unsignedinteger[Any]]  # uint32 or uint64

_BLOCK = 16  # bytes of AES
_CHUNK = 2**18  # bytes at a time
_KEYS = 1024  # streams that are open at once
_PIECE = 2**22  # bytes of a row that a thread works on at a time, at most: streams are opened anew for each


def add_masks(
    words: Words, plus: Sequence[bytes], minus: Sequence[bytes] = (), *, start: int = 0, num_threads: int = 1
) -> None:
    """Add the masks of the keys ``plus`` to ``words`` (any number,), and take those of ``minus`` away, in place.

    ``words`` is uint32 or uint64, contiguous: it is a row's part from word ``start`` on, which must be a multiple of
    four. Keys are 16 bytes. The number of threads changes no bit; memory beyond ``words`` does not grow with them.

    >>> row = np.array([1, 2, 3], np.uint32)
    >>> add_masks(row, [bytes(16)])
    >>> row.tolist()
    [3561744743, 992774897, 1509575819]
    >>> add_masks(row, [], [bytes(16)])
    >>> row.tolist()
    [1, 2, 3]
    """
    if words.dtype not in (np.uint32, np.uint64) or words.ndim != 1 or not words.flags.c_contiguous:
        raise InputError(f"masks: expected contiguous words of uint32 or uint64, found {words.dtype} {words.shape}")
    if start % 4:
        raise InputError(f"masks: expected to start at a multiple of four words, found {start}")
    signed = [(key, np.add) for key in plus] + [(key, np.subtract) for key in minus]
    groups = [signed[at : at + _KEYS] for at in range(0, len(signed), _KEYS)]

    def work(first: int, stop: int) -> None:
        for group in groups:
            _add(words[first:stop], group, (start + first) * words.itemsize // _BLOCK)

    share = max(-(-len(words) // max(num_threads, 1)), _CHUNK // words.itemsize)
    length = -(-min(share, _PIECE // words.itemsize) // 4) * 4
    pieces = [(first, min(first + length, len(words))) for first in range(0, len(words), length)]
    if len(pieces) < 2 or num_threads < 2:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(num_threads) as pool:  # AES and NumPy's sums let other threads run
        for _ in pool.map(lambda piece: work(*piece), pieces):
            pass


def num_cores() -> int:
    """How many cores this process may use.

    >>> num_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add(words: Words, signed: Sequence[tuple[bytes, np.ufunc]], first_block: int) -> None:
    """All streams onto one part of a row, chunk by chunk: the words stay in the cache until every stream is added."""
    opened: list[tuple[CipherContext, np.ufunc]] = [(stream(key, first_block), apply) for key, apply in signed]
    length = _CHUNK // words.itemsize
    zeros, buffer = (
        memoryview(bytes(_CHUNK)),
        bytearray(_CHUNK + _BLOCK),
    )  # early versions of cryptography want more room
    for first in range(0, len(words), length):
        here = words[first : first + length]
        nothing, mask = zeros[: here.nbytes], np.frombuffer(buffer, words.dtype.newbyteorder("<"), len(here))
        for encryptor, apply in opened:
            encryptor.update_into(nothing, buffer)
            apply(here, mask, out=here)


__all__ = ["add_masks", "num_cores"]
