"""When a round closes, with whom, and what became of those that came too late: on a simulated clock."""

import dataclasses

import numpy as np
import pytest

from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import Context, begin, make_plan
from hansa.network.past import Past
from hansa.network.rounds import Terms
from hansa.training.schedule import Schedule
from support_masked_sum import MaskedSum
from support_town import Killed, Stuck, Town

NAMES = tuple("abcdefgh")
ONE = Slot(0, 0, "update")


@pytest.fixture
def make_town(tmp_path, tools):
    made = []

    def make(names=NAMES, folder="town", **more):
        data = {name: tools.data(i) for i, name in enumerate(names)}
        federation = more.pop("federation", None) or tools.federation()
        made.append(Town(tmp_path / folder, federation, data, **more))
        return made[-1]

    yield make
    for town in made:
        town.close()


def counted(town, point):
    """Who was accepted in each round of training."""
    rounds = [town.statuses(Slot(number, 0, "update")) for number in range(point.next_round)]
    return [[name for name, status in statuses.items() if status == "accepted"] for statuses in rounds]


# ------------------------------------------------------------------------------------------------------------- goals


def test_over_selection_counts_the_first_to_arrive_and_the_rest_are_late(make_town):
    town = make_town(delays={name: 8.0 - i for i, name in enumerate(NAMES)})  # h is fastest
    point = town.train(Schedule(num_rounds=1, cohort_size=5, over_selection=1.6))
    assert counted(town, point) == [["h", "g", "f", "e", "d"]]
    assert point.history[0].num_clients == 5
    assert town.clock_s == 5.0
    for name in "cba":
        assert town.finish(name).status == "late"
    assert list(town.statuses(ONE).values()) == ["accepted"] * 5 + ["late"] * 3


def test_the_model_is_that_of_the_clients_that_counted_alone(make_town, tools):
    town = make_town(delays={name: i + 1.0 for i, name in enumerate(NAMES)})
    found = town.train(Schedule(num_rounds=1, cohort_size=3, over_selection=2.0, sampler=AsTheyCome()))
    first = tools.rounds(town.federation, tools.reference(town.federation, town.data), NAMES[:3])
    first.context = Context(Key.of(3).child("run"), town.federation.learner.layout)
    np.testing.assert_array_equal(found.state.algorithm["params"], first.run(0))


@dataclasses.dataclass(frozen=True)
class AsTheyCome:
    """The first so many of the population."""

    def cohort(self, clients, size, key):
        return tuple(clients[:size])


def test_a_report_beyond_the_goal_is_late_before_the_round_is_closed_too(make_town):
    """A receipt never has to be taken back: whoever was told "accepted" is counted."""
    town = make_town(NAMES[:3])
    town.runtime.goal_clients = 2
    parts = town.federation.task("train")
    plan = make_plan(parts, begin(parts, np.zeros(4, np.float32)), Context(Key.of(1)), tuple("abc"), ONE)
    town.runtime.start(plan, tuple("abc"))
    for name in "abc":
        town.begin(name)
    assert [town.finish(name).status for name in "bca"] == ["accepted", "accepted", "late"]
    assert [report.clients for report in town.runtime.reports(ONE)] == [("b",), ("c",)]
    assert [row.client for row in town.coordinator.rounds.frozen(ONE)] == ["b", "c"]


def test_late_updates_are_told_in_the_history_of_the_round_in_which_they_came(make_town):
    town = make_town(NAMES[:4], delays={"d": 2.5})
    point = town.train(Schedule(num_rounds=4, cohort_size=3, over_selection=1.34))
    assert [row.num_late for row in point.history] == [0, 0, 1, 0]
    assert [row.num_clients for row in point.history] == [3, 3, 3, 3]
    status = town.coordinator.status()
    assert status["late"] == 1
    assert {one["name"]: one["late"] for one in status["clients"]} == {"a": 0, "b": 0, "c": 0, "d": 1}


