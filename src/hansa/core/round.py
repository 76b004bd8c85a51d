"""The whole story of federated learning: ``client_round``, and ``server_round`` or ``buffered_round``.

The runtime's four calls are the only lines behind which a network may lie. After a crash a round is replayed from its
start: frozen reports and the attempt's secret come from the runtime, so that the replay gives the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hansa.core import chain
from hansa.core.errors import Abandoned
from hansa.core.key import Key, Streams
from hansa.core.layout import Layout
from hansa.core.protocols import Aggregate, Array, Client, Fit, Memory, Plan, Remembered, Report, Runtime, Slot, Updates
from hansa.core.tasks import Parts


class ServerState(NamedTuple):
    """The algorithm's state and each transform's."""

    algorithm: Any
    transforms: tuple[Any, ...]


class Context(NamedTuple):
    """What every plan of a run shares: its key, the model's layout, constants to send, and how many could take part."""

    key: Key
    layout: Layout | None = None
    constants: Mapping[str, Array] = {}
    num_population: int = 0
    combine: Any = None  # in the place of ``combine``: the same of long vectors, some columns at a time


def client_round(
    parts: Parts, plan: Plan, fit: Fit, memory: Memory, scratch: Mapping[Client, Any], secret: Sequence[Key]
) -> tuple[Report, Remembered, Mapping[Client, Any]]:
    """One exchange for a block of clients: perhaps learn and encode, then answer the aggregator.

    Returns the report, the new memory of the clients that learned, and the scratch to keep until the round is settled.
    A client whose update is not finite, or that has nothing to learn from, is refused here with a reason.
    """
    updates: Updates | None = None
    remembered, refused, here = Remembered((), {}), dict[Client, str](), fit.clients
    if plan.learn:
        updates, remembered, refused = _learn(parts, plan, fit, memory, secret)
        if refused:
            secret = [s for s, client in zip(secret, fit.clients, strict=True) if client not in refused]
            here = updates.clients
    held = {client: scratch.get(client, {}) for client in here} if scratch or updates is None else {}
    streams = Streams(secret, lambda key: key.child("aggregator", plan.slot.exchange))
    payload, kept, more = _fitted(parts, plan.settings).answer(plan, updates, held, streams)
    here = tuple(client for client in here if client not in more) if more else here
    return Report(plan.slot, here, payload, {**refused, **more}), remembered, kept


def _learn(
    parts: Parts, plan: Plan, fit: Fit, memory: Memory, secret: Sequence[Key]
) -> tuple[Updates, Remembered, dict[Client, str]]:
    """The algorithm's client half and the chain's encode, less the rows that may not count."""
    updates, new = parts.algorithm.client_update(plan.broadcast, fit, memory.part("a"))
    remembered = {f"a.{name}": value for name, value in new.items()}
    if parts.train_loss and fit.train_loss is not None:
        updates = updates._replace(tail={**updates.tail, "train_loss": fit.train_loss})
    updates = updates._replace(weights=np.asarray(updates.weights, dtype=np.float64))
    refused, made = _refusals(parts, updates), updates.values
    with np.errstate(over="ignore", invalid="ignore"):  # rows that are not finite are refused, so numpy need not say so
        updates, more = chain.encode(parts.transforms, updates, plan, memory, secret)
        updates = updates._replace(values=_cast(updates.values, parts.dtype))
    if updates.values is not made:
        refused = _refusals(parts, updates) | refused
    return *_without(refused, updates, {**remembered, **more}), refused


def refuse(parts: Parts, report: Report, new: Remembered) -> tuple[Report, Remembered]:
    """A block's report less the rows that are not finite, for a caller who told ``client_round`` not to look."""
    refused = _refusals(parts, report.payload)
    rows, kept = _without(refused, report.payload, new.arrays)
    return Report(report.slot, rows.clients, rows, {**report.refused, **refused}), kept


