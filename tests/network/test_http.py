import socket

import httpx2 as httpx
import pytest

from hansa.core.errors import InputError
from hansa.network import identity
from hansa.network.calls import Signed
from hansa.network.http import serve_in_thread

pytestmark = pytest.mark.network


@pytest.fixture
def client(site):
    who = site.enrol("berlin")
    auth = Signed(who.signer())
    with httpx.Client(base_url=site.url, verify=who.context(), auth=auth, trust_env=False) as http:
        yield http


@pytest.fixture
def stranger(site):
    context = identity.client_context(site.coordinator.authority.certificate)
    with httpx.Client(base_url=site.url, verify=context, trust_env=False) as http:
        yield http


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/hello"),
        ("GET", "/v1/work"),
        ("GET", "/v1/blobs/" + "0" * 64),
        ("PUT", "/v1/reports/run/train-0-0-update/" + "0" * 64),
        ("GET", "/v1/reports/run/train-0-0-update/" + "0" * 64),
        ("POST", "/v1/goodbye"),
    ],
)
def test_everything_but_enrolment_needs_a_certificate(stranger, method, path):
    answer = stranger.request(method, path, content=b"")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


def test_a_certificate_of_another_authority_is_refused_by_tls(site, tmp_path):
    other = identity.Authority.open(tmp_path / "other")
    key, request = identity.make_request("berlin")
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "pem").write_bytes(other.sign_client(request, "berlin"))
    context = identity.client_context(site.coordinator.authority.certificate, tmp_path / "pem", tmp_path / "key")
    with (
        httpx.Client(base_url=site.url, verify=context, trust_env=False) as http,
        pytest.raises(httpx.TransportError),
    ):
        http.get("/v1/authority")


def test_the_authority_is_public(stranger, site):
    assert identity.fingerprint(stranger.get("/v1/authority").content) == site.coordinator.authority.fingerprint


@pytest.mark.parametrize("name", ["../authority/authority.key", "%2e%2e%2fcoordinator.db", "0" * 64, "0" * 63])
def test_only_vectors_can_be_downloaded(client, name):
    assert client.get(f"/v1/blobs/{name}").status_code == 404


def test_a_body_larger_than_it_may_be_is_refused_before_it_is_read(client):
    answer = client.post("/v1/hello", content=b"x" * 70_000)
    assert (answer.status_code, answer.json()["code"]) == (413, "too-large")


def test_a_body_without_a_length_is_refused(client, site):
    path = f"/v1/reports/{site.coordinator.run}/train-0-0-update"
    assert client.get("/v1/work").json()["code"] == "hello-first"  # now it knows the server's time
    answer = client.post("/v1/hello", content=iter([b"x"]))
    assert (answer.status_code, answer.json()["code"]) == (401, "signature")
    answer = client.put(path, content=iter([b"x"]), headers={"Content-Range": "bytes 0-0/1"})
    assert answer.status_code in (404, 411)


@pytest.mark.parametrize("body", [b"", b"x", b"\x80\x05K\x01."])
def test_a_malformed_body_is_the_clients_fault(client, body):
    answer = client.post("/v1/hello", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed")


def test_a_report_to_no_slot_is_refused(client, site):
    for run in ("other", site.coordinator.run):
        path = f"/v1/reports/{run}/train-0-0-update/{'0' * 64}"
        assert client.put(path, content=b"x").json()["code"] == client.get(path).json()["code"] == "not-asked"
    assert client.put(f"/v1/reports/{site.coordinator.run}/nonsense/{'0' * 64}", content=b"x").status_code == 400


def test_a_port_in_use_is_named_with_what_to_do(site):
    with pytest.raises(InputError, match=rf"port {site.server.port}: .*found it in use; .*--listen"):
        serve_in_thread(site.coordinator, f"127.0.0.1:{site.server.port}")


@pytest.mark.parametrize("listen", ["", "localhost", "127.0.0.1:", "127.0.0.1:99999", ":x"])
def test_an_address_that_is_none_is_refused(site, listen):
    with pytest.raises(InputError, match="expected HOST:PORT"):
        serve_in_thread(site.coordinator, listen)


def test_an_address_of_another_machine_is_refused(site):
    with pytest.raises(InputError, match="expected an address of this machine"):
        serve_in_thread(site.coordinator, "192.0.2.1:0")


def test_closing_frees_the_port(site):
    port = site.server.port
    site.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
