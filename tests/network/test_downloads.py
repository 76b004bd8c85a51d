import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest

from hansa.core.errors import ProtocolError
from hansa.network.blobs import SMALL
from hansa.network.client import Connection, Stopped
from hansa.network.client_store import ClientStore
from hansa.network.messages import Refusal
from hansa.wire import lay_out, unpack
from support_lines import CuttingProxy

pytestmark = pytest.mark.network
SHORT, LONG = 75_000, 340_000  # numbers: bodies of 300 kB and of 1.36 MB
HANDSHAKE, RECORD = 8_000, 17_000  # bytes of a line that carry no vector, and that a cut may waste


class Pier:
    """A client of a site, and vectors for it to download."""

    def __init__(self, site):
        self.site, self.identity = site, site.enrol("berlin")
        self.store, self.connections = ClientStore(site.folder / "berlin"), []

    def publish(self, num, seed=0):
        vector = np.random.default_rng(seed).normal(size=num).astype(np.float32)
        return self.site.coordinator.models.put(lay_out(vector)), vector

    def connection(self, port=None):
        who = self.identity if port is None else replace(self.identity, url=f"https://127.0.0.1:{port}")
        made = self.site.trusting(Connection(who, self.store, stop=threading.Event(), first_delay_s=0.002))
        self.connections.append(made)
        return self.connections[-1]

    def file(self, sha256):
        return self.site.coordinator.models.path(sha256)

    def here(self):
        return sorted(path.name for path in (self.store.folder / "downloads").glob("*"))

    def close(self):
        for one in (*self.connections, self.store):
            one.close()


@pytest.fixture
def pier(site):
    made = Pier(site)
    yield made
    made.close()


@pytest.fixture
def http(pier):
    with pier.site.http(pier.identity, pier.identity.signer()) as made:
        yield made


# ---------------------------------------------------------------------------------------------- what the server sends


def test_a_range_is_that_part_of_the_vector(pier, http):
    sha256, _ = pier.publish(SHORT)
    body = pier.file(sha256).read_bytes()
    end = len(body) - 1
    for asked, first, last in (
        ("0-", 0, end),
        ("0-0", 0, 0),
        ("5-9", 5, 9),
        ("1000-", 1000, end),
        ("1000-999999999", 1000, end),
    ):
        answer = http.get(f"/v1/blobs/{sha256}", headers={"Range": f"bytes={asked}", "If-Range": f'"{sha256}"'})
        assert answer.content == body[first : last + 1]
        assert answer.headers["etag"] == f'"{sha256}"'
        if len(answer.content) < len(body):
            assert answer.status_code == 206
            assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(body)}"


def test_what_is_no_single_range_of_this_vector_is_answered_with_all_of_it(pier, http):
    sha256, _ = pier.publish(SHORT)
    for headers in (
        {},
        {"Range": "bytes=9-", "If-Range": '"another"'},
        {"Range": "bytes=9-5"},
        {"Range": "bytes=-5"},
        {"Range": "bytes=0-1,5-9"},
        {"Range": "lines=1-2"},
        {"Range": "bytes=" + "0-," * 10_000},
    ):
        answer = http.get(f"/v1/blobs/{sha256}", headers=headers)
        assert (answer.status_code, answer.content) == (200, pier.file(sha256).read_bytes())


