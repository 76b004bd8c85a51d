"""``Careful``: mail that breaks an aggregator ends an attempt, not the run; in a deployment clients may write anything.

An aggregator's ``check_mail`` refuses one client's malformed mail before it is accepted. What only shows beside other
mail (two rows of different lengths, say) makes ``ask`` or ``open`` fail: then the attempt is abandoned, and whoever
must be left out for it to work is named, so that the next attempt goes without them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from hansa.core.errors import Abandoned
from hansa.core.protocols import Aggregator, Ask, Client, Report, Updates

History = Mapping[str, tuple[Report, ...]]
Answer = TypeVar("Answer")
_OF_ITSELF = ("fitted", "of_sums", "witnessed")

_log = logging.getLogger("hansa")


class Careful:
    """``inner``, whose ``ask`` and ``open`` fail with ``Abandoned`` alone once clients have sent mail."""

    def __init__(self, inner: Aggregator) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return repr(self.inner)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the aggregator's own; what it makes of itself stays careful."""
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        found = getattr(self.inner, name)
        return (lambda *given: Careful(found(*given))) if name in _OF_ITSELF else found

    def ask(self, cohort: tuple[Client, ...], history: History) -> Ask | None:
        return reading(partial(self.inner.ask, cohort), history)

    def open(self, cohort: tuple[Client, ...], history: History) -> Updates:
        return reading(partial(self.inner.open, cohort), history)


def careful(aggregator: Any) -> Any:
    """The aggregator of a deployment: careful where its clients send mail.

    >>> from hansa.aggregators.mean import Mean
    >>> careful(Mean())
    Mean(weighting='examples', max_weight=None, denominator=None)
    """
    sends_mail = hasattr(aggregator, "check_mail") or not getattr(aggregator, "reveals_rows", True)
    return Careful(aggregator) if sends_mail else aggregator


def reading(step: Callable[[History], Answer], history: History) -> Answer:
    """``step(history)``; ``Abandoned`` with the clients to blame where it fails and there is mail in ``history``.

    A client is to blame if ``step`` works, or finds too few clients, without all that it said. Where several are, all
    are named: it may be any of them. An error without mail is the aggregator's own and is raised as it is.

    >>> from hansa.core.protocols import Slot
    >>> said = Report(Slot(0, 0, "sum"), ("a", "b"), {"a": 1, "b": "x"})
    >>> try:
    ...     reading(lambda history: sum(history["sum"][0].payload.values()), {"sum": (said,)})
    ... except Abandoned as error:
    ...     print(error.blamed)
    ('b',)
    """
    try:
        return step(history)
    except Abandoned:
        raise
    except Exception as error:
        clients = _with_mail(history)
        if not clients:
            raise
        blamed = tuple(client for client in clients if _works(step, _without(history, client)))
        reason = f"{type(error).__name__}: {error}"[:200]
        _log.warning(
            "mail of clients cannot be read together (%s); to blame: %s", reason, list(blamed) or "nobody alone"
        )
        who = f"that of {' or '.join(blamed[:5])} is not" if blamed else "nobody alone is to blame"
        raise Abandoned(
            f"expected mail that can be read together, found {reason}; {who}; nothing was released", blamed=blamed
        ) from error


def _works(step: Callable[[History], object], history: History) -> bool:
    try:
        step(history)
    except Abandoned:
        return True
    except Exception:
        return False
    return True


def _with_mail(history: History) -> tuple[Client, ...]:
    """Every client that said something other than its update, in the order in which they spoke."""
    said = [report for reports in history.values() for report in reports if not isinstance(report.payload, Updates)]
    return tuple(dict.fromkeys(client for report in said for client in report.clients))


def _without(history: History, client: Client) -> History:
    """What everybody else said."""
    return {exchange: tuple(_less(report, client) for report in reports) for exchange, reports in history.items()}


def _less(report: Report, client: Client) -> Report:
    if client not in report.clients:
        return report
    rest = tuple(other for other in report.clients if other != client)
    if isinstance(report.payload, Updates):
        if report.payload.folded:
            return report
        return report._replace(clients=rest, payload=report.payload.take([report.clients.index(c) for c in rest]))
    return report._replace(clients=rest, payload={other: report.payload[other] for other in rest})
