"""Metrics as vectors of sums with a finish: adding two clients' vectors and finishing is exact, whoever holds the rows.

Scores are what a model gives before any squashing. For classes: logits (num_examples, num_classes), or for two classes
one logit an example, (num_examples,) or (num_examples, 1). Leading axes beyond the first (time, say) are flattened. For
a regression: values (num_examples,) or (num_examples, num_outputs).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError

Array = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]

CLASS_METRICS = ("accuracy", "auc", "average_precision", "f1")
VALUE_METRICS = ("mse", "r2")
NUM_BINS = 2048
IGNORED_LABEL = -100  # torch's ignore_index: padding, which counts in no metric

# Columns of history.csv and clients.csv.
_TAKEN = (
    "loss", "round", "client", "num_examples", "num_test", "num_clients", "num_late", "bytes_up", "bytes_down",
    "seconds", "clock_s",
)  # fmt: skip
_TAKEN_FOR_PRIVACY = ("epsilon", "delta")


@dataclass(frozen=True)
class Metric:
    """A metric of your own: ``sums(scores, y)`` -> a vector to be added over clients, ``finish(vector)`` -> a number.

    ``sums`` gets NumPy arrays of one client's rows (never none) and returns a 1-D vector of always the same length,
    ``size``; where that is not given, it is found by a trial on one example of zeros. ``finish`` gets the total, which
    may be all zeros, and returns nan for "undefined".

    >>> error = Metric("error", sums=lambda s, y: np.array([abs(s - y).sum(), len(y)]), finish=lambda v: v[0] / v[1])
    >>> error.finish(error.sums(np.array([1.0, 3.0]), np.array([1.0, 2.0])))
    np.float64(0.5)
    """

    name: str
    sums: Callable[[Array, Array], npt.ArrayLike]
    finish: Callable[[Vector], float]
    size: int | None = None

    def __post_init__(self) -> None:
        if self.name in ("", *_TAKEN, *_TAKEN_FOR_PRIVACY):
            taken = ", ".join((*_TAKEN, *_TAKEN_FOR_PRIVACY))
            raise InputError(f"Metric(name): expected a name other than {taken}, found {self.name!r}; choose another")
        for part in ("sums", "finish"):
            if not callable(getattr(self, part)):
                raise InputError(f"Metric({self.name!r}, {part}=): expected a function, found {getattr(self, part)!r}")


def metric(name_or_metric: str | Metric, num_classes: int | None, num_outputs: int = 1) -> Metric:
    """A metric by name, or your own as it is. ``num_classes=None`` stands for a regression of ``num_outputs`` values.

    | name | meaning |
    |---|---|
    | accuracy | share of examples whose highest score is their label's |
    | auc | area under the ROC curve from 2,048 bins of the logit; more than two classes: one-vs-rest, unweighted mean |
    | average_precision | sum of precision times step in recall, from the same bins; likewise |
    | f1 | of class 1; more than two classes: unweighted mean over those that occur |
    | mse | mean squared error over examples and outputs |
    | r2 | 1 - squared error / squared deviation from the pooled mean; unweighted mean over outputs |

    Against exact computation ``auc`` is within 1e-4 and ``average_precision`` within 5e-3, unless nearly all scores lie
    within a few bins (scores that differ by under 0.02 around a logit of 6, say).

    Raises ``InputError`` for an unknown name, and for one that does not suit the task.

    >>> metric("accuracy", 2).sums(np.array([-1.0, 2.0, 3.0]), np.array([0, 1, 0]))
    array([2., 3.])
    """
    if isinstance(name_or_metric, Metric):
        return name_or_metric
    if num_classes is not None and num_classes < 2:
        raise InputError(f"num_classes: expected 2 or more, or None for a regression, found {num_classes}")
    suited = VALUE_METRICS if num_classes is None else CLASS_METRICS
    if name_or_metric not in suited:
        raise InputError(_unknown(name_or_metric, num_classes, suited))
    if num_classes is None:
        of_values: dict[str, tuple[Any, Any, int]] = {
            "mse": (_squared_error, _finish_mse, 2),
            "r2": (_Moments(num_outputs), _finish_r2, 4 * num_outputs),
        }
        return Metric(name_or_metric, *of_values[name_or_metric])
    curves = num_classes if num_classes > 2 else 1
    of_classes: dict[str, tuple[Any, Any, int]] = {
        "accuracy": (_Correct(num_classes), _finish_accuracy, 2),
        "auc": (_Bins(num_classes), _finish_auc, 2 * NUM_BINS * curves),
        "average_precision": (_Bins(num_classes), _finish_average_precision, 2 * NUM_BINS * curves),
        "f1": (_Confusion(num_classes), _finish_f1, 3 * num_classes),
    }
    return Metric(name_or_metric, *of_classes[name_or_metric])


class Metrics:
    """The loss and some metrics as one vector of sums.

    ``names`` starts with ``loss``; ``size`` is the vector's length. Metrics of equal sums (``auc`` and
    ``average_precision``) share their part of it.

    >>> metrics = Metrics(("accuracy",), num_classes=2)
    >>> one = metrics.sums(np.array([1.0, -2.0]), np.array([1, 1]), loss_sum=2.4, loss_weight=2)
    >>> two = metrics.sums(np.array([0.5]), np.array([1]), loss_sum=0.6, loss_weight=1)
    >>> {name: round(value, 3) for name, value in metrics.finish(one + two).items()}
    {'loss': 1.0, 'accuracy': 0.667}
    """

    def __init__(
        self, names_or_metrics: Sequence[str | Metric] = (), num_classes: int | None = None, num_outputs: int = 1
    ) -> None:
        if isinstance(names_or_metrics, str | Metric):
            raise InputError(f"metrics: expected a tuple, found {names_or_metrics!r}; write ({names_or_metrics!r},)")
        self._num_classes = num_classes
        self._metrics = tuple(metric(m, num_classes, num_outputs) for m in names_or_metrics if m != "loss")
        self.names: tuple[str, ...] = ("loss", *(m.name for m in self._metrics))
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise InputError(f"metrics: expected names that differ, found {', '.join(twice)} twice; name each once")

    def __repr__(self) -> str:
        return f"Metrics({self.names[1:]!r}, num_classes={self._num_classes})"

    @property
    def size(self) -> int:
        """Length of the vector of sums."""
        return 2 + sum(size for _, size in self._layout.values())

    @cached_property
    def _layout(self) -> dict[Callable[..., Any], tuple[int, int]]:
        """Where each distinct ``sums`` function writes: (start, size)."""
        layout: dict[Callable[..., Any], tuple[int, int]] = {}
        start = 2
        for m in self._metrics:
            if m.sums not in layout:
                layout[m.sums] = (start, self._trial(m) if m.size is None else m.size)
                start += layout[m.sums][1]
        return layout

    def _trial(self, m: Metric) -> int:
        """The length of a metric's sums on one example of zeros."""
        width = () if self._num_classes is None or self._num_classes == 2 else (self._num_classes,)
        y = np.zeros(1, np.float64 if self._num_classes is None else np.int64)
        try:
            return len(np.asarray(m.sums(np.zeros((1, *width)), y)))
        except Exception as error:
            raise InputError(
                f"Metric({m.name!r}): expected the length of its sums from a trial on one example of zeros, found "
                f"{type(error).__name__}: {error}; give size="
            ) from error

    def sums(self, scores: npt.ArrayLike, y: npt.ArrayLike, loss_sum: float, loss_weight: float) -> Vector:
        """One client's vector (size,): the loss summed over its examples, those examples' number (or weight), the rest.

        Without examples all metrics' sums are zero.
        """
        scores, y = np.asarray(scores), np.asarray(y)
        vector = np.zeros(self.size)
        vector[:2] = loss_sum, loss_weight
        for m in self._metrics if len(y) else ():
            start, size = self._layout[m.sums]
            part = np.asarray(m.sums(scores, y), np.float64)
            if part.shape != (size,):
                raise InputError(f"Metric({m.name!r}): expected sums of shape ({size},), found {part.shape}; fix sums=")
            vector[start : start + size] = part
        return vector

    def finish(self, vector: npt.ArrayLike) -> dict[str, float]:
        """Each metric by name, ``loss`` first, from any total of vectors; nan where undefined (no rows, one class)."""
        total = np.asarray(vector, np.float64)
        if total.shape != (self.size,):
            raise InputError(
                f"{self}: expected a vector of {self.size} sums, found shape {total.shape}; use its sums()"
            )
        done = {"loss": _ratio(total[0], total[1])}
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for m in self._metrics:
                start, size = self._layout[m.sums]
                try:
                    done[m.name] = float(m.finish(total[start : start + size]))
                except ZeroDivisionError:  # a metric of the user's own, over no rows
                    done[m.name] = math.nan
        return done


