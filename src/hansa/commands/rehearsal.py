"""What a client would say in a round, exchange by exchange, with nobody there: its peers are made up here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hansa.core import chain
from hansa.core.key import Key
from hansa.core.protocols import Client, Memory, Plan, Report
from hansa.federation import Federation

_PEERS = 5


def rehearse(federation: Federation, plan: Plan, name: Client, rows: Any) -> Iterator[tuple[Plan, Report]]:
    """Each plan that a client would be told, from ``plan``, and its report on it; a refusal is the last.

    The server's half asks five made-up peers a group beside it, who say what an aggregator's client half says without
    rows, and once clients learn what the client itself says.
    """
    parts, history = federation.parts(plan.slot), dict[str, tuple[Report, ...]]()
    fit = getattr(parts.aggregator, "fitted", None)
    aggregator: Any = parts.aggregator if fit is None else fit(chain.limits(parts.transforms, plan.settings))
    peers = tuple(f"peer {i}" for i in range(_PEERS * getattr(aggregator, "num_groups", 1)))
    held: dict[Client, Any] = {client: {} for client in (name, *peers)}
    if not hasattr(aggregator, "exchanges"):
        peers = ()
    learned = False
    while (ask := aggregator.ask((name, *peers), history)) is not None:
        learned = learned or ask.learn
        here = plan._replace(slot=plan.slot._replace(exchange=ask.exchange), learn=ask.learn, mail=dict(ask.mail))
        shown, secret = [rows] if ask.learn else (), [Key.of("dry run secret")]
        report, _, kept = federation.exchange(here, (name,), shown, Memory([{}]), {name: held[name]}, secret)
        yield here, report
        if report.refused:
            return
        held[name] = kept.get(name, {})
        if learned:
            said = dict.fromkeys(peers, report.payload[name]) if peers else {}
        else:
            said, kept, _ = aggregator.answer(
                here, None, {peer: held[peer] for peer in peers}, list(map(Key.of, peers))
            )
            held |= kept
        history[ask.exchange] = (report, *((Report(here.slot, peers, said),) if peers else ()))


__all__ = ["rehearse"]
