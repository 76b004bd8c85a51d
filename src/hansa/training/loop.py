"""The training loop, the same in a simulation and on a coordinator: prepare, then rounds, each scored and recorded.

Everything it needs to go on after a crash is one ``Checkpoint``, saved after the preparations and after every round.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np

from hansa.aggregators.one_exchange import only_exchange
from hansa.core.errors import Abandoned, InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Array, Client, Plan, Runtime, Slot
from hansa.core.round import Context, ServerState, begin, buffered_round, make_plan, server_round
from hansa.data.dataset import Dataset
from hansa.federation import Federation
from hansa.network.failpoints import fail_point
from hansa.network.messages import is_lasting
from hansa.privacy.ledger import Ledger
from hansa.stopwatch import one_round, stage, watching
from hansa.training.asking import choose, whose_turn
from hansa.training.buffered import together
from hansa.training.checkpoint import Checkpoint
from hansa.training.evaluate import Scores, on_clients, on_dataset, some_clients, train_loss
from hansa.training.history import Row
from hansa.training.long_rounds import LongRounds
from hansa.training.privacy import Accounts
from hansa.training.refused import all_refused, why
from hansa.training.schedule import Schedule

_ATTEMPTS, _SUMS = 3, 100  # of a round; of a buffer's sum, which clients may be lost in
_PAUSE_S, _LONGEST_PAUSE_S = 600.0, 48 * 3600.0  # of a simulated clock, until somebody is available


class Site(Runtime, Protocol):
    """A runtime with what the loop records about it."""

    def traffic_totals(self) -> tuple[int, int]:
        """Bytes up and down so far."""
        ...

    def refusals(self) -> list[dict[str, Any]]:
        """Every refusal so far: round, client, reason."""
        ...


class Timed(Site, Protocol):
    """A runtime whose clients take their time (``VirtualTime``, a deployment): what the loop tells and asks it."""

    goal_clients: int | None  # reports that close a round
    deadline_s: float | Literal["auto"] | None
    concurrency: int  # of buffered rounds: clients at work at any moment
    oldest_round: int  # of buffered rounds: older plans count no more
    filling: Slot | None  # of buffered rounds: the newest slot
    plans: Mapping[Slot, Plan]
    num_late: int  # updates so far that came too late to count

    def over_selection(self) -> float:
        """How many times the goal to ask, learned from the rounds before."""
        ...

    def available(self, clients: Sequence[Client]) -> Sequence[bool]:
        """Who could be asked now."""
        ...

    def of_attempt(self, attempt: int, clients: Sequence[Client], without: Collection[Client]) -> Sequence[Client]:
        """A round's ``clients``, at a further attempt in a deployment those that are here by then; ``without`` some."""
        ...

    def known(self, clients: Sequence[Client]) -> Sequence[Client]:
        """Whom buffered rounds may draw from: a round's ``clients``, and in a deployment those that came meanwhile."""
        ...

    def idle(self, clients: Sequence[Client]) -> Sequence[Client]:
        """Whom to score a model on in buffered rounds without waiting for anybody's training."""
        ...


class Clocked(Timed, Protocol):
    """A runtime on a simulated clock (``VirtualTime``)."""

    clock_s: float

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        ...

    def summary(self) -> dict[str, Any]:
        """What became of everyone so far."""
        ...


def is_timed(runtime: Site) -> TypeGuard[Timed]:
    """Whether clients of a runtime may be late."""
    return hasattr(runtime, "goal_clients")


def is_clocked(runtime: Site) -> TypeGuard[Clocked]:
    """Whether a runtime has a simulated clock."""
    return hasattr(runtime, "clock_s")


