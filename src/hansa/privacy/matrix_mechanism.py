"""The matrix mechanism: a strategy with the schedule that it was planned for, and what its releases cost together.

All releases of a run are one Gaussian mechanism ``C x + z``: with z of standard deviation ``noise_multiplier *
sensitivity`` it costs what one release with that noise multiplier costs, and its first rounds alone cost as much as
their own, smaller sensitivity says.

The sensitivity is ``max |C u|`` over the rounds u that one client can take part in. Where groups take turns these are
group, group + separation, group + 2 * separation, ... and the maximum is over the groups, which is exact. For Toeplitz
matrices group 0 has it, and where coefficients fall no rounds that are at least so far apart have more (Kalinin and
Lampert, "Banded square root matrix factorization for differentially private model training", NeurIPS 2024, theorem 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.privacy.blt import BLT
from hansa.privacy.strategies import Banded, Strategy, Tree, Vector

_KINDS: Mapping[str, Any] = {"tree": Tree, "banded": Banded, "blt": BLT}
Groups = tuple[int | None, ...]  # of each release, the group whose turn it was; None: it could be anybody


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """A strategy for ``num_rounds``, in which a client takes part every ``min_separation`` rounds at most.

    >>> Mechanism(strategy=Tree(), num_rounds=1600, min_separation=1600).sensitivity ** 2  # a tree of 11 levels
    11.0
    """

    strategy: Strategy
    num_rounds: int
    min_separation: int

    def __post_init__(self) -> None:
        for name in ("num_rounds", "min_separation"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"Mechanism({name}=): expected 1 or more, found {getattr(self, name)!r}")

    def __hash__(self) -> int:
        return hash((self.num_rounds, self.min_separation))  # quick: a ledger asks for it at every release

    @staticmethod
    def planned(strategy: Strategy, num_rounds: int, min_separation: int) -> Mechanism:
        """The mechanism with a strategy made for the schedule."""
        own = strategy.planned_for(num_rounds, min_separation)
        return Mechanism(strategy=own, num_rounds=num_rounds, min_separation=min_separation)

    @property
    def sensitivity(self) -> float:
        """How far one client can move all releases together, in units of how far it can move one."""
        return float(_growing(self)[-1])

    def sensitivity_of(self, groups: Groups) -> float:
        """The same of the first ``len(groups)`` releases alone, by whose turn each was."""
        in_turn = all(group == i % self.min_separation for i, group in enumerate(groups))
        if in_turn and len(groups) <= self.num_rounds:
            return float(_growing(self)[len(groups) - 1]) if groups else 0.0
        return _of_any(self, groups)

    def sensitivity_to(self, rounds: Iterable[int]) -> float:
        """How far a client that takes part in these ``rounds`` and no others can move all releases of the run.

        Raises ``InputError`` for a round that the run does not have.
        """
        takes = np.zeros(self.num_rounds)
        for number in rounds:
            if not 0 <= number < self.num_rounds:
                raise InputError(f"mechanism: expected rounds 0 to {self.num_rounds - 1}, found {number}")
            takes[number] = 1.0
        return float(np.linalg.norm(self.strategy.applied(takes)))

    @property
    def loss(self) -> float:
        """The root mean square noise on sums of the first rounds, in units of the run's noise multiplier."""
        return self.sensitivity * math.sqrt(float(self.strategy.variances(self.num_rounds).mean()))

    def as_json(self) -> dict[str, Any]:
        """Numbers and names."""
        kind = next(name for name, known in _KINDS.items() if type(self.strategy) is known)
        strategy = {"kind": kind, **asdict(self.strategy)}  # type: ignore[call-overload]  # each kind is a dataclass
        return {"strategy": strategy, "num_rounds": self.num_rounds, "min_separation": self.min_separation}

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> Mechanism:
        """The mechanism that ``as_json`` wrote; ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        named = {name: tuple(v) if isinstance(v, list) else v for name, v in found["strategy"].items()}
        return _read(tuple(named.items()), found["num_rounds"], found["min_separation"])


@lru_cache(maxsize=64)
def _read(named: tuple[tuple[str, Any], ...], num_rounds: int, min_separation: int) -> Mechanism:
    fields = dict(named)
    strategy = _KINDS[fields.pop("kind")](**fields)
    return Mechanism(strategy=strategy, num_rounds=num_rounds, min_separation=min_separation)


@lru_cache(maxsize=16)
def _growing(mechanism: Mechanism) -> Vector:
    """The sensitivity of the first 1, 2, ..., num_rounds releases, where groups take turns."""
    largest = np.zeros(mechanism.num_rounds)
    num_groups = 1 if mechanism.strategy.is_toeplitz else min(mechanism.min_separation, mechanism.num_rounds)
    for group in range(num_groups):
        takes = np.zeros(mechanism.num_rounds)
        takes[group :: mechanism.min_separation] = 1.0
        np.maximum(largest, np.cumsum(mechanism.strategy.applied(takes) ** 2), out=largest)
    return np.sqrt(largest)


@lru_cache(maxsize=64)
def _of_any(mechanism: Mechanism, groups: Groups) -> float:
    """The sensitivity of releases in which turns were skipped, or not taken."""
    largest = 0.0
    known: set[int | None] = {group for group in groups if group is not None}
    for one in known or {None}:
        takes = np.array([float(group is None or group == one) for group in groups])
        largest = max(largest, float(np.linalg.norm(mechanism.strategy.applied(takes))))
    return largest


__all__ = ["Groups", "Mechanism"]
