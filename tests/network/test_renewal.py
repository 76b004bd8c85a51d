"""A client gets its next certificate in time, and a crash at any moment leaves it one that works."""

import dataclasses

import pytest

from hansa.core.errors import InputError, ProtocolError, RunError
from hansa.network import blobs, enrolment, identity, renewal
from hansa.network.client_store import ClientStore
from hansa.network.enrolment import Identity, enrol
from hansa.network.messages import Enrolled, Refusal, Renew, read_renew, write
from hansa.network.registry import Caller
from support_signing import DAY_S, SigningDesk


@pytest.fixture
def desk(tmp_path):
    made = SigningDesk(tmp_path / "server")
    yield made
    made.close()


class Killed(BaseException):
    """The process ends here."""


def asked(desk, signer, request=None):
    """The next certificate of berlin, by a signed request for it, and its key."""
    key, made = identity.make_request("berlin")
    caller, _ = desk.check(desk.scope(signer, "POST", b"/v1/renew", b"csr"))
    enrolled = desk.registry.renew(caller, Renew(request=request or made), desk.coordinator.authority)
    return key, enrolled.certificate


def test_both_certificates_work_until_the_new_one_is_used(desk):
    old = desk.in_step(desk.enrol())
    new = desk.signer(*asked(desk, old))
    for _ in range(2):
        assert desk.check(desk.scope(old))[0] == "berlin"
    desk.in_step(new)
    assert desk.refusal(desk.scope(old))["code"] == "unauthenticated"
    assert desk.check(desk.scope(new))[0] == "berlin"
    assert [entry.kind for entry in desk.log()][-2:] == ["renewed", "replaced"]


def test_the_same_request_gets_the_same_certificate_and_another_replaces_it(desk):
    signer, request = desk.in_step(desk.enrol()), identity.make_request("berlin")[1]
    first = asked(desk, signer, request)[1]
    assert asked(desk, signer, request)[1] == first
    second = asked(desk, signer)[1]
    assert second != first
    with pytest.raises(Refusal):
        desk.registry.authenticate(identity.fingerprint(first))
    assert desk.registry.authenticate(identity.fingerprint(second)) == "berlin"


def test_a_renewal_that_nobody_proved_replaces_nothing(desk):
    old = desk.in_step(desk.enrol())
    _, certificate = asked(desk, old)
    thief = desk.signer(identity.make_request("berlin")[0], certificate)
    assert desk.refusal(desk.scope(thief))["code"] == "unauthenticated"
    assert desk.check(desk.scope(old))[0] == "berlin"


def test_a_revoked_client_cannot_renew_and_its_next_certificate_is_void(desk):
    signer = desk.in_step(desk.enrol())
    key, certificate = asked(desk, signer)
    caller = Caller("berlin", signer.keyid)
    desk.registry.revoke("berlin")
    assert desk.refusal(desk.scope(desk.signer(key, certificate)))["code"] == "unauthenticated"
    with pytest.raises(Refusal, match="was revoked"):
        desk.registry.renew(caller, Renew(request=identity.make_request("berlin")[1]), desk.coordinator.authority)


def test_an_invitation_for_a_lost_machine_ends_its_certificate_and_the_next_one(desk):
    lost = desk.in_step(desk.enrol())
    caller, _ = desk.check(desk.scope(lost))
    key, certificate = asked(desk, lost)
    found = desk.enrol(again=True)
    assert desk.refusal(desk.scope(lost))["code"] == "unauthenticated"
    assert desk.refusal(desk.scope(desk.signer(key, certificate)))["code"] == "unauthenticated"
    with pytest.raises(Refusal):
        desk.registry.check_revoked(caller)
    assert desk.check(desk.scope(desk.in_step(found)))[0] == "berlin"


@pytest.fixture
def enrolled(tmp_path):
    """An identity on disk and a server that answers renewals."""
    authority = identity.Authority.open(tmp_path / "authority")
    folder = tmp_path / "berlin" / "identity"
    folder.mkdir(parents=True)
    key, request = identity.make_request("berlin")
    (folder / "client.key").write_bytes(key)
    (folder / "client.pem").write_bytes(authority.sign_client(request, "berlin"))
    (folder / "authority.pem").write_bytes(authority.certificate)
    who = Identity(folder, "berlin", "https://localhost:1", authority.fingerprint, token="t").dated()
    who.save()
    return who, lambda body: write(
        Enrolled(name="berlin", certificate=authority.sign_client(read_renew(body).request, "berlin"))
    )


def test_a_renewal_makes_a_new_key_and_goes_over_to_it(enrolled):
    who, answer = enrolled
    new = renewal.renew(who, answer)
    assert Identity.of(who.folder.parent) == new != who
    assert new.key.read_bytes() != who.key.read_bytes()
    new.context(), new.signer()
    new.forget_other()
    assert not who.key.exists()
    again = renewal.renew(new, answer)
    assert (again.stem, Identity.of(who.folder.parent)) == (who.stem, again)


