"""Cases of bytes on the wire: reports that are none, what is out of date, and requests that may be read in two ways.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import copy
import json
import re
import resource
import socket
import ssl
import threading
import time
from itertools import product
from urllib.parse import quote

import numpy as np
import pytest
import sqlalchemy as sa

from faults.sites import APP, Rounds, Site, ask, next_work, rows, stranger
from hansa.core.errors import HansaError, RunError
from hansa.core.protocols import Report, Slot, Updates
from hansa.network.messages import PROTOCOL, Hello, Refusal, read_plan, write
from hansa.network.outbox import Parcel
from hansa.network.runtime import NetworkRuntime
from hansa.wire import pack, pack_report
from test_tensors import GOOD, HOSTILE, entry, file_of

pytestmark = pytest.mark.network

# ----------------------------------------------------------------------------------------------- reports that are none

ROW = {
    "updates": {
        "arrays": {"values": np.zeros((1, 4), np.float32)},
        "weights": np.ones(1),
        "tail": {"train_loss": np.zeros(1)},
    },
    "refused": None,
}


def changed(*path, to=None):
    """The good report's tree with one thing replaced, or (None) left out."""
    tree = copy.deepcopy(ROW)
    *inner, last = path
    here = tree
    for name in inner:
        here = here[name]
    here.pop(last, None)
    if to is not None:
        here[last] = to
    return pack(tree)


VALUES = ("updates", "arrays", "values")
TREES = {
    "too few values": changed(*VALUES, to=np.zeros((1, 3), np.float32)),
    "too many values": changed(*VALUES, to=np.zeros((1, 5), np.float32)),
    "two rows": changed(*VALUES, to=np.zeros((2, 4), np.float32)),
    "no row": changed(*VALUES, to=np.zeros((0, 4), np.float32)),
    "no axis": changed(*VALUES, to=np.zeros(4, np.float32)),
    "truth values": changed(*VALUES, to=np.zeros((1, 4), bool)),
    "other bits": changed(*VALUES, to=np.zeros((1, 4), np.float64)),
    "whole numbers": changed(*VALUES, to=np.zeros((1, 4), np.int8)),
    "no values": changed(*VALUES),
    "values that are a text": changed(*VALUES, to="zeros"),
    "one tensor more": changed("updates", "arrays", "more", to=np.zeros((1, 4), np.float32)),
    "no weight": changed("updates", "weights"),
    "two weights": changed("updates", "weights", to=np.ones(2)),
    "a column too long": changed("updates", "tail", "train_loss", to=np.zeros(9)),
    "a column more": changed("updates", "tail", "other", to=np.zeros(1)),
    "a field more": changed("more", to=1),
    "a field more within": changed("updates", "more", to=1),
    "no updates": changed("updates"),
}
OTHERS = {name: body for name, body in HOSTILE.items() if body}
WORST = (
    "header of 2**63 bytes",
    "one name twice",
    "negative length",
    "length of 2**63",
    "lengths whose product is 2**64",
)
WORST += ("place far behind the data", "overlap", "the same bytes twice", "gap", "bytes that are missing")


@pytest.mark.parametrize(
    "bodies",
    [
        pytest.param({**TREES, **{name: OTHERS[name] for name in WORST}}, id="some"),
        pytest.param({**TREES, **OTHERS}, id="all", marks=pytest.mark.slow),
    ],
)
def test_case_15_a_report_of_another_form_is_refused_before_anything_is_allocated(site, bodies):
    receipts, counted = [], []
    for number, name in enumerate(("berlin", "paris")):
        site.join(name, rows(number))
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        runtime = NetworkRuntime(site.coordinator)
        runtime.wait_for_clients(3, timeout_s=30)
        rounds = Rounds(site.federation, runtime, ("berlin", "mallory", "paris"))

        def train():
            for number in range(len(bodies)):
                rounds.run(number)
                counted.append(rounds.mean.clients)

        training = threading.Thread(target=train)
        training.start()
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, body in enumerate(bodies.values()):
            work = next_work(mallory, number)
            receipts.append(mallory.put_report(run, read_plan(work.plan).slot, Parcel.of(body)))
        allocated_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        training.join(60)
    names = list(bodies)
    assert {names[i]: r for i, r in enumerate(counted) if r != ("berlin", "paris")} == {}
    # What has a form of its own is seen to be odd when there are others to compare it with.
    assert {names[i] for i, one in enumerate(receipts) if one.status != "refused"} == {
        "other bits", "whole numbers", "a column more",
    }  # fmt: skip
    assert all(receipt.reason for receipt in receipts if receipt.status == "refused")
    assert allocated_kb < 32 * 1024  # less than any of them claims to hold that claims too much
    assert not site.problems


