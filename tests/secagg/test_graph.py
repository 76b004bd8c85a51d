"""Degree, threshold and neighbours: the published table, and laws."""

import itertools

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.secagg import graph
from hansa.secagg.graph import graph_of, groups_of, neighbours_of

RATES = ((0.05, 0.05), (0.1, 0.1), (0.1, 0.3))
# degree/threshold by number of clients: an honest server, then one that lies, each at these rates
TABLE = {
    50: "6/3 12/6 22/6 8/6 16/11 36/21",
    100: "12/6 22/11 34/11 16/11 32/22 72/42",
    200: "20/11 34/19 54/21 30/21 56/39 134/78",
    500: "28/16 42/24 76/31 44/31 82/57 276/164",
    1000: "30/17 48/27 88/36 52/37 96/67 414/247",
}


@pytest.mark.parametrize("size", TABLE)
def test_degrees_and_thresholds_are_those_of_googles_parameter_finder(size, monkeypatch):
    monkeypatch.setattr(graph, "FULL", 0)
    graph_of.cache_clear()
    found = [
        graph_of(size, corrupt=corrupt, dropout=dropout, server=server)
        for server in ("honest", "malicious")
        for corrupt, dropout in RATES
    ]
    assert " ".join(f"{g.degree}/{g.threshold}" for g in found) == TABLE[size]
    graph_of.cache_clear()


@pytest.mark.parametrize("server", ["honest", "malicious"])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 10, 31, 60])
def test_a_full_graph_holds_against_its_corrupt_clients(size, server):
    found = graph_of(size, server=server)
    corrupt = int(np.ceil(0.1 * size - 1e-9))
    assert found.is_full
    assert corrupt < found.threshold <= size
    if server == "malicious":  # no two lists can both be signed by enough: honest clients sign one
        assert 2 * found.threshold > size + corrupt
    else:
        assert found.threshold <= max(2, size - int(0.1 * size))


@pytest.mark.parametrize(("size", "groups"), [(10, 1), (10, 3), (64, 1), (100, 7)])
def test_groups_hold_everyone_once_and_depend_on_the_session(size, groups):
    sessions = [Key.of(i).material for i in range(2)]
    one, other = (groups_of(session, size, groups) for session in sessions)
    assert sorted(np.concatenate(one).tolist()) == list(range(size))
    assert {len(group) for group in one} <= {size // groups, -(-size // groups)}
    assert [g.tolist() for g in one] != [g.tolist() for g in other]
    assert [g.tolist() for g in one] == [g.tolist() for g in groups_of(sessions[0], size, groups)]


@pytest.mark.parametrize(("size", "degree"), [(5, 4), (9, 2), (64, 20), (100, 32)])
def test_neighbours_are_mutual_and_as_many_as_the_degree(size, degree):
    ring = groups_of(bytes(32), size)[0]
    near = {int(place): neighbours_of(ring, i, degree) for i, place in enumerate(ring)}
    for place, others in near.items():
        assert len(others) == len(set(others)) == degree
        assert place not in others
        assert all(place in near[other] for other in others)


def test_a_regular_graph_stays_whole_while_fewer_neighbours_than_its_degree_are_gone():
    ring = groups_of(bytes(32), 64)[0]
    near = {int(place): set(neighbours_of(ring, i, 12)) for i, place in enumerate(ring)}
    rng = np.random.default_rng(0)
    for _ in range(50):
        left = set(rng.permutation(64)[11:].tolist())
        reached, border = set(), {min(left)}
        while border:
            reached |= border
            border = set().union(*(near[place] & left for place in border)) - reached
        assert reached == left


def test_rates_that_leave_nobody_are_refused():
    for corrupt, dropout in itertools.product((-0.1, 1.0, float("nan")), (0.1,)):
        with pytest.raises(InputError, match="corrupt from 0 to below 1"):
            graph_of(100, corrupt=corrupt, dropout=dropout)
    with pytest.raises(InputError, match=r"at most 0\.9"):
        graph_of(100, corrupt=0.5, dropout=0.3)
    assert graph_of(100, corrupt=0.5, dropout=0.3, server="honest").threshold > 50 * 0.3