@dataclass(frozen=True)
class _Correct:
    """Number of right answers, number of examples. A row with a NaN score is a wrong answer."""

    num_classes: int

    def __call__(self, scores: Array, y: Array) -> Vector:
        scores, y = _class_rows(scores, y, self.num_classes)
        right = (_answers(scores) == y) & ~np.isnan(scores.reshape(len(y), -1)).any(axis=1)
        return np.array([right.sum(), len(y)], np.float64)


@dataclass(frozen=True)
class _Confusion:
    """For each class: answers that are right, other answers of it, answers that miss it."""

    num_classes: int

    def __call__(self, scores: Array, y: Array) -> Vector:
        scores, y = _class_rows(scores, y, self.num_classes)
        answers = _answers(scores)
        hits, answered, labels = (np.bincount(a, minlength=self.num_classes) for a in (y[answers == y], answers, y))
        return np.concatenate([hits, answered - hits, labels - hits]).astype(np.float64)


@dataclass(frozen=True)
class _Bins:
    """How many examples of other classes and of the class fall into each bin of the logit, for each curve."""

    num_classes: int

    def __call__(self, scores: Array, y: Array) -> Vector:
        scores, y = _class_rows(scores, y, self.num_classes)
        logits = _one_vs_rest(scores.astype(np.float64))
        classes = np.arange(logits.shape[1]) if self.num_classes > 2 else np.array([1])
        place = bins(logits) + NUM_BINS * (y[:, None] == classes) + 2 * NUM_BINS * np.arange(len(classes))
        return np.bincount(place.reshape(-1), minlength=2 * NUM_BINS * len(classes)).astype(np.float64)


