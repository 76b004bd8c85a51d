"""Clients by id, made when asked for; from a table, a folder, or one dataset cut up."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.data.dataset import Dataset
from hansa.data.ids import NumberedIds
from hansa.data.partition import IID, Dirichlet, Shards
from hansa.data.population import Population


def two():
    return Dataset([[1.0], [2.0]], [0, 1])


def test_a_client_is_a_dataset_a_pair_or_a_function():
    population = Population({"a": two(), "b": (two(), two()), "c": two, "d": lambda: (two(), None)})
    assert population.ids == ("a", "b", "c", "d")
    assert len(population) == 4
    assert [test is None for _, test in map(population.load, population.ids)] == [True, False, True, True]
    assert repr(population) == "Population(4 clients)"


def test_functions_are_called_when_asked_for_and_once():
    calls = []
    population = Population({"a": lambda: calls.append(1) or two()})
    assert calls == []
    assert population.load("a") == population.load("a")
    assert calls == [1]


def test_without_keep_functions_are_called_every_time():
    calls = []
    population = Population({"a": lambda: calls.append(1) or two()}, keep=False)
    population.load("a"), population.load("a")
    assert calls == [1, 1]


def test_an_error_in_a_load_function_names_the_client_and_keeps_its_cause():
    def broken():
        raise KeyError("age")

    with pytest.raises(InputError, match=r"client 'berlin'.*KeyError: 'age'") as raised:
        Population({"berlin": broken}).load("berlin")
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("clients", "sentence"),
    [
        ({}, "at least one client"),
        ({"": two()}, "found ''"),
        ({3: two()}, "found 3"),
        ({"a": [[1.0]]}, "client 'a': expected a Dataset.* found list"),
        ({"a": (two(), 3)}, r"found \(Dataset, int\)"),
    ],
)
def test_what_is_not_a_population_is_refused(clients, sentence):
    with pytest.raises(InputError, match=sentence):
        Population(clients)


def test_a_function_that_makes_something_else_is_refused_by_name():
    with pytest.raises(InputError, match=r"client 'a'.*found NoneType"):
        Population({"a": lambda: None}).load("a")


def test_an_unknown_id_names_those_spelt_nearly_alike():
    with pytest.raises(InputError, match="found 'berln'; ids are like berlin"):
        Population({"oslo": two(), "berlin": two()}).load("berln")


# ---------------------------------------------------------------------------------------------------------- from_table

ROWS = {"ward": ["b", "a", "b", "c"], "age": [63.0, 41.0, 59.0, 20.0], "sick": [1, 0, 0, None]}


def csv(path, rows=ROWS):
    lines = [",".join("" if v is None else str(v) for v in row) for row in zip(*rows.values(), strict=True)]
    path.write_text("\n".join([",".join(rows), *lines]) + "\n")
    return path


def test_a_table_gives_each_client_its_rows(tmp_path):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    for table in (csv(tmp_path / "a.csv"), ROWS, pandas.DataFrame(ROWS), polars.DataFrame(ROWS)):
        population = Population.from_table(table, client="ward", label="sick")
        assert population.ids == ("b", "a", "c")
        train, _ = population.load("b")
        assert train.x.tolist() == [[63], [59]]
        assert train.y.tolist() == [1, 0]
        assert train.feature_names == ("age",)
        assert len(population.load("c")[0]) == 0


def test_load_gets_a_clients_rows_of_the_kind_that_was_given(tmp_path):
    pandas, polars, pyarrow = (pytest.importorskip(name) for name in ("pandas", "polars", "pyarrow"))
    frame = polars.DataFrame(ROWS)
    frame.write_parquet(tmp_path / "a.parquet")
    for table in (
        csv(tmp_path / "a.csv"),
        tmp_path / "a.parquet",
        ROWS,
        frame,
        pandas.DataFrame(ROWS),
        pyarrow.table(ROWS),
    ):
        seen = []

        def load(rows, seen=seen):
            seen.append(rows)
            return Dataset(np.asarray(rows["age"])[:, None])

        population = Population.from_table(table, client="ward", load=load)
        assert seen == []
        assert population.load("b")[0].x.tolist() == [[63], [59]]
        expected = dict if isinstance(table, dict) or not hasattr(table, "columns") else type(table)
        assert isinstance(seen[0], expected)


def test_ids_are_text_as_written(tmp_path):
    rows = {"id": ["007", "7"], "a": [1, 2], "y": [0, 1]}
    assert Population.from_table(csv(tmp_path / "a.csv", rows), client="id", label="y").ids == ("007", "7")
    assert Population.from_table({**rows, "id": [7.0, 8.0]}, client="id", label="y").ids == ("7", "8")


def test_a_row_without_a_client_is_refused():
    with pytest.raises(InputError, match="column 'ward', found none in row 2"):
        Population.from_table({**ROWS, "ward": ["a", None, "b", "c"]}, client="ward", label="sick")
    pandas = pytest.importorskip("pandas")
    with pytest.raises(InputError, match="found none in row 1"):
        Population.from_table(pandas.DataFrame({"ward": [pandas.NA, "a"], "y": [0, 1]}), client="ward", label="y")


def test_options_of_tables_and_load_exclude_each_other():
    with pytest.raises(InputError, match="expected load= alone"):
        Population.from_table(ROWS, client="ward", load=lambda rows: two(), label="sick")
    with pytest.raises(InputError, match="found neither"):
        Population.from_table(ROWS, client="ward")
    with pytest.raises(InputError, match="nearly alike: 'ward'"):
        Population.from_table(ROWS, client="wrad", label="sick")


def test_a_hundred_thousand_clients_are_cut_in_one_pass():
    rows = {"user": np.arange(200_000) % 100_000, "a": np.zeros(200_000), "y": np.zeros(200_000)}
    start = time.process_time()
    population = Population.from_table(rows, client="user", load=lambda part: Dataset(part["a"], part["y"]))
    assert len(population) == 100_000
    assert len(population.load("99999")[0]) == 2
    assert time.process_time() - start < 10


# --------------------------------------------------------------------------------------------------------- from_folder


def test_each_file_is_a_client_named_by_its_stem(tmp_path):
    for name in ("oslo.csv", "berlin.csv"):
        csv(tmp_path / name, {"age": [1, 2], "sick": [0, 1]})
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "folder").mkdir()
    population = Population.from_folder(tmp_path, label="sick")
    assert population.ids == ("berlin", "oslo")
    assert population.load("oslo")[0].feature_names == ("age",)
    loaded = Population.from_folder(tmp_path, load=lambda path: Dataset([len(path.stem)])).load("oslo")
    assert loaded[0].x.tolist() == [4]


def test_an_error_in_a_file_names_the_client_and_the_file(tmp_path):
    csv(tmp_path / "oslo.csv", {"age": [1], "sick": [0]})
    with pytest.raises(InputError, match=r"client 'oslo': .*oslo.csv: expected a column 'sik'"):
        Population.from_folder(tmp_path, label="sik").load("oslo")


def test_folders_that_are_not_populations_are_refused(tmp_path):
    with pytest.raises(InputError, match="found no files"):
        Population.from_folder(tmp_path, label="y")
    with pytest.raises(InputError, match="nothing there"):
        Population.from_folder(tmp_path / "no", label="y")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(InputError, match=r"found README.md; move it away"):
        Population.from_folder(tmp_path, label="y")
    (tmp_path / "README.txt").write_text("x")
    with pytest.raises(InputError, match="both are client 'README'"):
        Population.from_folder(tmp_path, load=lambda path: two())
    with pytest.raises(InputError, match="found a file"):
        Population.from_folder(tmp_path / "README.txt", label="y")


# -------------------------------------------------------------------------------------------------------- split, skew


def test_split_names_clients_and_deals_all_rows():
    data = Dataset(np.arange(1000.0), np.arange(1000) % 10)
    population = Population.split(data, by=Dirichlet(alpha=0.3), num_clients=20, seed=1)
    assert population.ids[0] == "client-000"
    rows = np.concatenate([population.load(client)[0].x for client in population.ids])
    assert sorted(rows.tolist()) == list(range(1000))
    assert len(Population.split(data, by=IID())) == 100
    assert Population.split(data, by=IID(), num_clients=1001).ids[-1] == "client-1000"


def test_split_without_labels_needs_a_cut_that_reads_none():
    data = Dataset(np.arange(10.0))
    assert len(Population.split(data, by=IID(), num_clients=2)) == 2
    for by in (Dirichlet(alpha=1), Shards()):
        with pytest.raises(InputError, match="use IID"):
            Population.split(data, by=by, num_clients=2)


def test_skew_by_hand():
    clients = {"a": Dataset([0, 0], [0, 0]), "b": Dataset([0, 0], [1, 1]), "c": Dataset([], []), "d": Dataset([0], [1])}
    skew = Population(clients).skew()
    assert skew.sizes.tolist() == [2, 2, 0, 1]
    assert skew.classes == ("0", "1")
    assert skew.label_counts.tolist() == [[2, 0], [0, 2], [0, 0], [0, 1]]
    assert skew.label_distance == pytest.approx((2 * 0.6 + 3 * 0.4) / 5)
    assert skew.summary() == (
        "4 clients, 0 to 2 examples; labels: total variation from the pool 0.48 on average (0 = alike, 1 = disjoint)"
    )
    assert skew.as_json()["clients"]["b"] == {"num_examples": 2, "labels": [0, 2]}
    assert skew.as_json()["classes"] == ["0", "1"]


def test_a_regression_has_sizes_only():
    skew = Population({"a": Dataset([0, 0], [0.5, 1.0]), "b": Dataset([0], [2.0])}).skew()
    assert skew.summary() == "2 clients, 1 to 2 examples"
    assert skew.as_json() == {
        "summary": "2 clients, 1 to 2 examples",
        "classes": None,
        "label_distance": None,
        "clients": {"a": {"num_examples": 2, "labels": None}, "b": {"num_examples": 1, "labels": None}},
    }


def test_skew_of_clients_without_rows_or_labels_is_stated():
    assert Population({"a": Dataset([], [])}).skew().summary() == "1 client, 0 examples"
    assert Population({"a": Dataset([1.0])}).skew().label_distance is None


def test_skew_looks_at_some_clients_of_many():
    calls = []
    population = Population({f"c{i}": lambda i=i: calls.append(i) or two() for i in range(100)})
    skew = population.skew(max_clients=4)
    assert calls == [0, 25, 50, 75]
    assert skew.summary().startswith("100 clients (4 of them looked at), 2 examples each; labels")


# -------------------------------------------------------------------------------------------------- positions and sizes


def test_positions_are_places_in_the_order_of_ids():
    for population in (Population({"oslo": two(), "berlin": two()}), Population.on_demand(12, lambda i: two())):
        assert [population.position(client) for client in population.ids] == list(range(len(population)))
        with pytest.raises(InputError, match=f"found 'berln'; ids are like {population.ids[0]}|berlin"):
            population.position("berln")


def test_sizes_are_known_where_nobody_need_be_loaded():
    assert Population({"a": two(), "b": (Dataset([1.0]), two())}).sizes.tolist() == [2, 1]
    assert Population({"a": two(), "b": two}).sizes is None
    assert Population.on_demand(3, lambda i: two()).sizes is None
    split = Population.split(Dataset(np.arange(50.0)), by=IID(), num_clients=4)
    assert split.sizes.tolist() == [len(split.load(client)[0]) for client in split.ids]
    table = Population.from_table(ROWS, client="ward", label="sick")
    assert table.sizes.tolist() == [2, 1, 0]
    assert table.sizes.dtype == np.int64
    assert Population.from_table(ROWS, client="ward", load=lambda rows: two()).sizes is None


def test_sizes_and_ids_are_not_made_again_at_each_call():
    for population in (Population({"a": two()}), Population.from_arrays([1.0, 2.0], offsets=[0, 1, 2])):
        assert population.ids is population.ids
        assert population.sizes is population.sizes
        with pytest.raises(ValueError, match="read-only"):
            population.sizes[0] = 3


# ----------------------------------------------------------------------------------------------------------- on_demand


def test_a_client_of_many_is_made_when_it_is_loaded():
    calls = []
    population = Population.on_demand(1_000_000, lambda i: calls.append(i) or Dataset([float(i)]))
    assert (len(population), repr(population)) == (1_000_000, "Population(1000000 clients)")
    assert population.ids == NumberedIds("client-", 1_000_000)
    assert calls == []
    train, test = population.load("client-765432")
    assert train.x.tolist() == [765432.0]
    assert test is None
    population.load("client-765432")
    assert calls == [765432, 765432]


def test_on_demand_takes_pairs_and_another_prefix():
    population = Population.on_demand(2, lambda i: (two(), Dataset([float(i)], [1])), prefix="phone ")
    assert population.load("phone 1")[1].x.tolist() == [1.0]


def test_kept_datasets_of_a_population_on_demand_are_those_used_last_within_a_limit(monkeypatch):
    calls = []

    def load(i):
        calls.append(i)
        return Dataset(np.zeros(100), np.zeros(100))  # 1,600 bytes

    monkeypatch.setattr("hansa.data.population.KEPT_BYTES", 4_000)
    population = Population.on_demand(10, load, keep=True)
    for i in (0, 1, 0, 2, 0, 1):
        population.load(f"client-{i}")
    assert calls == [0, 1, 2, 1]


def test_sizes_given_are_the_sizes_and_are_checked_when_a_client_is_loaded():
    population = Population.on_demand(2, lambda i: two(), sizes=[2, 3])
    assert population.sizes.tolist() == [2, 3]
    assert len(population.load("client-0")[0]) == 2
    with pytest.raises(InputError, match=r"client 'client-1': expected 3 training examples \(sizes\), found 2"):
        population.load("client-1")
    for sizes in ([2], [2, -1], [2, 0.5], [[2, 2]]):
        with pytest.raises(InputError, match=r"sizes=.*one whole number of 0 or more for each of 2 clients"):
            Population.on_demand(2, lambda i: two(), sizes=sizes)


def test_an_error_on_demand_names_the_client_and_keeps_its_cause():
    with pytest.raises(InputError, match=r"client 'client-4'.*ZeroDivisionError") as raised:
        Population.on_demand(5, lambda i: 1 // 0).load("client-4")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(InputError, match=r"client 'client-4'.*found int"):
        Population.on_demand(5, lambda i: i).load("client-4")


@pytest.mark.parametrize(("num_clients", "load"), [(0, two), (2.5, two), (True, two), (3, two())])
def test_what_cannot_be_made_on_demand_is_refused(num_clients, load):
    with pytest.raises(InputError, match="on_demand"):
        Population.on_demand(num_clients, load)


def test_ids_without_a_prefix_are_numbers():
    assert tuple(Population.on_demand(2, two, prefix="").ids) == ("0", "1")


# --------------------------------------------------------------------------------------------------------- from_arrays

X, Y = np.arange(12.0).reshape(6, 2), np.arange(6)


def test_rows_between_offsets_are_a_clients_as_views():
    population = Population.from_arrays(X, Y, offsets=[0, 2, 2, 6], weights=np.arange(6.0))
    assert tuple(population.ids) == ("client-0", "client-1", "client-2")
    assert population.sizes.tolist() == [2, 0, 4]
    data = [population.load(client)[0] for client in population.ids]
    assert [d.y.tolist() for d in data] == [[0, 1], [], [2, 3, 4, 5]]
    assert data[2].weights.tolist() == [2, 3, 4, 5]
    assert np.shares_memory(data[2].x, X)
    assert np.shares_memory(data[2].y, Y)


def test_populations_of_arrays_show_them():
    flat = Population.from_arrays(X, Y, offsets=[0, 2, 2, 6]).flat
    assert flat.dataset.x is X
    assert flat.offsets.tolist() == [0, 2, 2, 6]
    assert Population({"a": two()}).flat is None


def test_an_owner_for_each_row_is_as_good_as_offsets():
    sorted_rows = Population.from_arrays(X, Y, client=np.array([0, 0, 2, 2, 2, 2], np.int8))
    assert np.shares_memory(sorted_rows.load("client-2")[0].x, X)
    mixed = Population.from_arrays(X, Y, client=[2, 0, 2, 2, 0, 2])
    for population in (sorted_rows, mixed):
        assert population.sizes.tolist() == [2, 0, 4]
    assert [mixed.load(client)[0].y.tolist() for client in mixed.ids] == [[1, 4], [], [0, 2, 3, 5]]
    assert mixed.load("client-0")[0].x.tolist() == [[2, 3], [8, 9]]


def test_without_either_the_first_axis_is_the_client():
    population = Population.from_arrays(X.reshape(3, 2, 2), Y.reshape(3, 2), weights=np.ones((3, 2)))
    train, _ = population.load("client-1")
    assert (train.x.tolist(), train.y.tolist(), train.weights.tolist()) == ([[4, 5], [6, 7]], [2, 3], [1, 1])
    assert np.shares_memory(train.x, X)
    assert population.sizes.tolist() == [2, 2, 2]
    assert len(Population.from_arrays(np.zeros((3, 0, 2))).load("client-2")[0]) == 0


def test_features_by_name_labels_of_any_shape_and_names_are_cut_too():
    population = Population.from_arrays({"a": X, "b": Y}, X, offsets=[0, 1, 6])
    train, _ = population.load("client-1")
    assert train.x["b"].tolist() == [1, 2, 3, 4, 5]
    assert train.y.shape == (5, 2)
    assert Population.from_arrays({"a": X.reshape(3, 2, 2)}).load("client-2")[0].x["a"].shape == (2, 2)
    named = Population.from_arrays(X, offsets=[0, 6], feature_names=("age", "sex"))
    assert named.load("client-0")[0].feature_names == ("age", "sex")


def test_ids_may_be_named_one_by_one():
    population = Population.from_arrays(X, Y, client=[0, 0, 0, 1, 1, 1], ids=["oslo", "berlin", "rome"])
    assert population.ids == ("oslo", "berlin", "rome")
    assert population.position("rome") == 2
    assert population.sizes.tolist() == [3, 3, 0]
    assert population.load("berlin")[0].y.tolist() == [3, 4, 5]
    numbered = Population.from_arrays(X, offsets=[0, 6], prefix="phone ")
    assert numbered.ids == NumberedIds("phone ", 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"offsets": [0, 6], "client": [0] * 6}, "client= or offsets=, found both"),
        ({"offsets": [0, 5]}, "offsets=.*from 0 to 6"),
        ({"offsets": [1, 6]}, "offsets=.*from 0 to 6"),
        ({"offsets": [0, 4, 3, 6]}, "offsets=.*from 0 to 6"),
        ({"offsets": [0.0, 6.0]}, "offsets=.*from 0 to 6"),
        ({"offsets": [6]}, "offsets=.*from 0 to 6"),
        ({"client": [0, 1]}, "client=.*for each of 6 rows"),
        ({"client": [0, 1, 2, 3, 4, -1]}, "client=.*for each of 6 rows"),
        ({"client": ["a"] * 6}, "client=.*for each of 6 rows"),
        ({"client": [0, 1, 2, 0, 0, 0], "ids": ["a", "b"]}, "client=.*below 2"),
        ({"offsets": [0, 6], "ids": ["a", "b"]}, "ids=.*1 different ids, found 2"),
        ({"offsets": [0, 3, 6], "ids": ["a", "a"]}, "ids=.*2 different ids"),
        ({"offsets": [0, 3, 6], "ids": ["a", ""]}, "non-empty text"),
        ({"offsets": [0, 6], "ids": "a"}, "ids=.*1 different ids, found the text 'a'"),
        ({"offsets": [0, 6], "prefix": 3}, "prefix"),
        ({}, r"y: expected \(num_clients, num_examples, ...\), alike \(6, 2\), found shape \(6,\)"),
        ({"offsets": [0, 6], "weights": [1, 2]}, "found 2 in weights"),
    ],
)
def test_arrays_that_cannot_be_cut_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Population.from_arrays(X, Y, **options)


def test_arrays_of_no_clients_are_refused():
    for options in ({"x": np.zeros((0, 3, 2))}, {"x": np.zeros((0, 2)), "client": np.zeros(0, int)}):
        with pytest.raises(InputError, match="at least one client"):
            Population.from_arrays(**options)


def test_a_million_clients_cost_little_more_than_their_arrays():
    x, offsets = np.zeros(2_000_000, np.float32), np.arange(0, 2_000_001, 2)
    tracemalloc.start()
    population = Population.from_arrays(x, x, offsets=offsets)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    assert population.load("client-999999")[0].num_examples == 2
    assert len(population.skew(max_clients=10).clients) == 10
    assert tracemalloc.get_traced_memory()[0] < 20_000_000
    tracemalloc.stop()


def test_an_unknown_id_of_a_million_is_refused_at_once():
    start = time.process_time()
    with pytest.raises(InputError, match="found 'client'; ids are like client-0, client-1, client-2"):
        Population.on_demand(1_000_000, lambda i: two()).load("client")
    assert time.process_time() - start < 1


def test_skew_of_a_population_on_demand_loads_only_what_it_looks_at():
    calls = []
    population = Population.on_demand(1_000_000, lambda i: calls.append(i) or two())
    assert population.skew(max_clients=4).clients == ("client-0", "client-250000", "client-500000", "client-750000")
    assert calls == [0, 250_000, 500_000, 750_000]


def test_populations_of_arrays_travel_to_another_process():
    for population in (
        Population.from_arrays(X, Y, offsets=[0, 6]),
        Population({"client-0": Dataset(X, Y)}),
        Population.split(Dataset(X, Y), by=IID(), num_clients=1),
    ):
        again = pickle.loads(pickle.dumps(population))
        assert again.load(again.ids[0])[0].y.tolist() == Y.tolist()


def test_what_was_made_of_clients_does_not_travel():
    population = Population.on_demand(2, Rows(), keep=True)
    population.load("client-0")
    assert population._kept.get(0) is not None
    again = pickle.loads(pickle.dumps(population))
    assert again._kept.get(0) is None
    assert again.load("client-0")[0].x.tolist() == population.load("client-0")[0].x.tolist()


class Rows:
    """Makes a client's rows."""

    def __call__(self, position):
        return Dataset(np.full((2, 1), float(position)), np.zeros(2))
