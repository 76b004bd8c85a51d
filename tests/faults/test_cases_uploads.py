"""Cases of reports on their way in: cut, sent twice, sent with other bytes, too large, or with a length that is a lie.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import hashlib
import threading
import tracemalloc

import numpy as np
import pytest

from faults.lines import compose, dial, hear, in_step, once, sign
from faults.process import send_report
from faults.proxy import FaultProxy, Faults
from faults.sites import APP, watched_site
from faults.trial import forks
from hansa.network import routes
from hansa.network.messages import Refusal
from hansa.network.outbox import Parcel
from hansa.network.quotas import Limits, Quotas
from support_quay import LONG, SHORT, SLOT, Quay, federation_of, wait_until

pytestmark = pytest.mark.network


@pytest.fixture
def make_quay(tmp_path):
    """A coordinator with an open slot of as many numbers as one likes; when it has ended, all is as it was."""
    with contextlib.ExitStack() as closing:

        def make(num_params, **options):
            site = closing.enter_context(watched_site(tmp_path, federation_of(num_params)))
            return closing.enter_context(contextlib.closing(Quay(site, num_params, **options)))

        yield make


def entries(quay, kind):
    """The audit log's entries of a kind."""
    with quay.site.store.read() as db:
        return db.exec_driver_sql("SELECT who, what FROM audit WHERE kind = ? ORDER BY number", (kind,)).all()


def at_once(*calls):
    """What each of several calls gives, or raises, when all are made at the same time."""
    gate, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number, call):
        gate.wait(10)
        try:
            found[number] = call()
        except Refusal as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


# ------------------------------------------------------------------------------------------------ killed in the middle


@pytest.fixture(scope="module")
def kill_in_the_middle():
    """Kill a client's process, really, while its report is on its way."""
    processes = forks()

    def kill(quay, parcel):
        quay.stores["berlin"].commit(quay.site.coordinator.run, SLOT, parcel, None, None)
        with FaultProxy(quay.site.server.port, Faults(bytes_per_s=2_000_000)) as proxy:
            where = quay.site.folder, APP, "berlin", proxy.url, quay.site.coordinator.run, SLOT
            client = processes.Process(target=send_report, args=where, daemon=True)
            client.start()
            wait_until(lambda: quay.size(parcel) > 300_000)
            client.kill()
            client.join(10)
            client.close()
        wait_until(lambda: not quay.site.coordinator.uploads.is_open(sent(quay, parcel)))
        assert 300_000 < quay.size(parcel) < parcel.size
        return quay.size(parcel)

    return kill


def sent(quay, parcel):
    return routes.Sent("berlin", SLOT, parcel.sha256)


def test_case_04_an_upload_whose_client_was_killed_goes_on_where_it_was(make_quay, kill_in_the_middle):
    quay = make_quay(LONG)
    parcel = quay.parcel()
    reached = kill_in_the_middle(quay, parcel)
    with FaultProxy(quay.site.server.port) as proxy:
        again = quay.stores["berlin"].outbox(quay.site.coordinator.run, SLOT)  # what it had committed
        assert quay.send(again, port=proxy.port).status == "accepted"
        assert proxy.counts["up"] < parcel.size - reached + 20_000
    assert quay.site.coordinator.updates.get(parcel.sha256) == quay.body()
    assert quay.kept() == []


def test_case_04_a_round_goes_on_without_who_was_killed_and_its_part_expires(make_quay, kill_in_the_middle):
    quay = make_quay(LONG, deadline_s=0.5, min_clients=1)
    kill_in_the_middle(quay, quay.parcel())
    assert quay.send(quay.parcel(1, "paris"), name="paris").status == "accepted"
    assert [report.clients for report in quay.runtime.reports(SLOT)] == [("paris",)]
    assert len(quay.kept()) == 1
    quay.runtime.settle(SLOT, ("paris",))
    quay.runtime.release(0, np.zeros(quay.num_params, np.float32), {})
    assert quay.kept() == []


# ----------------------------------------------------------------------------------------------------- sent twice


