"""``Checkpoint``: all that a run needs to go on, as one file that is replaced whole and knows its own SHA-256.

A simulation resumed from it gives the same bits as one that was never stopped. A coordinator, which cannot begin anew,
keeps a second copy: damage to one of them costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError, ProtocolError
from hansa.core.protocols import Array
from hansa.core.round import ServerState
from hansa.long_vectors import let_go, map_file, spans
from hansa.network.failpoints import fail_point
from hansa.privacy.ledger import Entry
from hansa.tensors import Buffer, Packed
from hansa.training.history import Row
from hansa.wire import lay_out, unpack

_MARK = b"hansa-1\n"  # then the SHA-256 of the rest; files of older versions begin with the rest
_START = len(_MARK) + 32
_PIECE = 2**24  # bytes that are looked at at a time


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """State after ``next_round`` rounds, and what the runtime keeps of its clients (``clients``, in a simulation)."""

    state: ServerState
    totals: tuple[Array, ...]
    next_round: int
    history: tuple[Row, ...]
    traffic: tuple[int, int] = (0, 0)
    stopped: bool = False
    scored_on: str = ""
    settings: str = ""  # names the run: federation, schedule, seed
    clients: Mapping[str, Any] = field(default_factory=dict)
    ledger: tuple[Entry, ...] = ()

    def write(self, path: Path) -> None:
        """Replace ``path`` by this checkpoint in one rename, after it is safely on disk."""
        replace_file(path, _pieces(self._packed()))

    def write_twice(self, path: Path) -> None:
        """The same, after a copy beside it: ``read_either`` needs but one of the two."""
        packed = self._packed()
        replace_file(copy_of(path), _pieces(packed), is_copy=True)
        fail_point("coordinator.checkpoint.copied")
        replace_file(path, _pieces(packed))

    def _packed(self) -> Packed:
        tree = {
            "algorithm": self.state.algorithm,
            "transforms": list(self.state.transforms),
            "totals": list(self.totals),
            "next_round": self.next_round,
            "history": [dict(row) for row in self.history],
            "traffic": list(self.traffic),
            "stopped": self.stopped,
            "scored_on": self.scored_on,
            "settings": self.settings,
            "clients": dict(self.clients),
            "ledger": [entry.as_json() for entry in self.ledger],
        }
        return lay_out(tree)

    @staticmethod
    def read_either(path: Path, warn: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint that ``write_twice`` left, of the one file that is good, mapped; None where there is neither.

        ``warn(sentence)`` hears of a damaged one. Raises ``InputError`` when both are.
        """
        problems = []
        for one in (path, copy_of(path)):
            if not one.exists():
                continue
            try:
                return Checkpoint.read(one, mapped=True)
            except InputError as error:
                problems.append(f"{one.name}: {error.__cause__}")
                warn(f"checkpoint {one} is damaged ({error.__cause__}); the disk may be failing. Its copy is looked at")
        if problems:
            raise InputError(
                f"checkpoint {path}: expected it or its copy undamaged, found neither ({'; '.join(problems)}); nothing "
                "was trained from it. Restore the state folder from a backup, or begin anew with another --state"
            )
        return None

    @staticmethod
    def read(path: Path, *, mapped: bool = False) -> Checkpoint:
        """The checkpoint in a file; ``mapped``: its arrays stay there, read-only.

        Raises ``InputError`` when it is not one, or not the one that was written.
        """
        try:
            tree = unpack(_checked(path, mapped), longest_header=2**30)  # our own: a name a client may be in it
            return Checkpoint(
                state=ServerState(tree["algorithm"], tuple(tree["transforms"])),
                totals=tuple(tree["totals"]),
                next_round=tree["next_round"],
                history=tuple(Row.of(row) for row in tree["history"]),
                traffic=(tree["traffic"][0], tree["traffic"][1]),
                stopped=tree["stopped"],
                scored_on=tree["scored_on"],
                settings=tree["settings"],
                clients=tree["clients"],
                ledger=tuple(Entry.of_json(entry) for entry in tree.get("ledger", ())),
            )
        except (ProtocolError, KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"checkpoint {path}: expected a checkpoint of hansa, found {error}; delete it") from error


def lasting_repr(value: Any) -> str:
    """``repr`` that is the same in another process: without the addresses that functions have in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def copy_of(path: Path) -> Path:
    """Where the copy of a checkpoint lies."""
    return path.with_name(path.name + ".copy")


def replace_file(path: Path, pieces: Iterable[Buffer], *, is_copy: bool = False) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename, fsync of the folder.

    Raises ``OSError`` when the disk is full; then nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not is_copy:
        fail_point("coordinator.checkpoint.written")
    temporary.replace(path)
    if not is_copy:
        fail_point("coordinator.checkpoint.renamed")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _pieces(packed: Packed) -> Iterable[Buffer]:
    yield _MARK + bytes.fromhex(packed.sha256)
    yield from packed.pieces()


def _checked(path: Path, mapped: bool) -> Buffer:
    """The body of a checkpoint; ``ProtocolError`` for another SHA-256 than the one it was written with."""
    if mapped and path.stat().st_size:
        body = map_file(path, writable=False)
    else:
        body = memoryview(bytearray(path.read_bytes()))
    if bytes(body[: len(_MARK)]) != _MARK:
        return body
    digest = hashlib.sha256()
    for first, stop in spans(len(body), _PIECE, first=_START):
        digest.update(body[first:stop])
        let_go(body)
    if digest.digest() != body[len(_MARK) : _START]:
        raise ProtocolError("other bytes than were written (their SHA-256 is another)")
    return body[_START:]
