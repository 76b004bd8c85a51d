"""Rounds under every order of events: hypothesis drives clients, clock, server and crashes, and a model keeps watch.

The model knows what each client sent and reads the database by SQL of its own. It says beforehand what a report must
earn, and afterwards that nothing went back, nothing counted twice, nothing accepted was lost, and that the released
parameters are those that follow from the reports that counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import RunError
from hansa.data.dataset import Dataset
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network import identity
from hansa.network.messages import Refusal, read_plan, slot_of
from hansa.network.receipts import check_receipt
from hansa.training.buffered import Buffered
from hansa.training.schedule import Schedule
from hansa.wire import pack, unpack
from support_stage import RANK, Stage, report_of
from support_turns import Killed

NAMES = [f"client-{letter}" for letter in "abcdefg"]
KINDS = ["good"] * 6 + ["odd", "odd", "nan", "short", "huge", "weightless", "garbage", "excuse"]
SYNCHRONOUS = Schedule(
    num_rounds=3, cohort_size=3, over_selection=1.5, min_clients=2, deadline_s=60.0, evaluate_every=1000
)
BUFFERED = Schedule(
    num_rounds=4, cohort_size=4, buffer=Buffered(size=2, max_staleness=2), evaluate_every=1000, min_clients=2
)
LEARNER = LinearLearner(num_features=3, num_classes=2)
SIZE = LEARNER.layout.num_params
DATA = Dataset(np.eye(3, dtype=np.float32), np.array([0, 1, 0]))
HOW = st.sampled_from(["whole", "in parts", "seen", "seen"])
some = st.integers(0, 10**6)  # which of those there are


class Rounds(RuleBasedStateMachine):
    """Everything that can happen to a round. ``schedule`` is that of the class below."""

    schedule: Schedule

    @initialize(count=st.integers(1, 4))
    def begin(self, count):
        self.folder = Path(tempfile.mkdtemp(prefix="hansa-rounds-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("os.fsync", lambda handle: None)
        self.patch.setattr("hansa.network.runtime.time.monotonic", lambda: 0.0)  # the look at all takes no time
        federation = Federation(learner=LEARNER, algorithm=FedAvg(client_learning_rate=0.1))
        self.stage = Stage(self.folder, federation, self.schedule, DATA)
        self.stage.fuse.__enter__()
        self.key = identity.key_of_receipts(self.stage.coordinator.seal.certificate, self.authority)
        self.bodies = {}  # by SHA-256: values and weight of what would count
        self.receipts = {}  # by slot and client: the first that was given
        self.sent = {}  # by slot and client: the first body that the server may have
        self.told = {name: 0 for name in NAMES}  # the last settlement that a client applied
        self.num_looks = 0
        self.opened = {}  # by slot: when it was seen first
        self.watched = {}  # by slot: since when this process has had an eye on it
        self.model, self.model_round = np.zeros(SIZE, np.float32), -1
        self.before = self.stage.seen
        for name in NAMES[:count]:
            self.stage.enrol(name)

    @property
    def authority(self):
        return self.stage.coordinator.authority.certificate

    def teardown(self):
        """However it was left, the run is brought to its end, unless a step has failed."""
        if not hasattr(self, "stage"):
            return
        try:
            if sys.exc_info()[0] is None:
                self.finish()
        finally:
            self.stage.fuse.__exit__()
            self.stage.turns.kill()
            self.stage.store.close()
            self.patch.undo()
            shutil.rmtree(self.folder)

    # --------------------------------------------------------------------------------------------------- what happens

    def attempt(self, what, again=None):
        """Do it; where the process dies on the way, start the next one and do it again, as whoever asked would."""
        try:
            return what()
        except Killed:
            self.restart()
            return (again or what)()

    def restart(self):
        """Another process, until one starts; the fuse burns once."""
        self.watched = {}
        self.stage.die()
        self.stage.start()

    @rule()
    def a_client_joins(self):
        missing = [name for name in NAMES if name not in self.stage.callers]
        if missing:
            name = missing[0]

            def once_more():
                try:
                    self.stage.enrol_again(name)
                except (AttributeError, Refusal):  # the crash came before the token was stored
                    self.stage.enrol(name)

            self.attempt(lambda: self.stage.enrol(name), once_more)

    @rule(which=some)
    def a_client_asks(self, which):
        name = self.pick(list(self.stage.callers), which)
        if name in self.seen.revoked:
            with pytest.raises(Refusal, match="was revoked"):
                self.stage.work(name, 0)
        else:
            self.ask(name)

    def ask(self, name):
        """What a client is told must be what the database holds for it, and there for it to fetch."""
        work, seen = self.attempt(lambda: self.stage.work(name, self.told[name])), self.seen
        for one in work.settlements:
            assert one.number > self.told[name]
            assert seen.settlements[f"{one.task}-{one.round}-{one.attempt}", name] == one.counted
            self.told[name] = one.number
        due = [text for text, slot in seen.slots.items() if slot.state == "collecting" and name in slot.waiting(set())]
        assert (work.plan is not None) == bool(due)
        if work.plan is not None:
            plan = read_plan(work.plan)
            assert str(plan.slot) == due[0]
            assert self.stage.can_fetch(plan.vectors)
        if work.released is not None:
            assert (work.released.round, work.released.vectors) == seen.released
            assert self.stage.can_fetch(work.released.vectors)
        return work

    @precondition(lambda self: self.seen.slots)
    @rule(which=some, old=st.integers(0, 5), kind=st.sampled_from(KINDS), number=st.integers(1, 99), how=HOW)
    def a_client_reports(self, which, old, kind, number, how):
        """To the newest slots mostly, whether it was asked there or not; the server may look at once, or not yet."""
        texts = list(self.seen.slots)[::-1]
        text = texts[0 if old < 4 else min(old - 3, len(texts) - 1)]
        slot = self.seen.slots[text]
        waiting = slot.waiting(set())
        everyone = waiting * 5 + list(self.stage.callers)
        self.report(self.pick(everyone, which), text, self.body(kind, number), kind, how == "in parts")
        if how == "seen":
            self.the_server_looks()

    @precondition(lambda self: self.seen.slots)
    @rule(number=st.integers(200, 299), but=st.integers(0, 2))
    def most_clients_do_what_they_should(self, number, but):
        """So that a run gets on to later rounds too."""
        self.the_server_looks()
        for text, slot in list(self.seen.slots.items())[-2:]:
            for name in slot.waiting(self.seen.revoked)[but:]:
                if slot.state == "collecting":
                    self.ask(name)
                    self.report(name, text, self.body("good", number), "good", False)
        self.the_server_looks()

    @precondition(lambda self: self.sent)
    @rule(which=some, other=st.booleans(), parts=st.booleans())
    def a_client_reports_again(self, which, other, parts):
        (text, name), (body, kind) = self.pick(list(self.sent.items()), which)
        if other:
            body, kind = self.body("good", 100 + which % 100), "good"
        self.report(name, text, body, kind, parts)

    @rule(seconds=st.sampled_from([0.5, 5.0, 20.0, 61.0, 4000.0]))
    def time_passes(self, seconds):
        self.stage.now += seconds

    @rule()
    def the_server_looks(self):
        """The server's half goes on until it waits again."""
        stage, before = self.stage, self.seen
        self.note_opened(before)
        if stage.turns.is_over:
            if stage.turns.error is not None:  # whoever runs it starts it again
                self.restart()
            return
        stage.turns.go_on()
        error = stage.turns.error
        if isinstance(error, Killed):
            self.restart()
        elif error is not None:
            self.check_end(error)
        else:
            self.check_closed(before)
        assert self.stage.check_log() == ()

    @precondition(lambda self: len(self.stage.callers) - len(self.seen.revoked) > 3)
    @rule(which=some, elsewhere=st.booleans())
    def a_client_is_revoked(self, which, elsewhere):
        name = self.pick([n for n in self.stage.callers if n not in self.seen.revoked], which)
        self.attempt(lambda: self.stage.revoke(name, elsewhere=elsewhere))

    @precondition(lambda self: self.seen.revoked)
    @rule(which=some)
    def a_revoked_client_is_invited_again(self, which):
        self.stage.now += 1.0  # a token of the moment of the revocation would be void
        name = self.pick(sorted(self.seen.revoked), which)
        self.attempt(lambda: self.stage.enrol(name, again=True), lambda: self.stage.enrol(name, again=True))

    @rule(which=some, hello=st.booleans())
    def a_client_says_goodbye_or_hello(self, which, hello):
        name = self.pick([n for n in self.stage.callers if n not in self.seen.revoked], which)
        if hello:
            self.attempt(lambda: self.stage.hello(name))
        else:
            self.attempt(lambda: self.stage.coordinator.goodbye(self.stage.who(name)))

    @rule(points=st.integers(1, 25))
    def a_crash_is_near(self, points):
        """The process dies at one of the next fail points, whoever comes by there."""
        self.stage.fuse.left = points

    @rule(politely=st.booleans())
    def the_server_starts_again(self, politely):
        if politely:
            with contextlib.suppress(Killed):
                self.stage.close()
        self.restart()

    # ------------------------------------------------------------------------------------------------------ the model

    @property
    def seen(self):
        return self.stage.seen

    @staticmethod
    def pick(there, which):
        return there[which % len(there)]

    def body(self, kind, number):
        """A report's bytes; what would count is noted."""
        draw = np.random.default_rng(number)
        values, weight = draw.normal(size=(1, SIZE)).astype(np.float32), float(1 + number % 4)
        made = {
            "good": lambda: report_of(values, weight),
            "odd": lambda: report_of(values, weight, extra=1.0),
            "nan": lambda: report_of(np.where(np.arange(SIZE) == number % SIZE, np.nan, values), weight),
            "short": lambda: report_of(values[:, 1:], weight),
            "huge": lambda: report_of(np.sign(values) * np.float32(3e38), weight),
            "weightless": lambda: report_of(values, -weight),
            "garbage": lambda: draw.bytes(50),
            "excuse": lambda: pack({"mail": None, "refused": "no mood today"}),
        }[kind]()
        if kind in ("good", "odd"):
            self.bodies[hashlib.sha256(made).hexdigest()] = values[0].astype(np.float64), weight
        return made

    def report(self, name, text, body, kind, parts):
        """Send it, and compare what it earns with what the model says; a crash on the way changes neither."""
        sha256 = hashlib.sha256(body).hexdigest()
        for _ in range(2):
            expected = self.expected(self.seen, name, text, sha256, kind)
            try:
                status, found = self.answer(name, text, body, sha256, parts)
            except Killed:
                self.note(name, text, body, kind, expected)
                self.restart()
                continue
            assert status == expected
            self.note(name, text, body, kind, expected)
            if found is not None:
                first = self.receipts.setdefault((text, name), found)
                assert (found.sha256, found.received_at) == (first.sha256, first.received_at)
            return
        raise AssertionError("the fuse burns once")

    def answer(self, name, text, body, sha256, parts):
        """A receipt's status and itself, or a refusal's code."""
        try:
            found = self.stage.send(name, text, body, sha256, in_parts=parts)
        except Refusal as refusal:
            return refusal.code, None
        return found.status, found

    def note(self, name, text, body, kind, expected):
        if expected in ("accepted", "refused", "late"):
            self.sent.setdefault((text, name), (body, kind))

    def expected(self, seen, name, text, sha256, kind):
        """What a report must earn: a receipt's status, or a refusal's code."""
        slot = seen.slots[text]
        if name in seen.revoked:
            return "revoked"
        if name not in slot.asked:
            return "not-asked"
        if (mine := slot.reports.get(name)) is not None:
            return mine["status"] if mine["sha256"] == sha256 else "conflict"
        if slot.state != "collecting" or name in slot.given_up:
            return "late"
        if kind not in ("good", "odd"):
            return "refused"
        alike = sum(self.kind_of(text, n) == kind for n, row in slot.reports.items() if row["status"] == "accepted")
        return "late" if slot.goal is not None and alike >= slot.goal else "accepted"

    def kind_of(self, text, name):
        return self.sent[text, name][1]

    def note_opened(self, seen):
        """When each slot was seen first."""
        for text in seen.slots:
            self.opened.setdefault(text, self.stage.now)

    def check_closed(self, before):
        """A slot has closed if, and only if, its conditions were met."""
        seen = self.seen
        for text, slot in before.slots.items():
            if slot.buffered or slot.state != "collecting":
                continue
            is_late = slot.deadline_s is not None and self.stage.now - self.opened[text] >= slot.deadline_s
            if seen.slots[text].state != "collecting":
                assert slot.is_over(before.revoked) or is_late
                enough = max(slot.accepted().values(), default=0) >= self.schedule.min_clients
                assert (seen.slots[text].state == "abandoned") == (not enough)
            else:
                assert not slot.is_over(before.revoked)
                assert self.stage.now - self.watched.setdefault(text, self.stage.now) < slot.deadline_s

    def check_end(self, error):
        """The server gives up only where every client of the attempts was refused, or nobody was left."""
        assert isinstance(error, RunError), error
        said = str(error)
        assert "every client was refused" in said or "expected enough reports in 3 attempts" in said, error

    @invariant()
    def nothing_goes_back(self):
        if not hasattr(self, "stage"):
            return
        old, new = self.before, self.seen
        self.note_opened(new)
        for text, slot in new.slots.items():
            was = old.slots.get(text)
            if was is None:
                continue
            assert RANK[slot.state] >= RANK[was.state]
            assert slot.state == was.state or was.state != "abandoned"
            assert slot.asked[: len(was.asked)] == was.asked
            assert was.given_up <= slot.given_up
            for name, row in was.reports.items():
                self.check_row(slot, row, slot.reports[name], new.settlements.get((attempt_of(text), name)))
        assert old.settlements.items() <= new.settlements.items()
        assert old.newest <= new.newest
        self.before = new

    def check_row(self, slot, was, now, told):
        """A report's row stays, but for one change: an odd one out is refused, one that waited too long is late."""
        for name in ("sha256", "size", "client", "received_at", "arrival", "form"):
            assert was[name] == now[name]
        assert was["counted_in"] in (None, now["counted_in"])
        if was["status"] == now["status"]:
            return
        assert was["status"] == "accepted" or (was["status"], slot.buffered) == ("refused", True)
        if now["status"] == "refused":
            assert "of another form than most" in now["reason"]
            assert slot.state != "collecting" or now["counted_in"]
        else:
            assert slot.buffered
            assert told is False

    @invariant()
    def everything_accepted_is_dealt_with_once(self):
        if not hasattr(self, "stage"):
            return
        seen, counted = self.before, {}
        for (attempt, name), did in seen.settlements.items():
            if did:
                counted.setdefault((attempt if self.schedule.buffer else attempt.rsplit("-", 1)[0], name), []).append(
                    attempt
                )
        assert all(len(attempts) == 1 for attempts in counted.values())
        for text, slot in seen.slots.items():
            for name, row in slot.reports.items():
                did = seen.settlements.get((attempt_of(text), name))
                assert not did or row["status"] == "accepted"
                if slot.state == "aggregated" and row["status"] == "accepted":
                    assert did is True
                if slot.state == "abandoned":
                    assert not did

    @invariant()
    def receipts_hold(self):
        if not hasattr(self, "stage") or not self.receipts:
            return
        self.num_looks += 1
        (text, name), receipt = self.pick(list(self.receipts.items()), self.num_looks)  # each in its turn
        run = self.stage.coordinator.run
        check_receipt(receipt, self.key, client=name, run=run, slot=text, sha256=receipt.sha256)
        row = self.before.slots[text].reports[name]
        assert row["sha256"] == receipt.sha256
        if row["status"] == receipt.status:
            assert self.stage.coordinator.rounds.receipt(slot_of(text), name) == receipt

    @invariant()
    def the_model_follows_from_the_reports(self):
        if not hasattr(self, "stage") or self.before.released is None:
            return
        number, vectors = self.before.released
        assert number >= self.model_round
        while self.model_round < number:
            self.model_round += 1
            step = self.buffered_step if self.schedule.buffer else self.step
            self.model = (self.model + step(self.before, self.model_round)).astype(np.float32)
        found = unpack(self.stage.coordinator.models.get(vectors["params"]))
        np.testing.assert_allclose(found, self.model, rtol=1e-5, atol=1e-6)

    def step(self, seen, number):
        """The mean of what counted in a round."""
        rows = [
            self.bodies[row["sha256"]]
            for slot in seen.slots.values() if slot.round == number and slot.state == "aggregated"
            for row in slot.reports.values() if row["status"] == "accepted"
        ]  # fmt: skip
        return sum(weight * values for values, weight in rows) / sum(w for _, w in rows) if rows else np.zeros(SIZE)

    def buffered_step(self, seen, number):
        """Buffers of a round: the last one counted, those before held refusals alone."""
        found = {}
        for slot in seen.slots.values():
            for row in slot.reports.values():
                if row["counted_in"] and slot_of(row["counted_in"]).round == number and row["status"] == "accepted":
                    values, weight = self.bodies[row["sha256"]]
                    scale = (1 + number - slot.round) ** -0.5
                    assert number - slot.round <= self.schedule.buffer.max_staleness
                    found.setdefault(row["counted_in"], []).append((scale * weight * values, weight))
        (rows,) = found.values()
        return sum(values for values, _ in rows) / sum(weight for _, weight in rows)

    # ------------------------------------------------------------------------------------------------------- the end

    def finish(self):
        """From wherever it was left, honest clients bring the run to its end."""
        self.stage.fuse.left = 0
        while len(self.stage.callers) - len(self.seen.revoked) < 3:
            self.a_client_joins()
        for number in range(200):
            if self.stage.turns.is_over and self.stage.turns.error is None:
                break
            for name in [n for n in self.stage.callers if n not in self.seen.revoked]:
                work = self.ask(name)
                if work.plan is not None:
                    text = str(read_plan(work.plan).slot)
                    self.report(name, text, self.body("good", 1000 + number), "good", False)
            self.stage.now += 1.0
            self.the_server_looks()
            self.nothing_goes_back()
        else:
            raise AssertionError("the run does not end")
        self.everything_accepted_is_dealt_with_once()
        for _ in self.receipts:
            self.receipts_hold()
        self.the_model_follows_from_the_reports()
        assert self.model_round == self.schedule.num_rounds - 1
        assert all(slot.state in ("aggregated", "abandoned") for slot in self.seen.slots.values())
        assert self.stage.check_log(live=False) == ()


def attempt_of(text):
    return text.rsplit("-", 1)[0]


class Synchronous(Rounds):
    schedule = SYNCHRONOUS


class BufferedRounds(Rounds):
    schedule = BUFFERED


def profile(max_examples, steps, **more):
    return settings(
        max_examples=max_examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck), **more
    )


@pytest.mark.parametrize("machine", [Synchronous, BufferedRounds])
def test_a_round_keeps_its_promises_whatever_happens_in_whatever_order(machine):
    run_state_machine_as_test(machine, settings=profile(12, 40, phases=(Phase.generate,)))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Synchronous, BufferedRounds])
def test_a_round_keeps_its_promises_for_longer(machine):
    run_state_machine_as_test(machine, settings=profile(400, 60, derandomize=False, print_blob=True))
