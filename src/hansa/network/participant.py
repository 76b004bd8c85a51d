"""A client's half of every plan, without sockets: settle what is past, answer what is asked, commit before speaking."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hansa.core.chain import Raw
from hansa.core.errors import HansaError, InputError, ProtocolError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Plan, Report, Slot
from hansa.data.dataset import Dataset
from hansa.federation import Federation, Pair, array_hash, totals_of
from hansa.network.budget import Budget, Overspent
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import fail_point
from hansa.network.messages import LASTING, ClientPlan, Released, Work, read_plan
from hansa.network.outbox import Parcel
from hansa.network.pricing import Price, priced
from hansa.network.record import Broken
from hansa.network.released import keep_model
from hansa.secagg.steps import step_in
from hansa.tensors import Buffer
from hansa.wire import pack_report, report_tree, unpack

Fetch = Callable[[str], Buffer]  # SHA-256 -> the blob's content
KINDS = {"train": "update", "evaluate": "metrics", "prepare": "statistics"}
UNPROTECTED = "none: the server sees this update"
REFUSAL = "none: it holds a reason and no data"


def in_the_clear(federation: Federation, slot: Slot) -> str:
    """How a report is protected from the server's eyes, as ``sent.csv`` says it."""
    aggregator = federation.parts(slot).aggregator
    if hasattr(aggregator, "protection"):
        return str(aggregator.protection(slot.exchange))
    if not getattr(aggregator, "reveals_rows", True):
        return f"{type(aggregator).__name__}: the server sees the sum only"
    if federation.is_locally_private:
        return "noise of this client's own: the server sees the noisy update"
    return UNPROTECTED if slot.task == "train" else "none: the server sees these sums"