@dataclass(kw_only=True)
class Loop:
    """One run of a (bound) federation; ``clients`` is asked anew in every round: they may join and leave.

    ``on_round(row)`` may return False to stop; ``save(checkpoint)`` and ``release(round, params, constants)`` are
    called once the round's state is final; ``pause(seconds)`` waits between rounds. ``long`` keeps long
    vectors in files; ``ledger`` gets an entry before anything noisy is released.
    """

    federation: Federation
    schedule: Schedule
    runtime: Site
    key: Key
    clients: Callable[[], Sequence[Client]]
    params: Array
    evaluate_on: Dataset | None = None
    on_round: Callable[[Row], bool | None] | None = None
    save: Callable[[Checkpoint], None] | None = None
    release: Callable[[int, Array, dict[str, Array]], None] | None = None
    pause: Callable[[float], None] | None = None
    long: LongRounds | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def run(self, resume: Checkpoint | None = None) -> Checkpoint:
        """Train for the schedule's rounds, from the start or from where ``resume`` stands."""
        self._refuse_unfit()
        if resume is None:
            begun = begin if self.long is None else self.long.begin
            state = begun(self.federation.task("train"), self.params, self.federation.update_size())
            point = Checkpoint(state=state, totals=(), next_round=0, history=())
        else:
            point = resume
            self.ledger.restore(resume.ledger)
        for number in range(len(point.totals), len(self.federation.prepare)):
            point = replace(point, totals=(*point.totals, self._prepare(number, point)))
            self._keep(point)
        while point.next_round < self.schedule.num_rounds and not point.stopped:
            if not self._may_go_on(point):
                return replace(point, stopped=True)
            with one_round():
                point = self._round(point)
        return point

    def finish(self, point: Checkpoint, clients: Sequence[Client]) -> tuple[Scores | None, dict[Client, Scores]]:
        """Scores of the final model over all held-out rows of ``clients``, and each client's own."""
        if not self.federation.sends_metrics or not clients:
            return None, {}
        asked = some_clients(clients, self._context(point), at_end=True)
        return on_clients(
            self.federation, self.runtime, point.state, self._context(point), asked, self.schedule.num_rounds
        )

    def _refuse_unfit(self) -> None:
        """Say before round 0 what buffered rounds cannot run with."""
        runtime = self.runtime
        if (buffer := self.schedule.buffer) is None:
            return
        if not is_timed(runtime):
            raise InputError(
                f"Schedule(buffer=): expected a runtime with a clock, found {runtime}; use "
                "runtime=hansa.VirtualTime(hansa.InProcess(), devices=hansa.Devices.phones()), or leave buffer out"
            )
        only_exchange(self.federation.task("train").aggregator, tuple(self.clients()[:1]))
        if buffer.size > len(self.clients()):
            raise InputError(
                f"Buffered(size=): expected up to the population's {len(self.clients())} clients, found {buffer.size}"
            )

    def _context(self, point: Checkpoint) -> Context:
        constants = {f"prepare.{i}": total for i, total in enumerate(point.totals)}
        combine = None if self.long is None else self.long.combine
        return Context(self.key.child("run"), self.federation.learner.layout, constants, len(self.clients()), combine)

    def _may_go_on(self, point: Checkpoint) -> bool:
        """Whether the noise's budget has room for a round, and at least one owner's own."""
        clients = self.clients()
        if not clients and any(is_lasting(refusal["reason"]) for refusal in self.runtime.refusals()):
            return False
        return self._accounts.has_room(point.next_round, len(clients))

    @cached_property
    def _accounts(self) -> Accounts:
        return Accounts(self.federation, self.schedule, self.ledger)

    def _noting(self, context: Context, number: int, attempt: int, num_clients: int) -> Context:
        """The context of an attempt: its release is in the ledger before it is made."""
        noting = self._accounts.noting(context.combine, number=number, attempt=attempt, num_clients=num_clients)
        return context._replace(combine=noting)

    def _keep(self, point: Checkpoint) -> None:
        if self.save:
            self.save(point)
            fail_point("coordinator.checkpoint.saved")

    def _prepare(self, number: int, point: Checkpoint) -> Array:
        """The pooled sums of one preparation, over every client."""
        if getattr(self.federation.prepare[number], "is_public", False):
            return np.zeros(0)
        parts = self.federation.task("prepare", number)
        empty = ServerState({}, ())
        for attempt in itertools.count():
            slot = Slot(number, attempt, "", "prepare")
            try:
                state, _ = server_round(
                    parts, empty, self.runtime, self._population(attempt, ()), self._context(point), slot
                )
                break
            except Abandoned as error:
                if not error.may_heal:
                    least = self.schedule.min_clients or 1
                    raise InputError(
                        f"preparation {number}: expected the sums of at least {least} clients, found too few"
                        f"{why(self.runtime.refusals(), number)}"
                    ) from error
        return np.asarray(state.algorithm["total"])

    def _round(self, point: Checkpoint) -> Checkpoint:
        """One round: train, score, record."""
        started, number = time.perf_counter(), point.next_round
        context, began_s = self._context(point), self._clock_s
        state, mean = (self._train if self.schedule.buffer is None else self._train_buffered)(point, context)
        due = number == 0 or (number + 1) % self.schedule.evaluate_every == 0 or number + 1 == self.schedule.num_rounds
        scores = None
        if due:
            with stage("evaluation"), watching(on=False):  # all that a score takes, workers' rows too, is one stage
                scores = self._score(point, state, context, number)
        loss = scores.pop("loss") if scores else (train_loss(mean.tail) if mean and not point.scored_on else math.nan)
        up, down = self.runtime.traffic_totals()
        row = Row(
            round=number,
            loss=loss,
            metrics=scores or {name: math.nan for name in self.federation.learner.metrics.names if name != "loss"},
            num_clients=len(mean.clients) if mean else 0,
            bytes_up=up - point.traffic[0],
            bytes_down=down - point.traffic[1],
            seconds=time.perf_counter() - started,
            clock_s=self._clock_s,
            num_late=self._num_late - sum(row.num_late for row in point.history) if is_timed(self.runtime) else 0,
            **self._accounts.spent(len(self.clients())),
        )
        with stage("on_round"):
            stop = self.on_round(row) is False if self.on_round else False
        point = replace(
            point,
            state=state,
            next_round=number + 1,
            history=(*point.history, row),
            traffic=(up, down),
            stopped=stop,
            scored_on=point.scored_on or ("" if scores is None else self._scored_on()),
            ledger=self.ledger.entries,
        )
        if is_clocked(self.runtime) and self.schedule.every_s:
            self.runtime.wait(max(0.0, began_s + self.schedule.every_s - self._clock_s))
        with stage("saving"):
            self._keep(point)
            if self.release:
                self.release(number, state.algorithm["params"], dict(context.constants))
        if self.pause and self.schedule.every_s and point.next_round < self.schedule.num_rounds:
            self.pause(max(0.0, self.schedule.every_s - (time.perf_counter() - started)))
        return point

    def _train(self, point: Checkpoint, context: Context) -> tuple[ServerState, Aggregate | None]:
        """The round's new state; a cohort of nobody, or of none but empty clients, changes nothing.

        As long as somebody does not answer, which may heal, or refuses for good, there is another attempt.
        """
        refused, spent = dict[Client, str](), set[Client]()
        number, parts, num_failed, blamed = point.next_round, self.federation.task("train"), 0, set[Client]()
        for attempt in itertools.count():
            with stage("sampling"):
                everyone = self._population(attempt, blamed)
                cohort = self._cohort(everyone, number, attempt) if everyone or not spent else ()
            if not cohort:
                if spent and not any(row.num_clients for row in point.history):
                    raise all_refused(number, refused)
                return point.state, None
            try:
                with stage("plan"):  # until all have reported: see SimulatedRuntime.reports
                    around = self._noting(context, number, attempt, len(everyone))
                    return server_round(parts, point.state, self.runtime, cohort, around, Slot(number, attempt, ""))
            except Abandoned as error:
                refused = {r["client"]: r["reason"] for r in self.runtime.refusals() if r["round"] == number}
                if set(refused.values()) == {"no training examples"} and set(cohort) <= set(refused) < set(everyone):
                    return point.state, None
                resting = {client for client in cohort if is_lasting(refused.get(client, ""))}
                if set(cohort) <= set(refused) and not error.may_heal and not resting:
                    raise all_refused(number, refused) from None
                blamed, spent = blamed | set(error.blamed) | resting, spent | resting
                num_failed += not (error.may_heal or error.blamed or resting)
                if num_failed == _ATTEMPTS:
                    raise RunError(
                        f"round {number}: expected enough reports in {_ATTEMPTS} attempts, found too few each time"
                        f"{why(self.runtime.refusals(), number)}; raise deadline_s or lower min_clients"
                    ) from error
        raise AssertionError("attempts do not end by themselves")

    def _population(self, attempt: int, without: Collection[Client]) -> Sequence[Client]:
        """Who could take part in an attempt: everyone but those whose mail broke an earlier one."""
        everyone, runtime = self.clients(), self.runtime
        if is_timed(runtime):
            return runtime.of_attempt(attempt, everyone, without)
        return [client for client in everyone if client not in without] if without else everyone

    def _cohort(self, everyone: Sequence[Client], number: int, attempt: int) -> tuple[Client, ...]:
        """Whom an attempt asks: where clients may be late also those beyond the goal, on a clock those available then.

        Time passes until ``min_clients`` (or one) are available. An empty draw of a sampler stays one. In a deployment
        a replay must ask the same clients, hence not only those that happen to be available.
        """
        schedule, runtime, draw = self.schedule, self.runtime, self.key.child("sampling", number, attempt)
        everyone = whose_turn(schedule.sampler, everyone, number)
        if not is_timed(runtime):
            return choose(schedule.sampler, everyone, schedule.num_counted(len(everyone)), draw).clients
        runtime.goal_clients = schedule.num_counted(len(everyone)) if schedule.selects_more else None
        runtime.deadline_s = schedule.deadline_s
        learned = runtime.over_selection() if schedule.over_selection == "auto" else 1.0
        size = schedule.num_asked(len(everyone), learned)
        if not is_clocked(runtime):
            return choose(schedule.sampler, everyone, size, draw).clients
        began_s = runtime.clock_s
        while True:
            chosen = choose(schedule.sampler, everyone, size, draw, runtime.available)
            if len(chosen.clients) >= (schedule.min_clients or 1) or not chosen.num_away:
                return chosen.clients
            if runtime.clock_s - began_s >= _LONGEST_PAUSE_S:
                raise RunError(
                    f"round {number}: expected {schedule.min_clients or 1} clients available within "
                    f"{_LONGEST_PAUSE_S / 3600:g} simulated hours, found fewer; look at availability or min_clients"
                )
            runtime.wait(_PAUSE_S)

    def _train_buffered(self, point: Checkpoint, context: Context) -> tuple[ServerState, Aggregate | None]:
        """The state after the next full buffer; a buffer of refusals alone is thrown away, and the next one awaited."""
        number, parts, runtime = point.next_round, self.federation.task("train"), self.runtime
        buffer = self.schedule.buffer
        assert buffer is not None
        assert is_timed(runtime)
        everyone, num_draws = self.clients(), 0
        exchange = only_exchange(parts.aggregator, tuple(everyone[:1]))
        runtime.concurrency = self.schedule.num_asked(len(everyone))
        runtime.oldest_round = 0 if buffer.max_staleness is None else number - buffer.max_staleness

        def refill(count: int) -> None:
            nonlocal num_draws
            draw = self.key.child("sampling", number, num_draws)
            num_draws += 1
            with stage("sampling"):
                known = runtime.known(everyone)
                cohort = choose(self.schedule.sampler, known, count, draw, runtime.available).clients
            if cohort:
                assert runtime.filling is not None
                runtime.start(make_plan(parts, point.state, context, cohort, runtime.filling), cohort)

        around = self._noting(context, number, 0, len(everyone))
        for attempt in range(_SUMS if hasattr(parts.aggregator, "buffer_exchange") else _ATTEMPTS):
            runtime.filling = Slot(number, attempt, exchange)
            one = together(parts, point.state, runtime, context, runtime.filling, buffer.weight)
            try:
                with stage("plan"):
                    return buffered_round(
                        parts, point.state, runtime, runtime.plans, around, number,
                        buffer_size=buffer.size, staleness=buffer.weight, refill=refill, together=one,
                    )  # fmt: skip
            except Abandoned:
                continue
        raise all_refused(number, {r["client"]: r["reason"] for r in self.runtime.refusals()[-buffer.size :]})

    @property
    def _clock_s(self) -> float:
        return self.runtime.clock_s if is_clocked(self.runtime) else math.nan

    @property
    def _num_late(self) -> int:
        return self.runtime.num_late if is_timed(self.runtime) else 0

    def _scored_on(self) -> str:
        return "the server's own data" if self.evaluate_on is not None else "the clients' held-out rows"

    def _score(self, point: Checkpoint, state: ServerState, context: Context, number: int) -> Scores | None:
        """Metrics after the round, on the server's data or on held-out rows; None where there are none."""
        if self.evaluate_on is not None:
            params = np.asarray(state.algorithm["params"])
            return on_dataset(self.federation, params, point.totals, self.evaluate_on)
        if not self.federation.sends_metrics or (number > 0 and not point.scored_on):
            return None
        asked = self.clients()
        if self.schedule.buffer is not None and is_timed(self.runtime):
            asked = self.runtime.idle(asked)
        return on_clients(self.federation, self.runtime, state, context, some_clients(asked, context), number)[0]