def test_everybody_is_waited_for_where_nobody_is_too_many(make_town):
    town = make_town(delays={"a": 50.0})
    point = town.train(Schedule(num_rounds=1))
    assert (point.history[0].num_clients, town.clock_s) == (8, 50.0)


def test_only_the_exchange_in_which_clients_learn_closes_with_its_goal(make_town, tools):
    town = make_town(NAMES[:6], federation=tools.federation(aggregator=MaskedSum(group=8, threshold=2)))
    town.train(Schedule(num_rounds=1, cohort_size=4, over_selection=1.5))
    with town.coordinator.store.read() as db:
        goals = dict(db.exec_driver_sql("SELECT slot, goal FROM slots WHERE task = 'train'").fetchall())
    assert goals == {"train-0-0-keys": None, "train-0-0-shares": None, "train-0-0-masked": 4, "train-0-0-unmask": None}


# --------------------------------------------------------------------------------------------------------- deadlines


def test_a_deadline_goes_on_after_a_restart(make_town):
    town = make_town(NAMES[:3], delays={"b": 70.0, "c": 1e6})
    town.make_runtime(deadline_s=100.0)
    restarts = []

    def at_event(number):
        if town.clock_s == 70.0 and not restarts:
            restarts.append(number)
            raise SystemExit

    town.at_event = at_event
    schedule = Schedule(num_rounds=1, deadline_s=100.0)
    with pytest.raises(SystemExit):
        town.train(schedule)
    town.clock_s += 5000.0  # another process, another clock, much later
    town.restart()
    before = town.clock_s
    point = town.train(schedule)
    assert counted(town, point) == [["a", "b"]]
    assert 30.0 <= town.clock_s - before <= 40.0  # noted with every tenth of a deadline


def test_a_deadline_is_noted_with_every_tenth_and_at_most_once_a_second(make_town):
    town = make_town(NAMES[:1])
    rounds, clock = town.coordinator.rounds, town.coordinator.rounds.times
    rounds.plan(ONE, True, "hash", Terms(deadline_s=100.0))
    noted = []
    for second in range(1, 40):
        town.clock_s = float(second)
        rounds.note_elapsed(ONE, 10.0)
        with town.coordinator.store.read() as db:
            noted.append(db.exec_driver_sql("SELECT elapsed_s FROM slots").scalar())
    assert clock.elapsed_s(str(ONE)) == 39.0
    assert sorted(set(noted)) == [0.0, 10.0, 20.0, 30.0]


@pytest.mark.parametrize("step", [-86_400.0, 86_400.0])
def test_a_wall_clock_that_is_set_changes_no_round(make_town, step):
    histories, now = [], [1e9]
    for jump in (0.0, step):
        town = make_town(NAMES[:4], folder=f"jump {jump}", delays={"d": 90.0})
        town.coordinator.store.clock = lambda: now[0]

        def at_event(number, jump=jump):
            now[0] += jump

        town.at_event = at_event
        point = town.train(Schedule(num_rounds=3, deadline_s=60.0))
        histories.append((counted(town, point), point.state.algorithm["params"].tobytes()))
    assert histories[0] == histories[1]


def test_a_round_that_closed_is_closed_for_ever(make_town):
    town = make_town(NAMES[:3], delays={"c": 100.0})
    town.train(Schedule(num_rounds=1, deadline_s=10.0))
    town.restart()
    for _ in range(2):
        town.coordinator.rounds.freeze(ONE, 1)
        assert [row.client for row in town.coordinator.rounds.frozen(ONE)] == ["a", "b"]
        if town.is_busy("c"):
            assert town.finish("c").status == "late"


# -------------------------------------------------------------------------------------------------- learned from past


def test_over_selection_follows_the_share_that_did_not_answer_in_time(make_town):
    town = make_town(NAMES[:4])
    town.gone = {"a"}  # a quarter of everyone
    schedule = Schedule(num_rounds=12, cohort_size=3, over_selection="auto", deadline_s=5.0, sampler=AsTheyCome())
    assert town.runtime.over_selection() == 1.3
    town.train(schedule)
    assert town.runtime.over_selection() == pytest.approx(4 / 3)
    assert town.coordinator.status()["over_selection"] == pytest.approx(4 / 3)
    town.gone = set()
    town.train(dataclasses.replace(schedule, num_rounds=30))
    assert 1.0 < town.runtime.over_selection() < 1.02


