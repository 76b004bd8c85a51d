"""Server optimizers: they turn the aggregate into a step, as if it were a (negative) gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar and McMahan, "Adaptive federated optimization", ICLR 2021,
algorithm 2 (FedAdagrad, FedYogi, FedAdam); momentum is Hsu, Qi and Brown, "Measuring the effects of non-identical data
distribution for federated visual classification", 2019. As in the papers there is no bias correction: with it FLamby's
heart recipe loses four points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.long_vectors import columnwise, is_columnwise

Vector = npt.NDArray[np.float64]
Moments = Mapping[str, Vector]


class ServerOptimizer(Protocol):
    """Moments before round 0, and the step of a round: pure functions on vectors (num_params,)."""

    def init(self, num_params: int) -> Moments:
        """Moments before round 0."""
        ...

    def step(self, moments: Moments, update: Vector) -> tuple[Vector, Moments]:
        """The step of a round, and the moments after it."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServerSGD:
    """``m <- momentum * m + update; step = learning_rate * m``; without momentum and at rate 1 this is FedAvg.

    >>> ServerSGD(learning_rate=0.5).step({}, np.array([1.0, -2.0]))[0].tolist()
    [0.5, -1.0]
    """

    learning_rate: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check("ServerSGD", self.learning_rate, momentum=self.momentum)

    def init(self, num_params: int) -> Moments:
        """No moment without momentum."""
        return {"m": np.zeros(num_params)} if self.momentum else {}

    @columnwise()
    def step(self, moments: Moments, update: Vector) -> tuple[Vector, Moments]:
        """The step and the new momentum.

        >>> ServerSGD(learning_rate=0.5, momentum=0.9).step({"m": np.array([1.0])}, np.array([1.0]))[0].tolist()
        [0.95]
        """
        if not self.momentum:
            return self.learning_rate * update, {}
        m = self.momentum * moments["m"] + update
        return self.learning_rate * m, {"m": m}


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """``m <- beta1 m + (1 - beta1) u``, then ``step = rate * m / (sqrt(v) + tau)``; ``second`` is how v moves."""

    learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(type(self).__name__, self.learning_rate, beta1=self.beta1, beta2=self.beta2)
        if not self.tau > 0:
            raise InputError(f"{type(self).__name__}(tau=): expected above 0, found {self.tau}")

    def init(self, num_params: int) -> Moments:
        """M = 0 and v = tau^2 (the paper's v_-1 >= tau^2)."""
        return {"m": np.zeros(num_params), "v": np.full(num_params, self.tau**2)}

    def second(self, v: Vector, square: Vector) -> Vector:
        """The new v, from the squared update."""
        raise NotImplementedError

    @columnwise(lambda optimizer: is_columnwise(optimizer.second))
    def step(self, moments: Moments, update: Vector) -> tuple[Vector, Moments]:
        """The step and both new moments."""
        m = self.beta1 * moments["m"] + (1 - self.beta1) * update
        v = self.second(moments["v"], np.square(update))
        return self.learning_rate * m / (np.sqrt(v) + self.tau), {"m": m, "v": v}


@dataclass(frozen=True, kw_only=True)
class ServerAdagrad(Adaptive):
    """``v <- v + u^2`` (beta2 is not used); the paper takes beta1 = 0.

    >>> optimizer = ServerAdagrad(learning_rate=1.0, tau=1e-9)
    >>> optimizer.step(optimizer.init(1), np.array([3.0]))[0].round(6).tolist()
    [1.0]
    """

    beta1: float = 0.0

    @columnwise()
    def second(self, v: Vector, square: Vector) -> Vector:
        """The running sum of squares."""
        return v + square


@dataclass(frozen=True, kw_only=True)
class ServerAdam(Adaptive):
    """``v <- beta2 v + (1 - beta2) u^2``.

    >>> optimizer = ServerAdam(learning_rate=1.0, tau=1e-9)
    >>> optimizer.step(optimizer.init(1), np.array([3.0]))[0].round(6).tolist()
    [1.0]
    """

    @columnwise()
    def second(self, v: Vector, square: Vector) -> Vector:
        """The moving mean of squares."""
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True, kw_only=True)
class ServerYogi(Adaptive):
    """``v <- v - (1 - beta2) u^2 sign(v - u^2)``.

    >>> optimizer = ServerYogi(learning_rate=1.0, tau=1e-9)
    >>> optimizer.step(optimizer.init(1), np.array([3.0]))[0].round(6).tolist()
    [1.0]
    """

    @columnwise()
    def second(self, v: Vector, square: Vector) -> Vector:
        """A controlled step towards the squares."""
        return v - (1 - self.beta2) * square * np.sign(v - square)


def _check(name: str, learning_rate: float, **decays: float) -> None:
    """One sentence for each option that cannot be."""
    if not learning_rate > 0:
        raise InputError(f"{name}(learning_rate=): expected above 0, found {learning_rate}")
    for option, value in decays.items():
        if not 0 <= value < 1:
            raise InputError(f"{name}({option}=): expected 0 <= {option} < 1, found {value}")