def test_case_15_the_good_neighbours_of_those_reports_count(site):
    site.join("berlin", rows(0))
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        runtime = NetworkRuntime(site.coordinator)
        runtime.wait_for_clients(2, timeout_s=30)
        rounds = Rounds(site.federation, runtime, ("berlin", "mallory"))
        training = threading.Thread(target=rounds.run, args=(0,))
        training.start()
        work = next_work(mallory, 0)
        receipt = mallory.put_report(run, read_plan(work.plan).slot, Parcel.of(pack(ROW)))
        training.join(30)
    assert receipt.status == "accepted"
    assert rounds.mean.clients == ("berlin", "mallory")


def test_case_15_a_message_of_another_form_is_a_400(site):
    bodies = [b"", file_of({"a": entry(0, 4, shape=[2**63])}, b"\0" * 4), file_of(GOOD, b"\0" * 8)]
    with stranger(site, "mallory") as mallory:
        for path, body in product(("/v1/hello", "/v1/renew", "/v1/enrol"), bodies):
            with pytest.raises(Refusal) as caught:
                ask(mallory, "POST", path, body)
            assert caught.value.code == "malformed"


# -------------------------------------------------------------------------------------------------- what is out of date


def body_for(site, slot, value):
    updates = Updates(("x",), np.full((1, 4), value, np.float32), np.array([1.0]), {"train_loss": np.array([0.5])})
    return pack_report(Report(slot, ("x",), updates), site.federation.codec(slot))


def test_case_28_a_report_to_a_model_that_is_no_longer_new_is_late_and_changes_nothing(site):
    site.join("berlin", rows(0))
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        runtime = NetworkRuntime(site.coordinator)
        runtime.goal_clients = 1
        runtime.wait_for_clients(2, timeout_s=30)
        rounds = Rounds(site.federation, runtime, ("berlin", "mallory"))
        rounds.run(0)  # mallory says nothing
        before = rounds.run(1).tobytes()
        old = [Slot(0, 0, "update"), Slot(1, 0, "update")]
        receipts = [mallory.put_report(run, slot, Parcel.of(body_for(site, slot, 9.0))) for slot in old]
        assert [receipt.status for receipt in receipts] == ["late", "late"]
        again = Rounds(site.federation, NetworkRuntime(site.coordinator), ("berlin", "mallory"))
        assert again.run(0, 1).tobytes() == before
        for stranger_run, slot, code in (
            ("0" * 16, old[0], "not-asked"),  # of another run
            (run, Slot(7, 0, "update"), "not-asked"),  # of a round that is not
            (run, Slot(1, 3, "update"), "not-asked"),  # of an attempt that is not
            (run, Slot(1, 0, "other"), "not-asked"),
        ):
            with pytest.raises(Refusal) as caught:
                mallory.put_report(stranger_run, slot, Parcel.of(body_for(site, slot, 9.0)))
            assert (caught.value.code, "expected" in str(caught.value)) == (code, True)


OUTDATED = [
    (PROTOCOL - 1, (APP,), "", "protocol", "install the coordinator's version of hansa"),
    (PROTOCOL + 1, (APP,), "", "protocol", "install the coordinator's version of hansa"),
    (0, (APP,), "", "protocol", "install the coordinator's version of hansa"),
    (PROTOCOL, ("cd" * 32,), "", "another-app", "get the coordinator's app.py"),
    (PROTOCOL, (), "", "another-app", "get the coordinator's app.py"),
    (PROTOCOL, (APP,), "ef" * 32, "another-model", "take the same files and versions"),
]


def test_case_28_another_protocol_app_or_model_is_told_what_to_do(site):
    with stranger(site, "mallory") as mallory:
        for protocol, fingerprints, frozen, code, hint in OUTDATED:
            hello = Hello(protocol=protocol, version="9.9", fingerprints=fingerprints, frozen=frozen)
            with pytest.raises(Refusal, match=hint) as caught:
                ask(mallory, "POST", "/v1/hello", write(hello))
            assert caught.value.code == code
            with pytest.raises(Refusal) as caught:
                mallory.get_work(wait_s=0)
            assert caught.value.code == "hello-first"


def test_case_28_a_plan_of_another_hash_than_before_a_restart_is_not_gone_on_with(site):
    site.join("berlin", rows(0))
    runtime = NetworkRuntime(site.coordinator)
    runtime.wait_for_clients(1, timeout_s=30)
    rounds = Rounds(site.federation, runtime, ("berlin",))
    before = rounds.run(0).tobytes()
    other = Rounds(site.federation, NetworkRuntime(site.coordinator), ("berlin",))
    other.state.algorithm["params"] += 1
    with pytest.raises(
        RunError, match="expected the plan that was made before the restart, found another; start again"
    ):
        other.run(0)
    again = Rounds(site.federation, NetworkRuntime(site.coordinator), ("berlin",))
    assert again.run(0).tobytes() == before


