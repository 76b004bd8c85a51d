import math
from dataclasses import replace

import numpy as np
import pytest

import support
from hansa.aggregators.krum import Krum
from hansa.aggregators.secure_mean import SecureMean
from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import CheckError, InputError, RunError
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.prepare import Standardize
from hansa.data.sampling import Poisson
from hansa.learners.linear import LinearLearner
from hansa.runtimes.inprocess import InProcess
from hansa.training.apps import App
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.clip import Clip

POPULATION = support.regression()
EMPTY = Dataset(np.zeros((0, 3), np.float32), np.zeros(0, np.float32))


def timeless(run):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


# ------------------------------------------------------------------------------------------------ a run and its rows


def test_a_run_of_two_clients_by_hand():
    """Rate 1/2 towards (1, 0, 2) and (3, 4, 0): the model is (1, 1, .5), then (1.5, 1.5, .75)."""
    two = support.targets(a=(1, 0, 2), b=(3, 4, 0))
    run = simulate(support.quadratic(), two, num_rounds=2)
    assert run.parameters.tolist() == [1.5, 1.5, 0.75]
    assert [row.round for row in run.history] == [0, 1]
    assert [row.num_clients for row in run.history] == [2, 2]
    assert run.history[0].loss == 7.5  # where nobody holds rows out: the loss met in training
    assert run.info["scored_on"] == "the rows trained on"
    assert run.clients[0]["client"] == "a"
    assert run.clients[0]["num_examples"] == 1


def test_a_run_learns_and_scores_on_rows_held_out_by_the_clients_names():
    run = simulate(support.linear(), POPULATION, num_rounds=30, holdout=0.25)
    assert run.history[-1].loss < run.history[0].loss / 4
    assert run.history[-1].metrics["r2"] > 0.8
    assert run.info["scored_on"] == "the clients' held-out rows"
    assert [(row["num_examples"], row["num_test"]) for row in run.clients] == [(5, 2), (1, 0), (9, 3), (4, 1)]
    assert math.isnan(run.clients[1]["loss"])
    assert math.isfinite(run.clients[0]["loss"])
    weighted = sum(row["loss"] * row["num_test"] for row in run.clients if row["num_test"]) / 6
    assert run.final["loss"] == pytest.approx(weighted)


def test_a_clients_own_test_rows_are_used_instead_of_a_holdout():
    rows = POPULATION.load("c2")[0]
    pairs = {"a": (rows.take(range(9)), rows.take(range(9, 12))), "b": POPULATION.load("c0")[0]}
    run = simulate(support.linear(), pairs, num_rounds=1)
    assert [(row["num_examples"], row["num_test"]) for row in run.clients] == [(9, 3), (7, 0)]


def test_held_out_rows_are_never_trained_on():
    """A row that would ruin the model, held out by name, leaves it as it was."""
    from hansa.core.key import Key
    from hansa.data.dataset import hold_out

    rows = POPULATION.load("c2")[0]
    _, test = hold_out(Dataset(np.arange(12.0)[:, None], rows.y), 0.25, Key.of("holdout").child("a"))
    spoiled = rows.y.copy()
    spoiled[test.x[:, 0].astype(int)] = 1e6
    clean, ruined = (
        simulate(support.linear(), {"a": Dataset(rows.x, y)}, num_rounds=2, holdout=0.25) for y in (rows.y, spoiled)
    )
    assert clean.parameters.tobytes() == ruined.parameters.tobytes()
    assert ruined.history[-1].loss > 1e10


def test_the_servers_own_data_score_every_round_when_given():
    mine = POPULATION.load("c2")[0]
    run = simulate(support.linear(), POPULATION, num_rounds=3, evaluate_on=mine)
    assert run.info["scored_on"] == "the server's own data"
    assert run.history[-1].loss == pytest.approx(run.evaluate(mine)["loss"])
    assert run.final["loss"] == run.history[-1].loss


