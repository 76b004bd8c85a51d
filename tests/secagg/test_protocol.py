"""The protocol as a whole: the exact sum of the survivors or a clean end, whoever is lost when; lies are refused."""

import itertools

import numpy as np
import pytest

from hansa.aggregators.secure_mean import SecureMean, SecureSum
from hansa.core.chain import Limits
from hansa.core.errors import Abandoned, CheckError, InputError
from hansa.secagg.server import Table as Seats
from hansa.secagg.terms import bitmap_of, places_of
from support_secagg import LIMITS, Table, grid_rows

EXCHANGES = ("keys", "shares", "masked", "agree", "unmask")
HONEST = ("keys", "shares", "masked", "unmask")


def played(aggregator, rows, when, **options):
    """The opened sum and its table, where client ``i`` is lost at exchange ``when[i]`` (None: never)."""
    table = Table(aggregator, rows, **options)
    for name, exchange in zip(table.names, when, strict=True):
        if exchange is not None:
            table.dropped.setdefault(exchange, set()).add(name)
    try:
        return table.play(), table
    except Abandoned:
        return None, table


def exact_or_nothing(aggregator, rows, when):
    """Whether it opened; never a wrong sum."""
    found, table = played(aggregator, rows, when)
    order = aggregator.exchanges
    survivors = [i for i, e in enumerate(when) if e is None or order.index(e) > order.index("masked")]
    if found is None:
        return False
    assert found.clients == tuple(table.names[i] for i in survivors)
    np.testing.assert_array_equal(found.values[0], rows[survivors].sum(axis=0))
    assert found.weights.tolist() == [len(survivors)]
    return True


@pytest.mark.parametrize(("server", "order"), [("malicious", EXCHANGES), ("honest", HONEST)])
@pytest.mark.parametrize("size", [2, 3])
def test_of_two_or_three_clients_lost_anyhow_the_sum_is_exact_or_nothing(size, server, order):
    rows, opened = grid_rows(size), 0
    aggregator = SecureMean(server=server)
    for when in itertools.product((None, *order), repeat=size):
        opened += exact_or_nothing(aggregator, rows, when)
    assert 1 <= opened < len(order) ** size


@pytest.mark.parametrize("size", [4, 5, 6])
def test_of_four_to_six_clients_with_any_two_lost_at_any_step_the_sum_is_exact_or_nothing(size):
    rows, aggregator = grid_rows(size), SecureMean()
    threshold = aggregator.terms.graph(size).threshold
    for pair in itertools.combinations(range(size), 2):
        for first, second in itertools.product((None, *EXCHANGES), EXCHANGES):
            when = [None] * size
            when[pair[0]], when[pair[1]] = first, second
            opened = exact_or_nothing(aggregator, rows, when)
            num_lost = 2 - when.count(None) + size - 2
            assert opened or size - num_lost < threshold


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 5, 6])
def test_of_up_to_six_clients_lost_anyhow_the_sum_is_exact_or_nothing(size):
    """All that can happen: 6**6 ways for six."""
    rows, aggregator, opened, tried = grid_rows(size), SecureMean(), 0, 0
    for when in itertools.product((None, *EXCHANGES), repeat=size):
        tried += 1
        opened += exact_or_nothing(aggregator, rows, when)
    assert 0 < opened < tried == 6**size


@pytest.mark.parametrize("lost", [0, 6, 12])
def test_on_a_sparse_graph_the_sum_of_the_survivors_is_exact(lost):
    size = 64
    rows, rng = grid_rows(size, seed=3), np.random.default_rng(lost)
    when = [None] * size
    for i in rng.permutation(size)[:lost]:
        when[i] = EXCHANGES[1 + rng.integers(4)]
    aggregator = SecureMean(dropout=0.2)
    assert 2 < aggregator.terms.graph(size).degree < size - 1
    assert exact_or_nothing(aggregator, rows, when)


def test_a_group_that_lost_too_many_is_left_out_and_the_others_count():
    rows = grid_rows(9)
    table = Table(SecureMean(num_groups=3), rows)
    for _ in range(3):
        table.step()
    from hansa.aggregators.secure_mean import _said

    seats = Seats.of(_said(table.history, "keys"), table.server.terms)
    gone = seats.members(1, table.names)
    table.dropped["unmask"] = set(gone)
    found = table.play()
    left = [i for i, name in enumerate(table.names) if name not in gone]
    np.testing.assert_array_equal(found.values[0], rows[left].sum(axis=0))


