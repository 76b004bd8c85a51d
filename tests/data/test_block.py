"""The datasets of several clients side by side, and a shelf that copies each of them once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.data import block as block_module
from hansa.data.block import Block, Shelf
from hansa.data.dataset import Dataset
from hansa.data.flat import FlatRows


def read(dataset):
    """As a learner reads a dataset."""
    columns = {"x": np.asarray(dataset.x, np.float32), "y": np.asarray(dataset.y, np.float32)}
    return columns if dataset.weights is None else {**columns, "weights": dataset.weights.astype(np.float32)}


def rows(size, seed=0, num_features=2, weighted=False):
    rng = np.random.default_rng([size, seed])
    weights = rng.uniform(1, 2, size) if weighted else None
    return Dataset(rng.normal(size=(size, num_features)), rng.normal(size=size), weights)


EMPTY = rows(0)
BYTES = 12  # of one row of two features and a label


class Loader:
    """Datasets by client, and who was asked for."""

    def __init__(self, clients):
        self.clients, self.asked = clients, []

    def __call__(self, client):
        self.asked.append(client)
        return self.clients[client]


def assert_holds(found, datasets):
    """Every client's rows, by sequence and by columns, are those of its dataset."""
    assert isinstance(found, Block)
    assert len(found) == len(datasets)
    assert found.sizes.tolist() == [len(dataset) for dataset in datasets]
    for i, dataset in enumerate(datasets):
        assert found[i] is dataset
        place = slice(found.starts[i], found.starts[i] + found.sizes[i])
        assert place.stop <= found.num_rows
        expected = read(dataset)
        for name, column in found.columns.items():
            own = expected.get(name, np.ones(len(dataset), np.float32))
            assert column[place].dtype == own.dtype
            assert column[place].tobytes() == own.tobytes()


# ----------------------------------------------------------------------------------------------------------- Block


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=9), weighted=st.lists(st.booleans(), min_size=9, max_size=9)
)
def test_a_block_holds_the_rows_of_its_datasets(sizes, weighted):
    """Ragged, empty, with and without weights: a client that gives none weighs 1 a row."""
    datasets = [rows(size, i, weighted=weighted[i]) for i, size in enumerate(sizes)]
    found = Block.of(datasets, read)
    assert_holds(found, datasets)
    assert found.num_rows == sum(sizes)
    heavy = any(dataset.weights is not None for dataset in datasets if len(dataset))
    assert ("weights" in found.columns) >= heavy


def test_a_block_is_a_sequence_of_datasets():
    datasets = [rows(2), EMPTY, rows(3)]
    found = Block.of(datasets, read)
    assert list(found) == datasets
    assert found[1:] == datasets[1:]
    assert found[-1] is datasets[-1]
    with pytest.raises(IndexError):
        found[3]


def test_rows_of_a_single_client_are_not_copied():
    alone = Dataset(np.ones((3, 2), np.float32), np.ones(3, np.float32))
    for datasets in ([alone], [EMPTY, alone, EMPTY]):
        found = Block.of(datasets, read)
        assert np.shares_memory(found.columns["x"], alone.x)
        assert found.starts.tolist()[-1:] == ([0] if len(datasets) == 1 else [3])


def test_a_block_of_several_is_its_own():
    datasets = [Dataset(np.ones((2, 2), np.float32), np.ones(2, np.float32)) for _ in range(2)]
    found = Block.of(datasets, read)
    found.columns["x"][:] = 9
    assert datasets[0].x.tolist() == [[1, 1], [1, 1]]


def test_empty_clients_alone_are_a_block_without_rows():
    found = Block.of([EMPTY, EMPTY], read)
    assert (found.sizes.tolist(), found.num_rows, found.columns["x"].shape) == ([0, 0], 0, (0, 2))


@pytest.mark.parametrize(
    "other",
    [rows(2, num_features=3), Dataset(np.ones((2, 2)), np.ones((2, 1))), Dataset(np.ones((2, 2, 1)), np.ones(2))],
    ids=["more features", "labels of another shape", "features of another shape"],
)
def test_datasets_of_other_forms_do_not_lie_side_by_side(other):
    assert Block.of([rows(2), other], read) is None
    assert Block.of([other, rows(2)], read) is None
    assert_holds(Block.of([other, EMPTY], read), [other, EMPTY])