def test_rounds_are_scored_as_often_as_asked_and_the_first_and_last_always():
    run = simulate(support.linear(), POPULATION, num_rounds=5, holdout=0.25, evaluate_every=2)
    known = [math.isfinite(row.metrics["r2"]) for row in run.history]
    assert known == [True, True, False, True, True]


def test_a_function_sees_every_row_and_stops_the_run_with_false():
    seen = []

    def stop(row):
        seen.append(row.round)
        return row.round < 2

    run = simulate(support.linear(), POPULATION, num_rounds=10, on_round=stop)
    assert seen == [0, 1, 2]
    assert len(run.history) == run.info["rounds_done"] == 3
    assert run.info["num_rounds"] == 10
    assert run.parameters.tobytes() == simulate(support.linear(), POPULATION, num_rounds=3).parameters.tobytes()


def test_a_function_that_returns_nothing_does_not_stop_the_run():
    assert len(simulate(support.linear(), POPULATION, num_rounds=3, on_round=lambda row: None).history) == 3


def test_a_cohort_is_drawn_anew_every_round_from_the_seed():
    points = support.targets(**{f"c{i}": (i, 1, 2) for i in range(9)})
    runs = [simulate(support.quadratic(), points, num_rounds=4, cohort_size=3, seed=seed) for seed in (0, 0, 1)]
    assert timeless(runs[0]) == timeless(runs[1])
    assert runs[0].parameters.tolist() != runs[2].parameters.tolist()
    assert {row.num_clients for row in runs[0].history} == {3}


def test_bytes_of_a_round_are_what_travelled_in_it():
    run = simulate(support.linear(), POPULATION, num_rounds=3, holdout=0.25)
    kinds = {(b["kind"], b["direction"]): b for b in run.info["bodies"]}
    assert set(kinds) == {("plan", "down"), ("model", "down"), ("update", "up"), ("metrics", "up")}
    assert kinds["update", "up"]["count"] == 12
    up = sum(body["bytes"] for (_, direction), body in kinds.items() if direction == "up")
    assert 0 < sum(row.bytes_up for row in run.history) <= up
    assert run.history[1].bytes_up == run.history[2].bytes_up


# ------------------------------------------------------------------------------------------------ apps and schedules


def app(**options):
    return App(
        federation=support.linear(), schedule=Schedule(num_rounds=3, cohort_size=2), population=lambda: POPULATION,
        **options,
    )  # fmt: skip


def test_an_app_brings_its_schedule_population_and_holdout():
    run = simulate(app(holdout=0.25), seed=1)
    same = simulate(support.linear(), POPULATION, num_rounds=3, cohort_size=2, holdout=0.25, seed=1)
    assert run.parameters.tobytes() == same.parameters.tobytes()
    assert timeless(run) == timeless(same)


def test_what_is_given_beside_an_app_comes_before_its_own():
    other = support.regression(seed=5)
    run = simulate(app(holdout=0.25), other, num_rounds=2, holdout=0.0, cohort_size=None)
    assert len(run.history) == 2
    assert run.info["scored_on"] == "the rows trained on"
    assert run.history[0].num_clients == 2  # None leaves the app's own


def test_an_apps_evaluation_data_are_made_when_it_runs():
    run = simulate(app(evaluate_on=lambda: POPULATION.load("c2")[0]))
    assert run.info["scored_on"] == "the server's own data"


