"""Records of local training: how a client steps, what corrects its gradient, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hansa.core.errors import InputError
from hansa.core.protocols import Array

Rate = float | Callable[[int], float]  # a number, or a function of the round


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent on the client, with PyTorch's conventions for momentum and weight decay.

    >>> SGD(momentum=0.9).is_plain, SGD().is_plain
    (False, True)
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"SGD(momentum=): expected 0 <= momentum < 1, found {self.momentum}")
        if self.weight_decay < 0:
            raise InputError(f"SGD(weight_decay=): expected 0 or more, found {self.weight_decay}")
        if self.nesterov and not self.momentum:
            raise InputError("SGD(nesterov=True) needs momentum above 0; give momentum=0.9, say")

    @property
    def is_plain(self) -> bool:
        """Whether a step is the learning rate times the gradient and nothing else."""
        return not self.momentum and not self.weight_decay


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam on the client (Kingma and Ba, ICLR 2015, algorithm 1); its moments start anew in every round.

    >>> Adam(beta1=0.8).beta2
    0.999
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise InputError(f"Adam: expected 0 <= beta1, beta2 < 1, found {self.beta1} and {self.beta2}")

    is_plain = False


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """SGD by noisy sums of clipped gradients: what a client sends hides each single one of its records.

        w <- w - rate / divisor * (sum over the batch of clip(g_j) + N(0, (noise_multiplier * clipping_norm)^2))

    Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, "Deep learning with differential privacy", CCS 2016,
    algorithm 1, run by each client on its own records, as in Terrail et al., "FLamby", NeurIPS 2022, section 4.3.
    Each local step takes each record by a coin with chance ``batch_size / n`` (n: the client's number of records), or
    all of them where the algorithm's ``batch_size`` is None or no less than n. The sum is divided by a fixed number:
    ``divisor``, or else the expected batch. With a ``divisor`` and the full batch nothing that leaves depends on n.

    Give ``noise_multiplier``; or ``epsilon`` and ``delta``, for all steps of all rounds: each client then finds the
    noise for its own n, which it alone knows. Neighbours: one record of one client gives nothing ("zero out"); unless
    said above, n is not hidden. ``num_rounds`` is for how many the noise is sized; a schedule fills it in. Every client
    weighs the same, and neither losses nor metrics leave. Steps are counted, not epochs.

    >>> DPSGD(clipping_norm=1.0, noise_multiplier=1.1).delta is None
    True
    """

    clipping_norm: float
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    divisor: float | None = None
    num_rounds: int | None = None

    is_plain = False
    protects_records = True
    momentum, weight_decay, nesterov = 0.0, 0.0, False  # the step by the noisy gradient is plain

    def __post_init__(self) -> None:
        for name in ("clipping_norm", "noise_multiplier", "epsilon", "divisor", "num_rounds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"DPSGD({name}=): expected above 0, found {value}")
        if (self.noise_multiplier is None) == (self.epsilon is None):
            both = "neither" if self.epsilon is None else "both"
            raise InputError(f"DPSGD: expected either noise_multiplier or epsilon with delta, found {both}")
        if self.epsilon is not None and self.delta is None:
            raise InputError("DPSGD: expected epsilon and delta together, found no delta; give delta=1e-5, say")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"DPSGD(delta=): expected between 0 and 1, found {self.delta}")


ClientOptimizer = SGD | Adam | DPSGD


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How one client trains in one round; ``batch_size=None`` is the full batch, and one of epochs or steps is None."""

    learning_rate: float
    optimizer: ClientOptimizer = field(default_factory=SGD)
    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = None


def protects_records(optimizer: Any) -> bool:
    """Whether local training hides single records, so that nothing else of them may leave."""
    return getattr(optimizer, "protects_records", False)


class Correction(NamedTuple):
    """What is added to each local gradient: ``linear + strength * (w - anchor)``, on the ``trainable`` coordinates.

    Vectors are (num_params,) or (num_clients, num_params). ``models`` are vectors that the loss may see by name.
    """

    linear: Array | None = None
    strength: float = 0.0
    anchor: Array | None = None
    trainable: Array | None = None
    models: Mapping[str, Array] = {}

    @property
    def terms(self) -> frozenset[str]:
        """The names of what is asked for, of linear, strength, trainable and models; empty: gradients stay."""
        given = {
            "linear": self.linear is not None,
            "strength": bool(self.strength),
            "trainable": self.trainable is not None,
            "models": bool(self.models),
        }
        return frozenset(name for name, asked in given.items() if asked)

    @property
    def is_none(self) -> bool:
        """Whether local gradients stay as they are."""
        return not self.terms


class Fitted(NamedTuple):
    """What local training of a block gives back; ``loss`` is the mean training loss seen, NaN where unknown."""

    params: Array  # (num_clients, num_params) float32
    num_steps: Array  # (num_clients,) int64
    num_examples: Array  # (num_clients,) int64
    loss: Array  # (num_clients,) float64


def local_training(algorithm: Any, round_number: int, steps: int | None = None) -> LocalTraining:
    """The local training that an algorithm's fields describe, with its rate of this round.

    Read by name (``client_learning_rate``, ``client_optimizer``, ``local_epochs``, ``local_steps``, ``batch_size``), so
    that a user's own frozen dataclass needs no base class.
    """
    rate = getattr(algorithm, "client_learning_rate", None)
    if rate is None:
        name = type(algorithm).__name__
        raise InputError(f"{name}: fit() needs a client_learning_rate field; found none; add client_learning_rate=0.1")
    own_steps = steps if steps is not None else getattr(algorithm, "local_steps", None)
    return LocalTraining(
        learning_rate=float(rate(round_number) if callable(rate) else rate),
        optimizer=getattr(algorithm, "client_optimizer", None) or SGD(),
        epochs=None if own_steps is not None else (getattr(algorithm, "local_epochs", None) or 1),
        steps=own_steps,
        batch_size=getattr(algorithm, "batch_size", None),
    )
