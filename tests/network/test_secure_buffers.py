"""Secure sums of buffers over the network: exact, whoever is killed or lost, and nothing is left of them."""

import csv

import numpy as np
import pytest

import hansa
import support
from hansa.aggregators.secure_mean import SecureMean
from hansa.network import failpoints
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import FAILPOINTS
from hansa.training.buffered import Buffered
from hansa.training.schedule import Schedule
from support_town import Killed, Town

TARGETS = {f"c{i}": (float(i), 4.0 - i, 2.0) for i in range(7)}
DELAYS = {f"c{i}": 1 + 0.37 * i + 2.9 * (i == 6) for i in range(7)}
STEPS = ("keys", "shares", "masked", "agree", "unmask")


def federation(**options):
    return support.quadratic(aggregator=SecureMean(bits=24, **options), transforms=(hansa.Clip(norm=32.0),))


@pytest.fixture
def make_town(tmp_path):
    made = []

    def make(folder="town", **options):
        data = {name: (support.targets(**{name: row}).load(name)[0], None) for name, row in TARGETS.items()}
        made.append(Town(tmp_path / folder, federation(**options), data, delays=DELAYS))
        made[-1].make_runtime(deadline_s="auto")
        return made[-1]

    yield make
    for town in made:
        town.close()


def schedule(num_rounds=4, size=4, **buffer):
    return Schedule(num_rounds=num_rounds, buffer=Buffered(size=size, **buffer))


def by_hand(counted, weight, size=4):
    """The parameters after sums of (slot, client): each client goes half of the way from where it began."""
    models = [np.zeros(3)]
    for number, rows in enumerate(counted):
        steps = [weight(number - slot.round) * (np.array(TARGETS[c]) - models[slot.round]) / 2 for slot, c in rows]
        models.append(models[-1] + sum(steps) / len(rows))
    return models[-1]


def leftovers(town):
    """Slots of sums that are not over, plans that could still be shown, and reports that are kept."""
    with town.coordinator.store.read() as db:
        sums = "slot LIKE '%.%' AND "
        open_slots = db.exec_driver_sql(
            f"SELECT slot FROM slots WHERE {sums} state NOT IN ('aggregated', 'abandoned')"
        ).fetchall()
        bodies = db.exec_driver_sql(
            f"SELECT slot FROM assignments JOIN slots ON slots.id = slot_id WHERE {sums} body IS NOT NULL"
        ).fetchall()
    return open_slots, bodies


def test_the_sums_are_exactly_those_of_the_rows_and_nothing_is_left_of_them(make_town):
    """All numbers are short binary fractions, so that neither the grid nor floats round them."""
    town = make_town()
    point = town.train(schedule(staleness=0.0))
    buffers = town.buffers()
    assert max(number - slot.round for number, buffer in enumerate(buffers) for slot, _ in buffer) >= 1
    np.testing.assert_array_equal(point.state.algorithm["params"], by_hand(buffers, lambda late: 1.0))
    assert [row.num_clients for row in point.history] == [4] * 4
    assert leftovers(town) == ([], [])
    at_work = {work.client for work in town.runtime.buffers.at_work()} | town.runtime.buffers.resting()
    assert len(list(town.coordinator.updates.folder.iterdir())) <= len(at_work)
    town.settle()
    for name in TARGETS.keys() - at_work:
        assert town.people[name].store._one("SELECT COUNT(*) FROM attempts")[0] == 0


def test_what_a_client_lists_says_that_no_update_left_it_in_the_clear(make_town):
    town = make_town()
    town.train(schedule(num_rounds=1))
    with (town.folder / "c0" / "sent.csv").open() as file:
        protections = [line["protection"].split(":")[0] for line in csv.DictReader(file)]
    assert protections[:6] == [
        "none needed", "none needed", "sealed for each peer", "SecureMean", "none needed", "shares of masks"
    ]  # fmt: skip


POINTS = [name for name in FAILPOINTS if name.startswith(("coordinator.", "client."))]


