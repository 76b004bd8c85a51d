import collections

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.data.ids import NumberedIds
from hansa.data.sampling import All, Poisson, Uniform
from hansa.data.separation import MinSeparation

IDS = tuple(f"client-{i}" for i in range(60))


def cohort(sampler, ids, number, size):
    return sampler.cohort(sampler.of_round(ids, number), size, Key.of(number))


@pytest.mark.parametrize("within", [Uniform(), Poisson(), All()], ids=repr)
def test_nobody_is_asked_twice_within_so_many_rounds_whoever_joins_or_leaves(within):
    sampler, draw, last = MinSeparation(rounds=5, within=within), np.random.default_rng(0), {}
    for number in range(60):
        here = [client for client in IDS if draw.random() < 0.7]
        for client in cohort(sampler, here, number, 6):
            assert client in here
            assert number - last.get(client, -99) >= 5
            last[client] = number
    assert len(last) > 50


def test_groups_part_the_population_and_keep_its_order():
    sampler = MinSeparation(rounds=4)
    groups = [tuple(sampler.of_round(IDS, number)) for number in range(4)]
    assert sorted(sum(groups, ())) == sorted(IDS)
    assert all(list(group) == sorted(group, key=IDS.index) for group in groups)
    assert groups == [tuple(sampler.of_round(IDS, number)) for number in range(8, 12)]


def test_a_clients_group_is_its_own_however_the_others_are_called():
    sampler = MinSeparation(rounds=3)
    for number in range(3):
        all_of_them = tuple(sampler.of_round(NumberedIds("client-", 60), number))
        assert all_of_them == tuple(sampler.of_round(IDS, number))
        assert tuple(sampler.of_round(IDS[10:], number)) == tuple(c for c in all_of_them if c in IDS[10:])


def test_groups_are_of_about_one_size():
    sampler = MinSeparation(rounds=10)
    sizes = [len(sampler.of_round(NumberedIds("c", 20_000), number)) for number in range(10)]
    assert sum(sizes) == 20_000
    assert max(abs(size - 2000) for size in sizes) < 250


def test_each_of_a_group_is_as_likely():
    sampler = MinSeparation(rounds=6)
    group = sampler.of_round(IDS, 3)
    counts = collections.Counter(c for i in range(2000) for c in sampler.cohort(group, 2, Key.of(i)))
    assert set(counts) == set(group)
    assert all(count == pytest.approx(4000 / len(group), rel=0.25) for count in counts.values())


def test_a_group_smaller_than_the_cohort_takes_part_whole_and_an_empty_one_not_at_all():
    sampler = MinSeparation(rounds=3)
    group = sampler.of_round(IDS, 1)
    assert cohort(sampler, IDS, 1, 1000) == tuple(group)
    assert cohort(sampler, (), 1, 5) == ()


def test_a_lasting_population_is_looked_at_once():
    sampler, asked = MinSeparation(rounds=7), []

    class Looked(NumberedIds):
        def __iter__(self):
            asked.append(1)
            return super().__iter__()

    ids = Looked("c", 1000)
    for number in range(20):
        cohort(sampler, ids, number, 5)
    assert len(asked) == 1


def test_ids_of_a_group_are_a_sequence():
    group = MinSeparation(rounds=2).of_round(NumberedIds("c", 10), 0)
    plain = tuple(group)
    assert plain == tuple(group[i] for i in range(len(group)))
    assert tuple(group[1:3]) == plain[1:3]
    assert group.take([0]) == plain[:1]
    assert plain[-1] in group
    assert group.index(plain[1]) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 0}, r"rounds=\)"),
        ({"rounds": 2.0}, r"rounds=\)"),
        ({"rounds": 2, "within": "uniform"}, r"within=\)"),
        ({"rounds": 2, "within": MinSeparation(rounds=2)}, r"within=\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        MinSeparation(**options)
