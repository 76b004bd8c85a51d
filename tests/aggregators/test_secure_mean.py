"""Secure means in simulations: the ideal sums are those of the protocol, near the plain mean, and hidden in history."""

import dataclasses

import numpy as np
import pytest

import hansa
import support
from hansa.aggregators.ideal_sum import ideal
from hansa.core.chain import Limits
from hansa.core.errors import Abandoned, CheckError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot, Updates
from hansa.training.check import leaves, problems
from support_secagg import LIMITS, Table, grid_rows

PEOPLE = support.regression((7, 12, 5, 9, 2, 4, 6))
CLIP = (hansa.Clip(norm=2.0),)


def run(aggregator, people=PEOPLE, num_rounds=3, **options):
    options = {"transforms": CLIP, **options}
    return hansa.simulate(
        support.linear(aggregator=aggregator, **options), people, num_rounds=num_rounds, seed=2, holdout=0.2,
        runtime=hansa.InProcess(block_size=1),
    )  # fmt: skip


@pytest.mark.parametrize(
    "secure",
    [
        hansa.SecureMean(),
        hansa.SecureMean(server="honest", bits=8),
        hansa.SecureMean(weighting="examples", max_weight=6, bits=20),
        hansa.SecureMean(num_groups=2),
        hansa.SecureSum(),
    ],
    ids=repr,
)
def test_the_ideal_functionality_gives_the_bits_of_the_protocol(secure):
    short, whole = run(secure), run(dataclasses.replace(secure, simulate="protocol"))
    assert short.parameters.tobytes() == whole.parameters.tobytes()
    assert np.abs(short.parameters).max() > 0.01
    for a, b in zip(short.history, whole.history, strict=True):
        assert (a.num_clients, a.loss, a.metrics) == (b.num_clients, pytest.approx(b.loss), pytest.approx(b.metrics))


def test_a_secure_mean_is_the_plain_one_up_to_its_grid():
    plain = run(hansa.Mean(weighting="clients"))
    secure = run(hansa.SecureMean(bits=20))
    np.testing.assert_allclose(secure.parameters, plain.parameters, atol=3 * 2.0**-17)
    assert secure.history[-1].loss == pytest.approx(plain.history[-1].loss, abs=1e-4)
    weighted = run(hansa.Mean(max_weight=6))
    secure = run(hansa.SecureMean(bits=20, weighting="examples", max_weight=6))
    np.testing.assert_allclose(secure.parameters, weighted.parameters, atol=3 * 2.0**-15)


def test_metrics_and_losses_are_those_of_all_clients_together():
    plain, secure = run(hansa.Mean(weighting="clients")), run(hansa.SecureMean(bits=20))
    assert secure.final["r2"] == pytest.approx(plain.final["r2"], abs=1e-3)
    assert all(np.isnan(row["r2"]) for row in secure.clients)


def test_a_run_says_that_its_sums_were_ideal_and_what_is_hidden():
    short, whole = run(hansa.SecureMean()), run(hansa.SecureMean(simulate="protocol"))
    assert any("ideal functionality" in note for note in short.info["notes"])
    assert not any("ideal functionality" in note for note in whole.info["notes"])
    for info in (short.info, whole.info):
        assert "sums of at least 5 of 7 clients" in info["secrecy"][0]
        assert "the sum itself may tell" in info["secrecy"][-1]


def test_central_noise_is_sized_for_a_secure_mean_as_for_a_plain_one():
    noisy = (*CLIP, hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-3))
    plain = run(hansa.Mean(weighting="clients"), transforms=noisy)
    secure = run(hansa.SecureMean(bits=20), transforms=noisy)
    assert secure.history[-1].epsilon == plain.history[-1].epsilon
    np.testing.assert_allclose(secure.parameters, plain.parameters, atol=1e-4)
    assert np.isnan(secure.history[-1].loss)
    assert "the sum without it" in secure.info["secrecy"][-1]


@pytest.mark.parametrize("simulate", ["ideal", "protocol"])
def test_a_rule_over_groups_holds_against_liars_that_spoil_a_plain_secure_mean(simulate):
    rows = np.tile(grid_rows(1), (12, 1))
    rows[0] = -np.sign(rows[0])
    true = rows[1]

    def merged(aggregator):
        found = Table(aggregator, rows).play() if simulate == "protocol" else opened(ideal(aggregator), rows)
        return aggregator.reduce([found], [1.0]).values

    robust = hansa.SecureMean(num_groups=4, across=hansa.Median(), bits=20)
    np.testing.assert_allclose(merged(robust), true, atol=1e-5)
    assert np.abs(merged(hansa.SecureMean(bits=20)) - true).max() > 0.05


def opened(aggregator, rows, limits=LIMITS):
    """What the ideal functionality opens."""
    names = tuple(f"c{i:02d}" for i in range(len(rows)))
    fitted, slot = aggregator.fitted(limits), Slot(0, 0, "masked")
    block = Updates(names, np.asarray(rows, np.float32), np.ones(len(rows)))
    payload, _, refused = fitted.answer(
        Plan(slot, True, {}, (), Key.of(0)), block, {}, [Key.of(i) for i in range(len(rows))]
    )
    assert refused == {}
    return fitted.open(names, {"masked": (Report(slot, names, payload),)})


