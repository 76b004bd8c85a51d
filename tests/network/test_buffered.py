"""FedBuff over the network: who is asked when, what is dropped when, and what a restart finds."""

import re

import numpy as np
import pytest

from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.network import failpoints, runtime
from hansa.network.buffers import Buffers
from hansa.network.failpoints import FAILPOINTS
from hansa.network.uploads import Sent
from hansa.training.buffered import Buffered
from hansa.training.loop import Loop
from hansa.training.schedule import Schedule
from support_town import Killed, Stuck, Town

NAMES = tuple("abcdef")


@pytest.fixture
def make_town(tmp_path, tools):
    made = []

    def make(names=NAMES, **more):
        data = {name: tools.data(i) for i, name in enumerate(names)}
        made.append(Town(tmp_path, more.pop("federation", None) or tools.federation(), data, **more))
        return made[-1]

    yield make
    for town in made:
        town.close()


def schedule(size=2, num_rounds=6, cohort_size=None, **more):
    return Schedule(num_rounds=num_rounds, cohort_size=cohort_size, buffer=Buffered(size=size, **more))


def states(town):
    """The state of every slot of training, by its round."""
    with town.coordinator.store.read() as db:
        rows = db.exec_driver_sql("SELECT round, state FROM slots WHERE task = 'train' ORDER BY id").fetchall()
    return {number: state for number, state in rows}


# ------------------------------------------------------------------------------------------------------ who is asked


def test_whoever_reports_is_asked_again_with_the_newest_model_while_slow_ones_work_on(make_town):
    """a and b need 1 s, the others 2.5 s: buffers of two are full at 1, 2, 2.5, 2.5, 3 s, ..."""
    town = make_town(NAMES[:4], delays={"c": 2.5, "d": 2.5})
    town.train(schedule(num_rounds=4))
    assert town.buffers() == [
        [(Slot(0, 0, "update"), "a"), (Slot(0, 0, "update"), "b")],
        [(Slot(1, 0, "update"), "a"), (Slot(1, 0, "update"), "b")],
        [(Slot(0, 0, "update"), "c"), (Slot(0, 0, "update"), "d")],
        [(Slot(2, 0, "update"), "a"), (Slot(2, 0, "update"), "b")],
    ]
    assert town.clock_s == 3.0


def test_so_many_are_at_work_at_any_moment_as_the_schedule_says(make_town):
    town, most = make_town(), []
    town.at_event = lambda number: most.append(len(town.runtime.buffers.at_work()))
    town.train(schedule(cohort_size=3))
    assert set(most) == {3}


def test_plans_of_several_rounds_are_open_at_once_and_closed_when_nobody_owes_a_report(make_town):
    town = make_town(delays={"f": 4.5})
    town.train(schedule(size=5, num_rounds=4))
    assert states(town) == {0: "collecting", 1: "aggregated", 2: "aggregated", 3: "collecting"}
    town.train(schedule(size=5, num_rounds=7))
    assert states(town)[0] == "aggregated"


def test_nothing_is_kept_of_plans_that_are_closed(make_town):
    """One client in each buffer of two: neither vectors nor reports nor plans pile up."""
    town = make_town(delays={"f": 3.3})
    town.train(schedule(num_rounds=30, cohort_size=4))
    open_slots = len(town.runtime.buffers.open_slots())
    assert open_slots <= 5
    assert len(list(town.coordinator.models.folder.iterdir())) <= open_slots + 1  # the released model
    assert len(list(town.coordinator.updates.folder.iterdir())) <= 3
    with town.coordinator.store.read() as db:
        bodies = db.exec_driver_sql("SELECT COUNT(DISTINCT slot_id) FROM assignments WHERE body IS NOT NULL").scalar()
    assert bodies <= open_slots
    assert len(town.runtime.plans) == len(list(town.runtime.plans)) == open_slots


def test_a_plan_that_is_read_again_is_the_one_that_was_made(make_town):
    town, made = make_town(delays={"f": 2.5}), {}
    start = town.runtime.start

    def watched(plan, clients):
        made[plan.slot] = plan
        start(plan, clients)

    town.runtime.start = watched
    town.train(schedule())
    for slot, plan in town.runtime.plans.items():
        assert plan == made[slot]._replace(broadcast={})


