"""``MinSeparation``: groups of clients take turns, so that nobody takes part in two rounds that are near each other.

The participation schema of Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta and Xu, "(Amplified) banded matrix
factorization: a unified approach to private training", NeurIPS 2023, and of Xu, Zhang, Andrew, Choquette,
Kairouz, McMahan, Rosenstock and Zhang, "Federated learning of Gboard language models with differential privacy", ACL
industry track 2023. Difference: there each client counts the rounds since its last one; here groups are
fixed, so that the server sees to it, and a client's rounds are whole turns apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.ids import NumberedIds, SomeIds
from hansa.data.sampling import Uniform


@dataclass(frozen=True, kw_only=True)
class MinSeparation:
    """Cut the clients into ``rounds`` groups; round t draws from group ``t mod rounds`` alone, by ``within``.

    A client's group is the SHA-256 of its id modulo ``rounds``: the same for ever, whoever else joins or leaves. Groups
    differ in size by chance; one that is smaller than the cohort takes part as a whole, one of nobody leaves its round
    out: let ``cohort_size`` times ``rounds`` stay below the population. The mean is divided by ``cohort_size`` all the
    same, or without one by the groups' mean size.

    >>> sampler = MinSeparation(rounds=2)
    >>> ids = ("amos", "berta", "cleo", "dora")
    >>> [tuple(sampler.of_round(ids, number)) for number in range(3)]
    [('cleo', 'dora'), ('amos', 'berta'), ('cleo', 'dora')]
    """

    rounds: int
    within: Any = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int) or isinstance(self.rounds, bool) or self.rounds < 1:
            raise InputError(f"MinSeparation(rounds=): expected a whole number of 1 or more, found {self.rounds!r}")
        if not callable(getattr(self.within, "cohort", None)) or hasattr(self.within, "turn"):
            raise InputError(
                f"MinSeparation(within=): expected hansa.Uniform() or another sampler, found {self.within!r}"
            )

    def turn(self, number: int) -> tuple[int, int]:
        """The group that round ``number`` draws from, and how many there are.

        >>> MinSeparation(rounds=4).turn(9)
        (1, 4)
        """
        return number % self.rounds, self.rounds

    def of_round(self, ids: Sequence[str], number: int) -> Sequence[str]:
        """Those of ``ids`` whose turn it is in round ``number``, in the order of ``ids``.

        Every id is looked at once; of a tuple and of numbered ids, which stay as they are, this is remembered.
        """
        lasting = isinstance(ids, tuple | NumberedIds)
        positions = (_remembered_groups if lasting else _groups)(_Same(ids), self.rounds)
        return SomeIds(ids, positions[number % self.rounds])

    def cohort(self, ids: Sequence[str], cohort_size: int, key: Key) -> tuple[str, ...]:
        """Some of ``ids``, which are one group's, by the sampler ``within``; nobody of a group of nobody."""
        chosen: tuple[str, ...] = self.within.cohort(ids, cohort_size, key) if len(ids) else ()
        return chosen


class _Same:
    """A sequence that equals itself alone: to look whether a million ids are equal takes too long."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids = ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.ids is self.ids

    def __hash__(self) -> int:
        return id(self.ids)


def _groups(same: _Same, num_groups: int) -> list[npt.NDArray[np.int64]]:
    """The positions of each group's ids, ascending."""
    hashes = b"".join([hashlib.sha256(client.encode()).digest()[:8] for client in same.ids])
    group = np.frombuffer(hashes, ">u8") % np.uint64(num_groups)
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, num_groups, dtype=np.uint64)))


_remembered_groups = lru_cache(maxsize=4)(_groups)


__all__ = ["MinSeparation"]
