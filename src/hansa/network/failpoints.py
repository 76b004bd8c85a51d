"""Fail points: named places before and after each durable step, where a test makes the process die, fail or wait.

    HANSA_FAILPOINTS="coordinator.report.recorded@3=kill,client.report.sending=sleep:2" hansa serve app.py ...

| action | what it does |
|---|---|
| ``kill`` | SIGKILL to this process: no handler, no ``finally``, nothing flushed |
| ``raise`` | raises ``Reached`` |
| ``sleep:SECONDS`` | waits, in the thread that came by |

Every time, or with ``@3`` the third time only, counted from the start of the process. Without the variable a point
costs one truth test.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType

from hansa.core.errors import InputError

VARIABLE = "HANSA_FAILPOINTS"

# Each point and what has happened before it: in the order in which a round comes by.
FAILPOINTS: Mapping[str, str] = MappingProxyType(
    {
        "file.filled": "a new file's content is written under a temporary name, not synced",
        "file.written": "a small file's content is on disk under a temporary name; the file itself is as it was",
        # The coordinator starts.
        "coordinator.store.creating": "the database's tables are made or brought up to date, not committed",
        "coordinator.store.created": "the database has its tables and the number of their schema",
        "coordinator.store.locked": "this process is the one coordinator of the state folder",
        "coordinator.authority.keyed": "the authority's key is kept, its certificate is not",
        "coordinator.authority.made": "the authority's key and certificate are kept",
        "coordinator.server.keyed": "the server's new key is kept, the certificate beside it is of the one before",
        "coordinator.run.opened": "the run has an id",
        "coordinator.served": "requests are answered",
        "coordinator.client.enrolling": "a token is used up and a client written, not committed",
        "coordinator.client.enrolled": "a client is committed, its certificate has not left",
        "coordinator.hello.noted": "a client is present, its welcome has not left",
        # A slot opens.
        "coordinator.population.noted": "what the round keeps to (who could take part in it, say) is stored",
        "coordinator.plan.made": "a plan is made, nothing of it is kept",
        "coordinator.plan.noted": "the plan's hash is stored, nothing of it is shown",
        "coordinator.blob.synced": "a blob's temporary file is on disk, not renamed",
        "coordinator.blob.renamed": "a blob has its name, the folder is not synced",
        "coordinator.blob.durable": "a blob survives a loss of power",
        "coordinator.plan.published": "the plan's vectors can be downloaded, no client is shown its part",
        "coordinator.plan.showing": "every client's part is written, not committed",
        "coordinator.plan.shown": "the slot collects",
        # A report comes.
        "coordinator.upload.grown": "some bytes of a long report are in its file",
        "coordinator.upload.whole": "a long report is all there and was not looked at",
        "coordinator.report.received": "a report's body is here, nothing of it is kept",
        "coordinator.report.stored": "a report is a file under its hash, no row names it",
        "coordinator.report.recording": "a report's row is written, not committed",
        "coordinator.report.recorded": "a report counts, nobody was told",
        "coordinator.receipt.ready": "a receipt is about to leave",
        # A slot closes.
        "coordinator.slot.full": "no more reports are waited for, the slot still collects",
        "coordinator.slot.freezing": "the set of reports is closed, not committed",
        "coordinator.slot.frozen": "the set of reports is closed for ever, none was read",
        "coordinator.secret.stored": "the attempt's secret is stored, it was not used",
        "coordinator.ledger.noting": "a release is written to the ledger, not committed",
        "coordinator.ledger.noted": "a release is in the ledger, its noise was not drawn",
        "coordinator.columns.added": "some columns of the next state are in files without names",
        "coordinator.round.aggregated": "the next state is in memory, nothing of it is kept",
        "coordinator.slot.settling": "settlements are written, not committed",
        "coordinator.slot.settled": "clients can learn that their updates counted, no checkpoint holds them",
        # Buffered rounds: what is too old is closed, seats are filled, a buffer fills and is settled. Slots grow older.
        "coordinator.buffer.tidying": "plans that are too old are closed, not committed",
        "coordinator.buffer.tidied": "plans that are too old are closed, no buffer was filled since",
        "coordinator.buffer.published": "a plan's vectors can be downloaded, nobody new is shown it",
        "coordinator.buffer.noted": "a buffered plan's hash is stored, nobody new is shown it",
        "coordinator.buffer.showing": "the parts of some clients are written, not committed",
        "coordinator.buffer.shown": "some clients more are at work",
        "coordinator.buffer.filling": "which reports a buffer holds is written, not committed",
        "coordinator.buffer.filled": "a buffer holds its reports for ever, none was read",
        "coordinator.buffer.settling": "settlements of a buffer are written, not committed",
        "coordinator.elapsed.noting": "how long a slot has been open is written, not committed",
        "coordinator.elapsed.noted": "how long a slot has been open is stored",
        # A round ends.
        "coordinator.checkpoint.copied": "the checkpoint's copy is durable, the checkpoint is that of the round before",
        "coordinator.checkpoint.written": "the checkpoint is on disk under a temporary name",
        "coordinator.checkpoint.renamed": "the checkpoint has replaced the one before, the folder is not synced",
        "coordinator.checkpoint.saved": "the checkpoint is durable, the model is not released",
        "coordinator.release.stored": "the released vectors can be downloaded, no one is told of them",
        "coordinator.release.named": "clients are told of the released model",
        "coordinator.release.forgotten": "plans and secrets of the round are dropped, its files are not",
        "coordinator.release.cleaned": "files that no row needs are removed",
        # The run ends.
        "coordinator.run.trained": "all rounds are done and scored, the run directory is not written",
        "coordinator.run.saved": "the run directory is written, clients are not told that the run is over",
        "coordinator.run.finished": "the run is marked as over",
        "coordinator.run.logged": "the run directory holds the log to its end, the run is not marked as complete",
        "coordinator.goodbye.noted": "a client is noted as gone, it does not know",
        # A client enrols.
        "client.key.kept": "the client's key is kept, its signing request is not",
        "client.request.kept": "the client's key and signing request are kept",
        "client.enrolment.listed": "the signing request is listed as sent, it has not left",
        "client.certificate.received": "the certificate is here, nothing of it is kept",
        "client.certificate.kept": "certificates are kept, the identity is not complete",
        "client.identity.kept": "the identity is complete",
        "client.run.welcomed": "the coordinator counts this client in, nothing of the run is kept",
        "client.run.entered": "what was left of other runs is forgotten",
        # A client's owner sets a privacy budget, which is a record.
        "client.record.made": "the record and its key are whole, under a temporary name",
        # A client answers a plan.
        "client.plan.received": "a plan is here, nothing was done about it",
        "client.download.grown": "some bytes of a long vector are in its file",
        "client.download.whole": "a long vector is all there under a temporary name",
        "client.parcel.kept": "a long report is in a file that no row names",
        "client.training.done": "the report is in memory, nothing of it is kept",
        "client.budget.spending": "the report's entry in the owner's privacy budget is written, not committed",
        "client.budget.spent": "the report is paid for, nothing of it is kept",
        "client.report.listed": "the report is listed as sent, it is not committed and has not left",
        "client.outbox.committing": "report, memory and secret are written, not committed",
        "client.outbox.committed": "report, pending memory and secret are durable",
        "client.report.sending": "a report that is durable is about to leave",
        "client.receipt.received": "the coordinator has counted the report, it is not noted here",
        "client.receipt.noted": "the receipt is in memory, to be written with the next transaction",
        # A client settles and keeps the newest model.
        "client.settlement.applying": "memory and outbox are changed, not committed",
        "client.settlement.applied": "the settled attempts are done with",
        "client.model.downloaded": "the released vectors are here, nothing of them is kept",
        "client.model.written": "the released model is on disk, nothing points at it",
        "client.model.linked": "the new pointer is made, the old one still stands",
        "client.model.swapped": "the newest model is the released one, older ones are still there",
        "client.model.cleaned": "older models are removed, the coordinator will offer this one again",
        "client.release.noted": "the release is known as kept, in memory",
        "client.run.finished": "the client was told that the run is over",
        "client.goodbye.said": "the coordinator knows that the client knows",
    }
)


class Reached(Exception):
    """A fail point whose action is ``raise`` was reached."""


Watch = Callable[[str], None]


def fail_point(name: str) -> None:
    """Do what was asked for at ``name``, if anything was."""
    if _watch is not None:
        _watch(name)


def watch(what: Watch | None) -> None:
    """Call ``what`` with the name of each point from now on; None turns all of them off."""
    global _watch
    _watch = what


def actions(text: str) -> Watch | None:
    """What ``HANSA_FAILPOINTS`` asks for; None for an empty text.

    >>> at = actions("coordinator.served@2=raise")
    >>> at("coordinator.served")
    >>> at("coordinator.served")
    Traceback (most recent call last):
    hansa.network.failpoints.Reached: coordinator.served
    """
    asked = [_parse(part.strip()) for part in text.split(",") if part.strip()]
    if not asked:
        return None
    passed, lock = Counter[str](), threading.Lock()

    def at(name: str) -> None:
        check(name)
        with lock:
            passed[name] += 1
            number = passed[name]
        for wanted, when, act in asked:
            if wanted == name and when in (None, number):
                act(name)

    return at


def check(name: str) -> str:
    """``name`` if it is a fail point; ``InputError`` otherwise."""
    if name not in FAILPOINTS:
        raise InputError(
            f"fail point: expected one of hansa.network.failpoints.FAILPOINTS ({', '.join(list(FAILPOINTS)[:3])}, "
            f"...), found {name!r}; look it up there"
        )
    return name


def _parse(text: str) -> tuple[str, int | None, Watch]:
    """One point, when, and what to do there."""
    found = re.fullmatch(r"([a-z.]+)(?:@([1-9]\d{0,8}))?=(?:(kill)|(raise)|sleep:(\d{1,6}(?:\.\d{1,6})?))", text)
    if found is None:
        raise InputError(f"{VARIABLE}: expected NAME=kill, NAME@3=kill, NAME=raise or NAME=sleep:0.5, found {text!r}")
    name, when, kills, raises, seconds = found.groups()
    act = _kill if kills else _raise if raises else lambda _name: time.sleep(float(seconds))
    return check(name), int(when) if when else None, act


def _kill(_name: str) -> None:
    """As if the power went."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)


def _raise(name: str) -> None:
    raise Reached(name)


def _from_environment() -> Watch | None:
    """What the variable asks for; where it makes no sense, the first point that is passed says so."""
    try:
        return actions(os.environ.get(VARIABLE, ""))
    except InputError as error:
        sentence = str(error)

    def complain(_name: str) -> None:
        raise InputError(sentence)

    return complain


_watch: Watch | None = _from_environment()
