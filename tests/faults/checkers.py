"""What must hold after every case, whatever was done to the processes on the way.

``everything`` asks all of it of a trial; each law is a function of its own, and a broken one is a sentence in
``Broken``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from faults.process import secret_of
from faults.trial import Trial
from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Report
from hansa.network import audit, journal
from hansa.network.budget import budget_of
from hansa.network.client_store import ClientStore
from hansa.network.messages import read_receipt, slot_of
from hansa.network.store import Store
from hansa.privacy.ledger import Entry
from hansa.training.apps import load_app
from hansa.training.loop import Loop
from hansa.training.privacy import bound
from hansa.training.run import load_run
from hansa.training.simulate import initial_params
from hansa.wire import lay_out, unpack_report


class Broken(AssertionError):
    """A law that does not hold."""


def everything(trial: Trial, reference: Trial | None = None) -> None:
    """All laws of a trial that has ended; ``reference`` is an undisturbed one whose bits it must have."""
    every_database_is_sound(trial)
    each_report_counts_once(trial)
    every_receipt_stands(trial)
    every_version_is_one_model(trial)
    the_parameters_follow_from_the_reports(trial)
    nothing_temporary_is_left(trial)
    the_logs_are_whole(trial)
    every_release_is_in_the_ledger(trial)
    every_report_is_paid_for(trial)
    if reference is not None:
        the_bits_are_those_of(trial, reference)


def the_bits_are_those_of(trial: Trial, reference: Trial) -> None:
    """The same parameters, and the same memory at every client."""
    if trial.parameters() != reference.parameters():
        raise Broken("the final parameters are not those of an undisturbed run")
    if trial.memories() != reference.memories():
        raise Broken("a client's memory is not that of an undisturbed run")


def each_report_counts_once(trial: Trial) -> None:
    """Each report counts once at the coordinator, and every client believes what the coordinator does."""
    counted = counted_once(trial.folder / "fed" / "coordinator.db")
    for name in trial.names:
        _agrees(trial, name, {key[:4] for key in counted if key[4] == name})


def counted_once(path: Path) -> set[Any]:
    """At most one report of a client in an exchange and one settlement in an attempt; who counted was accepted.

    Gives run, task, round, attempt and client of each that counted.
    """
    with closing(sqlite3.connect(path, timeout=30)) as db:
        twice = db.execute(
            "SELECT slot_id, client, COUNT(*) FROM reports GROUP BY slot_id, client HAVING COUNT(*) > 1"
        ).fetchall()
        twice += db.execute(
            "SELECT run, task, round, attempt, client FROM settlements "
            "GROUP BY run, task, round, attempt, client HAVING COUNT(*) > 1"
        ).fetchall()
        if twice:
            raise Broken(f"counted twice: {twice}")
        counted = set(db.execute("SELECT run, task, round, attempt, client FROM settlements WHERE counted"))
        accepted = set(
            db.execute(
                "SELECT slots.run, slots.task, slots.round, slots.attempt, reports.client FROM reports "
                "JOIN slots ON slots.id = slot_id WHERE reports.status = 'accepted' AND slots.learn "
                "AND CASE WHEN slots.buffered THEN counted_in IS NOT NULL ELSE slots.state = 'aggregated' END"
            )
        )
    if strange := counted ^ accepted:
        raise Broken(f"counted without an accepted report, or accepted in a closed slot and not counted: {strange}")
    return counted


def _agrees(trial: Trial, name: str, counted: set[Any]) -> None:
    """A client believes of no attempt something else than the coordinator."""
    believed = trial.query(
        "SELECT DISTINCT run, task, round, attempt, counted FROM answers WHERE counted IS NOT NULL",
        file=f"{name}/client.db",
    )
    if wrong := [row for row in believed if bool(row[4]) != (row[:4] in counted)]:
        raise Broken(f"{name} believes of its updates what the coordinator does not: {wrong}")


def every_receipt_stands(trial: Trial) -> None:
    """What a client was told ``accepted`` of is in the frozen set with those bytes, or its attempt was abandoned.

    In a buffered round it is in a buffer, or it waited until it was too old, and a settlement says so.
    """
    rows = trial.query(
        "SELECT slots.run, slots.slot, reports.client, reports.sha256, reports.status, "
        "CASE WHEN slots.buffered THEN reports.status = 'late' AND counted_in IS NULL AND settlements.counted = 0 "
        "ELSE slots.state = 'abandoned' END FROM reports JOIN slots ON slots.id = reports.slot_id "
        "LEFT JOIN settlements USING (run, task, round, attempt, client)"
    )
    known = {(run, slot, client): (sha256, status, vain) for run, slot, client, sha256, status, vain in rows}
    for name in trial.names:
        for receipt in trial.notes(name, "receipt"):
            found = known.get((receipt["run"], receipt["slot"], name))
            if found is None or found[0] != receipt["sha256"]:
                raise Broken(f"{name} holds a receipt that the coordinator does not know: {receipt}; found {found}")
            if receipt["status"] == "accepted" and found[1] != "accepted" and not found[2]:
                raise Broken(f"{name} was told accepted, and the coordinator holds {found}: {receipt}")


def every_version_is_one_model(trial: Trial) -> None:
    """No round was released as two models."""
    seen: dict[Any, set[str]] = {}
    for name in trial.names:
        for note in trial.notes(name, "release"):
            seen.setdefault((note["run"], note["round"]), set()).add(note["params"])
    if several := {version: models for version, models in seen.items() if len(models) > 1}:
        raise Broken(f"two models for one version: {several}")


def the_parameters_follow_from_the_reports(trial: Trial) -> None:
    """The run, computed again from its committed reports alone, has the bits of the parameters that it saved."""
    app = load_app(trial.folder / "app.py")
    federation = bound(app.federation, app.schedule, app.schedule.cohort_size or app.schedule.clients_needed)
    key = Key.of(0)
    kind = Archive if app.schedule.buffer is None else BufferedArchive
    with closing(kind(trial, federation)) as archive:
        loop = Loop(
            federation=federation,
            schedule=app.schedule,
            runtime=archive,
            key=key,
            clients=lambda: tuple(sorted(trial.names)),
            params=initial_params(federation, key, app.start_from),
        )
        found = loop.run().state.algorithm["params"]
    saved = load_run(trial.folder / "run").parameters
    if found.tobytes() != saved.tobytes():
        raise Broken("the final parameters do not follow from the committed reports")


def the_logs_are_whole(trial: Trial) -> None:
    """The audit log's chain holds, in the state folder and in the run directory, and tells of each report once."""
    authority = (trial.folder / "fed" / "authority" / "authority.pem").read_bytes()
    with closing(Store.existing(trial.folder / "fed")) as store:
        found = [audit.check(journal.lines(store), authority, live=True)]
    with (trial.folder / "run" / "log.jsonl").open("rb") as file:
        found.append(audit.check((line.rstrip(b"\n") for line in file), authority))
    if problems := [problem for one in found for problem in one.problems]:
        raise Broken(f"the audit log is not whole: {problems[:3]}")


