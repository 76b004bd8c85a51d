"""Linear, logistic and softmax regression in NumPy: a whole block of clients steps in a few matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Array
from hansa.data.block import Block
from hansa.learners.batches import batches, num_steps
from hansa.learners.checks import check_features, check_labels, refuse_corrections
from hansa.learners.dp_sgd import Noise, factors, poisson_batches, steps_of
from hansa.learners.scores import evaluated, labels, logistic_loss, probabilities, sigmoid
from hansa.learners.steps import Steps
from hansa.local_training import DPSGD, Correction, Fitted, LocalTraining
from hansa.metrics import Metric, Metrics

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LinearModel:
    """A fitted linear model, for use without hansa's machinery.

    >>> model = LinearModel(weights=np.array([[1.0, -1.0]]), bias=np.array([0.5]), num_classes=2)
    >>> model.predict(np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [1, 0]
    """

    weights: Floats  # (num_outputs, num_features)
    bias: Floats  # (num_outputs,)
    num_classes: int | None

    def scores(self, x: npt.ArrayLike) -> Floats:
        """Values, or one logit a row for two classes: (num_rows,); logits (num_rows, num_classes) for more."""
        out: Floats = np.asarray(x, dtype=np.float32) @ self.weights.T + self.bias
        return out[:, 0] if len(self.bias) == 1 else out

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """The values (num_rows,) float32 of a regression, or the class labels (num_rows,) int64."""
        scores = self.scores(x)
        return scores if self.num_classes is None else labels(scores)

    def predict_proba(self, x: npt.ArrayLike) -> Floats:
        """Each class's probability: (num_rows, num_classes)."""
        if self.num_classes is None:
            raise InputError("predict_proba: expected a model of classes, found a regression; use predict")
        return probabilities(self.scores(x))


class LinearLearner:
    """A linear model, trained on each client with plain NumPy.

    ``num_classes=None`` is linear regression: the loss is the mean of the squared errors (no half, as PyTorch's
    ``mse_loss``). ``num_classes=2`` is logistic regression with one logit, so ``num_features + 1`` parameters; more
    classes are softmax regression. ``l2`` adds ``l2 / 2 * |weights|²`` to what is minimised (not the bias, nor the loss
    that is reported). ``metrics`` are accuracy for classes and R² for values unless you say.

    The vector is ``weight`` (num_outputs, num_features), then ``bias`` (num_outputs,), both zero at first: the layout
    of ``torch.nn.Linear``. Training is in float32. Overflow gives infinite or NaN parameters and no warning.

    >>> LinearLearner(num_features=3, num_classes=2).layout.num_params
    4
    """

    corrections = frozenset({"linear", "strength", "anchor", "trainable"})
    reports_loss = True
    batches_clients = True
    protects_records = True  # it can train by DPSGD

    def __init__(
        self,
        *,
        num_features: int,
        num_classes: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        l2: float = 0.0,
    ) -> None:
        if num_features < 1:
            raise InputError(f"LinearLearner(num_features=): expected 1 or more, found {num_features}")
        if num_classes is not None and num_classes < 2:
            raise InputError(
                f"LinearLearner(num_classes=): expected 2 or more, or None for regression, found {num_classes}"
            )
        if not l2 >= 0:
            raise InputError(f"LinearLearner(l2=): expected 0 or more, found {l2}")
        self.num_features, self.num_classes, self.l2 = num_features, num_classes, l2
        self._num_outputs = num_classes if num_classes is not None and num_classes > 2 else 1
        named = metrics if metrics is not None else ("r2",) if num_classes is None else ("accuracy",)
        self.metrics = Metrics(named, num_classes=num_classes)

    def __repr__(self) -> str:
        l2 = f", l2={self.l2}" if self.l2 else ""
        return (
            f"LinearLearner(num_features={self.num_features}, num_classes={self.num_classes}, "
            f"metrics={self.metrics.names[1:]!r}{l2})"
        )

    @cached_property
    def layout(self) -> Layout:
        """``weight`` and ``bias`` in one vector."""
        outputs = self._num_outputs
        tensors = {"weight": np.zeros((outputs, self.num_features), np.float32), "bias": np.zeros(outputs, np.float32)}
        return Layout.of(tensors)

    def columns(self, dataset: Any) -> dict[str, npt.NDArray[Any]]:
        """A dataset's arrays as blocks of clients keep them: float32, labels that are integers int64."""
        y = np.asarray(dataset.y)
        has_labels = self.num_classes is not None and y.dtype.kind in "biu"
        columns = {"x": np.asarray(dataset.x, dtype=np.float32), "y": y.astype(np.int64 if has_labels else np.float32)}
        return columns if dataset.weights is None else {**columns, "weights": dataset.weights.astype(np.float32)}

    def initial(self, key: Key) -> Floats:
        """Zeros (num_params,): the loss is convex, so any start will do and ``key`` is not used."""
        return np.zeros(self.layout.num_params, np.float32)

    def fit(
        self,
        params: Array,
        datasets: Sequence[Any],
        local: LocalTraining,
        correction: Correction,
        keys: Sequence[Key],
    ) -> Fitted:
        """Local training of a block: ``params`` (num_clients, num_params) is left as it is.

        A client that has taken its steps leaves the block. A batch of zero total weight has gradient zero. The loss is
        the mean over all examples seen, by their weights; NaN for a client that took no step.
        """
        refuse_corrections("LinearLearner", correction, self.corrections, "use TorchLearner with a loss of your own")
        if np.isnan(local.learning_rate):
            raise InputError(
                "LinearLearner: expected a client_learning_rate, found none; give client_learning_rate=0.1"
            )
        block = datasets if isinstance(datasets, Block) else Block.of(datasets, self.columns)
        if block is None:
            raise InputError("LinearLearner: expected clients of one form, found others; run federation.check_data")
        stack = _Stack(block, local.batch_size)
        if isinstance(local.optimizer, DPSGD):
            return self._fit_privately(params, stack, local, correction, keys)
        result = np.array(params, dtype=np.float32)
        current, who, optimizer = result, np.arange(len(result)), Steps(local, correction, result)
        losses, weights = np.zeros(len(result)), np.zeros(len(result))
        with np.errstate(over="ignore", invalid="ignore"):
            for rows, real in batches(keys, stack.sizes, local):
                active = np.flatnonzero(real.any(axis=1))
                if len(active) < len(who):
                    result[who] = current
                    optimizer.keep(np.searchsorted(who, active))
                    current, who = result[active], active
                x, y, weight = stack.batch(rows, real, who)
                gradient, loss = self._gradient(current, x, y, weight)
                optimizer.apply(current, gradient)
                losses[who] += loss
                weights[who] += weight.sum(axis=1)
        result[who] = current
        seen = np.where(weights > 0, losses / np.where(weights > 0, weights, 1), np.nan)
        return Fitted(result, num_steps(stack.sizes, local), stack.sizes, seen)

    def _fit_privately(
        self, params: Array, stack: _Stack, local: LocalTraining, correction: Correction, keys: Sequence[Key]
    ) -> Fitted:
        """Steps by DP-SGD. A record's gradient is the outer product of the scores' slope and (x, 1), so is its norm."""
        current, noise = np.array(params, dtype=np.float32), Noise(local, stack.sizes, keys)
        optimizer = Steps(local, correction, current)
        outputs, split, everyone = self._num_outputs, self._num_outputs * self.num_features, np.arange(len(current))
        with np.errstate(over="ignore", invalid="ignore"):
            for step, (rows, real) in enumerate(poisson_batches(keys, stack.sizes, local)):
                x, y, weight = stack.batch(rows, real, everyone)
                weights, bias = current[:, :split].reshape(len(current), outputs, -1), current[:, split:, None]
                slope = self._loss(weights @ x.swapaxes(1, 2) + bias, y)[1].astype(np.float64) * weight[:, None]
                wide = x.astype(np.float64)
                norms = np.sqrt(np.einsum("nob,nob->nb", slope, slope) * (np.einsum("nbf,nbf->nb", wide, wide) + 1))
                scale = np.where(real, factors(norms, noise.clipping_norm), 0.0)
                slope = np.where(scale[:, None] > 0, slope * scale[:, None], 0.0)
                wide = np.where(scale[:, :, None] > 0, wide, 0.0)
                sums = np.concatenate([(slope @ wide).reshape(len(current), split), slope.sum(axis=2)], axis=1)
                noisy = np.stack([noise.gradient(i, step, own) for i, own in enumerate(sums)])
                gradient = noisy.astype(np.float32)
                gradient[:, :split] += self.l2 * current[:, :split]
                optimizer.apply(current, gradient)
        steps = np.full(len(current), steps_of(local), np.int64)
        return Fitted(current, steps, stack.sizes, np.full(len(current), np.nan))

    def _gradient(self, params: Floats, x: Floats, y: Floats, weight: Floats) -> tuple[Floats, npt.NDArray[np.float64]]:
        """The gradient (n, num_params) of each client's mean loss, and its sum of losses (n,).

        ``x`` (n, batch, num_features), ``y`` and ``weight`` (n, batch).
        """
        num, outputs = len(params), self._num_outputs
        split = outputs * self.num_features
        scores = params[:, :split].reshape(num, outputs, -1) @ x.swapaxes(1, 2) + params[:, split:, None]
        loss, slope = self._loss(scores, y)
        total = weight.sum(axis=1, keepdims=True)
        slope *= (weight / np.where(total > 0, total, 1))[:, None]
        gradient = np.empty_like(params)
        gradient[:, :split] = (slope @ x).reshape(num, split)
        gradient[:, split:] = slope.sum(axis=2)
        if self.l2:
            gradient[:, :split] += self.l2 * params[:, :split]
        return gradient, np.einsum("nb,nb->n", loss, weight, dtype=np.float64)

    def _loss(self, scores: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Each example's loss (n, batch) and its slope in the scores (n, num_outputs, batch)."""
        if self.num_classes is None:
            error = scores[:, 0] - y
            return error * error, 2 * error[:, None]
        if self.num_classes == 2:
            logits = scores[:, 0]
            return logistic_loss(logits, y), (sigmoid(logits) - y)[:, None]
        shifted = scores - scores.max(axis=1, keepdims=True)
        slope = np.exp(shifted)
        total = slope.sum(axis=1, keepdims=True)
        index = y.astype(np.int64)[:, None]
        loss = np.log(total[:, 0]) - np.take_along_axis(shifted, index, axis=1)[:, 0]
        slope /= total
        np.put_along_axis(slope, index, np.take_along_axis(slope, index, axis=1) - 1, axis=1)
        return loss, slope

    def evaluate(self, params: Array, datasets: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Metric sums of each client's rows: (num_clients, metrics.size) float64; zeros for an empty dataset."""
        sums = np.zeros((len(datasets), self.metrics.size))
        for row, dataset, total in zip(params, datasets, sums, strict=True):
            if len(dataset):
                scores = self.scores(row, dataset.x)
                total[:] = evaluated(self.metrics, scores, dataset.y, dataset.weights, self.num_classes)
        return sums

    def scores(self, params: Array, x: npt.ArrayLike) -> Floats:
        """Values, or one logit a row for two classes: (num_rows,); logits (num_rows, num_classes) for more."""
        return self.model(params).scores(x)

    def predict(self, params: Array, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """Values (num_rows,) float32, or class labels (num_rows,) int64."""
        return self.model(params).predict(x)

    def predict_proba(self, params: Array, x: npt.ArrayLike) -> Floats:
        """Each class's probability: (num_rows, num_classes); refused for a regression."""
        return self.model(params).predict_proba(x)

    def model(self, params: Array) -> LinearModel:
        """The fitted model of ``params`` (num_params,)."""
        vector, split = np.array(params, dtype=np.float32), self._num_outputs * self.num_features
        return LinearModel(
            weights=vector[:split].reshape(-1, self.num_features), bias=vector[split:], num_classes=self.num_classes
        )

    def check(self, dataset: Any, client: str) -> None:
        """Refuse another feature count, labels outside 0..num_classes-1, missing values, no labels."""
        check_features(dataset, client, self.num_features)
        check_labels(dataset, client, self.num_classes)


class _Stack:
    """The rows of a block of clients, and the batches that steps take from them."""

    def __init__(self, block: Block, batch_size: int | None) -> None:
        self.sizes, widest = block.sizes, int(block.sizes.max(initial=0))
        self._starts = np.minimum(block.starts, max(block.num_rows - 1, 0))
        x, y = block.columns["x"][: block.num_rows], block.columns["y"][: block.num_rows]
        self._x, self._y, self._weights = x, y, block.columns.get("weights")
        self._fixed = batch_size is None or batch_size >= widest  # every step takes all rows as they lie
        self._last: tuple[int, Floats, Floats] | None = None
        if self._fixed and widest and (self.sizes == widest).all() and not (self._starts % widest).any():
            clients, last = self._starts // widest, block.num_rows // widest
            by_client = x[: last * widest].reshape(last, widest, -1), y[: last * widest].reshape(last, widest)
            self._last = (len(clients), by_client[0].take(clients, axis=0), _floats(by_client[1].take(clients, axis=0)))

    def batch(
        self, rows: npt.NDArray[np.int64], real: npt.NDArray[np.bool_], who: npt.NDArray[np.intp]
    ) -> tuple[Floats, Floats, Floats]:
        """``x`` (n, batch, num_features), ``y`` and weights (n, batch) of clients ``who``; a padded place weighs 0."""
        rows, real = rows[who] + self._starts[who, None], real[who]
        weights = real.astype(np.float32)
        if self._weights is not None:
            weights *= self._weights[rows]
        if not self._fixed or self._last is None or self._last[0] != len(who):
            self._last = (len(who), self._x.take(rows, axis=0), _floats(self._y[rows]))
        return *self._last[1:], weights


def _floats(y: npt.NDArray[Any]) -> Floats:
    return y.astype(np.float32, copy=False)
