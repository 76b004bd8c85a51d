import hashlib
from dataclasses import replace

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Report
from hansa.learners.linear import LinearLearner
from hansa.network.coordinator import Coordinator
from hansa.network.messages import PROTOCOL, Hello, Refusal, read_plan
from hansa.network.store import Store
from hansa.wire import pack, pack_report, unpack
from support_desk import ROW, SLOT, Desk


@pytest.fixture
def desk(tmp_path, tools):
    made = Desk(tmp_path, tools.federation(), tools.app)
    for name in made.cohort:
        made.enrol(name)
        made.hello(name)
    made.open_slot()
    yield made
    made.coordinator.close()


def test_another_app_is_refused_by_fingerprint(desk):
    with pytest.raises(
        Refusal, match=r"fingerprint abababab.*another app than the server's \(fingerprint cdcdcdcd"
    ) as e:
        desk.hello("berlin", "cd" * 32)
    assert e.value.code == "another-app"


def test_another_protocol_is_refused(desk):
    for protocol in (PROTOCOL - 1, PROTOCOL + 1, 0, -1, 2**70):
        with pytest.raises(Refusal, match="install the coordinator's version") as e:
            desk.coordinator.hello("berlin", Hello(protocol=protocol, version="9", fingerprints=(desk.app,)))
        assert e.value.code == "protocol"


def test_work_asks_for_a_hello_first(desk):
    desk.enrol("rome")
    with pytest.raises(Refusal, match="say hello"):
        desk.coordinator.work("rome")


def test_a_plan_names_vectors_by_the_hash_of_their_bodies(desk):
    work = desk.coordinator.work("berlin")
    sha256 = read_plan(work.plan).vectors["params"]
    path, size = desk.coordinator.vector(sha256)
    body = path.read_bytes()
    assert (hashlib.sha256(body).hexdigest(), len(body)) == (sha256, size)
    assert unpack(body).tolist() == [0.0] * 4


def test_a_report_is_counted_once_and_the_receipt_repeated(desk):
    first = desk.coordinator.report("berlin", SLOT, desk.body())
    assert first.status == "accepted"
    assert desk.coordinator.report("berlin", SLOT, desk.body()) == first
    assert [row.client for row in desk.coordinator.rounds.frozen(SLOT)] == ["berlin"]
    assert desk.coordinator.work("berlin").plan is None


def test_other_bytes_for_the_same_slot_are_a_conflict_and_the_first_stand(desk):
    first = desk.coordinator.report("berlin", SLOT, desk.body())
    with pytest.raises(Refusal, match="the first report stands") as caught:
        desk.coordinator.report("berlin", SLOT, desk.body(weight=4.0))
    assert caught.value.code == "conflict"
    assert desk.coordinator.rounds.receipt(SLOT, "berlin") == first


@pytest.mark.parametrize(
    ("values", "weight", "tail", "reason"),
    [
        (np.array([[0.1, np.nan, 0, 0]], np.float32), 3.0, {}, "update is not finite"),
        (np.array([[0.1, np.inf, 0, 0]], np.float32), 3.0, {}, "update is not finite"),
        (ROW, np.nan, {}, "weight is not a positive number"),
        (ROW, -1.0, {}, "weight is not a positive number"),
        (ROW, np.inf, {}, "weight is not a positive number"),
        (ROW, 3.0, {"below": np.nan}, "update is not finite"),
        (ROW[:, :3], 3.0, {}, "values of shape (1, 3)"),
        (np.vstack([ROW, ROW]), 3.0, {}, "values of shape (2, 4)"),
    ],
)
def test_a_report_that_cannot_count_is_refused_with_its_reason_and_the_round_goes_on(
    desk, values, weight, tail, reason
):
    receipt = desk.coordinator.report("berlin", SLOT, desk.body(values, weight, **tail))
    assert receipt.status == "refused"
    desk.coordinator.report("paris", SLOT, desk.body())
    reports = list(desk.runtime.reports(SLOT))
    assert [report.clients for report in reports] == [(), ("paris",)]
    [refusal] = desk.runtime.refusals()
    assert (refusal["round"], refusal["client"]) == (0, "berlin")
    assert reason in refusal["reason"]


def test_what_a_client_writes_can_do_nothing_to_a_terminal(desk):
    reason = "\x1b[31m[/bold]\n2026-11-21 berlin \u202e revoked" + "x" * 10_000
    body = pack_report(Report(SLOT, (), {}, {"x": reason}), desk.federation.codec(SLOT))
    receipt = desk.coordinator.report("berlin", SLOT, body)
    assert (receipt.status, receipt.reason.isprintable(), len(receipt.reason) <= 500) == ("refused", True, True)
    assert desk.coordinator.status()["clients"][0]["refused"][0].isprintable()


@pytest.mark.parametrize(
    "body", [b"", b"\x80\x04K\x01.", pack({"updates": 3}), pack({"mail": 1}), pack([1]), b"x" * 500]
)
def test_a_body_that_is_no_report_is_refused_and_the_round_goes_on(desk, body):
    assert desk.coordinator.report("berlin", SLOT, body).status == "refused"
    desk.coordinator.report("paris", SLOT, desk.body())
    assert [report.clients for report in desk.runtime.reports(SLOT)] == [(), ("paris",)]


def test_rows_of_another_form_than_most_are_refused_when_the_slot_closes(tmp_path, tools):
    desk = Desk(tmp_path, tools.federation(), tools.app, ("a", "b", "c"))
    for name in desk.cohort:
        desk.enrol(name)
    desk.open_slot()
    desk.coordinator.report("a", SLOT, desk.body(extra=1.0))
    desk.coordinator.report("b", SLOT, desk.body())
    desk.coordinator.report("c", SLOT, desk.body())
    assert [report.clients for report in desk.runtime.reports(SLOT)] == [(), ("b",), ("c",)]
    assert "another form than most" in desk.runtime.refusals()[0]["reason"]
    desk.coordinator.close()


