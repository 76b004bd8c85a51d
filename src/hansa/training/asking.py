"""Whom to ask: a sampler's cohort, less those that are not available, made up from others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hansa.core.key import Key
from hansa.core.protocols import Client

Available = Callable[[Sequence[Client]], Sequence[bool]]


class Chosen(NamedTuple):
    """A cohort, and how many clients were drawn that were not available."""

    clients: tuple[Client, ...]
    num_away: int


def choose(sampler: Any, everyone: Sequence[Client], size: int, key: Key, available: Available | None = None) -> Chosen:
    """``size`` clients as ``sampler`` draws them, of those that are available.

    Nobody looks at the whole population: more are drawn until enough of them are available, and ``size`` are drawn of
    these. The cost is O(size / share available). Where everybody drawn is available, the draw is the sampler's own.

    >>> from hansa.data.sampling import Uniform
    >>> even = lambda clients: [int(client) % 2 == 0 for client in clients]
    >>> chosen = choose(Uniform(), [str(i) for i in range(1000)], 3, Key.of(0), even)
    >>> len(chosen.clients), {int(client) % 2 for client in chosen.clients}
    (3, {0})
    """
    drawn, num_drawn, turn = sampler.cohort(everyone, size, key), size, 0
    here = _here(drawn, available)
    while len(here) < min(size, len(drawn)) and num_drawn < len(everyone):
        turn += 1
        growth = min(8.0, 1.2 * size / max(1, len(here)))
        num_drawn = min(len(everyone), math.ceil(num_drawn * max(1.5, growth)))
        drawn = sampler.cohort(everyone, num_drawn, key.child("more", turn))
        here = _here(drawn, available)
    num_away = len(drawn) - len(here)
    if turn and len(here) > size:
        here = sampler.cohort(here, size, key.child("of these"))
    return Chosen(here, num_away)


def whose_turn(sampler: Any, everyone: Sequence[Client], number: int) -> Sequence[Client]:
    """The clients that round ``number`` may draw from: all, unless the sampler lets groups take turns.

    >>> from hansa.data.sampling import Uniform
    >>> whose_turn(Uniform(), ("a", "b"), 7)
    ('a', 'b')
    """
    if not hasattr(sampler, "turn"):
        return everyone
    theirs: Sequence[Client] = sampler.of_round(everyone, number)
    return theirs


def _here(clients: tuple[Client, ...], available: Available | None) -> tuple[Client, ...]:
    if available is None or not clients:
        return clients
    there = available(clients)
    return clients if all(there) else tuple([c for c, is_there in zip(clients, there, strict=True) if is_there])
