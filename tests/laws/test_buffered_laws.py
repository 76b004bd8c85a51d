"""Buffered rounds over the network: the order of arrival is all that matters, and it survives anything."""

from collections import Counter

import numpy as np
import pytest

import support
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.key import Key
from hansa.core.protocols import Memory, Slot
from hansa.core.round import Context, begin, buffered_round, make_plan
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.virtual_time import VirtualTime
from hansa.training.buffered import Buffered
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.sparsify import TopK
from support_devices import Delays
from support_town import Killed, Stuck, Town

LOCAL = {"client_learning_rate": 0.05, "local_epochs": 2, "batch_size": 4}
FEDERATIONS = {
    "FedAvg": support.linear(algorithm=FedAvg(**LOCAL)),
    "SCAFFOLD": support.linear(algorithm=SCAFFOLD(**LOCAL)),
    "SCAFFOLD, TopK": support.linear(algorithm=SCAFFOLD(**LOCAL), transforms=(TopK(fraction=0.4),)),
}
POPULATION = support.regression((7, 1, 12, 5, 3, 9, 2, 4))
DELAYS = {f"c{i}": 1 + 0.37 * i + 2.9 * (i == 7) for i in range(8)}
ROUNDS = 10

every_federation = pytest.mark.parametrize("name", FEDERATIONS)


@pytest.fixture
def make_town(tmp_path):
    made = []

    def make(name, folder="town"):
        data = {client: (POPULATION.load(client)[0], None) for client in POPULATION.ids}
        made.append(Town(tmp_path / folder, FEDERATIONS[name], data, delays=DELAYS))
        return made[-1]

    yield make
    for town in made:
        town.close()


class Given:
    """Clients in this process, one at a time; reports come in the order that is given."""

    def __init__(self, federation, plans, arrivals):
        self.federation, self.plans, self.order, self.memory, self.pending = federation, plans, arrivals, {}, {}

    def arrivals(self, count, refill):
        for slot, client in self.order.pop(0):
            rows, memory = [POPULATION.load(client)[0]], Memory([self.memory.get(client, {})])
            report, new, _ = self.federation.exchange(self.plans[slot], (client,), rows, memory, {}, [Key.of(client)])
            self.pending |= {c: {n: a[i] for n, a in new.arrays.items()} for i, c in enumerate(new.clients)}
            yield report

    def settle(self, slot, counted):
        for client in counted:
            self.memory[client] = {**self.memory.get(client, {}), **self.pending.pop(client, {})}

    def once(self, name, make):
        return Key.of(name)


def in_process(federation, order, buffer):
    """The parameters after buffers of these (slot, client), each list one buffer."""
    parts, plans = federation.task("train"), {}
    context = Context(Key.of(3).child("run"), federation.learner.layout, {}, len(POPULATION))
    params = np.zeros(federation.learner.layout.num_params, np.float32)
    state, runtime = begin(parts, params, federation.update_size()), Given(federation, plans, list(order))
    for number in range(len(order)):
        slot = Slot(number, 0, "update")
        plans[slot] = make_plan(parts, state, context, POPULATION.ids, slot)
        state, _ = buffered_round(
            parts, state, runtime, plans, context, number, buffer_size=buffer.size, staleness=buffer.weight,
            refill=lambda count: None,
        )  # fmt: skip
    return state.algorithm["params"], runtime.memory


def schedule(size=3, num_rounds=ROUNDS, cohort_size=None, **more):
    return Schedule(num_rounds=num_rounds, cohort_size=cohort_size, buffer=Buffered(size=size, **more))


@every_federation
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_run_over_the_network_has_the_bits_of_the_same_arrivals_in_process(make_town, name, size):
    town, plan = make_town(name), schedule(size)
    point = town.train(plan)
    expected, memory = in_process(FEDERATIONS[name], town.buffers(), plan.buffer)
    assert point.state.algorithm["params"].tobytes() == expected.tobytes()
    assert np.abs(expected).max() > 0.05
    town.settle()
    for client in POPULATION.ids:
        kept = town.memory(client)
        assert kept.keys() == memory.get(client, {}).keys()
        assert all(np.array_equal(kept[key], memory[client][key]) for key in kept)


@every_federation
@pytest.mark.parametrize("kills", [[0], [7], range(1, 60, 5), [9, 9, 10, 10, 10, 11]], ids=str)
def test_killed_at_any_event_it_goes_on_to_the_bits_of_the_arrivals_that_were(make_town, name, kills):
    town, plan = make_town(name), schedule()
    point = town.train_through(plan, kills)
    order = town.buffers()
    assert [len(buffer) for buffer in order] == [3] * ROUNDS
    assert point.state.algorithm["params"].tobytes() == in_process(FEDERATIONS[name], order, plan.buffer)[0].tobytes()


