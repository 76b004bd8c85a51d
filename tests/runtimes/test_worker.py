"""One part of a cohort does its half of a plan: the same bits whoever does it, and rows read and prepared once."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import support
from hansa.aggregators.folds import Tree
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import make_plan, server_round
from hansa.data.block import Block
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.prepare import Standardize
from hansa.data.source import Source
from hansa.learners.linear import LinearLearner
from hansa.runtimes.memory import MemoryStore
from hansa.runtimes.worker import Worker, block_rows, blocks_of, part_rows, parts_of
from hansa.training.simulate import simulate
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK

LOCAL = {"client_learning_rate": 0.05, "local_epochs": 2, "batch_size": 4}
UPDATE, SCORES = Slot(0, 0, "update"), Slot(0, 0, "update", "evaluate")
PEOPLE = support.regression([1 + i % 5 for i in range(40)])
SUMS = {  # counts, sums and sums of squares of three features, as Standardize pools them
    "plain": np.array([2.0] * 3 + [2, 2, 4] + [4, 2, 8]),
    "wider": np.array([2.0] * 3 + [4, 2, 4] + [10, 2, 8]),
}


def plan_of(federation, population=PEOPLE, slot=UPDATE, cohort=None, **constants):
    state, context, _ = support.world(federation, population)
    parts = federation.task(slot.task, 0)
    state = state._replace(transforms=state.transforms[: len(parts.transforms)])
    context = context._replace(constants=constants)
    return make_plan(parts, state, context, cohort or population.ids, slot)


class Counting:
    """A population that counts who was loaded."""

    def __init__(self, population):
        self.population, self.asked = population, []

    def __call__(self, client):
        self.asked.append(client)
        return self.population.load(client)


def worker(federation, load=PEOPLE.load, keep=True):
    return Worker(federation, load, Key.of("secrets"), keep)


def done(own, plan, part, memory=None, scratch=None, width=1000, cohort=PEOPLE.ids):
    places = {client: i for i, client in enumerate(cohort)}
    return own.run(plan, part, places, (memory or MemoryStore()).rows, scratch or {}, width)


# ----------------------------------------------------------------------------------------------------------- parts


@given(count=st.integers(1, 200), width=st.integers(1, 250), data=st.data())
def test_parts_hold_everybody_who_was_asked_once_where_the_cohorts_tree_has_them(count, width, data):
    cohort = tuple(f"c{i}" for i in range(count))
    asked = tuple(c for c in cohort if data.draw(st.booleans()))
    whole, some = parts_of(cohort, cohort, width), parts_of(cohort, asked, width)
    assert tuple(client for part in whole for client in part.clients) == cohort
    assert tuple(client for part in some for client in part.clients) == asked
    assert all(part.clients for part in some)
    tree, by_node = Tree(count), {part.node: part for part in whole}
    for part in (*whole, *some):
        first, last = tree.span(part.node)
        assert (part.first, part.num_cohort) == (first, count)
        assert set(part.clients) <= set(cohort[first:last])
        assert by_node[part.node].clients == cohort[first:last]
        assert len(part.clients) <= max(width, 8)


def test_blocks_are_no_wider_than_was_asked_and_hold_clients_of_one_variant():
    plan = plan_of(support.quadratic())
    assert list(blocks_of(plan, tuple("abcde"), 2)) == [("a", "b"), ("c", "d"), ("e",)]
    mixed = plan._replace(variants={"a": 1, "b": 2, "c": 1, "d": 2, "e": {"rank": 3}})
    assert list(blocks_of(mixed, tuple("abcde"), 4)) == [("a", "c"), ("b", "d"), ("e",)]


@given(num_cohort=st.integers(1, 100_000), num_params=st.sampled_from([1, 3, 2**10, 2**16, 2**22]))
def test_a_part_for_one_of_several_workers_is_a_rule_of_the_cohort_and_the_federation(num_cohort, num_params):
    federation = support.quadratic(num_params=num_params)
    rows = part_rows(federation, num_cohort)
    assert 1 <= rows <= block_rows(federation)
    assert rows == block_rows(federation) or -(-num_cohort // rows) <= 16


# ------------------------------------------------------------------------------------------------------ what comes


def test_rows_of_a_mean_come_as_one_and_those_of_a_median_as_they_are():
    (part,) = parts_of(PEOPLE.ids, PEOPLE.ids, 1000)
    (one,) = done(worker(support.linear()), plan_of(support.linear()), part).reports
    assert (one.payload.folded, one.payload.values.shape, one.clients) == (True, (1, 4), PEOPLE.ids)
    median = support.linear(aggregator=Median())
    rows = done(worker(median), plan_of(median), part, width=15).reports
    assert [len(report.clients) for report in rows] == [15, 15, 10]
    assert not any(report.payload.folded for report in rows)


@pytest.mark.parametrize("aggregator", [Mean(), Mean(weighting="clients"), Mean(max_weight=2)], ids=repr)
@given(width=st.integers(1, 50), block=st.integers(1, 50), data=st.data())
def test_whoever_does_which_part_the_total_has_the_same_bits(aggregator, width, block, data):
    """Quadratics, of which a block gives the very bits of its rows: any parts, blocks, workers and order of arrival."""
    federation = support.quadratic(SCAFFOLD(client_learning_rate=0.3), aggregator=aggregator)
    plan = plan_of(federation)
    here = tuple(client for client in PEOPLE.ids if data.draw(st.booleans()))
    expected = [worker(federation), parts_of(PEOPLE.ids, here, 1000), 1]
    crew = [worker(federation) for _ in range(3)]
    reports = []
    for part in data.draw(st.permutations(parts_of(PEOPLE.ids, here, width))):
        reports += done(data.draw(st.sampled_from(crew)), plan, part, width=block).reports
    alone = [report for part in expected[1] for report in done(expected[0], plan, part, width=1).reports]
    found, whole = (aggregator.open(PEOPLE.ids, {"update": tuple(some)}) for some in (reports, alone))
    assert found.clients == whole.clients == here
    assert found.values.tobytes() == whole.values.tobytes()
    assert found.weights.tobytes() == whole.weights.tobytes()
    assert {n: c.tobytes() for n, c in found.tail.items()} == {n: c.tobytes() for n, c in whole.tail.items()}


@pytest.mark.parametrize("width", [1, 3, 40])
def test_variants_of_a_part_are_one_sum_in_the_order_of_the_cohort(width):
    class Two(FedAvg):
        def variants(self, state, cohort):
            return {client: i % 2 for i, client in enumerate(cohort)}

    federation = support.quadratic(Two(client_learning_rate=0.3))
    plain = support.quadratic(FedAvg(client_learning_rate=0.3))
    (part,) = parts_of(PEOPLE.ids, PEOPLE.ids, 40)
    (found,) = done(worker(federation), plan_of(federation), part, width=width).reports
    (expected,) = done(worker(plain), plan_of(plain), part).reports
    assert found.clients == expected.clients
    assert found.payload.values.tobytes() == expected.payload.values.tobytes()


def test_a_worker_reads_what_clients_remember_and_hands_back_what_they_will():
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    (part,) = parts_of(PEOPLE.ids[:6], PEOPLE.ids[:6], 6)
    memory, plan, cohort = MemoryStore(), plan_of(federation, cohort=PEOPLE.ids[:6]), PEOPLE.ids[:6]
    own = worker(federation)
    first = done(own, plan, part, memory, cohort=cohort)
    assert memory.kept() == {}  # it is the runtime's, which commits it when the round has counted
    for new in first.remembered:
        memory.put(new.clients, new.arrays)
    assert tuple(client for new in first.remembered for client in new.clients) == cohort
    before = {client: rows["0.residual"].tobytes() for client, rows in memory.kept().items()}
    second = done(own, plan, part, memory, cohort=cohort)
    assert first.reports[0].payload.values.tobytes() != second.reports[0].payload.values.tobytes()
    assert {client: rows["0.residual"].tobytes() for client, rows in memory.kept().items()} == before


def test_what_would_have_travelled_comes_with_a_part():
    own, plan = worker(support.linear()), plan_of(support.linear())
    bodies = [done(own, plan, part).bodies for part in parts_of(PEOPLE.ids, PEOPLE.ids, 10)]
    assert [b.as_json()[0]["count"] for b in bodies] == [10, 10, 10, 10]
    for more in bodies[1:]:
        bodies[0].add(more)
    (part,) = parts_of(PEOPLE.ids, PEOPLE.ids, 40)
    assert bodies[0].as_json() == done(own, plan, part, width=7).bodies.as_json()


def test_what_came_of_a_part_goes_to_another_process():
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    (part, *_) = parts_of(PEOPLE.ids, PEOPLE.ids, 10)
    found = done(worker(federation), plan_of(federation), part)
    there = pickle.loads(pickle.dumps(found))
    assert there.reports[0].payload.values.tobytes() == found.reports[0].payload.values.tobytes()
    assert there.remembered[0].clients == found.remembered[0].clients
    assert there.bodies.as_json() == found.bodies.as_json()


# -------------------------------------------------------------------------------------------------------- refusals


def with_faults():
    clients = {c: PEOPLE.load(c)[0] for c in PEOPLE.ids}
    clients["c3"] = Dataset(np.zeros((0, 3)), np.zeros(0))
    clients["c7"] = Dataset(np.full((2, 3), 1e38, np.float32), np.ones(2))
    return Population(clients)


@pytest.mark.parametrize("transforms", [(), (TopK(fraction=0.4),), (Quantize(bits=8),)], ids=repr)
@pytest.mark.parametrize("width", [1, 5, 40])
def test_who_may_not_count_is_refused_with_the_reason_and_remembers_nothing(transforms, width):
    federation, people = support.linear(transforms=transforms), with_faults()
    plan = plan_of(federation, people)
    found = [done(worker(federation, people.load), plan, p, width=width) for p in parts_of(people.ids, people.ids, 20)]
    reports = [report for one in found for report in one.reports]
    refused = {client: reason for report in reports for client, reason in report.refused.items()}
    assert refused == {"c3": "no training examples", "c7": "update is not finite"}
    healthy = tuple(c for c in people.ids if c not in refused)
    assert tuple(c for report in reports for c in report.clients) == healthy
    remembered = {c for one in found for new in one.remembered if new.arrays for c in new.clients}
    assert remembered == (set(healthy) if transforms == (TopK(fraction=0.4),) else set())
    assert all(np.isfinite(report.payload.values).all() for report in reports)
    counts = {b["kind"]: b["count"] for one in found for b in one.bodies.as_json()}
    assert set(counts) == {"update", "refusal"}
    opened = federation.aggregator.open(people.ids, {"update": tuple(reports)})
    again = [done(worker(federation, people.load), plan, p, width=width) for p in parts_of(people.ids, healthy, 20)]
    expected = federation.aggregator.open(people.ids, {"update": tuple(r for one in again for r in one.reports)})
    np.testing.assert_allclose(opened.values, expected.values, rtol=1e-6, atol=1e-6)
    assert opened.weights.tolist() == expected.weights.tolist()


def test_a_part_of_which_nobody_counts_names_nobody():
    federation, people = support.linear(), with_faults()
    part = next(p for p in parts_of(people.ids, ("c3", "c7"), 20))
    found = done(worker(federation, people.load), plan_of(federation, people), part)
    (report,) = found.reports
    assert (report.clients, set(report.refused), found.remembered) == ((), {"c3", "c7"}, ())


def test_an_error_of_a_users_code_names_its_client():
    class Broken(FedAvg):
        def client_update(self, received, fit, memory):
            if "c5" in fit.clients:
                raise ZeroDivisionError("the scanner was off")
            return super().client_update(received, fit, memory)

    federation = support.quadratic(Broken(client_learning_rate=0.5))
    (part, *_) = parts_of(PEOPLE.ids, PEOPLE.ids, 20)
    with pytest.raises(RunError, match=r"round 0: client 'c5': .*ZeroDivisionError: the scanner was off"):
        done(worker(federation), plan_of(federation), part)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("federation", [support.linear(), support.quadratic()], ids=["blocks", "one by one"])
def test_rows_that_are_kept_are_asked_for_once_and_others_every_time(federation):
    plan, block = plan_of(federation), ("c4", "c1")
    for keep, times in ((True, 1), (False, 3)):
        load = Counting(PEOPLE)
        own = worker(federation, load, keep)
        found = [own.rows(plan, block) for _ in range(3)]
        assert sorted(load.asked) == sorted(block * times)
        for rows in found:
            assert [len(dataset) for dataset in rows] == [5, 2]
            assert isinstance(rows, Block) == hasattr(federation.learner, "columns")


def test_rows_are_held_out_ones_to_evaluate_and_training_ones_else():
    train, test = PEOPLE.load("c4")[0], PEOPLE.load("c2")[0]
    people = Population({"a": (train, test), "b": train})
    for federation in (support.linear(), support.quadratic()):
        own = worker(federation, people.load)
        for _ in range(2):
            learned = own.rows(plan_of(federation, people), ("a", "b"))
            scored = own.rows(plan_of(federation, people, SCORES), ("b", "a"))
            assert [len(rows) for rows in learned] == [5, 5]
            assert [len(rows) for rows in scored] == [0, 3]  # who holds nothing out is scored on nothing
            assert scored[1].x.tolist() == test.x.tolist()


def test_rows_are_prepared_once_for_the_same_sums_and_anew_for_others():
    prepared = []

    class Watched(Standardize):
        def apply(self, dataset, totals):
            prepared.append(len(dataset))
            return super().apply(dataset, totals)

    federation = support.linear(prepare=(Watched(min_rows=1),))
    people = Population({"a": Dataset(np.array([[0.0, 1, 2], [2, 1, 2]]), [0.0, 1.0])})
    own = worker(federation, people.load)
    for _ in range(2):
        found = own.rows(plan_of(federation, people, **{"prepare.0": SUMS["plain"]}), ("a",))
        assert found[0].x[:, 0].tolist() == [-1, 1]
    assert prepared == [2]
    found = own.rows(plan_of(federation, people, **{"prepare.0": SUMS["wider"]}), ("a",))
    assert found[0].x[:, 0].tolist() == [-2, 0]
    assert found.columns["x"][found.starts[0]].tolist() == found[0].x[0].tolist()
    assert prepared == [2, 2]


def test_sums_are_taken_from_rows_as_they_are():
    federation = support.linear(prepare=(Standardize(min_rows=1),))
    people = Population({"a": Dataset(np.array([[np.nan, 1, 2], [2, 1, 2]]), [0.0, 1.0])})
    plan = plan_of(federation, people, Slot(0, 0, "update", "prepare"))
    assert np.isnan(worker(federation, people.load).rows(plan, ("a",))[0].x[0, 0])


@pytest.mark.parametrize("shape", ["datasets", "flat arrays"])
def test_rows_that_are_in_memory_anyway_are_laid_side_by_side_at_once(shape):
    """The same bits as rows that are asked for one client at a time."""
    sizes = [1 + i % 5 for i in range(40)]
    datasets = [PEOPLE.load(c)[0] for c in PEOPLE.ids]
    people = PEOPLE
    if shape == "flat arrays":
        x, y = (np.concatenate([getattr(d, name) for d in datasets]) for name in "xy")
        people = Population.from_arrays(x, y, offsets=np.cumsum([0, *sizes]))
    federation = support.linear(algorithm=FedAvg(**LOCAL))
    ids = people.ids
    expected, found = (worker(federation, load) for load in (people.load, Source(people)))
    first = found.rows(plan_of(federation, people), ids[:1])
    assert first.num_rows == sum(sizes)
    for block in (ids[3:9], ids[::-1], ids[:1]):
        pair = (own.rows(plan_of(federation, people), block) for own in (found, expected))
        for one, other in zip(*pair, strict=True):
            assert (one.x.tolist(), one.y.tolist()) == (other.x.tolist(), other.y.tolist())
    (part,) = parts_of(ids, ids, 1000)
    reports = [done(own, plan_of(federation, people), part, cohort=ids).reports[0] for own in (found, expected)]
    assert reports[0].payload.values.tobytes() == reports[1].payload.values.tobytes()


def test_clients_with_classes_are_laid_side_by_side_at_once_too():
    people = support.classes()
    federation = support.linear(learner=LinearLearner(num_features=3, num_classes=2))
    own = worker(federation, Source(people))
    assert own.rows(plan_of(federation, people), people.ids[:1]).num_rows == sum(
        len(people.load(client)[0]) for client in people.ids
    )


NARROW, GAPS = Dataset(np.ones((4, 2)), np.ones(4)), Dataset(np.full((4, 3), np.nan), np.ones(4))
FAULTS = {
    "narrow": (NARROW, "client 'bad': expected 3 features"),
    "gaps": (GAPS, "client 'bad': expected finite numbers in x"),
    "no labels": (Dataset(np.ones((4, 3))), "client 'bad': expected labels y"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["training", "held-out"])
def test_a_client_whose_rows_the_learner_cannot_use_is_named_wherever_they_lie(fault, side):
    good, (bad, says) = PEOPLE.load("c4")[0], FAULTS[fault]
    clients = {f"c{i}": (good, good) for i in range(6)}
    clients["bad"] = (bad, good) if side == "training" else (good, bad)
    people, federation = Population(clients), support.linear()
    slot = UPDATE if side == "training" else SCORES
    for load in (people.load, Source(people)):
        own = worker(federation, load)
        own.rows(plan_of(federation, people), ("c1", "c2"))
        with pytest.raises(InputError, match=says):
            own.rows(plan_of(federation, people, slot), ("c1", "bad"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("side", ["training", "held-out"])
def test_a_run_names_a_client_whose_rows_it_cannot_use_however_late_it_comes(fault, side):
    """Beyond the first hundred, whom a simulation looks at before round 0."""
    good, (bad, says) = PEOPLE.load("c4")[0], FAULTS[fault]
    clients = {f"c{i}": (good, good) for i in range(110)}
    clients["bad"] = (bad, good) if side == "training" else (good, bad)
    with pytest.raises(InputError, match=says):
        simulate(support.linear(), Population(clients), num_rounds=1)


# -------------------------------------------------------------------------------------------------- a whole round


def test_a_round_by_workers_that_share_a_cohort_is_the_round_of_one():
    """As a runtime with several workers does it: parts of the plan to whoever is free, memory with the runtime."""
    federation = support.quadratic(SCAFFOLD(client_learning_rate=0.3), transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, PEOPLE, 1)
    crew, turn = [worker(federation) for _ in range(3)], [0]

    class Shared(type(site)):
        def _reports(self, plan, cohort, clients):
            self.traffic.down(plan, clients)
            places = {client: i for i, client in enumerate(cohort)}
            for part in reversed(parts_of(cohort, clients, 5)):
                turn[0] += 1
                own = crew[turn[0] % 3]
                yield from self.take(plan.slot, own.run(plan, part, places, self.memory.rows, {}, 5))

    shared = Shared(federation, None, Key.of("secrets"), 5)
    states = [state, state]
    for number in range(3):
        slot = Slot(number, 0, "")
        states = [
            server_round(federation.task("train"), own, runtime, PEOPLE.ids, context, slot)[0]
            for own, runtime in zip(states, (site, shared), strict=True)
        ]
    assert states[0].algorithm["params"].tobytes() == states[1].algorithm["params"].tobytes()
    kept = [
        {c: {n: a.tobytes() for n, a in rows.items()} for c, rows in runtime.memory.kept().items()}
        for runtime in (site, shared)
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 40
    assert site.traffic.as_json() == shared.traffic.as_json()


def test_rows_that_cannot_be_read_ahead_leave_clients_looked_at():
    """To train, one of two clients cannot be read; then it can, to be scored, and has a feature too few."""
    rows = PEOPLE.load("c0")[0]

    class Failing:
        in_memory, num_failed = ("good", "narrow"), 0

        def __call__(self, client):
            if client == "narrow" and not self.num_failed:
                self.num_failed = 1
                raise OSError("not there")
            return (rows if client == "good" else rows.replace(x=rows.x[:, :2])), None

    federation = support.linear()
    mine = worker(federation, Failing())
    with pytest.raises(OSError, match="not there"):
        mine.rows(plan_of(federation), ("good",))
    with pytest.raises(InputError, match="narrow"):
        mine.rows(plan_of(federation, slot=SCORES), ("narrow",))