def test_another_plan_for_a_slot_that_is_open_is_refused(make_town):
    town = make_town()
    town.at_event = kill_at(1)
    with pytest.raises(Killed):
        town.train(schedule(cohort_size=3))
    town.restart()
    loop = town.loop(schedule(cohort_size=4))
    loop.params = np.ones(4, np.float32)
    town.at_event, town.delays = (lambda number: None), {}
    with pytest.raises(RunError, match="expected the plan that was made before the restart"):
        loop.run()


def kill_at(event):
    def at_event(number):
        if number == event:
            raise Killed

    return at_event


# ------------------------------------------------------------------------------------------------- late and too old


@pytest.mark.parametrize(("most", "status"), [(None, "accepted"), (3, "accepted"), (2, "late")])
def test_a_plan_older_than_allowed_is_closed_and_its_report_late(make_town, most, status):
    """f needs 3.5 s; buffers of five are full each second, and in round 3 it would be three rounds late."""
    town = make_town(delays={"f": 3.5})
    point = town.train(schedule(size=5, num_rounds=5, max_staleness=most))
    assert town.statuses(Slot(0, 0, "update"))["f"] == status
    assert sum(row.num_late for row in point.history) == (status == "late")
    counted = [number for number, buffer in enumerate(town.buffers()) if (Slot(0, 0, "update"), "f") in buffer]
    assert bool(counted) == (status == "accepted")


def test_a_client_whose_plan_was_too_old_is_asked_again_with_the_newest(make_town):
    town = make_town(delays={"f": 3.5})
    town.train(schedule(size=5, num_rounds=9, max_staleness=1))
    asked = [slot.round for slot in town.runtime.buffers.open_slots()]
    with town.coordinator.store.read() as db:
        rounds = db.exec_driver_sql(
            "SELECT round FROM slots JOIN assignments ON slot_id = id WHERE client = 'f' AND task = 'train'"
        ).fetchall()
    assert len(rounds) > 2
    assert min(asked) >= 7
    told = [one.counted for one in town.coordinator.rounds.settled_since("f", 0)]
    assert told
    assert not any(told)


def test_a_report_that_waited_until_it_was_too_old_is_late_and_the_client_hears_of_it(make_town):
    """Everybody reports at once, and each round takes one: with max_staleness 0 the others are of no use."""
    town = make_town()
    point = town.train(schedule(size=1, num_rounds=3, max_staleness=0))
    assert [row.num_clients for row in point.history] == [1, 1, 1]
    others = [status for name, status in town.statuses(Slot(0, 0, "update")).items() if name != "a"]
    assert set(others) == {"late"}
    assert [[one.counted for one in town.coordinator.rounds.settled_since(name, 0)][:1] for name in "ab"] == [
        [True],
        [False],
    ]


def test_a_client_that_vanished_loses_its_seat_and_its_plan_and_is_asked_anew_when_it_is_back(make_town):
    town = make_town(delays=dict.fromkeys(NAMES, 10.0))
    town.train(schedule(num_rounds=3, cohort_size=4))
    town.gone, others = {"a", "b"}, []
    town.at_event = lambda number: others.append(
        sum(work.client not in "ab" for work in town.runtime.buffers.at_work())
    )
    town.train(schedule(num_rounds=20, cohort_size=4))
    assert not any(work.client in "ab" for work in town.runtime.buffers.at_work())
    assert (max(others[:4]), max(others[-4:])) == (3, 4)  # their seats are taken by others
    town.gone = set()
    town.poll("a", "b")
    town.train(schedule(num_rounds=30, cohort_size=4))
    assert {"a", "b"} <= {client for buffer in town.buffers()[20:] for _, client in buffer}