@pytest.mark.parametrize("kills", [[5], [8, 13, 21], range(2, 40, 3)], ids=str)
def test_where_everybody_is_at_work_a_killed_run_is_the_undisturbed_one(make_town, kills):
    """Nobody but the one that is free can be asked, hence a restart changes nobody's turn."""
    whole, killed = make_town("SCAFFOLD", "whole"), make_town("SCAFFOLD", "killed")
    first, second = whole.train(schedule()), killed.train_through(schedule(), kills)
    assert killed.buffers() == whole.buffers()
    assert first.state.algorithm["params"].tobytes() == second.state.algorithm["params"].tobytes()


def test_every_update_is_in_one_buffer_at_most_and_every_client_in_a_buffer_once(make_town):
    town = make_town("FedAvg")
    town.train_through(schedule(cohort_size=5, num_rounds=25), range(4, 90, 11))
    order = town.buffers()
    assert max(Counter(report for buffer in order for report in buffer).values()) == 1
    assert all(len({client for _, client in buffer}) == 3 for buffer in order)
    assert max(number - slot.round for number, buffer in enumerate(order) for slot, _ in buffer) > 1


@every_federation
@pytest.mark.parametrize("cohort_size", [4, 8])
def test_the_same_delays_give_the_bits_of_virtual_time(make_town, name, cohort_size):
    town, plan = make_town(name), schedule(cohort_size=cohort_size)
    point = town.train(plan)
    simulated = simulate(
        FEDERATIONS[name], POPULATION, num_rounds=ROUNDS, cohort_size=cohort_size, buffer=plan.buffer, seed=3,
        runtime=VirtualTime(InProcess(block_size=1), devices=Delays(DELAYS)), evaluate_on=POPULATION.load("c0")[0],
    )  # fmt: skip
    assert point.state.algorithm["params"].tobytes() == simulated.parameters.tobytes()
    assert [row.loss for row in point.history] == [row.loss for row in simulated.history]
    assert [row.num_clients for row in point.history] == [row.num_clients for row in simulated.history]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_what_counted_counted_once_and_gives_those_bits(make_town, seed):
    """Clients of random speed go and come back, the coordinator is killed now and then, plans grow too old."""
    draw, name = np.random.default_rng(seed), "SCAFFOLD, TopK"
    town = make_town(name)
    town.delays = {client: float(draw.lognormal(1.5, 1.2)) for client in POPULATION.ids}
    plan = schedule(int(draw.integers(1, 5)), 20, int(draw.integers(4, 9)), max_staleness=int(draw.integers(1, 9)))

    def at_event(number):
        assert closed_too_early(town) == []
        back = {client for client in town.gone if draw.random() < 0.3 or len(town.gone) > 3}
        town.gone = (town.gone - back) | {client for client in POPULATION.ids if draw.random() < 0.04}
        town.poll(*(client for client in back if not town.is_busy(client)))
        if draw.random() < 0.1:
            raise Killed

    town.at_event = at_event
    while (point := trained(town, plan)) is None:
        town.restart()
    order = town.buffers()
    assert [len(buffer) for buffer in order] == [plan.buffer.size] * 20
    assert max(Counter(report for buffer in order for report in buffer).values()) == 1
    assert all(len({client for _, client in buffer}) == len(buffer) for buffer in order)
    late = [number - slot.round for number, buffer in enumerate(order) for slot, _ in buffer]
    assert 0 <= min(late) <= max(late) <= plan.buffer.max_staleness
    assert point.state.algorithm["params"].tobytes() == in_process(FEDERATIONS[name], order, plan.buffer)[0].tobytes()
    vectors = list(town.coordinator.models.folder.iterdir())  # two a plan, and the released model
    assert len(vectors) <= 2 * len(town.runtime.plans) + 1


def closed_too_early(town):
    """Whose report to a closed slot is waited for, or waits to be counted."""
    with town.coordinator.store.read() as db:
        return db.exec_driver_sql(
            "SELECT slot, client FROM assignments JOIN slots ON slots.id = slot_id LEFT JOIN reports "
            "USING (slot_id, client) WHERE buffered AND state IN ('aggregated', 'abandoned') AND NOT given_up "
            "AND (status IS NULL OR (status = 'accepted' AND counted_in IS NULL))"
        ).fetchall()


def trained(town, plan):
    """Where training stands at its end; None where it was killed, or where everybody who could answer was gone."""
    try:
        return town.train(plan)
    except Killed:
        return None
    except Stuck:
        town.gone = set()
        return None
