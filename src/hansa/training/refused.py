"""Sentences about clients that refused a round: why nothing could be released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hansa.core.errors import InputError, RunError
from hansa.core.protocols import Client


def all_refused(number: int, refused: Mapping[Client, str]) -> RunError | InputError:
    """What is wrong where every client of a cohort refused, by client."""
    reasons = sorted(set(refused.values()))
    if reasons == ["no training examples"]:
        return InputError(
            f"round {number}: expected training examples, found none at any of the {len(refused)} clients of the "
            "cohort; look at load_data and holdout"
        )
    advice = "; lower client_learning_rate" if "update is not finite" in reasons else ""
    return RunError(f"round {number}: every client was refused: {'; '.join(reasons)}{advice}")


def why(refusals: Sequence[Mapping[str, Any]], number: int) -> str:
    """The reasons that clients gave in a round, for the end of a sentence; empty where there were none.

    >>> why([{"round": 0, "client": "rome", "reason": "no training examples"}], 0)
    ' (rome: no training examples)'
    """
    reasons = [f"{r['client']}: {r['reason']}" for r in refusals if r["round"] == number]
    return f" ({'; '.join(reasons[:5])})" if reasons else ""


__all__ = ["all_refused", "why"]