def test_columns_of_other_names_or_types_do_not_lie_side_by_side():
    def by_name(dataset):
        return {f"x.{name}": part for name, part in dataset.x.items()}

    one, two = Dataset({"age": [1.0]}), Dataset({"age": [1.0], "dose": [2.0]})
    assert Block.of([one, two], by_name) is None
    assert Block.of([one, Dataset({"age": [1]})], by_name) is None
    assert Block.of([two, Dataset({"dose": [3.0], "age": [4.0]})], by_name).columns["x.dose"].tolist() == [2, 3]


# ----------------------------------------------------------------------------------------------------------- Shelf


@given(st.data())
def test_a_shelf_gives_every_client_its_own_rows_whoever_came_before(data):
    """Any sizes, weights for some, another form for some, and a shelf that may be full at any moment."""
    clients = {
        f"c{i}": rows(
            data.draw(st.integers(0, 5)), i, num_features=data.draw(st.sampled_from([2, 2, 2, 3])),
            weighted=data.draw(st.sampled_from([False, False, True])),
        )
        for i in range(8)
    }  # fmt: skip
    shelf = Shelf(read, limit_bytes=BYTES * data.draw(st.integers(0, 20)))
    cohorts = data.draw(st.lists(st.lists(st.sampled_from(sorted(clients)), min_size=1, unique=True), max_size=5))
    given_before = []
    for cohort in cohorts:
        datasets = [clients[client] for client in cohort]
        found = shelf.block(cohort, clients.__getitem__)
        if isinstance(found, Block):
            given_before.append((found, datasets))
        else:
            assert Block.of(datasets, read) is None
            assert list(found) == datasets
        for before, own in given_before:  # what comes later changes no block that was given before
            assert_holds(before, own)


def test_a_client_is_loaded_and_copied_once():
    load = Loader({"a": rows(3), "b": EMPTY, "c": rows(2)})
    shelf = Shelf(read)
    first = shelf.block(("a", "b"), load)
    second = shelf.block(("c", "b", "a"), load)
    assert load.asked == ["a", "b", "c"]
    assert first.columns["x"] is second.columns["x"]
    assert_holds(second, [load.clients[c] for c in "cba"])
    assert (first.num_rows, second.num_rows) == (3, 5)
    assert not np.shares_memory(second.columns["x"], load.clients["a"].x)


def test_empty_clients_that_come_first_wait_for_the_form_of_the_others():
    load = Loader({"a": EMPTY, "b": EMPTY, "c": rows(2)})
    shelf = Shelf(read)
    assert_holds(shelf.block(("a", "b"), load), [EMPTY, EMPTY])
    assert_holds(shelf.block(("b", "c", "a"), load), [load.clients[c] for c in "bca"])
    assert load.asked == ["a", "b", "c"]


def test_a_form_that_does_not_fit_is_handed_over_apart_and_the_others_stay():
    load = Loader({"a": rows(2), "b": rows(2, num_features=3), "c": rows(4)})
    shelf = Shelf(read)
    assert shelf.block(("a", "b", "c"), load) == [load.clients[c] for c in "abc"]
    assert_holds(shelf.block(("b",), load), [load.clients["b"]])
    assert_holds(shelf.block(("c", "a"), load), [load.clients["c"], load.clients["a"]])
    assert shelf.block(("a", "c"), load).columns["x"] is shelf.block(("c",), load).columns["x"]
    assert load.asked.count("a") == load.asked.count("c") == 1


def test_weights_that_only_some_clients_give_still_make_a_block():
    load = Loader({"a": rows(2), "b": rows(3, weighted=True)})
    shelf = Shelf(read)
    assert "weights" not in shelf.block(("a",), load).columns
    found = shelf.block(("a", "b"), load)
    assert_holds(found, [load.clients["a"], load.clients["b"]])
    assert found.columns["weights"][:2].tolist() == [1, 1]


def test_a_full_shelf_serves_whom_it_holds_and_copies_the_others_block_by_block():
    load = Loader({"a": rows(3), "b": rows(4), "c": rows(2), "d": EMPTY})
    shelf = Shelf(read, limit_bytes=5 * BYTES)
    for cohort in ("ab", "ba", "b", "ca", "da", "bcd"):
        assert_holds(shelf.block(tuple(cohort), load), [load.clients[c] for c in cohort])
    held = shelf.block(("a", "c", "d"), load)  # b did not fit, c does
    assert len(held.columns["x"]) == held.num_rows == 5
    assert load.asked.count("a") == load.asked.count("c") == load.asked.count("d") == 1


