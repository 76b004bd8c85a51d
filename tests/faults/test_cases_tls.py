"""Cases of TLS: what is too old, out of date, for another host or not TLS at all is refused, and nothing falls back.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import os
import socket
import ssl
import threading
import warnings

import httpx2 as httpx
import pytest

from faults import checkers
from faults.sites import Site, make_federation
from hansa.core.errors import InputError, RunError
from hansa.network import identity
from hansa.network.calls import Line
from hansa.network.http import serve_in_thread

pytestmark = pytest.mark.network


def old(context):
    """A context that speaks TLS 1.1 and nothing newer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def test_case_26_a_client_with_an_old_tls_is_refused(site):
    context = old(identity.unchecked_context())
    with (
        socket.create_connection(("127.0.0.1", site.server.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain).do_handshake()


def test_case_26_a_client_refuses_a_server_with_an_old_tls(tmp_path):
    authority = identity.Authority.open(tmp_path)
    context = old(identity.server_context(*authority.server_files(["127.0.0.1"]), authority.certificate))
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        plain, _ = listener.accept()
        with contextlib.suppress(OSError), plain:
            context.wrap_socket(plain, server_side=True)

    thread = threading.Thread(target=run)
    thread.start()
    with (
        socket.create_connection(listener.getsockname()) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        identity.client_context(authority.certificate).wrap_socket(plain, server_hostname="127.0.0.1")
    thread.join(10)
    listener.close()


@pytest.mark.parametrize("ended", ["_AUTHORITY_DAYS", "_SERVER_DAYS"])
def test_case_26_a_certificate_out_of_date_is_refused_by_the_client(tmp_path, monkeypatch, ended):
    monkeypatch.setattr(identity, ended, -1)
    with checkers.returns_to_baseline():
        site = Site(tmp_path, make_federation())
        line = Line(site.url, site.coordinator.authority.certificate, site_context(site))
        with pytest.raises(RunError, match="out of date"):
            line.ask("GET", "/v1/authority")
        line.close()
        site.end()


def site_context(site):
    return identity.client_context(site.coordinator.authority.certificate)


def test_case_26_plain_http_is_not_answered(site):
    with socket.create_connection(("127.0.0.1", site.server.port)) as plain:
        plain.settimeout(10)
        plain.sendall(b"GET /v1/authority HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        with contextlib.suppress(ConnectionError):
            while piece := plain.recv(4096):
                got += piece
    assert b"HTTP/" not in got
    with pytest.raises(httpx.TransportError):
        httpx.get(site.url.replace("https", "http") + "/v1/authority", trust_env=False)


def test_case_26_a_client_checks_host_and_authority_and_knows_no_way_not_to(site):
    who = site.enrol("berlin")
    for context in (who.context(), site_context(site)):
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert len(context.get_ca_certs()) == 1
    server = identity.server_context(
        *site.coordinator.authority.server_files(["localhost"]), site.coordinator.authority.certificate
    )
    assert server.options & ssl.OP_NO_RENEGOTIATION
    assert server.minimum_version == ssl.TLSVersion.TLSv1_2


def test_case_26_the_address_must_be_https(site):
    with pytest.raises(InputError, match="expected https"):
        serve_in_thread(site.coordinator, url="http://localhost:1")


def test_case_26_a_certificate_for_another_host_is_refused_by_the_client(site):
    who = site.enrol("berlin")
    with (
        socket.create_connection(("127.0.0.1", site.server.port)) as plain,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        who.context().wrap_socket(plain, server_hostname="elsewhere.example")


def test_case_26_a_client_that_asks_to_renegotiate_is_cut_off_and_no_other_is(site):
    context = site.enrol("berlin").context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # the newer one has no renegotiation
    hello = b"\x16\x03\x03\x00\x04\x01\x00\x00\x00"  # in the clear, where only sealed records may come
    with (
        socket.create_connection(("127.0.0.1", site.server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as line,
    ):
        os.write(line.fileno(), hello)
        with contextlib.suppress(OSError):
            assert line.recv(10) == b""
    with httpx.Client(base_url=site.url, verify=site_context(site), trust_env=False) as http:
        assert http.get("/v1/authority").status_code == 200
