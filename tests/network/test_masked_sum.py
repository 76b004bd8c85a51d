"""The seam for secure aggregation: a toy masked sum of four exchanges, with drop-outs, over real sockets."""

import numpy as np
import pytest

from hansa.aggregators.careful import careful
from hansa.core.protocols import Report
from hansa.network.client_store import ClientStore
from hansa.network.messages import read_plan
from hansa.network.outbox import Parcel
from hansa.network.participant import Participant
from hansa.training.schedule import Schedule
from hansa.wire import pack_report
from support_masked_sum import EXCHANGES, MaskedSum
from support_town import Town

pytestmark = pytest.mark.network
NAMES = ("amsterdam", "berlin", "cologne", "dresden", "essen")


class Lost(Exception):
    """The client is gone."""


class Vanishing(Participant):
    """A client that is revoked, and ends, when it is asked in one exchange."""

    def __init__(self, *given, exchange, coordinator):
        super().__init__(*given)
        self.exchange, self.coordinator = exchange, coordinator

    def handle(self, work, fetch):
        if work.plan is not None and read_plan(work.plan).slot.exchange == self.exchange:
            self.coordinator.revoke(self.name)
            raise Lost(self.name)
        return super().handle(work, fetch)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_client_lost_in_any_exchange_leaves_the_plain_mean_of_the_survivors(make_site, tools, exchange):
    site = make_site(tools.federation(aggregator=MaskedSum(group=3, threshold=1)))
    data = {name: tools.data(i) for i, name in enumerate(NAMES)}

    def participant(name, own):
        given = (site.federation, name, lambda: own, ClientStore(site.folder / name))
        lost = exchange if name == "cologne" else None
        return Vanishing(*given, exchange=lost, coordinator=site.coordinator)

    site.participant = participant
    for name in NAMES:
        site.join(name, data[name])
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(len(NAMES), timeout_s=20)
    masked = tools.rounds(site.federation, runtime, NAMES)
    params = masked.run(0)
    survivors = tuple(n for n in NAMES if n != "cologne" or exchange == "unmask")
    assert set(masked.mean.clients) == set(survivors)
    plain = tools.rounds(tools.federation(), tools.reference(tools.federation(), data), survivors).run(0)
    np.testing.assert_allclose(params, plain, atol=1e-4)
    assert np.abs(plain).max() > 0.01


# ------------------------------------------------------------------------------------------------- mail that is no mail

BAD = {
    "keys": [None, 3, "x", "9" * 60, ["1"], {"a": "1"}],
    "shares": [None, {}, {"amsterdam": None}, {"amsterdam": {"seed": [0, "1"], "key": [1, "1"]}}],
    "masked": [
        None,
        {"row": np.zeros(9)},
        {"row": [1, 2], "tail": []},
        {"row": np.zeros((2, 2), np.uint64), "tail": []},
    ],
    "unmask": [None, {"seeds": {}}, {"seeds": {"amsterdam": "x"}, "keys": {}}, {"seeds": [], "keys": []}],
}


@pytest.mark.parametrize(("exchange", "bad"), [(e, bad) for e, words in BAD.items() for bad in words], ids=repr)
def test_one_clients_malformed_mail_does_not_end_the_run(tmp_path, tools, exchange, bad):
    """It is refused as it comes, or the attempt is abandoned and the next one goes without that client."""
    town, point = train_with(tmp_path, tools, {exchange: bad})
    assert point.next_round == 2
    assert np.isfinite(point.state.algorithm["params"]).all()
    said = [entry["client"] for entry in town.runtime.refusals()]
    assert set(said) <= {"cologne"}
    assert said or bad == {}
    town.close()


def test_mail_that_only_shows_beside_others_is_blamed_on_its_sender_alone(tmp_path, tools):
    """A row of another length is a good row by itself."""
    bad = {"row": np.zeros(3, np.uint64), "tail": ["train_loss"]}
    town, point = train_with(tmp_path, tools, {"masked": bad})
    assert [row.num_clients for row in point.history] == [4, 4]
    with town.coordinator.store.read() as db:
        slots = db.exec_driver_sql("SELECT slot, state FROM slots WHERE slot LIKE 'train-0%-masked'").fetchall()
        asked = db.exec_driver_sql(
            "SELECT client FROM assignments JOIN slots ON slot_id = id WHERE slot = 'train-0-1-keys'"
        )
        assert "cologne" not in {row[0] for row in asked}
    assert slots == [("train-0-0-masked", "abandoned"), ("train-0-1-masked", "aggregated")]
    town.close()


def test_a_restart_in_the_attempt_after_it_asks_the_same_clients(tmp_path, tools):
    bad = {"row": np.zeros(3, np.uint64), "tail": ["train_loss"]}
    town, point = train_with(tmp_path, tools, {"masked": bad}, kills=(18, 24))
    assert [row.num_clients for row in point.history] == [4, 4]
    town.close()


def train_with(tmp_path, tools, mail, kills=()):
    """Two rounds in which cologne says ``mail`` in place of its own word."""
    federation = tools.federation(aggregator=careful(MaskedSum(group=5, threshold=2)))
    town = Town(tmp_path, federation, {name: tools.data(i) for i, name in enumerate(NAMES)})
    answer = town.people["cologne"].handle

    def handle(work, fetch):
        done = answer(work, fetch)
        if done is None or done[0].exchange not in mail or done[0].task != "train":
            return done
        slot = done[0]
        report = Report(slot, ("cologne",), {"cologne": mail[slot.exchange]})
        return slot, Parcel.of(pack_report(report, federation.codec(slot)))

    town.people["cologne"].handle = handle
    return town, town.train_through(Schedule(num_rounds=2), kills)
