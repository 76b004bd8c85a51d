"""Local differential privacy: each client adds noise to its own update, before anything of it leaves.

    u_i <- u_i + N(0, (noise_multiplier * norm bound)^2)     or     clip(u_i) + Laplace(noise_multiplier * norm)

Kasiviswanathan, Lee, Nissim, Raskhodnikova and Smith, "What can we learn privately?", SIAM Journal on Computing 2011,
section 2 (local randomizers); the mechanisms are those of Dwork and Roth, "The algorithmic foundations of differential
privacy", 2014, definitions 3.3 and appendix A. The unit is a client's whole update: any two are twice the bound apart,
so that one may stand for any other ("replace one"), and nobody need trust the server. What central noise gets from one
draw takes one a client here: the mean of n updates has sqrt(n) times less noise than each, and n times more variance
than central noise at equal epsilon.

The noise comes from each client's own secret, from a cryptographic stream, and lies on a grid (``privacy/noise.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hansa.core.chain import Raw, Transform
from hansa.core.errors import CheckError, InputError
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, State, Updates
from hansa.privacy.events import LocalEvent
from hansa.privacy.noise import deviation_of, laplaced, noised, scale_of, secure_laplace, secure_normal
from hansa.transforms.clip import scale_rows


@dataclass(frozen=True, kw_only=True)
class LocalGaussianNoise(Transform):
    """Noise of standard deviation ``noise_multiplier`` times the chain's norm bound, on each client's own update.

    Give ``noise_multiplier``, or ``epsilon`` and ``delta`` together: of a client that takes part in every round of the
    schedule. Put a ``Clip`` before it; what comes after it (``Quantize``, say) works on noisy values and costs nothing.
    Every client weighs the same: the number of its examples does not leave. A schedule fills in ``budget`` and
    ``num_rounds``, for which the noise is sized: a client answers no round beyond. ``CheckError`` at the client without
    a bound, with columns beside the update, or where epsilon was not calibrated by a schedule.

    >>> from hansa.core.key import Key
    >>> block, keys = Updates(("a",), np.zeros((1, 1000), np.float32), np.ones(1)), [Key.of(0)]
    >>> noise = LocalGaussianNoise(noise_multiplier=2.0)
    >>> sent, _ = noise.encode(block, None, None, Draws(Key.of(1), keys, keys, norm_bound=0.5))
    >>> bool(0.9 < sent.values.std() < 1.1)
    True
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    num_rounds: int | None = None

    adds_local_noise = True
    needs_bound = True

    def __post_init__(self) -> None:
        _check_options(self, needs_delta=True)

    def settings(self, state: State) -> Settings:
        """What an owner of data can compare with its own: the noise multiplier. It is not taken from the server."""
        return {"noise_multiplier": self.noise_multiplier}

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Each row with noise of its client's own, and weight 1."""
        if not math.isfinite(draws.norm_bound):
            raise CheckError([UNBOUNDED])
        size = updates.values.shape[1]
        deviation = deviation_of(_sized(self), draws.norm_bound, size)
        rows = [
            noised(row, secure_normal(key, size), deviation)
            for row, key in zip(np.asarray(updates.values), draws.secret, strict=True)
        ]
        return sent_alone(self, updates, rows), {}

    def codec(self, inner: Codec) -> Codec:
        """Noisy values leave every grid."""
        return Raw()

    def event(self, number: int, num_rounds: int) -> LocalEvent:
        """What a client releases by its report of round ``number``."""
        return LocalEvent(noise_multiplier=_sized(self))


