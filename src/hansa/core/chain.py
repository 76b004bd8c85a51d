"""The chain of update transforms: every encode on the clients, every decode and then every release on the server.

``Transform`` is the record of defaults that a transform specialises: most override two of its methods. The default
norm bound is infinity: claim nothing unless it is proved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import numpy as np

from hansa.core.key import Key, Streams
from hansa.core.protocols import Aggregate, Array, Codec, Draws, Memory, Plan, Settings, State, Updates, UpdateTransform


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The codec that packs values as they are."""

    def pack(self, updates: Updates) -> Mapping[str, Array]:
        """The values and each row's side columns."""
        return {"values": updates.values, **{f"side.{name}": column for name, column in updates.side.items()}}

    def unpack(self, arrays: Mapping[str, Array], num_params: int) -> tuple[Array, Mapping[str, Array]]:
        """Values (num_clients, num_params) and side columns."""
        side = {name[5:]: column for name, column in arrays.items() if name.startswith("side.")}
        return arrays["values"], side

    def row_bytes(self, num_params: int) -> int:
        """A float32 a parameter."""
        return 4 * num_params


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Defaults of an update transform: it changes nothing and claims nothing.

    ``shows_nonfinite = True`` says that a row which is not finite stays so, which a simulator then sees in the sum.
    """

    def init(self, num_params: int) -> State:
        """The server's state before round 0; ``num_params`` is the length of an update."""
        return None

    def settings(self, state: State) -> Settings:
        """What clients must know of the state: numbers and names."""
        return None

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """The L2 norm that ``decode(encode(row))`` cannot exceed for a row of norm up to ``incoming``."""
        return math.inf

    def tail_bound(self, settings: Settings) -> float:
        """The L2 norm of the tail columns that this stage adds; it names them in an attribute ``tail_names``."""
        return 0.0

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """The client's half, on a block it may overwrite; also what each client remembers."""
        return updates, {}

    def decode(self, values: Array, settings: Settings, shared: Key) -> Array:
        """The server's half on a block (num_rows, num_params): linear and without state."""
        return values

    def release(self, mean: Aggregate, state: State, sensitivity: float, secret: Key) -> tuple[Aggregate, State]:
        """The server's half on the mean, once a round."""
        return mean, state

    def codec(self, inner: Codec) -> Codec:
        """How the values after this stage are packed; a stage that moves values off ``inner``'s grid returns Raw()."""
        return inner


def encode(
    transforms: Sequence[UpdateTransform],
    updates: Updates,
    plan: Plan,
    memory: Memory,
    secret: Sequence[Key],
) -> tuple[Updates, dict[str, Array]]:
    """Every client half in order; what clients remember is filed under ``{position}.{name}``."""
    remembered, found = dict[str, Array](), Limits()
    for i, (transform, settings) in enumerate(zip(transforms, plan.settings, strict=True)):
        rows = Streams(updates.clients, partial(plan.key.child, "transform", i))
        own = Streams(secret, methodcaller("child", "transform", i))
        draws = Draws(plan.key.child("transform", i), rows, own, found.norm, found.value)
        updates, kept = transform.encode(updates, settings, memory.part(str(i)), draws)
        found = limits([transform], [settings], found)
        remembered |= {f"{i}.{name}": value for name, value in kept.items()}
    return updates, remembered


def decode(transforms: Sequence[UpdateTransform], values: Array, plan: Plan) -> Array:
    """Every linear server half, in reverse, on the rows or the sum of one plan."""
    stages = list(enumerate(zip(transforms, plan.settings, strict=True)))
    for i, (transform, settings) in reversed(stages):
        values = transform.decode(values, settings, plan.key.child("transform", i))
    return values


def release(
    transforms: Sequence[UpdateTransform], mean: Aggregate, states: Sequence[State], sensitivity: float, secret: Key
) -> tuple[Aggregate, tuple[State, ...]]:
    """Every release, in reverse, once a round; each has a secret stream of its own."""
    kept = list(states)
    for i, transform in reversed(list(enumerate(transforms))):
        mean, kept[i] = transform.release(mean, kept[i], sensitivity, secret.child("release", i))
    return mean, tuple(kept)


def norm_bound(transforms: Sequence[UpdateTransform], settings: Sequence[Settings], tail: float = 0.0) -> float:
    """The L2 norm that no client's decoded row, with its tail, can exceed; infinite unless the chain proves one.

    ``tail`` bounds the columns that the algorithm itself adds.
    """
    bound = math.inf
    for transform, own in zip(transforms, settings, strict=True):
        bound = transform.norm_bound(bound, own)
    return math.hypot(bound, tail, *(t.tail_bound(own) for t, own in zip(transforms, settings, strict=True)))


class Limits(NamedTuple):
    """What the stages of a chain prove of every row that they leave."""

    norm: float = math.inf  # L2
    value: float = math.inf  # of one coordinate, absolute
    step: float = 0.0  # a power of two that every value is a whole multiple of; 0: none


def limits(transforms: Sequence[UpdateTransform], settings: Sequence[Settings], found: Limits | None = None) -> Limits:
    """What is proved of the rows that a chain encodes; a stage with a ``limits`` method knows more than their norm."""
    found = found or Limits()
    for transform, own in zip(transforms, settings, strict=True):
        norm = transform.norm_bound(found.norm, own)
        found = transform.limits(found, own) if hasattr(transform, "limits") else Limits(norm, norm)
    return found


def codec(transforms: Sequence[UpdateTransform]) -> Codec:
    """The codec that the chain declares."""
    packed: Codec = Raw()
    for transform in transforms:
        packed = transform.codec(packed)
    return packed


def finite_rows(values: Array) -> np.ndarray:
    """True for each row (num_clients,) that holds no NaN and no infinity.

    A sum finds the usual case in one pass; only where it is not finite is every value looked at.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # einsum adds faster than sum, and wakes no threads
        sums = np.einsum("np->n", values) if isinstance(values, np.ndarray) else values.sum(axis=1)
    finite: np.ndarray = np.isfinite(np.asarray(sums))
    for i in np.flatnonzero(~finite):
        finite[i] = bool(np.isfinite(np.asarray(values[i])).all())
    return finite
