"""``NetworkRuntime``: the core's runtime over a coordinator; clients are elsewhere and answer when they can.

Everything that a replay needs is in the store: a slot's plan by hash, its frozen reports, each attempt's secret, and
who could take part. After a restart the same calls give the same answers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Array, Client, Plan, Report, Slot, Updates
from hansa.network.coordinator import Coordinator
from hansa.network.failpoints import fail_point
from hansa.network.messages import write_plan
from hansa.wire import lay_out, plan_parts, unpack_report

_LOOK_AGAIN_S = 1.0  # another process (``hansa revoke``) may change the store

OnWait = Callable[[Slot, Sequence[Client], int], None]


class NetworkRuntime:
    """Where clients run: in processes of their own, behind a coordinator.

    A slot closes when every client asked has answered or was revoked, or ``deadline_s`` after it was opened, and needs
    ``min_clients`` reports (one, for evaluation). ``on_wait(slot, waiting, num_accepted)`` is called now and then.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        deadline_s: float | None = None,
        min_clients: int = 1,
        on_wait: OnWait | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator, self.deadline_s, self.min_clients = coordinator, deadline_s, min_clients
        self.on_wait, self._monotonic = on_wait, monotonic
        self._opened: dict[Slot, float] = {}
        self.weights: dict[Client, float] = {}  # of each client's last update

    def start(self, plan: Plan, clients: Sequence[Client]) -> None:
        """Publish a plan, once. Raises ``RunError`` when another plan was published for this slot before."""
        fail_point("coordinator.plan.made")
        vectors = {name: lay_out(vector) for name, vector in plan.broadcast.items()}
        named = {name: packed.sha256 for name, packed in vectors.items()}
        bodies = {client: write_plan(plan_parts(plan, client)[0], named) for client in clients}
        rounds = self.coordinator.rounds
        if rounds.plan(plan.slot, plan.learn, _plan_hash(bodies)) == "planned":
            fail_point("coordinator.plan.noted")
            self.coordinator.publish(vectors)
            fail_point("coordinator.plan.published")
            rounds.collect(plan.slot, bodies, named)
            fail_point("coordinator.plan.shown")
        self._opened[plan.slot] = self._monotonic()
        self.coordinator.wake()

    def arrivals(self, count: int, refill: Callable[[int], None]) -> Iterator[Report]:
        """Buffered rounds are refused."""
        raise InputError(
            "NetworkRuntime: expected rounds with a cohort, found buffered rounds, which this version runs in "
            "simulation only; use hansa.simulate, or leave the buffer out"
        )

    def reports(self, slot: Slot) -> Iterator[Report]:
        """A slot's frozen set, one report a client, in the order of the plan's cohort; waits until it is closed.

        Raises ``Abandoned`` when too few clients are left.
        """
        self._wait(slot)
        fail_point("coordinator.slot.full")
        self.coordinator.rounds.freeze(slot, self._fewest(slot))
        codec, size = self.coordinator.federation.codec(slot), self.coordinator.size_of(slot)
        for row in self.coordinator.rounds.frozen(slot):
            if row.status == "refused":
                yield Report(slot, (), {}, {row.client: row.reason})
            else:
                body = self.coordinator.updates.get(row.sha256)
                report = unpack_report(body, slot, row.client, codec, size)
                if slot.task == "train" and isinstance(report.payload, Updates):
                    self.weights[row.client] = float(report.payload.weights[0])
                yield report

    def settle(self, slot: Slot, counted: Sequence[Client]) -> None:
        """Tell clients whose update counted, so that they keep or drop their pending memory."""
        fail_point("coordinator.round.aggregated")
        if self.coordinator.rounds.settle(slot, counted):
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
        newest = self.coordinator.released
        mark = [self.coordinator.run, -1 if newest is None else newest.round]
        stored = json.loads(self.coordinator.store.get("population") or b"[[], []]")
        if stored[0] != mark:
            stored = [mark, self.coordinator.registry.present(self.coordinator.run)]
            self.coordinator.store.put("population", json.dumps(stored).encode())
            fail_point("coordinator.population.noted")
        return tuple(stored[1])

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
            here = present()
            if on_wait is not None and len(here) < count:
                on_wait(here)
            return len(here) >= count

        def present() -> list[str]:
            return self.coordinator.registry.present(self.coordinator.run)

        self._until(enough, timeout_s)
        return tuple(present())

    def release(self, number: int, params: Array, constants: Mapping[str, Array]) -> None:
        """Publish the model after round ``number``, whose result is durable by now; forget what only it needed."""
        vectors = {name: lay_out(vector) for name, vector in {"params": params, **constants}.items()}
        self.coordinator.release(number, vectors)

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
        return self.coordinator.rounds.refusals()

    def _wait(self, slot: Slot) -> None:
        """Until everyone has answered, the deadline has passed, or the slot was closed before a restart."""

        def closed() -> bool:
            state, waiting, accepted = self.coordinator.rounds.progress(slot)
            if state == "collecting" and waiting and self.on_wait is not None:
                self.on_wait(slot, waiting, accepted)
            return state != "collecting" or not waiting

        left = None
        if self.deadline_s is not None:
            left = self.deadline_s - (self._monotonic() - self._opened.get(slot, self._monotonic()))
        self._until(closed, left)

    def _until(self, true: Callable[[], bool], timeout_s: float | None) -> None:
        """Wait for something that a request may bring about, at most ``timeout_s``.

        A look at thousands of clients takes a while, so at most a tenth of the time goes into looking.
        """
        end = None if timeout_s is None else self._monotonic() + timeout_s
        with self.coordinator.arrived:
            while True:
                began = time.monotonic()
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
        return 1 if slot.task == "evaluate" else self.min_clients


def _plan_hash(bodies: Mapping[Client, bytes]) -> str:
    """One hash of what every client is sent."""
    digest = hashlib.sha256()
    for client, body in bodies.items():
        digest.update(f"{client} {len(body)} ".encode() + body)
    return digest.hexdigest()