def test_weights_and_columns_are_summed_under_masks():
    rows, weights = grid_rows(4, seed=5), np.array([3.0, 8.0, 1.0, 4.0])
    tail = {"loss": [0.1, -7.25e8, 1e-9, 3.0], "count": [1, 2, 3, 4]}
    aggregator = SecureMean(weighting="examples", max_weight=8, bits=20)
    found = Table(aggregator, rows, weights=weights, tail=tail).play()
    assert found.weights.tolist() == [16.0]
    for name, column in tail.items():
        assert found.tail[name] == pytest.approx([np.dot(weights, column)], rel=1e-12)
    mean = aggregator.reduce([found], [1.0])
    np.testing.assert_allclose(mean.values, weights @ rows / 16, atol=4 * 2.0**-17 * 8 / 16)
    assert mean.tail["count"] == pytest.approx(np.dot(weights, [1, 2, 3, 4]) / 16)


def test_a_secure_sum_is_not_divided():
    rows = grid_rows(3)
    found = SecureSum().reduce([Table(SecureSum(), rows).play()], [1.0])
    np.testing.assert_array_equal(found.values, rows.sum(axis=0))


def test_without_a_bound_sums_of_metrics_are_exact_and_updates_are_refused():
    rows = np.array([[1e9, 0.25], [3.0, -1e-6], [2.0**40, 7.0]])
    table = Table(SecureMean(), np.zeros((3, 2)), limits=Limits())
    table.rows = dict(zip(table.names, rows, strict=True))
    with pytest.raises(CheckError, match="Clip"):
        table.play()


# ----------------------------------------------------------------------------------------------------- a lying server


def lied_to(exchange, change, *, size=5, aggregator=None, before=None):
    """What clients refuse when the server changes the mail of an exchange."""
    table = Table(aggregator or SecureMean(), grid_rows(size), is_signed=True)
    table.change[exchange] = change
    if before:
        before(table)
    with pytest.raises(Abandoned):
        table.play()
    return table.refused


def for_one(name, **fields):
    """A change of one client's mail alone."""
    return lambda mail: {**mail, name: {**mail[name], **{k: f(mail[name]) for k, f in fields.items()}}}


def for_all(**fields):
    return lambda mail: {name: {**told, **{k: f(told) for k, f in fields.items()}} for name, told in mail.items()}


def test_an_honest_server_is_refused_nothing():
    table = Table(SecureMean(), grid_rows(5), is_signed=True)
    np.testing.assert_array_equal(table.play().values[0], grid_rows(5).sum(axis=0))
    assert table.refused == {}


def test_a_cohort_below_the_owners_floor_is_refused():
    table = Table(SecureMean(), grid_rows(5), is_signed=True)
    table.clients = {name: own.__class__(**{**vars(own), "min_survivors": 6}) for name, own in table.clients.items()}
    with pytest.raises(Abandoned):
        table.play()
    assert all("at least 6" in why or "signature" in why for _, why in table.refused.values())
    assert len(table.refused) == 5


def swapped(told, field, value):
    peers = [dict(peer) for peer in told["peers"]]
    peers[0][field] = value(peers[0])
    return peers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask_key", lambda peer: bytes([9]) * 32),
        ("share_key", lambda peer: bytes([9]) * 32),
        ("commitment", lambda peer: bytes(32)),
        ("signature", lambda peer: bytes(64)),
        ("name", lambda peer: "mallory"),
    ],
)
def test_a_neighbours_swapped_key_is_refused(field, value):
    refused = lied_to("shares", for_all(peers=lambda told: swapped(told, field, value)))
    assert {exchange for exchange, _ in refused.values()} == {"shares"}
    assert len(refused) == 5


def test_keys_that_nobody_enrolled_made_are_refused_also_where_everyone_is_told_of_them():
    """The server puts a client of its own in everyone's list, with keys that it signed itself."""
    outsider = Table(SecureMean(), grid_rows(6), is_signed=True)
    outsider.clients["c05"] = outsider.server.enrolled(type(outsider.clients["c00"].credentials)("c05", {}))
    table_roster = outsider.clients["c00"].credentials.roster
    table_roster.pop("c05")
    with pytest.raises(Abandoned):
        outsider.play()
    assert {n for n, (_, why) in outsider.refused.items() if "not enrolled" in why} >= {f"c{i:02d}" for i in range(5)}


