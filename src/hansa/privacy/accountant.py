"""What noisy releases cost together, and under which assumptions: every figure says its neighbours and its accountant.

Two populations are neighbours when one unit is

* *zeroed*: its contributions are replaced by zeros, and who else takes part stays as it is (Kairouz, McMahan, Song,
  Thakkar, Thakurta and Xu, "Practical and private (deep) learning without sampling or shuffling", ICML 2021, sec. 2);
* *added or removed*, where each unit is sampled by a coin of its own;
* *replaced* by any other, which counts twice.

Where everyone takes part the composition of Gaussian mechanisms is known in closed form (``gaussian.py``). With
sampling, Google's dp-accounting composes privacy loss distributions (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi,
"Connect the dots: tighter discrete approximations of privacy loss distributions", PoPETs 2022) or Renyi divergences
(Mironov, Talwar and Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", 2019; without replacement
Wang, Balle and Kasiviswanathan, AISTATS 2019). It is in ``hansa[privacy]``. Skellam noise composes by the Renyi
divergences of ``skellam.py``, beside those of Gaussian and Laplace noise; they become epsilon by Canonne, Kamath and
Steinke, "The discrete Gaussian for differential privacy", NeurIPS 2020, proposition 12.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hansa.core.errors import InputError
from hansa.privacy import gaussian

Neighbours = Literal["zero out one", "add or remove one", "replace one"]
Accountant = Literal["best", "PLD", "RDP"]
_ORDERS = [*range(2, 64), *(round(64 * 1.05**i) for i in range(240))]  # of Renyi divergences: whole numbers up to 7e6


@dataclass(frozen=True)
class Everyone:
    """Nobody is left to chance, or chance is not relied on: no amplification."""


@dataclass(frozen=True)
class PoissonSampling:
    """Each unit takes part with probability ``rate``, by a coin of its own that nobody sees."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise InputError(f"PoissonSampling(rate=): expected above 0 and at most 1, found {self.rate}")


@dataclass(frozen=True)
class FixedSizeSampling:
    """``count`` of ``population`` take part, drawn without replacement in secret."""

    count: int
    population: int

    def __post_init__(self) -> None:
        if not 0 < self.count <= self.population:
            raise InputError(
                f"FixedSizeSampling: expected 1 to {self.population} of {self.population}, found {self.count}"
            )


@dataclass(frozen=True)
class Turn:
    """Only clients of group ``group`` could take part, of ``num_groups`` that are fixed for the whole run."""

    group: int
    num_groups: int

    def __post_init__(self) -> None:
        if not 0 <= self.group < self.num_groups:
            raise InputError(f"Turn: expected a group of 0 to {self.num_groups - 1}, found {self.group}")


Sampling = Everyone | PoissonSampling | FixedSizeSampling | Turn


@dataclass(frozen=True, kw_only=True)
class Release:
    """Noise published ``times`` times: Gaussian of standard deviation ``noise_multiplier * sensitivity`` (in L2).

    ``noise="laplace"``: of scale ``noise_multiplier * sensitivity`` in L1, and of units that are not sampled.
    ``noise="skellam"``: of that standard deviation, on a grid of which the sensitivity is ``norm_steps`` steps or more;
    nor are its units sampled.
    """

    noise_multiplier: float
    times: int = 1
    sampling: Sampling = Everyone()
    noise: Literal["gaussian", "laplace", "skellam"] = "gaussian"
    norm_steps: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise InputError(f"Release(noise_multiplier=): expected above 0, found {self.noise_multiplier}")
        if self.times < 0:
            raise InputError(f"Release(times=): expected 0 or more, found {self.times}")
        if self.noise != "gaussian" and isinstance(self.sampling, PoissonSampling | FixedSizeSampling):
            raise InputError(
                f'Release(noise="{self.noise}"): expected units that are not sampled, found {self.sampling}'
            )
        if not self.norm_steps > 0:
            raise InputError(f"Release(norm_steps=): expected above 0, found {self.norm_steps}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An epsilon with what it holds for."""

    epsilon: float
    delta: float
    neighbours: Neighbours
    accountant: str

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.4g} at delta {self.delta:.1e} (neighbours: {self.neighbours}; {self.accountant})"
        )