def test_case_05_the_same_report_any_number_of_times_earns_one_receipt_and_counts_once(make_quay):
    quay = make_quay(SHORT)
    parcel, run = quay.parcel(), quay.site.coordinator.run
    several = [quay.connection() for _ in range(4)]  # as if the same client ran four times
    receipts = at_once(*(lambda one=one: one.put_report(run, SLOT, parcel) for one in several))
    receipts += [several[0].put_report(run, SLOT, parcel) for _ in range(3)]
    quay.site.restart()
    receipts.append(quay.send(parcel))
    assert receipts[0].status == "accepted"
    assert len({(one.sha256, one.status, one.received_at) for one in receipts}) == 1
    assert [who for who, _ in entries(quay, "report")] == ["berlin"]
    quay.site.coordinator.rounds.freeze(SLOT, 1)
    assert [row.client for row in quay.site.coordinator.rounds.frozen(SLOT)] == ["berlin"]
    assert quay.kept() == []


def test_case_06_of_different_reports_the_first_stands_and_the_others_are_conflicts_in_the_log(make_quay):
    quay = make_quay(SHORT)
    parcels, run = [quay.parcel(seed) for seed in range(3)], quay.site.coordinator.run
    several = [quay.connection() for _ in parcels]
    found = at_once(
        *(lambda pair=pair: pair[0].put_report(run, SLOT, pair[1]) for pair in zip(several, parcels, strict=True))
    )
    [first] = [one for one in found if not isinstance(one, Refusal)]
    assert [one.code for one in found if isinstance(one, Refusal)] == ["conflict", "conflict"]
    for parcel in parcels:
        if parcel.sha256 != first.sha256:
            with pytest.raises(Refusal, match="the first report stands"):
                several[0].put_report(run, SLOT, parcel)
    assert quay.site.coordinator.rounds.receipt(SLOT, "berlin") == first
    assert [who for who, _ in entries(quay, "report")] == ["berlin"]
    assert {who for who, _ in entries(quay, "conflict")} == {"berlin"}
    assert quay.kept() == []


# ------------------------------------------------------------------------------------------- lengths that are lies


def put(quay, signer, body, headers, *, length=None, name=None):
    """A signed upload that says of its length what one likes."""
    target = quay.path(name or hashlib.sha256(body).hexdigest())
    said = {**sign(signer, "PUT", target, body), **headers}
    if length is not None:
        said["Content-Length"] = str(length)
    return compose("PUT", target, headers=said)


def test_case_11_a_body_is_held_to_the_length_that_it_said(make_quay):
    quay = make_quay(SHORT)
    who, body = quay.identities["berlin"], quay.body()
    signer = in_step(quay.site, who)
    with contextlib.closing(dial(quay.site, who)) as line:  # it says too little: what is more is no part of it
        line.sendall(put(quay, signer, body, {}, length=len(body) - 7) + body)
        answer = hear(line)
        assert (answer.status, answer.json["code"]) == (401, "signature")
        ends(line)
    with contextlib.closing(dial(quay.site, who)) as line:  # it says too much: what came is kept, and does not count
        line.sendall(put(quay, signer, body, {}, length=len(body) + 7) + body)
        line.shutdown(2)
    wait_until(lambda: quay.size(Parcel.of(body)) == len(body))
    assert quay.status() is None
    assert quay.send(Parcel.of(body)).status == "accepted"
    assert quay.kept() == []


FORMS = [
    {"Transfer-Encoding": "chunked"},
    {"Transfer-Encoding": "gzip, chunked"},
    {"Transfer-Encoding": "chunked", "Content-Length": "5"},
    {"Content-Length": "5, 6"},
    {"Content-Length": "+5"},
    {"Content-Length": "0x5"},
    {"Content-Length": "-5"},
    {"Content-Length": "9" * 30},
    {"Content-Length": "5 5"},
]


