"""The audit log: an append-only chain of who did what, and its check, offline, with the authority's certificate alone.

A line is canonical JSON with ``number``, ``at`` (seconds since 1970), ``kind``, ``who``, ``what`` and ``hash``, the
SHA-256 over the hash before and the rest of the line. The last line of a file is the head, number and hash of the last
entry, signed by the coordinator. A byte that changed, a line that is gone or two that changed places do not fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hansa.core.errors import ProtocolError
from hansa.network.identity import key_of_receipts
from hansa.network.receipts import Seal, is_sealed
from hansa.network.signing import canonical

KINDS = (
    *("started", "stopped", "invited", "enrolled", "enrolment refused", "renewed", "replaced", "revoked", "hello"),
    *("planned", "report", "conflict", "request refused", "frozen", "abandoned", "settled", "released", "finished"),
    *("filled", "closed"),  # a buffer has its reports; a slot of buffered rounds takes no more of them
    "noised",  # an entry of the privacy ledger: a sum is about to get noise and to be released
)
START = "0" * 64  # the hash before the first entry
_FIELDS = {"number", "at", "kind", "who", "what", "hash"}
_HEAD_FIELDS = {"number", "hash", "at", "certificate"}  # the last is the SHA-256 of the certificate beside it
_LONGEST_TEXT = 200
_MOST_PROBLEMS = 20


def entry_hash(before: str, fields: Mapping[str, Any]) -> str:
    """The hash of an entry after the one whose hash is ``before``; ``fields`` is the entry without its hash."""
    rest = {name: value for name, value in fields.items() if name != "hash"}
    return hashlib.sha256(before.encode("ascii") + canonical(rest)).hexdigest()


def plain(value: Any) -> Any:
    r"""A tree whose texts are short and hold nothing but printable ASCII, whoever wrote them.

    >>> plain({"reason": "x\n2026 revoked"})
    {'reason': 'x\\n2026 revoked'}
    """
    if isinstance(value, str):
        text = value.encode("unicode_escape").decode("ascii")
        return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
    if isinstance(value, Mapping):
        return {plain(str(name)): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


@dataclass(frozen=True)
class Checked:
    """What a check found: ``problems`` is empty for a log that is whole."""

    num_entries: int
    num_reports: int
    num_open: int  # reports accepted in a slot that was still open when the log ends
    num_after_head: int  # entries that no signature covers yet
    problems: tuple[str, ...]


def check(lines: Iterable[bytes], authority: bytes, *, live: bool = False) -> Checked:
    """Check a log, line by line: the chain, the signed head, and that every report was dealt with once.

    ``live`` is for the log of a state folder: entries may follow the head, and there may be no head yet.
    """
    chain, story = _Chain(authority), _Story()
    for number, line in enumerate(lines, 1):
        entry = chain.add(number, line)
        if entry is not None:
            story.add(entry)
        if len(chain.problems) + len(story.problems) > _MOST_PROBLEMS:
            break
    else:
        chain.end(live)
        story.end()
    head = chain.head or {"number": 0}
    return Checked(
        num_entries=chain.number,
        num_reports=story.num_reports,
        num_open=story.num_open,
        num_after_head=chain.number - int(head["number"]),
        problems=tuple((*chain.problems, *story.problems)[:_MOST_PROBLEMS]),
    )


def signed_head(seal: Seal, number: int, newest: str, at: float) -> bytes:
    """The line that signs a log up to an entry: its number, its hash and its time."""
    named = hashlib.sha256(seal.certificate).hexdigest()
    head = {"number": number, "hash": newest, "at": at, "certificate": named}
    signature = seal.sign("audit", head).hex()
    return canonical({"head": head, "certificate": seal.certificate.decode("ascii"), "signature": signature})


def read_line(line: bytes) -> dict[str, Any]:
    """A line as a tree. ``ValueError`` unless it is canonical JSON of a dictionary."""
    tree = json.loads(line)
    if not isinstance(tree, dict) or canonical(tree) != line:
        raise ValueError("not in canonical form")
    return tree


@dataclass
class _Chain:
    """Numbers, hashes and the signed head."""

    authority: bytes
    number: int = 0
    before: str = START
    head: dict[str, Any] | None = None
    head_line: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, line_number: int, line: bytes) -> dict[str, Any] | None:
        """The next line's entry; None for a head, and for a line that cannot be read."""
        try:
            tree = read_line(line)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"line {line_number}: expected canonical JSON, found {str(error)[:80]}")
            return None
        if "head" in tree:
            self._add_head(line_number, tree)
            return None
        if set(tree) != _FIELDS or not isinstance(tree["what"], dict) or not _are_texts(tree):
            self.problems.append(f"line {line_number}: expected the fields of an entry, found {sorted(tree)[:8]}")
            return None
        if tree["number"] != self.number + 1:
            self.problems.append(
                f"line {line_number}: expected entry {self.number + 1}, found {tree['number']}; "
                "an entry is missing, was put in, or changed its place"
            )
        expected = entry_hash(self.before, tree)
        if tree["hash"] != expected:
            self.problems.append(
                f"line {line_number}: expected hash {expected[:16]}..., found {str(tree['hash'])[:16]}...; "
                "this entry was changed, or the one before it was changed, removed or moved"
            )
        found = tree["number"]
        self.number = found if isinstance(found, int) else self.number + 1
        self.before = str(tree["hash"])  # go on from what the line says, so that one change is named once
        return tree

    def _add_head(self, line_number: int, tree: dict[str, Any]) -> None:
        """A signed head: it must be whole, and the last one counts."""
        try:
            if set(tree) != {"head", "certificate", "signature"} or set(tree["head"]) != _HEAD_FIELDS:
                raise ProtocolError("head: expected its number, hash, time, certificate and signature")
            pem = tree["certificate"].encode("ascii")
            if tree["head"]["certificate"] != hashlib.sha256(pem).hexdigest():
                raise ProtocolError("head: expected the certificate that it names, found another")
            key = key_of_receipts(pem, self.authority)
            if not is_sealed(key, "audit", tree["head"], bytes.fromhex(tree["signature"])):
                raise ProtocolError("head: expected the coordinator's signature, found another")
            if tree["signature"] != bytes.fromhex(tree["signature"]).hex():
                raise ProtocolError("head: expected the signature in lower case")
        except (ProtocolError, ValueError, TypeError, AttributeError) as error:
            self.problems.append(f"line {line_number}: {str(error)[:200]}")
            return
        self.head, self.head_line = tree["head"], line_number
        if (self.head["number"], self.head["hash"]) != (self.number, self.before):
            self.problems.append(
                f"line {line_number}: expected the signed head to be entry {self.number} ({self.before[:16]}...), "
                f"found {self.head['number']} ({str(self.head['hash'])[:16]}...); "
                "entries at the end were removed or changed"
            )

    def end(self, live: bool) -> None:
        """What a log must end with."""
        if live:
            return
        if self.head is None:
            self.problems.append("end: expected a signed head as the last line, found none; lines were cut off")
        elif self.head["number"] != self.number:
            self.problems.append(f"line {self.head_line + 1}: expected the end of the log after its signed head")