def test_a_mapping_is_a_population():
    assert len(simulate(support.linear(), {"a": POPULATION.load("c0")[0]}, num_rounds=1).clients) == 1


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (support.linear(), {}, "expected num_rounds=, found none; give num_rounds=50"),
        (support.linear(), {"num_rounds": 3, "rounds": 4}, r"unknown options \['rounds'\]; a schedule has num_rounds"),
        (support.linear(), {"num_rounds": 0}, r"Schedule\(num_rounds=\)"),
        (support.linear(), {"num_rounds": 1, "holdout": 1.5}, "holdout: expected a share"),
        (support.linear(), {"num_rounds": 1, "runtime": "ray"}, r"simulate\(runtime=\): expected hansa\.InProcess\(\)"),
        ("federation", {"num_rounds": 1}, r"expected a hansa\.Federation or hansa\.App, found str"),
        (None, {"num_rounds": 1}, "found NoneType"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given, options, says):
    with pytest.raises(InputError, match=says):
        simulate(given, POPULATION, **options)


@pytest.mark.parametrize(
    ("population", "says"),
    [(None, "found NoneType; give hansa.Population"), ([1], "found list"), ({}, "at least one client")],
)
def test_a_population_that_is_none_is_refused(population, says):
    with pytest.raises(InputError, match=says):
        simulate(support.linear(), population, num_rounds=1)


def test_an_app_without_a_population_says_what_to_give():
    with pytest.raises(InputError, match="give --data DIR, or population= in the app"):
        simulate(App(federation=support.linear(), schedule=Schedule(num_rounds=1)))


def test_a_federation_that_does_not_fit_is_refused_before_any_client_is_loaded():
    def never():
        raise AssertionError("loaded")

    with pytest.raises(CheckError, match="has no learning rate"):
        simulate(support.linear(algorithm=FedAvg()), {"a": never}, num_rounds=1)
    with pytest.raises(CheckError, match="min_clients is 3, and there are 1 clients"):
        simulate(support.linear(), {"a": never}, num_rounds=1, min_clients=3)


# -------------------------------------------------------------------------------------------------------- start_from


