"""Who is let in by a signature: time, nonce, epoch, certificate."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hansa.network import identity
from hansa.network.messages import Enrol, Refusal
from hansa.network.signing import Signer
from support_signing import DAY_S, SigningDesk


@pytest.fixture
def desk(tmp_path):
    made = SigningDesk(tmp_path)
    yield made
    made.close()


def test_a_client_learns_the_servers_time_from_the_first_answer_and_goes_on(desk):
    signer = desk.enrol()
    answer = desk.refusal(desk.scope(signer))
    assert (answer["code"], answer["now"], answer["epoch"]) == ("clock", desk.now, desk.checker.epoch)
    assert signer.learn(answer)
    for _ in range(3):
        caller, _ = desk.check(desk.scope(signer))
        assert (caller, caller.certificate) == ("berlin", signer.keyid)


@pytest.mark.parametrize("days", [-1, 1])
def test_a_server_clock_that_is_stepped_changes_nothing(desk, days):
    signer = desk.in_step(desk.enrol())
    desk.now += days * DAY_S
    assert desk.check(desk.scope(signer))[0] == "berlin"


@pytest.mark.parametrize("days", [-1, 0, 1])
def test_a_server_that_starts_again_by_whatever_clock_tells_its_clients_once(desk, days):
    signer = desk.in_step(desk.enrol())
    desk.now += days * DAY_S
    desk.start()
    assert desk.check(desk.scope(desk.in_step(signer)))[0] == "berlin"


def test_a_client_whose_clock_stood_still_is_told_once(desk):
    signer = desk.in_step(desk.enrol())
    signer._monotonic = lambda: desk.passed - DAY_S  # it slept for a day
    assert desk.check(desk.scope(desk.in_step(signer)))[0] == "berlin"


@pytest.mark.parametrize("days", [-1, 1])
def test_certificates_are_good_by_clocks_that_are_a_day_off(desk, days):
    desk.enrol()
    authority = desk.coordinator.authority
    server = authority.server_files(["localhost"])[0].read_bytes()
    for one in map(x509.load_pem_x509_certificate, (authority.certificate, server, desk.certificate())):
        now, _ = identity.life_of(one.public_bytes(Encoding.PEM))
        assert one.not_valid_before_utc.timestamp() < now + days * DAY_S < one.not_valid_after_utc.timestamp()


def test_a_request_that_was_recorded_is_refused_now_later_and_after_a_restart(desk):
    signer = desk.in_step(desk.enrol())
    recorded = desk.scope(signer)
    desk.check(recorded)
    assert desk.refusal(recorded)["code"] == "replay"
    desk.check(desk.scope(signer))
    assert desk.refusal(recorded)["code"] == "replay"
    desk.passed += 3600
    assert desk.refusal(recorded)["code"] == "clock"
    desk.start()
    assert desk.refusal(recorded)["code"] == "clock"


def test_a_client_that_starts_again_goes_on_from_the_last_nonce(desk):
    token, (key, request) = desk.invite("berlin"), identity.make_request("berlin")
    message = Enrol(token=token.id, secret=token.secret, name="berlin", request=request)
    certificate = desk.coordinator.enrol(message).certificate
    first = desk.in_step(desk.signer(key, certificate))
    for _ in range(5):
        desk.check(desk.scope(first))
    again = desk.signer(key, certificate)
    assert desk.check(desk.scope(desk.in_step(again)))[1].nonce == 7
    answer = desk.refusal(desk.scope(first))
    assert (answer["code"], answer["last"]) == ("replay", 7)
    assert first.learn(answer)
    assert desk.check(desk.scope(first))[1].nonce == 8


def test_the_connections_certificate_must_be_the_signers(desk):
    berlin, paris = desk.in_step(desk.enrol()), desk.enrol("paris")
    desk.check(desk.scope(berlin), shown=berlin.keyid)
    assert desk.refusal(desk.scope(berlin), shown=paris.keyid)["code"] == "unauthenticated"


def test_who_does_not_hold_the_key_cannot_tell_a_revoked_client_from_one_that_never_was(desk):
    signer = desk.enrol()
    desk.registry.revoke("berlin")
    assert desk.refusal(desk.scope(signer))["code"] == "revoked"
    thief, _ = identity.make_request("berlin")
    pretending, unknown = Signer(thief, signer.keyid), Signer(thief, "cd" * 32)
    assert desk.refusal(desk.scope(pretending)) == desk.refusal(desk.scope(unknown))


def test_a_certificate_that_has_ended_is_good_for_its_renewal_alone_and_for_30_days(desk):
    signer = desk.in_step(desk.enrol())
    _, ends = identity.life_of(desk.certificate())
    desk.now = ends + DAY_S
    assert desk.refusal(desk.scope(signer))["code"] == "expired"
    assert desk.check(desk.scope(signer, "POST", b"/v1/renew", b"csr"))[0] == "berlin"
    desk.now = ends + 31 * DAY_S
    answer = desk.refusal(desk.scope(signer, "POST", b"/v1/renew", b"csr"))
    assert (answer["code"], "hansa invite berlin --again" in answer["error"]) == ("expired", True)


def test_what_is_refused_is_noted_once_a_minute_and_client(desk):
    recorded = desk.scope(desk.in_step(desk.enrol()))
    desk.check(recorded)
    for _ in range(30):
        desk.refusal(recorded)
    [entry] = desk.log("request refused")
    assert (entry.who, "used before" in entry.what) == ("berlin", True)
    desk.now, desk.passed = desk.now + 61, desk.passed + 61
    forged = Signer(identity.make_request("berlin")[0], recorded_key(recorded))
    desk.refusal(desk.scope(forged))
    assert [("not its key" in entry.what) for entry in desk.log("request refused")] == [False, True]


def recorded_key(scope):
    return dict(scope["headers"])[b"signature-input"].decode().partition('keyid="')[2][:64]


def test_when_clients_were_seen_is_written_for_all_of_them_together(desk):
    signers = [desk.in_step(desk.enrol(name)) for name in ("berlin", "paris")]
    desk.now, desk.passed = desk.now + 20, desk.passed + 20
    for signer in signers:
        desk.check(desk.scope(signer))
    desk.passed += 20
    desk.check(desk.scope(signers[0]))
    assert {client["last_seen_s"] for client in desk.coordinator.status()["clients"]} == {0.0}


def test_who_proved_the_key_by_tls_is_told_the_time_before_anything_is_asked_of_the_database(desk, monkeypatch):
    signer = desk.enrol()
    with monkeypatch.context() as patch:
        patch.setattr(desk.registry.store, "row", None)
        answer = desk.refusal(desk.scope(signer), shown=signer.keyid)
    assert (answer["code"], answer["last"]) == ("clock", 0)
    assert signer.learn(answer)
    assert desk.check(desk.scope(signer), shown=signer.keyid)[0] == "berlin"
    thief = Signer(identity.make_request("berlin")[0], signer.keyid)  # the line is berlin's, the signature is not
    assert thief.learn(desk.refusal(desk.scope(thief), shown=signer.keyid))
    assert desk.refusal(desk.scope(thief), shown=signer.keyid)["code"] == "unauthenticated"


def test_what_has_to_be_written_is_handed_over_also_for_who_is_refused(desk):
    recorded, writes = desk.scope(desk.in_step(desk.enrol())), []
    desk.check(recorded)
    with pytest.raises(Refusal):
        desk.checker.check(recorded, None, writes.append)
    assert desk.log("request refused") == []
    for write in writes:
        write()
    assert len(desk.log("request refused")) == 1
