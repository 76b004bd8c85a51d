"""What clients keep between rounds: put and gotten back bit for bit, in memory or in files."""

import gc
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hansa.core.errors import InputError, RunError
from hansa.runtimes.memory import MemoryStore
from hansa.wire import pack, unpack

CLIENTS = [f"c{i}" for i in range(8)]


def bits(tree):
    """A tree of arrays as something that compares NaNs and minus zeros too."""
    return {c: {n: (a.dtype.str, a.shape, np.asarray(a).tobytes()) for n, a in r.items()} for c, r in tree.items()}


def control(*values, length=2):
    return np.array([[v] * length for v in values], np.float32)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_a_client_without_an_entry_gets_the_default_row():
    store = MemoryStore()
    store.put(["a", "b"], {"x": control(1, 2)})
    assert store.rows(["b", "nobody", "a"]).get("x", np.array([7.0, 8.0], np.float32)).tolist() == [
        [2, 2],
        [7, 8],
        [1, 1],
    ]
    assert store.rows(["a"]).get("other", np.zeros(3)).tolist() == [[0, 0, 0]]
    assert store.rows([]).get("x", np.zeros(2)).shape == (0, 2)
    assert MemoryStore().rows(["a"]).get("x", np.float32(3)).tolist() == [3]


def test_a_part_sees_its_own_names_without_the_prefix():
    store = MemoryStore()
    store.put(["a"], {"a.control": control(1), "0.residual": control(2), "10.residual": control(3)})
    rows = store.rows(["a", "b"])
    assert len(rows) == len(rows.part("0")) == 2
    assert rows.part("0").get("residual", np.zeros(2)).tolist() == [[2, 2], [0, 0]]
    assert {name: row.tolist() for name, row in rows.part("a").row(0).items()} == {"control": [1, 1]}
    assert rows.part("a").row(1) == {}
    assert sorted(rows.row(0)) == ["0.residual", "10.residual", "a.control"]
    store.put(["a"], {"a.b.c": control(4)})
    assert store.rows(["a"]).part("a").part("b").get("c", np.zeros(2)).tolist() == [[4, 4]]


def test_a_put_replaces_the_rows_of_its_names_and_leaves_the_others():
    store = MemoryStore()
    store.put(["a", "b"], {"x": control(1, 2), "y": control(3, 4)})
    store.put(["b"], {"x": control(9)})
    assert bits(store.kept()) == bits(
        {"a": {"x": control(1)[0], "y": control(3)[0]}, "b": {"x": control(9)[0], "y": control(4)[0]}}
    )


def test_a_dropped_client_is_forgotten_and_its_room_used_again():
    store = MemoryStore()
    store.put(CLIENTS, {"x": np.zeros((8, 1_000))})
    size = store.bytes
    for _ in range(20):
        store.drop("c3")
        assert store.rows(["c3"]).get("x", np.ones(1_000)).min() == 1
        assert "c3" not in store.kept()
        store.put(["c3"], {"x": np.full((1, 1_000), 5.0)})
    assert store.bytes == size
    assert store.rows(["c3", "c4"]).get("x", np.ones(1_000))[:, 0].tolist() == [5, 0]
    store.drop("nobody")


def test_what_was_given_and_what_was_gotten_may_be_changed_freely():
    store, given_rows = MemoryStore(), control(1, 2)
    store.put(["a", "b"], {"x": given_rows})
    given_rows[:] = 9
    for gotten in (store.rows(["a", "b"]).get("x", np.zeros(2)), store.rows(["b", "?"]).get("x", np.zeros(2))):
        gotten[:] = 9
    store.rows(["a"]).row(0)["x"][:] = 9
    store.kept()["a"]["x"][:] = 9
    assert store.rows(["a", "b"]).get("x", np.zeros(2)).tolist() == [[1, 1], [2, 2]]