def test_a_range_behind_the_end_is_refused(pier, http):
    sha256, _ = pier.publish(SHORT)
    size = pier.file(sha256).stat().st_size
    answer = http.get(f"/v1/blobs/{sha256}", headers={"Range": f"bytes={size}-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range")


def test_a_vector_that_is_fetched_in_parts_is_counted_once(pier, http):
    sha256, _ = pier.publish(SHORT)
    size = pier.file(sha256).stat().st_size
    for asked in ("bytes=0-999", "bytes=1000-", "bytes=2000-"):
        http.get(f"/v1/blobs/{sha256}", headers={"Range": asked})
    counted = {body["kind"]: body for body in pier.site.coordinator.counts.bodies()}["model"]
    assert (counted["count"], counted["bytes"]) == (1, size)


# ------------------------------------------------------------------------------------------ what the client makes of it


@pytest.mark.parametrize(("num", "cut"), [(SHORT, 14_000), (SHORT, 70_000), (LONG, 60_000), (LONG, 500_000)])
def test_a_download_arrives_over_a_line_that_is_cut_again_and_again_and_little_is_sent_twice(pier, num, cut):
    sha256, vector = pier.publish(num)
    size = pier.file(sha256).stat().st_size
    with CuttingProxy(pier.site.server.port, down=cut) as proxy:
        found = unpack(pier.connection(proxy.port).get_blob(sha256))
        assert (found == vector).all()
        assert len(proxy.downs) >= size // cut
        assert sum(proxy.downs) <= size + len(proxy.downs) * (HANDSHAKE + RECORD)


def test_a_long_vector_lies_in_a_file_and_is_not_fetched_again_by_the_next_process(pier):
    sha256, vector = pier.publish(LONG)
    body = pier.connection().get_blob(sha256)
    assert isinstance(body, memoryview)
    assert np.shares_memory(unpack(body), np.frombuffer(body, np.uint8))
    assert pier.here() == [sha256]
    pier.site.coordinator.models.keep_only(())
    assert (unpack(pier.connection().get_blob(sha256)) == vector).all()


def test_a_short_vector_needs_no_file(pier):
    sha256, vector = pier.publish(SHORT)
    connection = pier.connection()
    assert (unpack(connection.get_blob(sha256)) == vector).all()
    pier.site.coordinator.models.keep_only(())
    assert (unpack(connection.get_blob(sha256)) == vector).all()
    assert pier.here() == []


def test_a_client_that_starts_again_fetches_what_is_missing(pier):
    sha256, vector = pier.publish(LONG)
    with CuttingProxy(pier.site.server.port, down=1_000_000) as proxy:
        connection = pier.connection(proxy.port)
        connection.stop.set()
        with pytest.raises(Stopped):
            connection.get_blob(sha256)
    assert pier.here() == [f"{sha256}.part"]
    with CuttingProxy(pier.site.server.port) as proxy:
        assert (unpack(pier.connection(proxy.port).get_blob(sha256)) == vector).all()
        assert sum(proxy.downs) < 4 * LONG - 1_000_000 + RECORD + 2 * HANDSHAKE
    assert pier.here() == [sha256]


@pytest.mark.parametrize("length", ["some", "all", "more"])
def test_a_part_that_the_clients_disk_damaged_is_fetched_anew(pier, length):
    sha256, vector = pier.publish(LONG)
    size = {"some": 1000, "all": pier.file(sha256).stat().st_size, "more": 2_000_000}[length]
    (pier.store.folder / "downloads").mkdir()
    (pier.store.folder / "downloads" / f"{sha256}.part").write_bytes(b"x" * size)
    assert (unpack(pier.connection().get_blob(sha256)) == vector).all()


def test_a_whole_file_that_was_not_looked_at_before_a_restart_is_used(pier):
    sha256, vector = pier.publish(LONG)
    (pier.store.folder / "downloads").mkdir()
    (pier.store.folder / "downloads" / f"{sha256}.part").write_bytes(pier.file(sha256).read_bytes())
    with CuttingProxy(pier.site.server.port) as proxy:
        assert (unpack(pier.connection(proxy.port).get_blob(sha256)) == vector).all()
        assert sum(proxy.downs) < HANDSHAKE


def test_a_file_that_the_clients_disk_damaged_is_fetched_anew(pier):
    sha256, vector = pier.publish(LONG)
    pier.connection().get_blob(sha256)
    path = pier.store.folder / "downloads" / sha256
    path.write_bytes(b"x" * path.stat().st_size)
    assert (unpack(pier.connection().get_blob(sha256)) == vector).all()


@pytest.mark.parametrize("num", [SHORT, LONG])
@pytest.mark.parametrize("damage", ["changed", "cut", "emptied"])
def test_a_vector_that_the_servers_disk_damaged_is_not_used(pier, num, damage):
    sha256, _ = pier.publish(num)
    path = pier.file(sha256)
    size = {"changed": path.stat().st_size, "cut": path.stat().st_size // 2, "emptied": 0}[damage]
    path.write_bytes(b"x" * size)
    with pytest.raises(ProtocolError, match="do not trust this server"):
        pier.connection().get_blob(sha256)
    assert pier.here() == []


def test_a_vector_that_is_gone_is_refused(pier):
    with pytest.raises(Refusal) as caught:
        pier.connection().get_blob("0" * 64)
    assert caught.value.code == "not-found"


def test_vectors_that_nobody_needs_are_removed_with_what_is_here_of_them(pier):
    kept, other = pier.publish(LONG)[0], pier.publish(LONG, 1)[0]
    connection = pier.connection()
    for sha256 in (kept, other):
        connection.get_blob(sha256)
    (pier.store.folder / "downloads" / ("1" * 64 + ".part")).write_bytes(b"x")
    connection.keep_blobs({kept})
    assert pier.here() == [kept]


def test_what_is_written_to_a_mapped_vector_is_seen_by_nobody_else(pier):
    sha256, vector = pier.publish(LONG)
    connection = pier.connection()
    unpack(connection.get_blob(sha256))[:] = 7
    assert (unpack(connection.get_blob(sha256)) == vector).all()
    assert hashlib.sha256((pier.store.folder / "downloads" / sha256).read_bytes()).hexdigest() == sha256
    assert SMALL < 4 * LONG
