"""Cases of requests that should not count: recorded and sent again, from strangers, or made by a wrong clock.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import hashlib
import ssl
import time
from dataclasses import replace

import pytest

from faults.lines import compose, in_step, once, sign
from faults.sites import APP, Rounds, rows, state_of, stranger, watched_site
from hansa.core.protocols import Slot
from hansa.network import identity
from hansa.network.enrolment import enrol
from hansa.network.messages import Enrol, Refusal, write
from hansa.network.runtime import NetworkRuntime
from hansa.network.signing import Signer
from support_quay import SLOT, Quay, federation_of, wait_until

pytestmark = pytest.mark.network
DAY_S = 86_400.0


# ---------------------------------------------------------------------------------------------------------- replayed


def test_case_07_a_signed_request_is_good_once_for_one_body_one_round_and_one_start(tmp_path):
    with watched_site(tmp_path, federation_of(8)) as site, contextlib.closing(Quay(site, 8)) as quay:
        berlin, paris, body = quay.identities["berlin"], quay.identities["paris"], quay.body()
        target, other = quay.path(hashlib.sha256(body).hexdigest()), quay.path("0" * 64, Slot(1, 0, "update"))
        signer = in_step(site, berlin)
        unused = sign(signer, "PUT", target, body)
        recorded = sign(signer, "PUT", target, body)
        assert once(site, compose("PUT", target, body, recorded), berlin).status == 200
        before = state_of(site)
        attempts = {
            "again": (compose("PUT", target, body, recorded), berlin, "replay"),
            "on a line of nobody's": (compose("PUT", target, body, recorded), None, "replay"),
            "on another client's line": (compose("PUT", target, body, recorded), paris, "unauthenticated"),
            "another body": (compose("PUT", target, body[::-1], recorded), berlin, "replay"),
            "another round": (compose("PUT", other, body, recorded), berlin, "unauthenticated"),
            "another method": (compose("GET", target, b"", recorded), berlin, "unauthenticated"),
            "held back": (compose("PUT", target, body, unused), berlin, "replay"),
        }
        for what, (request, who, code) in attempts.items():
            answer = once(site, request, who)
            assert (answer.status, answer.json["code"]) == (401, code), what
        fresh = sign(signer, "PUT", target, body)
        answer = once(site, compose("PUT", target, body[::-1], fresh), berlin)
        assert (answer.status, answer.json["code"]) == (401, "signature")
        site.restart()
        assert once(site, compose("PUT", target, body, recorded), berlin).json["code"] == "clock"
        assert state_of(site) == before
        assert site.coordinator.rounds.receipt(SLOT, "berlin").status == "accepted"


# --------------------------------------------------------------------------------- of somebody who does not belong


def test_case_08_who_does_not_belong_is_told_no_in_one_form(tmp_path):
    with watched_site(tmp_path / "other") as other, watched_site(tmp_path / "ours") as site:
        named = {name: site.enrol(name) for name in ("revoked", "replaced", "ended", "well")}
        foreign = other.enrol("berlin")
        signers = {name: in_step(site, who) for name, who in named.items()}
        site.coordinator.revoke("revoked")
        enrol(site.invite("replaced", again=True), site.folder / "replaced")
        _, ends = identity.life_of(named["ended"].certificate.read_bytes())
        expected = {"revoked": (403, "revoked"), "replaced": (401, "unauthenticated"), "well": (409, "hello-first")}
        before, shapes = state_of(site), []
        for name, outcome in expected.items():
            answer = once(site, compose("GET", "/v1/work", headers=sign(signers[name], "GET", "/v1/work")), named[name])
            assert (answer.status, answer.json["code"]) == outcome
            shapes.append(answer)
        thief, _ = identity.make_request("revoked")
        forged = Signer(thief, signers["revoked"].keyid), Signer(thief, "cd" * 32)
        unknown = {
            "unsigned": {},
            "foreign": sign(foreign.signer(), "GET", "/v1/work"),
            "of a client that was revoked": sign(forged[0], "GET", "/v1/work"),
            "of a client that never was": sign(forged[1], "GET", "/v1/work"),
        }
        answers = {what: once(site, compose("GET", "/v1/work", headers=headers)) for what, headers in unknown.items()}
        assert {answer.status for answer in answers.values()} == {401}
        assert {answer.body for answer in answers.values()} == {shapes[1].body}  # one sentence for all of them
        site.store.clock = lambda: ends + 1.0
        answer = once(site, compose("GET", "/v1/work", headers=sign(signers["ended"], "GET", "/v1/work")))
        assert (answer.status, answer.json["code"]) == (403, "expired")
        site.store.clock = time.time
        for one in [*shapes, *answers.values(), answer]:
            assert set(one.json) == {"error", "code"}
            assert one.headers["content-type"] == "application/json"
        assert state_of(site) == before


def test_case_08_a_client_whose_certificate_was_replaced_says_so_in_a_sentence(site):
    site.enrol("berlin")
    with stranger(site, "berlin") as older:
        older.hello((APP,))
        enrol(site.invite("berlin", again=True), site.folder / "berlin")
        with pytest.raises(Refusal) as caught:
            older.hello((APP,))
    assert caught.value.code == "unauthenticated"
    assert "ask the coordinator for a new token" in str(caught.value)


def test_case_08_a_certificate_of_another_federation_or_out_of_date_ends_in_the_handshake(tmp_path):
    with watched_site(tmp_path / "other") as other, watched_site(tmp_path / "ours") as site:
        site.coordinator.authority = replace(site.coordinator.authority, client_life_s=-1.0)
        for who in (other.enrol("berlin"), site.enrol("paris")):
            context = identity.client_context(site.coordinator.authority.certificate, who.certificate, who.key)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                once(site, compose("GET", "/v1/authority"), context)


def test_case_08_a_token_that_is_wrong_used_expired_cancelled_or_another_federations_is_refused(tmp_path):
    with watched_site(tmp_path / "other") as other, watched_site(tmp_path / "ours") as site:
        used, expired, cancelled = site.invite("paris"), site.invite("rome", expires_s=1.0), site.invite("lyon")
        taken = site.invite("berlin")
        enrol(used, site.folder / "paris")
        site.enrol("berlin")
        site.enrol("lyon")
        site.coordinator.revoke("lyon")
        tokens = {
            "wrong": replace(site.invite("oslo"), secret=bytes(32)),
            "used": used,
            "expired": expired,
            "cancelled": cancelled,
            "another name's": replace(site.invite("bonn"), name="kiel"),
            "taken": taken,
            "foreign": other.invite("graz"),
        }
        before = state_of(site)
        site.store.clock = lambda: time.time() + 2.0
        for what, token in tokens.items():
            wish = Enrol(token=token.id, secret=token.secret, name=token.name, request=identity.make_request("x")[1])
            answer = once(site, compose("POST", "/v1/enrol", write(wish)))
            assert (answer.status, set(answer.json), answer.json["code"]) == (403, {"error", "code"}, "token"), what
        assert state_of(site) == before
        with site.store.read() as db:
            [[count]] = db.exec_driver_sql("SELECT COUNT(*) FROM audit WHERE kind = 'enrolment refused'").all()
        assert count == len(tokens)


# ------------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("days", [-1, 1])
def test_case_09_a_server_clock_that_is_stepped_ends_no_round_early_and_none_late(site, days):
    step = [0.0]
    site.store.clock = lambda: time.time() + step[0]
    token = site.invite("lyon", expires_s=7 * DAY_S)
    heard = []
    data = {name: rows(number) for number, name in enumerate(("berlin", "paris"))}

    def hear_of(what, more):
        if what == "plan":
            step[0] = days * DAY_S - step[0]  # back and forth, in the middle of every round
        heard.append((what, more.get("status")))

    for name, pair in data.items():
        site.join(name, pair, on_event=hear_of)
    runtime = NetworkRuntime(site.coordinator, deadline_s=60.0)
    runtime.wait_for_clients(2, timeout_s=30)
    rounds = Rounds(site.federation, runtime, data)
    for number in range(3):
        rounds.run(number)
        assert rounds.mean.clients == ("berlin", "paris")
    wait_until(lambda: heard.count(("receipt", "accepted")) == 6)  # the last ones are on their way
    assert {what for what, _ in heard} <= {"welcome", "plan", "receipt"}  # nobody had to begin anew
    site.enrol("rome")
    enrol(token, site.folder / "lyon")
    with stranger(site, "rome") as rome:
        rome.hello((APP,))
        runtime.deadline_s = 0.5
        step[0] -= DAY_S
        began = time.monotonic()
        absent = Rounds(site.federation, runtime, (*data, "rome"))
        absent.state = rounds.state
        absent.run(3)
    assert 0.5 <= time.monotonic() - began < 30
    assert absent.mean.clients == ("berlin", "paris")
    found = Rounds(site.federation, NetworkRuntime(site.coordinator), data)
    assert found.run(0, 1, 2).tobytes() == rounds.state.algorithm["params"].tobytes()