def test_clients_that_were_only_slower_than_others_are_not_missing(make_town):
    """Otherwise asking more would look like losing more, and go on so for ever."""
    town = make_town(delays={name: 1 + i / 10 for i, name in enumerate(NAMES)})
    town.train(Schedule(num_rounds=12, cohort_size=4, over_selection="auto"))
    assert town.runtime.over_selection() == 1.0
    assert town.runtime.past.missing(12) == [0.0] * 11


def test_what_was_learned_is_the_same_in_a_round_after_a_restart(make_town):
    town = make_town(delays={"a": 3.0})
    schedule = Schedule(num_rounds=6, cohort_size=4, over_selection="auto", deadline_s=2.0)
    town.train(schedule)
    learned = town.runtime.over_selection()
    if town.is_busy("a"):
        town.finish("a")
    town.restart()
    assert town.runtime.over_selection() == learned


@pytest.mark.parametrize("kills", [range(3, 60, 7), [5, 6, 7, 8, 9]])
def test_over_selection_and_deadlines_go_on_through_kills(make_town, kills):
    town = make_town(delays={"a": 40.0, "b": 2.0})
    schedule = Schedule(
        num_rounds=8, cohort_size=4, over_selection="auto", deadline_s="auto"
    )  # fmt: skip
    point = town.train_through(schedule, kills)
    assert point.next_round == 8
    assert all(len(names) == 4 for names in counted(town, point))


def test_a_deadline_is_learned_from_what_the_cohort_took(make_town):
    town = make_town(delays={name: 20.0 + i for i, name in enumerate(NAMES)})
    past, two = Past(town.coordinator.store, town.coordinator.run), Slot(9, 0, "update")
    assert past.deadline_s(two, NAMES) == 3600.0
    town.train(Schedule(num_rounds=2, deadline_s="auto"))
    assert past.deadline_s(two, NAMES) == 2 * 27.0
    assert past.deadline_s(two, NAMES[:2]) == 2 * 21.0
    assert past.deadline_s(two, ("x", "y", "a")) == 2 * 27.0  # most are unknown: what everybody took
    assert past.deadline_s(Slot(9, 0, "", "evaluate"), NAMES) == 3600.0
    town.gone = {"a"}
    before = town.clock_s
    town.train(Schedule(num_rounds=3, deadline_s="auto"))
    assert town.clock_s - before == 54.0


# -------------------------------------------------------------------------------------------- partitions and heals


def test_half_of_the_clients_away_is_a_round_of_the_others_and_heals_by_itself(make_town):
    town = make_town()
    town.make_runtime(min_clients=3)
    schedule = Schedule(num_rounds=2, min_clients=3, deadline_s=60.0)
    town.gone = set("abcd")
    point = town.train(schedule)
    assert [sorted(names) for names in counted(town, point)] == [list("efgh")] * 2
    town.gone = set()
    point = town.train(dataclasses.replace(schedule, num_rounds=3))
    assert sorted(counted(town, point)[-1]) == list(NAMES)


def test_below_the_minimum_attempts_are_abandoned_for_as_long_as_it_takes_and_nothing_is_released(make_town):
    town = make_town(NAMES[:4])
    town.make_runtime(min_clients=3)
    schedule = Schedule(num_rounds=1, min_clients=3, deadline_s=60.0)
    town.gone = set("ab")

    def at_event(number):
        assert town.coordinator.released is None
        assert len(list(town.coordinator.updates.folder.iterdir())) <= 4  # of this attempt alone
        if town.clock_s >= 600.0:
            town.gone = set()

    town.at_event = at_event
    point = town.train(schedule)
    assert 600.0 < town.clock_s < 670.0
    assert point.history[0].num_clients == 4
    settled = town.coordinator.rounds.settled_since("c", 0)
    assert [one.counted for one in settled] == [False] * 10 + [True]
    assert [one.attempt for one in settled] == list(range(11))


