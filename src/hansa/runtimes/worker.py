"""``Worker``: one part of a cohort does its half of a plan, in this process or in another.

A worker keeps no client's memory: it is handed what clients remember and hands back what they will. What it does keep
is their rows, read and prepared once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from hansa.aggregators.blocks import beside, stacked
from hansa.aggregators.folds import Node, fold_node, tree_of
from hansa.aggregators.sums import FEW_ROWS, Sums, waits
from hansa.core.errors import HansaError, InputError
from hansa.core.key import Key, Streams
from hansa.core.protocols import Array, Client, Memory, Plan, Remembered, Report, Updates
from hansa.core.round import refuse
from hansa.data.block import Block, Shelf
from hansa.data.dataset import Dataset
from hansa.data.flat import FlatRows
from hansa.federation import Federation, Pair, array_hash, totals_of
from hansa.runtimes.blame import blamed
from hansa.runtimes.traffic import Bodies, ReportSizes
from hansa.stopwatch import stage

_NODE_BYTES = 4 * 2**20  # of parameters: what stays in a processor's cache
_WIDEST = 1024


class Part(NamedTuple):
    """Some clients of a cohort that stand side by side, and where."""

    node: Node
    clients: tuple[Client, ...]
    first: int  # position of the node's first place in the cohort
    num_cohort: int


class Done(NamedTuple):
    """What came of a part: reports, and what to keep.

    Where the aggregator adds rows (``Worker.adds_up``), the report is one: a folded row, or rows for ``Sums`` to fold.
    """

    reports: tuple[Report, ...]
    remembered: tuple[Remembered, ...]
    scratch: Mapping[Client, Any]
    bodies: Bodies  # what would have travelled up


class Worker:
    """Does parts of plans with one federation.

    ``load`` gives a client's raw training and held-out rows; without ``keep`` it is asked every time.
    """

    def __init__(self, federation: Federation, load: Callable[[Client], Pair], key: Key, keep: bool) -> None:
        self.federation = federation
        self._load, self._key, self._keep = load, key, keep
        self._mark: tuple[Any, ...] = ()  # of the preparations that these were made with
        self._pairs: dict[Client, Pair] = {}
        self._shelves: dict[bool, Shelf] = {}
        self._trusts = False
        self._sizes = ReportSizes(federation)

    def run(
        self,
        plan: Plan,
        part: Part,
        places: Mapping[Client, int],
        memory: Callable[[Sequence[Client]], Memory],
        scratch: Mapping[Client, Any],
        width: int,
    ) -> Done:
        """The part's half of the plan, at most ``width`` clients of one variant at a time.

        ``places`` are the cohort's positions; ``memory(clients)`` is what they remember.
        """
        reports, remembered, kept, bodies = list[Report](), list[Remembered](), dict[Client, Any](), Bodies()
        where = (plan.slot.task, plan.slot.round, plan.slot.attempt)
        folds = self.adds_up(plan)
        few = len(part.clients) <= FEW_ROWS and not plan.variants
        hides = any(not getattr(t, "shows_nonfinite", False) for t in self.federation.parts(plan.slot).transforms)
        looks = few or not folds or hides
        with stage("client"):
            for block in blocks_of(plan, part.clients, width):
                mine = {client: scratch[client] for client in block if client in scratch} if scratch else {}
                secret = Streams(block, lambda client: self._key.child("client", client, *where))
                report, new, more = self._exchange(plan, block, memory(block), mine, secret, looks)
                reports.append(report)
                remembered.append(new)
                kept.update(more)
        row: Updates | None = None
        if folds:
            with stage("folding"):
                row = _waiting(reports) if few else None
                row = row or self._fold(plan, part, places, reports)
                if row is not None and row.folded and not np.isfinite(row.values).all():  # then somebody's row is not
                    parts = self.federation.parts(plan.slot)
                    pairs = [
                        refuse(parts, *pair) if pair[0].clients else pair
                        for pair in zip(reports, remembered, strict=True)
                    ]
                    reports, remembered = [report for report, _ in pairs], [new for _, new in pairs]
                    row = self._fold(plan, part, places, reports)
        with stage("plan"):
            for report in reports:
                bodies.add(self._sizes.bodies(plan, report, part.num_cohort))
        if folds:
            refused = {client: reason for report in reports for client, reason in report.refused.items()}
            reports = [Report(plan.slot, () if row is None else row.clients, row or {}, refused)]
        return Done(tuple(reports), tuple(new for new in remembered if new.clients), kept, bodies)

    def _exchange(
        self,
        plan: Plan,
        block: tuple[Client, ...],
        memory: Memory,
        scratch: Mapping[Client, Any],
        secret: Sequence[Key],
        looks: bool,
    ) -> tuple[Report, Remembered, Mapping[Client, Any]]:
        """One block's half of the plan; what a user's code raises there comes with the name of the client."""
        try:
            with stage("rows"):
                rows = self.rows(plan, block)
            return self.federation.exchange(plan, block, rows, memory, scratch, secret, looks)
        except HansaError:
            raise
        except Exception as error:

            def alone(client: Client) -> object:
                one, own = (client,), [secret[block.index(client)]]
                return self.federation.exchange(plan, one, self.rows(plan, one), Memory([{}]), scratch, own, looks)

            raise blamed(error, plan.slot, block, alone) from error

    def rows(self, plan: Plan, block: Sequence[Client]) -> Sequence[Dataset]:
        """What the plan's task is about: held-out rows to evaluate, else training rows; prepared as the plan says."""
        totals = totals_of(plan.broadcast)
        mark = (plan.slot.task == "prepare", *(array_hash(total) for total in totals))
        if mark != self._mark:
            self._mark, self._pairs, self._shelves = mark, {}, {}
        held_out = plan.slot.task == "evaluate"

        def load(client: Client) -> Dataset:
            train, test = self._pair(client, plan, totals)
            return (train.take([]) if test is None else test) if held_out else train

        read = getattr(self.federation.learner, "columns", None)
        if read is None or plan.slot.task == "prepare":
            return [load(client) for client in block]
        if not self._keep:
            datasets = [load(client) for client in block]
            return Block.of(datasets, read) or datasets
        if held_out not in self._shelves:
            self._shelves[held_out] = Shelf(read) if held_out else self._shelf(read, load, totals)
        return self._shelves[held_out].block(block, load)

    def _shelf(self, read: Any, load: Callable[[Client], Dataset], totals: Sequence[Array]) -> Shelf:
        """A shelf for training rows, filled ahead with the clients whose rows are in memory anyway."""
        flat: FlatRows | None = getattr(self._load, "flat", None)
        if flat is not None:
            ready = replace(flat, dataset=self.federation.prepared(flat.dataset, totals))
            if self._fits(ready.dataset):
                return Shelf.over(ready, read, self._load.position)  # type: ignore[attr-defined]  # has flat, so this
        shelf, ahead = Shelf(read), getattr(self._load, "in_memory", ())
        self._trusts = True  # look at all of them at once
        try:
            everything = shelf.fill(ahead, load)
        finally:
            self._trusts = False
        if everything is not None and self._fits(everything):
            return shelf
        return Shelf(read)  # one client's rows do not fit: it is named when it takes part

    def _fits(self, dataset: Dataset) -> bool:
        """Whether the learner takes these rows, of whichever client."""
        try:
            self.federation.check_data((dataset, None), "", prepared=True)
        except InputError:
            return False
        return True

    def _pair(self, client: Client, plan: Plan, totals: Sequence[Array]) -> Pair:
        """One client's rows, read and prepared once."""
        known = self._pairs.get(client)
        if known is None:
            train, test = self._load(client)
            train = self.federation.prepared(train, totals)
            test = None if test is None else self.federation.prepared(test, totals)
            if plan.slot.task != "prepare" and not self._trusts:
                self.federation.check_data((train, test), client, prepared=True)
            known = (train, test)
            if self._keep and not self._trusts:
                self._pairs[client] = known
        return known

    def adds_up(self, plan: Plan) -> bool:
        """Whether all that the plan's aggregator needs of rows is their weighted sum."""
        aggregator = self.federation.parts(plan.slot).aggregator
        return bool(aggregator.linear and hasattr(aggregator, "fold"))

    def sums(self, plan: Plan, num_cohort: int, places: Mapping[Client, int]) -> Sums:
        """Where the sums of the plan's parts are put together."""
        tree, aggregator = tree_of(num_cohort), self.federation.parts(plan.slot).aggregator

        def fold_rows(node: Node, rows: Updates) -> Updates:
            folded = fold_node(tree, node, rows, places, aggregator)
            assert folded is not None
            return folded

        return Sums(fold_rows)

    def _fold(self, plan: Plan, part: Part, places: Mapping[Client, int], reports: Sequence[Report]) -> Updates | None:
        """All rows of a part as one; None where there are none."""
        present = [report for report in reports if report.clients]
        if not present:
            return None
        rows: Updates = present[0].payload
        if len(reports) > 1:
            rows = stacked(sorted((c for report in present for c in report.clients), key=places.__getitem__), present)
        return fold_node(tree_of(part.num_cohort), part.node, rows, places, self.federation.parts(plan.slot).aggregator)


