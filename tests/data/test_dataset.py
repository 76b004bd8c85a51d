"""What a dataset takes, refuses, cuts and joins; and which rows are held out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.dataset import Dataset, hold_out


def test_arrays_and_dicts_of_arrays_are_taken():
    assert len(Dataset([[1, 2], [3, 4]], [0, 1])) == 2
    data = Dataset({"ids": np.zeros((3, 4), int), "mask": np.ones((3, 4))}, [0, 1, 0], [1, 2, 0.5])
    assert data.num_examples == 3
    assert data.weights.dtype == np.float64
    assert repr(data).startswith("Dataset(x['ids']: (3, 4) int64")


def test_a_dataset_may_be_empty():
    assert len(Dataset(np.zeros((0, 3)), np.zeros(0, int))) == 0
    assert len(Dataset([])) == 0


def test_window_views_are_not_copied():
    series = np.arange(10_000.0)
    windows = np.lib.stride_tricks.sliding_window_view(series, 100)
    data = Dataset(windows, np.zeros(len(windows)))
    assert np.shares_memory(data.x, series)
    assert data.take([5]).x.shape == (1, 100)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([1.0, 2.0], [0]), "expected 2 examples everywhere .*found 1 in y"),
        (({"a": [1, 2], "b": [1]},), r"found 1 in x\['b'\]"),
        (([1.0, 2.0], None, [1.0]), "found 1 in weights"),
        ((np.array(["a", "b"]),), "expected numbers, found dtype <U1"),
        ((np.array([1, None], object),), "found dtype object"),
        (([[1.0], [1.0, 2.0]],), "what NumPy refuses"),
        ((3.0,), "single number"),
        (({},), "empty dict"),
        (([1.0, 2.0], None, [1.0, -1.0]), "finite numbers >= 0, found -1.0 for example 1"),
        (([1.0], None, [np.inf]), "found inf"),
        (([1.0], None, [[1.0]]), r"found shape \(1, 1\)"),
    ],
)
def test_what_is_not_a_dataset_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Dataset(*arguments)


def test_feature_names_must_name_the_last_axis():
    assert Dataset([[1, 2]], feature_names=["a", "b"]).feature_names == ("a", "b")
    for x, names in (([[1, 2]], ["a"]), ([1, 2], ["a", "b"]), ({"a": [1]}, ["a"]), ([[1]], "a")):
        with pytest.raises(InputError, match="feature_names"):
            Dataset(x, feature_names=names)


def test_take_keeps_every_part_and_copies():
    data = Dataset({"a": [[1], [2], [3]]}, [4, 5, 6], [7, 8, 9])
    some = data.take([2, 0])
    assert some.x["a"].tolist() == [[3], [1]]
    assert some.y.tolist() == [6, 4]
    assert some.weights.tolist() == [9, 7]
    assert len(data.take([])) == 0
    assert data.take([]).x["a"].shape == (0, 1)


def test_take_refuses_a_mask():
    with pytest.raises(InputError, match="flatnonzero"):
        Dataset([1, 2]).take([True, False])


def test_replace_keeps_the_rest():
    data = Dataset([[1.0, 2.0]], [0], [3.0], feature_names=["a", "b"])
    assert data.replace(y=[1]).feature_names == ("a", "b")
    assert data.replace(weights=None).weights is None
    assert data.replace(x=[[1.0]]).feature_names is None
    assert data.replace(x=[[5.0, 6.0]]).weights.tolist() == [3]


def test_concatenate_skips_clients_without_rows():
    empty, one, two = Dataset([], []), Dataset([[1.0]], [0]), Dataset([[2.0], [3.0]], [1, 0], [2.0, 3.0])
    pooled = Dataset.concatenate([empty, one, two])
    assert pooled.x.tolist() == [[1], [2], [3]]
    assert pooled.y.dtype == np.int64
    assert pooled.weights.tolist() == [1, 2, 3]
    assert len(Dataset.concatenate([empty, empty])) == 0


def test_concatenate_joins_dicts():
    one, two = Dataset({"a": [1], "b": [2]}), Dataset({"b": [4], "a": [3]})
    joined = Dataset.concatenate([one, two])
    assert joined.x["a"].tolist() == [1, 3]
    assert joined.x["b"].tolist() == [2, 4]


def test_concatenate_refuses_other_features():
    a = Dataset([[1.0, 2.0]], [0], feature_names=["a", "b"])
    for b in (Dataset([[1.0]], [0]), Dataset([[1.0, 2.0]]), Dataset({"x": [[1.0, 2.0]]}, [0])):
        with pytest.raises(InputError, match="examples of one form"):
            Dataset.concatenate([a, b])
    with pytest.raises(InputError, match="found 'a' at one client where another has 'b'"):
        Dataset.concatenate([a, Dataset([[1.0, 2.0]], [0], feature_names=["b", "a"])])
    with pytest.raises(InputError, match="at least one"):
        Dataset.concatenate([])


# ---------------------------------------------------------------------------------------------------------- holding out


@given(st.lists(st.integers(0, 2), max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_hold_out_gives_the_exact_share_once_and_in_order(labels, share, seed):
    size = len(labels)
    train, test = hold_out(Dataset(np.arange(size), np.array(labels, int)), share, Key.of(seed))
    assert len(test) == (min(int(share * size + 0.5), size - 1) if size > 1 else 0)
    assert sorted([*train.x.tolist(), *test.x.tolist()]) == list(range(size))
    assert (np.diff(train.x) > 0).all()
    assert (np.diff(test.x) > 0).all()


@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.floats(0.05, 0.9))
def test_hold_out_gives_each_class_its_share_to_within_one_row(counts, share):
    y = np.repeat(np.arange(len(counts)), counts)
    _, test = hold_out(Dataset(np.arange(len(y)), y), share, Key.of(1))
    quota = np.array(counts) * len(test) / len(y)
    assert (np.abs(np.bincount(test.y, minlength=len(counts)) - quota) < 1).all()


def test_hold_out_depends_on_key_labels_and_size_alone():
    y = np.arange(50) % 2
    rows = [hold_out(Dataset(x, y), 0.2, Key.of(3))[1].y for x in (np.zeros(50), np.ones((50, 4)))]
    assert (rows[0] == rows[1]).all()
    here, there = (hold_out(Dataset(np.arange(50), y), 0.2, Key.of(s))[1].x.tolist() for s in (0, 1))
    assert here != there


def test_equal_remainders_are_broken_by_chance_not_by_class():
    held = [hold_out(Dataset(range(10), [0] * 5 + [1] * 5), 0.1, Key.of(i))[1].y[0] for i in range(60)]
    assert 15 < sum(held) < 45


def test_a_class_of_one_row_turns_stratifying_off():
    _, test = hold_out(Dataset(range(10), [0] * 9 + [1]), 0.5, Key.of(0))
    assert len(test) == 5


def test_one_row_or_none_stays_in_train():
    for size in (0, 1):
        train, test = hold_out(Dataset(np.zeros((size, 2)), np.zeros(size, int)), 0.9, Key.of(0))
        assert (len(train), len(test)) == (size, 0)
        assert test.x.shape == (0, 2)


def test_hold_out_refuses_a_share_of_one():
    with pytest.raises(InputError, match=r"give 0\.2"):
        hold_out(Dataset([1, 2]), 1.0, Key.of(0))


def test_rows_are_views_of_all_parts():
    x, y = np.arange(8.0).reshape(4, 2), np.arange(4)
    part = Dataset(x, y, np.arange(4.0), feature_names=("a", "b")).rows(1, 3)
    assert (part.x.tolist(), part.y.tolist(), part.weights.tolist()) == ([[2, 3], [4, 5]], [1, 2], [1, 2])
    assert (len(part), part.feature_names) == (2, ("a", "b"))
    assert np.shares_memory(part.x, x)
    assert np.shares_memory(part.y, y)
    assert Dataset({"a": x, "b": y}).rows(2, 4).x["b"].tolist() == [2, 3]
    assert Dataset(x).rows(1, 2).y is None


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 5)])
def test_rows_that_are_not_there_are_refused(start, stop):
    with pytest.raises(InputError, match=f"rows: expected 0 <= start <= stop <= 4, found {start} and {stop}"):
        Dataset(np.arange(4.0)).rows(start, stop)
