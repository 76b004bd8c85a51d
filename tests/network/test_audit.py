"""The audit log: one change of it is found and named, and it tells of every event, and of no secret."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Report, Slot, Updates
from hansa.core.round import Context, begin, make_plan
from hansa.network import audit, identity
from hansa.network.journal import append, append_of_strangers, lines, save_log
from hansa.network.messages import Enrol, Refusal
from hansa.network.receipts import Seal
from hansa.network.registry import Caller
from hansa.network.runtime import NetworkRuntime
from hansa.network.signing import canonical
from hansa.network.store import Store
from hansa.network.store import audit as table
from hansa.wire import pack_report
from support_signing import Routes, SigningDesk

SLOT = Slot(0, 0, "update")
NAMES = ("berlin", "paris", "rome")


def plan(desk, slot):
    parts = desk.coordinator.federation.task("train")
    made = make_plan(parts, begin(parts, np.zeros(4, np.float32)), Context(Key.of(1)), NAMES, slot)
    desk.runtime.start(made, NAMES)


def body(desk, slot, value=0.5, **tail):
    columns = {"train_loss": np.array([0.5]), **{name: np.array([one]) for name, one in tail.items()}}
    updates = Updates(("x",), np.full((1, 4), value, np.float32), np.array([3.0]), columns)
    return pack_report(Report(slot, ("x",), updates), desk.coordinator.federation.codec(slot))


def live_through_it(folder):
    """A coordinator that saw everything: a round, a conflict, a late and an odd report, an abandoned attempt."""
    desk = SigningDesk(folder)
    desk.runtime = NetworkRuntime(desk.coordinator)
    keyids = {name: desk.enrol(name).keyid for name in NAMES}
    rounds = desk.coordinator.rounds
    plan(desk, SLOT)
    desk.coordinator.report(Caller("berlin", keyids["berlin"]), SLOT, body(desk, SLOT))
    with pytest.raises(Refusal):
        desk.coordinator.report("berlin", SLOT, body(desk, SLOT, 0.25))
    desk.coordinator.report("paris", SLOT, body(desk, SLOT, np.nan))
    rounds.freeze(SLOT, 1)
    desk.coordinator.report("rome", SLOT, body(desk, SLOT))
    rounds.settle(SLOT, ["berlin"])
    desk.coordinator.release(0, {"params": b"model"})
    later = Slot(1, 0, "update")
    plan(desk, later)
    desk.coordinator.report("berlin", later, body(desk, later))
    desk.coordinator.report("paris", later, body(desk, later, extra=1.0))
    with pytest.raises(Abandoned):
        rounds.freeze(later, 3)
    rounds.settle(later, ())
    odd = Slot(1, 1, "update")
    plan(desk, odd)
    for name, tail in (("berlin", {}), ("paris", {"extra": 1.0}), ("rome", {})):
        desk.coordinator.report(name, odd, body(desk, odd, **tail))
    rounds.freeze(odd, 1)
    rounds.settle(odd, ["berlin", "rome"])
    desk.coordinator.revoke("paris")
    desk.coordinator.finish()
    return desk


def live_through_buffers(folder):
    """A coordinator of buffered rounds: rome's report to round 0 waits until it is too old, paris's next one is odd."""
    desk = SigningDesk(folder)
    runtime = desk.runtime = NetworkRuntime(desk.coordinator)
    for name in NAMES:
        desk.enrol(name)
    later = Slot(1, 0, "update")
    runtime.filling = SLOT
    plan(desk, SLOT)
    for name in NAMES:
        desk.coordinator.report(name, SLOT, body(desk, SLOT))
    assert len(runtime.buffers.fill(SLOT, 2)) == 2
    runtime.settle(SLOT, ["berlin", "paris"])
    runtime.filling = later
    runtime.buffers.tidy(later, 1, lambda work: False)
    plan(desk, later)
    desk.coordinator.report("berlin", later, body(desk, later))
    desk.coordinator.report("paris", later, body(desk, later, extra=1.0))
    assert len(runtime.buffers.fill(later, 2)) == 2
    runtime.settle(later, ["berlin"])
    runtime.let_go()
    assert desk.coordinator.report("rome", later, body(desk, later)).status == "late"
    desk.coordinator.finish()
    return desk


def lived(live, folder):
    """The lines of a log that is whole, and the authority that proves it."""
    desk = live(folder / "state")
    path = desk.coordinator.save_log(folder)
    found = path.read_bytes(), (folder / "authority.pem").read_bytes()
    desk.close()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return lived(live_through_it, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def buffered(tmp_path_factory):
    return lived(live_through_buffers, tmp_path_factory.mktemp("buffered"))


def problems(text, authority):
    return audit.check(text.removesuffix(b"\n").split(b"\n"), authority).problems


def test_a_log_that_nobody_touched_is_whole(whole):
    found = audit.check(whole[0].splitlines(), whole[1])
    assert found.problems == ()
    assert (found.num_reports, found.num_open, found.num_after_head) == (8, 0, 0)
    assert found.num_entries == len(whole[0].splitlines()) - 1


def test_the_log_tells_of_every_event_of_a_run(whole):
    kinds = {json.loads(line).get("kind") for line in whole[0].splitlines()}
    ours = {"started", "invited", "enrolled", "planned", "report", "conflict", "frozen", "abandoned", "settled"}
    assert kinds >= ours | {"released", "revoked", "finished"}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_one_changed_byte_is_found(whole, data):
    text, authority = whole
    place = data.draw(st.integers(0, len(text) - 2))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[place]))
    number = text[:place].count(b"\n") + 1
    found = problems(text[:place] + bytes([other]) + text[place + 1 :], authority)
    assert found
    assert any(f"line {near}:" in found[0] for near in (number, number + 1)), found


@given(data=st.data())
def test_a_removed_line_is_found_and_named(whole, data):
    rows = whole[0].splitlines()
    place = data.draw(st.integers(0, len(rows) - 1))
    found = problems(b"\n".join(rows[:place] + rows[place + 1 :]), whole[1])
    assert found[0].startswith("end:" if place == len(rows) - 1 else f"line {place + 1}:")


@given(data=st.data())
def test_lines_cut_off_at_the_end_are_found(whole, data):
    rows = whole[0].splitlines()
    kept = data.draw(st.integers(0, len(rows) - 1))
    assert problems(b"\n".join(rows[:kept]), whole[1])
    if kept < len(rows) - 1:
        assert problems(b"\n".join([*rows[:kept], rows[-1]]), whole[1])


@given(data=st.data())
def test_swapped_lines_are_found_and_named(whole, data):
    rows = whole[0].splitlines()
    first = data.draw(st.integers(0, len(rows) - 3))
    second = data.draw(st.integers(first + 1, len(rows) - 2))
    rows[first], rows[second] = rows[second], rows[first]
    assert problems(b"\n".join(rows), whole[1])[0].startswith(f"line {first + 1}:")


def written_anew(whole, folder, change):
    """The log with other entries, its chain and head made by the authority in ``folder``; and that authority."""
    entries = [json.loads(line) for line in whole[0].splitlines()[:-1]]
    kept, before = [], audit.START
    for number, entry in enumerate(change(entries), 1):
        fields = {**entry, "number": number}
        before = fields["hash"] = audit.entry_hash(before, fields)
        kept.append(canonical(fields))
    authority = identity.Authority.open(folder)
    head = audit.signed_head(Seal.open(authority), len(kept), before, 0.0)
    return b"\n".join([*kept, head]), authority.certificate


def test_a_log_made_anew_without_the_federations_key_is_found(whole, tmp_path):
    text, _ = written_anew(whole, tmp_path, lambda entries: [e for e in entries if e["kind"] != "revoked"])
    assert "do not trust this server" in problems(text, whole[1])[0]


def forged(whole, folder, change):
    """What is found in a log that the coordinator itself made false."""
    return problems(*written_anew(whole, folder, change))


def edited(kind, edit):
    """Change the first entry of a kind."""

    def change(entries):
        place = next(i for i, entry in enumerate(entries) if entry["kind"] == kind)
        new = edit(json.loads(json.dumps(entries[place])))
        return [*entries[:place], *new, *entries[place + 1 :]]

    return change


def without_first_report(entry):
    entry["what"]["reports"] = []
    return [entry]


def twice_in_set(entry):
    entry["what"]["reports"] *= 2
    return [entry]


def another_hash(entry):
    entry["what"]["reports"][0][1] = "cd" * 32
    return [entry]


def who_was_late(entry):
    entry["what"]["counted"].append("rome")
    return [entry]


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("frozen", without_first_report, "expected the accepted report of berlin in train-0-0-update, found none"),
        ("frozen", twice_in_set, "expected berlin once in train-0-0-update, found it twice"),
        ("frozen", another_hash, "expected the report that berlin sent for train-0-0-update, found another"),
        ("frozen", lambda entry: [entry, entry], "expected train-0-0-update to be frozen once, found it again"),
        ("settled", lambda entry: [entry, entry], "expected berlin to count once in train-0-0, found it again"),
        ("settled", who_was_late, "expected rome among the frozen of train-0-0, found it is not"),
        ("report", lambda entry: [entry, entry], "expected one report of berlin in train-0-0-update, found a second"),
        ("frozen", lambda entry: [], "expected the accepted reports of train-0-0-update to be frozen or abandoned"),
        ("frozen", lambda entry: [{**entry, "what": {}}], "expected the fields of 'frozen'"),
    ],
)
def test_a_report_that_was_not_dealt_with_once_is_found_even_if_the_coordinator_signed_it(
    whole, tmp_path, kind, edit, said
):
    assert any(said in problem for problem in forged(whole, tmp_path, edited(kind, edit)))


def test_a_log_of_buffered_rounds_is_whole(buffered):
    found = audit.check(buffered[0].splitlines(), buffered[1])
    assert (found.problems, found.num_reports, found.num_open) == ((), 6, 0)
    kinds = [json.loads(line).get("kind") for line in buffered[0].splitlines()]
    assert (kinds.count("filled"), kinds.count("closed"), kinds.count("settled")) == (2, 2, 4)


def the_one_left_out_too(entry):
    entry["what"]["reports"].append(["rome", entry["what"]["reports"][0][1], "train-0-0-update"])
    return [entry]


def second(kind, edit):
    """Change the second entry of a kind."""

    def change(entries):
        first = next(i for i, entry in enumerate(entries) if entry["kind"] == kind)
        return [*entries[: first + 1], *edited(kind, edit)(entries[first + 1 :])]

    return change


def closed_early(entries):
    """Slot 0 is closed before rome has reported to it."""
    [closed] = [e for e in entries if (e["kind"], e["what"].get("slot")) == ("closed", "train-0-0-update")]
    rest = [entry for entry in entries if entry is not closed]
    place = max(i for i, e in enumerate(rest) if e["kind"] == "report" and e["what"]["slot"] == "train-0-0-update")
    return [*rest[:place], closed, *rest[place:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited("filled", without_first_report), "expected the report of berlin for train-0-0-update dealt with"),
        (edited("filled", without_first_report), "expected berlin among the frozen of train-0-0, found it is not"),
        (edited("filled", twice_in_set), "expected berlin once in buffer train-0-0-update, found it twice"),
        (edited("filled", another_hash), "expected the report that berlin sent for train-0-0-update, found another"),
        (edited("filled", lambda entry: [entry, entry]), "expected buffer train-0-0-update to be filled once"),
        (second("filled", the_one_left_out_too), "expected a report of rome for train-0-0-update that waits"),
        (second("settled", lambda entry: []), "expected the report of rome for train-0-0-update dealt with"),
        (closed_early, "expected no report accepted in train-0-0-update after it closed, found rome"),
        (edited("filled", lambda entry: [{**entry, "what": {}}]), "expected the fields of 'filled'"),
    ],
)
def test_a_report_that_a_buffer_did_not_count_once_is_found(buffered, tmp_path, change, said):
    assert any(said in problem for problem in forged(buffered, tmp_path, change))


def test_a_report_accepted_after_its_client_was_settled_is_found(buffered, tmp_path):
    def change(entries):
        late = next(e for e in entries if e["kind"] == "report" and e["what"]["status"] == "late")
        closed = [e for e in entries if e["kind"] == "closed"]
        late["what"]["status"] = "accepted"
        return [entry for entry in entries if entry is not closed[-1]]

    found = forged(buffered, tmp_path, change)
    assert any("expected no report accepted of rome after it was settled, found one" in problem for problem in found)


def test_nothing_is_found_where_the_coordinator_changed_nothing(whole, tmp_path):
    assert forged(whole, tmp_path, lambda entries: entries) == ()


def test_a_state_folder_can_be_checked_while_it_is_served_and_after(tmp_path):
    desk = live_through_it(tmp_path)
    pem = desk.coordinator.authority.certificate
    before = audit.check(lines(desk.store), pem, live=True)
    assert (before.problems, before.num_after_head) == ((), before.num_entries)
    desk.close()
    store = Store(tmp_path)
    after = audit.check(lines(store), pem, live=True)
    assert (after.problems, after.num_after_head) == ((), 0)
    with store.write() as db:
        db.execute(table.delete().where(table.c.number == after.num_entries))
    assert "entries at the end were removed" in audit.check(lines(store), pem, live=True).problems[0]
    store.close()


def test_what_clients_write_is_escaped_and_cut(tmp_path):
    desk = SigningDesk(tmp_path)
    nasty = "\x1b[31m\n2026-11-21 berlin revoked\r\u202e" + "x" * 5000
    token = desk.invite("berlin")
    with pytest.raises(Refusal):
        desk.coordinator.enrol(Enrol(token=token.id, secret=b"guess", name=nasty, request=b""), address="192.0.2.1")
    for row in desk.log():
        assert (row.who + row.what).isascii()
        assert (row.who + row.what).isprintable()
        assert len(row.who + row.what) < 1000
    assert [row.kind for row in desk.log()] == ["started", "invited", "enrolment refused"]
    desk.close()


def test_no_token_key_or_secret_is_in_the_log_or_in_an_answer(tmp_path):
    desk = SigningDesk(tmp_path)
    token, (key, request) = desk.invite("berlin"), identity.make_request("berlin")
    message = Enrol(token=token.id, secret=token.secret, name="berlin", request=request)
    desk.coordinator.enrol(message)
    with pytest.raises(Refusal) as caught:
        desk.coordinator.enrol(Enrol(token=token.id, secret=b"guess", name="berlin", request=request))
    desk.runtime = NetworkRuntime(desk.coordinator)
    desk.runtime.once("secret train 0 0", lambda: b"material" * 4)
    text = b"\n".join(lines(desk.store)).decode() + str(caught.value)
    for secret in (token.encode(), token.secret.hex(), token.id, key.decode().splitlines()[1], (b"material" * 4).hex()):
        assert secret not in text
    desk.close()


def test_a_client_cannot_fill_the_disk_with_entries(tmp_path):
    desk = SigningDesk(tmp_path)
    routes = Routes(desk)
    for number in range(20):
        assert routes.ask("POST", b"/v1/hello", routes.hello(str(number))).status == 200
    assert len(desk.log("hello")) == 1
    desk.now += 61
    assert routes.ask("POST", b"/v1/hello", routes.hello("20")).status == 200
    desk.now -= 3600  # a clock that is set back silences nobody
    assert routes.ask("POST", b"/v1/hello", routes.hello("21")).status == 200
    assert len(desk.log("hello")) == 3
    with desk.store.write() as db:
        for number in range(200):
            append_of_strangers(db, desk.now + number, "enrolment refused", f"name-{number}", {})
    assert len(desk.log("enrolment refused")) == 40
    desk.close()


def test_an_entry_is_gone_if_its_event_is(tmp_path):
    store = Store(tmp_path)
    append_and_fail = pytest.raises(ZeroDivisionError)
    with append_and_fail, store.write() as db:
        append(db, 0.0, "revoked", "berlin", {})
        raise ZeroDivisionError
    assert list(lines(store)) == []
    store.close()


def test_the_head_of_an_empty_log_is_missing(tmp_path):
    store = Store(tmp_path / "state")
    authority = identity.Authority.open(tmp_path / "authority")
    path = save_log(store, Seal.open(authority), authority.certificate, tmp_path)
    assert audit.check(path.read_bytes().splitlines(), authority.certificate).problems
    store.close()