@pytest.mark.parametrize("moment", range(4))
def test_a_crash_at_any_moment_leaves_an_identity_that_works(enrolled, monkeypatch, moment):
    who, answer = enrolled
    done = []

    def write_file(path, body, **more):
        if len(done) == moment:
            raise Killed
        blobs.write_file(path, body, **more)
        done.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(renewal, "write_file", write_file)
        patch.setattr(enrolment, "write_file", write_file)
        if moment < 3:
            with pytest.raises(Killed):
                renewal.renew(who, answer)
        else:
            renewal.renew(who, answer)
    left = Identity.of(who.folder.parent)
    assert left.stem == (who.stem if moment < 3 else who.other_stem)
    left.context(), left.signer()
    assert identity.certifies(left.certificate.read_bytes(), left.key.read_bytes(), left.authority_pem)
    renewal.renew(left, answer).context()


def test_a_certificate_that_is_not_for_the_new_key_changes_nothing(enrolled):
    who, _ = enrolled
    with pytest.raises(ProtocolError, match="do not trust this server"):
        renewal.renew(who, lambda _body: write(Enrolled(name="berlin", certificate=who.certificate.read_bytes())))
    assert Identity.of(who.folder.parent) == who


def test_an_identity_of_an_earlier_version_is_read(enrolled):
    who, _ = enrolled
    path = who.folder / "identity.json"
    path.write_text('{"name": "berlin", "url": "https://localhost:1", "authority": "ab"}')
    assert (Identity.of(who.folder.parent).ends, Identity.of(who.folder.parent).stem) == (who.ends, "client")
    path.write_text('{"name": "berlin", "url": "u", "authority": "ab", "stem": "../../etc/passwd"}')
    with pytest.raises(InputError, match="expected a client's identity"):
        Identity.of(who.folder.parent)


def live(site, seconds):
    """From now on the site's certificates are good for so long."""
    site.coordinator.authority = dataclasses.replace(site.coordinator.authority, client_life_s=seconds)


def joined(site, name):
    """A client that said hello, and what it heard."""
    heard, store = [], ClientStore(site.folder / name)
    connection = site.connect(name, store, lambda what, more: heard.append(what))
    return connection, store, heard


@pytest.mark.network
def test_a_client_renews_in_the_last_third_of_the_life_of_its_certificate(site, tools):
    live(site, 120.0)
    connection, store, heard = joined(site, "berlin")
    live(site, 1000 * DAY_S)
    connection.hello((tools.app,))
    connection.renew_if_due()
    assert heard == []
    connection._signer._ahead += 81.0  # the server's clock goes on
    connection.renew_if_due()
    assert heard == ["renewed"]
    connection.hello((tools.app,))
    connection.renew_if_due()
    assert (heard, len(list((site.folder / "berlin" / "identity").glob("*.key")))) == (["renewed"], 1)
    assert "certificate request" in (site.folder / "berlin" / "sent.csv").read_text()
    connection.close()
    store.close()


@pytest.mark.network
def test_a_client_whose_certificate_has_ended_renews_and_takes_part(site, tools):
    live(site, -3600.0)
    site.enrol("berlin")
    live(site, 1000 * DAY_S)
    site.join("berlin", tools.data(1))
    runtime = tools.runtime(site.coordinator)
    assert runtime.wait_for_clients(1, 30) == ("berlin",)
    tools.rounds(site.federation, runtime, ["berlin"]).run(0)
    assert site.problems == {}


@pytest.mark.network
def test_a_certificate_that_ended_long_ago_is_refused_with_what_to_ask_for(site, tools):
    live(site, -3600.0)
    site.enrol("berlin")
    now = site.store.clock
    site.store.clock = lambda: now() + 31 * DAY_S
    site.join("berlin", tools.data(1)).join(30)
    assert isinstance(site.problems["berlin"], RunError)
    assert "hansa invite berlin --again" in str(site.problems["berlin"])


@pytest.mark.network
def test_a_new_token_for_the_same_name_replaces_the_identity_and_the_old_token_does_not(site):
    first = site.invite("berlin")
    who = enrol(first, site.folder / "berlin")
    assert enrol(first, site.folder / "berlin") == who
    second = site.invite("berlin", again=True)
    new = enrol(second, site.folder / "berlin")
    assert new == Identity.of(site.folder / "berlin") == enrol(second, site.folder / "berlin")
    assert new.key.read_bytes() != who.key.read_bytes()
    with pytest.raises(InputError, match="hansa invite berlin"):
        enrol(first, site.folder / "berlin")
