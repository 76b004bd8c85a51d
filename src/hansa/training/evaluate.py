"""Scores of a model: on the server's own data, or as sums over the clients' held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hansa.aggregators.rows import Rows
from hansa.core.errors import Abandoned
from hansa.core.protocols import Array, Client, Runtime, Slot
from hansa.core.round import Context, ServerState, server_round
from hansa.data.dataset import Dataset
from hansa.data.ids import look_up
from hansa.data.sampling import distinct
from hansa.federation import Federation

Scores = dict[str, float]
_PER_ROUND = 100  # clients asked for metrics after each round
_AT_END = 10_000


def on_dataset(federation: Federation, params: Array, totals: Sequence[Array], dataset: Dataset) -> Scores:
    """Metrics of ``params`` on a raw dataset, prepared as in training."""
    ready = federation.prepared(dataset, totals)
    federation.learner.check(ready, "the dataset to evaluate on")
    sums = federation.learner.evaluate(np.asarray(params)[None], [ready])
    scores: Scores = federation.learner.metrics.finish(sums[0])
    return scores


def on_clients(
    federation: Federation,
    runtime: Runtime,
    state: ServerState,
    context: Context,
    clients: Sequence[Client],
    number: int,
) -> tuple[Scores | None, dict[Client, Scores]]:
    """Metrics over all held-out rows, and each client's own where the server may see them.

    None where no client holds rows out.
    """
    parts, metrics = federation.task("evaluate"), federation.learner.metrics
    slot = Slot(number, 0, "", "evaluate")
    everyone = ServerState(state.algorithm, ())
    try:
        _, mean = server_round(parts, everyone, runtime, clients, context, slot)
    except Abandoned:
        return None, {}
    if not isinstance(parts.aggregator, Rows):
        total = mean.values * len(mean.clients)
        return (metrics.finish(total) if total.any() else None), {}
    rows = np.asarray(mean.values).reshape(len(mean.clients), metrics.size)
    total = rows.sum(axis=0)
    if not total.any():
        return None, {}
    each = {client: metrics.finish(row) for client, row in zip(mean.clients, rows, strict=True) if row.any()}
    return metrics.finish(total), each


def some_clients(clients: Sequence[Client], context: Context, *, at_end: bool = False) -> tuple[Client, ...]:
    """Whom to ask for metrics: everyone up to a limit, else always the same drawn share of them."""
    limit = _AT_END if at_end else _PER_ROUND
    if len(clients) <= limit:
        return tuple(clients)
    return look_up(clients, distinct(context.key.child("evaluation cohort"), len(clients), limit))


def train_loss(tail: Mapping[str, Any]) -> float:
    """The mean training loss that clients reported, NaN where none did."""
    return float(tail.get("train_loss", math.nan))