def test_a_report_of_a_client_that_was_given_up_is_late_though_others_are_waited_for(make_town):
    town = make_town(NAMES[:3])
    town.at_event = kill_at(0)
    with pytest.raises(Killed):
        town.train(schedule())
    first, later = Slot(0, 0, "update"), Slot(1, 0, "update")
    for name in "abc":
        town.begin(name)
    assert town.runtime.buffers.tidy(later, 0, lambda work: work.client == "b") == {"b"}
    assert [town.finish(name).status for name in "abc"] == ["accepted", "late", "accepted"]
    town.runtime.buffers.tidy(later, 0, lambda work: False)
    assert states(town) == {0: "collecting"}  # two reports wait to be counted
    assert [row.client for _, row in town.runtime.buffers.fill(later, 2)] == ["a", "c"]
    town.runtime.buffers.tidy(later, 0, lambda work: False)
    assert states(town) == {0: "aggregated"}
    assert [one.counted for one in town.coordinator.rounds.settled_since("b", 0)] == [False]
    assert town.statuses(first) == {"a": "accepted", "b": "late", "c": "accepted"}


def test_only_a_report_that_can_count_no_more_is_recorded_without_its_bytes(make_town):
    """b is given up, c is not; when both have been dealt with, nothing of their slot is wanted any more."""
    town = make_town(NAMES[:4])
    town.at_event = kill_at(0)
    with pytest.raises(Killed):
        town.train(schedule())
    first, later = Slot(0, 0, "update"), Slot(1, 0, "update")
    expect = town.coordinator.expect
    sent = {name: Sent(name, first, digest * 64) for name, digest in zip("abcd", "abcd", strict=True)}
    assert [expect(town.coordinator.run, one, 10) for one in sent.values()] == [None] * 4
    town.runtime.buffers.tidy(later, 0, lambda work: work.client == "b")
    assert expect(town.coordinator.run, sent["b"], 10).status == "late"
    assert expect(town.coordinator.run, sent["c"], 10) is None
    town.begin("a")
    town.finish("a")
    town.runtime.buffers.tidy(later, 0, lambda work: False)
    assert expect(town.coordinator.run, sent["c"], 10) is None  # a waits to be counted, c and d work
    town.runtime.let_go()
    assert [expect(town.coordinator.run, sent[name], 10).status for name in "cd"] == ["late", "late"]
    assert states(town) == {0: "abandoned"}


def test_a_slow_client_is_lost_once_and_then_waited_for_as_long_as_it_usually_takes(make_town):
    """The others take ten seconds, so that after a minute f is given up; it takes 75."""
    town = make_town(delays=dict.fromkeys(NAMES, 10.0) | {"f": 75.0})
    town.train(schedule(size=5, num_rounds=18))
    assert town.statuses(Slot(0, 0, "update"))["f"] == "late"
    [counted] = [number for number, buffer in enumerate(town.buffers()) if any(client == "f" for _, client in buffer)]
    assert counted == 14  # asked again at 75 s, when it is back


# -------------------------------------------------------------------------------------------------- coming and going


def test_clients_that_come_later_are_asked_as_soon_as_a_seat_is_free(make_town, tools):
    town = make_town(NAMES[:3])

    def at_event(number):
        if number == 4:
            town.add("newcomer", tools.data(9))

    town.at_event = at_event
    town.train(schedule(num_rounds=8))
    assert any(client == "newcomer" for buffer in town.buffers() for _, client in buffer)


def test_a_client_that_was_revoked_holds_no_seat_and_nobody_waits_for_it(make_town):
    town = make_town(NAMES[:4])
    town.gone = {"d"}

    def at_event(number):
        if number == 3:
            town.coordinator.revoke("d")

    town.at_event = at_event
    point = town.train(schedule(size=3, num_rounds=6))
    assert point.next_round == 6
    assert states(town)[0] == "aggregated"


def test_half_of_the_clients_away_does_not_stop_the_others_and_heals_by_itself(make_town):
    town = make_town()
    town.train(schedule(num_rounds=2))
    town.gone = set("abc")
    town.train(schedule(num_rounds=8))
    assert {client for buffer in town.buffers()[4:] for _, client in buffer} == set("def")
    town.gone = set()
    town.train(schedule(num_rounds=14))
    assert {client for buffer in town.buffers()[8:] for _, client in buffer} == set(NAMES)


def test_fewer_clients_than_a_buffer_holds_wait_for_more(make_town):
    town = make_town(NAMES[:3])
    town.gone = {"c"}
    with pytest.raises(Stuck, match="waits for"):
        town.train(schedule(size=3))