def _without(refused: Mapping[Client, str], updates: Updates, new: Mapping[str, Array]) -> tuple[Updates, Remembered]:
    if refused:
        good = [i for i, client in enumerate(updates.clients) if client not in refused]
        updates, new = updates.take(good), {name: value[good] for name, value in new.items()}
    return updates, Remembered(updates.clients if new else (), new)


def _refusals(parts: Parts, updates: Updates) -> dict[Client, str]:
    """Why a row may not count, by client."""
    if not parts.must_be_finite:
        return {}
    looked = chain.finite_rows(updates.values) if parts.look_at_values else True
    finite = np.isfinite(updates.weights) & looked
    for name, column in updates.tail.items():
        finite &= np.isfinite(np.asarray(column)) | (name == "train_loss")
    refused = {updates.clients[i]: "no training examples" for i in np.flatnonzero(~(updates.weights > 0)).tolist()}
    return refused | {updates.clients[i]: "update is not finite" for i in np.flatnonzero(~finite).tolist()}


def _cast(values: Array, dtype: str) -> Array:
    """Rows in the wire's type, in process too."""
    if hasattr(values, "astype"):
        return values.astype(dtype, copy=False)
    import array_api_compat

    xp = array_api_compat.array_namespace(values)
    return xp.astype(values, getattr(xp, dtype), copy=False)


def _fitted(parts: Parts, settings: Sequence[Any]) -> Any:
    """The aggregator of one round: one that has ``fitted`` is told what the chain proves of the rows that it meets."""
    fit = getattr(parts.aggregator, "fitted", None)
    return parts.aggregator if fit is None else fit(chain.limits(parts.transforms, settings))


def begin(parts: Parts, params: Array, update_size: int | None = None) -> ServerState:
    """The state before round 0; ``update_size`` is the length of an update where it is not that of ``params``."""
    size = len(params) if update_size is None else update_size
    return ServerState(parts.algorithm.init(params), tuple(t.init(size) for t in parts.transforms))


def make_plan(
    parts: Parts,
    state: ServerState,
    context: Context,
    cohort: Sequence[Client],
    slot: Slot,
    learn: bool = True,
    mail: Mapping[Client, Any] | None = None,
) -> Plan:
    """What the cohort is told; a pure function, so that a replay makes the same plan."""
    variants = getattr(parts.algorithm, "variants", None)
    return Plan(
        slot=slot,
        learn=learn,
        broadcast={**context.constants, **parts.algorithm.broadcast(state.algorithm)},
        settings=tuple(t.settings(s) for t, s in zip(parts.transforms, state.transforms, strict=True)),
        key=context.key.child("plan", slot.task, slot.round, slot.attempt),
        variants=variants(state.algorithm, cohort) if variants else {},
        mail=mail or {},
    )


def combine(
    parts: Parts,
    state: ServerState,
    groups: Sequence[tuple[Plan, Updates]],
    scales: Sequence[float],
    secret: Key,
    context: Context,
) -> tuple[ServerState, Aggregate]:
    """Frozen reports in, next state out: a pure function. ``groups``: a plan and what the aggregator opened, each."""
    blocks, bound = [], 0.0
    tail = _tail_bound(parts, groups)
    for plan, block in groups:
        bound = max(bound, chain.norm_bound(parts.transforms, plan.settings, tail))
        blocks.append(block._replace(values=chain.decode(parts.transforms, block.values, plan)))
    mean = parts.aggregator.reduce(blocks, scales)
    sensitivity = parts.aggregator.sensitivity(bound)
    mean, transforms = chain.release(parts.transforms, mean, state.transforms, sensitivity, secret)
    mean = mean._replace(
        clients=sum((block.clients for block in blocks), ()),
        variants={c: v for plan, _ in groups for c, v in plan.variants.items()},
        num_population=context.num_population,
        layout=context.layout,
    )
    return ServerState(parts.algorithm.server_update(state.algorithm, mean), transforms), mean


