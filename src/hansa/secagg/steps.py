"""The names of a secure sum's exchanges: ``keys`` in a round, ``keys.7.0`` in the first attempt at round 7's buffer."""

from __future__ import annotations

import re

from hansa.core.protocols import Slot

_IN_BUFFER = re.compile(r"([a-z]{1,16})\.(\d{1,9})\.(\d{1,9})")


def in_buffer(step: str, buffer: Slot) -> str:
    """The name of a step of the sum of a buffer, which is named by its round and attempt.

    >>> in_buffer("keys", Slot(7, 0, "update"))
    'keys.7.0'
    """
    return f"{step}.{buffer.round}.{buffer.attempt}"


def step_in(exchange: str) -> str:
    """The step that an exchange is; a name of another form is its own.

    >>> step_in("keys"), step_in("keys.7.0"), step_in("keys.7")
    ('keys', 'keys', 'keys.7')
    """
    match = _IN_BUFFER.fullmatch(exchange)
    return exchange if match is None else match[1]


def buffer_of(exchange: str) -> Slot | None:
    """The buffer that an exchange is part of the sum of; None in a round.

    >>> buffer_of("keys"), buffer_of("keys.7.0")
    (None, Slot(round=7, attempt=0, exchange='', task='buffer'))
    """
    match = _IN_BUFFER.fullmatch(exchange)
    return None if match is None else Slot(int(match[2]), int(match[3]), "", "buffer")


__all__ = ["buffer_of", "in_buffer", "step_in"]
