"""What came out of a loop, as a ``Run``: the same for a simulation and for a deployment."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from hansa.core.protocols import Client
from hansa.federation import Federation
from hansa.training.checkpoint import Checkpoint
from hansa.training.evaluate import Scores
from hansa.training.history import Row
from hansa.training.loop import Loop, is_clocked
from hansa.training.privacy_statement import statement
from hansa.training.run import Run
from hansa.training.schedule import Schedule
from hansa.training.secrecy import secrecy
from hansa.version import __version__

Sizes = Mapping[Client, tuple[int, int]]  # training and held-out rows


def outcome(
    loop: Loop,
    point: Checkpoint,
    sizes: Sizes,
    scored: Sequence[Client],
    *,
    app: Any,
    seed: int,
    started: datetime.datetime,
    simulated: bool,
    **more: Any,
) -> Run:
    """The run that ended at ``point``, with the final model scored by the clients in ``scored``.

    ``simulated``: no deployment. ``sizes`` are those of the clients that get a row; ``more`` are fields of ``run.json``
    that only the caller knows.
    """
    federation = loop.federation
    scores, each = loop.finish(point, scored)
    now = datetime.datetime.now(datetime.UTC)
    info = {
        **_versions(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": (now - started).total_seconds(),
        "seed": seed,
        "fingerprint": getattr(app, "fingerprint", None),
        "num_rounds": loop.schedule.num_rounds,
        "rounds_done": point.next_round,
        "schedule": _plain_fields(loop.schedule),
        **_described(federation),
        "num_clients": len(loop.clients()),
        "scored_on": point.scored_on or "the rows trained on",
        "final": _final(point.history, scores if "held-out" in point.scored_on else None),
        "baselines": None,
        "privacy": statement(federation, loop.ledger.counted, len(loop.clients()), simulated=simulated),
        "secrecy": secrecy(federation, loop.schedule.num_counted(len(loop.clients()))),
        "virtual_time": loop.runtime.summary() if is_clocked(loop.runtime) else None,
        **more,
    }
    return Run(
        parameters=np.asarray(point.state.algorithm["params"]),
        layout=federation.learner.layout,
        totals=point.totals,
        history=point.history,
        clients=_client_rows(federation, sizes, each),
        info=info,
        federation=federation,
        app_source=app.path.read_bytes() if app is not None and app.path else None,
    )


def _versions() -> dict[str, str]:
    return {"hansa": __version__, "python": platform.python_version(), "numpy": np.__version__}


def _described(federation: Federation) -> dict[str, Any]:
    """What ran: the parts as they print, the model's size, what a learner's trials chose."""
    parts = {
        "learner": repr(federation.learner),
        "algorithm": repr(federation.algorithm),
        "prepare": [repr(p) for p in federation.prepare],
        "transforms": [repr(t) for t in federation.transforms],
        "aggregator": repr(federation.aggregator),
    }
    return {
        "federation": parts,
        "num_params": federation.learner.layout.num_params,
        "task": _task(federation.learner),
        "choices": dict(getattr(federation.learner, "choices", {})),
    }


def _final(history: Sequence[Row], scores: Scores | None) -> Scores:
    """The final scores: those of every client asked at the end, or else those of the last round."""
    if scores:
        return dict(scores)
    return {"loss": history[-1].loss, **history[-1].metrics} if history else {}


def _client_rows(federation: Federation, sizes: Sizes, each: Mapping[Client, Scores]) -> list[dict[str, Any]]:
    """One row a client: sizes, and the final metrics on its own held-out rows."""
    names = federation.learner.metrics.names
    return [
        {
            "client": client,
            "num_examples": num_train,
            "num_test": num_test,
            **{name: each.get(client, {}).get(name, float("nan")) for name in names},
        }
        for client, (num_train, num_test) in sizes.items()
    ]


def _task(learner: Any) -> str:
    """What the model tells: classes, values, or something of its own."""
    if getattr(learner, "num_classes", None):
        return "classification"
    return "regression" if type(learner).__name__ == "LinearLearner" else "other"


def _plain_fields(schedule: Schedule) -> dict[str, Any]:
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    return {n: v if v is None or isinstance(v, int | float | str) else repr(v) for n, v in values.items()}