def test_rows_of_several_forms_lie_under_one_name():
    store = MemoryStore()
    store.put(["a", "b"], {"x": np.zeros((2, 3), np.float32)})
    store.put(["c"], {"x": np.ones((1, 5), np.float32)})
    store.put(["d"], {"x": np.array([1.5])})
    assert store.rows(["c"]).get("x", np.zeros(5)).tolist() == [[1] * 5]
    assert store.rows(["c", "e"]).get("x", np.zeros(5)).shape == (2, 5)
    assert store.rows(["d"]).get("x", 0.0).tolist() == [1.5]
    with pytest.raises(InputError, match=r"memory 'x': expected rows of one shape in a block.*\(3,\) and \(5,\)"):
        store.rows(["a", "c"]).get("x", np.zeros(5))
    store.put(["a"], {"x": np.full((1, 5), 2, np.float32)})
    assert store.rows(["a", "c"]).get("x", np.zeros(5)).tolist() == [[2] * 5, [1] * 5]
    assert store.rows(["b"]).get("x", np.zeros(3)).tolist() == [[0] * 3]


def test_a_list_of_rows_may_be_ragged():
    store = MemoryStore()
    store.put(["a", "b", "c"], {"x": [np.zeros(1), np.ones(2), np.full(1, 2.0)]})
    assert [store.rows([c]).row(0)["x"].tolist() for c in "abc"] == [[0], [1, 1], [2]]


def test_every_client_may_have_a_shape_of_its_own():
    store = MemoryStore(limit_bytes=100)
    clients = [f"c{i}" for i in range(40)]
    for _ in range(2):
        store.put(clients, {"x": [np.full(i, i, np.int16) for i in range(40)]})
    assert [len(store.rows([client]).get("x", np.zeros(i))[0]) for i, client in enumerate(clients)] == list(range(40))
    tree = bits(store.kept())
    store.drop("c39")
    store.put(["c39"], {"x": np.full((1, 39), 39, np.int16)})
    assert bits(store.kept()) == tree


def test_rows_of_unequal_dtypes_meet_as_stacking_has_them():
    store = MemoryStore()
    store.put(["a"], {"x": np.ones((1, 2), np.float32)})
    store.put(["b"], {"x": np.ones((1, 2), np.float64)})
    assert store.rows(["a"]).get("x", np.zeros(2)).dtype == np.float32
    assert store.rows(["a", "b"]).get("x", np.zeros(2, np.float32)).dtype == np.float64
    assert store.rows(["a", "?"]).get("x", np.zeros(2)).dtype == np.float64


@pytest.mark.parametrize("values", [np.zeros((3, 2)), [np.zeros(2)], np.float32(3)])
def test_rows_that_are_not_one_a_client_are_refused(values):
    with pytest.raises(InputError, match="memory 'x': expected one row for each of 2 clients"):
        MemoryStore().put(["a", "b"], {"x": values})


def test_what_is_not_numbers_is_refused():
    with pytest.raises(InputError, match="memory 'x': expected numbers, found dtype object"):
        MemoryStore().put(["a"], {"x": np.array([None])})


# ---------------------------------------------------------------------------------------------------------------- laws

DTYPES = st.sampled_from([np.float32, np.float64, np.int8, np.bool_])
PUTS = st.tuples(
    st.just("put"),
    st.lists(st.sampled_from(CLIENTS), unique=True, max_size=8),
    st.sampled_from(["a.x", "a.y", "0.x"]),
    st.sampled_from([(), (0,), (2,), (3,), (2, 2)]),
    DTYPES,
    st.integers(0, 2**32 - 1),
)
DROPS = st.tuples(st.just("drop"), st.sampled_from(CLIENTS))
STEPS = st.lists(PUTS | DROPS, max_size=12)