def cost(
    releases: Sequence[Release],
    delta: float,
    *,
    neighbours: Neighbours = "add or remove one",
    accountant: Accountant = "best",
    interval: float = 1e-4,
) -> Cost:
    """The epsilon of all releases together at ``delta``.

    ``best`` is the closed form where nobody is sampled, else PLD, else (cohorts of fixed size) RDP; with Skellam noise
    it is Renyi divergences whatever ``accountant`` says, and nobody may be sampled. Sensitivity is
    that of one unit's contribution, and replacing one counts twice of it. A PLD is rounded up to multiples of
    ``interval``. ``delta=0`` is for Laplace noise alone, whose epsilons add up. Raises ``InputError`` for a cohort of
    fixed size whose neighbours are not "replace one", and where dp-accounting is needed and not installed.

    >>> print(cost([Release(noise_multiplier=2.0)], 1e-5))
    epsilon 1.993 at delta 1.0e-05 (neighbours: add or remove one; exact)
    """
    paid = _worst_turns([release for release in releases if release.times])
    is_pure = delta == 0 and bool(paid) and all(release.noise == "laplace" for release in paid)
    if not (0 < delta < 1 or is_pure):
        raise InputError(f"delta: expected between 0 and 1, found {delta}")
    if not paid:
        return Cost(epsilon=0.0, delta=delta, neighbours=neighbours, accountant="exact")
    if is_pure:
        return Cost(epsilon=_pure(paid, neighbours), delta=0.0, neighbours=neighbours, accountant="sum")
    all_come = all(isinstance(release.sampling, Everyone) for release in paid)
    if any(release.noise == "skellam" for release in paid):
        if not all_come:
            raise InputError("Skellam noise: expected units that are not sampled beside it, found some that are")
        return Cost(epsilon=_renyi(paid, delta, neighbours), delta=delta, neighbours=neighbours, accountant="Skellam")
    if accountant == "best" and all_come and all(release.noise == "gaussian" for release in paid):
        return Cost(epsilon=_closed(paid, delta, neighbours), delta=delta, neighbours=neighbours, accountant="exact")
    is_fixed = any(isinstance(release.sampling, FixedSizeSampling) for release in paid)
    if is_fixed and neighbours != "replace one":
        raise InputError(
            'cohorts of fixed size: expected neighbours="replace one" (adding one changes who else is drawn), '
            f"found {neighbours!r}; sample by PoissonSampling to add or remove one"
        )
    name = ("RDP" if is_fixed else "PLD") if accountant == "best" else accountant
    relation = neighbours
    if neighbours == "replace one" and all_come:  # twice the sensitivity is half the noise: dp-accounting's Laplace
        relation, paid = "add or remove one", [replace(one, noise_multiplier=one.noise_multiplier / 2) for one in paid]
    epsilon = _accountant(name, relation, interval).compose(_event(paid)).get_epsilon(delta)
    return Cost(epsilon=float(epsilon), delta=delta, neighbours=neighbours, accountant=name)


