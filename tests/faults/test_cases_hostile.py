"""Cases in which a client or a server is hostile: what it may send, and that nothing comes of it.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import io
import pickle
import threading
import tracemalloc
from urllib.parse import quote

import numpy as np
import pytest

from faults.sites import APP, Rounds, ask, make_federation, rows, stranger
from hansa.core.errors import HansaError, ProtocolError, RunError
from hansa.core.protocols import Report, Slot, Updates
from hansa.network.client_store import ClientStore
from hansa.network.identity import make_request
from hansa.network.messages import Enrol, Refusal, Released, Work, read_plan, read_work, write, write_plan
from hansa.network.outbox import Parcel
from hansa.network.participant import Participant
from hansa.network.runtime import NetworkRuntime
from hansa.wire import pack, pack_report, unpack_report

pytestmark = pytest.mark.network


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-40, 1e30, 1e38, 3e38])
def test_case_14_no_update_makes_the_model_anything_but_finite(site, value):
    heard = []

    def attack():
        with stranger(site, "mallory") as mallory:
            run = mallory.hello((APP,)).run
            while len(heard) < 3 and not site.stop.is_set():
                work = mallory.get_work(wait_s=1)
                if work.plan is not None:
                    slot = read_plan(work.plan).slot
                    bad = np.full((1, 4), value, np.float32)
                    updates = Updates(("m",), bad, np.array([1.0]), {"train_loss": np.array([0.0])})
                    body = pack_report(Report(slot, ("m",), updates), site.federation.codec(slot))
                    heard.append(mallory.put_report(run, slot, Parcel.of(body)))

    for number, name in enumerate(("berlin", "paris")):
        site.join(name, rows(number))
    attacker = threading.Thread(target=attack)
    attacker.start()
    rounds = Rounds(site.federation, NetworkRuntime(site.coordinator), ("berlin", "mallory", "paris"))
    NetworkRuntime(site.coordinator).wait_for_clients(3, timeout_s=30)
    found = rounds.run(0, 1, 2)
    attacker.join(30)
    assert np.isfinite(found).all()
    assert {"berlin", "paris"} <= set(rounds.mean.clients)
    if value != 1e-40:  # as small as that does no harm
        assert {(receipt.status, receipt.reason) for receipt in heard} <= {
            ("refused", "update is not finite"),
            ("refused", "update is too large"),
        }
        assert rounds.mean.clients == ("berlin", "paris")


class Bomb:
    """Something that leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bodies(path):
    """The same bomb, in every wrapping that something may unwrap."""
    bomb = pickle.dumps(Bomb(path))
    array = io.BytesIO()
    np.save(array, np.array([Bomb(path)], dtype=object), allow_pickle=True)
    return [bomb, array.getvalue(), b"PK\x03\x04" + bomb, pack({"updates": bomb}), pack({"mail": array.getvalue()})]


def test_case_16_a_pickle_is_never_opened(site, tmp_path):
    trace = tmp_path / "trace"
    site.join("berlin", rows(1))
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        rounds = Rounds(site.federation, NetworkRuntime(site.coordinator), ("berlin", "mallory"))
        training = threading.Thread(target=rounds.run, args=range(len(bodies(trace))))
        training.start()
        for number, body in enumerate(bodies(trace)):
            while (work := mallory.get_work(wait_s=5)).plan is None or read_plan(work.plan).slot.round != number:
                pass
            assert mallory.put_report(run, read_plan(work.plan).slot, Parcel.of(body)).status == "refused"
            with pytest.raises(Refusal, match=r"expected (a safetensors body|the fields)"):
                ask(mallory, "POST", "/v1/hello", body)
        training.join(30)
    assert rounds.mean.clients == ("berlin",)
    assert not trace.exists()


HOSTILE = [
    "../../etc/passwd",
    "..%2f..%2fcoordinator.db",
    "%2e%2e%2f%2e%2e%2fx",
    "a%00b",
    "a\x00b",
    "/etc/passwd",
    "..\\..\\x",
    "x" * 300,
    "\u202egnp.exe",
    "\uff21\uff22",
    "é",
    " ",
    "",
    ".",
    "..",
    "a/b",
    "a\nb",
    "-rf",
    "CON:",
]


def files(folder):
    """Every file, but those that any request may write to."""
    return {path for path in folder.rglob("*") if not path.name.startswith(("coordinator.db", "client.db", "sent.csv"))}