class Participant:
    """One client of one federation. ``load`` gives its own rows and is called at the start of every round.

    With a ``budget`` nothing is made from the rows that it has no room for, and nothing leaves before it is paid. An
    aggregator whose clients sign for each other does nothing without ``credentials`` (``credentials.py``).
    """

    def __init__(
        self,
        federation: Federation,
        name: str,
        load: Callable[[], Pair],
        store: ClientStore,
        *,
        protection: Callable[[Federation, Slot], str] = in_the_clear,
        on_problem: Callable[[Exception], None] | None = None,
        app: tuple[str, bytes] | None = None,
        budget: Budget | None = None,
        credentials: Any | None = None,
    ) -> None:
        self.federation, self.name, self.load, self.store = signing(federation, credentials), name, load, store
        self.budget = budget
        self.app = app  # fingerprint and source, kept beside each released model
        self.protection, self.on_problem = protection, on_problem
        self._raw: tuple[Any, Pair] | None = None
        self._prepared: tuple[Any, Pair] | None = None

    def settle(self, work: Work) -> None:
        """Apply the settlements of a message; they come before its plan."""
        self.store.enter(work.run)
        self.store.settle(work.settlements)

    def handle(self, work: Work, fetch: Fetch) -> tuple[Slot, Parcel] | None:
        """The report on a message's plan, as it is to be sent; None without a plan. Asked again: the same bytes.

        What goes wrong at this client becomes a report with a refusal; ``on_problem`` hears all of it, the server only
        what holds nothing of the data.
        """
        self.settle(work)
        if work.plan is None:
            return None
        asked = read_plan(work.plan)
        made = self.store.outbox(work.run, asked.slot)
        return asked.slot, self._answer(work.run, asked, fetch) if made is None else made

    def keep(self, released: Released, fetch: Fetch) -> None:
        """Keep the newest released model as a run directory at ``STATE/model``, replaced by one rename."""
        vectors = {name: unpack(fetch(sha256)) for name, sha256 in released.vectors.items()}
        size = self.federation.learner.layout.num_params
        if (
            not all(getattr(vector, "ndim", None) == 1 for vector in vectors.values())
            or len(vectors.get("params", ())) < size
        ):
            raise ProtocolError(
                f"release: expected vectors, and {size} parameters; found others; do not trust this server"
            )
        keep_model(self.store.folder, released, self.federation.learner.layout, vectors, self.app)

    def refuse(self, work: Work, reason: str) -> tuple[Slot, Parcel]:
        """A report that refuses a message's plan, without looking at any data."""
        assert work.plan is not None
        slot = read_plan(work.plan).slot
        made = Parcel.of(pack_report(Report(slot, (), {}, {self.name: reason}), Raw()))
        self._list(work.run, slot, "refusal", made)
        return slot, made

    def _answer(self, run: str, asked: ClientPlan, fetch: Fetch) -> Parcel:
        """Work on a plan, and commit what comes of it."""
        try:
            price = self._afford(run, asked)
        except HansaError as error:  # before a vector is downloaded: to be asked costs next to nothing
            return self._commit_refusal(run, asked.slot, error)
        wanted = asked.vectors if asked.learn else {}  # an answer without learning is quick
        plan = asked.plan(self.name, {name: unpack(fetch(sha)) for name, sha in wanted.items()})
        secret = Key(self.store.secret(run, plan.slot))
        try:
            codec = self.federation.codec(plan.slot)
            self._check_size(plan)
            report, new, kept = self._exchange(run, plan, secret)
            report = self._guarded(report)
            held = self.store.memory(run)
            memory = {**held, **{name: rows[0] for name, rows in new.arrays.items()}} if new.clients else None
            scratch = kept.get(self.name)
            made = self.store.pack(report_tree(report, codec))
            kind = "refusal" if report.refused else KINDS.get(plan.slot.task, plan.slot.task) if plan.learn else "mail"
        except Exception as error:  # the user's own code may fail in any way; the round goes on without this client
            return self._commit_refusal(run, plan.slot, error)
        fail_point("client.training.done")
        if price is not None and kind != "refusal":
            assert self.budget is not None
            try:
                self.budget.spend(run, plan.slot, made.sha256, price)
            except HansaError as error:
                return self._commit_refusal(run, plan.slot, error)
        self._list(run, plan.slot, kind, made)
        fail_point("client.report.listed")
        self.store.commit(
            run, plan.slot, made, memory, scratch, is_last=step_in(plan.slot.exchange) == self._exchanges[-1]
        )
        return made

    @property
    def is_amid(self) -> bool:
        """Whether an attempt is under way whose later exchanges want the key that its first one was signed with."""
        slot = self.store.unsettled()
        return slot is not None and step_in(slot.exchange) in self._exchanges[:-1]

    @property
    def _exchanges(self) -> tuple[str, ...]:
        """Those of the aggregator, where it has several."""
        found: tuple[str, ...] = getattr(self.federation.aggregator, "exchanges", ("",))
        return found

    def _guarded(self, report: Report) -> Report:
        """A report whose refusal tells the server no more than it may know; the owner hears all of it."""
        aggregator, reason = self.federation.aggregator, report.refused.get(self.name, "")
        told = aggregator.told(reason) if reason and hasattr(aggregator, "told") else reason
        if told == reason:
            return report
        if self.on_problem:
            self.on_problem(ProtocolError(reason))
        return report._replace(refused={self.name: told})

    def _afford(self, run: str, asked: ClientPlan) -> Price | None:
        """What an answer costs, where there is a budget, and it has room; an answer without learning costs nothing.

        It is made of what an earlier exchange of the attempt left, which is paid for.
        """
        if self.budget is None or not asked.learn:
            return None
        return self.budget.check(run, asked.slot, priced(self.federation, asked.slot, asked.settings))

    def _commit_refusal(self, run: str, slot: Slot, error: Exception) -> Parcel:
        """A refusal as it is to be sent; the owner hears of all that went wrong."""
        if self.on_problem:
            cause = error.__cause__
            self.on_problem(cause if isinstance(error, _UnfitData) and isinstance(cause, Exception) else error)
        made = Parcel.of(pack_report(Report(slot, (), {}, {self.name: _safe(error)}), Raw()))
        self._list(run, slot, "refusal", made)
        self.store.commit(run, slot, made, None, None)
        return made

    def _check_size(self, plan: Plan) -> None:
        """Parameters of another length than this client's own model are not worked on."""
        size, params = self.federation.learner.layout.num_params, plan.broadcast.get("params")
        if params is not None and getattr(params, "shape", None) != (size,):
            raise ProtocolError(f"plan: expected {size} parameters, found {getattr(params, 'shape', None)}")

    def _list(self, run: str, slot: Slot, kind: str, made: Parcel) -> None:
        """A line in ``sent.csv``, before the report can leave: after a crash it may list more than left, never less."""
        protection = REFUSAL if kind == "refusal" else self.protection(self.federation, slot)
        self.store.list_body(made, run=run, number=slot.round, kind=kind, protection=protection)

    def _exchange(self, run: str, plan: Plan, secret: Key) -> Any:
        """The core's client half, on prepared data."""
        if getattr(self.federation.aggregator, "credentials", True) is None:
            raise Unsigned(type(self.federation.aggregator).__name__)
        held = self.store.scratch(run, plan.slot)
        return self.federation.exchange(
            plan,
            (self.name,),
            [self._rows(run, plan)] if plan.learn else (),
            Memory([self.store.memory(run)]),
            {} if held is None else {self.name: held},
            [secret],
        )

    def _rows(self, run: str, plan: Plan) -> Dataset:
        """What the plan's task is about."""
        train, test = self._data(run, plan)
        if plan.slot.task != "evaluate":
            return train
        return train.take([]) if test is None else test

    def _data(self, run: str, plan: Plan) -> Pair:
        """The client's rows: loaded once a round, prepared once for the pooled sums that the plan carries."""
        here = (run, plan.slot.task == "prepare", plan.slot.round)
        if self._raw is None or self._raw[0] != here:
            self._raw, self._prepared = (here, self.load()), None
        totals = totals_of(plan.broadcast)
        mark = hashlib.sha256("".join(array_hash(total) for total in totals).encode()).hexdigest()
        if self._prepared is None or self._prepared[0] != mark:
            train, test = self._raw[1]
            ready = self.federation.prepared(train, totals)
            ready_test = None if test is None else self.federation.prepared(test, totals)
            if plan.slot.task != "prepare":
                try:
                    self.federation.learner.check(ready, self.name)
                except HansaError as error:
                    raise _UnfitData(_width(ready)) from error
            self._prepared = (mark, (ready, ready_test))
        return self._prepared[1]