def test_a_late_report_is_recorded_and_said(desk):
    desk.coordinator.report("berlin", SLOT, desk.body())
    desk.coordinator.rounds.freeze(SLOT, 1)
    assert desk.coordinator.report("paris", SLOT, desk.body()).status == "late"
    assert [report.clients for report in desk.runtime.reports(SLOT)] == [("berlin",)]


def test_a_client_that_was_not_asked_cannot_report(desk):
    desk.enrol("rome")
    with pytest.raises(Refusal, match="rome was asked in") as caught:
        desk.coordinator.report("rome", SLOT, desk.body())
    assert caught.value.code == "not-asked"


def test_a_round_does_not_wait_for_a_client_that_was_revoked(desk):
    desk.coordinator.report("berlin", SLOT, desk.body())
    desk.coordinator.revoke("paris")
    assert [report.clients for report in desk.runtime.reports(SLOT)] == [("berlin",)]
    with pytest.raises(Refusal, match="paris was revoked"):
        desk.coordinator.registry.authenticate(desk.certificates["paris"])


def test_settlements_come_until_they_are_acknowledged(desk):
    desk.runtime.settle(SLOT, ("berlin",))
    desk.runtime.settle(SLOT, ("berlin",))
    [counted] = desk.coordinator.work("berlin").settlements
    [dropped] = desk.coordinator.work("paris").settlements
    assert (counted.counted, dropped.counted) == (True, False)
    assert desk.coordinator.work("berlin", acknowledged=counted.number).settlements == ()


def test_status_tells_the_round_and_every_client(desk):
    desk.coordinator.report("berlin", SLOT, desk.body(np.full((1, 4), np.nan, np.float32)))
    found = desk.coordinator.status()
    assert (found["task"], found["round"], found["phase"]) == ("train", 0, "collecting")
    assert (found["asked"], found["reported"]) == (2, 1)
    berlin, paris = found["clients"]
    assert (berlin["state"], berlin["refused"]) == ("waiting", ["round 0: update is not finite"])
    assert (paris["state"], paris["rounds_counted"]) == ("working", 0)
    assert paris["last_seen_s"] < 60


def test_a_run_is_not_begun_again_by_a_restart_and_other_settings_make_another(tmp_path, tools):
    def run(settings="seed 0"):
        coordinator = Coordinator(Store(tmp_path / "runs"), tools.federation(), tools.app, settings=settings)
        ids.append(coordinator.run)
        return coordinator

    ids = []
    run().close()
    again = run()
    again.finish()
    again.close()
    run().close()
    run("seed 1").close()
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_an_unfinished_run_is_not_mixed_with_another_app(desk, tools):
    with pytest.raises(InputError, match="found another app"):
        Coordinator(Store(desk.coordinator.store.folder), tools.federation(), "cd" * 32)
    with pytest.raises(InputError, match="found other settings"):
        Coordinator(Store(desk.coordinator.store.folder), tools.federation(), tools.app, settings="seed 1")


def test_bodies_are_counted_by_kind(desk):
    desk.coordinator.report("berlin", SLOT, desk.body())
    desk.coordinator.report("berlin", SLOT, desk.body())
    [entry] = desk.runtime.bodies()
    assert entry == {"kind": "update", "direction": "up", "count": 1, "bytes": len(desk.body())}
    assert desk.runtime.traffic(0) == (len(desk.body()), 0)
    assert desk.runtime.traffic(1) == (0, 0)


def test_a_release_is_offered_until_it_is_kept_and_forgets_what_a_replay_would_need(desk):
    desk.coordinator.report("berlin", SLOT, desk.body())
    desk.coordinator.report("paris", SLOT, desk.body(weight=2.0))
    list(desk.runtime.reports(SLOT))
    desk.runtime.once("secret train 0 0", lambda: bytes(32))
    desk.runtime.settle(SLOT, desk.cohort)
    desk.runtime.release(0, np.ones(4, np.float32), {"prepare.0": np.zeros(2)})
    released = desk.coordinator.work("berlin").released
    assert (released.round, sorted(released.vectors)) == (0, ["params", "prepare.0"])
    assert list(desk.coordinator.updates.folder.iterdir()) == []
    assert len(list(desk.coordinator.models.folder.iterdir())) == 2
    assert desk.runtime.once("secret train 0 0", lambda: b"x" * 32) == Key(b"x" * 32)


class FrozenLearner(LinearLearner):
    """A learner with frozen parameters."""

    frozen_hash = "ef" * 32


@pytest.mark.parametrize("own", ["ef" * 32, "cd" * 32, "none"])
def test_a_client_with_other_frozen_parameters_is_refused(tmp_path, tools, own):
    desk = Desk(tmp_path, tools.federation(learner=FrozenLearner(num_features=3, num_classes=2)), tools.app)
    desk.enrol("berlin")
    hello = Hello(protocol=PROTOCOL, version="0", fingerprints=(desk.app,))
    assert desk.coordinator.hello("berlin", hello).frozen == "ef" * 32
    assert desk.coordinator.registry.present(desk.coordinator.run) == []  # it takes part once it named its own
    if own == "ef" * 32:
        desk.coordinator.hello("berlin", replace(hello, frozen=own))
        assert desk.coordinator.registry.present(desk.coordinator.run) == ["berlin"]
    else:
        with pytest.raises(Refusal, match=f"expected frozen parameters with hash efefefef, found {own[:8]}") as e:
            desk.coordinator.hello("berlin", replace(hello, frozen=own))
        assert e.value.code == "another-model"
    desk.coordinator.close()