@pytest.mark.parametrize("time", [2, *(pytest.param(time, marks=pytest.mark.slow) for time in (1, 5, 13))])
def test_killed_at_every_fail_point_once_it_goes_on_to_the_sums_of_the_arrivals_that_were(make_town, time):
    town, plan, left, died = make_town(), schedule(), dict.fromkeys(POINTS, time), []

    def die(point):
        left[point] = left.get(point, 0) - 1
        if left[point] == 0:
            died.append(point)
            raise Killed

    point = None
    while point is None:
        failpoints.watch(die)
        try:
            point = town.train(plan)
        except Killed:
            failpoints.watch(None)
            town.restart()
            town._due.clear()
            for name, person in town.people.items():
                person.store.close()
                person.store = ClientStore(town.folder / name)
        finally:
            failpoints.watch(None)
    buffers = town.buffers()
    assert [len(buffer) for buffer in buffers] == [4] * 4
    np.testing.assert_allclose(point.state.algorithm["params"], by_hand(buffers, plan.buffer.weight), atol=1e-4)
    assert [row.num_clients for row in point.history] == [4] * 4
    assert len(died) > (20 if time < 10 else 15)
    assert leftovers(town) == ([], [])


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_goes_in_the_middle_of_a_sum_is_waited_for_until_the_deadline_and_the_rest_is_exact(
    make_town, step
):
    town, plan = make_town(), schedule(num_rounds=2, staleness=0.0)

    def at_event(number):
        with town.coordinator.store.read() as db:
            newest = db.exec_driver_sql("SELECT slot FROM slots ORDER BY id DESC LIMIT 1").scalar()
        town.gone = {"c2"} if f"-{step}.0.0" in newest or town.gone else set()

    town.at_event = at_event
    point = town.train(plan)
    counts = step in ("agree", "unmask")
    counted = [[(slot, c) for slot, c in buffer if counts or number or c != "c2"]
               for number, buffer in enumerate(town.buffers())]  # fmt: skip
    assert "c2" in {c for _, c in town.buffers()[0]}
    np.testing.assert_allclose(point.state.algorithm["params"], by_hand(counted, lambda late: 1.0), atol=1e-4)
    assert [row.num_clients for row in point.history] == [4 if counts else 3, 4]


@pytest.mark.parametrize("kills", [(), range(4, 70, 5)], ids=str)
def test_a_sum_of_which_too_few_are_left_counts_nobody_and_another_buffer_is_summed(make_town, kills):
    town, plan, left = make_town(), schedule(num_rounds=2, staleness=0.0), list(kills)

    def at_event(number):
        with town.coordinator.store.read() as db:
            newest = db.exec_driver_sql("SELECT slot FROM slots ORDER BY id DESC LIMIT 1").scalar()
        town.gone = {"c0", "c1", "c2"} if "-masked.0.0" in newest else set()
        if left and number >= left[0]:
            left.pop(0)
            raise Killed

    town.at_event = at_event
    point = None
    while point is None:
        try:
            point = town.train(plan)
        except Killed:
            town.restart()
    _, *others = town.buffers()
    assert len(others) == 2
    np.testing.assert_array_equal(point.state.algorithm["params"], by_hand(others, lambda late: 1.0))
    assert [row.num_clients for row in point.history] == [4, 4]
    assert leftovers(town) == ([], [])


def test_mail_of_a_sum_that_the_disk_has_damaged_begins_another_sum_also_after_a_restart(make_town):
    """What follows from it has been shown to clients: it cannot be made anew, and must not be made otherwise."""
    town, plan = make_town(), schedule(num_rounds=2, staleness=0.0)

    def at_event(number):
        with town.coordinator.store.read() as db:
            newest = db.exec_driver_sql("SELECT slot FROM slots ORDER BY id DESC LIMIT 1").scalar()
            keys = "SELECT sha256 FROM reports JOIN slots ON slots.id = slot_id WHERE slot LIKE '%-keys.1.0'"
            made = [row.sha256 for row in db.exec_driver_sql(keys)]
        if "-masked.1.0" in newest:
            path = town.coordinator.updates.path(made[0])
            path.chmod(0o600)
            path.write_bytes(b"damaged")
            town.at_event = lambda number: None
            raise Killed

    town.at_event = at_event
    with pytest.raises(Killed):
        town.train(plan)
    town.restart()
    point = town.train(plan)
    first, _, last = town.buffers()
    np.testing.assert_array_equal(point.state.algorithm["params"], by_hand([first, last], lambda late: 1.0))