def every_release_is_in_the_ledger(trial: Trial) -> None:
    """Of a noisy run: each round that counted somebody has an entry, by the noise that its secret gives."""
    if not trial.noisy:
        return
    rows = trial.query("SELECT what FROM audit WHERE kind = 'noised' ORDER BY number")
    entries = [Entry.of_json(json.loads(what)) for (what,) in rows]
    released = trial.query(
        "SELECT DISTINCT round, attempt FROM slots WHERE task = 'train' AND state = 'aggregated' ORDER BY round"
    )
    if len(load_run(trial.folder / "run").history) != len(released) or len(entries) < len(released):
        raise Broken(f"expected an entry for each of {released}, found {entries}")
    for number, attempt in released:
        clients = [
            client
            for (client,) in trial.query(
                "SELECT client FROM reports JOIN slots ON slots.id = slot_id "
                "WHERE task = 'train' AND round = ? AND attempt = ? AND status = 'accepted'",
                number,
                attempt,
            )
        ]
        secret = Key(secret_of(f"secret train {number} {attempt}"))
        event = next((entry.event for entry in entries if entry.round == number), None)
        if event is None or Entry.of("train", number, attempt, secret, clients, event) not in entries:
            raise Broken(f"round {number}, attempt {attempt} was released, and its noise is not in the ledger")


