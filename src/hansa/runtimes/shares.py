"""``Shares``: who of several workers does which parts of a cohort, and what is done again when one is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class Shares:
    """Each worker has a run of neighbouring parts; who has done his own takes over from the end of the longest.

    Neighbours can be added up where they are done, so that little comes back. ``sizes`` (num_parts,) are the clients of
    each part: runs hold about equally many.

    >>> shares = Shares([5, 5, 5, 5], num_workers=2)
    >>> [shares.take(worker) for worker in (0, 1, 0, 0, 0)]
    [0, 2, 1, 3, None]
    """

    def __init__(self, sizes: Sequence[int], num_workers: int) -> None:
        self._runs: list[deque[int]] = [deque() for _ in range(num_workers)]
        total, before = max(1, sum(sizes)), 0
        for number, size in enumerate(sizes):
            self._runs[min(num_workers - 1, (2 * before + size) * num_workers // (2 * total))].append(number)
            before += size

    @property
    def left(self) -> int:
        """Parts that nobody has taken."""
        return sum(map(len, self._runs))

    def take(self, worker: int) -> int | None:
        """The next part for a worker; None where none is left."""
        own = self._runs[worker]
        if own:
            return own.popleft()
        longest = max(self._runs, key=len)
        return longest.pop() if longest else None

    def take_some(self, worker: int) -> list[int]:
        """Half of what a worker's run still holds, at least one part; else one of another's."""
        own = self._runs[worker]
        count = max(1, (len(own) + 1) // 2)
        taken = [self.take(worker) for _ in range(count)]
        return [number for number in taken if number is not None]

    def give_back(self, worker: int, parts: Iterable[int]) -> None:
        """Parts to be done (again), first of all."""
        self._runs[worker].extendleft(sorted(parts, reverse=True))
