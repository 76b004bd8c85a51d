"""``Federation``: what is learned and how updates travel, as one value; and the client's half of any task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import numpy as np

from hansa.aggregators.mean import Mean
from hansa.aggregators.rows import Rows
from hansa.core import chain
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key, Streams
from hansa.core.protocols import (
    Aggregator,
    Array,
    Client,
    Codec,
    Memory,
    Plan,
    Remembered,
    Report,
    Slot,
    UpdateTransform,
)
from hansa.core.round import client_round
from hansa.core.tasks import TASKS, Evaluation, Parts, Summation, flat_sums
from hansa.data.dataset import Dataset
from hansa.data.prepare import Preparation
from hansa.local_training import Correction, Fitted, LocalTraining, protects_records
from hansa.unwritten import takes_unwritten
from hansa.wire import Nonzeros
from hansa.work import Work

Pair = tuple[Dataset, Dataset | None]  # training rows, held-out rows


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What is learned (``learner``, ``algorithm``) and how updates travel (``transforms``, ``aggregator``).

    ``prepare`` holds preparations whose pooled sums are found once, before round 0. Where clients run is not part of
    it: the same value runs in a simulation and over the network.

    >>> import hansa
    >>> federation = Federation(
    ...     learner=hansa.LinearLearner(num_features=3, num_classes=2),
    ...     algorithm=hansa.FedAvg(client_learning_rate=0.1),
    ...     transforms=(hansa.Quantize(bits=8),),
    ... )
    >>> federation.update_size(), federation.is_private
    (4, False)
    """

    learner: Any
    algorithm: Any
    prepare: tuple[Preparation, ...] = ()
    transforms: tuple[UpdateTransform, ...] = ()
    aggregator: Aggregator = field(default_factory=Mean)

    def __post_init__(self) -> None:
        for name in ("prepare", "transforms"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                raise InputError(f"Federation({name}=): expected a tuple, found {value!r}; write {name}=({value!r},)")
        for part in (self.learner, self.algorithm, self.aggregator, *self.prepare, *self.transforms):
            if isinstance(part, type):
                raise InputError(
                    f"Federation: expected values, found the class {part.__name__}; write {part.__name__}(...)"
                )
        for name in ("init", "broadcast", "client_update", "server_update"):
            if not callable(getattr(self.algorithm, name, None)):
                kind = type(self.algorithm).__name__
                raise InputError(
                    f"Federation(algorithm=): expected a value with {name}(), found {kind}; add the method"
                )

    @property
    def is_private(self) -> bool:
        """Whether the server may see nothing of a client but what the chain and the aggregator let through."""
        noisy = any(getattr(transform, "adds_noise", False) for transform in self.transforms)
        noisy = noisy or self.is_locally_private or self.adds_distributed_noise
        return noisy or not getattr(self.aggregator, "reveals_rows", True)

    @property
    def sends_metrics(self) -> bool:
        """Whether losses and metrics may leave clients beside updates, under the same masks if there are any.

        Not beside noise, which would protect nothing.
        """
        noisy = any(getattr(transform, "adds_noise", False) for transform in self.transforms)
        return not (noisy or self.is_locally_private or self.adds_distributed_noise)

    @property
    def is_locally_private(self) -> bool:
        """Whether clients add noise themselves: to their updates, or to the gradients of their records."""
        noisy = any(getattr(transform, "adds_local_noise", False) for transform in self.transforms)
        return noisy or protects_records(getattr(self.algorithm, "client_optimizer", None))

    @property
    def adds_distributed_noise(self) -> bool:
        """Whether clients add shares of the noise that a sum of many updates is to have."""
        return any(getattr(transform, "adds_distributed_noise", False) for transform in self.transforms)

    def task(self, name: str, number: int = 0) -> Parts:
        """The parts of a task; ``number`` says which preparation."""
        if name not in TASKS:
            raise InputError(f"task: expected one of {TASKS}, found {name!r}")
        if name == "train":
            losses = self.sends_metrics and getattr(self.learner, "reports_loss", True)
            dtype = getattr(self.algorithm, "wire_dtype", "float32")
            return Parts(self.algorithm, self.transforms, self.aggregator, dtype, train_loss=losses)
        if name == "evaluate":
            return Parts(Evaluation(trained=self.algorithm), (), self._sums(Rows()), "float64", must_be_finite=False)
        return Parts(Summation(statistic=self.prepare[number]), (), self._sums(Mean()), "float64")

    def parts(self, slot: Slot) -> Parts:
        """The parts that a slot's task asks for."""
        if slot.task == "prepare" and not 0 <= slot.round < len(self.prepare):
            raise InputError(f"plan: expected preparation 0 to {len(self.prepare) - 1}, found {slot.round}")
        return self.task(slot.task, slot.round if slot.task == "prepare" else 0)

    def codec(self, slot: Slot) -> Codec:
        """How the updates of a slot's task are packed."""
        return chain.codec(self.transforms) if slot.task == "train" else Nonzeros()

    def size_of(self, slot: Slot) -> int | None:
        """Length of the row that a client answers a slot with; None where only the clients' data can tell."""
        if slot.task == "evaluate":
            size: int = self.learner.metrics.size
            return size
        return self.sent_size() if slot.task == "train" else None

    def sent_size(self) -> int | None:
        """Length of the row that a client sends: its update's, unless a transform has an ``encoded_size``."""
        size = self.update_size()
        for shorten in (getattr(transform, "encoded_size", None) for transform in self.transforms):
            size = size if size is None or shorten is None else shorten(size)
        return size

    def update_size(self) -> int | None:
        """Length of one client's update, found by asking the algorithm for one; None where it needs real data."""
        parts, params = self.task("train"), np.zeros(self.learner.layout.num_params, np.float32)
        received = parts.algorithm.broadcast(parts.algorithm.init(params))
        try:
            updates, _ = parts.algorithm.client_update(received, Idle(self.algorithm), Memory([{}]))
        except Exception:  # a user's own algorithm may need real data: then the length is learned from the reports
            return None
        return int(updates.values.shape[1])

    def prepared(self, dataset: Dataset, totals: Sequence[Array]) -> Dataset:
        """``dataset`` after the preparations whose pooled sums are known."""
        for preparation, total in zip(self.prepare, totals, strict=False):
            dataset = preparation.apply(dataset, named_totals(preparation, dataset, total))
        return dataset

    def check_data(self, pair: Pair, client: Client, *, prepared: bool = False) -> None:
        """Raise ``InputError`` for a client's rows that the learner cannot use: features, labels, missing values.

        Before the preparations are known, cells that they may fill count as filled; a preparation that may change the
        shape of rows (without ``keeps_shape``) puts the check off.
        """
        if not prepared and not all(getattr(preparation, "keeps_shape", False) for preparation in self.prepare):
            return
        for rows in pair:
            if rows is not None and len(rows):
                fills = any(getattr(preparation, "fills_missing", False) for preparation in self.prepare)
                if fills and not prepared and isinstance(rows.x, np.ndarray):
                    rows = rows.replace(x=np.nan_to_num(rows.x))
                self.learner.check(rows, client)

    def exchange(
        self,
        plan: Plan,
        clients: tuple[Client, ...],
        rows: Sequence[Dataset],
        memory: Memory,
        scratch: Mapping[Client, Any],
        secret: Sequence[Key],
        look_at_values: bool = True,
    ) -> tuple[Report, Remembered, Mapping[Client, Any]]:
        """The client's half of a plan for a block of clients: report, new memory, scratch.

        ``rows`` are each client's prepared rows: those held out where the task is to evaluate, else the others.
        """
        scored = plan.slot.task == "evaluate"
        if self.is_locally_private or self.adds_distributed_noise:
            self._check_local(plan.slot)
        parts = self.parts(plan.slot)._replace(look_at_values=look_at_values)
        work = Work(
            self.learner,
            self.algorithm,
            clients,
            () if scored else rows,
            rows if scored else (),
            plan.variants.get(clients[0]),
            plan.slot.round,
            Streams(clients, lambda client: plan.key.child("local", client)),
            Streams(secret, methodcaller("child", "local")),
            adds_up=not look_at_values and not parts.transforms and _passes_rows_on(parts),
        )
        return client_round(parts, plan, work, memory, scratch, secret)

    def _check_local(self, slot: Slot) -> None:
        """Refuse, at the client, what its own noise does not cover: exact sums, and rounds that it is not sized for."""
        if slot.task != "train":
            raise CheckError(
                [f"{slot.task}: the server asks for exact sums, which this client's noise does not cover."]
            )
        for part in (*self.transforms, getattr(self.algorithm, "client_optimizer", None)):
            planned = getattr(part, "num_rounds", None)
            if planned is not None and slot.round >= planned:
                raise CheckError([f"this client's noise is sized for {planned} rounds, and the server asks for more."])

    def _sums(self, visible: Aggregator) -> Aggregator:
        """The aggregator of sums: ``visible`` where the server sees rows anyway, else the federation's own."""
        if getattr(self.aggregator, "reveals_rows", True):
            return visible
        of_sums = getattr(self.aggregator, "of_sums", None)
        return self.aggregator if of_sums is None else of_sums()


def _passes_rows_on(parts: Parts) -> bool:
    """Whether a client's change goes from the learner into the sum without anybody looking at it."""
    methods = parts.algorithm.client_update, getattr(parts.aggregator, "fold", None)
    return all(map(takes_unwritten, methods))


def named_totals(preparation: Preparation, dataset: Dataset, total: Array) -> dict[str, Array]:
    """A flat total as named arrays; their shapes are those of the sums of any dataset of that form.

    Raises ``InputError`` when the dataset has another number of features than the totals were taken from.
    """
    shapes = {name: np.shape(value) for name, value in preparation.sums(dataset.take([])).items()}
    expected = sum(int(np.prod(shape)) for shape in shapes.values())
    if expected != len(total):
        raise InputError(
            f"{type(preparation).__name__}: expected data of {len(total)} pooled sums, found data of {expected}; "
            "every client needs the same features in the same order"
        )
    named, start = {}, 0
    for name in sorted(shapes):
        size = int(np.prod(shapes[name]))
        named[name] = np.asarray(total[start : start + size]).reshape(shapes[name])
        start += size
    return named


def totals_of(broadcast: Mapping[str, Array]) -> list[Array]:
    """The pooled sums that a plan carries, in order."""
    return [broadcast[f"prepare.{i}"] for i in range(len([n for n in broadcast if n.startswith("prepare.")]))]


def array_hash(array: Array) -> str:
    """SHA-256 of an array's bytes, in hex."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


class Idle(Work):
    """A ``fit`` that trains nothing, to learn the shape of an update and what the algorithm asks for."""

    def __init__(self, algorithm: Any) -> None:
        super().__init__(None, algorithm, ("",), ())
        self.asked: set[str] = set()  # the corrections that the algorithm wants

    def train(
        self, params: Array, local: LocalTraining, correction: Correction | None = None, *, change: bool = False
    ) -> Array:
        """The parameters as they came, or no change."""
        one = np.ones(1, np.int64)
        self.asked |= set() if correction is None else correction.terms
        block = self.block(params)  # zeros that nobody reads or writes take no memory
        given = np.zeros(block.shape, block.dtype) if change else block.copy()
        self._fitted = Fitted(given, one, one, np.zeros(1))
        return self._fitted.params

    @property
    def num_examples(self) -> Array:
        """One example."""
        return np.ones(1, np.int64)


__all__ = ["Federation", "Pair", "array_hash", "flat_sums", "named_totals", "totals_of"]