def every_report_is_paid_for(trial: Trial) -> None:
    """Of a noisy run: each report that the coordinator holds is in its owner's record, which is whole."""
    if not trial.noisy:
        return
    for name in trial.names:
        with closing(ClientStore(trial.folder / name)) as store:
            budget = budget_of(str(trial.folder / "data" / f"{name}.npz"), trial.folder / "budgets", store)
            assert budget is not None
            paid = [entry["what"] for entry in budget.record.entries if entry["kind"] == "spent"]
            budget.record.close()
        sent = trial.query(
            "SELECT slot, sha256 FROM reports JOIN slots ON slots.id = slot_id WHERE client = ? AND learn", name
        )
        if missing := set(sent) - {(one["slot"], one["sha256"]) for one in paid}:
            raise Broken(f"{name} sent what its owner's budget does not know: {missing}")
    left = [path.name for path in (trial.folder / "budgets").iterdir() if ".new" in path.name]
    if left:
        raise Broken(f"temporary records are left: {left}")


def of_a_site(folder: Path) -> None:
    """What must hold of a coordinator and clients in threads once all have ended; each client has its folder."""
    server = folder / "server"
    is_sound(server / "coordinator.db")
    counted_once(server / "coordinator.db")
    no_temporary_files(folder)
    authority = (server / "authority" / "authority.pem").read_bytes()
    with closing(Store.existing(server)) as store:
        if problems := audit.check(journal.lines(store), authority, live=True).problems:
            raise Broken(f"the audit log is not whole: {problems[:3]}")
    for path in folder.glob("*/client.db"):
        is_sound(path)
        _kept_receipts_stand(path, server / "coordinator.db")


def _kept_receipts_stand(client: Path, server: Path) -> None:
    """What a client keeps receipts of is at the coordinator, with those bytes and that status."""
    with closing(sqlite3.connect(client)) as db:
        kept = [read_receipt(body) for (body,) in db.execute("SELECT body FROM receipts")]
    query = (
        "SELECT sha256, status FROM reports JOIN slots ON slots.id = slot_id WHERE run = ? AND slot = ? AND client = ?"
    )
    with closing(sqlite3.connect(server)) as db:
        for one in kept:
            found = db.execute(query, (one.run, one.slot, one.client)).fetchone()
            if found != (one.sha256, one.status):
                raise Broken(f"{one.client} holds a receipt that does not stand: {one}; found {found}")


def every_database_is_sound(trial: Trial) -> None:
    """SQLite finds nothing wrong with the coordinator's file and every client's."""
    for path in (trial.folder / "fed" / "coordinator.db", *(trial.folder / name / "client.db" for name in trial.names)):
        is_sound(path)


