"""Whose word a client takes: that of clients whom the authority certified, and with a list of peers of those on it."""

import pytest

from hansa.commands.status import run_status
from hansa.core.errors import InputError
from hansa.network import identity, renewal
from hansa.network.blobs import write_file
from hansa.network.credentials import Enrolled, Roster, own_line, read_peers
from hansa.network.enrolment import Identity
from hansa.network.identity import Authority
from hansa.network.messages import Enrolled as Answer
from hansa.network.messages import write
from hansa.network.signing import load_private_key, sign

DAY_S = 86_400.0


@pytest.fixture
def authority(tmp_path):
    return Authority.open(tmp_path / "authority")


@pytest.fixture
def enrol(tmp_path, authority):
    """The state folder of a client that has enrolled with an authority."""

    def make(name, by=authority):
        folder = tmp_path / name / "identity"
        key, request = identity.make_request(name)
        certificate = by.sign_client(request, name)
        write_file(folder / "client.key", key, private=True)
        write_file(folder / "client.pem", certificate)
        write_file(folder / "authority.pem", by.certificate)
        Identity(folder, name, "https://localhost:1", by.fingerprint).dated().save()
        return folder.parent

    return make


def test_a_peers_signature_holds_for_what_it_signed_and_for_its_own_name(enrol):
    berlin, paris = Enrolled(enrol("berlin")), Enrolled(enrol("paris"))
    signature = paris.sign(b"said")
    assert len(signature) == 64
    assert berlin.fault("paris", paris.certificate, signature, b"said") == ""
    assert "not of this certificate's key" in berlin.fault("paris", paris.certificate, signature, b"other")
    assert "not of this certificate's key" in berlin.fault("paris", paris.certificate, bytes(64), b"said")
    assert "for another name" in berlin.fault("rome", paris.certificate, signature, b"said")
    assert "not of this certificate's key" in berlin.fault("berlin", berlin.certificate, signature, b"said")


def test_certificates_of_another_authority_of_a_server_for_receipts_and_none_are_refused(enrol, authority, tmp_path):
    berlin, other = Enrolled(enrol("berlin")), Authority.open(tmp_path / "other")
    stranger = Enrolled(enrol("mallory", other))
    said = berlin.fault("mallory", stranger.certificate, stranger.sign(b"x"), b"x")
    assert "no certificate of this federation's authority" in said
    for paths in (authority.server_files(["localhost"]), authority.receipts_files()):
        certificate, key = (path.read_bytes() for path in paths)
        der = identity.der_of(certificate)
        name = "localhost" if paths[0].stem == "server" else identity.RECEIPTS_NAME
        assert "not one of a client" in berlin.fault(name, der, sign(load_private_key(key), b"x"), b"x")
    assert "cannot be read" in berlin.fault("paris", identity.der_of(authority.certificate), bytes(64), b"x")
    assert "no certificate" in berlin.fault("paris", b"", b"", b"x")
    assert "no certificate" in berlin.fault("paris", b"junk", bytes(64), b"x")


def test_a_certificate_counts_until_two_days_after_its_end_so_that_clocks_may_differ(enrol, authority):
    paris = Enrolled(enrol("paris"))
    _, ends, _ = identity.client_of(paris.certificate, authority.certificate)
    for late_s, fault in ((DAY_S, ""), (3 * DAY_S, "its certificate has ended, by the clock of this machine")):
        roster = Roster(authority.certificate, now=lambda late_s=late_s: ends + late_s)
        assert roster.fault("paris", paris.certificate, paris.sign(b"x"), b"x") == fault


def test_a_certificate_is_looked_at_once(enrol, monkeypatch):
    berlin, paris, looked = Enrolled(enrol("berlin")), Enrolled(enrol("paris")), []
    real = identity.client_of
    monkeypatch.setattr(identity, "client_of", lambda *given: looked.append(given) or real(*given))
    for number in range(5):
        message = bytes([number])
        assert berlin.fault("paris", paris.certificate, paris.sign(message), message) == ""
    assert len(looked) == 1


def test_a_renewed_identity_signs_with_its_new_key(enrol, authority):
    state = enrol("paris")
    paris, berlin = Enrolled(state), Enrolled(enrol("berlin"))
    before = paris.certificate

    def certify(body):
        from hansa.network.messages import read_renew

        return write(Answer(name="paris", certificate=authority.sign_client(read_renew(body).request, "paris")))

    renewal.renew(Identity.of(state), certify).forget_other()
    assert paris.certificate != before
    assert berlin.fault("paris", paris.certificate, paris.sign(b"x"), b"x") == ""
    assert berlin.fault("paris", before, paris.sign(b"x"), b"x") != ""


def test_with_a_list_of_peers_others_are_refused_though_the_authority_certified_them(enrol, tmp_path):
    states = {name: enrol(name) for name in ("berlin", "paris", "rome")}
    lines = {name: own_line(Identity.of(state)) for name, state in states.items()}
    list_of = tmp_path / "peers.txt"
    list_of.write_text(f"# by telephone\n\n{lines['paris']}  # the one in Texas\n{lines['rome'].replace('a', 'b')}\n")
    berlin = Enrolled(states["berlin"], read_peers(list_of))
    paris, rome = Enrolled(states["paris"]), Enrolled(states["rome"])
    assert berlin.fault("paris", paris.certificate, paris.sign(b"x"), b"x") == ""
    assert "not in your list of peers with this key" in berlin.fault("rome", rome.certificate, rome.sign(b"x"), b"x")
    oslo = Enrolled(enrol("oslo"))
    assert berlin.fault("oslo", oslo.certificate, oslo.sign(b"x"), b"x") == "it is not in your list of peers"


@pytest.mark.parametrize("line", ["paris", "paris 12", f"p/ris {'a' * 64}", f"a {'b' * 64}\na {'c' * 64}", "a b c"])
def test_a_line_that_is_not_a_peer_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "peers.txt").write_text(line)
    with pytest.raises(InputError, match=r"peers\.txt, line [12]: expected a name, once, and the 64 hex digits"):
        read_peers(tmp_path / "peers.txt")
    with pytest.raises(InputError, match="expected a text file"):
        read_peers(tmp_path / "none.txt")


def test_status_shows_the_line_that_others_put_on_their_lists(enrol, capsys):
    state = enrol("berlin")
    from hansa.network.client_store import ClientStore

    ClientStore(state).close()
    run_status(state, False)
    assert own_line(Identity.of(state)) in capsys.readouterr().out.replace("\n", "")


def test_without_an_identity_there_is_nothing_to_sign_with(tmp_path):
    with pytest.raises(InputError, match="expected the state of a client that has enrolled"):
        Enrolled(tmp_path)
