"""What DP-SGD needs of any learner: how much noise a client adds, which records a step takes, the noise itself.

See ``DPSGD`` in ``local_training.py`` for the algorithm. All of it is drawn from a client's own secret.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.learners.batches import Indices
from hansa.local_training import DPSGD, LocalTraining
from hansa.privacy import events
from hansa.privacy.accountant import Everyone, PoissonSampling
from hansa.privacy.events import RecordEvent
from hansa.privacy.noise import deviation_of, noised, secure_normal, secure_uniform

_RATES = 1.05  # noise is sized for sampling rates that are powers of it, rounded up: one search serves many clients


def steps_of(local: LocalTraining) -> int:
    """Local steps of a round, the same for every client: what privacy counts. ``InputError`` where they differ."""
    if local.steps is None and local.batch_size is not None:
        raise InputError("DPSGD: expected local_steps beside batch_size, found epochs; steps are counted, not epochs")
    return int(local.steps if local.steps is not None else local.epochs or 1)


def rate_of(num_records: int, batch_size: int | None) -> float:
    """The chance with which a record is in a step's batch."""
    return 1.0 if batch_size is None or batch_size >= num_records else batch_size / num_records


def noise_multiplier_of(optimizer: DPSGD, num_records: int, batch_size: int | None, num_steps: int) -> float:
    """The noise multiplier of a client with so many records, that takes ``num_steps`` in each round.

    >>> optimizer = DPSGD(clipping_norm=1.0, epsilon=8.0, delta=1e-5, num_rounds=50)
    >>> round(noise_multiplier_of(optimizer, 500, None, 2), 2)
    6.0
    """
    if optimizer.noise_multiplier is not None:
        return optimizer.noise_multiplier
    if optimizer.num_rounds is None:
        raise CheckError(["DPSGD(epsilon=) needs a schedule to be calibrated for; use simulate, serve or join"])
    assert optimizer.epsilon is not None
    assert optimizer.delta is not None
    if num_records > 1 and optimizer.delta >= 1 / num_records:
        raise CheckError([f"DPSGD: expected delta below 1 / (number of records), found {optimizer.delta:g}"])
    rate = rate_of(num_records, batch_size)
    sized = min(1.0, _RATES ** math.ceil(math.log(rate, _RATES)))
    return _calibrated(optimizer.epsilon, optimizer.delta, optimizer.num_rounds * num_steps, sized)


@lru_cache(maxsize=1024)
def _calibrated(epsilon: float, delta: float, num_steps: int, rate: float) -> float:
    sampling = PoissonSampling(rate) if rate < 1 else Everyone()
    event = RecordEvent(noise_multiplier=1.0, num_steps=num_steps, sampling=sampling)
    return events.calibrated({event: 1}, epsilon, delta, interval=1e-3, tolerance=1e-3 if rate < 1 else 1e-6)


def poisson_batches(
    keys: Sequence[Key], sizes: Indices, local: LocalTraining
) -> Iterator[tuple[Indices, npt.NDArray[np.bool_]]]:
    """For each local step rows (num_clients, widest batch) and which of them are real: each row by its own coin.

    Clients that take all of their rows take them as they lie. Padded places point at row 0. A client's own rows do not
    depend on the other clients of the block.
    """
    everyone = np.arange(int(sizes.max(initial=0)), dtype=np.int64)
    rates = [rate_of(size, local.batch_size) for size in sizes.tolist()]
    for step in range(steps_of(local)):
        if min(rates, default=1.0) == 1.0:
            yield np.where(everyone < sizes[:, None], everyone, 0), everyone < sizes[:, None]
            continue
        taken = [
            everyone[:size] if rate == 1 else np.flatnonzero(secure_uniform(key.child("coins", step), size) < rate)
            for key, size, rate in zip(keys, sizes.tolist(), rates, strict=True)
        ]
        rows = np.zeros((len(sizes), max(len(own) for own in taken)), np.int64)
        real = np.zeros(rows.shape, np.bool_)
        for place, own in enumerate(taken):
            rows[place, : len(own)], real[place, : len(own)] = own, True
        yield rows, real


def factors(norms: npt.NDArray[np.float64], clipping_norm: float) -> npt.NDArray[np.float64]:
    """What each record's gradient of this norm is multiplied by; 0 where it is not finite, so that it gives nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.minimum(1.0, clipping_norm / np.maximum(norms, 1e-300) * (1 - 1e-6))
    found: npt.NDArray[np.float64] = np.where(np.isfinite(norms), scale, 0.0)
    return found


class Noise:
    """What the clients of a block add to their sums of clipped gradients, and divide them by."""

    def __init__(self, local: LocalTraining, sizes: Indices, keys: Sequence[Key]) -> None:
        optimizer = local.optimizer
        assert isinstance(optimizer, DPSGD)
        self.clipping_norm, self._keys = optimizer.clipping_norm, keys
        counts = np.maximum(sizes, 1)
        steps = steps_of(local)
        self._multipliers = [noise_multiplier_of(optimizer, n, local.batch_size, steps) for n in counts.tolist()]
        expected = counts if local.batch_size is None else np.minimum(counts, local.batch_size)
        divisor = float("nan") if optimizer.divisor is None else optimizer.divisor
        self._divisors = expected.astype(np.float64) if optimizer.divisor is None else np.full(len(counts), divisor)

    def gradient(self, client: int, step: int, clipped_sum: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The noisy gradient (num_params,) of one client, from its sum of clipped gradients in that step."""
        size = len(clipped_sum)
        deviation = deviation_of(self._multipliers[client], self.clipping_norm, size)
        noise = secure_normal(self._keys[client].child("noise", step), size)
        noisy: npt.NDArray[np.float64] = noised(clipped_sum, noise, deviation) / self._divisors[client]
        return noisy


__all__ = ["Noise", "factors", "noise_multiplier_of", "poisson_batches", "rate_of", "steps_of"]
