import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.runtimes.shares import Shares

SIZES = st.lists(st.integers(0, 9), max_size=40)


@given(SIZES, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_part_is_taken_once_whoever_asks(sizes, num_workers, random):
    shares = Shares(sizes, num_workers)
    taken = []
    while (part := shares.take(random.randrange(num_workers))) is not None:
        taken.append(part)
        assert shares.left == len(sizes) - len(taken)
    assert sorted(taken) == list(range(len(sizes)))


@given(SIZES, st.integers(1, 5))
def test_whoever_works_takes_his_own_neighbours_from_the_first_to_the_last(sizes, num_workers):
    shares = Shares(sizes, num_workers)
    runs = [list(run) for run in shares._runs]
    assert [part for run in runs for part in run] == list(range(len(sizes)))
    own = runs[num_workers - 1]
    assert [shares.take(num_workers - 1) for _ in own] == own


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5))
def test_parts_of_one_size_are_shared_equally(num_workers, each, size):
    shares = Shares([size] * (num_workers * each), num_workers)
    assert [len(run) for run in shares._runs] == [each] * num_workers


def test_parts_that_are_given_back_come_first_and_to_anybody():
    shares = Shares([1] * 6, 2)
    assert [shares.take(0), shares.take(0), shares.take(1)] == [0, 1, 3]
    shares.give_back(0, [1, 0])
    assert shares.left == 5
    assert [shares.take(0) for _ in range(2)] == [0, 1]
    shares.give_back(0, [0])
    assert [shares.take(1) for _ in range(4)] == [4, 5, 2, 0]
    assert shares.take(1) is None


@pytest.mark.parametrize("sizes", [[], [0, 0, 0]])
def test_parts_of_nobody_are_parts_too(sizes):
    shares = Shares(sizes, 2)
    assert sorted(shares.take(0) for _ in sizes) == list(range(len(sizes)))
    assert shares.take(0) is None
