"""All problems of a federation and its schedule at once, and what leaves a client, before any round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hansa.core import check as core
from hansa.core.chain import norm_bound
from hansa.core.check import Problem
from hansa.core.errors import InputError
from hansa.core.protocols import Memory
from hansa.federation import Federation, Idle
from hansa.runtimes.costs import metric_bytes, report_bytes
from hansa.training.distributed_privacy import coarseness_problems, distributed_problems
from hansa.training.local_privacy import local_problems
from hansa.training.privacy import bound
from hansa.training.schedule import Schedule
from hansa.training.secrecy import secrecy_problems


def problems(federation: Federation, schedule: Schedule, num_clients: int | None = None) -> list[Problem]:
    """Everything that does not fit, each with the line to paste. ``num_clients`` is the population's, if known."""
    count = num_clients or schedule.cohort_size or schedule.clients_needed
    found = local_problems(federation, schedule) + distributed_problems(federation, schedule, count)
    own = federation if found else bound(federation, schedule, count)  # noise that does not fit cannot be sized
    size = own.update_size() or own.learner.layout.num_params
    settings = [t.settings(t.init(size)) for t in own.transforms]
    sends_sums = not all(getattr(preparation, "is_public", False) for preparation in own.prepare)
    found += core.check(own.transforms, own.aggregator, settings, prepared=sends_sums)
    is_sized = own is not federation or not federation.adds_distributed_noise
    found += (coarseness_problems(own) or secrecy_problems(own, schedule, count, settings)) if is_sized else []
    return found + _records(own, schedule) + _learner(own) + _schedule(federation, schedule, num_clients)


def refuse_unfit(federation: Federation, schedule: Schedule, num_clients: int | None = None) -> None:
    """Raise one error with every problem, if there is any: before round 0, with nothing written."""
    core.refuse(problems(federation, schedule, num_clients))


def _records(federation: Federation, schedule: Schedule) -> list[Problem]:
    """Whether a bound on one record's part in an update is true of this algorithm, and whether sampling hides it."""
    bounds: list[Any] = [t for t in federation.transforms if getattr(t, "bounds_records", False)]
    found = []
    if bounds and getattr(getattr(federation.algorithm, "questions", None), "norm", None) != bounds[0].norm:
        name = type(federation.algorithm).__name__
        found.append(
            Problem(
                f"RecordBound says how far one record moves an update, which nothing bounds in {name}.",
                "hansa.statistics.survey(...), or transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(...))",
            )
        )
    if bounds and hasattr(schedule.sampler, "rate"):
        found.append(
            Problem("coins that clients toss do not hide one record of a client that came.", "sampler=hansa.All()")
        )
    return found


def _learner(federation: Federation) -> list[Problem]:
    """Whether the learner can do what the algorithm asks of it."""
    found = []
    learner, algorithm = type(federation.learner).__name__, type(federation.algorithm).__name__
    rate = getattr(federation.algorithm, "client_learning_rate", 1.0)
    if getattr(federation.learner, "needs_rate", True) and not callable(rate) and math.isnan(rate):
        found.append(Problem(f"{algorithm} has no learning rate.", f"hansa.{algorithm}(client_learning_rate=0.1, ...)"))
    work = Idle(federation.algorithm)
    try:
        received = federation.algorithm.broadcast(federation.algorithm.init(_zeros(federation)))
        federation.algorithm.client_update(received, work, Memory([{}]))
    except InputError as error:
        found.append(Problem(str(error)))
    except Exception:  # a user's own algorithm may need real data: round 0 will tell
        return found
    unable = sorted(work.asked - set(getattr(federation.learner, "corrections", work.asked)))
    if unable:
        found.append(
            Problem(
                f"{algorithm} corrects local gradients ({', '.join(unable)}), which {learner} cannot honour.",
                "learner=hansa.LinearLearner(...) or hansa.TorchLearner(...), or algorithm=hansa.FedAvg(...)",
            )
        )
    return found


def _schedule(federation: Federation, schedule: Schedule, num_clients: int | None) -> list[Problem]:
    """Whether there are clients enough, and whether delta means anything."""
    found = []
    if schedule.buffer is not None and hasattr(schedule.sampler, "turn"):
        name = type(schedule.sampler).__name__
        found.append(
            Problem(f"{name} lets groups take turns by rounds, and a buffer counts whoever comes.", "leave buffer out")
        )
    if num_clients is not None:
        least = schedule.min_clients or 0
        if num_clients < least:
            found.append(
                Problem(f"min_clients is {least}, and there are {num_clients} clients.", f"min_clients={num_clients}")
            )
        if schedule.cohort_size and schedule.cohort_size > num_clients:
            found.append(
                Problem(
                    f"cohort_size is {schedule.cohort_size}, and there are {num_clients} clients.",
                    f"cohort_size={num_clients}",
                )
            )
        needed = 2 * getattr(federation.aggregator, "num_byzantine", -1) + 3
        cohort = schedule.num_counted(num_clients)
        if cohort < needed:
            name = type(federation.aggregator).__name__
            found.append(
                Problem(f"{name} needs {needed} clients a round, and {cohort} take part.", f"cohort_size={needed}")
            )
        noise: Any = next(
            (t for t in federation.transforms if hasattr(t, "delta")), None
        )  # of records, each client checks
        if noise is not None and noise.delta is not None and noise.delta >= 1 / num_clients:
            found.append(
                Problem(
                    f"delta {noise.delta:g} is not below 1 / {num_clients} clients.",
                    f"hansa.{type(noise).__name__}(epsilon={noise.epsilon or 4:g}, delta={0.1 / num_clients:.1g})",
                )
            )
    return found


def leaves(federation: Federation, holdout: float | None) -> list[dict[str, Any]]:
    """What leaves a client, by kind: what it is, how many bytes, how often, and who can read it."""
    secret = federation.is_private and not getattr(federation.aggregator, "reveals_rows", True)
    reader = "nobody but as a sum" if secret else "the server, each client's own"
    size = federation.update_size() or federation.learner.layout.num_params
    rows: list[dict[str, Any]] = []
    for preparation in federation.prepare:
        if getattr(preparation, "is_public", False):
            continue
        name = type(preparation).__name__
        rows.append(
            {"what": f"sums for {name} (no row)", "bytes": None, "most": False, "when": "once", "reader": reader}
        )
    settings = [t.settings(t.init(size)) for t in federation.transforms]
    sums = any(getattr(t, "bounds_records", False) for t in federation.transforms)
    clipped = ", clipped" if math.isfinite(norm_bound(federation.transforms, settings)) and not sums else ""
    columns = [name for t in federation.transforms for name in getattr(t, "tail_names", ())]
    clipped += f", and {' and '.join(columns)}" if columns else ""
    clipped += ", with the client's own noise" if federation.is_locally_private else ""
    clipped += ", with the client's share of the noise" if federation.adds_distributed_noise else ""
    rows.append(
        {
            "what": f"update: {size:,} numbers{clipped}",
            "bytes": report_bytes(federation, size),
            "most": False,
            "when": "every round it takes part in",
            "reader": reader,
        }
    )
    if federation.sends_metrics and holdout != 0:
        metrics = ", ".join(federation.learner.metrics.names)
        rows.append(
            {
                "what": f"sums of {metrics} over held-out rows, if any",
                "bytes": metric_bytes(federation),
                "most": True,
                "when": "after each scored round",
                "reader": reader,
            }
        )
    return rows


def _zeros(federation: Federation) -> np.ndarray[Any, Any]:
    return np.zeros(federation.learner.layout.num_params, np.float32)