def test_ones_own_key_changed_or_in_another_place_is_refused():
    def changed(told):
        digests = told["digests"].copy()
        digests[told["place"]] = 0
        return digests

    assert len(lied_to("shares", for_all(digests=changed))) == 5
    assert len(lied_to("shares", for_all(place=lambda told: (told["place"] + 1) % 5))) == 5


def test_other_neighbours_than_the_keys_give_are_refused():
    refused = lied_to("shares", for_all(peers=lambda told: told["peers"][1:]))
    assert len(refused) == 5


def test_keys_of_another_attempt_are_refused():
    """Old adverts, well signed, do not fit the attempt that they were not made for."""
    old = Table(SecureMean(), grid_rows(4), is_signed=True)
    old.step()
    new = Table(SecureMean(), grid_rows(4), is_signed=True)
    new.attempt = 1
    new.step()
    new.history["keys"] = (*new.history["keys"][:3], old.history["keys"][3])
    with pytest.raises(Abandoned):
        new.play()
    assert len([why for _, why in new.refused.values() if "signature" in why or "my own keys" in why]) == 4


def test_being_listed_as_lost_is_refused():
    def without(name):
        place = int(name[1:])
        return lambda mail: {
            n: {**told, "alive": bitmap_of(set(places_of(told["alive"], 5)) - {place}, 5)} for n, told in mail.items()
        }

    refused = lied_to("agree", without("c02"), before=lambda table: table.dropped.update(unmask=set(table.names)))
    assert refused == {"c02": ("agree", refused["c02"][1])}
    assert "myself listed as lost" in refused["c02"][1]


def test_a_peer_that_was_lost_before_and_is_now_alive_is_refused():
    everyone = lambda told: bitmap_of(range(5), 5)  # noqa: E731
    refused = lied_to("agree", for_all(alive=everyone), before=lambda table: table.dropped.update(shares={"c04"}))
    assert all("had been lost before" in why for _, why in refused.values())
    assert set(refused) == {"c00", "c01", "c02", "c03"}


def test_different_survivors_for_different_clients_are_refused_by_all():
    """Alive for some and lost for others: who answered both would give away one client's row."""

    def split(mail):
        half = {"c00", "c01", "c02"}
        return {n: {"alive": bitmap_of(range(5) if n in half else set(range(5)) - {0}, 5)} for n in mail}

    refused = lied_to("agree", split)
    assert {"c01", "c02", "c03", "c04"} <= set(refused)
    assert not [why for exchange, why in refused.values() if exchange == "masked"]


def test_other_survivors_than_those_signed_are_refused():
    fewer = lambda told: bitmap_of(places_of(told["alive"], 5)[:-1], 5)  # noqa: E731
    refused = lied_to("unmask", for_all(alive=fewer))
    assert all(exchange == "unmask" and "I signed" in why for exchange, why in refused.values())
    assert len(refused) == 5


def test_too_few_signatures_on_the_survivors_are_refused():
    none = {"places": lambda told: told["places"][:1], "signatures": lambda told: told["signatures"][:1]}
    assert len(lied_to("unmask", for_all(**none))) == 5


def test_a_second_request_to_unmask_is_refused():
    table = Table(SecureMean(), grid_rows(5), is_signed=True)
    table.play()
    ask = type("Ask", (), {"exchange": "unmask", "learn": False})
    assert table.answer("c00", ask, {"alive": bitmap_of(range(4), 5), "places": [], "signatures": []}) is None
    assert "expected to be asked for what follows done" in table.refused["c00"][1]


@pytest.mark.parametrize("exchange", ["shares", "agree", "unmask"])
def test_a_step_out_of_order_is_refused(exchange):
    table = Table(SecureMean(), grid_rows(5), is_signed=True)
    ask = type("Ask", (), {"exchange": exchange, "learn": False})
    assert table.answer("c00", ask, {}) is None
    assert "expected to be asked for what follows nothing" in table.refused["c00"][1]


