import dataclasses

import numpy as np
import pytest

import support
from hansa.aggregators.median import Median
from hansa.aggregators.sums import Sums
from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.core.round import make_plan, server_round
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.prepare import Standardize
from hansa.runtimes.inprocess import InProcess
from hansa.training.simulate import simulate
from hansa.transforms.sparsify import TopK

EIGHT = support.targets(**{f"c{i}": (i, -i, 2) for i in range(8)})
UPDATE = Slot(0, 0, "update")


@pytest.mark.parametrize("block_size", [0, -1, 2.0, "all", None])
def test_a_block_size_that_cannot_be_is_refused(block_size):
    with pytest.raises(InputError, match=r'InProcess\(block_size=\): expected "auto" or 1 or more'):
        InProcess(block_size=block_size)


@pytest.mark.parametrize(("num_params", "expected"), [(3, 1024), (2**14, 80), (2**16, 20), (2**20, 1), (2**24, 1)])
def test_blocks_are_as_wide_as_their_parameters_fit_a_cache(num_params, expected):
    federation = support.quadratic(num_params=num_params)
    site = InProcess().open(federation, EIGHT.load, Key.of(0))
    assert site.block_size == expected


@pytest.mark.parametrize(("num_params", "expected"), [(3, 16), (2**17, 10), (2**24, 1)])
def test_a_learner_that_does_not_batch_gets_few_clients_at_a_time(num_params, expected):
    class OneByOne(support.QuadraticLearner):
        batches_clients = False

    federation = support.linear(learner=OneByOne(num_params))
    assert InProcess().open(federation, EIGHT.load, Key.of(0)).block_size == expected


def test_plans_reach_only_the_clients_that_were_asked():
    federation = support.quadratic()
    state, context, site = support.world(federation, EIGHT, 2)
    plan = make_plan(federation.task("train"), state, context, EIGHT.ids, UPDATE)
    site.start(plan, ("c5", "c1"))
    reports = list(site.reports(UPDATE))
    assert [c for r in reports for c in r.clients] == ["c5", "c1"]
    assert list(site.reports(UPDATE)) == []


def test_clients_that_will_not_answer_leave_the_others_where_they_stand_in_the_cohort():
    """The sum is the one that the whole cohort's tree gives those who do."""
    people = support.regression([1 + i % 5 for i in range(40)])
    federation = support.linear()
    state, context, site = support.world(federation, people, 8)
    plan = make_plan(federation.task("train"), state, context, people.ids, UPDATE)
    here = tuple(client for i, client in enumerate(people.ids) if i % 3)
    site.start_some(plan, people.ids, here)
    reports = tuple(site.reports(UPDATE))
    assert tuple(c for r in reports for c in r.clients) == here
    assert all(report.payload.folded for report in reports)
    found = federation.aggregator.open(people.ids, {"update": reports})

    rows = dataclasses.replace(federation, aggregator=support.Unsummed())
    _, _, other = support.world(rows, people, 8)
    other.start_some(plan, people.ids, here)
    alone = tuple(other.reports(UPDATE))
    assert not any(report.payload.folded for report in alone)
    expected = federation.aggregator.open(people.ids, {"update": alone})
    assert found.clients == expected.clients == here
    assert found.values.tobytes() == expected.values.tobytes()


def test_a_mean_gets_one_sum_and_whoever_wants_rows_gets_them_part_by_part():
    clients = support.targets(**{f"c{i}": (i, 1, 2) for i in range(40)})
    for federation, sizes in ((support.quadratic(), [40]), (support.quadratic(aggregator=Median()), [10] * 4)):
        state, context, _ = support.world(federation, clients)
        loaded = []
        site = InProcess(block_size=10).open(
            federation, lambda c, to=loaded: to.append(c) or clients.load(c), Key.of(0)
        )
        site.start(make_plan(federation.task("train"), state, context, clients.ids, UPDATE), clients.ids)
        reports = site.reports(UPDATE)
        first = next(reports)
        assert first.payload.folded == (sizes == [40])
        assert loaded == list(clients.ids[: sizes[0]])
        assert [len(r.clients) for r in (first, *reports)] == sizes


def test_of_a_long_cohort_few_sums_are_held_at_a_time(monkeypatch):
    held = []
    add = Sums.add
    monkeypatch.setattr(Sums, "add", lambda self, node, row: (add(self, node, row), held.append(len(self.rows))))
    clients = support.targets(**{f"c{i}": (i, 1, 2) for i in range(100)})
    simulate(support.quadratic(), clients, num_rounds=1, runtime=InProcess(block_size=1))
    assert len(held) == 16  # leaves
    assert max(held) == 4


def test_one_client_knows_nothing_of_anothers_variant_and_blocks_hold_one_variant():
    seen = []

    class Widths(FedAvg):
        def variants(self, state, cohort):
            return {client: int(client[1]) % 2 for client in cohort}

        def client_update(self, received, fit, memory):
            seen.append((fit.clients, fit.variant))
            return super().client_update(received, fit, memory)

    federation = support.quadratic(Widths(client_learning_rate=0.5, local_steps=1))
    state, context, site = support.world(federation, EIGHT, 4)
    _, mean = server_round(federation.task("train"), state, site, EIGHT.ids, context, Slot(0, 0, ""))
    assert seen[-4:] == [(("c0", "c2"), 0), (("c1", "c3"), 1), (("c4", "c6"), 0), (("c5", "c7"), 1)]
    assert mean.clients == EIGHT.ids
    assert mean.variants["c3"] == 1
    np.testing.assert_allclose(mean.values, [1.75, -1.75, 1])


