"""Words of few bits, packed without gaps and unpacked again, by shifts of whole rows.

A block of ``BLOCK`` words is a matrix with as many rows as a word has bits (32 or 64); its ``width`` packed rows hold
the bits of each column one after the other, lowest first, so that a shift of a row moves a bit of thousands of words
(the "vertical" layout of Lemire and Boytsov, "Decoding billions of integers per second through vectorization",
Software: Practice and Experience, 2015, section 4). The last block is as narrow as it has to be; words that do not fill
a column are packed as a column of their own, cut after its last byte. All is little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError, ProtocolError

Words = npt.NDArray[np.unsignedinteger[Any]]  # uint32 or uint64

BLOCK = 2**18  # words


def packed_size(count: int, width: int) -> int:
    """Bytes of ``count`` words of ``width`` bits.

    >>> packed_size(3, 26)
    10
    """
    return -(-count * width // 8)


def pack(words: Words, width: int) -> npt.NDArray[np.uint8]:
    """The lowest ``width`` bits of ``words`` (n,) of uint32 or uint64, as ``packed_size(n, width)`` bytes.

    Raises ``InputError`` where a word has no ``width`` bits.

    >>> pack(np.array([5, 2, 7], np.uint32), 3).tolist()  # 111 010 101
    [213, 1]
    """
    bits = _bits(words.dtype, width)
    form = words.dtype.newbyteorder("<")
    out = np.empty(packed_size(len(words), width), np.uint8)
    mask = form.type(2**width - 1)
    for first, count, lanes in _blocks(len(words), bits):
        block = words[first : first + count]
        if count < bits:
            block = np.concatenate([block, np.zeros(bits - count, words.dtype)])
        rows, packed = block.reshape(bits, lanes), np.zeros((width, lanes), form)
        for number, row in enumerate(rows):
            whole, shift = divmod(number * width, bits)
            kept = row & mask
            packed[whole] |= kept << form.type(shift)
            if shift + width > bits:
                packed[whole + 1] |= kept >> form.type(bits - shift)
        at = first * width // 8
        size = packed_size(count, width)
        out[at : at + size] = packed.view(np.uint8).ravel()[:size]
    return out


def unpack(
    packed: npt.NDArray[np.uint8],
    width: int,
    count: int,
    first: int = 0,
    stop: int | None = None,
    *,
    dtype: type[np.uint32] | type[np.uint64] = np.uint32,
) -> Words:
    """Words ``first`` up to ``stop`` of the ``count`` that were packed; whole blocks of ``BLOCK`` are fastest.

    ``packed`` may be memory-mapped: only the blocks that are asked for are read. Raises ``ProtocolError`` where its
    length is not that of ``count`` words.

    >>> packed = pack(np.array([5, 2, 7], np.uint32), 3)
    >>> unpack(packed, 3, 3, first=1).tolist()
    [2, 7]
    """
    stop = count if stop is None else min(stop, count)
    out: Words = np.zeros(max(stop - first, 0), dtype)
    add_unpacked(out, packed, width, count, first)
    out &= out.dtype.type(2**width - 1)
    return out


def add_unpacked(out: Words, packed: npt.NDArray[np.uint8], width: int, count: int, first: int = 0) -> None:
    """Add the packed words ``first`` up to ``first + len(out)`` to ``out``, in place, modulo ``2**width``.

    Bits of ``out`` above ``width`` mean nothing afterwards: cut them off once all is added. Of a row on disk, one block
    at a time is in memory.

    >>> total = np.array([1, 1], np.uint32)
    >>> add_unpacked(total, pack(np.array([5, 2, 7], np.uint32), 3), 3, 3, first=1)
    >>> (total & 7).tolist()
    [3, 0]
    """
    bits = _bits(out.dtype, width)
    if packed.dtype != np.uint8 or packed.shape != (packed_size(count, width),):
        raise ProtocolError(
            f"expected {count:,} words of {width} bits in {packed_size(count, width):,} bytes, found {packed.shape} of "
            f"{packed.dtype}"
        )
    stop = first + len(out)
    for at, length, lanes in _blocks(count, bits, first, stop):
        here = packed[at * width // 8 : at * width // 8 + packed_size(length, width)]
        if first <= at and at + bits * lanes <= stop:
            _add_block(out[at - first : at - first + length].reshape(bits, lanes), here, width)
            continue
        block: Words = np.zeros((bits, lanes), out.dtype)
        _add_block(block, here, width)
        low, high = max(first, at), min(stop, at + length)
        out[low - first : high - first] += block.reshape(-1)[low - at : high - at]


def _add_block(into: Words, packed: npt.NDArray[np.uint8], width: int) -> None:
    """Add a block's words to ``into`` (bits, columns), a row at a time; the last bytes of ``packed`` may be cut off."""
    (bits, lanes), form = into.shape, into.dtype.newbyteorder("<")
    if packed.size < width * lanes * form.itemsize:
        packed = np.concatenate([packed, np.zeros(width * lanes * form.itemsize - packed.size, np.uint8)])
    rows = packed.view(form).reshape(width, lanes)
    low, high = np.empty(lanes, into.dtype), np.empty(lanes, into.dtype)
    for number, row in enumerate(into):
        whole, shift = divmod(number * width, bits)
        np.right_shift(rows[whole], form.type(shift), out=low)
        if shift + width > bits:
            np.left_shift(rows[whole + 1], form.type(bits - shift), out=high)
            low |= high
        row += low


def _blocks(count: int, bits: int, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Where each block of ``count`` words begins, its words and columns, if any lie from ``first`` up to ``stop``."""
    stop = count if stop is None else stop
    whole, columns = count // BLOCK * BLOCK, count // bits * bits
    starts = range(first // BLOCK * BLOCK, min(whole, stop), BLOCK)
    yield from ((at, BLOCK, BLOCK // bits) for at in starts)
    if whole < columns and first < columns and whole < stop:
        yield whole, columns - whole, (columns - whole) // bits
    if columns < count and first < count and columns < stop:
        yield columns, count - columns, 1


def _bits(dtype: np.dtype[np.generic], width: int) -> int:
    if dtype not in (np.uint32, np.uint64) or not 1 <= width <= 8 * dtype.itemsize:
        raise InputError(f"packing: expected 1 to 32 bits of uint32, or 1 to 64 of uint64, found {width} of {dtype}")
    return 8 * dtype.itemsize


__all__ = ["BLOCK", "add_unpacked", "pack", "packed_size", "unpack"]
