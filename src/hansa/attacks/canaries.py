"""Canaries: clients of an auditor's own, whose update is a random direction as long as the chain lets it be.

Canary i sends ``sign(i, round) * scale * v_i`` for a unit vector v_i drawn evenly from the sphere: Andrew, Kairouz, Oh,
Oprea, McMahan and Suriyakumar, "One-shot empirical privacy estimation for federated learning", ICLR 2024, algorithm 1.
Differences: the signs, by which noise that two rounds share is told from noise of their own; a canary may be left out
(the coins of Steinke, Nasr and Jagielski, NeurIPS 2023); and rounds are put together by the linear rule that is best
against their covariance, whatever that is, instead of by the greatest cosine of any round.

What honest clients add is taken off the released values, as differential privacy grants the attacker: it must hold
against one who knows everybody else's update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat
import numpy as np
import numpy.typing as npt

from hansa.core.chain import Transform
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Array, Client, Draws, Memory, Settings, State, Updates

Floats = npt.NDArray[np.float64]
_KEPT = 2**25  # numbers of directions that are kept; beyond that each is drawn again when it is needed
_WEIGHT = 1e9  # more than any client's, so that a canary weighs as much as the aggregator lets it


class Directions:
    """Unit vectors (num_params,) float32 and signs, by position: all of them follow from a key.

    >>> drawn = Directions(Key.of(0), num_canaries=3, num_params=1000)
    >>> drawn.rows(range(3)).shape, bool(abs((drawn.rows([1]) ** 2).sum() - 1) < 1e-5)
    ((3, 1000), True)
    """

    def __init__(self, key: Key, *, num_canaries: int, num_params: int) -> None:
        self.num_canaries, self.num_params = num_canaries, num_params
        self._key = key
        self._kept = self._drawn(range(num_canaries)) if num_canaries * num_params <= _KEPT else None

    def rows(self, positions: Sequence[int]) -> npt.NDArray[np.float32]:
        """The directions at ``positions``: (len(positions), num_params)."""
        return self._drawn(positions) if self._kept is None else self._kept[list(positions)]

    def signs(self, number: int) -> Floats:
        """What each canary multiplies its direction by in round ``number``: (num_canaries,) of -1 and 1."""
        draw = self._key.child("signs", number).generator()
        signs: Floats = draw.integers(0, 2, self.num_canaries).astype(np.float64) * 2 - 1
        return signs

    def _drawn(self, positions: Sequence[int]) -> npt.NDArray[np.float32]:
        rows = np.empty((len(positions), self.num_params), np.float32)
        for row, position in zip(rows, positions, strict=True):
            self._key.child("direction", int(position)).generator().standard_normal(out=row, dtype=np.float32)
            row /= np.linalg.norm(row)
        return rows


@dataclass
class Observed:
    """What the attacker has: each round's released values, less what the honest clients added; who was planned."""

    releases: list[npt.NDArray[np.float32]] = field(default_factory=list)  # (num_params,) a round
    honest: Updates | None = None  # of the round under way: the honest clients' rows, folded
    known: Array | None = None  # of the round under way: the honest clients' part of the mean
    planned: list[npt.NDArray[np.bool_]] = field(default_factory=list)  # (num_canaries,) a round