def test_data_are_prepared_once_for_the_same_totals_and_anew_for_others():
    rows = {"a": Dataset(np.array([[0.0, 1, 2], [2, 1, 2]]), [0.0, 1.0])}
    federation = support.linear(prepare=(Standardize(min_rows=1),))
    state, context, site = support.world(federation, Population(rows))
    context = context._replace(constants={"prepare.0": np.array([2.0] * 3 + [2, 2, 4] + [4, 2, 8])})
    plan = make_plan(federation.task("train"), state, context, ("a",), UPDATE)
    first = site.rows(plan, ("a",))[0]
    assert first.x[:, 0].tolist() == [-1, 1]
    assert site.rows(plan, ("a",))[0] is first
    context = context._replace(constants={"prepare.0": np.array([2.0] * 3 + [4, 2, 4] + [10, 2, 8])})
    other = site.rows(make_plan(federation.task("train"), state, context, ("a",), UPDATE), ("a",))[0]
    assert other.x[:, 0].tolist() == [-2, 0]


def test_a_client_of_another_width_is_refused_when_it_first_takes_part():
    federation = support.quadratic()
    clients = Population({"a": Dataset([[1.0, 2, 3]], [0]), "b": Dataset([[1.0, 2]], [0])})
    state, context, site = support.world(federation, clients)
    with pytest.raises(InputError, match="client 'b': expected 3 features"):
        server_round(federation.task("train"), state, site, clients.ids, context, Slot(0, 0, ""))


def test_secrets_come_from_the_runs_key_and_differ_by_name():
    federation = support.quadratic()
    sites = [InProcess().open(federation, EIGHT.load, Key.of(seed)) for seed in (0, 0, 1)]
    keys = [site.once("secret train 0 0", lambda: b"unused") for site in sites]
    assert keys[0] == keys[1] != keys[2]
    assert sites[0].once("secret train 1 0", lambda: b"unused") != keys[0]


def test_settling_commits_the_counted_and_forgets_the_rest():
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, EIGHT, 8)
    site.start(make_plan(federation.task("train"), state, context, EIGHT.ids, UPDATE), EIGHT.ids)
    assert len(list(site.reports(UPDATE))) == 1
    assert site.memory.kept() == {}
    site.settle(UPDATE._replace(exchange=""), ("c1", "c4"))
    assert set(site.memory.kept()) == {"c1", "c4"}
    assert site._pending == site._started == site._scratch == {}


# -------------------------------------------------------------------------------------------------------- traffic


def test_bytes_are_those_of_the_packed_bodies():
    """Each client downloads a plan and the model, and uploads its update: measured against the packing itself."""
    from hansa.core.protocols import Report
    from hansa.wire import pack, pack_report

    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, EIGHT, 8)
    server_round(federation.task("train"), state, site, EIGHT.ids, context, Slot(0, 0, ""))
    bodies = {(b["kind"], b["direction"]): b for b in site.traffic.as_json()}
    row = support.encoded((TopK(fraction=0.4),), support.block(np.zeros((1, 3)), [1], ["c0"], train_loss=[0.0]))[0]
    one = len(pack_report(Report(UPDATE, ("c0",), row), federation.codec(UPDATE)))
    assert bodies["update", "up"] == {"kind": "update", "direction": "up", "count": 8, "bytes": 8 * one}
    assert bodies["model", "down"]["bytes"] == 8 * len(pack(state.algorithm["params"]))
    assert bodies["plan", "down"]["count"] == 8
    assert site.traffic_totals() == (8 * one, bodies["model", "down"]["bytes"] + bodies["plan", "down"]["bytes"])


def test_a_vector_that_a_client_holds_is_not_sent_again():
    federation = support.quadratic()
    state, context, site = support.world(federation, EIGHT, 8)
    for number in range(2):  # the same model twice
        server_round(federation.task("train"), state, site, ("c0", "c1"), context, Slot(number, 0, ""))
    assert {b["kind"]: b["count"] for b in site.traffic.as_json()} == {"model": 2, "plan": 4, "update": 4}
    server_round(federation.task("train"), state, site, ("c1", "c2"), context, Slot(2, 0, ""))
    assert {b["kind"]: b["count"] for b in site.traffic.as_json()}["model"] == 3


def test_a_refusal_is_a_body_too():
    clients = Population({"a": EIGHT.load("c1")[0], "b": Dataset(np.zeros((0, 3)), np.zeros(0))})
    federation = support.quadratic()
    state, context, site = support.world(federation, clients, 8)
    server_round(federation.task("train"), state, site, clients.ids, context, Slot(0, 0, ""))
    counts = {b["kind"]: b["count"] for b in site.traffic.as_json()}
    assert (counts["refusal"], counts["update"], counts["plan"]) == (1, 1, 2)