def _tail_bound(parts: Parts, groups: Sequence[tuple[Plan, Updates]]) -> float:
    """The L2 norm of the tail columns that no transform bounds: what the algorithm says, else infinite if any came."""
    said: float | None = getattr(parts.algorithm, "tail_bound", None)
    if said is not None:
        return said
    bounded = {name for transform in parts.transforms for name in getattr(transform, "tail_names", ())}
    return math.inf if any(set(block.tail) - bounded for _, block in groups) else 0.0


def server_round(
    parts: Parts,
    state: ServerState,
    runtime: Runtime,
    cohort: Sequence[Client],
    context: Context,
    slot: Slot,
) -> tuple[ServerState, Aggregate]:
    """One round: ask until the aggregator has what it needs, then combine and settle.

    Raises ``Abandoned`` when too few are left; keys and pending memory are forgotten and the caller may try the next
    attempt. ``slot`` gives task, round and attempt; its exchange is the aggregator's to name.
    """
    history: dict[str, tuple[Report, ...]] = {}
    learned, cohort = None, tuple(cohort)
    settings = [t.settings(s) for t, s in zip(parts.transforms, state.transforms, strict=True)]
    aggregator = _fitted(parts, settings)
    try:
        while (ask := aggregator.ask(cohort, history)) is not None:
            here = slot._replace(exchange=ask.exchange)
            plan = make_plan(parts, state, context, cohort, here, ask.learn, ask.mail)
            runtime.start(plan, ask.clients)
            history[ask.exchange] = tuple(runtime.reports(here))
            learned = plan if ask.learn else learned
        block = aggregator.open(cohort, history)
        if learned is None or not block.clients:
            raise Abandoned(
                f"round {slot.round}: expected at least one client's update, found none; nothing was released"
            )
    except Abandoned:
        runtime.settle(slot, ())
        raise
    secret = runtime.once(f"secret {slot.task} {slot.round} {slot.attempt}", lambda: os.urandom(32))
    state, mean = (context.combine or combine)(parts, state, [(learned, block)], [1.0], secret, context)
    runtime.settle(slot, mean.clients)
    return state, mean


def buffered_round(
    parts: Parts,
    state: ServerState,
    runtime: Runtime,
    plans: Mapping[Slot, Plan],
    context: Context,
    version: int,
    *,
    buffer_size: int,
    staleness: Callable[[int], float],
    refill: Callable[[int], None],
    together: Callable[[Mapping[Slot, Sequence[Report]]], Sequence[tuple[Plan, Updates]]] | None = None,
) -> tuple[ServerState, Aggregate]:
    """One buffered asynchronous round: the next ``buffer_size`` reports, whatever plan they answer.

    Algorithm 1 (FedBuff) of Nguyen et al., AISTATS 2022: see ``training/buffered.py``. ``plans`` are those under way,
    kept up by the runtime; an update that comes ``s`` rounds late is scaled by ``staleness(s)``. ``refill(n)`` starts
    ``n`` more clients, and is called as soon as so many have reported. ``together`` opens reports of all slots as one.
    """
    late: dict[Slot, list[Report]] = {}
    for report in runtime.arrivals(buffer_size, refill):
        late.setdefault(report.slot, []).append(report)
    groups = list[tuple[Plan, Updates]](together(late) if together else ())
    for slot in () if together else sorted(late):
        here = tuple(client for report in late[slot] for client in (*report.clients, *report.refused))
        block = _fitted(parts, plans[slot].settings).open(here, {slot.exchange: tuple(late[slot])})
        groups += [(plans[slot], block)] if block.clients else []
    if not groups:
        for slot in late:
            runtime.settle(slot, ())
        raise Abandoned(f"round {version}: expected at least one client's update, found none; nothing was released")
    scales = [staleness(version - plan.slot.round) for plan, _ in groups]
    secret = runtime.once(f"secret train {version} 0", lambda: os.urandom(32))
    state, mean = (context.combine or combine)(parts, state, groups, scales, secret, context)
    for slot in late:  # a client is in a buffer once, so that it cannot be counted for another's plan
        runtime.settle(slot, mean.clients)
    return state, mean
