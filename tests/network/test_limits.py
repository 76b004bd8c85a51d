"""Sockets that dawdle, lie or come in crowds, against a coordinator with short deadlines."""

import socket
import ssl
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.core.errors import InputError
from hansa.network import identity, sockets
from hansa.network.calls import Signed
from hansa.network.enrolment import Identity
from hansa.network.http import serve_in_thread
from hansa.network.limits import CUTS, Groups, Limits, Patience

SHORT = Limits(
    handshake_s=0.3, headers_s=0.3, grace_s=0.3, longest_silence_s=0.3, slowest_bytes_per_s=1000, strangers=20
)
network = pytest.mark.network


@pytest.fixture
def serve(site):
    """Serve the site's coordinator once more, with limits of one's own."""
    made = []

    def start(limits=SHORT):
        made.append(serve_in_thread(site.coordinator, limits=limits))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def berlin(site):
    return site.enrol("berlin")


def connect(site, server, who: Identity | None = None) -> ssl.SSLSocket:
    """A TLS connection, of a client or of a stranger."""
    context = who.context() if who else identity.client_context(site.coordinator.authority.certificate)
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    return context.wrap_socket(raw, server_hostname="127.0.0.1")


def drip(line, piece=b"x", every_s=0.02):
    """One piece after the other until the line is cut; the seconds that took."""
    began = time.monotonic()
    with suppress(OSError):
        while time.monotonic() - began < 10:
            line.sendall(piece)
            time.sleep(every_s)
    return time.monotonic() - began


def ends(line) -> bool:
    """Whether the other end closes the line within the socket's timeout, whatever it says before."""
    try:
        while line.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def ask(line) -> int:
    """The status of a small request's answer, which is read to its end."""
    line.sendall(b"GET /v1/authority HTTP/1.1\r\nHost: x\r\n\r\n")
    found = b""
    while b"END CERTIFICATE-----\n" not in found:
        found += line.recv(65536)
    return int(found.split()[1])


def signed(server, who: Identity, target: str) -> bytes:
    """A small request of a client, which has heard this server's time."""
    signer = who.signer()
    url = f"https://127.0.0.1:{server.port}"
    with httpx.Client(base_url=url, verify=who.context(), auth=Signed(signer), trust_env=False) as http:
        http.get("/v1/blobs/none")
    lines = [f"GET {target} HTTP/1.1", "Host: x", *map(": ".join, signer.headers("GET", target.encode()).items())]
    return "\r\n".join([*lines, "", ""]).encode()


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def is_well(site, server, who) -> bool:
    """Whether a healthy client gets its answer."""
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=who.context(), trust_env=False) as http:
        return http.get("/v1/authority").status_code == 200


# ------------------------------------------------------------------------------------------------- without sockets


@given(st.lists(st.integers(100, 10**6), min_size=1, max_size=200))
def test_a_transfer_that_keeps_the_lowest_speed_goes_on_for_ever(steps):
    patience, moved = Patience(Limits(slowest_bytes_per_s=100), now=0.0), 0
    for second, size in enumerate(steps, start=1):
        moved += size
        assert not patience.is_over(now=float(second), moved=moved)


@given(st.floats(0, 0.9), st.integers(0, 10**9))
def test_a_slower_transfer_ends_however_fast_it_was_before(share, before):
    limits = Limits(slowest_bytes_per_s=1000, grace_s=10, longest_silence_s=30)
    patience = Patience(limits, now=0.0)
    assert not patience.is_over(now=1.0, moved=before)
    most = 30 / (1 - share) + 2
    over = [patience.is_over(now=1.0 + s, moved=before + int(1000 * share * s)) for s in range(1, int(most) + 1)]
    assert over[-1]


@given(st.lists(st.sampled_from("ab")))
def test_a_group_never_grows_beyond_its_most_when_its_oldest_go(steps):
    groups = Groups[int](most=3)
    for number, group in enumerate(steps):
        oldest = groups.add(group, number)
        if oldest is not None:
            assert oldest == min(groups.members[group])
            groups.remove(group, oldest)
        assert all(0 < len(members) <= 3 for members in groups.members.values())


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(InputError, match="expected strangers above 0, found 0"):
        Limits(strangers=0)


# ---------------------------------------------------------------------------------------------------- with sockets


@network
def test_who_never_begins_tls_is_cut(serve):
    server = serve()
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as line:
        assert ends(line)
    until(lambda: server.cuts == {"handshake": 1})


@network
@pytest.mark.parametrize("begin", [b"", b"GET /v1/authority HTTP/1.1\r\nX-Slow: "])
def test_headers_that_do_not_end_are_cut(site, serve, begin):
    server = serve()
    with closing(connect(site, server)) as line:
        line.sendall(begin)
        assert drip(line) < 5 if begin else ends(line)
    assert server.cuts == {"headers": 1}


@network
def test_the_deadline_of_headers_begins_anew_with_each_request(site, serve, berlin):
    server = serve(Limits(headers_s=0.3))
    with closing(connect(site, server, berlin)) as line:
        for _ in range(3):
            assert ask(line) == 200
            time.sleep(0.4)  # longer than headers may take: nothing is due
        line.sendall(b"GET /v1/auth")
        assert ends(line)
    assert server.cuts == {"headers": 1}


