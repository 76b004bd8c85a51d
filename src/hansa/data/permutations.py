"""Random orders of each client's rows, drawn for many clients at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hansa.core.key import Key, material, philox, words

_SHIFT = np.uint64(32)


def permutations(keys: Sequence[Key], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A random order of ``0 .. sizes[i]`` in each row, then whatever pads it: (num_keys, max(sizes)) int64.

    A row's first ``sizes[i]`` places do not depend on the other rows.
    """
    width = int(sizes.max()) if len(sizes) else 0
    if width * len(sizes) > 2 * int(sizes.sum()):  # few of them long: no words for what pads the others
        return _ragged_permutations(keys, sizes, width)
    rank = words(keys, width).astype(np.uint64)
    rank[np.arange(width)[None, :] >= sizes[:, None]] = np.uint64(1) << _SHIFT
    return np.argsort(rank, axis=1, kind="stable")


def _ragged_permutations(keys: Sequence[Key], sizes: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """The same draws, one row after another; what pads a row is 0."""
    blocks = -(-sizes // 4)
    owner, ends = np.repeat(np.arange(len(sizes)), blocks), np.cumsum(blocks)
    counter = np.arange(len(owner)) - (ends - blocks)[owner]
    drawn = philox(material(keys)[owner], counter.astype(np.uint64)[:, None]).reshape(-1)
    places = 4 * np.repeat(counter, 4) + np.tile(np.arange(4), len(owner))
    whose = np.repeat(owner, 4)
    real = places < sizes[whose]
    whose = whose[real]
    order = np.argsort((whose.astype(np.uint64) << _SHIFT) | drawn[real], kind="stable")
    out = np.zeros((len(sizes), width), np.int64)
    out[whose, places[real]] = order - (np.cumsum(sizes) - sizes)[whose]
    return out