def test_a_client_with_nothing_to_learn_from_does_not_hold_the_others_up(make_town, tools):
    town = make_town(NAMES[:4])
    town.data["d"] = (tools.data(1)[0].take([]), None)
    point = town.train(schedule(num_rounds=10))
    assert len(point.history) == 10
    assert {refusal["client"] for refusal in town.runtime.refusals()} == {"d"}
    assert len(town.runtime.refusals()) > 2  # it is asked again: it may have rows by then


def test_buffers_of_refusals_alone_end_with_a_sentence(make_town, tools):
    town = make_town(NAMES[:2])
    for name in "ab":
        town.data[name] = (tools.data(1)[0].take([]), None)
    with pytest.raises(InputError, match="expected training examples, found none"):
        town.train(schedule(size=1), evaluate_on=tools.data(1)[0])


# ---------------------------------------------------------------------------------------------------- form and scores


def test_an_update_of_another_form_than_most_is_refused_and_takes_its_place(make_town):
    town = make_town(NAMES[:3])
    town.train(schedule(num_rounds=4))
    [newest] = {work.slot for work in town.runtime.buffers.at_work() if work.client == "b"}
    with town.coordinator.store.write() as db:
        db.exec_driver_sql("UPDATE reports SET form = 'another' WHERE counted_in IS NULL")
    point = town.train(schedule(num_rounds=12))
    assert all(row.num_clients >= 1 for row in point.history)
    assert newest.round > 0


def test_the_model_is_scored_on_clients_that_are_not_at_work(make_town, tools):
    town = make_town()
    town.data = {name: (tools.data(i)[0], tools.data(10 + i)[0]) for i, name in enumerate(NAMES)}
    town.delays["f"] = 1000.0
    point = town.train(schedule(), evaluate_on=None)
    assert town.clock_s < 60
    assert all(np.isfinite(row.loss) for row in point.history)
    assert point.scored_on == "the clients' held-out rows"


def test_whom_a_round_is_scored_on_is_the_same_after_a_restart(make_town):
    town = make_town()
    town.train(schedule(num_rounds=3, cohort_size=2))
    idle = town.runtime.idle(NAMES)
    assert 0 < len(idle) < len(NAMES)
    town.begin(next(iter({work.client for work in town.runtime.buffers.at_work()} - set(town._due)), idle[0]))
    town.restart()
    assert town.runtime.idle(NAMES) == idle


# -------------------------------------------------------------------------------------------------------- crash points


