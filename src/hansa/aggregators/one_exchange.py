"""What every aggregator of one exchange does: ask the whole cohort once, and let each client answer with its row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hansa.core.errors import InputError
from hansa.core.protocols import Aggregator, Ask, Client, Report, Updates


def ask_once(cohort: tuple[Client, ...], history: Mapping[str, tuple[Report, ...]]) -> Ask | None:
    """One exchange called ``update`` for everyone, then done."""
    return None if "update" in history else Ask("update", cohort, True)


def answer_rows(updates: Updates | None) -> tuple[Updates, Mapping[Client, Any], Mapping[Client, str]]:
    """The rows as they are: nothing to keep, nothing to refuse."""
    assert updates is not None, "an aggregator of one exchange learns in it"
    return updates, {}, {}


def only_exchange(aggregator: Aggregator, cohort: tuple[Client, ...]) -> str:
    """The exchange of buffered rounds: an aggregator's one, or that in which an aggregator of several has rows wait."""
    if hasattr(aggregator, "buffer_exchange"):
        return str(aggregator.buffer_exchange)
    ask = aggregator.ask(cohort, {})
    if ask is None or not ask.learn:
        raise InputError("buffered rounds: expected an aggregator of one exchange, found one of several; use Mean()")
    return ask.exchange