def test_ideal_sums_of_too_few_are_abandoned():
    with pytest.raises(Abandoned, match="at least 5 clients"):
        opened(ideal(hansa.SecureMean(min_survivors=5)), grid_rows(4))
    assert opened(ideal(hansa.SecureMean(min_survivors=4)), grid_rows(4)).weights.tolist() == [4.0]


def test_a_row_beyond_its_bound_is_left_out():
    rows = grid_rows(4)
    rows[2, 0] = 9.0
    names = ("a", "b", "c", "d")
    fitted = ideal(hansa.SecureMean()).fitted(LIMITS)
    block = Updates(names, rows.astype(np.float32), np.ones(4))
    plan = Plan(Slot(0, 0, "masked"), True, {}, (), Key.of(0))
    payload, _, refused = fitted.answer(plan, block, {}, [Key.of(i) for i in range(4)])
    assert payload.clients == ("a", "b", "d")
    assert "coordinates up to 4" in refused["c"]


def problems_of(federation, count=7, **schedule):
    with pytest.raises(CheckError) as raised:
        hansa.simulate(federation, support.regression((4,) * count), num_rounds=2, **schedule)
    return str(raised.value)


def test_what_keeps_secure_sums_from_working_is_said_before_round_0():
    assert "hansa.Clip" in problems_of(support.linear(aggregator=hansa.SecureMean()))
    few = support.linear(aggregator=hansa.SecureMean(num_groups=4), transforms=CLIP)
    assert "needs 2 clients in each of 4 groups, and 1 take part.    cohort_size=8" in problems_of(few)
    small = support.linear(aggregator=hansa.SecureMean(min_survivors=6), transforms=CLIP)
    assert "needs 6 clients, and 3 take part" in problems_of(small, cohort_size=3)
    (unsaid,) = problems(support.linear(aggregator=hansa.SecureMean(), transforms=CLIP), hansa.Schedule(num_rounds=2))
    assert "needs 2 clients, and nothing says that as many will come." in str(unsaid)
    assert "min_clients=2" in str(unsaid)
    robust = hansa.SecureMean(num_groups=3, across=hansa.Median())
    noisy = (*CLIP, hansa.GaussianNoise(noise_multiplier=1.0))
    assert "Median over groups proves no bound" in problems_of(support.linear(aggregator=robust, transforms=noisy))


def test_limits_of_a_chain_without_a_bound_are_infinite():
    assert Limits().value == np.inf


def test_very_long_updates_are_summed_in_groups_of_100():
    assert hansa.SecureMean().sized(1000).group_size is None
    long = hansa.SecureMean().sized(30_000_000)
    assert [long.terms.groups(n) for n in (3, 100, 101, 1000)] == [1, 1, 2, 10]
    assert hansa.SecureMean(group_size=7).sized(30_000_000).group_size == 7


def test_groups_of_a_size_sum_to_the_same():
    rows = grid_rows(13)
    found = Table(hansa.SecureMean(group_size=5), rows).play()
    np.testing.assert_array_equal(found.values[0], rows.sum(axis=0))


def test_the_bytes_of_ideal_sums_are_about_those_of_the_protocol():
    learner = hansa.LinearLearner(num_features=4000, num_classes=2)
    people = {f"c{i}": hansa.Dataset(np.ones((2, 4000), np.float32), np.array([0, 1])) for i in range(6)}
    sent = []
    for simulate in ("ideal", "protocol"):
        secure = hansa.SecureMean(simulate=simulate)
        federation = dataclasses.replace(support.linear(aggregator=secure, transforms=CLIP), learner=learner)
        run = hansa.simulate(federation, people, num_rounds=1)
        bodies = [b for b in run.info["bodies"] if b["direction"] == "up"]
        kinds = {"update", "metrics"} if simulate == "ideal" else {"update", "metrics", "mail"}
        assert {b["kind"] for b in bodies} == kinds
        sent.append(sum(b["bytes"] for b in bodies))
    assert sent[1] < sent[0] < sent[1] + 12 * 2500
    assert sent[1] < 6 * (4001 * 19 / 8 + 5000)


def test_over_selection_loses_clients_that_the_graph_must_bear():
    asked = {"count": 12, "cohort_size": 8, "over_selection": 1.3}
    tight = support.linear(aggregator=hansa.SecureMean(dropout=0.1), transforms=CLIP)
    assert "leaves out 23% of those asked" in problems_of(tight, **asked)
    assert "hansa.SecureMean(dropout=0.24)" in problems_of(tight, **asked)


def test_check_counts_what_masks_add_to_metrics():
    rows = leaves(support.linear(aggregator=hansa.SecureMean(), transforms=CLIP), 0.2)
    assert [row["bytes"] > 2000 for row in rows] == [True, True]
    plain = leaves(support.linear(transforms=CLIP), 0.2)
    assert [row["bytes"] < 1000 for row in plain] == [True, True]