def test_a_client_that_a_full_shelf_cannot_hold_is_not_read_in_vain():
    was_read = []
    shelf = Shelf(lambda dataset: was_read.append(dataset) or read(dataset), limit_bytes=3 * BYTES)
    clients = {"a": rows(3), "b": rows(4)}
    for _ in range(2):
        shelf.block(("a",), clients.__getitem__)
        shelf.block(("b",), clients.__getitem__)
    assert was_read == [clients["a"], clients["b"], clients["b"]]


def test_a_shelf_without_room_is_as_good_as_none():
    load = Loader({"a": rows(3), "b": rows(4)})
    shelf = Shelf(read, limit_bytes=0)
    assert_holds(shelf.block(("a", "b"), load), [load.clients["a"], load.clients["b"]])


def test_a_shelf_grows_to_thousands_of_clients():
    clients = {f"c{i}": rows(i % 3, i) for i in range(3000)}
    shelf, names = Shelf(read), list(clients)
    for start in range(0, 3000, 700):
        shelf.block(names[start : start + 700], clients.__getitem__)
    everyone = np.random.default_rng(0).permutation(names).tolist()
    assert_holds(shelf.block(everyone, None), [clients[c] for c in everyone])


def test_a_shelf_that_asks_for_more_than_the_system_grants_takes_what_it_is_granted():
    load = Loader({"a": rows(4), "b": rows(8)})
    shelf = Shelf(read, limit_bytes=2**62)  # more than any machine can address
    assert_holds(shelf.block(("a", "b"), load), [load.clients["a"], load.clients["b"]])
    assert 12 <= len(shelf.block(("a",), load).columns["x"]) < 2**62 // BYTES


def test_what_a_shelf_may_hold_by_default_is_a_share_of_the_machine():
    assert 2**20 < block_module._limit() <= 4 * 2**30


# -------------------------------------------------------------------------------------- shelves that are made whole


def test_rows_that_lie_side_by_side_already_are_a_shelf_as_they_are():
    whole = Dataset(np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6, dtype=np.float32))
    flat = FlatRows(dataset=whole, offsets=np.array([0, 2, 2, 6]))
    found = Shelf.over(flat, read, {"a": 0, "b": 1, "c": 2}.__getitem__).block(("c", "b", "a"), None)
    assert np.shares_memory(found.columns["x"], whole.x)
    assert (found.sizes.tolist(), found.starts.tolist(), found.num_rows) == ([4, 0, 2], [2, 2, 0], 6)
    assert found[0].x.tolist() == whole.x[2:].tolist()
    assert found[2].y.tolist() == [0, 1]


def test_filling_ahead_gives_all_rows_so_far_as_one_dataset():
    clients = {"a": rows(2), "b": EMPTY, "c": rows(3)}
    shelf = Shelf(read)
    everything = shelf.fill(clients, clients.__getitem__)
    assert everything.x.tolist() == np.concatenate([read(clients[c])["x"] for c in "ac"]).tolist()
    assert everything.y.tolist() == np.concatenate([read(clients[c])["y"] for c in "ac"]).tolist()
    load = Loader(clients)
    assert_holds(shelf.block(("c", "a", "b"), load), [clients[c] for c in "cab"])
    assert load.asked == []


def test_filling_ahead_ends_where_a_client_does_not_fit():
    clients = {"a": rows(2), "b": rows(2, num_features=3), "c": rows(3)}
    load, shelf = Loader(clients), Shelf(read)
    assert len(shelf.fill(clients, load)) == 2
    assert load.asked == ["a", "b"]


def test_features_of_several_arrays_are_not_one_dataset():
    clients = {"a": Dataset({"age": [1.0]}, [1.0])}
    by_name = Shelf(lambda dataset: {**{f"x.{n}": p for n, p in dataset.x.items()}, "y": dataset.y})
    assert by_name.fill(clients, clients.__getitem__) is None
    assert Shelf(read).fill((), None) is None
