"""The privacy statement: what is protected, from whom, on which assumptions, and how much of it was spent.

It says what Ponomareva, Hazimeh, Kurakin, Xu, Denison, McMahan, Vassilvitskii, Chien and Thakurta, "How to DP-fy ML: a
practical guide to machine learning with differential privacy", JAIR 77, 2023, section 5.3.3, asks a report to say: the
setting, the unit, the neighbouring relation, the accountant, what is released, and epsilon with its delta.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from hansa.core.errors import InputError
from hansa.federation import Federation
from hansa.privacy import events
from hansa.privacy.accountant import PoissonSampling, Turn
from hansa.privacy.events import Event, MatrixEvent
from hansa.training.distributed_privacy import distributed_facts
from hansa.training.local_privacy import facts_of
from hansa.training.privacy import noise_of

_DELTAS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_RELATIONS = {
    "zero out one": "one client's updates are replaced by zeros (zero-out); that a client takes part is not hidden",
    "add or remove one": "one client is added or removed",
    "replace one": "one client's data are replaced by any other",
}
_RECORD_FACTS = {
    "title": "Central noise on sums over bounded records",
    "setting": "central: the server adds the noise, and sees each client's own sums before it",
    "unit": "one record of one client",
    "neighbours": "one record's numbers are replaced by zeros (zero-out)",
    "trust": "The server sees each client's own sums before the noise.",
}
_ACCOUNTANTS = {
    "exact": "exact composition of Gaussian mechanisms (Balle and Wang 2018)",
    "PLD": "privacy loss distributions (dp-accounting)",
    "RDP": "Renyi differential privacy (dp-accounting)",
    "Skellam": "Renyi divergences of Skellam noise (Agarwal, Kairouz and Liu 2021, theorem 3.5)",
    "sum": "pure epsilons added up (Dwork and Roth 2014, theorem 3.16)",
    "each client's own": "each client's own, for its number of records (privacy loss distributions, dp-accounting)",
}


def statement(
    federation: Federation, released: Counter[Event], num_clients: int, *, simulated: bool
) -> dict[str, Any] | None:
    """What ``hansa check`` says before a run (of what is planned) and the report after it (of the ledger's events).

    None where no noise is added. ``simulated``: the noise is drawn from the run's seed.
    """
    noise = noise_of(federation)
    if noise is None:
        return None
    figures = _figures(released, noise.delta, num_clients)
    main = figures[0] if noise.delta is None or not figures else next(f for f in figures if f["delta"] == noise.delta)
    accountant = _ACCOUNTANTS[main["accountant"]]
    count = released.total()
    sizes = sorted({event.noise_multiplier for event in released if hasattr(event, "noise_multiplier")})
    noises = f"noise multiplier {', '.join(f'{size:.4g}' for size in sizes)}, " if sizes else ""
    together = _together(released, noises)
    sums = f"noisy sums{together}" if together else f"noisy sums, {type(noise).__name__}"
    spent = f"epsilon {main['epsilon']:.3g} at delta {main['delta']:.1g}"
    facts = {"sampling": _sampling(released), "accountant": accountant}
    is_local = federation.is_locally_private
    if federation.adds_distributed_noise:
        facts |= {"neighbours": _RELATIONS[events.neighbours_of(released)]}
        facts |= distributed_facts(federation, count, noise.num_noising)
    else:
        facts |= facts_of(noise, count) if is_local else _central_facts(released, sums, is_remembered=bool(together))
    of_records = any(getattr(transform, "bounds_records", False) for transform in federation.transforms)
    facts |= _RECORD_FACTS if of_records else {}
    title, trust = facts.pop("title"), facts.pop("trust")
    if simulated:
        facts["simulation"] = "noise and sampling came from the run's seed: whoever knows the seed can remove the noise"
    unit = facts["unit"] if is_local or of_records else "one client"
    times = "rounds" if is_local else "releases"
    text = (
        f"{title}, {'' if together else noises}{count} {times}{together}: {spent} ({_tier(main['epsilon'])}). "
        f"Unit: {unit}; neighbours: {facts['neighbours']}; sampling: {facts['sampling']}; "
        f"accountant: {accountant}. {trust}"
    )
    return {
        "statement": text,
        "epsilon": main["epsilon"] if noise.delta is not None else None,
        "delta": noise.delta,
        "facts": facts,
        "epsilons": figures,
    }


def _central_facts(released: Counter[Event], sums: str, *, is_remembered: bool) -> dict[str, str]:
    """What is said of noise that the server adds."""
    not_covered = (
        "who took part, sizes and times in the run directory, which is the server's own; other runs on "
        "the same data, those that chose the settings among them, add to this"
    )
    if is_remembered:
        not_covered += "; checkpoints, which hold the noise that later rounds take back"
    return {
        "title": "Central noise on the mean of clipped updates",
        "setting": "central: the server adds the noise, and sees each client's clipped update before it",
        "unit": "one client, with all its data and all its rounds",
        "neighbours": _RELATIONS[events.neighbours_of(released)],
        "released": f"{released.total()} {sums}: every released model, and all that is made of them",
        "not covered": not_covered,
        "trust": "The server sees each client's clipped update before the noise.",
    }


def _figures(released: Counter[Event], own: float | None, num_clients: int) -> list[dict[str, Any]]:
    """Epsilon at the run's own delta, and at those others at which there is one to be had."""
    figures = []
    for delta in _deltas(own, num_clients):
        try:
            figure = _figure(released, delta)
        except InputError:  # Laplace noise at other deltas needs dp-accounting
            if delta == own:
                raise
            continue
        if delta == own or math.isfinite(figure["epsilon"]):  # clients' own budgets are for one delta
            figures.append(figure)
    return figures


def _deltas(own: float | None, num_clients: int) -> list[float]:
    """The run's own delta first, then three powers of ten below 1 / num_clients."""
    small = [delta for delta in _DELTAS if delta * max(num_clients, 1) < 1][:3]
    return ([own] if own is not None else []) + [delta for delta in small if delta != own]


def _figure(released: Counter[Event], delta: float) -> dict[str, Any]:
    """Epsilon at one delta by the best accountant, and by RDP beside it."""
    best = events.cost(released, delta)
    if best.accountant in ("Skellam", "sum", "each client's own"):
        return {"delta": delta, "epsilon": best.epsilon, "accountant": best.accountant, "rdp": None}
    try:
        beside = events.cost(released, delta, accountant="RDP").epsilon
    except InputError:  # dp-accounting is not installed, and the best is a closed form
        beside = None
    return {"delta": delta, "epsilon": best.epsilon, "accountant": best.accountant, "rdp": beside}


def _together(released: Counter[Event], noises: str) -> str:
    """That correlated releases are one, of which noise multiplier, and by which strategy."""
    names = {type(event.mechanism.strategy).__name__ for event in released if isinstance(event, MatrixEvent)}
    return f" that are one Gaussian mechanism together ({noises}correlated by {min(names)})" if names else ""


def _sampling(released: Counter[Event]) -> str:
    """How clients were drawn, and what that earned."""
    samplings = {event.sampling for event in released}
    rates = sorted({one.rate for one in samplings if isinstance(one, PoissonSampling)})
    turns = sorted({one.num_groups for one in samplings if isinstance(one, Turn)})
    if rates and len(rates) == len(samplings):
        low, high = rates[0], rates[-1]
        rate = f"{high:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        return f"each client by a coin of its own with chance {rate} (Poisson), which amplifies while it stays secret"
    if turns:
        return f"groups take turns, so that a client is in one round of {turns[0]} at most; no amplification is claimed"
    return "no amplification is claimed: a client may be in every round"


def _tier(epsilon: float) -> str:
    """How strong a guarantee is, in the guide's three tiers (section 5.2)."""
    if epsilon <= 1:
        return "tier 1, strong: at most 1"
    return "tier 2, reasonable: at most 10" if epsilon <= 10 else "tier 3, weak: above 10"


__all__ = ["statement"]