def values_of(shape, dtype, seed):
    """Rows of any bits: NaNs and infinities among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 2 if dtype is np.bool_ else 256, size, np.uint8)
    return raw.view(dtype).reshape(shape)


def run(steps, *stores):
    """The same steps on all stores and on a plain dict, which is returned."""
    plain = {}
    for kind, *step in steps:
        if kind == "drop":
            plain.pop(step[0], None)
            for store in stores:
                store.drop(step[0])
            continue
        clients, name, shape, dtype, seed = step
        values = values_of((len(clients), *shape), dtype, seed)
        for client, row in zip(clients, values, strict=True):
            plain.setdefault(client, {})[name] = np.array(row)
        for store in stores:
            store.put(clients, {name: values})
    return plain


@given(STEPS)
def test_the_store_is_a_dict_of_dicts_of_rows(steps):
    store = MemoryStore()
    plain = run(steps, store)
    assert bits(store.kept()) == bits(plain)
    assert list(store.kept()) == list(plain)
    rows = store.rows(CLIENTS)
    assert bits(dict(enumerate(rows.row(i) for i in range(8)))) == bits(
        dict(enumerate(plain.get(c, {}) for c in CLIENTS))
    )
    for client, kept in plain.items():
        for name, row in kept.items():
            assert_array_equal(store.rows([client, client]).get(name, np.zeros(9)), np.stack([row, row]))


@settings(max_examples=50, deadline=None)
@given(STEPS, st.sampled_from([0, 1, 200, 2_000]))
def test_spilled_rows_keep_their_bits(steps, limit_bytes):
    spilled = MemoryStore(limit_bytes=limit_bytes)
    assert bits(run(steps, spilled)) == bits(spilled.kept())


@given(STEPS, STEPS)
def test_restoring_what_was_kept_gives_it_back_in_order(steps, other):
    store, again = MemoryStore(), MemoryStore()
    run(steps, store)
    run(other, again)
    again.restore(unpack(pack(store.kept())))
    assert bits(again.kept()) == bits(store.kept())
    assert list(again.kept()) == list(store.kept())


@given(STEPS)
def test_rows_travel_to_another_process(steps):
    store = MemoryStore()
    run(steps, store)
    rows = store.rows(CLIENTS)
    again, part = pickle.loads(pickle.dumps(rows)), pickle.loads(pickle.dumps(rows.part("a")))
    assert len(again) == 8
    for i in range(8):
        assert bits({0: again.row(i)}) == bits({0: rows.row(i)})
        assert bits({0: part.row(i)}) == bits({0: rows.part("a").row(i)})


# --------------------------------------------------------------------------------------------------------------- files


def test_beyond_the_limit_rows_lie_in_files_that_vanish_with_the_store(tmp_path, caplog):
    store = MemoryStore(limit_bytes=100_000, folder=tmp_path)
    for start in (0, 10, 20):
        clients = [f"c{start + i}" for i in range(10)]
        store.put(clients, {"x": np.full((10, 200), start, np.float32), "y": np.zeros((10, 0))})
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.INFO, logger="hansa"):
        for start in range(30, 300, 10):
            clients = [f"c{start + i}" for i in range(10)]
            store.put(clients, {"x": np.full((10, 200), start, np.float32), "z": np.ones((10, 3))})
    assert len(caplog.messages) == 1
    assert "0.1 MB" in caplog.text
    assert store.bytes > 100_000
    [folder] = tmp_path.iterdir()
    assert list(Path(folder).iterdir())
    assert store.rows([f"c{i}" for i in range(300)]).get("x", np.zeros(200))[:, 7].tolist() == [
        i // 10 * 10 for i in range(300)
    ]
    store.drop("c0")
    store.put(["d"], {"x": np.ones((1, 200), np.float32)})
    del store
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_restored_store_lies_in_memory_again_where_it_fits(tmp_path):
    store = MemoryStore(limit_bytes=10_000, folder=tmp_path)
    store.put(["a"], {"x": np.zeros((1, 10_000))})
    assert list(tmp_path.iterdir())
    store.restore({"a": {"x": np.ones(3)}})
    assert not list(tmp_path.iterdir())
    assert store.rows(["a"]).get("x", np.zeros(3)).tolist() == [[1, 1, 1]]


def test_a_folder_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(RunError, match=r"memory: expected to write .* found NotADirectoryError|FileNotFoundError"):
        MemoryStore(limit_bytes=0, folder=tmp_path / "no").put(["a"], {"x": np.zeros((1, 3))})


def test_a_limit_is_a_number_of_bytes():
    with pytest.raises(InputError, match="limit_bytes"):
        MemoryStore(limit_bytes=-1)
