"""``NetworkRuntime``: the core's runtime over a coordinator; clients are elsewhere and answer when they can.

Everything that a replay needs is in the store: a slot's plan by hash, its frozen reports or those that a buffer holds,
each attempt's secret, and who could take part. After a restart the same calls give the same answers.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from hansa import pace
from hansa.core.errors import Abandoned, ProtocolError
from hansa.core.key import Key
from hansa.core.protocols import Array, Client, Plan, Report, Slot, Updates
from hansa.long_vectors import keep_as_read
from hansa.network import lasting
from hansa.network.buffers import Buffers, Patience
from hansa.network.coordinator import Coordinator
from hansa.network.failpoints import fail_point
from hansa.network.forgetting import of_attempt
from hansa.network.messages import write_plan
from hansa.network.past import Past
from hansa.network.plans import OpenPlans, plan_hash
from hansa.network.rounds import Terms
from hansa.secagg.steps import buffer_of
from hansa.wire import lay_out, plan_parts, unpack_report

_LOOK_AGAIN_S = 1.0  # another process (``hansa revoke``) may change the store
_NOTE_AGAIN_S, _NOTED_SHARE = 1.0, 0.1  # how long a slot has been open is noted with every tenth of its time
_PATIENCE = 2.0  # a seat of a buffered round is given to another after so many deadlines

_LOG = logging.getLogger("hansa")
OnWait = Callable[[Slot, Sequence[Client], int], None]


class NetworkRuntime:
    """Where clients run: in processes of their own, behind a coordinator.

    A slot closes when every client asked has answered or was revoked, or ``deadline_s`` after it was opened, and needs
    ``min_clients`` reports (one, for evaluation and once clients have learned). One in which clients train closes with
    ``goal_clients`` reports too.
    ``deadline_s="auto"`` learns how long to wait from what clients took before.

    In buffered rounds ``concurrency`` clients are at work at any moment, ``filling`` is the newest slot, and plans of
    rounds before ``oldest_round`` count no more. A client that takes very long loses its seat to another at once, and
    its plan with the next round. ``on_wait(slot, waiting, num_accepted)`` is called now and then.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        deadline_s: float | Literal["auto"] | None = None,
        min_clients: int = 1,
        on_wait: OnWait | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator, self.deadline_s, self.min_clients = coordinator, deadline_s, min_clients
        self.goal_clients: int | None = None
        self.concurrency, self.oldest_round = 0, 0
        self.filling: Slot | None = None
        self.on_wait, self._monotonic = on_wait, monotonic
        coordinator.rounds.times.monotonic = monotonic
        self.buffers = Buffers(coordinator.rounds)
        self.past = Past(coordinator.store, coordinator.run)
        self.plans: Mapping[Slot, Plan] = OpenPlans(self.buffers, coordinator.federation.algorithm)
        self.weights: dict[Client, float] = {}  # of each client's last update
        self._lost_s: dict[Client, float] = {}  # when a client was waited for no more
        self._askable: set[Client] | None = None  # while seats are being filled
        self._learned: Slot | None = None  # the newest in which clients learn
        self._shown: tuple[Slot | None, dict[str, str]] = None, {}  # the newest slot's vectors, by SHA-256

    def start(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Publish a plan, once; in buffered rounds more clients may be shown it later.

        Raises ``RunError`` when another plan was published for this slot before.
        """
        fail_point("coordinator.plan.made")
        if plan.slot == self.filling:
            self._start_some(plan, clients)
        else:
            self._start_all(plan, clients)
        self.coordinator.wake()

    def reports(self, slot: Slot) -> Iterator[Report]:
        """A slot's frozen set, one report a client, in the order of the plan's cohort; waits until it is closed.

        Raises ``Abandoned`` when too few clients are left, or when the disk has damaged a report: then the clients are
        asked once more.
        """
        self._wait(slot)
        fail_point("coordinator.slot.full")
        self.coordinator.rounds.freeze(slot, self._fewest(slot))
        for row in self.coordinator.rounds.frozen(slot):
            try:
                report = self._report(slot, row)
            except (ProtocolError, KeyError) as error:
                problem = f"{slot.task} round {slot.round}: the report of {row.client} is damaged or gone ({error})"
                _LOG.error("%s; nothing of this attempt counts, its clients are asked again", problem)
                raise Abandoned(problem, may_heal=True) from error
            yield report

    def arrivals(self, count: int, refill: Callable[[int], None]) -> Iterator[Report]:
        """The next ``count`` clients' reports as they arrive, whatever plan they answer; the same after a restart.

        ``refill(n)`` starts ``n`` more clients, as soon as so many seats are free; whoever reports last is replaced
        after the server's step, with the new model. A client's refusal takes its place. Waits for as long as it takes.
        """
        assert self.filling is not None, "the loop names the newest slot before it waits for a buffer"
        buffer, buffers, patience = self.filling, self.buffers, self._patience(self.filling)
        buffers.begin()
        lost = buffers.tidy(buffer, self.oldest_round, patience.is_lost)
        self._lost_s |= dict.fromkeys(lost, self._monotonic())
        while True:
            arrived = buffers.num_arrived()  # counted before the look, so that none is missed
            if (held := buffers.fill(buffer, count)) is not None:
                break
            if (free := self.concurrency - patience.seats(buffers.at_work())) > 0:
                self._askable = self._who_can_be_asked()
                refill(free)
                self._askable = None
            self._wait_for_change(buffer, arrived, patience)
        for slot, row in held:
            yield self._report(slot, row)

    def settle(self, slot: Slot, counted: Sequence[Client]) -> None:
        """Tell clients whose update counted, so that they keep or drop their pending memory.

        In buffered rounds those that answered this slot in the last buffer. What was sent to an abandoned attempt is
        removed: there may be many of them before one succeeds.
        """
        fail_point("coordinator.round.aggregated")
        if self.filling is not None and slot.task == "train":
            told = self.buffers.settle(self.filling, slot, counted)
        else:
            told = self.coordinator.rounds.settle(slot, counted)
            if not counted:
                self._drop(slot)
        if told:
            fail_point("coordinator.slot.settled")
            self.coordinator.wake()

    def once(self, name: str, make: Callable[[], bytes]) -> Key:
        """An attempt's secret: durable before it is used, the same after a restart."""
        kept = self.coordinator.rounds.once(name, make())
        fail_point("coordinator.secret.stored")
        return Key(kept)

    def clients(self) -> tuple[Client, ...]:
        """Who could take part in the round at hand: present when it began, and the same after a restart.

        The list is taken anew after each ``release``, so that clients that join enter the next round.
        """
        return tuple(self._of_this_round("population", self.present))

    def present(self) -> list[Client]:
        """Who can be asked now: said hello in this run, was not revoked, and has not refused for good since."""
        resting = lasting.resting(self.coordinator.store, self.coordinator.run)
        return [c for c in self.coordinator.registry.present(self.coordinator.run) if c not in resting]

    def of_attempt(self, attempt: int, clients: Sequence[Client], without: Collection[Client]) -> Sequence[Client]:
        """A round's ``clients``; at a further attempt those that are here by then, ``without`` some.

        The same after a restart.
        """
        if not attempt:
            return clients
        here = self._of_this_round(f"attempt {attempt}", lambda: [c for c in self.present() if c not in without])
        return tuple(here)

    def known(self, clients: Sequence[Client]) -> list[Client]:
        """Whom buffered rounds may draw from: whoever is here, since when does not matter."""
        return self.present()

    def available(self, clients: Sequence[Client]) -> list[bool]:
        """Who could be asked now in a buffered round: here, not at work, and without a report that waits to count.

        A client that was lost is here again once it has asked for work.
        """
        askable = self._who_can_be_asked() if self._askable is None else self._askable
        return [client in askable for client in clients]

    def idle(self, clients: Sequence[Client]) -> tuple[Client, ...]:
        """Those of ``clients`` that were not at work at this moment of the round, also after a restart."""
        at_work = {work.client for work in self.buffers.at_work()}
        return tuple(self._of_this_round("idle", lambda: [c for c in clients if c not in at_work]))

    def over_selection(self) -> float:
        """How many times the goal to ask in the round at hand, learned from those before; also after a restart."""
        newest = self.coordinator.released
        number = 0 if newest is None else newest.round + 1
        learned: float = self._of_this_round("over_selection", lambda: pace.over_selection(self.past.missing(number)))
        return learned

    @property
    def num_late(self) -> int:
        """Updates so far that came too late to count."""
        return self.past.num_late()

    def wait_for_clients(
        self,
        count: int,
        timeout_s: float | None = None,
        on_wait: Callable[[Sequence[Client]], None] | None = None,
    ) -> tuple[Client, ...]:
        """Wait until ``count`` clients have said hello, and name all that have (fewer when ``timeout_s`` passed).

        ``on_wait(present)`` is called now and then.
        """

        def enough() -> bool:
            is_enough = self.past.num_here() >= count  # thousands may be here, and one more every moment
            if on_wait is not None and not is_enough:
                on_wait(self.present())
            return is_enough

        self._until(enough, timeout_s)
        return tuple(self.present())

    def release(self, number: int, params: Array, constants: Mapping[str, Array]) -> None:
        """Publish the model after round ``number``, whose result is durable by now; forget what only it needed."""
        vectors = {name: lay_out(vector) for name, vector in {"params": params, **constants}.items()}
        self.coordinator.release(number, vectors)

    def let_go(self) -> None:
        """Training is over: whoever is still at work on a buffered round's plan is waited for no more."""
        self.buffers.tidy(None, 0, lambda work: True)
        self.coordinator.wake()

    def finish(self, wait_s: float = 10.0) -> tuple[Client, ...]:
        """Tell clients that the run is over; waits a little until they know, and names those that do not yet."""
        self.coordinator.finish()
        run, registry = self.coordinator.run, self.coordinator.registry

        def all_know() -> bool:
            return not registry.present(run, without_goodbye=True)

        self._until(all_know, wait_s)
        return tuple(registry.present(run, without_goodbye=True))

    def traffic(self, number: int) -> tuple[int, int]:
        """Bytes up and down in one round, with its evaluation."""
        return self.coordinator.counts.totals(number)

    def traffic_totals(self) -> tuple[int, int]:
        """Bytes up and down so far."""
        return self.coordinator.counts.totals()

    def bodies(self) -> list[dict[str, Any]]:
        """What was sent and received, by kind and direction."""
        return self.coordinator.counts.bodies()

    def refusals(self) -> list[dict[str, Any]]:
        """Every refusal so far: round, client, reason."""
        return self.past.refusals()

    def _start_all(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Show a plan to its whole cohort."""
        self._learned = plan.slot if plan.learn else self._learned
        vectors = {name: lay_out(vector) for name, vector in plan.broadcast.items()}
        named = {name: packed.sha256 for name, packed in vectors.items()}
        bodies = {client: write_plan(plan_parts(plan, client)[0], named) for client in clients}
        rounds, terms = self.coordinator.rounds, self._terms(plan, clients)
        state = rounds.plan(plan.slot, plan.learn, plan_hash(bodies), terms)
        if state == "planned":
            fail_point("coordinator.plan.noted")
            self.coordinator.check_room(plan, len(clients), vectors)
            self.coordinator.publish(vectors)
            fail_point("coordinator.plan.published")
            rounds.collect(plan.slot, bodies, named)
            fail_point("coordinator.plan.shown")
        elif state == "collecting":
            self.coordinator.publish(vectors)  # after a restart: what the disk damaged meanwhile is replaced

    def _start_some(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Show the newest plan of buffered rounds to some; its vectors are published with the first of them."""
        if self._shown[0] != plan.slot:
            vectors = {name: lay_out(vector) for name, vector in plan.broadcast.items()}
            self.coordinator.check_room(plan, self.concurrency, vectors)
            self._shown = plan.slot, self.coordinator.publish(vectors)
            fail_point("coordinator.buffer.published")
        named = self._shown[1]
        same = write_plan(plan_parts(plan._replace(variants={}), "")[0], named)
        bodies = {client: write_plan(plan_parts(plan, client)[0], named) for client in clients}
        self.buffers.ask(plan.slot, plan_hash({"": same}), bodies, named)

    def _drop(self, slot: Slot) -> None:
        """Remove what was sent to an attempt that is abandoned."""
        where = self.coordinator.run, slot.task, slot.round, slot.attempt
        with self.coordinator.updates.sweeping():
            self.coordinator.updates.drop(of_attempt(self.coordinator.store, *where))

    def _terms(self, plan: Plan, clients: Sequence[Client]) -> Terms:
        """When the slot of a plan closes."""
        goal = self.goal_clients if plan.slot.task == "train" and plan.learn else None
        if self.deadline_s == "auto":
            return Terms(goal, self.past.deadline_s(plan.slot, clients, plan.learn))
        return Terms(goal, self.deadline_s)

    def _wait(self, slot: Slot) -> None:
        """Until enough have answered, the deadline has passed, or the slot was closed before a restart."""
        rounds = self.coordinator.rounds
        deadline_s = rounds.progress(slot).terms.deadline_s

        def closed() -> bool:
            now = rounds.progress(slot)
            if not now.is_over and self.on_wait is not None:
                self.on_wait(slot, now.waiting, now.accepted)
            if deadline_s is not None:
                rounds.note_elapsed(slot, max(_NOTE_AGAIN_S, _NOTED_SHARE * deadline_s))
            return now.is_over

        self._until(closed, None if deadline_s is None else deadline_s - (rounds.times.elapsed_s(str(slot)) or 0.0))

    def _who_can_be_asked(self) -> set[Client]:
        busy = {work.client for work in self.buffers.at_work()} | self.buffers.resting()
        return set(self.present()) - busy - self._lost()

    def _lost(self) -> set[Client]:
        """Who was waited for no more, and has not asked for work since."""
        heard = self.coordinator.heard_s
        return {client for client, when in self._lost_s.items() if heard.get(client, -math.inf) <= when}

    def _patience(self, buffer: Slot) -> Patience:
        """How long clients may be at work, from the times of all and of each."""
        times, recent = self.past.times(buffer, pace.RECENT_KEPT)
        own = {client: _PATIENCE * pace.deadline_s([mine], []) for client, mine in times.items()}
        return Patience(_PATIENCE * pace.deadline_s([], recent), own)

    def _wait_for_change(self, buffer: Slot, arrived: int, patience: Patience) -> None:
        """Until more reports have arrived than ``arrived``, a seat is free, or somebody has come, is back or gone."""
        seats, here, lost = patience.seats(self.buffers.at_work()), self.past.num_here(), self._lost()

        def changed() -> bool:
            at_work = self.buffers.at_work()
            if self.on_wait is not None:
                self.on_wait(buffer, [work.client for work in at_work], arrived)
            self.buffers.note_elapsed(max(_NOTE_AGAIN_S, _NOTED_SHARE * patience.usual_s))
            now = patience.seats(self.buffers.at_work()), self.buffers.num_arrived(), self.past.num_here(), self._lost()
            return now != (seats, arrived, here, lost)

        self._until(changed, None)

    def _report(self, slot: Slot, row: Any) -> Report:
        """A recorded report, as the core wants it."""
        if row.status == "refused":
            return Report(slot, (), {}, {row.client: row.reason})
        body = self.coordinator.updates.get(row.sha256)
        codec, size = self.coordinator.federation.codec(slot), self.coordinator.size_of(slot)
        report = unpack_report(body, slot, row.client, codec, size)
        if isinstance(report.payload, Updates):
            keep_as_read(report.payload.values)
        if slot.task == "train" and isinstance(report.payload, Updates):
            self.weights[row.client] = float(report.payload.weights[0])
        return report

    def _of_this_round(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives the first time it is asked for after a release, also after a restart: plain JSON."""
        newest = self.coordinator.released
        mark = [self.coordinator.run, -1 if newest is None else newest.round]
        stored = json.loads(self.coordinator.store.get(name) or b"[[], null]")
        if stored[0] != mark:
            stored = [mark, make()]
            self.coordinator.store.put(name, json.dumps(stored).encode())
            fail_point("coordinator.population.noted")
        return stored[1]

    def _until(self, true: Callable[[], bool], timeout_s: float | None) -> None:
        """Wait for something that a request may bring about, at most ``timeout_s``.

        Raises ``Superseded`` when another coordinator has taken over: nothing will come of waiting any more. A look at
        thousands of clients takes a while, so at most a tenth of the time goes into looking.
        """
        end = None if timeout_s is None else self._monotonic() + timeout_s
        with self.coordinator.arrived:
            while True:
                began = time.monotonic()
                self.coordinator.store.refuse_superseded()
                if true():
                    return
                rest_until = time.monotonic() + 9 * (time.monotonic() - began)
                left = _LOOK_AGAIN_S if end is None else min(_LOOK_AGAIN_S, end - self._monotonic())
                if left <= 0:
                    return
                self.coordinator.arrived.wait(left)
                while (rest_s := rest_until - time.monotonic()) > 0:
                    self.coordinator.arrived.wait(rest_s)

    def _fewest(self, slot: Slot) -> int:
        """Of clients that have learned the aggregator knows how many it needs; of one slot of a buffer's sum, none."""
        is_after = self._learned is not None and self._learned != slot == self._learned._replace(exchange=slot.exchange)
        if buffer_of(slot.exchange) is not None:
            return 0
        return 1 if slot.task == "evaluate" or is_after else self.min_clients