def is_sound(path: Path) -> None:
    """``PRAGMA integrity_check`` of one file."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        said = [row[0] for row in db.execute("PRAGMA integrity_check")]
    if said != ["ok"]:
        raise Broken(f"{path}: {said[:5]}")


def nothing_temporary_is_left(trial: Trial) -> None:
    """No half-written file, no blob under another name than its hash."""
    for part in ("fed", "run", *trial.names):
        no_temporary_files(trial.folder / part)
    for folder in ("blobs", "updates"):
        for path in (trial.folder / "fed" / folder).iterdir():
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                raise Broken(f"{path}: not what its name says")


def no_temporary_files(folder: Path) -> None:
    """Nothing under ``folder`` is called as temporary files are."""
    left = [path for path in folder.rglob("*") if ".new" in path.name or path.suffix in (".part", ".tmp")]
    if left:
        raise Broken(f"temporary files are left: {left}")


@contextmanager
def returns_to_baseline(more_mb: float = 64.0, limit_s: float = 10.0) -> Iterator[None]:
    """Threads, open files and memory of this process are afterwards what they were before."""
    gc.collect()
    threads, files, memory = set(threading.enumerate()), open_files(), rss_mb()
    yield
    end = time.monotonic() + limit_s
    while True:
        gc.collect()
        more_threads = set(threading.enumerate()) - threads
        more_files = open_files() - files
        if not more_threads and not more_files:
            break
        if time.monotonic() > end:
            raise Broken(f"left behind: threads {more_threads}, files {dict(more_files)}")
        time.sleep(0.05)
    if rss_mb() - memory > more_mb:
        raise Broken(f"memory grew from {memory:.0f} to {rss_mb():.0f} MB")


def open_files() -> Counter[str]:
    """How often each file is open in this process; all sockets are one, and all pipes."""
    found = Counter[str]()
    for number in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{number}").partition(":[")[0]] += 1
        except FileNotFoundError:
            continue
    return found


def rss_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Archive:
    """A runtime in which everyone has answered long ago: it reads the reports that a coordinator committed."""

    def __init__(self, trial: Trial, federation: Any) -> None:
        self.trial, self.federation = trial, federation
        self._db = sqlite3.connect(trial.folder / "fed" / "coordinator.db")
        [(run,)] = self._db.execute("SELECT value FROM meta WHERE key = 'run'")
        self._run = json.loads(run)["id"]

    def close(self) -> None:
        self._db.close()

    def start(self, plan: Any, clients: Any) -> None:
        """Whoever was asked then must be whom the computation asks now."""
        asked = [row[0] for row in self._rows("SELECT client FROM assignments", plan.slot, "ORDER BY position")]
        if asked != list(clients):
            raise Broken(f"{plan.slot}: asked {asked}, a recomputation asks {list(clients)}")

    def reports(self, slot: Any) -> Iterator[Report]:
        """A slot's accepted and refused reports, in the order of its cohort."""
        query = "SELECT client, sha256, status, reason FROM reports JOIN assignments USING (slot_id, client)"
        rows = self._rows(query, slot, "AND status != 'late' ORDER BY position")
        [(state,)] = self._db.execute("SELECT state FROM slots WHERE run = ? AND slot = ?", (self._run, str(slot)))
        if state == "abandoned":
            raise Abandoned(f"{slot}")
        for client, sha256, status, reason in rows:
            yield self._report(slot, client, sha256, reason if status == "refused" else "")

    def settle(self, slot: Any, counted: Any) -> None:
        """Clients were told what the computation finds."""
        query = "SELECT client FROM settlements WHERE run = ? AND task = ? AND round = ? AND attempt = ? AND counted"
        told = {row[0] for row in self._db.execute(query, (self._run, slot.task, slot.round, slot.attempt))}
        if told != set(counted):
            raise Broken(f"{slot}: told {sorted(told)} that they counted, a recomputation counts {sorted(counted)}")

    def once(self, name: str, make: Any) -> Key:
        """The secret that the coordinator drew; where that was by chance, no part of the federation uses it."""
        return Key(secret_of(name))

    def traffic_totals(self) -> tuple[int, int]:
        return 0, 0

    def refusals(self) -> list[dict[str, Any]]:
        return []

    def _report(self, slot: Any, client: str, sha256: str, refused: str) -> Report:
        """A report as it was sent."""
        if refused:
            return Report(slot, (), {}, {client: refused})
        size = self.federation.size_of(slot)
        return unpack_report(self._body(sha256), slot, client, self.federation.codec(slot), size)

    def _rows(self, query: str, slot: Any, order: str) -> list[Any]:
        inside = "WHERE slot_id = (SELECT id FROM slots WHERE run = ? AND slot = ?)"
        return self._db.execute(f"{query} {inside} {order}", (self._run, str(slot))).fetchall()

    def _body(self, sha256: str) -> bytes:
        for folder in ("archive", "fed/updates"):
            path = self.trial.folder / folder / sha256
            if path.exists():
                body = path.read_bytes()
                if hashlib.sha256(body).hexdigest() != sha256:
                    raise Broken(f"{path}: not what its name says")
                return body
        raise Broken(f"a report that was accepted is gone: {sha256}")