def test_a_run_can_start_from_a_run_a_path_or_a_vector(tmp_path):
    first = simulate(support.linear(), POPULATION, num_rounds=2)
    folder = first.save(tmp_path / "first")
    starts = [
        first,
        folder,
        str(folder),
        folder / "parameters.safetensors",
        first.parameters,
        first.parameters.tolist(),
    ]
    runs = [simulate(support.linear(), POPULATION, num_rounds=1, start_from=start) for start in starts]
    assert len({run.parameters.tobytes() for run in runs}) == 1
    assert runs[0].history[0].loss < first.history[0].loss
    assert first.parameters.tobytes() == simulate(support.linear(), POPULATION, num_rounds=2).parameters.tobytes()


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (np.zeros(3), r"expected a run, a path or \(4,\) values, found \(3,\)"),
        ("no/such/run", "expected parameters to read"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(start, says):
    with pytest.raises(InputError, match=says):
        simulate(support.linear(), POPULATION, num_rounds=1, start_from=start)


def test_a_start_of_another_model_is_refused():
    other = simulate(support.quadratic(), support.targets(a=(1, 0, 2)), num_rounds=1)
    with pytest.raises(InputError, match="missing"):
        simulate(support.linear(), POPULATION, num_rounds=1, start_from=other)


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_another_runs_checkpoint_is_refused(tmp_path):
    path = tmp_path / "point"
    simulate(support.linear(), POPULATION, num_rounds=1, checkpoint=path)
    for options in ({"seed": 1}, {"cohort_size": 2}):
        with pytest.raises(InputError, match="expected one of this federation, schedule, population and seed"):
            simulate(support.linear(), POPULATION, num_rounds=2, checkpoint=path, **options)
    with pytest.raises(InputError, match="expected one of this federation"):
        simulate(support.linear(aggregator=Krum(num_byzantine=0)), POPULATION, num_rounds=2, checkpoint=path)
    (tmp_path / "other").write_bytes(b"text")
    with pytest.raises(InputError, match="expected a checkpoint of hansa"):
        simulate(support.linear(), POPULATION, num_rounds=2, checkpoint=tmp_path / "other")


def test_a_rate_that_is_a_function_does_not_keep_another_process_from_going_on(tmp_path):
    """Its address in memory is not part of what a checkpoint belongs to."""

    def federation():
        return support.linear(algorithm=FedAvg(client_learning_rate=lambda number: 0.1 / (1 + number), local_steps=1))

    keep = [federation() for _ in range(3)]
    simulate(keep[0], POPULATION, num_rounds=1, checkpoint=tmp_path / "point")
    resumed = simulate(keep[1], POPULATION, num_rounds=3, checkpoint=tmp_path / "point")
    assert resumed.parameters.tobytes() == simulate(keep[2], POPULATION, num_rounds=3).parameters.tobytes()


def test_a_finished_run_is_given_back_from_its_checkpoint(tmp_path):
    first = simulate(support.linear(), POPULATION, num_rounds=3, holdout=0.25, checkpoint=tmp_path / "point")
    rounds = []
    again = simulate(
        support.linear(), POPULATION, num_rounds=3, holdout=0.25, checkpoint=tmp_path / "point", on_round=rounds.append
    )
    assert rounds == []
    assert again.parameters.tobytes() == first.parameters.tobytes()
    assert timeless(again) == timeless(first)
    assert again.final == first.final


# ---------------------------------------------------------------------------------------------------------- baselines


def test_baselines_compare_alone_federated_and_pooled_on_the_same_held_out_rows():
    run = simulate(support.linear(), support.regression(sizes=(12, 30, 3)), num_rounds=20, holdout=0.3, baselines=True)
    clients, everyone = run.info["baselines"]["clients"], run.info["baselines"]["everyone"]
    assert set(clients) == {"c0", "c1", "c2"}
    for scores in (*clients.values(), everyone):
        assert set(scores) == {"alone", "federated", "pooled"}
        assert all(set(each) == {"loss", "r2"} for each in scores.values())
    assert everyone["federated"]["loss"] == pytest.approx(run.final["loss"])
    assert clients["c2"]["federated"]["loss"] == pytest.approx(run.clients[2]["loss"])
    assert everyone["federated"]["loss"] < everyone["alone"]["loss"]


def test_a_baseline_alone_is_a_federation_of_that_client():
    population = support.regression(sizes=(12, 30, 3))
    run = simulate(support.linear(), population, num_rounds=5, holdout=0.3, baselines=True)
    alone = simulate(support.linear(), {"c1": population.load("c1")[0]}, num_rounds=5, holdout=0.3)
    assert run.info["baselines"]["clients"]["c1"]["alone"]["loss"] == pytest.approx(alone.final["loss"])


def test_the_pool_takes_as_many_steps_as_the_cohort():
    """Two equal clients of 2 steps, by hand: pooled takes 4 steps a round, each halving the way to the target."""
    rows = Dataset([[8.0, 0, 0]] * 2, [0, 0])
    federation = support.quadratic(FedAvg(client_learning_rate=0.5, local_steps=2))
    run = simulate(federation, {"a": (rows, rows), "b": (rows, rows)}, num_rounds=1, baselines=True)
    everyone = run.info["baselines"]["everyone"]
    assert everyone["alone"]["loss"] == everyone["federated"]["loss"] == (8 / 4) ** 2 / 2
    assert everyone["pooled"]["loss"] == (8 / 16) ** 2 / 2


def test_a_client_alone_is_hidden_in_no_sum():
    population = support.regression(sizes=(12, 30, 9))
    secure = replace(support.linear(), transforms=(Clip(norm=100.0),), aggregator=SecureMean())
    plain, hidden = (
        simulate(federation, population, num_rounds=2, holdout=0.3, baselines=True).info["baselines"]["clients"]
        for federation in (support.linear(), secure)
    )
    for client, scores in plain.items():
        assert hidden[client]["alone"] == scores["alone"]
        assert hidden[client]["pooled"] == scores["pooled"]


def test_baselines_without_held_out_rows_are_refused_with_what_to_give():
    with pytest.raises(InputError, match=r"baselines: expected rows held out.*give holdout=0\.2"):
        simulate(support.linear(), POPULATION, num_rounds=1, baselines=True)


def test_a_client_without_rows_has_no_model_alone():
    clients = {"a": POPULATION.load("c2")[0], "b": (EMPTY, POPULATION.load("c0")[0])}
    run = simulate(support.linear(), clients, num_rounds=2, holdout=0.3, baselines=True)
    assert math.isnan(run.info["baselines"]["clients"]["b"]["alone"]["loss"])
    assert math.isfinite(run.info["baselines"]["clients"]["b"]["federated"]["loss"])


# ----------------------------------------------------------------------------------------------- what cannot be used


def test_all_clients_empty_is_said_in_one_sentence():
    for cohort_size in (None, 1):
        with pytest.raises(InputError, match="expected training examples, found none at any of the 2 clients; look at"):
            simulate(support.linear(), {"a": EMPTY, "b": EMPTY}, num_rounds=1, cohort_size=cohort_size)


def test_empty_and_one_example_clients_are_ordinary():
    clients = {"a": EMPTY, "b": POPULATION.load("c1")[0], "c": POPULATION.load("c2")[0]}
    run = simulate(support.linear(prepare=(Standardize(min_rows=1),)), clients, num_rounds=3, holdout=0.25)
    assert [row.num_clients for row in run.history] == [2, 2, 2]
    assert [row["num_examples"] for row in run.clients] == [0, 1, 9]


def test_a_cohort_of_none_but_empty_clients_changes_nothing():
    """Drawn two at a time from three empty ones and one other, some cohorts hold nobody who can learn."""
    clients = {"a": EMPTY, "b": EMPTY, "c": EMPTY, "d": POPULATION.load("c2")[0]}
    run = simulate(support.linear(), clients, num_rounds=12, cohort_size=2)
    assert {row.num_clients for row in run.history} == {0, 1}


def test_missing_values_are_refused_with_the_preparation_to_add():
    holes = Dataset(np.array([[1.0, np.nan, 2.0], [0, 1, 2]]), np.zeros(2))
    with pytest.raises(InputError, match=r"client 'b': expected finite numbers in x, found 1 missing.*Standardize"):
        simulate(support.linear(), {"a": POPULATION.load("c0")[0], "b": holes}, num_rounds=1)
    federation = support.linear(prepare=(Standardize(impute="mean", min_rows=1),))
    run = simulate(federation, {"a": POPULATION.load("c0")[0], "b": holes}, num_rounds=2)
    assert np.isfinite(run.parameters).all()


def test_a_client_with_another_feature_count_is_refused_by_name():
    narrow = Dataset(np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(InputError, match="client 'b': expected 3 features a row, found 2 features"):
        simulate(support.linear(), {"a": POPULATION.load("c0")[0], "b": narrow}, num_rounds=1)


def test_another_feature_count_is_refused_before_a_preparation_too():
    narrow = Dataset(np.zeros((2, 2)), np.zeros(2))
    federation = support.linear(prepare=(Standardize(min_rows=1),))
    with pytest.raises(InputError, match="client 'b'"):
        simulate(federation, {"a": POPULATION.load("c0")[0], "b": narrow}, num_rounds=1)


def test_a_rate_at_which_everyone_diverges_is_said_in_one_sentence():
    federation = support.linear(algorithm=FedAvg(client_learning_rate=1e4, local_steps=50))
    with pytest.raises(RunError, match=r"every client was refused: update is not finite; lower client_learning_rate"):
        simulate(federation, POPULATION, num_rounds=3)


def test_a_cohort_that_is_too_small_for_its_rule_is_refused_with_what_it_needs():
    federation = support.linear(aggregator=Krum(num_byzantine=1))
    with pytest.raises(CheckError, match=r"Krum needs 5 clients a round, and 4 take part"):
        simulate(federation, POPULATION, num_rounds=1)


def test_a_round_with_fewer_reports_than_the_minimum_is_not_counted():
    clients = {"a": Dataset([[1.0, 2, 3]], [1.0]), "b": Dataset(np.zeros((0, 3)), np.zeros(0))}
    with pytest.raises(RunError, match=r"lower min_clients"):
        simulate(support.linear(), clients, num_rounds=1, min_clients=2)
    assert simulate(support.linear(), clients, num_rounds=1, min_clients=1).history[0].num_clients == 1


def test_labels_that_differ_between_clients_are_refused_by_name():
    learner = LinearLearner(num_features=3, num_classes=2)
    rows = support.classes().load("c0")[0]
    other = Dataset(rows.x, rows.y + 1)
    with pytest.raises(InputError, match=r"client 'b': expected labels 0\.\.1"):
        simulate(support.linear(learner=learner), {"a": rows, "b": other}, num_rounds=1)


def test_what_a_clients_function_raises_names_the_client():
    def broken():
        raise OSError("no such disk")

    with pytest.raises(InputError, match="client 'b': expected its function to load data, found OSError: no such disk"):
        simulate(support.linear(), {"a": POPULATION.load("c0")[0], "b": broken}, num_rounds=1)


# ------------------------------------------------------------------------------------------------------- what is said


def test_run_info_says_what_ran():
    run = simulate(support.linear(), POPULATION, num_rounds=2, cohort_size=3, seed=9, runtime=InProcess(block_size=2))
    info = run.info
    assert (info["seed"], info["num_rounds"], info["rounds_done"], info["num_clients"], info["num_params"]) == (
        9, 2, 2, 4, 4
    )  # fmt: skip
    assert info["runtime"] == "InProcess(block_size=2)"
    assert info["schedule"]["cohort_size"] == 3
    assert info["federation"]["learner"].startswith("LinearLearner(num_features=3")
    assert info["federation"]["algorithm"].startswith("FedAvg(client_learning_rate=0.05")
    assert info["refused"] == []
    assert info["privacy"] is info["baselines"] is None


def test_a_preparation_that_found_something_odd_says_so():
    flat = {c: Dataset(np.hstack([POPULATION.load(c)[0].x[:, :2], np.ones((len(POPULATION.load(c)[0]), 1))]),
                       POPULATION.load(c)[0].y) for c in POPULATION.ids}  # fmt: skip
    run = simulate(support.linear(prepare=(Standardize(min_rows=1),)), Population(flat), num_rounds=1)
    assert any("one value everywhere in column 2" in note for note in run.info["notes"])


def test_preparing_changes_nothing_but_scale_and_is_applied_to_what_is_predicted():
    """Features far from the origin: prepared, the same rate learns; predictions take raw features."""
    moved = {c: Dataset(POPULATION.load(c)[0].x * 100 + 500, POPULATION.load(c)[0].y) for c in POPULATION.ids}
    federation = support.linear(prepare=(Standardize(min_rows=1),))
    run, plain = (simulate(federation, data, num_rounds=20) for data in (moved, POPULATION))
    np.testing.assert_allclose(run.parameters, plain.parameters, atol=1e-3)
    rows = POPULATION.load("c2")[0]
    np.testing.assert_allclose(run.predict(rows.x * 100 + 500), plain.predict(rows.x), atol=1e-2)


def test_a_poisson_cohort_may_be_empty_in_the_first_round():
    points = support.targets(**{f"c{i}": (i, 1, 2) for i in range(4)})
    runs = [
        simulate(support.quadratic(), points, num_rounds=1, cohort_size=1, sampler=Poisson(), seed=seed)
        for seed in range(12)
    ]
    empty = [run for run in runs if run.history[0].num_clients == 0]
    assert 0 < len(empty) < 12
    assert all((run.parameters == 0).all() for run in empty)