def _waiting(reports: Sequence[Report]) -> Updates | None:
    """A few rows side by side, where it is better that they wait to be folded; None where it is not."""
    present = [report.payload for report in reports if report.clients]
    return reduce(beside, present) if present and all(map(waits, present)) else None


def parts_of(cohort: Sequence[Client], clients: Sequence[Client], width: int) -> list[Part]:
    """``clients``, who are some of ``cohort`` in its order, by the nodes of the cohort's tree, about ``width`` each."""
    tree, everyone = tree_of(len(cohort)), len(clients) == len(cohort)
    asked = frozenset() if everyone else frozenset(clients)
    found = []
    for node in tree.nodes(width):
        first, last = tree.span(node)
        here = tuple(cohort[first:last])
        here = here if everyone else tuple(client for client in here if client in asked)
        found += [Part(node, here, first, len(cohort))] if here else []
    return found


def block_rows(federation: Federation) -> int:
    """Clients in a block: as many as keep a block's parameters in a processor's cache, or as the learner wants."""
    row = 4 * max(1, federation.learner.layout.num_params)
    rows: int = max(1, getattr(federation.learner, "block_bytes", _NODE_BYTES * 5 // 4) // row)
    return min(_WIDEST if getattr(federation.learner, "batches_clients", False) else 16, rows)


def part_rows(federation: Federation, num_cohort: int) -> int:
    """Clients in a part that one of several workers does: some 16 parts a cohort, so that all workers end together.

    A rule of the cohort and the federation alone, never of the number of workers. Learners that train blocks at once
    get parts of up to 32 clients even where that makes fewer of them, but four.
    """
    rows = -(-num_cohort // 16)
    if getattr(federation.learner, "batches_clients", False):
        rows = max(rows, min(32, -(-num_cohort // 4)))
    return max(1, min(rows, block_rows(federation)))


def blocks_of(plan: Plan, clients: Sequence[Client], width: int) -> Iterator[tuple[Client, ...]]:
    """Clients of one variant at a time, at most ``width`` together."""
    for start in range(0, len(clients), width):
        group = tuple(clients[start : start + width])
        if not plan.variants:
            yield group
            continue
        for variant in list(dict.fromkeys(repr(plan.variants.get(client)) for client in group)):
            yield tuple(client for client in group if repr(plan.variants.get(client)) == variant)
