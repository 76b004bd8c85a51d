"""Numbered ids: a sequence that holds no strings, and agrees with the tuple that would."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.data.ids import NumberedIds, look_up


@given(
    prefix=st.sampled_from(["client-", "c1", ""]),
    count=st.integers(0, 40),
    cut=st.slices(40),
    index=st.integers(-40, 39),
)
def test_it_agrees_with_the_tuple_of_its_strings(prefix, count, cut, index):
    ids, plain = NumberedIds(prefix, count), tuple(f"{prefix}{i}" for i in range(count))
    assert tuple(ids) == plain
    assert len(ids) == count
    assert tuple(ids[cut]) == plain[cut]
    assert list(reversed(ids)) == list(reversed(plain))
    if -count <= index < count:
        assert ids[index] == plain[index]
    else:
        with pytest.raises(IndexError):
            ids[index]
    for i, name in enumerate(plain[cut]):
        assert ids[cut].index(name) == i
        assert name in ids[cut]
        assert ids[cut].count(name) == 1


@pytest.mark.parametrize(
    "other",
    ["client-10", "client-01", "client-+1", "client-", "client--1", "x", "client-²", "client-" + "9" * 999, 3],
)
def test_what_is_not_an_id_is_not_found(other):
    ids = NumberedIds("client-", 10)
    assert other not in ids
    assert ids.count(other) == 0
    with pytest.raises(ValueError, match="not in"):
        ids.index(other)


def test_index_looks_from_start_to_stop_as_tuples_do():
    ids = NumberedIds("c", 10)
    assert ids.index("c5", 5) == ids.index("c5", 0, 6) == ids.index("c5", -5, -1) == 5
    for start, stop in ((6, None), (0, 5)):
        with pytest.raises(ValueError, match="not in"):
            ids.index("c5", start, stop)


def test_it_compares_by_value_and_hashes():
    assert NumberedIds("c", 3) == NumberedIds("c", 3)
    assert NumberedIds("c", 3) == NumberedIds("c", 9)[:3]
    assert hash(NumberedIds("c", 3)) == hash(NumberedIds("c", 9)[:3])
    assert NumberedIds("c", 3) != NumberedIds("c", 4)
    assert NumberedIds("c", 3) != NumberedIds("d", 3)
    assert NumberedIds("c", 1) != ("c0",)


def test_its_repr_is_short_makes_it_again_and_survives_pickling():
    for ids in (NumberedIds("client-", 1_000_000), NumberedIds("c", 9)[2:8:3]):
        assert len(repr(ids)) < 50
        assert eval(repr(ids)) == ids
        assert pickle.loads(pickle.dumps(ids)) == ids
    assert repr(NumberedIds("client-", 1_000_000)) == "NumberedIds('client-', 1000000)"


def test_slices_of_a_trillion_ids_cost_nothing():
    ids = NumberedIds("client-", 10**12)[5:]
    assert ids[-1] == f"client-{10**12 - 1}"
    assert ids.index("client-7") == 2
    assert look_up(ids[::2], [0, 1]) == ("client-5", "client-7")


@pytest.mark.parametrize("ids", [NumberedIds("c", 20), tuple(f"c{i}" for i in range(20))], ids=["numbered", "tuple"])
def test_many_positions_are_looked_up_at_once(ids):
    assert look_up(ids, [0, 7, 19]) == ("c0", "c7", "c19")
    assert look_up(ids, []) == ()


def test_what_cannot_be_numbered_is_refused():
    with pytest.raises(InputError, match="expected a text, found 3"):
        NumberedIds(3, 3)
    for numbers in (-1, 2.0, range(2, -3, -1), True):
        with pytest.raises(InputError, match="0 or more"):
            NumberedIds("c", numbers)
