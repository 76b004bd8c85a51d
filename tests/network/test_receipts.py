"""A receipt proves what became of a report, and only a receipt of the federation's does."""

from dataclasses import fields, replace

import numpy as np
import pytest

from hansa.core.errors import ProtocolError
from hansa.core.key import Key
from hansa.core.protocols import Report, Slot, Updates
from hansa.core.round import Context, begin, make_plan
from hansa.network import identity
from hansa.network.client_store import ClientStore
from hansa.network.messages import Enrol, Receipt, Refusal, read_receipt, write
from hansa.network.receipts import Seal, check_receipt
from hansa.network.registry import Caller
from hansa.network.runtime import NetworkRuntime
from hansa.wire import pack_report
from support_signing import SigningDesk

SLOT = Slot(0, 0, "update")


@pytest.fixture
def seal(tmp_path):
    return Seal.open(identity.Authority.open(tmp_path / "authority"))


@pytest.fixture
def key(seal, tmp_path):
    return identity.key_of_receipts(seal.certificate, (tmp_path / "authority" / "authority.pem").read_bytes())


def receipt(**more):
    usual = {"slot": str(SLOT), "sha256": "ab" * 32, "status": "accepted", "client": "berlin", "run": "r"}
    return Receipt(**{**usual, "received_at": 1_800_000_000.25, **more})


def check(one, key):
    check_receipt(one, key, client="berlin", run="r", slot=str(SLOT), sha256="ab" * 32)


def test_a_signed_receipt_survives_its_body_and_is_good(seal, key):
    one = seal.receipt(receipt(reason="ä \n"))
    check(read_receipt(write(one)), key)


@pytest.mark.parametrize("name", [field.name for field in fields(Receipt)])
def test_a_receipt_of_which_anything_was_changed_is_refused(seal, key, name):
    one = seal.receipt(receipt())
    other = {"received_at": 1.0, "signature": bytes(64), "status": "late"}.get(name, "cd" * 32)
    with pytest.raises(ProtocolError, match="do not trust this server"):
        check(replace(one, **{name: other}), key)


@pytest.mark.parametrize("purpose", ["client", "server", "another federation"])
def test_no_other_certificate_of_the_federation_signs_receipts(tmp_path, seal, purpose):
    authority = identity.Authority.open(tmp_path / "authority")
    if purpose == "client":
        pem = authority.sign_client(identity.make_request("x")[1], identity.RECEIPTS_NAME)
    elif purpose == "server":
        pem = authority.server_files([identity.RECEIPTS_NAME])[0].read_bytes()
    else:
        pem = Seal.open(identity.Authority.open(tmp_path / "other")).certificate
    with pytest.raises(ProtocolError, match="do not trust this server"):
        identity.key_of_receipts(pem, authority.certificate)
    with pytest.raises(ProtocolError, match="expected a certificate"):
        identity.key_of_receipts(b"nonsense", authority.certificate)


class ReportingDesk(SigningDesk):
    """A coordinator with a first plan for two clients."""

    def __init__(self, folder):
        super().__init__(folder)
        self.runtime = NetworkRuntime(self.coordinator)
        self.keyids = {name: self.enrol(name).keyid for name in ("berlin", "paris")}

    def open_slot(self, slot=SLOT):
        parts = self.coordinator.federation.task("train")
        cohort = tuple(self.keyids)
        plan = make_plan(parts, begin(parts, np.zeros(4, np.float32)), Context(Key.of(1)), cohort, slot)
        self.runtime.start(plan, cohort)

    def body(self, value=0.5, slot=SLOT):
        updates = Updates(("x",), np.full((1, 4), value, np.float32), np.array([3.0]), {"train_loss": np.array([0.5])})
        return pack_report(Report(slot, ("x",), updates), self.coordinator.federation.codec(slot))

    def report(self, name, value=0.5, slot=SLOT):
        return self.coordinator.report(Caller(name, self.keyids[name]), slot, self.body(value, slot))


@pytest.fixture
def desk(tmp_path):
    made = ReportingDesk(tmp_path)
    made.open_slot()
    yield made
    made.close()


def test_the_same_report_again_earns_the_same_receipt(desk):
    first = desk.report("berlin")
    desk.now += 60
    assert replace(desk.report("berlin"), signature=b"") == replace(first, signature=b"")
    assert first.status == "accepted"
    assert (first.client, first.run, first.received_at) == ("berlin", desk.coordinator.run, desk.now - 60)


@pytest.mark.parametrize("how", ["revoked", "replaced"])
def test_there_is_no_receipt_for_a_client_that_is_no_longer_one(desk, how):
    earlier = Caller("paris", desk.keyids["paris"])
    if how == "revoked":
        desk.registry.revoke("paris")
    else:
        desk.enrol("paris", again=True)
    with pytest.raises(Refusal) as caught:
        desk.coordinator.report(earlier, SLOT, desk.body())
    assert caught.value.code == ("revoked" if how == "revoked" else "unauthenticated")
    assert desk.coordinator.rounds.receipt(SLOT, "paris") is None


def test_a_client_keeps_its_receipts_with_the_next_thing_it_writes(tmp_path, seal):
    store = ClientStore(tmp_path / "berlin")
    writes = store._db.total_changes
    store.received("r", seal.receipt(receipt()), seal.certificate)
    store.received("r", seal.receipt(receipt(slot="train-1-0-update", status="late")), seal.certificate)
    assert store._db.total_changes == writes
    store.enter("r")
    store.close()
    again = ClientStore(tmp_path / "berlin")
    assert again.receipts() == {"accepted": 1, "late": 1}
    again.close()


@pytest.mark.network
def test_a_client_refuses_a_receipt_that_is_not_signed_and_keeps_those_that_are(site, tools):
    runtime = tools.runtime(site.coordinator)
    site.join("berlin", tools.data(1))
    runtime.wait_for_clients(1, 30)
    rounds = tools.rounds(site.federation, runtime, ["berlin"])
    rounds.run(0, 1)
    real = site.coordinator.rounds.seal
    object.__setattr__(site.coordinator.rounds, "seal", None)
    rounds.run(2)
    site.threads[0].join(30)
    assert "do not trust this server" in str(site.problems.pop("berlin"))
    object.__setattr__(site.coordinator.rounds, "seal", real)
    store = ClientStore(site.folder / "berlin")
    assert store.receipts() == {"accepted": 2}
    [body, pem] = store._one("SELECT body, signed_by FROM receipts WHERE slot = 'train-1-0-update'")
    kept = read_receipt(body)
    key = identity.key_of_receipts(pem, site.coordinator.authority.certificate)
    check_receipt(kept, key, client="berlin", run=kept.run, slot=kept.slot, sha256=kept.sha256)
    store.close()


def test_a_token_made_before_a_revocation_does_not_undo_it(desk):
    fleet = desk.invite("par*", uses=5)
    own = desk.invite("paris", again=True)
    desk.now += 1
    desk.registry.revoke("paris")
    for token in (own, fleet):
        request = identity.make_request("paris")[1]
        with pytest.raises(Refusal):
            desk.coordinator.enrol(Enrol(token=token.id, secret=token.secret, name="paris", request=request))
    desk.now += 1
    assert desk.enrol("paris").keyid