# ------------------------------------------------------------------------------- requests that may be read in two ways

INJECTED = [
    "' OR 1=1 --",
    "x'; DROP TABLE clients; --",
    '"; DELETE FROM reports; --',
    "1 UNION SELECT secret_hash",
    "%",
]


def tables(site: Site):
    """All rows but those of what was counted and noted."""
    with site.store.read() as db:
        names = sa.inspect(db).get_table_names()
        return {
            name: db.execute(sa.text(f"SELECT * FROM {name}")).all()
            for name in names
            if name not in ("audit", "traffic", "meta")
        }


def test_case_37_ids_that_hold_sql_are_ids_that_are_not_there(site):
    site.enrol("berlin")
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        before = tables(site)
        for text in INJECTED:
            name = quote(text, safe="")
            for method, path in (
                ("GET", f"/v1/blobs/{name}"),
                ("PUT", f"/v1/reports/{name}/train-0-0-update/{'0' * 64}"),
                ("PUT", f"/v1/reports/{run}/{name}/{'0' * 64}"),
                ("PUT", f"/v1/reports/{run}/train-0-0-update/{name}"),
                ("GET", f"/v1/reports/{run}/train-0-0-{name}/{'0' * 64}"),
                ("GET", f"/v1/{name}"),
            ):
                with pytest.raises(Refusal) as caught:
                    ask(mallory, method, path, b"x" if method == "PUT" else b"")
                assert caught.value.code in ("not-found", "not-asked", "malformed")
            with pytest.raises(Refusal):
                ask(mallory, "GET", f"/v1/work?acknowledged={name}")
            with pytest.raises(HansaError, match="client name: expected"):
                site.invite(text)
        assert tables(site) == before
        mallory.get_work(wait_s=0)


def test_case_37_no_header_makes_another_method_of_a_request(site):
    with stranger(site, "mallory") as mallory:
        mallory.hello((APP,))
        for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "_method"):
            with pytest.raises(Refusal) as caught:
                mallory._line.ask("GET", "/v1/goodbye", headers={header: "POST"}, params={"_method": "POST"})
            assert caught.value.code == "method"
        for method in ("DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"):
            with pytest.raises((Refusal, RunError)):  # an answer to HEAD has no body that could say why
                ask(mallory, method, "/v1/work")
    assert site.coordinator.registry.present(site.coordinator.run, without_goodbye=True) == ["mallory"]


AMBIGUOUS = [
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5\r\n\r\nhello",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/hello HTTP/1.1\r\nHost: x\r\nX: y\r\n Content-Length: 5\r\n\r\nhello",
    b"GET /v1/work HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"GET /v1/\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/work HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n",
    b"GET /v1/work HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET http://elsewhere.example/v1/work HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01 nonsense\r\n\r\n",
]


def test_case_37_a_request_that_could_be_read_in_two_ways_is_refused(site):
    for head in AMBIGUOUS:
        assert all(status.startswith("4") for status in statuses(site, head)), head


def test_case_37_no_header_is_smuggled_by_a_line_end(site):
    """What follows a line's end within a value is never a request of its own."""
    for end in ("\r\n", "\n", "\r"):
        second = f"GET /v1/authority HTTP/1.1{end}Host: x{end}{end}"
        value = f"y{quote(end)}{quote(second)}"
        head = f"GET /v1/work?{quote(end + second, safe='')} HTTP/1.1\r\nHost: x\r\nX: {value}\r\n\r\n"
        assert statuses(site, head.encode()) == ["401"]


def test_case_37_requests_in_a_row_on_one_line_are_each_looked_at(site):
    one = b"GET /v1/work HTTP/1.1\r\nHost: x\r\n\r\n"
    public = b"GET /v1/authority HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(site, one + one + public + public) == ["401", "401", "200"]


def statuses(site, sent):
    """The statuses that raw bytes earn, on a line without a certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", site.server.port)) as plain, context.wrap_socket(plain) as line:
        line.settimeout(0.3)
        line.sendall(sent)
        got, began = b"", time.monotonic()
        with contextlib.suppress(TimeoutError, ssl.SSLError, ConnectionError):
            while (piece := line.recv(65536)) and time.monotonic() - began < 5:
                got += piece
    found = [part.decode() for part in re.findall(rb"HTTP/1\.1 (\d{3})", got)]
    assert found
    for body in re.findall(rb'\{"error.*?\}', got):
        assert len(json.loads(body)["error"]) > 20
    return found