@pytest.mark.parametrize("name", HOSTILE)
def test_case_17_no_name_leads_out_of_its_folder(site, tmp_path, name):
    site.enrol("berlin")
    run, path = site.coordinator.run, quote(name, safe="/%\\.: -")
    before = files(tmp_path.parent)
    with pytest.raises(HansaError, match=r"client name: expected|expected a name"):
        site.invite(name)
    token = site.invite("*")
    wish = Enrol(token=token.id, secret=token.secret, name=name, request=make_request("x")[1])
    attempts = [
        ("POST", "/v1/enrol", write(wish)),
        ("GET", f"/v1/blobs/{path}", b""),
        ("PUT", f"/v1/reports/{path}/train-0-0-update", b"x"),
        ("PUT", f"/v1/reports/{run}/{path}", b"x"),
        ("PUT", f"/v1/reports/{run}/train-0-0-{path}", b"x"),
    ]
    with stranger(site, "berlin") as berlin:
        berlin.hello((APP,))
        for attempt in attempts:
            with pytest.raises((Refusal, RunError)):  # an answer of the 400s, and never of the 500s
                ask(berlin, *attempt)
    assert files(tmp_path.parent) == before


def test_case_17_a_link_among_the_blobs_is_not_followed_to_another_content(site, tmp_path):
    site.enrol("berlin")
    secret = tmp_path / "secret"
    secret.write_bytes(b"private")
    name = "0" * 64
    (site.coordinator.models.folder / name).symlink_to(secret)
    with stranger(site, "berlin") as berlin:
        berlin.hello((APP,))
        with pytest.raises((ProtocolError, Refusal)):
            berlin.get_blob(name)
    (site.coordinator.models.folder / name).unlink()


@pytest.fixture
def victim(tmp_path):
    """A participant in the middle of its folder, and what lies beside it."""
    folder = tmp_path / "fleet" / "berlin"
    folder.mkdir(parents=True)
    (tmp_path / "fleet" / "diary").write_text("private")
    (tmp_path / "diary").write_text("private")
    store = ClientStore(folder)
    yield Participant(make_federation(), "berlin", lambda: rows(1), store)
    store.close()
    assert (tmp_path / "fleet" / "diary").read_text() == (tmp_path / "diary").read_text() == "private"
    assert {path.name for path in tmp_path.iterdir()} == {"fleet", "diary"}
    assert {path.name for path in (tmp_path / "fleet").iterdir()} == {"berlin", "diary"}


@pytest.mark.parametrize("run", ["../../evil", "../..", "..", ".", "", "/tmp/evil", "a/b", "a\x00b"])
def test_case_39_a_server_cannot_name_a_folder_outside_of_the_clients(victim, run):
    good = {"params": "0" * 64}
    for message in (Work(run=run), Work(run="run", released=Released(run=run, round=0, vectors=good))):
        with pytest.raises(ProtocolError, match="run: expected an id"):
            read_work(write(message))


def header(text, body=b""):
    """A body whose safetensors header is ``text``."""
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff" * 64,
        (2**62).to_bytes(8, "little") + b"{}",
        header(b"[" * 10_000),
        header(b'{"__metadata__":{"tree":"' + b"[" * 500 + b'"}}'),
        header(b'{"0":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'),
        header(b'{"__metadata__":{"tree":"{\\"#a\\":\\"0\\",\\"s\\":[1099511627776]}"},'
               b'"0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        pickle.dumps(print),
        pack(np.zeros((2, 2), np.float32)),
        pack(np.zeros(3, np.float32)),
        pack({"params": 3}),
        pack("import os"),
    ],
)  # fmt: skip
def test_case_39_a_model_that_is_none_is_refused_with_a_sentence_and_little_memory(victim, body):
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="expected"):
        victim.keep(Released(run="run", round=0, vectors={"params": "0" * 64}), lambda _sha256: body)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("settings", "vectors"),
    [
        ([], {}),
        ([], {"other": np.zeros(4, np.float32)}),
        ([], {"params": np.zeros(400_000, np.float32)}),
        ([], {"params": np.array([True])}),
        ([{"__class__": "os.system"}], {"params": np.zeros(4, np.float32)}),
    ],
)
def test_case_39_a_plan_that_makes_no_sense_is_answered_by_a_refusal(victim, settings, vectors):
    stored = {name: pack(vector) for name, vector in vectors.items()}
    fields = {"slot": [0, 0, "update", "train"], "learn": True, "settings": settings, "key": bytes(32)}
    plan = write_plan({**fields, "variant": None, "mail": None}, {name: f"{i:064}" for i, name in enumerate(stored)})
    slot, parcel = victim.handle(Work(run="run", plan=plan), lambda sha256: list(stored.values())[int(sha256)])
    assert slot == Slot(0, 0, "update")
    report = unpack_report(parcel.body, slot, "berlin", victim.federation.codec(slot), 4)
    assert report.refused
    assert victim.store.memory("run") == {}