class BufferedArchive(Archive):
    """The same for buffered rounds: a buffer holds what it held, in the order of arrival; everybody is available."""

    def __init__(self, trial: Trial, federation: Any) -> None:
        super().__init__(trial, federation)
        self.goal_clients, self.deadline_s, self.num_late = None, None, 0
        self.concurrency, self.oldest_round, self.filling = 0, 0, None
        self.plans: dict[Any, Any] = {}

    def start(self, plan: Any, clients: Any) -> None:
        """The models that clients were given must be those that the computation gives them."""
        if plan.slot != self.filling:
            super().start(plan, clients)
            return
        self.plans[plan.slot] = plan
        given = dict(self._rows("SELECT name, sha256 FROM vectors", plan.slot, ""))
        if given and given != {name: lay_out(vector).sha256 for name, vector in plan.broadcast.items()}:
            raise Broken(f"{plan.slot}: clients were given another model than a recomputation gives")

    def arrivals(self, count: int, refill: Any) -> Iterator[Report]:
        """What the buffer of this round held."""
        refill(count)
        rows = self._db.execute(
            "SELECT slots.slot, client, sha256, status, reason FROM reports JOIN slots ON slots.id = slot_id "
            "WHERE run = ? AND counted_in = ? ORDER BY arrival",
            (self._run, str(self.filling)),
        )
        held = sorted(((slot_of(row[0]), *row[1:]) for row in rows), key=lambda row: row[0])
        if len(held) != count:
            raise Broken(f"{self.filling}: expected a buffer of {count} reports, found {len(held)}")
        for slot, client, sha256, status, reason in held:
            yield self._report(slot, client, sha256, reason if status == "refused" else "")

    def settle(self, slot: Any, counted: Any) -> None:
        """Whom this buffer counted of a slot, its clients were told; others of the slot are of other buffers."""
        if slot.task != "train":
            super().settle(slot, counted)
            return
        query = (
            "SELECT reports.client, counted FROM settlements JOIN slots USING (run, task, round, attempt) "
            "JOIN reports ON slot_id = slots.id AND reports.client = settlements.client "
            "WHERE run = ? AND slot = ? AND counted_in = ?"
        )
        told = dict(self._db.execute(query, (self._run, str(slot), str(self.filling))))
        if told != {client: int(client in counted) for client in told} or not told:
            raise Broken(f"{slot}: told {told}, a recomputation of buffer {self.filling} counts {sorted(counted)}")

    def of_attempt(self, attempt: int, clients: Any, without: Any) -> Any:
        return clients

    def known(self, clients: Any) -> Any:
        return clients

    def available(self, clients: Any) -> list[bool]:
        return [True for _ in clients]

    def idle(self, clients: Any) -> list[str]:
        """Whoever was scored then."""
        query = "SELECT client FROM assignments JOIN slots ON slots.id = slot_id WHERE run = ? AND slot LIKE ?"
        mark = f"evaluate-{self.filling.round}-0-%"
        asked = {row[0] for row in self._db.execute(query, (self._run, mark))}
        return [client for client in clients if client in asked]