@dataclass
class _Story:
    """What the entries say: each accepted report is frozen in its slot, abandoned with it, held by a buffer or dropped.

    And it counts once.
    """

    problems: list[str] = field(default_factory=list)
    num_reports: int = 0
    num_open: int = 0
    finished: set[str] = field(default_factory=set)
    reports: dict[tuple[str, str], dict[str, tuple[str, str]]] = field(default_factory=dict)
    frozen: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    abandoned: set[tuple[str, str]] = field(default_factory=set)
    filled: set[tuple[str, str]] = field(default_factory=set)  # buffers, named by their newest slot
    closed: set[tuple[str, str]] = field(default_factory=set)  # slots of buffered rounds
    buffered: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # of a slot: whose report a buffer holds
    held: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # of an attempt: who is frozen or in a buffer
    settled: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    dropped: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # told that their update did not count

    def add(self, entry: dict[str, Any]) -> None:
        """The next entry; a kind that says nothing of reports is passed over."""
        tell = {
            "report": self._report,
            "frozen": self._frozen,
            "abandoned": self._abandoned,
            "filled": self._filled,
            "closed": self._closed,
            "settled": self._settled,
            "finished": self._finished,
        }.get(entry["kind"])
        if tell is None:
            return
        try:
            tell(f"entry {entry['number']}", entry["who"], entry["what"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.problems.append(f"entry {entry['number']}: expected the fields of {entry['kind']!r}, found {error!r}")

    def _report(self, where: str, who: str, what: dict[str, Any]) -> None:
        slot = _slot_of(what)
        sent = self.reports.setdefault(slot, {})
        self.num_reports += 1
        if who in sent:
            self.problems.append(f"{where}: expected one report of {who} in {what['slot']}, found a second")
        sent[who] = (what["sha256"], what["status"])
        if what["status"] != "accepted":
            return
        if self._is_over(slot):
            self.problems.append(f"{where}: expected no report accepted in {what['slot']} after it closed, found {who}")
        elif who in self.settled.get((what["run"], _attempt_of(what["slot"])), ()):
            self.problems.append(f"{where}: expected no report accepted of {who} after it was settled, found one")

    def _is_over(self, slot: tuple[str, str]) -> bool:
        """Whether a slot takes no more reports."""
        return slot in self.frozen or slot in self.abandoned or slot in self.closed

    def _frozen(self, where: str, _who: str, what: dict[str, Any]) -> None:
        slot = _slot_of(what)
        if slot in self.frozen:
            self.problems.append(f"{where}: expected {what['slot']} to be frozen once, found it again")
        known = self.reports.get(slot, {})
        taken: set[str] = set()
        for client, sha256 in what["reports"]:
            if client in taken:
                self.problems.append(f"{where}: expected {client} once in {what['slot']}, found it twice")
            if known.get(client) != (sha256, "accepted"):
                self.problems.append(
                    f"{where}: expected the report that {client} sent for {what['slot']}, found another"
                )
            taken.add(client)
        refused = {client for client, _reason in what["refused"]}
        accepted = {client for client, (_sha256, status) in known.items() if status == "accepted"}
        for client in sorted(accepted - taken - refused):
            self.problems.append(f"{where}: expected the accepted report of {client} in {what['slot']}, found none")
        self.frozen[slot] = taken
        self.held.setdefault((what["run"], _attempt_of(what["slot"])), set()).update(taken)

    def _abandoned(self, _where: str, _who: str, what: dict[str, Any]) -> None:
        self.abandoned.add(_slot_of(what))

    def _filled(self, where: str, _who: str, what: dict[str, Any]) -> None:
        run, buffer = what["run"], _slot_of(what)
        if buffer in self.filled:
            self.problems.append(f"{where}: expected buffer {what['slot']} to be filled once, found it again")
        self.filled.add(buffer)
        taken: set[str] = set()
        for client, sha256, slot in what["reports"]:
            if client in taken:
                self.problems.append(f"{where}: expected {client} once in buffer {what['slot']}, found it twice")
            taken.add(client)
            if self.reports.get((run, slot), {}).get(client) != (sha256, "accepted"):
                self.problems.append(f"{where}: expected the report that {client} sent for {slot}, found another")
            waits = not self._is_over((run, slot)) and client not in self.settled.get((run, _attempt_of(slot)), ())
            if client in self.buffered.setdefault((run, slot), set()) or not waits:
                self.problems.append(
                    f"{where}: expected a report of {client} for {slot} that waits, found it dealt with"
                )
            self.buffered[run, slot].add(client)
            self.held.setdefault((run, _attempt_of(slot)), set()).add(client)
        for client, reason, slot in what["refused"]:
            self.reports[run, slot][client] = (reason, "refused")

    def _closed(self, where: str, _who: str, what: dict[str, Any]) -> None:
        slot = _slot_of(what)
        for client in self._left(slot):
            self.problems.append(
                f"{where}: expected the report of {client} for {what['slot']} dealt with, found it open"
            )
        self.closed.add(slot)

    def _left(self, slot: tuple[str, str]) -> list[str]:
        """Whose accepted report for a slot was not dealt with, where the slot was not closed with its reports."""
        done = self.buffered.get(slot, set()) | self.dropped.get((slot[0], _attempt_of(slot[1])), set())
        sent = self.reports.get(slot, {})
        return sorted(name for name, (_, status) in sent.items() if status == "accepted" and name not in done)

    def _settled(self, where: str, _who: str, what: dict[str, Any]) -> None:
        attempt = (what["run"], what["attempt"])
        done = self.settled.setdefault(attempt, set())
        held = self.held.get(attempt, set())
        for client in what["counted"]:
            if client in done:
                self.problems.append(f"{where}: expected {client} to count once in {what['attempt']}, found it again")
            if client not in held:
                self.problems.append(
                    f"{where}: expected {client} among the frozen of {what['attempt']}, found it is not"
                )
            done.add(client)
        done |= set(what["dropped"])
        self.dropped.setdefault(attempt, set()).update(what["dropped"])

    def _finished(self, _where: str, _who: str, what: dict[str, Any]) -> None:
        self.finished.add(what["run"])

    def end(self) -> None:
        """Reports that nobody dealt with: open while their run goes on, lost once it has finished."""
        for run, slot in self.reports:
            if self._is_over((run, slot)):
                continue
            left = self._left((run, slot))
            self.num_open += len(left)
            if left and run in self.finished:
                self.problems.append(
                    f"end: expected the accepted reports of {slot} to be frozen or abandoned, found neither: "
                    f"{', '.join(left[:5])}"
                )


def _are_texts(tree: Mapping[str, Any]) -> bool:
    """Whether kind, client and hash of an entry are texts, of ASCII as all that is written."""
    return all(isinstance(tree[name], str) and tree[name].isascii() for name in ("kind", "who", "hash"))


def _slot_of(what: Mapping[str, Any]) -> tuple[str, str]:
    """The run and the slot that an entry names."""
    return str(what["run"]), str(what["slot"])


def _attempt_of(slot: str) -> str:
    """Task, round and attempt of a slot's text.

    >>> _attempt_of("train-3-0-update")
    'train-3-0'
    """
    return "-".join(slot.split("-")[:3])