@dataclass(frozen=True, kw_only=True)
class LocalLaplaceNoise(Transform):
    """Scale each client's update down to L1 norm ``norm``, then add Laplace noise of scale ``noise_multiplier * norm``.

    It clips by itself, since the chain's bounds are in L2. Give ``noise_multiplier``, or ``epsilon``: of a client that
    takes part in every round of the schedule, pure (delta 0: epsilons add up) unless a ``delta`` is given, at which
    they grow more slowly (accounted with dp-accounting). One report alone is ``2 / noise_multiplier``.

    >>> LocalLaplaceNoise(norm=1.0, noise_multiplier=8.0).event(0, 10).noise_multiplier
    8.0
    """

    norm: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 0.0
    budget: float | None = None
    num_rounds: int | None = None

    adds_local_noise = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.norm) and self.norm > 0):
            raise InputError(f"LocalLaplaceNoise(norm=): expected a positive number, found {self.norm}")
        _check_options(self, needs_delta=False)

    def settings(self, state: State) -> Settings:
        """What an owner of data can compare with its own: the noise multiplier. It is not taken from the server."""
        return {"noise_multiplier": self.noise_multiplier}

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Each row clipped in L1 and with noise of its client's own, and weight 1."""
        values = np.asarray(updates.values)
        norms = np.abs(values).sum(axis=1, dtype=np.float64)
        values = scale_rows(values.astype(np.float64), np.minimum(1.0, self.norm / np.maximum(norms, 1e-300)))
        size = values.shape[1]
        scale = scale_of(_sized(self), self.norm * (1 + 1e-9), size)  # the sum that found the norm was rounded
        rows = [laplaced(row, secure_laplace(key, size), scale) for row, key in zip(values, draws.secret, strict=True)]
        return sent_alone(self, updates, rows), {}

    def codec(self, inner: Codec) -> Codec:
        """Noisy values leave every grid."""
        return Raw()

    def event(self, number: int, num_rounds: int) -> LocalEvent:
        """What a client releases by its report of round ``number``."""
        return LocalEvent(noise_multiplier=_sized(self), noise="laplace")


LocalNoise = LocalGaussianNoise | LocalLaplaceNoise

UNBOUNDED = (
    "LocalGaussianNoise needs a bound on one client's update, and no transform before it gives one: "
    "transforms=(hansa.Clip(norm=1.0), hansa.LocalGaussianNoise(...))"
)


def _check_options(noise: LocalNoise, *, needs_delta: bool) -> None:
    """Refuse sizes that cannot be."""
    name = type(noise).__name__
    if (noise.noise_multiplier is None) == (noise.epsilon is None):
        both = "neither" if noise.epsilon is None else "both"
        raise InputError(f"{name}: expected either noise_multiplier or epsilon, found {both}")
    if needs_delta and noise.epsilon is not None and noise.delta is None:
        raise InputError(f"{name}: expected epsilon and delta together, found no delta; give delta=1e-6, say")
    for option in ("noise_multiplier", "epsilon", "budget"):
        value = getattr(noise, option)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}({option}=): expected above 0, found {value}")
    least_is_fine = noise.delta == 0 and not needs_delta
    if noise.delta is not None and not (0 < noise.delta < 1 or least_is_fine):
        raise InputError(f"{name}(delta=): expected between 0 and 1, found {noise.delta}")


def _sized(noise: LocalNoise) -> float:
    """The noise multiplier, once it is known."""
    if noise.noise_multiplier is None:
        name = type(noise).__name__
        raise CheckError([f"{name}(epsilon=) needs a schedule to be calibrated for; use simulate, serve or join"])
    return noise.noise_multiplier


def sent_alone(noise: object, updates: Updates, rows: list[np.ndarray]) -> Updates:
    """The block as it may leave: noisy rows of weight 1; ``CheckError`` for columns that would leave as they are."""
    if updates.tail or updates.side:
        found = ", ".join([*updates.tail, *updates.side])
        raise CheckError([f"{type(noise).__name__} covers the update alone, and {found} would leave beside it."])
    return updates._replace(values=np.stack(rows).astype(np.float32), weights=np.ones(len(updates.clients)))


__all__ = ["UNBOUNDED", "LocalGaussianNoise", "LocalLaplaceNoise", "LocalNoise", "sent_alone"]
