"""The laws of a runtime, asked of everything that can travel through it: a new part is one line of ``FEDERATIONS``."""

import dataclasses

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.aggregators.secure_mean import SecureMean
from hansa.algorithms.fedavg import FedAvg
from hansa.core.protocols import Slot
from hansa.core.round import make_plan, server_round
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.sampling import Poisson
from hansa.runtimes.inprocess import InProcess
from hansa.training.history import write_csv
from hansa.training.simulate import simulate
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from support_federations import FEDERATIONS, LOCAL

FEDERATIONS = FEDERATIONS | {
    "TopK": support.linear(transforms=(TopK(fraction=0.4),)),
    "Quantize": support.linear(transforms=(Quantize(bits=4),)),
}
SIZES = (7, 1, 12, 5, 3, 9, 2, 4, 6, 8, 10, 1, 3, 2, 5, 5, 4, 3)  # a cohort of 17: one leaf holds two
REGRESSION, CLASSES = support.regression(SIZES), support.classes(SIZES)

every_federation = pytest.mark.parametrize("name", FEDERATIONS)


def population(name):
    return CLASSES if name == "classes" else REGRESSION


def run(name, num_rounds=4, block_size="auto", **options):
    return simulate(
        FEDERATIONS[name], population(name), num_rounds=num_rounds, cohort_size=17, seed=3, holdout=0.2,
        runtime=InProcess(block_size=block_size), **options,
    )  # fmt: skip


def timeless(result):
    """A run's history without its stopwatch."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


def assert_same_history(found, expected, tmp_path):
    for name, result in (("found", found), ("expected", expected)):
        write_csv([{**row, "seconds": 0.0} for row in result.history], tmp_path / name)
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


# ----------------------------------------------------------------------------------------------- blocks and seeds


@every_federation
@pytest.mark.parametrize("block_size", [5, "auto"])
def test_wide_blocks_equal_blocks_of_one_client(name, block_size):
    one, wide = run(name, block_size=1), run(name, block_size=block_size)
    atol = 0.05 if "Quantize" in str(FEDERATIONS[name].transforms) else 2e-5  # a rounding may tip over a level
    np.testing.assert_allclose(wide.parameters, one.parameters, atol=atol)
    assert [row["bytes_up"] for row in timeless(wide)] == [row["bytes_up"] for row in timeless(one)]
    assert [row["bytes_down"] for row in timeless(wide)] == [row["bytes_down"] for row in timeless(one)]
    assert np.abs(one.parameters).max() > 0.05


SUMS = [name for name in FEDERATIONS if isinstance(FEDERATIONS[name].aggregator, Mean) and name != "classes"]


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("cohort_size", [9, 17, 40, 200])
def test_where_blocks_are_cut_does_not_change_a_bit_of_a_sum(name, cohort_size):
    """Quadratics, of which a block gives the very bits of its rows: what is left is how rows are added."""
    federation = dataclasses.replace(FEDERATIONS[name], learner=support.QuadraticLearner())
    people = support.regression([1 + i % 5 for i in range(cohort_size + 3)])

    def parameters(block_size):
        site = InProcess(block_size=block_size)
        return simulate(federation, people, num_rounds=2, cohort_size=cohort_size, seed=3, runtime=site).parameters

    expected = parameters(1).tobytes()
    assert all(parameters(size).tobytes() == expected for size in (2, 5, 16, 33, "auto"))


@every_federation
def test_the_same_seed_gives_the_same_bits_twice(name, tmp_path):
    first, second = run(name), run(name)
    assert first.parameters.tobytes() == second.parameters.tobytes()
    assert_same_history(first, second, tmp_path)


@pytest.mark.parametrize("name", [n for n in FEDERATIONS if n != "Krum"])  # it may choose the same full-batch client
def test_another_seed_gives_another_run(name):
    other = simulate(FEDERATIONS[name], population(name), num_rounds=4, cohort_size=17, seed=4, holdout=0.2)
    assert other.parameters.tobytes() != run(name).parameters.tobytes()


# -------------------------------------------------------------------------------------------- others do not matter


def rows_of(federation, clients, cohort, block_size, num_rounds=2):
    """Each client's own last report, as bytes by client, when just ``cohort`` takes part."""
    if isinstance(federation.aggregator, Mean | SecureMean):
        federation = dataclasses.replace(federation, aggregator=support.Unsummed())
    state, context, site = support.world(federation, clients, block_size)
    sent = {}
    for number in range(num_rounds):  # the same plan each time, so that only memory carries over
        plan = make_plan(federation.task("train"), state, context, cohort, Slot(number, 0, "update"))
        site.start(plan, cohort)
        for report in site.reports(plan.slot):
            sent |= {c: report.payload.values[i].tobytes() for i, c in enumerate(report.clients)}
        site.settle(plan.slot, cohort)
    assert set(sent) <= set(cohort)
    assert len(sent) >= len(cohort) - 1
    return sent


@pytest.mark.parametrize("name", [n for n in FEDERATIONS if n not in ("prepared", "classes")])
def test_what_a_client_sends_does_not_depend_on_the_order_of_the_cohort(name):
    ids = REGRESSION.ids[:6]
    assert rows_of(FEDERATIONS[name], REGRESSION, ids, 1) == rows_of(FEDERATIONS[name], REGRESSION, ids[::-1], 1)