@dataclass(frozen=True)
class Canaries:
    """``algorithm``, with clients that send a canary's row: ``ids`` by position in ``directions``.

    Whatever is released of the mean is noted in ``observed``. All else is the algorithm's.

    >>> class Honest:
    ...     def client_update(self, received, fit, memory):
    ...         return Updates(("a", "b"), np.ones((2, 4), np.float32), np.ones(2)), {}
    >>> drawn = Directions(Key.of(0), num_canaries=1, num_params=4)
    >>> mixed = Canaries(Honest(), ids=("b",), directions=drawn, scale=5.0, observed=Observed())
    >>> sent, _ = mixed.client_update({}, None, Memory([]))
    >>> sent.values[0].tolist(), float(np.linalg.norm(sent.values[1]).round(4))
    ([1.0, 1.0, 1.0, 1.0], 5.0)
    """

    algorithm: Any
    ids: tuple[Client, ...]
    directions: Directions
    scale: float
    observed: Observed

    def __getattr__(self, name: str) -> Any:
        """What hansa reads by name, and takes as absent where the algorithm has none."""
        if name.startswith("__") or name == "algorithm":
            raise AttributeError(name)
        return getattr(self.algorithm, name)

    def init(self, params: Array) -> State:
        return self.algorithm.init(params)

    def broadcast(self, state: State) -> Mapping[str, Array]:
        broadcast: Mapping[str, Array] = self.algorithm.broadcast(state)
        return broadcast

    def client_update(
        self, received: Mapping[str, Array], fit: Any, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """The algorithm's update, with the canaries' rows and weights in their places."""
        updates, remembered = self.algorithm.client_update(received, fit, memory)
        place = {client: i for i, client in enumerate(self.ids)}
        rows = [row for row, client in enumerate(updates.clients) if client in place]
        if not rows:
            return updates, remembered
        positions = [place[updates.clients[row]] for row in rows]
        signs = self.directions.signs(len(self.observed.releases))[positions]
        sent = np.zeros(updates.values.shape, np.float32)
        sent[rows] = self.directions.rows(positions) * (signs * self.scale)[:, None].astype(np.float32)
        is_canary = np.zeros(len(updates.clients), bool)
        is_canary[rows] = True
        xp, device = array_api_compat.array_namespace(updates.values), array_api_compat.device(updates.values)
        values = xp.where(
            xp.asarray(is_canary[:, None], device=device),
            xp.asarray(sent, dtype=updates.values.dtype, device=device),
            updates.values,
        )
        weights = np.where(is_canary, _WEIGHT, np.asarray(updates.weights, np.float64))
        return updates._replace(values=values, weights=weights), remembered

    def server_update(self, state: State, mean: Aggregate) -> State:
        """The algorithm's, once the attacker has seen what was released."""
        seen = np.asarray(mean.values, np.float64)
        if self.observed.known is not None:
            seen = seen - self.observed.known
        self.observed.releases.append(seen.astype(np.float32))
        self.observed.honest = self.observed.known = None
        return self.algorithm.server_update(state, mean)


@dataclass(frozen=True, kw_only=True)
class Tap(Transform):
    """The last of a chain: changes nothing, and tells the attacker what the honest clients (all but ``ids``) added."""

    ids: frozenset[Client]
    aggregator: Any
    observed: Observed

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """Nothing is changed."""
        return incoming

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Nothing is changed; the honest rows are added to those before."""
        rows = [row for row, client in enumerate(updates.clients) if client not in self.ids]
        if rows:
            part, before = self.aggregator.fold(updates.take(rows)), self.observed.honest
            if before is not None:
                part = part._replace(values=part.values + before.values, weights=part.weights + before.weights)
            self.observed.honest = part
        return updates, {}

    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]:
        """Nothing is changed; what the honest clients are of the mean is noted."""
        honest = self.observed.honest
        if honest is not None:
            self.observed.known = np.asarray(self.aggregator.reduce([honest._replace(tail={})], [1.0]).values)
        return mean, state


@dataclass(frozen=True)
class WithCanaries:
    """``sampler`` over a population whose clients beyond ``num_honest`` are canaries; some of them are left ``out``.

    Where the sampler tosses coins or lets groups take turns, it draws canaries as it draws any client. Any other is
    allowed to have a client in every round, and the canaries are.
    """

    sampler: Any
    num_honest: int
    cohort_size: int
    out: frozenset[Client]
    observed: Observed

    def cohort(self, ids: Sequence[Client], cohort_size: int, key: Key) -> tuple[Client, ...]:
        """The clients of one round. Whose turn it is is known to the attacker and noted; what coins said is not.

        The ``cohort_size`` of the call counts canaries and is not used.
        """
        honest, canaries = tuple(ids[: self.num_honest]), tuple(ids[self.num_honest :])
        if hasattr(self.sampler, "rate") or hasattr(self.sampler, "turn"):
            size = max(1, round(self.cohort_size / self.num_honest * len(ids)))
            drawn = self.sampler.cohort((*honest, *canaries), size, key)
        else:
            drawn = (*self.sampler.cohort(honest, self.cohort_size, key), *canaries)
        here = frozenset(drawn)
        public = not hasattr(self.sampler, "rate")
        self.observed.planned.append(np.array([client in here or not public for client in canaries], bool))
        return tuple(client for client in drawn if client not in self.out)


def cosines(observed: Observed, directions: Directions) -> Floats:
    """Of each canary's direction with the combination of releases that would tell best that it took part.

    The combination for signs s (num_rounds,) is ``releases^T C^-1 s``, where C is the covariance of a random
    direction's inner products with the releases, their Gram matrix over d, shrunk a little to a multiple of the
    identity. It does not depend on the direction itself: that of a canary that took no part has a random cosine.
    (num_canaries,) float64.
    """
    releases = np.stack(observed.releases).astype(np.float64)
    num_rounds, num_params = releases.shape
    gram = releases @ releases.T
    shrink = num_rounds / (num_rounds + num_params)
    level = np.trace(gram) / num_rounds
    covariance = (1 - shrink) * gram + (shrink * level + 1e-300) * np.eye(num_rounds)
    signs = np.stack([directions.signs(number) for number in range(num_rounds)], axis=1)
    if len(observed.planned) == num_rounds:
        signs = signs * np.stack(observed.planned, axis=1)
    rules = np.linalg.solve(covariance, signs.T).T
    found = np.zeros(directions.num_canaries)
    width = max(1, _KEPT // num_params)
    for start in range(0, directions.num_canaries, width):
        some = range(start, min(start + width, directions.num_canaries))
        inner = directions.rows(some).astype(np.float64) @ releases.T
        found[some.start : some.stop] = (inner * rules[some.start : some.stop]).sum(axis=1)
    lengths = np.sqrt(np.maximum(np.einsum("ct,tu,cu->c", rules, gram, rules, optimize=True), 1e-300))
    clipped: Floats = np.clip(found / lengths, -1.0, 1.0)
    return clipped


__all__ = ["Canaries", "Directions", "Observed", "Tap", "WithCanaries", "cosines"]