def test_an_abandoned_round_goes_on_to_another_attempt_after_a_restart(make_town):
    town = make_town(NAMES[:3])
    town.make_runtime(min_clients=3)
    schedule = Schedule(num_rounds=1, min_clients=3, deadline_s=60.0)
    town.gone = {"a"}
    town.at_event = kill_at(town, 130.0)
    with pytest.raises(Killed):
        town.train(schedule)
    town.at_event, town.gone = (lambda number: None), set()
    town.restart()
    assert town.train(schedule).history[0].num_clients == 3
    assert town.statuses(Slot(0, 1, "update")) == {"b": "accepted", "c": "accepted"}


def test_an_attempt_that_gets_the_bytes_of_the_one_before_keeps_them_through_a_restart(make_town, tools):
    """One row is the same update whatever the order of rows: what was sent to attempt 0 comes again in attempt 1."""
    town = make_town(NAMES[:3])
    town.data |= {name: tools.data(i, 1) for i, name in enumerate("bc")}
    town.make_runtime(min_clients=3)
    schedule = Schedule(num_rounds=1, min_clients=3, deadline_s=60.0)
    town.gone, again = {"a"}, Slot(0, 1, "update")

    def at_event(number):
        if len(town.statuses(again)) == 2:
            raise Killed

    town.at_event = at_event
    with pytest.raises(Killed):
        town.train(schedule)
    rounds = town.coordinator.rounds
    assert all(rounds.receipt(ONE, name).sha256 == rounds.receipt(again, name).sha256 for name in "bc")
    town.at_event, town.gone = (lambda number: None), set()
    town.restart()
    assert town.train(schedule).history[0].num_clients == 3


def test_answers_that_are_too_few_end_the_run_after_three_attempts(make_town, tools):
    town = make_town(NAMES[:2])
    town.make_runtime(min_clients=3)
    with pytest.raises(RunError, match="enough reports in 3 attempts"):
        town.train(Schedule(num_rounds=1, min_clients=3))


def test_clients_that_come_meanwhile_take_part_in_the_next_attempt(make_town, tools):
    town = make_town(NAMES[:2])
    town.gone = {"a"}
    town.make_runtime(min_clients=2)
    schedule = Schedule(num_rounds=1, min_clients=2, deadline_s=60.0)

    def at_event(number):
        if number == 1:
            town.add("newcomer", tools.data(5))

    town.at_event = at_event
    point = town.train(schedule)
    assert point.history[0].num_clients == 2
    assert set(town.statuses(Slot(0, 1, "update"))) == {"b", "newcomer"}


def kill_at(town, when_s):
    def at_event(number):
        if town.clock_s >= when_s:
            raise Killed

    return at_event


def test_without_a_deadline_a_round_waits_and_says_for_whom(make_town):
    town = make_town(NAMES[:2])
    town.gone = {"b"}
    with pytest.raises(Stuck, match=r"train-0-0-update waits for \['b'\]"):
        town.train(Schedule(num_rounds=1))


# ------------------------------------------------------------------------------------------------------------ status


def test_a_refusal_is_forgotten_with_the_next_report_that_is_accepted(make_town, tools):
    town = make_town(NAMES[:2])
    rows, town.data["a"] = town.data["a"], (tools.data(1)[0].take([]), None)
    town.train(Schedule(num_rounds=2))
    refused = {one["name"]: one["refused"] for one in town.coordinator.status()["clients"]}
    assert refused == {"a": ["round 0: no training examples", "round 1: no training examples"], "b": []}
    town.data["a"] = rows
    town.train(Schedule(num_rounds=3))
    assert all(one["refused"] == [] for one in town.coordinator.status()["clients"])
    assert [entry["client"] for entry in town.runtime.refusals()] == ["a", "a"]