def test_case_11_a_body_without_one_plain_length_is_refused_and_the_line_closed(make_quay):
    quay = make_quay(8)
    who = quay.identities["berlin"]
    signer = in_step(quay.site, who)
    targets = [("PUT", quay.path("0" * 64)), ("POST", "/v1/hello"), ("POST", "/v1/enrol")]
    for number, form in enumerate(FORMS):
        method, target = targets[number % 3]
        request = compose(method, target, headers={**sign(signer, method, target, b"x"), **form})
        with contextlib.closing(dial(quay.site, who)) as line:
            line.sendall(request)
            assert hear(line).status in (400, 411, 413, 501), form
            with pytest.raises(OSError):  # noqa: PT011  # the line is closed, or reset while we write
                push(line, b"400\r\n" + b"x" * 1024 + b"\r\n", most=20_000_000)
    assert quay.kept() == []


def ends(line):
    """Wait until the other end closes a line, whatever it says before."""
    with contextlib.suppress(OSError):
        while line.recv(65536):
            pass


def push(line, piece, most):
    """Write on and on, until the other end has closed."""
    for _ in range(most // len(piece)):
        line.sendall(piece)


def test_case_11_chunks_without_end_are_not_collected(make_quay):
    quay = make_quay(8)
    who, target = quay.identities["berlin"], quay.path("0" * 64)
    headers = {**sign(in_step(quay.site, who), "PUT", target, b"x"), "Transfer-Encoding": "chunked"}
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    tracemalloc.start()
    try:
        with contextlib.closing(dial(quay.site, who)) as line:
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(OSError):
                line.sendall(compose("PUT", target, headers=headers))
                push(line, piece, most=50_000_000)
                pytest.fail("it was read on and on")
            assert tracemalloc.get_traced_memory()[1] - before < 2**21
    finally:
        tracemalloc.stop()
    assert quay.kept() == []


# ------------------------------------------------------------------------------------------------------- too large


def test_case_12_a_report_of_twice_the_size_is_refused_before_it_is_read(make_quay):
    quay = make_quay(SHORT)
    who, size = quay.identities["berlin"], 2 * len(quay.body())
    signer, target = in_step(quay.site, who), quay.path("0" * 64)
    whole = {**sign(signer, "PUT", target, b"x"), "Content-Length": str(size)}
    first = {"Content-Range": f"bytes 0-9/{size}"}
    part = {**signer.headers("PUT", target.encode(), part=first["Content-Range"]), "Content-Length": "10"}
    hello = {**sign(signer, "POST", "/v1/hello", b"x"), "Content-Length": "65537"}
    for method, path, headers in (("PUT", target, whole), ("PUT", target, part), ("POST", "/v1/hello", hello)):
        answer = once(quay.site, compose(method, path, headers=headers), who)  # no byte of the body is sent
        assert (answer.status, answer.json["code"]) == (413, "too-large")
    assert quay.kept() == []
    assert quay.send(quay.parcel()).status == "accepted"


def test_case_12_a_client_has_so_many_bytes_under_way_and_takes_none_from_others(make_quay, monkeypatch):
    size = 4 * SHORT + 100_000
    quotas = Announced(Limits(upload_bytes=size))
    monkeypatch.setattr(routes, "Quotas", lambda: quotas)
    quay = make_quay(SHORT)
    who, body = quay.identities["berlin"], quay.body()
    signer = in_step(quay.site, who)
    with contextlib.closing(dial(quay.site, who)) as line:
        line.sendall(put(quay, signer, body, {}, length=len(body)) + body[:1000])
        assert quotas.is_counted.wait(10)
        refused = once(quay.site, put(quay, signer, body, {}, length=len(body)), who)
        assert (refused.status, refused.json["code"]) == (429, "too-many")
        assert 1 <= int(refused.headers["retry-after"]) <= 2
        assert quay.send(quay.parcel(1, "paris"), name="paris").status == "accepted"
        line.sendall(body[1000:])
        assert hear(line).status == 200
    assert quay.send(Parcel.of(body)).status == "accepted"


class Announced(Quotas):
    """Quotas that say when an upload is counted: until then a second one would be taken instead."""

    def __init__(self, limits):
        super().__init__(limits)
        self.is_counted = threading.Event()

    @contextlib.contextmanager
    def under_way(self, who, size):
        with super().under_way(who, size):
            if size:
                self.is_counted.set()
            yield
