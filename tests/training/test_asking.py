import collections

import pytest

from hansa.core.key import Key
from hansa.data.ids import NumberedIds
from hansa.data.sampling import All, Poisson, Uniform
from hansa.training.asking import choose

IDS = tuple(f"c{i}" for i in range(40))
EVEN = [f"c{i}" for i in range(0, 40, 2)]


def even(clients):
    return [int(client.removeprefix("c")) % 2 == 0 for client in clients]


@pytest.mark.parametrize("sampler", [Uniform(), Poisson(), All()], ids=repr)
def test_where_everybody_is_there_the_draw_is_the_samplers_own(sampler):
    key = Key.of(1)
    own = sampler.cohort(IDS, 6, key)
    assert choose(sampler, IDS, 6, key) == (own, 0)
    assert choose(sampler, IDS, 6, key, lambda clients: [True] * len(clients)) == (own, 0)


@pytest.mark.parametrize("size", [1, 6, 20, 40])
def test_the_cohort_is_made_up_from_those_that_are_there(size):
    chosen = choose(Uniform(), IDS, size, Key.of(2), even).clients
    assert len(chosen) == min(size, 20)
    assert set(chosen) <= set(EVEN)
    assert list(chosen) == sorted(chosen, key=IDS.index)


def test_each_of_those_that_are_there_is_as_likely():
    counts = collections.Counter(c for i in range(2000) for c in choose(Uniform(), IDS, 2, Key.of(i), even).clients)
    assert set(counts) == set(EVEN)
    assert all(pytest.approx(count, abs=60) == 200 for count in counts.values())


def test_poisson_keeps_its_expected_size():
    sizes = [len(choose(Poisson(), IDS, 6, Key.of(i), even).clients) for i in range(600)]
    assert sum(sizes) / 600 == pytest.approx(6, abs=1.2)
    assert len(set(sizes)) > 3


def test_nobody_there_is_told_from_an_empty_draw():
    assert choose(Uniform(), IDS, 3, Key.of(0), lambda clients: [False] * len(clients)) == ((), 40)
    empty = next(i for i in range(100) if not Poisson().cohort(IDS, 1, Key.of(i)))
    assert choose(Poisson(), IDS, 1, Key.of(empty), even) == ((), 0)


def test_a_large_population_is_never_looked_at_whole():
    asked = []

    def few(clients):
        asked.append(len(clients))
        return [int(client.removeprefix("c")) % 10 == 0 for client in clients]

    assert len(choose(Uniform(), NumberedIds("c", 10**7), 100, Key.of(0), few).clients) == 100
    assert sum(asked) < 6000
