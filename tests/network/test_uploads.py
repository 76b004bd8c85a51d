import contextlib
import hashlib
import resource
import socket
import ssl
import threading
from collections import Counter

import numpy as np
import pytest

from hansa.core.protocols import Slot
from hansa.network.blobs import SMALL
from hansa.network.calls import Unreachable
from hansa.network.messages import Refusal, read_receipt
from hansa.network.outbox import Outbox, Parcel
from hansa.network.ranges import Part
from hansa.network.runtime import NetworkRuntime
from hansa.network.transfers import Upload
from hansa.network.uploads import Sent, Uploads
from hansa.wire import lay_out, report_tree
from support_lines import CuttingProxy
from support_quay import LONG, SHORT, SLOT, Quay, federation_of, part, wait_until

pytestmark = pytest.mark.network
HANDSHAKE, RECORD = 8_000, 17_000  # bytes of a line that carry no report, and that a cut may waste


@pytest.fixture
def make_quay(make_site):
    made = []

    def make(num_params):
        made.append(Quay(make_site(federation_of(num_params)), num_params))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def quay(make_quay):
    return make_quay(LONG)


@pytest.fixture
def short_quay(make_quay):
    return make_quay(SHORT)


# ------------------------------------------------------------------------------------------------- lines that are cut


@pytest.mark.parametrize(("num_params", "cut"), [(SHORT, 14_000), (SHORT, 70_000), (LONG, 60_000), (LONG, 500_000)])
def test_an_upload_arrives_over_a_line_that_is_cut_again_and_again_and_little_is_sent_twice(make_quay, num_params, cut):
    quay = make_quay(num_params)
    parcel = quay.parcel()
    with CuttingProxy(quay.site.server.port, up=cut) as proxy:
        receipt = quay.send(parcel, port=proxy.port)
        assert receipt.status == "accepted"
        assert len(proxy.ups) >= parcel.size // cut
        assert sum(proxy.ups) <= parcel.size + len(proxy.ups) * (HANDSHAKE + RECORD)
    assert quay.site.coordinator.updates.get(parcel.sha256) == quay.body()
    assert quay.kept() == []


def test_a_report_whose_receipt_is_lost_is_not_sent_again(quay):
    parcel = quay.parcel()
    with CuttingProxy(quay.site.server.port) as proxy:
        quay.send(parcel, port=proxy.port)
        before = sum(proxy.ups)
        assert quay.send(parcel, port=proxy.port).status == "accepted"
        assert sum(proxy.ups) - before < HANDSHAKE
    assert before < parcel.size + 2 * HANDSHAKE