def test_a_model_for_one_client_alone_is_noticed_by_its_neighbours_and_by_it(monkeypatch):
    """Pasquini, Francati and Ateniese, "Eluding secure aggregation in federated learning via model inconsistency"."""
    monkeypatch.setattr(Seats, "usual", lambda table, masked: masked)  # a server that goes on all the same
    table = Table(SecureMean(), grid_rows(5), is_signed=True)
    table.broadcasts = {**table.broadcasts, "c03": {"params": np.ones(3, np.float32)}}
    with pytest.raises(Abandoned):
        table.play()
    assert set(table.refused) == set(table.names)
    assert all("different models" in why for _, why in table.refused.values())


def test_shares_of_strangers_and_cut_shares_are_refused():
    assert len(lied_to("masked", for_all(places=lambda told: told["places"] + 7))) == 5
    assert len(lied_to("masked", for_all(sealed=lambda told: told["sealed"][:, :-1]))) == 5
    assert len(lied_to("masked", for_all(sealed=lambda t: t["sealed"][:1], places=lambda t: t["places"][:1]))) == 5


def test_mail_of_another_form_is_refused_and_not_an_error():
    for exchange in EXCHANGES[1:]:
        for junk in (None, {}, {"places": 3}, [], {"digests": None, "place": 0, "peers": []}):
            refused = lied_to(exchange, lambda mail, junk=junk: dict.fromkeys(mail, junk))
            assert len(refused) == 5


# --------------------------------------------------------------------------------------------------- a lying client


def spoiled(table, exchange, name, change):
    """The history with one client's word changed."""
    reports = [
        r._replace(payload={name: change(r.payload[name])}) if r.clients == (name,) else r
        for r in table.history[exchange]
    ]
    table.history[exchange] = tuple(reports)


def test_one_false_share_does_not_spoil_the_sum():
    rows = grid_rows(6)
    table = Table(SecureMean(), rows)
    table.dropped["masked"] = {"c05"}
    while table.step():
        pass
    spoiled(table, "unmask", "c00", lambda said: {**said, "seeds": said["seeds"] ^ 1, "keys": said["keys"] ^ 1})
    found = table.server.open(table.names, table.history)
    np.testing.assert_array_equal(found.values[0], rows[:5].sum(axis=0))


def test_shares_of_which_too_many_are_false_open_nothing():
    table = Table(SecureMean(), grid_rows(5))
    while table.step():
        pass
    for name in table.names[:3]:
        spoiled(table, "unmask", name, lambda said: {**said, "seeds": said["seeds"] ^ 1})
    with pytest.raises(Abandoned, match="that fit"):
        table.server.open(table.names, table.history)


@pytest.mark.parametrize("server", ["honest", "malicious"])
def test_a_row_for_another_model_is_left_out_of_the_sum_of_the_others(server):
    table = Table(SecureMean(server=server), grid_rows(5))
    table.broadcasts = {**table.broadcasts, "c03": {"params": np.ones(3, np.float32)}}
    found = table.play()
    assert found.clients == ("c00", "c01", "c02", "c04")
    np.testing.assert_array_equal(found.values[0], grid_rows(5)[[0, 1, 2, 4]].sum(axis=0))


def test_a_row_for_another_model_opens_nothing_where_it_is_added_all_the_same(monkeypatch):
    monkeypatch.setattr(Seats, "usual", lambda table, masked: masked)
    table = Table(SecureMean(server="honest"), grid_rows(5))
    table.broadcasts = {**table.broadcasts, "c03": {"params": np.ones(3, np.float32)}}
    with pytest.raises(Abandoned, match="one model"):
        table.play()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_sums_that_could_overflow_are_refused_by_client_and_server():
    with pytest.raises(Abandoned):
        Table(SecureMean(bits=24), grid_rows(300, size=1)).play()
    wide = Table(SecureMean(bits=24), grid_rows(2), limits=Limits(norm=4.0, value=4.0, step=2.0**-31))
    with pytest.raises(Abandoned):
        wide.play()
    assert all("words of" in why or "rows" in why for _, why in wide.refused.values())


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 25},
        {"corrupt": 0.5, "dropout": 0.3},
        {"server": "nice"},
        {"weighting": "examples"},
        {"num_groups": 0},
        {"across": 3, "num_groups": 5},
        {"simulate": "no"},
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(options):
    with pytest.raises(InputError, match="expected"):
        SecureMean(**options)


def test_limits_are_what_the_table_says():
    assert LIMITS.value == 4.0
