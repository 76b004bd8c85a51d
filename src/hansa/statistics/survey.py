"""A survey: statistics as a federation, whose model is the vector of their sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from hansa.aggregators.mean import Mean
from hansa.core.chain import Transform
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Aggregate, Array, Fit, Memory, Settings, State, Updates
from hansa.data.dataset import Dataset
from hansa.federation import Federation
from hansa.metrics import Metrics
from hansa.statistics.sums import Estimate, Statistic, Vector
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise


def survey(
    *statistics: Statistic,
    epsilon: float | None = None,
    delta: float | None = None,
    noise_multiplier: float | None = None,
    unit: Literal["record", "client"] = "record",
) -> Federation:
    """A federation whose one round releases ``statistics``, with noise for all of them together.

    ``unit="record"`` hides one record of one client: clients send sums, which the server sees before the noise.
    ``unit="client"`` hides a whole client: each sends the means over its records, so that all clients count alike, and
    counts are in clients. Run it as any federation, with ``num_rounds=1``; ``answers(run)`` reads it.
    """
    if not statistics:
        raise InputError("survey: expected at least one statistic, found none; give hansa.statistics.Count(), say")
    if unit not in ("record", "client"):
        raise InputError(f'survey(unit=): expected "record" or "client", found {unit!r}')
    names = [statistic.name for statistic in statistics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"survey: expected statistics of different names, found {', '.join(twice)} twice")
    questions = Questions(tuple(statistics), per_client=unit == "client")
    bound = Clip(norm=questions.norm) if unit == "client" else RecordBound(norm=questions.norm)
    noise = GaussianNoise(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    return Federation(
        learner=questions,
        algorithm=Tally(questions=questions),
        transforms=(bound, noise),
        aggregator=Mean(weighting="clients", denominator=1.0),
    )


def answers(run: Any) -> dict[str, Any]:
    """What a survey's run found, by statistic: ``Estimate``s, a list or a dictionary of them, or quantiles."""
    federation = run.federation
    questions = federation.learner
    if not isinstance(questions, Questions):
        raise InputError(f"answers: expected the run of a survey, found one of {type(questions).__name__}")
    [noise] = [t for t in federation.transforms if isinstance(t, GaussianNoise)]
    deviation = (noise.noise_multiplier or 0.0) * questions.norm / math.sqrt(max(1, run.info["rounds_done"]))
    return questions.answers(np.asarray(run.parameters, np.float64), deviation)


def lines(run: Any) -> list[str]:
    """A survey's answers as lines to read; none for any other run."""
    if not isinstance(getattr(run.federation, "learner", None), Questions):
        return []
    return [f"{name}: {_words(answer)}" for name, answer in answers(run).items()]


def _words(answer: Any) -> str:
    """An answer with what the noise may have added: two standard deviations.

    >>> _words({0: Estimate(10.4, 1.0), 1: Estimate(3.0, 1.0)})
    '0 10.4 ± 2, 1 3 ± 2'
    """
    if isinstance(answer, Estimate):
        return f"{answer.value:.4g} ± {2 * answer.deviation:.2g}"
    if isinstance(answer, dict):
        return ", ".join(f"{key:g} {_words(value)}" for key, value in answer.items())
    return ", ".join(map(_words, answer)) if isinstance(answer, list) else f"{answer:.4g}"


@dataclass(frozen=True, kw_only=True)
class RecordBound(Transform):
    """Says that one record moves a client's update by at most ``norm``: true of a survey's sums, and of no training."""

    norm: float

    bounds_records = True
    shows_nonfinite = True

    def norm_bound(self, incoming: float, settings: Settings) -> float:
        """One record's."""
        return self.norm


@dataclass(frozen=True)
class Questions:
    """The statistics as a learner: its parameters are the sums, its model the answers."""

    statistics: tuple[Statistic, ...]
    per_client: bool = False

    needs_rate = False
    reports_loss = False
    batches_clients = True

    @property
    def norm(self) -> float:
        """The L2 norm that all of one record's vectors together cannot exceed."""
        return math.hypot(*(statistic.norm for statistic in self.statistics))

    @cached_property
    def layout(self) -> Layout:
        """One tensor a statistic."""
        return Layout.of({statistic.name: np.zeros(statistic.size, np.float32) for statistic in self.statistics})

    @cached_property
    def metrics(self) -> Metrics:
        """None."""
        return Metrics(())

    def initial(self, key: Key) -> Array:
        """Zeros."""
        return np.zeros(self.layout.num_params, np.float32)

    def check(self, dataset: Dataset, client: str) -> None:
        """Raise ``InputError`` for a dataset that lacks a column."""
        try:
            self.sums(dataset)
        except InputError as error:
            raise InputError(f"client {client!r}: {error}") from error

    def sums(self, dataset: Dataset) -> Vector:
        """All statistics of one client: (num_params,)."""
        found = np.concatenate([statistic.sums(dataset) for statistic in self.statistics])
        return found / max(1, len(dataset)) if self.per_client else found

    def evaluate(self, params: Array, datasets: Sequence[Dataset]) -> Array:
        """Nothing is scored: zeros."""
        return np.zeros((len(datasets), self.metrics.size))

    def model(self, params: Array) -> dict[str, Any]:
        """The answers, as if there were no noise; see ``answers`` for how far they may be off."""
        return self.answers(np.asarray(params, np.float64), 0.0)

    def answers(self, params: Vector, deviation: float) -> dict[str, Any]:
        """By statistic, where each sum has noise of this standard deviation."""
        parts = np.split(params, np.cumsum([statistic.size for statistic in self.statistics])[:-1])
        return {s.name: s.answer(part, deviation) for s, part in zip(self.statistics, parts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Tally:
    """The algorithm of a survey: clients send sums, and the model is their total, a mean over rounds."""

    questions: Questions
    wire_dtype = "float64"  # so that rounding of a large sum moves it by nothing that counts
    batch_size = None

    def init(self, params: Array) -> State:
        """Nothing was released."""
        return {"params": params, "num_releases": 0}

    def broadcast(self, state: State) -> Mapping[str, Array]:
        """What was released so far."""
        return {"params": state["params"]}

    def client_update(
        self, received: Mapping[str, Array], fit: Fit, memory: Memory
    ) -> tuple[Updates, Mapping[str, Array]]:
        """Each client's sums: (num_clients, num_params)."""
        size = self.questions.layout.num_params
        rows = [self.questions.sums(dataset) for dataset in fit.datasets] or [np.zeros(size)] * len(fit.clients)
        return fit.updates(np.stack(rows)), {}

    def server_update(self, state: State, mean: Aggregate) -> State:
        """The mean of all releases."""
        number = state["num_releases"] + 1
        before = np.asarray(state["params"], np.float64)
        return {"params": (before + (mean.values - before) / number).astype(np.float32), "num_releases": number}
