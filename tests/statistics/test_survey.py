"""Private statistics: each a sum of bounded records, and a survey a run like any other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hansa
from hansa.core.errors import CheckError, InputError
from hansa.privacy import gaussian
from hansa.statistics import Accuracy, Categories, Count, Histogram, Mean, Quantiles, RecordBound, answers, survey

NAMES = ("age", "chol")
STATISTICS = [
    Count(),
    Mean("age", low=0, high=100),
    Mean("chol", low=-3.0, high=-1.0),
    Histogram("age", edges=(0.0, 18.0, 65.0, 100.0)),
    Categories("label", values=(0, 1, 2)),
    Quantiles("chol", low=100, high=600, num_cells=50),
    Accuracy(lambda x: (x[:, 0] > 50).astype(int)),
]
every_statistic = pytest.mark.parametrize("statistic", STATISTICS, ids=lambda s: s.name)
nasty = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=32), st.sampled_from([0.0, 18.0, 100.0, 1e30]))


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    x = np.column_stack([rng.uniform(20, 80, count), rng.normal(240, 40, count)])
    return hansa.Dataset(x, (x[:, 0] > 50).astype(np.int64), feature_names=NAMES)


def hospitals(sizes=(300, 500, 200)):
    return {f"h{i}": rows(size, i) for i, size in enumerate(sizes)}


def run_of(*statistics, population=None, num_rounds=1, seed=0, **options):
    federation = survey(*statistics, **{"noise_multiplier": 1e-6, **options})
    return hansa.simulate(federation, population or hospitals(), num_rounds=num_rounds, seed=seed)


@every_statistic
@given(age=nasty, chol=nasty, label=st.integers(-1, 5))
def test_no_record_is_longer_than_the_statistic_says(statistic, age, chol, label):
    one = hansa.Dataset(np.array([[age, chol]]), np.array([label]), feature_names=NAMES)
    sums = statistic.sums(one)
    assert sums.shape == (statistic.size,)
    assert np.linalg.norm(sums) <= statistic.norm * (1 + 1e-12)


@every_statistic
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(statistic):
    whole = rows(50)
    parts = [whole.take(np.arange(20)), whole.take(np.arange(20, 50)), whole.take([])]
    assert sum(statistic.sums(part) for part in parts) == pytest.approx(statistic.sums(whole))


def test_with_next_to_no_noise_the_answers_are_those_of_the_pooled_rows():
    pooled = hansa.Dataset.concatenate([rows(300, 0), rows(500, 1), rows(200, 2)])
    found = answers(run_of(*STATISTICS))
    age, chol = pooled.x[:, 0], pooled.x[:, 1]
    assert found["count"].value == pytest.approx(1000, abs=0.01)
    assert found["mean of age"].value == pytest.approx(age.mean(), abs=1e-3)
    assert found["mean of chol"].value == pytest.approx(-1.0)  # everything lies above, and is held to the bound
    assert [cell.value for cell in found["histogram of age"]] == pytest.approx(
        np.histogram(age, (0, 18, 65, 100))[0], abs=0.01
    )
    assert found["categories of label"][1].value == pytest.approx(pooled.y.sum(), abs=0.01)
    for share, value in found["quantiles of chol"].items():
        assert value == pytest.approx(np.quantile(chol, share), abs=10)
    assert found["accuracy"].value == pytest.approx(1.0, abs=1e-3)


def test_the_stated_deviation_is_that_of_the_answers():
    found = [answers(run_of(*STATISTICS[:2], noise_multiplier=2.0, seed=seed)) for seed in range(60)]
    for name in ("count", "mean of age"):
        values = np.array([one[name].value for one in found])
        stated = np.median([one[name].deviation for one in found])
        assert 0.7 < values.std() / stated < 1.4


def test_noise_is_sized_for_all_statistics_together_and_costs_its_epsilon():
    run = run_of(*STATISTICS, noise_multiplier=None, epsilon=1.0, delta=1e-6)
    z = gaussian.noise_multiplier(1.0, 1e-6, 1)
    assert run.history[-1].epsilon == pytest.approx(1.0, rel=1e-4)
    assert answers(run)["count"].deviation == pytest.approx(z * math.hypot(*(s.norm for s in STATISTICS)), rel=1e-3)
    facts = run.info["privacy"]["facts"]
    assert facts["unit"] == "one record of one client"
    assert "one record's numbers" in facts["neighbours"]
    assert "own sums before the noise" in run.info["privacy"]["statement"]


def test_more_rounds_are_more_releases_and_their_mean():
    run = run_of(Count(), num_rounds=4, noise_multiplier=3.0)
    assert answers(run)["count"].deviation == pytest.approx(1.5)
    assert "4 noisy sums" in run.info["privacy"]["facts"]["released"]


def test_by_client_each_counts_alike_and_is_hidden_whole():
    sizes = (10, 1000)
    population = {f"c{i}": rows(size, i) for i, size in enumerate(sizes)}
    means = [data.x[:, 0].mean() for data in population.values()]
    run = run_of(Count(), Mean("age", low=0, high=100), population=population, unit="client")
    assert answers(run)["mean of age"].value == pytest.approx(np.mean(means), abs=0.01)
    assert answers(run)["count"].value == pytest.approx(2, abs=0.01)
    assert run.info["privacy"]["facts"]["unit"].startswith("one client")


def test_a_trained_model_is_scored_where_the_rows_are():
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32)
    clients = {name: hansa.Dataset(x, np.array([0, 0, 1, 1])) for name in ("a", "b")}
    learner = hansa.LinearLearner(num_features=1, num_classes=2)
    trained = hansa.simulate(
        hansa.Federation(learner=learner, algorithm=hansa.FedAvg(client_learning_rate=1.0)), clients, num_rounds=5
    )
    found = answers(run_of(Accuracy(trained.predict), population=clients))
    assert found["accuracy"].value == pytest.approx(1.0, abs=1e-3)


def test_missing_values_do_not_count_and_a_column_that_is_not_there_is_a_sentence():
    holey = hansa.Dataset(np.array([[np.nan, 1.0], [30.0, 2.0]]), feature_names=NAMES)
    assert Mean("age", low=0, high=60).sums(holey).tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match=r"client 'h0': expected a column 'bmi', found age, chol"):
        run_of(Mean("bmi", low=0, high=60))
    with pytest.raises(InputError, match="expected labels, found none"):
        Categories("label", values=(0,)).sums(holey)


@pytest.mark.parametrize(
    "make",
    [
        lambda: survey(epsilon=1.0, delta=1e-6),
        lambda: survey(Count(), Count(), epsilon=1.0, delta=1e-6),
        lambda: survey(Count()),
        lambda: survey(Count(), noise_multiplier=1.0, unit="hospital"),
        lambda: Mean("age", low=1, high=1),
        lambda: Histogram("age", edges=(1.0,)),
        lambda: Histogram("age", edges=(1.0, 3.0, 2.0)),
        lambda: Quantiles("age", low=0, high=1, shares=(2.0,)),
        lambda: Quantiles("age", low=0, high=1, num_cells=0),
        lambda: answers(hansa.simulate(_plain(), hospitals(), num_rounds=1)),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(InputError, match="expected"):
        make()


def _plain():
    return hansa.Federation(
        learner=hansa.LinearLearner(num_features=2, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.001),
    )


def test_a_bound_on_records_is_refused_where_nothing_bounds_them():
    federation = hansa.Federation(
        learner=hansa.LinearLearner(num_features=2, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
        transforms=(RecordBound(norm=1.0), hansa.GaussianNoise(noise_multiplier=1.0)),
        aggregator=hansa.Mean(weighting="clients"),
    )
    with pytest.raises(CheckError, match="RecordBound says how far one record moves an update"):
        hansa.simulate(federation, hospitals(), num_rounds=1)


def test_coins_of_clients_are_not_counted_for_records():
    with pytest.raises(CheckError, match="do not hide one record"):
        hansa.simulate(
            survey(Count(), noise_multiplier=1.0), hospitals(), num_rounds=1, cohort_size=2, sampler=hansa.Poisson()
        )
