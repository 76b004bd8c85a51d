"""What one client's part of a plan costs, known before anybody trains: bytes down and up, examples to work through."""

from __future__ import annotations

from typing import Any

import numpy as np

from hansa.core import chain
from hansa.core.key import Key
from hansa.core.protocols import Client, Memory, Plan, Report, Slot, Updates
from hansa.federation import Federation
from hansa.local_training import LocalTraining, local_training
from hansa.wire import pack, pack_report, plan_parts

_COHORT = 100  # clients of a secure sum: one's bytes hardly depend on them
_MANY = 1_000_000  # clients whose number of examples is remembered


def report_bytes(federation: Federation, size: int) -> int:
    """Bytes of one client's update of ``size`` numbers, as the federation's codec packs or its secure sum masks it."""
    settings = tuple(t.settings(t.init(size)) for t in federation.transforms)
    secure: Any = getattr(federation.aggregator, "secure", federation.aggregator)
    if hasattr(secure, "round_bytes"):
        columns = sum(len(getattr(t, "tail_names", ())) for t in federation.transforms)
        fitted = secure.fitted(chain.limits(federation.transforms, settings))
        return int(fitted.round_bytes(federation.sent_size() or size, columns + 1, _COHORT))
    slot, key = Slot(0, 0, "update"), Key.of("size")
    plan = Plan(slot, True, {}, settings, key)
    tail = {"train_loss": np.zeros(1)} if federation.task("train").train_loss else {}
    block = Updates(("",), np.ones((1, size), np.float32), np.ones(1), tail)
    block, _ = chain.encode(federation.transforms, block, plan, Memory([{}]), [key])
    return len(pack_report(Report(slot, ("",), block), federation.codec(slot)))


def metric_bytes(federation: Federation) -> int:
    """The most bytes of one client's sums of metrics, as they are packed or as a secure sum masks them."""
    size, aggregator = federation.learner.metrics.size, federation.task("evaluate").aggregator
    if hasattr(aggregator, "round_bytes"):
        return int(aggregator.round_bytes(size, 0, _COHORT))
    return len(pack({"values": np.zeros((1, size))}))


def plan_bytes(plan: Plan, client: Client) -> int:
    """What a client downloads: the plan's body, and every vector of its broadcast (as if it held none of them)."""
    named = {name: "0" * 64 for name in plan.broadcast}
    vectors = sum(int(np.asarray(vector).nbytes) for vector in plan.broadcast.values())
    return len(pack({**plan_parts(plan, client)[0], "broadcast": named})) + vectors


def examples_of(local: LocalTraining, num_examples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Examples that clients work through in a round, repeats included: (num_clients,) float64."""
    if local.steps is None:
        return num_examples * float(local.epochs or 1)
    batch = num_examples if local.batch_size is None else np.minimum(num_examples, local.batch_size)
    return batch * float(local.steps)


class Work:
    """How many examples each client works through in a round; a client's data are loaded once, to be counted."""

    def __init__(self, federation: Federation, load: Any) -> None:
        self._algorithm, self._load = federation.algorithm, load
        self._known: dict[Client, int] = {}
        flat = getattr(load, "flat", None)  # of a ``Source``: then nothing need be loaded
        self._sizes = None if flat is None else flat.sizes

    def __call__(self, clients: tuple[Client, ...], round_number: int) -> np.ndarray[Any, Any]:
        """(num_clients,) float64."""
        sizes = np.array([self._size(client) for client in clients], dtype=np.int64)
        if getattr(self._algorithm, "client_learning_rate", None) is None:  # an algorithm that asks fit for no steps
            return sizes.astype(np.float64)
        return examples_of(local_training(self._algorithm, round_number), sizes)

    def _size(self, client: Client) -> int:
        if self._sizes is not None:
            return int(self._sizes[self._load.position(client)])
        size = self._known.get(client)
        if size is None:
            size = len(self._load(client)[0])
            if len(self._known) >= _MANY:
                self._known.clear()
            self._known[client] = size
        return size
