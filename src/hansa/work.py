"""``fit`` as an algorithm sees it: a learner bound to a block of clients, their data and their random streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hansa.core.errors import CheckError, InputError, RunError
from hansa.core.key import Key, Streams
from hansa.core.protocols import Array, Client, Updates
from hansa.local_training import Correction, Fitted, LocalTraining, local_training, protects_records
from hansa.stopwatch import stage


class Work:
    """The learner of a block. Calling it trains: ``local = fit(params)``.

    ``params`` is (num_params,) for all or (num_clients, num_params); the result is always a block. ``num_examples``,
    ``num_steps`` and ``train_loss`` (num_clients,) describe the last call.
    """

    def __init__(
        self,
        learner: Any,
        algorithm: Any,
        clients: tuple[Client, ...],
        datasets: Sequence[Any],
        tests: Sequence[Any] = (),
        variant: Any = None,
        round_number: int = 0,
        keys: Sequence[Key] = (),
        secret: Sequence[Key] = (),
        adds_up: bool = False,
    ) -> None:
        self.clients, self.datasets, self.variant = clients, datasets, variant
        self._learner, self._algorithm, self._tests = learner, algorithm, tests
        self._round, self._keys, self._calls = round_number, keys, 0
        self._adds_up = adds_up  # only the sum of the changes is wanted
        self._is_private = protects_records(getattr(algorithm, "client_optimizer", None))
        if self._is_private:
            self._keys = secret  # noise and batches that the server cannot draw for itself
        self._fitted: Fitted | None = None

    def __call__(
        self,
        params: Array,
        *,
        linear: Array | None = None,
        strength: float = 0.0,
        anchor: Array | None = None,
        trainable: Array | None = None,
        models: Mapping[str, Array] | None = None,
        steps: int | None = None,
    ) -> Array:
        """Local training from ``params``, with ``linear + strength * (w - anchor)`` added to every gradient."""
        local = self.local if steps is None else local_training(self._algorithm, self._round, steps)
        return self.train(params, local, Correction(linear, strength, anchor, trainable, models or {}))

    def change(
        self,
        params: Array,
        *,
        linear: Array | None = None,
        strength: float = 0.0,
        anchor: Array | None = None,
        trainable: Array | None = None,
        models: Mapping[str, Array] | None = None,
        steps: int | None = None,
    ) -> Array:
        """Local minus received parameters: ``fit(params, ...) - params``, in one pass where the learner can."""
        local = self.local if steps is None else local_training(self._algorithm, self._round, steps)
        return self.train(params, local, Correction(linear, strength, anchor, trainable, models or {}), change=True)

    @property
    def local(self) -> LocalTraining:
        """The local training that the algorithm's fields describe, at this round's rate."""
        return local_training(self._algorithm, self._round)

    def train(
        self, params: Array, local: LocalTraining, correction: Correction | None = None, *, change: bool = False
    ) -> Array:
        """Local training with settings of your own: (num_clients, num_params); with ``change`` less ``params``."""
        call = self._calls
        if self._is_private:
            self._check_private(local)
        keys = Streams(self._keys, lambda key: key.child("fit", call))
        self._calls += 1
        block = self.block(params)
        own = {"change": True} if change and getattr(self._learner, "gives_change", False) else {}
        if own and self._adds_up and getattr(self._learner, "leaves_products", False):
            own["unwritten"] = True
        try:
            with stage("training"):
                self._fitted = self._learner.fit(block, self.datasets, local, correction or Correction(), keys, **own)
        except RunError as error:  # a learner knows a client by its row of the block; here it has a name
            row, reason = getattr(error, "row", None), getattr(error, "reason", "")
            if row is None:
                raise
            raise RunError(f"client {self.clients[row]!r} {reason}") from error.__cause__
        if change and not own:
            values = self._fitted.params  # ours: nobody else holds it, so that it may be changed in place
            values -= params
        return self._fitted.params

    def block(self, params: Array) -> Array:
        """``params`` as one row a client."""
        return params if params.ndim == 2 else np.broadcast_to(np.asarray(params), (len(self.clients), params.shape[0]))

    def updates(self, values: Array, weights: Array | None = None, tail: Mapping[str, Array] | None = None) -> Updates:
        """A block of ``values``, weighted by the number of training examples unless ``weights`` says otherwise."""
        if self._is_private:  # how many records there are, and what was counted beside, is theirs
            weights = np.ones(len(self.clients))
            if tail:
                raise CheckError([f"DPSGD covers the update alone, and {', '.join(tail)} would leave beside it."])
        own = self.num_examples if weights is None else weights
        return Updates(self.clients, values, np.asarray(own, dtype=np.float64), dict(tail or {}))

    @property
    def num_examples(self) -> Array:
        """Training examples of each client: (num_clients,)."""
        sizes = getattr(self.datasets, "sizes", None)
        return np.array([len(dataset) for dataset in self.datasets], dtype=np.int64) if sizes is None else sizes

    @property
    def num_steps(self) -> Array:
        """Local steps that each client took in the last call: (num_clients,)."""
        return self._last.num_steps

    @property
    def train_loss(self) -> Array | None:
        """Mean training loss of each client in the last call, or None before it."""
        return None if self._fitted is None else self._fitted.loss

    def gradient(self, params: Array) -> Array:
        """The gradient over all of each client's rows: (num_clients, num_params), read off one full-batch step."""
        local = LocalTraining(learning_rate=1.0, epochs=None, steps=1, batch_size=None)
        block, before = self.block(params), self._fitted
        gradient = block - self.train(block, local)
        self._fitted = before
        return gradient

    def loss(self, params: Array) -> Array:
        """Mean loss over each client's training rows: (num_clients,); NaN for an empty client."""
        if self._is_private:
            raise CheckError(["DPSGD covers the update alone, and the algorithm asks for losses without noise."])
        sums = self._learner.evaluate(self.block(params), self.datasets)
        return np.array([self._learner.metrics.finish(row)["loss"] for row in sums])

    def evaluate(self, params: Array) -> Array:
        """Metric sums over each client's held-out rows (zeros where it has none): (num_clients, metrics.size)."""
        return self._learner.evaluate(self.block(params), self._tests)

    def _check_private(self, local: LocalTraining) -> None:
        """Refuse what record-level privacy has not counted: other training, a second one, a learner without it."""
        if not protects_records(local.optimizer):
            raise CheckError(["DPSGD covers its own steps alone, and the algorithm asks for others without noise."])
        if self._calls:
            raise CheckError(["DPSGD counts one local training a round, and the algorithm asks for a second one."])
        if not getattr(self._learner, "protects_records", False):
            name = type(self._learner).__name__
            raise CheckError([f"{name} cannot train by DPSGD; use hansa.LinearLearner or hansa.TorchLearner."])

    @property
    def _last(self) -> Fitted:
        if self._fitted is None:
            raise InputError("fit.num_steps: expected a call of fit(params) before it; found none; train first")
        return self._fitted
