"""A ``Key`` names a random stream; equal keys give equal draws on every machine and in every block.

Children are one-way hashes, so that whoever holds a child learns nothing about its parent or its siblings. Draws for
a block of clients come from Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011, section 3.3), a counter-based generator: word ``j`` of a row depends on that row's key and ``j``
alone, never on how many rows or columns were asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Key(NamedTuple):
    """The name of one random stream: 32 bytes.

    >>> Key.of(0).child("round", 3) == Key.of(0).child("round", 3)
    True
    >>> Key.of(0).child("a") == Key.of(0).child("b")
    False
    """

    material: bytes

    @staticmethod
    def of(seed: int | str) -> Key:
        """The root key of a seed."""
        return Key(hashlib.sha256(f"hansa seed {seed}".encode()).digest())

    def child(self, *names: int | str) -> Key:
        """A stream of its own for ``names``; the parent cannot be found from it."""
        text = "".join([f"s{len(n)}:{n}" if isinstance(n, str) else f"i{n}:" for n in names])
        return Key(hashlib.sha256(self.material + text.encode()).digest())

    def generator(self) -> np.random.Generator:
        """A NumPy generator for this stream, for draws that need no vectorising over clients."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.material[:16], "big")))


class Streams(Sequence[Key]):
    """Keys that are made when they are asked for: most parts of a round draw nothing.

    >>> Streams(("a", "b"), Key.of(0).child)[1:][0] == Key.of(0).child("b")
    True
    """

    def __init__(self, names: Sequence[Any], make: Callable[[Any], Key]) -> None:
        self._names, self._make = names, make

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return Streams(self._names[index], self._make) if isinstance(index, slice) else self._make(self._names[index])


def words(keys: Sequence[Key], count: int, start: int = 0) -> npt.NDArray[np.uint32]:
    """Random words ``start .. start + count`` of each key's stream: (num_keys, count) uint32.

    >>> block = words([Key.of(1), Key.of(2)], 5)
    >>> bool((block[1] == words([Key.of(2)], 3, start=2)[0, :1]).any())
    True
    """
    first, last = start // 4, -(-(start + count) // 4)
    counter = np.arange(first, last, dtype=np.uint64)
    out = philox(material(keys), counter).reshape(len(keys), -1)
    return out[:, start - 4 * first :][:, :count]


def uniform(keys: Sequence[Key], count: int, start: int = 0) -> npt.NDArray[np.float32]:
    """Numbers in [0, 1), 24 bits each: (num_keys, count) float32."""
    return (words(keys, count, start) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def normal(keys: Sequence[Key], count: int) -> npt.NDArray[np.float64]:
    """Standard normal numbers by Box and Muller's method: (num_keys, count) float64."""
    pairs = -(-count // 2)
    raw = words(keys, 4 * pairs).astype(np.uint64).reshape(len(keys), pairs, 4)
    unit = ((raw[..., 0::2] << np.uint64(21)) ^ raw[..., 1::2]).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log1p(-unit[..., 0])), 2.0 * np.pi * unit[..., 1]
    out = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return out.reshape(len(keys), 2 * pairs)[:, :count]


def material(keys: Sequence[Key]) -> npt.NDArray[np.uint64]:
    """The first four 32-bit words of each key: (num_keys, 4)."""
    return np.frombuffer(b"".join([key.material[:16] for key in keys]), dtype=">u4").reshape(-1, 4).astype(np.uint64)


def philox(material: npt.NDArray[np.uint64], counter: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Philox-4x32-10 of (counter low, counter high, key words 2 and 3) under key words 0 and 1.

    ``counter`` (num_counters,) for every key, or (num_keys, num_counters).
    """
    shape = (len(material), counter.shape[-1])
    c0 = np.broadcast_to(counter & _LOW, shape)
    c1 = np.broadcast_to(counter >> _SHIFT, shape)
    c2, c3 = (np.broadcast_to(material[:, [i]], shape) for i in (2, 3))
    k0, k1 = material[:, [0]], material[:, [1]]
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)