MOMENTS = {
    "before a buffer is filled": ("buffers", "fill", False),
    "after a buffer was filled": ("buffers", "fill", True),
    "before clients are told": ("buffers", "settle", False),
    "after the first were told": ("buffers", "settle", True),
    "before a plan is shown": ("buffers", "ask", False),
    "after a plan was shown": ("buffers", "ask", True),
    "before old plans are closed": ("buffers", "tidy", False),
    "after old plans were closed": ("buffers", "tidy", True),
    "before a secret is made": ("rounds", "once", False),
    "before a release": ("coordinator", "release", False),
    "after a release": ("coordinator", "release", True),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("time", [1, 2, 5])
def test_killed_around_any_transaction_the_run_goes_on_to_the_same_bits(tmp_path, tools, monkeypatch, moment, time):
    """Everybody is at work, so that the order of arrivals is the delays' alone."""
    data = {name: tools.data(i) for i, name in enumerate(NAMES)}
    delays = {name: 1 + 0.3 * i for i, name in enumerate(NAMES)}
    whole, killed = (Town(tmp_path / n, tools.federation(), data, delays=delays) for n in ("whole", "killed"))
    expected = whole.train(schedule(num_rounds=8))
    where, method, after = MOMENTS[moment]
    owner = {"buffers": killed.runtime.buffers, "rounds": killed.coordinator.rounds}.get(where, killed.coordinator)
    kind, left = type(owner), [time]
    original = getattr(kind, method)

    def dying(self, *given, **named):
        if after:
            result = original(self, *given, **named)
        if after and result is None and method == "fill":
            return None
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return result if after else original(self, *given, **named)

    monkeypatch.setattr(kind, method, dying)
    with pytest.raises(Killed):
        killed.train(schedule(num_rounds=8))
    killed.restart()
    point = killed.train(schedule(num_rounds=8))
    assert killed.buffers() == whole.buffers()
    assert point.state.algorithm["params"].tobytes() == expected.state.algorithm["params"].tobytes()
    whole.close()
    killed.close()


POINTS = [
    name
    for name in FAILPOINTS
    if re.fullmatch(
        r"coordinator\.(buffer\.\w+|elapsed\.\w+|plan\.made|round\.aggregated|secret\.stored|slot\.settled"
        r"|checkpoint\.\w+|release\.\w+)",
        name,
    )
]


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("time", [1, 4])
def test_killed_at_any_fail_point_the_run_goes_on_to_the_same_bits(tmp_path, tools, monkeypatch, name, time):
    monkeypatch.setattr(runtime, "_NOTED_SHARE", 0.0)
    monkeypatch.setattr(runtime, "_NOTE_AGAIN_S", 0.0)
    data, left = {name: tools.data(i) for i, name in enumerate(NAMES)}, [time]
    delays = {name: 1 + 0.3 * i for i, name in enumerate(NAMES)}
    whole, killed = (Town(tmp_path / n, tools.federation(), data, delays=delays) for n in ("whole", "killed"))
    expected = whole.train(schedule(num_rounds=8))

    def die(point):
        left[0] -= point == name
        if left[0] == 0:
            left[0] = -1
            raise Killed

    failpoints.watch(die)
    try:
        with pytest.raises(Killed):
            killed.train(schedule(num_rounds=8))
        killed.restart()
        point = killed.train(schedule(num_rounds=8))
    finally:
        failpoints.watch(None)
    assert killed.buffers() == whole.buffers()
    assert point.state.algorithm["params"].tobytes() == expected.state.algorithm["params"].tobytes()
    whole.close()
    killed.close()


def test_killed_twice_around_a_buffer_it_still_has_what_the_buffer_holds(make_town, monkeypatch):
    """After the first restart nobody owes a report to the slots of the buffer, and they are closed; then all again."""
    town = make_town(NAMES[:3], delays={"c": 2.5})
    left = {"fill": 4, "tidy": 5}  # both in round 3

    def dying(method):
        original = getattr(Buffers, method)

        def die(self, *given):
            result = original(self, *given)
            left[method] -= result is not None
            if left[method] == 0:
                raise Killed
            return result

        monkeypatch.setattr(Buffers, method, die)

    dying("fill")
    dying("tidy")
    for _ in range(2):
        with pytest.raises(Killed):
            town.train(schedule(num_rounds=6))
        town.restart()
    assert town.train(schedule(num_rounds=6)).next_round == 6
    assert [len(buffer) for buffer in town.buffers()] == [2] * 6


def test_a_seat_is_timed_over_restarts(make_town):
    town = make_town(NAMES[:3])
    town.gone = {"c"}
    town.train(schedule(num_rounds=2))
    [before] = [work.age_s for work in town.runtime.buffers.at_work() if work.client == "c"]
    town.clock_s += 1e4
    town.runtime.buffers.note_elapsed(1.0)
    town.restart()
    town.runtime.buffers.begin()
    [after] = [work.age_s for work in town.runtime.buffers.at_work() if work.client == "c"]
    assert after == before + 1e4


# ------------------------------------------------------------------------------------------------- over real sockets


@pytest.mark.network
def test_it_runs_over_real_sockets_and_everybody_hears_that_it_is_over(site, tools):
    data = {name: (tools.data(i)[0], tools.data(10 + i)[0]) for i, name in enumerate(("berlin", "paris", "rome"))}
    for name, pair in data.items():
        site.join(name, pair)
    runtime = tools.runtime(site.coordinator, deadline_s="auto")
    runtime.wait_for_clients(3, timeout_s=30)
    loop = Loop(
        federation=site.federation, schedule=schedule(num_rounds=8), runtime=runtime, key=Key.of(3),
        clients=runtime.clients, params=np.zeros(4, np.float32), release=runtime.release,
    )  # fmt: skip
    point = loop.run()
    runtime.let_go()
    assert [row.num_clients for row in point.history] == [2] * 8
    assert np.abs(point.state.algorithm["params"]).max() > 0.01
    assert runtime.finish(wait_s=20) == ()
    for thread in site.threads:
        thread.join(20)
    assert not site.problems