def calibrated(
    releases_of: Callable[[float], Sequence[Release]],
    epsilon: float,
    delta: float,
    *,
    neighbours: Neighbours = "add or remove one",
    accountant: Accountant = "best",
    tolerance: float = 1e-4,
    interval: float = 1e-4,
) -> float:
    """The least noise multiplier, up to ``tolerance`` of itself and never less, that keeps to (epsilon, delta).

    ``releases_of(noise_multiplier)`` are the releases of the whole run.

    >>> round(calibrated(lambda z: [Release(noise_multiplier=z, times=100)], 8.0, 1e-5), 2)
    6.0
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"epsilon: expected a positive number, found {epsilon}")

    def keeps(noise_multiplier: float) -> bool:
        releases = releases_of(noise_multiplier)
        found = cost(releases, delta, neighbours=neighbours, accountant=accountant, interval=interval)
        return found.epsilon <= epsilon

    low, high = 0.0, 1.0
    while not keeps(high):
        low, high = high, 2 * high
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def _worst_turns(releases: Sequence[Release]) -> list[Release]:
    """The releases that one unit can be in: of groups that take turns it is in one, the one that pays most."""
    paid = [release for release in releases if not isinstance(release.sampling, Turn)]
    turns: dict[int, dict[int, list[Release]]] = {}
    for release in releases:
        if isinstance(release.sampling, Turn):
            groups = turns.setdefault(release.sampling.num_groups, {})
            groups.setdefault(release.sampling.group, []).append(replace(release, sampling=Everyone()))
    for groups in turns.values():
        paid += max(groups.values(), key=lambda group: sum(r.times / r.noise_multiplier**2 for r in group))
    return paid


def _closed(releases: Sequence[Release], delta: float, neighbours: Neighbours) -> float:
    """Gaussian mechanisms composed are one: the squares of 1 / noise multiplier add up."""
    size = 2.0 if neighbours == "replace one" else 1.0
    together = math.sqrt(sum(release.times * (size / release.noise_multiplier) ** 2 for release in releases))
    return gaussian.epsilon(delta, 1.0 / together, 1)


def _renyi(releases: Sequence[Release], delta: float, neighbours: Neighbours) -> float:
    """The least epsilon that the sum of the releases' Renyi divergences gives, over its orders."""
    size = 2.0 if neighbours == "replace one" else 1.0
    found = math.inf
    for order in _ORDERS:
        divergence = sum(release.times * _divergence(release, order, size) for release in releases)
        found = min(found, divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, found)


def _divergence(release: Release, order: int, size: float) -> float:
    """The Renyi divergence of one release, for units that move it by ``size`` sensitivities."""
    multiplier = release.noise_multiplier / size
    if release.noise == "skellam":
        from hansa.privacy.skellam import renyi_divergence  # which few federations need

        return renyi_divergence(order, multiplier, release.norm_steps * size)
    gauss = order / (2 * multiplier**2)  # an epsilon of 1 / multiplier, Laplace's, gives no more than it, and itself
    return gauss if release.noise == "gaussian" else min(gauss, 1 / multiplier)


def _pure(releases: Sequence[Release], neighbours: Neighbours) -> float:
    """The epsilons of Laplace mechanisms add up (Dwork and Roth 2014, theorem 3.16)."""
    size = 2.0 if neighbours == "replace one" else 1.0
    return sum(release.times * size / release.noise_multiplier for release in releases)


def _event(releases: Sequence[Release]) -> Any:
    """The releases in dp-accounting's words."""
    from dp_accounting import dp_event

    found = []
    for release in releases:
        made = dp_event.GaussianDpEvent if release.noise == "gaussian" else dp_event.LaplaceDpEvent
        event: Any = made(release.noise_multiplier)
        match release.sampling:
            case PoissonSampling(rate) if rate < 1:
                event = dp_event.PoissonSampledDpEvent(rate, event)
            case FixedSizeSampling(count, population):
                event = dp_event.SampledWithoutReplacementDpEvent(population, count, event)
        found.append(dp_event.SelfComposedDpEvent(event, release.times))
    return dp_event.ComposedDpEvent(found)


def _accountant(name: str, neighbours: Neighbours, interval: float) -> Any:
    """A new accountant of dp-accounting's."""
    try:
        from dp_accounting import NeighboringRelation
        from dp_accounting.pld import PLDAccountant
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as error:
        raise InputError(
            f"accounting with sampling: expected dp-accounting to be installed, found no {error.name}; "
            "pip install 'hansa[privacy]'"
        ) from error
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every order of Renyi that it leaves out
    relation = NeighboringRelation.REPLACE_ONE if neighbours == "replace one" else NeighboringRelation.ADD_OR_REMOVE_ONE
    return (
        PLDAccountant(relation, value_discretization_interval=interval)
        if name == "PLD"
        else RdpAccountant(neighboring_relation=relation)
    )


__all__ = [
    "Cost",
    "Everyone",
    "FixedSizeSampling",
    "PoissonSampling",
    "Release",
    "Sampling",
    "Turn",
    "calibrated",
    "cost",
]
