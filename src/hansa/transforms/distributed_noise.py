"""Distributed differential privacy: clients add shares of the noise, and nobody sees less than a whole sum's.

    sent_i = step * (round(u_i / step) + Sk(variance / num_noising)),     sum_i sent_i has noise Sk(>= variance)

Agarwal, Kairouz and Liu, "The Skellam mechanism for differentially private federated learning", NeurIPS 2021,
algorithm 1; for secure sums, of which the server learns the total alone. Differences: the grid's step is a power of
two; each share is sized for the fewest honest clients that an opened sum can hold, so that the noise is never less than
what is accounted, whoever drops out; rows are shrunk before their rounding so that the norm bound stays what it was
(Kairouz, Liu and Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation", ICML 2021, proposition 26, which raises the bound instead and rounds until it is kept); and the rotation
is a transform of its own (``rotate.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hansa.core.chain import Limits, Raw, Transform
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Array, Codec, Draws, Memory, Settings, State, Updates
from hansa.privacy.events import SkellamEvent
from hansa.privacy.noise import secure_uniform
from hansa.privacy.skellam import largest, secure_skellam
from hansa.transforms.local_noise import sent_alone
from hansa.transforms.noise import refuse_amounts

_MARGIN = 1e-9  # more than sums of squares may be off by
_SPREAD = 4.0  # sqrt(2 log(1 / chance)): rounding lengthens a row by more once in 3,000 times


@dataclass(frozen=True, kw_only=True)
class SkellamNoise(Transform):
    """Each client's share of noise for a secure sum: of ``noise_multiplier`` times the chain's norm bound in the sum.

    Give ``noise_multiplier``, or ``epsilon`` and ``delta`` together; ``delta`` and ``budget`` are as in
    ``GaussianNoise``. Put a ``Clip`` before it and ``SecureMean`` behind it, and nothing between. Rows become whole
    multiples of a power of two that ``bits`` bits hold, noise included; a ``Rotate`` before it makes few bits enough.
    Every client weighs the same. A schedule fills in ``num_noising``, the fewest honest clients of an opened sum, and
    ``num_rounds``, beyond which a client does not answer.

    ``CheckError`` at the client without a bound or a schedule, with columns beside the update, and where ``bits`` are
    too few for so much noise, or for rows so long that rounding would add half their norm.

    >>> block, keys = Updates(("a",), np.zeros((1, 1000), np.float32), np.ones(1)), [Key.of(0)]
    >>> noise = SkellamNoise(noise_multiplier=2.0, num_noising=4)
    >>> sent, _ = noise.encode(block, None, None, Draws(Key.of(1), keys, keys, norm_bound=1.0))
    >>> bool(0.95 < sent.values.std() < 1.05), noise.limits(Limits(norm=1.0, value=1.0), None).step == 2.0**-10
    (True, True)
    """

    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    budget: float | None = None
    bits: int = 16
    num_noising: int | None = None
    num_rounds: int | None = None

    adds_distributed_noise = True
    needs_bound = True
    shows_nonfinite = True

    def __post_init__(self) -> None:
        refuse_amounts("SkellamNoise", self.noise_multiplier, self.epsilon, self.delta, self.budget)
        if not (isinstance(self.bits, int) and 8 <= self.bits <= 20):
            raise InputError(f"SkellamNoise(bits=): expected a whole number from 8 to 20, found {self.bits!r}")
        if self.num_noising is not None and self.num_noising < 1:
            raise InputError(f"SkellamNoise(num_noising=): expected 1 client or more, found {self.num_noising}")

    def settings(self, state: State) -> Settings:
        """What an owner of data can compare with its own: the noise and its shares. It is not taken from the server."""
        return {"noise_multiplier": self.noise_multiplier, "num_noising": self.num_noising}

    def encode(
        self, updates: Updates, settings: Settings, memory: Memory, draws: Draws
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Rows on the grid with each client's share of the noise, and weight 1."""
        step = self._step(draws.norm_bound, draws.value_bound)
        norm, variance = draws.norm_bound / step, self._variance(draws.norm_bound / step)
        size = updates.values.shape[1]
        room = self._room(norm, size)
        rows = [
            step * (_rounded(np.asarray(row, np.float64) / step, room, norm, key) + _noise(key, size, variance))
            for row, key in zip(np.asarray(updates.values), draws.secret, strict=True)
        ]
        return sent_alone(self, updates, rows), {}

    def limits(self, incoming: Limits, settings: Settings) -> Limits:
        """The grid's step, and the largest value: the row's, rounded up, with the largest noise that is drawn."""
        step = self._step(incoming.norm, incoming.value)
        steps = math.ceil(min(incoming.value, incoming.norm) / step) + largest(self._variance(incoming.norm / step))
        return Limits(norm=math.inf, value=steps * step, step=step)

    def codec(self, inner: Codec) -> Codec:
        """Noisy values leave every other grid."""
        return Raw()

    def event(self, number: int, num_rounds: int) -> SkellamEvent:
        """What round ``number`` releases, for the ledger: of the coarsest grid that a row of the bound may need."""
        return SkellamEvent(noise_multiplier=self._sized()[0], norm_steps=self._norm_steps(1.0))

    def refuse_coarse(self, incoming: Limits, size: int) -> None:
        """Raise ``CheckError`` where ``bits`` are too few for rows (size,) that keep to ``incoming``."""
        self._room(incoming.norm / self._step(incoming.norm, incoming.value), size)

    def _sized(self) -> tuple[float, int]:
        """The noise multiplier and the number of clients that share it, once they are known."""
        if self.noise_multiplier is None or self.num_noising is None:
            raise CheckError(["SkellamNoise is sized by a schedule and by SecureMean; use simulate, serve or join"])
        return self.noise_multiplier, self.num_noising

    def _variance(self, norm: float) -> float:
        """Of one client's share, for rows up to ``norm``: both in steps."""
        multiplier, num_noising = self._sized()
        return (multiplier * norm) ** 2 / num_noising

    def _norm_steps(self, peak: float) -> float:
        """A power of two: rows of the norm bound are that many steps long, up to twice as many, and fit ``bits`` bits.

        ``peak``: the largest value of a row over the norm bound.
        """
        for power in range(2 * self.bits, -1, -1):
            most = 2.0 ** (power + 1)
            if math.ceil(most * peak) + largest(self._variance(most)) < 2 ** (self.bits - 1):
                return 2.0**power
        multiplier, num_noising = self._sized()
        raise CheckError(
            [
                f"SkellamNoise(bits={self.bits}) has no room for noise of multiplier {multiplier:.3g} shared by "
                f"{num_noising} clients; give it more bits (up to 20), or more clients."
            ]
        )

    def _step(self, norm: float, value: float) -> float:
        """The grid's step for rows of that norm and largest value."""
        if not math.isfinite(norm):
            raise CheckError([UNBOUNDED])
        return 2.0 ** math.floor(math.log2(norm)) / self._norm_steps(min(1.0, value / norm))

    def _room(self, norm: float, size: int) -> float:
        """How long a row (size,) may be before it is rounded, so as to be ``norm`` long after it: both in steps."""
        square = norm**2 * (1 - _MARGIN) - size / 4 - _SPREAD * math.sqrt(size) / 2 + (_SPREAD / 2) ** 2
        room = math.sqrt(max(square, 0.0)) - _SPREAD / 2
        if room < norm / 2:
            raise CheckError(
                [
                    f"SkellamNoise(bits={self.bits}) is too coarse for {size:,} parameters: rounding would take half "
                    "of an update's norm; give it more bits (up to 20), or more clients."
                ]
            )
        return room


def _rounded(row: npt.NDArray[np.float64], room: float, norm: float, key: Key) -> npt.NDArray[np.float64]:
    """Whole numbers of norm up to ``norm``: the row, shrunk to ``room``, and rounded at random to be right on average.

    The few that chance makes too long are rounded towards zero, which lengthens nothing.
    """
    length = math.sqrt(float(np.vecdot(row, row)))
    if length > room:
        row = row * (room / length)
    found = np.floor(row + secure_uniform(key.child("rounding"), len(row)))
    if np.vecdot(found, found) > norm**2 * (1 - _MARGIN):
        return np.asarray(np.trunc(row))
    return np.asarray(found)


def _noise(key: Key, size: int, variance: float) -> npt.NDArray[np.float64]:
    return secure_skellam(key.child("noise"), size, variance)


UNBOUNDED = (
    "SkellamNoise needs a bound on one client's update, and no transform before it gives one: "
    "transforms=(hansa.Clip(norm=1.0), hansa.SkellamNoise(...))"
)

__all__ = ["UNBOUNDED", "SkellamNoise"]
