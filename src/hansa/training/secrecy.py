"""What secure aggregation hides in a federation, from whom, and what does not fit beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hansa.core import chain
from hansa.core.check import Problem
from hansa.core.errors import CheckError
from hansa.federation import Federation
from hansa.training.schedule import Schedule


def secrecy_problems(
    federation: Federation, schedule: Schedule, num_clients: int, settings: Sequence[Any]
) -> list[Problem]:
    """What keeps secure sums from working: no bound, overflow, too few clients, rows that differ by round."""
    aggregator: Any = federation.aggregator
    if not hasattr(aggregator, "terms"):
        return []
    from hansa.secagg.grid import width_of  # loaded with the aggregator itself

    name, terms, found = type(aggregator).__name__, aggregator.terms, list[Problem]()
    cohort = schedule.num_asked(num_clients) if schedule.buffer is None else schedule.num_counted(num_clients)
    num_groups = terms.groups(cohort)
    group = -(-cohort // num_groups)
    try:
        width_of(chain.limits(federation.transforms, settings), aggregator.bits, max(group, 1))
    except CheckError as error:
        found += [Problem(f"{name}: {problem}") for problem in error.problems]
    smallest = cohort // num_groups
    fewest = terms.fewest(terms.graph(max(2, smallest)))
    if smallest < fewest:
        each, least = f" in each of {num_groups} groups" if num_groups > 1 else "", fewest * num_groups
        line = f"cohort_size={least}" if schedule.buffer is None else f"buffer=hansa.Buffered(size={least})"
        who = f"{smallest} take part"
        if cohort == 1 and not (schedule.cohort_size or schedule.min_clients):  # as where nobody knows the population
            line, who = f"min_clients={least}", "nothing says that as many will come"
        found.append(Problem(f"{name} needs {fewest} clients{each}, and {who}.", line))
    if schedule.over_selection != "auto" and terms.dropout < (spare := 1 - 1 / schedule.over_selection) - 1e-9:
        found.append(
            Problem(
                f"over_selection={schedule.over_selection:g} leaves out {spare:.0%} of those asked, and {name} is "
                f"sized for {terms.dropout:.0%} that are lost.",
                f"aggregator=hansa.{name}(dropout={math.ceil(100 * spare) / 100:g})",
            )
        )
    if schedule.buffer is not None:
        found += _buffer_problems(name, federation.transforms)
    if aggregator.across is not None and any(getattr(t, "adds_noise", False) for t in federation.transforms):
        rule = type(aggregator.across).__name__
        found.append(Problem(f"{rule} over groups proves no bound on one client's say, so that noise cannot be sized."))
    return found


def _buffer_problems(name: str, transforms: Sequence[Any]) -> list[Problem]:
    """What keeps the rows of several rounds from being one sum: what a transform does must not depend on the round."""
    found = []
    for transform in transforms:
        kind = type(transform).__name__
        own = {method for method in ("init", "settings", "release") if _overrides(transform, method)}
        if _overrides(transform, "decode"):
            found.append(
                Problem(f"{name} sums the rows of several rounds in a buffer, and {kind} decodes each round's apart.")
            )
        elif own == {"init", "settings", "release"} and not getattr(transform, "adds_noise", False):
            found.append(
                Problem(
                    f"{name} sums the rows of several rounds in a buffer, and {kind} changes from round to round.",
                    "transforms=(hansa.Clip(norm=1.0), ...)",
                )
            )
    return found


def _overrides(transform: Any, method: str) -> bool:
    return getattr(type(transform), method, None) is not getattr(chain.Transform, method)


def secrecy(federation: Federation, cohort: int) -> list[str]:
    """One sentence for each thing that a reader should know: what is hidden, from whom, and what is not."""
    aggregator: Any = federation.aggregator
    if not hasattr(aggregator, "terms"):
        return []
    terms = aggregator.terms
    num_groups = terms.groups(cohort)
    each = max(2, cohort // num_groups)
    graph = terms.graph(each)
    name, fewest = type(getattr(aggregator, "secure", aggregator)).__name__, terms.fewest(graph)
    of = f"each of {num_groups} groups of {each}" if num_groups > 1 else f"{each} clients"
    lies = "even if it lies to them" if terms.server == "malicious" else "as long as it keeps to the protocol"
    said = [
        f"{name}: the server sees sums of at least {fewest} of {of} and no single update, {lies}, and if up to "
        f"{terms.corrupt:.0%} of them work with it."
    ]
    if aggregator.across is not None:
        rule = type(aggregator.across).__name__
        said.append(
            f"{rule} over {num_groups} random groups: liars spoil their own groups' means alone, which the "
            "server sees one by one; the norm bound is kept by honest clients only."
        )
    else:
        said.append("A client that lies can spoil the sum unseen: nobody but itself holds it to the norm bound.")
    if federation.adds_distributed_noise:
        said.append("Clients add the noise together, so that the sum is private from the server, too.")
    elif any(getattr(t, "adds_noise", False) for t in federation.transforms):
        said.append("The server adds the noise: it sees the sum without it, and whoever gets the model does not.")
    elif not federation.is_locally_private:
        said.append("No noise is added: the sum itself may tell of one client what the others' updates do not cover.")
    return said


__all__ = ["secrecy", "secrecy_problems"]