@dataclass(frozen=True)
class _Moments:
    """For each output: number, sum of y, sum of its squares, sum of squared errors."""

    num_outputs: int

    def __call__(self, scores: Array, y: Array) -> Vector:
        scores, y = _value_rows(scores, y)
        if y.shape[1] != self.num_outputs:
            raise InputError(
                f"r2: expected {self.num_outputs} values an example, found {y.shape[1]}; give num_outputs="
            )
        with np.errstate(over="ignore", invalid="ignore"):
            parts = [np.full(y.shape[1], len(y)), y.sum(axis=0), (y**2).sum(axis=0), ((scores - y) ** 2).sum(axis=0)]
        return np.concatenate(parts)


def bins(logits: Array) -> npt.NDArray[np.int64]:
    """The bin, 0 .. 2047, of each logit; the same edges for every client, hence the sums.

    Half of the bins' places are equal steps of the logit from -16 to 16, half equal steps of asinh(50 logit), which
    are fine near 0 (a model after one round) and reach 1,000 (a confident one); beyond that is the last bin. NaN
    counts as 0.

    >>> bins(np.array([-np.inf, 0.0, 5.0, np.inf]))
    array([   0, 1024, 1460, 2047])
    """
    finite = np.nan_to_num(logits, nan=0.0, posinf=1e3, neginf=-1e3)
    even = np.clip(finite / 16, -1, 1)
    wide = np.clip(np.arcsinh(finite * 50) / np.arcsinh(5e4), -1, 1)
    places: Vector = np.clip((even + wide + 2) * (NUM_BINS / 4), 0, NUM_BINS - 1)
    return places.astype(np.int64)