class Unsigned(HansaError):
    """A client that cannot sign, where peers need its signature."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"{kind}: expected the identity of an enrolled client to sign with, found none; nothing is sent unsigned; "
            "Participant(credentials=Enrolled(state))"
        )


def signing(federation: Federation, credentials: Any | None) -> Federation:
    """The federation at a client, whose aggregator signs and checks what peers sign, if it is one that does."""
    if credentials is None or not hasattr(federation.aggregator, "enrolled"):
        return federation
    return replace(federation, aggregator=federation.aggregator.enrolled(credentials))


class _UnfitData(InputError):
    """A learner's check failed. Its own sentence may show values; this one only says how wide the rows are."""

    def __init__(self, width: str) -> None:
        super().__init__(f"its data do not fit the learner ({width}); its own log says more")


def _width(dataset: Any) -> str:
    """How many features a row has."""
    shape = getattr(dataset.x, "shape", None)
    return f"{shape[1]} features a row" if shape is not None and len(shape) == 2 else "another form of x"


def _safe(error: Exception) -> str:
    """What the server is told of an error: nothing that could hold a value of the data."""
    if isinstance(error, _UnfitData):
        return str(error)
    if isinstance(error, ProtocolError):
        return "the plan could not be read"
    if isinstance(error, Overspent):
        return error.told
    if isinstance(error, Unsigned):
        return "secure aggregation: it has no identity to sign with"
    if isinstance(error, Broken):
        return LASTING + "its record cannot be trusted"
    return f"an error at the client ({type(error).__name__}); its own log says more"


__all__ = ["Fetch", "Participant", "Unsigned", "in_the_clear", "signing"]