@pytest.mark.parametrize("name", ["FedAvg", "SCAFFOLD", "TopK", "Quantize", "SCAFFOLD, TopK, Quantize"])
@pytest.mark.parametrize("fault", ["empty", "not finite"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_refused_client_does_not_disturb_the_others(name, fault, block_size):
    """Quadratics, of which a block gives the very bits of its rows."""
    points = {f"c{i}": Dataset([[float(i), 1.0, -2.0]], [0]) for i in range(6)}
    bad = Dataset(np.zeros((0, 3)), np.zeros(0)) if fault == "empty" else Dataset([[np.inf, 0, 0]], [0])
    federation = dataclasses.replace(FEDERATIONS[name], learner=support.QuadraticLearner())
    with np.errstate(invalid="ignore"):
        disturbed = rows_of(federation, Population({**points, "c2": bad}), tuple(points), block_size)
    healthy = rows_of(federation, Population(points), [c for c in points if c != "c2"], block_size)
    assert disturbed == healthy
    assert len(healthy) == 5


def test_a_refused_client_is_recorded_and_the_round_goes_on():
    clients = {c: REGRESSION.load(c)[0] for c in REGRESSION.ids[:4]}
    clients["c1"] = Dataset(np.full((3, 3), 1e30, np.float32), np.ones(3))
    run = simulate(support.linear(), clients, num_rounds=2)
    reasons = [(r["round"], r["client"], r["reason"]) for r in run.info["refused"]]
    assert reasons == [(0, "c1", "update is not finite"), (1, "c1", "update is not finite")]
    assert [row.num_clients for row in run.history] == [3, 3]
    assert np.isfinite(run.parameters).all()


# ----------------------------------------------------------------------------------------- checkpoints and resuming


class Stop(Exception):
    """The power fails."""


@every_federation
@pytest.mark.parametrize("crash_in", [1, 3])
def test_a_run_that_crashed_and_went_on_has_the_bits_of_one_that_did_not(name, crash_in, tmp_path):
    def fail(row):
        if row.round == crash_in:
            raise Stop

    with pytest.raises(Stop):
        run(name, num_rounds=5, checkpoint=tmp_path / "point", on_round=fail)
    assert (tmp_path / "point").exists() or crash_in == 0
    resumed, whole = run(name, num_rounds=5, checkpoint=tmp_path / "point"), run(name, num_rounds=5)
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    assert_same_history(resumed, whole, tmp_path)
    assert resumed.info["bodies"] == whole.info["bodies"]
    assert resumed.final == whole.final


@pytest.mark.parametrize("name", ["SCAFFOLD", "TopK"])
def test_resuming_without_the_clients_memory_would_be_another_run(name, tmp_path, monkeypatch):
    """So that the law above can fail."""
    from hansa.runtimes.inprocess import InProcessRuntime

    run(name, num_rounds=3, checkpoint=tmp_path / "point")
    monkeypatch.setattr(InProcessRuntime, "restore", lambda self, kept: None)
    forgetful = run(name, num_rounds=5, checkpoint=tmp_path / "point")
    assert forgetful.parameters.tobytes() != run(name, num_rounds=5).parameters.tobytes()


def test_a_run_may_go_on_for_more_rounds_from_its_checkpoint(tmp_path):
    run("SCAFFOLD", num_rounds=2, checkpoint=tmp_path / "point")
    longer = run("SCAFFOLD", num_rounds=5, checkpoint=tmp_path / "point")
    assert longer.parameters.tobytes() == run("SCAFFOLD", num_rounds=5).parameters.tobytes()
    assert len(longer.history) == 5


def test_a_crash_during_the_first_round_repeats_no_preparation(tmp_path):
    def fail(row):
        raise Stop

    with pytest.raises(Stop):
        run("prepared", checkpoint=tmp_path / "point", on_round=fail)
    resumed, whole = run("prepared", checkpoint=tmp_path / "point"), run("prepared")
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    counts = {body["kind"]: body["count"] for body in resumed.info["bodies"]}
    assert counts["statistics"] == 2 * len(SIZES)
    assert resumed.info["bodies"] == whole.info["bodies"]


# ---------------------------------------------------------------------------------------------------- odd cohorts


def test_an_empty_poisson_cohort_changes_nothing_and_is_recorded():
    points = support.targets(**{f"c{i}": (i, 1, 2) for i in range(3)})
    run = simulate(support.quadratic(), points, num_rounds=30, cohort_size=1, sampler=Poisson(), seed=1)
    empty = [row for row in run.history if row.num_clients == 0]
    assert 0 < len(empty) < 30
    assert all(row.bytes_up == 0 for row in empty)
    assert any(row.num_clients > 1 for row in run.history)


def test_memory_is_kept_for_the_clients_that_counted():
    federation = support.linear(algorithm=FedAvg(**LOCAL), transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, REGRESSION, 3)
    lossy = support.Lossy(site, [("before", "update", "c1")])
    state, mean = server_round(
        federation.task("train"), state, lossy, REGRESSION.ids[:4], context, Slot(0, 0, "")
    )  # fmt: skip
    assert set(site.memory.kept()) == set(mean.clients) == {"c0", "c2", "c3"}
    assert site._pending == {}