@network
def test_a_body_at_a_few_bytes_a_second_is_cut(site, serve, berlin):
    server = serve()
    with closing(connect(site, server, berlin)) as line:
        line.sendall(b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        assert drip(line) < 5
    assert server.cuts == {"slow body": 1}


@network
def test_a_body_that_is_slow_and_not_too_slow_arrives(site, serve, berlin):
    server = serve()
    with closing(connect(site, server, berlin)) as line:
        line.sendall(b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n")
        for _ in range(50):
            line.sendall(b"x" * 100)
            time.sleep(0.02)
        assert line.recv(65536).startswith(b"HTTP/1.1 400")  # it is read, and is no hello
    assert server.cuts == {}


@network
def test_a_download_that_nobody_reads_is_cut(site, serve, berlin):
    server = serve()
    sha256 = site.coordinator.publish({"params": bytes(32_000_000)})["params"]
    request = signed(server, berlin, f"/v1/blobs/{sha256}")
    with closing(connect(site, server, berlin)) as line:
        line.sendall(request)
        until(lambda: server.num_connections == 0)
    assert server.cuts == {"slow reader": 1}


@network
@pytest.mark.parametrize(("length", "cuts"), [(10**6, {"unread body": 1}), (10**9, {})])
def test_a_body_that_goes_on_after_its_refusal_is_cut(site, serve, berlin, length, cuts):
    server = serve(Limits())
    with closing(connect(site, server, berlin)) as line:
        line.sendall(f"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b"413" in line.recv(65536)
        assert drip(line, b"x" * 1000, every_s=0.01) < 5
    assert server.cuts == cuts  # a longer one is not waited for


@network
@pytest.mark.parametrize("what", [b"\x16\x03\x01nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000])
def test_what_is_no_request_is_told_so_and_closed(site, serve, what):
    server = serve()
    with closing(connect(site, server)) as line:
        line.sendall(what)
        assert line.recv(65536).startswith(b"HTTP/1.1 400")
        assert ends(line)
    assert server.cuts == {"malformed": 1}


@network
def test_a_question_that_is_held_is_not_cut(site, serve, berlin, tools):
    server = serve()
    connection = site.connect("berlin", site.participant("berlin", None).store)
    connection.hello((tools.app,))
    connection.close()
    connection.store.close()
    request = signed(server, berlin, "/v1/work?wait=1.5")
    with closing(connect(site, server, berlin)) as line:
        line.sendall(request)
        assert line.recv(65536).startswith(b"HTTP/1.1 200")
    assert server.cuts == {}


@network
def test_the_oldest_connection_of_a_client_goes_when_it_has_too_many(site, serve, berlin):
    server = serve(Limits(connections_by_client=2))
    lines = [connect(site, server, berlin) for _ in range(3)]
    assert ends(lines[0])
    assert ask(lines[2]) == 200
    assert server.cuts == {"client": 1}
    for line in lines:
        line.close()


@network
def test_strangers_make_room_for_who_knocks_and_clients_for_nobody(site, serve, berlin, monkeypatch):
    monkeypatch.setattr(sockets, "_FAIR_S", 0.2)
    server = serve(Limits(strangers=3))
    client = connect(site, server, berlin)
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(10)]
    assert is_well(site, server, berlin)
    assert ask(client) == 200
    assert set(server.cuts) == {"full"}
    for line in [client, *idle]:
        line.close()


@network
def test_who_knocks_when_all_are_clients_is_turned_away(site, serve, berlin):
    server = serve(Limits(connections=1))
    with closing(connect(site, server, berlin)), pytest.raises(OSError):  # noqa: PT011  # reset, or an early end
        connect(site, server, berlin)
    assert server.cuts == {"full": 1}


@network
def test_strangers_of_one_address_are_few(serve, monkeypatch):
    monkeypatch.setattr(sockets, "_outside", lambda address: address)  # or else this machine is not counted
    server = serve(Limits(strangers_by_address=2))
    lines = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3)]
    assert ends(lines[0])
    until(lambda: server.num_connections == 2)
    assert server.cuts == {"address": 1}
    for line in lines:
        line.close()


@pytest.mark.parametrize(
    ("address", "counted"),
    [("127.0.0.1", ""), ("::1", ""), ("192.0.2.1", "192.0.2.1"), ("fe80::1%eth0", "fe80::1%eth0")],
)
def test_this_machine_is_not_counted_by_address(address, counted):
    assert sockets._outside(address) == counted


@network
def test_a_healthy_client_is_answered_beside_a_crowd_of_slow_ones(site, serve, berlin):
    server = serve(Limits(grace_s=1.0, headers_s=1.0))
    crowd = [connect(site, server) for _ in range(50)]
    for line in crowd:
        line.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
    assert is_well(site, server, berlin)
    assert all(ends(line) for line in crowd)
    assert server.cuts == {"headers": 50}
    for line in crowd:
        line.close()


@network
def test_a_closing_server_tells_who_asks_when_to_come_back(site, serve, berlin):
    server = serve()
    server._server.bell.closing = True
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=berlin.context(), trust_env=False) as http:
        answer = http.get("/v1/work")
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (503, "stopping", "1")


@network
def test_cuts_are_kept_in_the_state_folder(site, serve):
    for total in (1, 2):
        server = serve()
        with closing(connect(site, server)) as line:
            line.sendall(b"nonsense\r\n\r\n")
            assert ends(line)
        server.close()
        assert site.coordinator.status()["cuts"] == {"malformed": total}


def test_every_cut_has_its_words():
    source = Path(sockets.__file__).read_text()
    assert all(f'"{why}"' in source for why in CUTS)