def test_a_report_that_arrived_whole_is_counted_though_the_line_was_cut_before_the_answer(short_quay):
    body = short_quay.body()
    context = short_quay.identities["berlin"].context()
    path = short_quay.path(hashlib.sha256(body).hexdigest())
    head = short_quay.put_head(path, f"Content-Length: {len(body)}\r\n", body)
    with (
        socket.create_connection(("127.0.0.1", short_quay.site.server.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as line,
    ):
        line.sendall(head + body)
        line.shutdown(socket.SHUT_WR)
        wait_until(lambda: short_quay.status() == "accepted")


def test_a_coordinator_that_starts_again_goes_on_with_the_bytes_that_it_has(quay):
    body, parcel = quay.body(), quay.parcel()
    with quay.http() as http:
        answer = http.put(quay.path(parcel.sha256), **part(body, 0, 1_000_000))
        assert (answer.status_code, answer.json(), answer.headers["upload-offset"]) == (
            202, {"offset": 1_000_000}, "1000000",
        )  # fmt: skip
    quay.site.restart()
    with CuttingProxy(quay.site.server.port) as proxy:
        assert quay.send(parcel, port=proxy.port).status == "accepted"
        assert sum(proxy.ups) < len(body) - 1_000_000 + HANDSHAKE


def test_a_client_that_starts_again_goes_on_without_training_again(quay, tools):
    site, loads, stop = quay.site, Counter(), threading.Event()
    quay.close()
    rows = np.random.default_rng(1).normal(size=(6, quay.num_params - 1)).astype(np.float32)

    def load():
        loads["berlin"] += 1
        return type(tools.data(1)[0])(rows, (rows[:, 0] > 0).astype(np.int64)), None

    with CuttingProxy(site.server.port, up=600_000) as proxy:
        identity = site.folder / "berlin" / "identity" / "identity.json"
        told = identity.read_text()
        identity.write_text(told.replace(str(site.server.port), str(proxy.port)))

        def on_event(what, more):
            if what == "unreachable":
                stop.set()

        site.join("berlin", load, stop=stop, on_event=on_event).join(30)
        assert sum(proxy.ups) == 600_000
        identity.write_text(told)
    wait_until(lambda: sum(path.stat().st_size for path in quay.kept()) > 570_000)
    reached = quay.kept()[0].stat().st_size
    [waiting] = (site.folder / "berlin" / "outbox").iterdir()
    del site.problems["berlin"]  # it was told to stop
    with CuttingProxy(site.server.port) as proxy:
        identity.write_text(told.replace(str(site.server.port), str(proxy.port)))
        again = threading.Event()
        site.join("berlin", load, stop=again)
        with site.coordinator.arrived:
            assert site.coordinator.arrived.wait_for(lambda: quay.status() == "accepted", 30)
        assert sum(proxy.ups) < waiting.stat().st_size - reached + 3 * HANDSHAKE
        assert loads["berlin"] == 1
        NetworkRuntime(site.coordinator).settle(SLOT, ("berlin",))
        wait_until(lambda: not waiting.exists())
        again.set()


def test_the_back_off_starts_anew_when_a_try_got_on(quay):
    parcel, delays = quay.parcel(), []
    with CuttingProxy(quay.site.server.port, up=60_000) as proxy:
        connection = quay.connection(port=proxy.port)

        class Impatient(threading.Event):
            def wait(self, timeout=None):
                delays.append(timeout)
                return False

        connection.stop = Impatient()
        connection.put_report(quay.site.coordinator.run, SLOT, parcel)
    assert len(delays) > 20
    assert max(delays) < 0.05  # of a first delay of 0.002 seconds; without progress it would be 30 by now


# -------------------------------------------------------------------------------------------- what an upload may say


def test_the_same_report_again_gets_the_same_receipt_whole_or_in_parts(quay):
    body = quay.body()
    sha256 = hashlib.sha256(body).hexdigest()
    with quay.http() as http:
        path, middle = quay.path(sha256), len(body) // 2
        assert http.get(path).json() == {"offset": 0}
        assert http.put(path, **part(body, 0, middle)).status_code == 202
        assert (http.get(path).status_code, http.get(path).json()) == (200, {"offset": middle})
        assert http.put(path, headers={"Content-Range": f"bytes */{len(body)}"}).json() == {"offset": middle}
        first = http.put(path, **part(body, middle, len(body)))
        assert (first.status_code, read_receipt(first.content).status) == (200, "accepted")
        for again in (
            http.put(path, content=body),
            http.put(path, **part(body, 0, middle)),
            http.put(path, **part(body, middle, len(body))),
            http.put(path, headers={"Content-Range": f"bytes */{len(body)}"}),
            http.get(path),
        ):
            assert (again.status_code, again.content) == (200, first.content)
    assert [row.client for row in quay.site.coordinator.rounds.frozen(SLOT)] == ["berlin"]


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_another_report_for_the_same_slot_is_a_conflict_before_its_bytes_are_taken(make_quay, size):
    quay = make_quay(size)
    first = quay.send(quay.parcel(0))
    other = quay.parcel(1)
    with pytest.raises(Refusal, match="the first report stands") as caught:
        quay.send(other)
    assert caught.value.code == "conflict"
    assert quay.site.coordinator.rounds.receipt(SLOT, "berlin") == first
    assert quay.kept() == []


def test_two_clients_may_send_the_same_bytes(quay):
    assert quay.send(quay.parcel(0)).status == quay.send(quay.parcel(0, "paris"), name="paris").status == "accepted"


LIES = [
    ("bytes 0-99/200", 50, 400),
    ("bytes 0-49/50", 100, 400),
    ("bytes 5-1/10", 4, 400),
    ("bytes 0-9/5", 10, 400),
    ("bytes 0-9/0", 10, 400),
    ("bytes 0-9/*", 10, 400),
    ("bytes */0", 0, 400),
    ("bytes */100", 5, 400),
    ("octets 0-9/10", 10, 400),
    ("0-9/10", 10, 400),
    ("bytes 0-9/10, 0-9/10", 10, 400),
    ("bytes -1-9/10", 10, 400),
    ("bytes 0-9/99999999999999999999", 10, 400),
    ("", 10, 401),  # what was signed has no such header
    ("bytes 0-9/999999999999", 10, 413),
    ("bytes */999999999999", 0, 413),
    ("bytes 50-99/200", 50, 409),
    ("bytes 0-9/10", 10, 422),
]


def test_a_part_that_cannot_be_is_refused_and_nothing_of_it_kept(quay):
    with quay.http() as http:
        for said, length, status in LIES:
            answer = http.put(quay.path("0" * 64), content=b"x" * length, headers={"Content-Range": said})
            assert answer.status_code == status, said
            assert set(answer.json()) == {"error", "code"}
            assert http.get(quay.path("0" * 64)).json() == {"offset": 0}
            assert quay.kept() == []
    assert quay.status() is None


def test_a_part_that_begins_elsewhere_is_told_where_the_upload_is(quay):
    body = quay.body()
    with quay.http() as http:
        path = quay.path(hashlib.sha256(body).hexdigest())
        http.put(path, **part(body, 0, 1000))
        for first in (0, 999, 1001, 5000):
            answer = http.put(path, **part(body, first, first + 10))
            assert (answer.status_code, answer.json()["code"], answer.headers["upload-offset"]) == (
                409,
                "offset",
                "1000",
            )
        assert http.put(path, **part(body, 1000, 1010)).json() == {"offset": 1010}


@pytest.mark.parametrize("size", [SHORT, LONG])
def test_bytes_of_another_hash_are_refused_and_forgotten(make_quay, size):
    quay = make_quay(size)
    body, sha256 = quay.body(), "ab" * 32
    with quay.http() as http:
        for request in ({"content": body}, part(body, 0, len(body))):
            answer = http.put(quay.path(sha256), **request)
            assert (answer.status_code, answer.json()["code"]) == (422, "digest")
            assert quay.kept() == []
    assert quay.status() is None


def test_a_report_is_named_by_a_hash_alone(quay):
    with quay.http() as http:
        for name in ("0" * 63, "0" * 65, "A" * 64, "..", "%2e%2e%2f", "%00", "x"):
            assert http.put(quay.path(name), content=b"x").status_code in (400, 404), name
    assert quay.kept() == []


def test_a_report_may_be_little_longer_than_a_row_of_its_form(quay):
    size = len(quay.body())
    largest = quay.site.coordinator.largest_report(SLOT, True)
    assert size <= largest < size + 2**17
    with quay.http() as http:
        answer = http.put(quay.path("0" * 64), headers={"Content-Range": f"bytes */{largest + 1}"})
        assert (answer.status_code, answer.json()["code"]) == (413, "too-large")


@pytest.mark.parametrize("also", ["", "Content-Length: 5\r\n"])
def test_a_body_in_chunks_without_end_is_refused_and_the_line_cut(quay, also):
    context = quay.identities["berlin"].context()
    head = quay.put_head(quay.path("0" * 64), f"{also}Transfer-Encoding: chunked\r\n", b"x")
    with (
        socket.create_connection(("127.0.0.1", quay.site.server.port), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as line,
    ):
        line.sendall(head)
        answer = line.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 4")
        with contextlib.suppress(OSError, ssl.SSLError):
            for _ in range(10_000):
                line.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
            pytest.fail("it was read on and on")
    assert quay.kept() == []


def test_a_body_that_is_shorter_than_it_says_is_kept_to_go_on_from(short_quay):
    body = short_quay.body()
    sha256, context = hashlib.sha256(body).hexdigest(), short_quay.identities["berlin"].context()
    head = short_quay.put_head(short_quay.path(sha256), f"Content-Length: {len(body)}\r\n", body)
    with (
        socket.create_connection(("127.0.0.1", short_quay.site.server.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as line,
    ):
        line.sendall(head + body[:12_345])
        line.shutdown(socket.SHUT_WR)
        wait_until(lambda: short_quay.size(Parcel.of(body)) == 12_345)
    with short_quay.http() as http:
        answer = http.put(short_quay.path(sha256), **part(body, 12_345, len(body)))
        assert read_receipt(answer.content).status == "accepted"


def test_a_whole_body_may_be_sent_over_a_part(short_quay):
    body = short_quay.body()
    with short_quay.http() as http:
        path = short_quay.path(hashlib.sha256(body).hexdigest())
        http.put(path, **part(body, 0, 1000))
        assert read_receipt(http.put(path, content=body).content).status == "accepted"


# ---------------------------------------------------------------------------------------- what is kept, and how long


def test_a_late_report_is_recorded_without_its_bytes(quay):
    quay.send(quay.parcel(0))
    runtime = NetworkRuntime(quay.site.coordinator)
    quay.site.coordinator.rounds.freeze(SLOT, 1)
    runtime.settle(SLOT, ("berlin",))
    with CuttingProxy(quay.site.server.port) as proxy:
        assert quay.send(quay.parcel(1, "paris"), name="paris", port=proxy.port).status == "late"
        assert sum(proxy.ups) < HANDSHAKE
    assert quay.send(quay.parcel(1, "paris"), name="paris").status == "late"


def test_what_was_uploaded_to_a_slot_is_removed_with_it(quay):
    body = quay.body()
    quay.send(quay.parcel(0, "paris"), name="paris")
    with quay.http() as http:
        http.put(quay.path(hashlib.sha256(body).hexdigest()), **part(body, 0, 1000))
    assert len(quay.kept()) == 1
    runtime = NetworkRuntime(quay.site.coordinator)
    quay.site.coordinator.rounds.freeze(SLOT, 1)
    quay.open_slot(Slot(1, 0, "update"))
    with quay.http("paris") as http:
        http.put(quay.path("12" * 32, Slot(1, 0, "update")), **part(body, 0, 1000))
    runtime.settle(SLOT, ("paris",))
    runtime.release(0, np.zeros(quay.num_params, np.float32), {})
    assert [path.name for path in quay.kept()] == ["12" * 32]


def test_a_client_has_one_upload_for_a_slot_at_a_time(tmp_path):
    uploads, slot = Uploads(tmp_path, "run"), SLOT
    for number in range(3):
        with uploads.open(Sent("berlin", slot, f"{number:064}"), Part(0, 3, 9)) as file:
            file.write(b"abc")
    with uploads.open(Sent("paris", slot, "0" * 64), Part(0, 3, 9)) as file:
        file.write(b"abc")
    assert sorted(path.name for path in tmp_path.rglob("0*")) == ["0" * 64, f"{2:064}"]


def test_a_newer_request_takes_over_from_an_older_one_and_no_byte_comes_twice(tmp_path):
    uploads, sent = Uploads(tmp_path, "run"), Sent("berlin", SLOT, "ab" * 32)
    older = uploads.open(sent, Part(0, 9, 9))
    older.write(b"abc")
    newer = uploads.open(sent, Part(3, 9, 9))
    with pytest.raises(Refusal) as caught:
        older.write(b"def")
    assert caught.value.code == "offset"
    newer.write(b"defghi")
    newer.close()
    assert uploads.path(sent).read_bytes() == b"abcdefghi"


def test_uploads_of_another_run_are_removed(tmp_path):
    for run in ("first", "second"):
        uploads = Uploads(tmp_path, run)
        with uploads.open(Sent("berlin", SLOT, "ab" * 32), Part(0, 3, 9)) as file:
            file.write(b"abc")
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


# ------------------------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def longest_file(size):
    """Writes that would make a file longer fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_upload_goes_on_when_there_is_room(quay):
    parcel, other = quay.parcel(0), quay.parcel(1, "paris")
    quay.send(other, name="paris")
    connection = quay.connection()
    upload = Upload(connection._line, quay.path(parcel.sha256), parcel)
    with longest_file(1_200_000), pytest.raises(Unreachable):
        upload.go_on()
    assert quay.status() is None
    assert 0 < quay.size(parcel) <= 1_200_000
    assert quay.site.coordinator.updates.get(other.sha256) == quay.body(1)
    assert read_receipt(upload.go_on()).status == "accepted"


def test_a_full_disk_is_said_before_a_long_upload_begins(quay, monkeypatch):
    body = quay.body()
    usage = type("Usage", (), {"free": 2**26 + 1000})
    monkeypatch.setattr("hansa.network.room.shutil.disk_usage", lambda folder: usage)
    with quay.http() as http:
        answer = http.put(quay.path(hashlib.sha256(body).hexdigest()), **part(body, 0, 1000))
        assert (answer.status_code, answer.json()["code"]) == (507, "no-space")
    assert quay.kept() == []


def test_a_short_report_is_not_acknowledged_when_the_disk_is_full(short_quay, monkeypatch):
    body = short_quay.body()
    path = short_quay.path(hashlib.sha256(body).hexdigest())

    def full(*_):
        raise OSError(28, "No space left on device")

    with short_quay.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr("hansa.network.blobs.os.fsync", full)
            answer = http.put(path, content=body)
            assert (answer.status_code, answer.json()["code"]) == (507, "no-space")
        assert short_quay.status() is None
        assert read_receipt(http.put(path, content=body).content).status == "accepted"


# ---------------------------------------------------------------------------------------------------- damaged bytes


def test_what_the_servers_disk_damaged_is_sent_once_more(quay):
    body, parcel = quay.body(), quay.parcel()
    with quay.http() as http:
        http.put(quay.path(parcel.sha256), **part(body, 0, 1_000_000))
    [kept] = quay.kept()
    kept.write_bytes(b"x" * 1_000_000)
    assert quay.send(parcel).status == "accepted"


def test_what_the_clients_disk_damaged_is_said_and_not_sent_for_ever(quay):
    parcel = quay.parcel()
    parcel.path.write_bytes(b"x" * parcel.size)
    with pytest.raises(Exception, match="the disk may be failing"):
        quay.send(parcel)
    assert quay.status() is None


def test_a_long_report_that_holds_nan_is_refused_with_its_reason(quay):
    report, codec = quay.report()
    report.payload.values[0, -1] = np.nan
    parcel = Outbox(quay.site.folder / "outbox").write(lay_out(report_tree(report, codec)))
    assert parcel.size > SMALL
    receipt = quay.send(parcel)
    assert (receipt.status, receipt.reason) == ("refused", "update is not finite")
    assert quay.kept() == list(quay.site.coordinator.updates.folder.iterdir()) == []


def test_a_report_that_is_being_looked_at_is_left_alone(tmp_path):
    uploads, sent = Uploads(tmp_path, "run"), Sent("berlin", SLOT, "ab" * 32)
    with uploads.open(sent, Part(0, 3, 3)) as file:
        file.write(b"abc")
    with uploads.claimed(sent):
        for hostile in (
            lambda: uploads.open(sent, Part(3, 9, 9)),
            lambda: uploads.open(sent._replace(sha256="cd" * 32), Part(0, 9, 9)),
            lambda: uploads.claimed(sent).__enter__(),
        ):
            with pytest.raises(Refusal) as caught:
                hostile()
            assert caught.value.code == "offset"
        assert uploads.hash(sent) == hashlib.sha256(b"abc").hexdigest()
    with uploads.open(sent, Part(3, 9, 9)) as file:
        file.write(b"def")
    assert uploads.size(sent) == 6
