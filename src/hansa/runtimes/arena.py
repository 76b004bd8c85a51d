"""``Arena``: rows of one form in one array with room to grow; ``Room``: when arenas move from memory to files."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import RunError

Array = npt.NDArray[Any]

_LOG = logging.getLogger("hansa")


class Arena:
    """Rows of one shape and dtype in one array with room to grow, in memory or in a file."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.rows: Array = np.empty((0, *shape), dtype)
        self.used = 0
        self.free: list[int] = []  # slots below ``used``
        self._path: Path | None = None

    @property
    def row_bytes(self) -> int:
        return int(math.prod(self.rows.shape[1:])) * self.rows.itemsize

    def claim(self, count: int, room: Room) -> Array:
        """Slots for new rows."""
        again = min(count, len(self.free))
        needed = self.used + count - again
        if needed > len(self.rows):
            room.grow(self, needed)
        slots = [self.free.pop() for _ in range(again)]
        slots.extend(range(self.used, needed))
        self.used = needed
        return np.array(slots, np.int64)

    def resize(self, capacity: int, path: Path | None) -> None:
        """Have room for ``capacity`` rows, in memory or in the file at ``path``."""
        shape, dtype = (capacity, *self.rows.shape[1:]), self.rows.dtype
        old = self.rows[: self.used]
        if path is None or not capacity * self.row_bytes:
            self.rows = np.empty(shape, dtype)
            self.rows[: self.used] = old
            return
        with path.open("r+b" if self._path else "x+b") as file:
            _reserve(file.fileno(), capacity * self.row_bytes)
            rows = np.asarray(np.memmap(file, dtype, "r+", shape=shape))
        if self._path is None:
            rows[: self.used] = old
        self.rows, self._path = rows, path


class Room:
    """How much memory the arrays of a store may take, and the folder that they move to beyond it."""

    def __init__(self, limit_bytes: float, folder: str | os.PathLike[str] | None) -> None:
        self._limit, self._within = limit_bytes, folder
        self._folder: Path | None = None
        self.arenas: list[Arena] = []
        self.odd_bytes = 0

    @property
    def bytes(self) -> int:
        return self.odd_bytes + sum(len(arena.rows) * arena.row_bytes for arena in self.arenas)

    def grow(self, arena: Arena, needed: int) -> None:
        """Give an arena room for ``needed`` rows or more."""
        capacity = max(needed, 2 * len(arena.rows))
        try:
            if self._folder is None and self.bytes + (capacity - len(arena.rows)) * arena.row_bytes > self._limit:
                self._spill()
            arena.resize(capacity, self._path(arena))
        except OSError as error:
            raise RunError(
                f"memory: expected to write {capacity * arena.row_bytes / 1e6:.1f} MB of what clients keep to "
                f"{self._folder or self._within or tempfile.gettempdir()}, found {type(error).__name__}: {error}; set "
                "TMPDIR to a folder with more room"
            ) from error

    def _spill(self) -> None:
        """From now on arrays lie in files."""
        self._folder = Path(tempfile.mkdtemp(prefix="hansa-memory-", dir=self._within))
        weakref.finalize(self, _remove, self._folder, os.getpid())
        _LOG.info(
            "What clients keep between rounds has outgrown %.1f MB and lies in files from now on, in %s",
            self._limit / 1e6,
            self._folder,
        )
        for arena in self.arenas:
            arena.resize(len(arena.rows), self._path(arena))

    def _path(self, arena: Arena) -> Path | None:
        return None if self._folder is None else self._folder / f"{self.arenas.index(arena)}.rows"


def _reserve(file: int, size_bytes: int) -> None:
    """Make a file so long, and have the disk set the room aside: a map of a full disk would end the process."""
    os.ftruncate(file, size_bytes)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size_bytes)


def _remove(folder: Path, process: int) -> None:
    """Remove the files, in the process that made them: a fork has no say in it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
