"""Where a round's time goes: seconds by stage, from a stopwatch to ``run.info["profile"]``, and what may be done."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from hansa.stopwatch import Round, Stage

WORDS: dict[Stage, str] = {
    "sampling": "sampling the cohort",
    "plan": "plan and broadcast",
    "rows": "reading and preparing rows",
    "training": "training",
    "client": "other work of clients",
    "folding": "adding up updates",
    "waiting": "waiting for workers",
    "combining": "combining, the server's update",
    "evaluation": "evaluation",
    "saving": "saving",
    "on_round": "on_round, progress",
    "rest": "the rest",
}
_BUSY = 0.75  # share of the time waited for workers that they should have work


def profile_of(rounds: Sequence[Round]) -> dict[str, Any]:
    """Seconds by stage of the first round, and of a median one after it (or of the only one).

    A stage's median is that over the rounds that had it, times their share of the rounds: what takes 1 s in every tenth
    round takes 0.1 s a round. ``workers`` holds the seconds of all workers together; None where there were none.

    >>> told = profile_of([Round({"training": 5.0}, {}), *(Round({"training": t}, {}) for t in (1.0, 2.0, 9.0))])
    >>> told["rounds"], told["first_round"], told["median_round"]
    (4, {'training': 5.0}, {'training': 2.0})
    """
    num_workers = max((len(a_round.workers) for a_round in rounds), default=0)
    together = [_summed(list(a_round.workers.values())) for a_round in rounds]
    return {
        "rounds": len(rounds),
        **_first_and_median([a_round.seconds for a_round in rounds]),
        "workers": {"num_workers": num_workers, **_first_and_median(together)} if num_workers else None,
    }


def advice(info: Mapping[str, Any]) -> str:
    """What to do about the largest part of a profiled run's rounds, in a sentence; empty where there is nothing.

    ``info`` is that of the run.
    """
    profile: Mapping[str, Any] = info["profile"]
    stage, workers = _largest(profile["median_round"]), profile["workers"]
    if stage == "waiting" and workers:
        count, busy = workers["num_workers"], sum(workers["median_round"].values())
        share = busy / count / profile["median_round"]["waiting"]
        if share < _BUSY:
            return (
                f"The {count} workers have work {100 * share:.0f} % of the time that they are waited for: give fewer "
                "num_workers or a larger block_size, or train in this process."
            )
        stage = _largest(workers["median_round"])
    return _ADVICE.get(stage, lambda _: "")(info)


def _about_rows(info: Mapping[str, Any]) -> str:
    return (
        "Reading rows is the largest part: keep them in memory, in a Population of datasets or with "
        "Population.on_demand(..., keep=True)."
    )


def _about_training(info: Mapping[str, Any]) -> str:
    looped = [situation for situation, way in info["choices"].items() if way == "loop"]
    if not looped:
        return ""
    why = f"Training is the largest part, and the learner trains clients one by one ({looped[0]}); the log says why"
    return f"{why}." if info["profile"]["workers"] else f"{why}. Several processes may be faster: --runtime auto."


def _about_evaluation(info: Mapping[str, Any]) -> str:
    less = 10 * info["schedule"]["evaluate_every"]
    return f"Evaluation is the largest part: score the model less often, with --set schedule.evaluate_every={less}."


def _about_saving(info: Mapping[str, Any]) -> str:
    return "Saving rounds is the largest part: a run that need not be resumed can do without a checkpoint."


def _about_on_round(info: Mapping[str, Any]) -> str:
    return "What is called after each round (on_round, or the display of progress) is the largest part: let it do less."


_ADVICE = {
    "rows": _about_rows,
    "training": _about_training,
    "evaluation": _about_evaluation,
    "saving": _about_saving,
    "on_round": _about_on_round,
}


def _first_and_median(rounds: Sequence[Mapping[Stage, float]]) -> dict[str, dict[Stage, float]]:
    first = _in_order(rounds[0]) if rounds else {}
    later = rounds[1:] or rounds
    median: dict[Stage, float] = {}
    for name in {name for seconds in later for name in seconds}:
        had = [seconds[name] for seconds in later if name in seconds]
        median[name] = statistics.median(had) * len(had) / len(later)
    return {"first_round": first, "median_round": _in_order(median)}


def _summed(parts: Sequence[Mapping[Stage, float]]) -> dict[Stage, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {n for part in parts for n in part}}


def _in_order(seconds: Mapping[Stage, float]) -> dict[Stage, float]:
    """By stage, in the order of a round."""
    return {name: seconds[name] for name in get_args(Stage) if name in seconds}


def _largest(seconds: Mapping[str, float]) -> str:
    return max(seconds, key=lambda name: seconds[name], default="")