def _class_rows(scores: Array, y: Array, num_classes: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Scores (num_rows,) or (num_rows, num_classes) and labels (num_rows,), checked, without padding."""
    single = num_classes == 2 and scores.size == y.size
    if not single and (scores.ndim != y.ndim + 1 or scores.shape != (*y.shape, num_classes)):
        one = " or (num_examples,)" if num_classes == 2 else ""
        raise InputError(
            f"metrics: expected scores (num_examples, {num_classes}){one} and y (num_examples,), classes on the last "
            f"axis, found shapes {scores.shape} and {y.shape}; reshape the model's output or the labels"
        )
    flat = scores.reshape(-1) if single else scores.reshape(-1, num_classes)
    labels = y.reshape(-1).astype(np.int64)
    if (labels == IGNORED_LABEL).any():
        flat, labels = flat[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL]
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise InputError(
            f"metrics: expected labels 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}; "
            "number the classes from 0, the same way at every client"
        )
    return flat, labels


def _value_rows(scores: Array, y: Array) -> tuple[Vector, Vector]:
    """Scores and values as (num_rows, num_outputs) float64."""
    if scores.size != y.size:
        raise InputError(
            f"metrics: expected scores of the shape of y, found {scores.shape} and {y.shape}; a regression's model "
            "gives one score for each value of y"
        )
    return scores.reshape(len(y), -1).astype(np.float64), y.reshape(len(y), -1).astype(np.float64)


def _answers(scores: Array) -> npt.NDArray[np.int64]:
    answers: npt.NDArray[np.int64] = (scores > 0 if scores.ndim == 1 else scores.argmax(axis=1)).astype(np.int64)
    return answers


def _one_vs_rest(scores: Vector) -> Vector:
    """The logit of each class against all others, (num_rows, num_classes); for two classes that of class 1.

    Plus log(num_classes - 1), so that a model that knows nothing is at 0, where bins are fine.
    """
    if scores.ndim == 1:
        return scores[:, None]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if scores.shape[1] == 2:
            return scores[:, 1:] - scores[:, :1]
        best = scores.argmax(axis=1)[:, None]
        shifted = scores - np.take_along_axis(scores, best, axis=1)
        others = np.exp(shifted)
        np.put_along_axis(others, best, 0, axis=1)
        rest = others.sum(axis=1, keepdims=True)
        others = 1 + rest - others  # the best class counts 1; for itself, only the rest: without cancellation
        np.put_along_axis(others, best, rest, axis=1)
        return np.asarray(shifted - np.log(others / (scores.shape[1] - 1)))


def _curves(vector: Vector) -> tuple[Vector, Vector]:
    """Counts from the highest bin to the lowest, (num_curves, NUM_BINS): of other classes, of the class."""
    counts = np.maximum(vector, 0).reshape(-1, 2, NUM_BINS)[:, :, ::-1]
    return counts[:, 0], counts[:, 1]


def _finish_auc(vector: Vector) -> float:
    others, own = _curves(vector)
    below = others.sum(axis=1, keepdims=True) - np.cumsum(others, axis=1)
    pairs = own.sum(axis=1) * others.sum(axis=1)
    return _mean_where(pairs > 0, (own * (below + others / 2)).sum(axis=1) / pairs)


def _finish_average_precision(vector: Vector) -> float:
    others, own = _curves(vector)
    hits = np.cumsum(own, axis=1)
    precision = hits / np.maximum(hits + np.cumsum(others, axis=1), 1e-300)
    return _mean_where(own.sum(axis=1) > 0, (own * precision).sum(axis=1) / own.sum(axis=1))


def _finish_accuracy(vector: Vector) -> float:
    return _ratio(vector[0], vector[1])


def _finish_f1(vector: Vector) -> float:
    hits, other, missed = vector.reshape(3, -1)
    f1 = 2 * hits / (2 * hits + other + missed)
    return float(f1[1]) if len(f1) == 2 else _mean_where(hits + other + missed > 0, f1)


def _squared_error(scores: Array, y: Array) -> Vector:
    scores, y = _value_rows(scores, y)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([((scores - y) ** 2).sum(), y.size], np.float64)


def _finish_mse(vector: Vector) -> float:
    return _ratio(vector[0], vector[1])


def _finish_r2(vector: Vector) -> float:
    """Undefined where y does not vary, or by rounding only."""
    count, total, squares, errors = vector.reshape(4, -1)
    spread = squares - total**2 / count
    return float(np.where(spread > 1e-12 * squares, 1 - errors / spread, math.nan).mean())


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def _mean_where(defined: npt.NDArray[np.bool_], values: Vector) -> float:
    return float(values[defined].mean()) if defined.any() else math.nan


def _unknown(name: object, num_classes: int | None, suited: Sequence[str]) -> str:
    """The sentence for a name that is not a metric, or not one of this task."""
    task = "a regression" if num_classes is None else f"{num_classes} classes"
    start = f"metrics: expected one of {', '.join(suited)} for {task}, or hansa.Metric(name, sums=, finish=)"
    near = difflib.get_close_matches(str(name).lower(), suited, n=1, cutoff=0.5)
    if name in (*CLASS_METRICS, *VALUE_METRICS):
        hint = "give num_classes= for classes" if num_classes is None else "num_classes=None is for a regression"
    else:
        hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
    return f"{start}, found {name!r}; {hint}"
