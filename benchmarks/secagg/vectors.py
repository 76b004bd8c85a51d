"""The updates that both frameworks add up: the same bits in both environments, none of them clipped. NumPy alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LIMIT = 0.05  # no coordinate is beyond it


def update(client: int, num_params: int) -> npt.NDArray[np.float32]:
    """A client's update: uniform from ``-LIMIT`` to ``LIMIT``."""
    drawn = np.random.Generator(np.random.Philox(key=client)).random(num_params, dtype=np.float32)
    return (drawn * 2 - 1) * np.float32(LIMIT)


def expected(clients: list[int], num_params: int) -> npt.NDArray[np.float64]:
    """The mean of ``clients``' updates."""
    total = np.zeros(num_params)
    for client in clients:
        total += update(client, num_params)
    return total / len(clients)
