"""The FedOpt family: federated averaging whose mean update goes through a server optimizer.

    w <- w + server_optimizer(mean update)

Reddi et al., "Adaptive federated optimization", ICLR 2021, algorithm 1 (FedOpt) with algorithm 2's optimizers, and
Hsu, Qi and Brown 2019 for server momentum (FedAvgM). Buffers (running statistics) take the plain mean: stepping them
is the classic silent failure of FedOpt with BatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hansa.algorithms.fedavg import FedAvg, moved
from hansa.core.errors import InputError
from hansa.core.protocols import Aggregate, Array, State
from hansa.long_vectors import columnwise, is_columnwise
from hansa.server_optimizers import (
    Adaptive,
    ServerAdagrad,
    ServerAdam,
    ServerOptimizer,
    ServerSGD,
    ServerYogi,
)


def _steps_columns(algorithm: FedOpt) -> bool:
    return is_columnwise(algorithm.optimizer().step)


@dataclass(frozen=True, kw_only=True)
class FedOpt(FedAvg):
    """FedAvg with any ``ServerOptimizer``; the named ones below only fill it in.

    >>> FedOpt(client_learning_rate=0.1).optimizer()
    ServerSGD(learning_rate=1.0, momentum=0.0)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.optimizer()
        except InputError as error:
            raise InputError(f"{type(self).__name__}: {error}") from error

    def optimizer(self) -> ServerOptimizer:
        """The server optimizer of this algorithm."""
        return ServerSGD()

    @columnwise(_steps_columns)
    def init(self, params: Array) -> State:
        """Parameters and the optimizer's moments."""
        return {"params": params, **self.optimizer().init(len(params))}

    @columnwise(_steps_columns)
    def server_update(self, state: State, mean: Aggregate) -> State:
        """Parameters take the optimizer's step, buffers the mean."""
        update = np.asarray(mean.values, dtype=np.float64)
        moments = {name: value for name, value in state.items() if name != "params"}
        step, after = self.optimizer().step(moments, update)
        if mean.layout is not None and "buffer" in mean.layout.roles:
            step = np.where(mean.layout.mask("parameter"), step, update)
        return {"params": moved(state["params"], step), **after}


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedOpt):
    """FedAvg with server momentum (Hsu, Qi and Brown 2019, section 3.2).

    >>> FedAvgM(client_learning_rate=0.1).optimizer()
    ServerSGD(learning_rate=1.0, momentum=0.9)
    """

    server_learning_rate: float = 1.0
    server_momentum: float = 0.9

    def optimizer(self) -> ServerOptimizer:
        """Momentum on the server."""
        return ServerSGD(learning_rate=self.server_learning_rate, momentum=self.server_momentum)


@dataclass(frozen=True, kw_only=True)
class _FedAdaptive(FedOpt):
    """What the three adaptive ones share: the paper's four numbers."""

    server_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def _make(self, kind: type[Adaptive]) -> ServerOptimizer:
        return kind(learning_rate=self.server_learning_rate, beta1=self.beta1, beta2=self.beta2, tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(_FedAdaptive):
    """FedAdagrad (Reddi et al. 2021, algorithm 2); beta1 = 0 as in the paper's experiments, beta2 is not used.

    >>> FedAdagrad(client_learning_rate=0.1).optimizer()
    ServerAdagrad(learning_rate=0.1, beta1=0.0, beta2=0.99, tau=0.001)
    """

    beta1: float = 0.0

    def optimizer(self) -> ServerOptimizer:
        """Adagrad on the server."""
        return self._make(ServerAdagrad)


@dataclass(frozen=True, kw_only=True)
class FedAdam(_FedAdaptive):
    """FedAdam (Reddi et al. 2021, algorithm 2).

    >>> FedAdam(client_learning_rate=0.1, server_learning_rate=0.01).optimizer()
    ServerAdam(learning_rate=0.01, beta1=0.9, beta2=0.99, tau=0.001)
    """

    def optimizer(self) -> ServerOptimizer:
        """Adam on the server."""
        return self._make(ServerAdam)


@dataclass(frozen=True, kw_only=True)
class FedYogi(_FedAdaptive):
    """FedYogi (Reddi et al. 2021, algorithm 2).

    >>> FedYogi(client_learning_rate=0.1, tau=1e-8).optimizer().tau
    1e-08
    """

    def optimizer(self) -> ServerOptimizer:
        """Yogi on the server."""
        return self._make(ServerYogi)
