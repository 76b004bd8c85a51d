"""Cohorts: in population order, decided by the key, with the chances that the sampler promises."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.ids import NumberedIds
from hansa.data.sampling import All, Poisson, Uniform, distinct

IDS = tuple(f"c{i}" for i in range(20))


def keys(count):
    return [Key.of(0).child("round", i) for i in range(count)]


@pytest.mark.parametrize("sampler", [All(), Uniform(), Poisson()], ids=repr)
def test_a_cohort_is_in_population_order_and_decided_by_the_key(sampler):
    for key in keys(20):
        cohort = sampler.cohort(IDS, 7, key)
        assert [i for i in IDS if i in cohort] == list(cohort)
        assert cohort == sampler.cohort(IDS, 7, key)


def test_uniform_gives_the_size_asked_for_or_everyone():
    assert {len(Uniform().cohort(IDS, 7, key)) for key in keys(50)} == {7}
    assert Uniform().cohort(IDS, 30, Key.of(0)) == IDS
    assert Uniform().cohort((), 3, Key.of(0)) == ()


def test_uniform_gives_each_client_the_same_chance():
    counts = np.bincount([int(c[1:]) for key in keys(2_000) for c in Uniform().cohort(IDS, 5, key)], minlength=20)
    assert abs(counts / 2_000 - 0.25).max() < 0.05


def test_poisson_gives_each_client_its_own_chance():
    cohorts = [Poisson().cohort(IDS, 5, key) for key in keys(2_000)]
    counts = np.bincount([int(c[1:]) for cohort in cohorts for c in cohort], minlength=20)
    sizes = [len(cohort) for cohort in cohorts]
    assert abs(counts / 2_000 - 0.25).max() < 0.05
    assert np.mean(sizes) == pytest.approx(5, abs=0.2)
    assert np.var(sizes) == pytest.approx(20 * 0.25 * 0.75, rel=0.15)


def test_poisson_may_choose_nobody_and_may_choose_all():
    assert any(Poisson().cohort(IDS, 1, key) == () for key in keys(20))
    assert Poisson().cohort(IDS, 20, Key.of(0)) == IDS
    assert Poisson().cohort(IDS, 99, Key.of(0)) == IDS
    assert Poisson().cohort((), 3, Key.of(0)) == ()


@pytest.mark.parametrize("sampler", [Uniform(), Poisson()], ids=repr)
def test_a_cohort_of_nobody_cannot_be_asked_for(sampler):
    with pytest.raises(InputError, match="1 or more, found 0"):
        sampler.cohort(IDS, 0, Key.of(0))


class Plain(tuple):
    """A sequence that may be indexed, but not walked through."""

    def __iter__(self):
        raise AssertionError("all ids were asked for")


@pytest.mark.parametrize("sampler", [Uniform(), Poisson()], ids=repr)
def test_only_the_chosen_are_looked_up(sampler):
    cohort = sampler.cohort(Plain(f"c{i}" for i in range(2_000)), 20, Key.of(0))
    assert 0 < len(cohort) < 60
    assert cohort == sampler.cohort(NumberedIds("c", 2_000), 20, Key.of(0))


def test_everyone_may_be_asked_for_by_number():
    ids = NumberedIds("c", 5)
    for sampler in (All(), Uniform(), Poisson()):
        assert sampler.cohort(ids, 5, Key.of(0)) == tuple(ids)


# ------------------------------------------------------------------------------------------------------------ distinct


@given(seed=st.integers(0, 10_000), population_size=st.integers(0, 300), size=st.integers(0, 310))
def test_distinct_positions_are_in_order_in_range_and_as_many_as_asked_for(seed, population_size, size):
    chosen = distinct(Key.of(seed), population_size, size)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(size, population_size)
    assert (np.diff(chosen) > 0).all()
    assert not len(chosen) or (chosen[0] >= 0 and chosen[-1] < population_size)
    assert (chosen == distinct(Key.of(seed), population_size, size)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_each_set_of_positions_is_equally_likely(size):
    sets = list(combinations(range(6), size))
    num_draws = 400 * len(sets)
    drawn = [tuple(distinct(key, 6, size).tolist()) for key in keys(num_draws)]
    counts = np.array([drawn.count(one) for one in sets])
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < len(sets) - 1 + 4 * np.sqrt(2 * len(sets)) + 4


def test_the_first_of_a_stream_are_kept_whatever_is_asked_for_beyond():
    key = Key.of(3)
    for size in (10, 200, 499):
        assert set(distinct(key, 1_000, size).tolist()) < set(distinct(key, 1_000, size + 1).tolist())


@given(population_size=st.sampled_from([3, 1000, 2**31 + 1, 2**32 - 1]), seed=st.integers(0, 1000))
def test_words_that_would_favour_some_positions_are_drawn_again(population_size, seed):
    words = _words(Key.of(seed), 3_000)
    kept = [w * population_size >> 32 for w in words if w * population_size % 2**32 >= 2**32 % population_size]
    expected = sorted(list(dict.fromkeys(kept))[:1])
    assert distinct(Key.of(seed), population_size, 1).tolist() == expected


def _words(key, count):
    raw = key.generator().bit_generator.random_raw(-(-count // 2)).tolist()
    return [word for pair in raw for word in (pair & 0xFFFFFFFF, pair >> 32)][:count]


def test_a_large_draw_is_what_one_word_at_a_time_gives():
    words = (w * 100_000 >> 32 for w in _words(Key.of(8), 60_000) if w * 100_000 % 2**32 >= 2**32 % 100_000)
    one_by_one = list(dict.fromkeys(words))[:30_000]
    assert distinct(Key.of(8), 100_000, 30_000).tolist() == sorted(one_by_one)


def test_poisson_is_one_word_a_client_against_the_rate():
    ids, size = NumberedIds("c", 200_000), 300
    chosen = np.flatnonzero(np.array(_words(Key.of(5), 200_000)) < size * 2**32 // 200_000)
    assert Poisson().cohort(ids, size, Key.of(5)) == tuple(f"c{i}" for i in chosen)


def test_more_clients_than_words_can_tell_apart_are_refused():
    with pytest.raises(InputError, match=r"at most 4,?294,?967,?296 clients"):
        distinct(Key.of(0), 2**32 + 1, 5)
    for size, population in ((-1, 5), (1, -5)):
        with pytest.raises(InputError, match="0 or more"):
            distinct(Key.of(0), population, size)
