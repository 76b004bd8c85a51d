"""Was joining worth it: each client alone, all rows pooled, and the federated model, on the same held-out rows.

Each is trained by the same federation and schedule: alone on one client, pooled on all rows as if one client held
them (with the cohort's number of local steps, where steps are counted).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from hansa.aggregators.mean import Mean
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Array
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.federation import Federation, Pair
from hansa.runtimes.inprocess import InProcess
from hansa.training.evaluate import on_dataset
from hansa.training.loop import Loop
from hansa.training.schedule import Schedule

Model = tuple[Array, tuple[Array, ...]]  # parameters and the preparations' sums
Scores = dict[str, float]


def baselines_of(
    run: Any, federation: Federation, schedule: Schedule, population: Population, load: Callable[[str], Pair], key: Key
) -> dict[str, Any]:
    """Metrics of the three, on each client's own held-out rows and on everyone's, in the form of ``run.json``.

    "alone" on everyone's rows is the mean over the clients' models. Raises ``InputError`` where no rows are held out.
    """
    plain = replace(federation, transforms=(), aggregator=_visible(federation.aggregator))
    pairs = {client: load(client) for client in population.ids}
    tests = {client: test for client, (_, test) in pairs.items() if test is not None and len(test)}
    if not tests:
        raise InputError("baselines: expected rows held out to compare on, found none; give holdout=0.2")
    alone = {
        client: train_on(plain, schedule, {client: train}, key) for client, (train, _) in pairs.items() if len(train)
    }
    together = Dataset.concatenate([train for train, _ in pairs.values()])
    pooled = train_on(_pooled_steps(plain, schedule, len(pairs)), schedule, {"pooled": together}, key)
    federated: Model = (run.parameters, run.totals)
    everyone = Dataset.concatenate(list(tests.values()))
    clients = {
        client: {
            "alone": _score(federation, alone.get(client), test),
            "federated": _score(federation, federated, test),
            "pooled": _score(federation, pooled, test),
        }
        for client, test in tests.items()
    }
    mean_alone = [_score(federation, model, everyone) for model in alone.values()]
    return {
        "clients": clients,
        "everyone": {
            "alone": {name: float(np.mean([scores[name] for scores in mean_alone])) for name in mean_alone[0]},
            "federated": _score(federation, federated, everyone),
            "pooled": _score(federation, pooled, everyone),
        },
    }


def train_on(federation: Federation, schedule: Schedule, clients: Mapping[str, Dataset], key: Key) -> Model:
    """The model that a federation of just these clients learns, unscored."""
    quiet = replace(schedule, cohort_size=None, min_clients=None, evaluate_every=schedule.num_rounds)
    site = InProcess(block_size=1).open(federation, lambda client: (clients[client], None), key.child("secrets"))
    loop = Loop(
        federation=federation,
        schedule=quiet,
        runtime=site,
        key=key,
        clients=lambda: tuple(clients),
        params=np.asarray(federation.learner.initial(key.child("initial")), dtype=np.float32),
    )
    point = loop.run()
    return np.asarray(point.state.algorithm["params"]), point.totals


def _visible(aggregator: Any) -> Any:
    """One that hides rows in sums has nothing to hide them in where a client is alone: then the plain mean."""
    if getattr(aggregator, "reveals_rows", True):
        return aggregator
    weights = {name: getattr(aggregator, name) for name in ("weighting", "max_weight") if hasattr(aggregator, name)}
    return Mean(**weights)


def _pooled_steps(federation: Federation, schedule: Schedule, num_clients: int) -> Federation:
    """As many local steps for the pool as the whole cohort takes."""
    steps = getattr(federation.algorithm, "local_steps", None)
    if not steps:
        return federation
    cohort = min(schedule.cohort_size or num_clients, num_clients)
    if "local_steps" not in {field.name for field in fields(federation.algorithm)}:
        return federation  # an algorithm around another: the pool takes one client's steps
    return replace(federation, algorithm=replace(federation.algorithm, local_steps=steps * cohort))


def _score(federation: Federation, model: Model | None, dataset: Dataset) -> Scores:
    if model is None:
        return {name: float("nan") for name in federation.learner.metrics.names}
    return on_dataset(federation, model[0], model[1], dataset)
