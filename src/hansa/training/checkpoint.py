"""``Checkpoint``: all that a run needs to go on, as one file that is replaced whole.

A simulation resumed from it gives the same bits as one that was never stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError, ProtocolError
from hansa.core.protocols import Array
from hansa.core.round import ServerState
from hansa.long_vectors import map_file
from hansa.network.failpoints import fail_point
from hansa.tensors import Buffer
from hansa.training.history import Row
from hansa.wire import lay_out, unpack


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

    def write(self, path: Path) -> None:
        """Replace ``path`` by this checkpoint in one rename, after it is safely on disk."""
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
        }
        replace_file(path, lay_out(tree).pieces())

    @staticmethod
    def read(path: Path, *, mapped: bool = False) -> Checkpoint:
        """The checkpoint in a file; ``mapped``: its arrays stay there, read-only. ``InputError`` when it is not one."""
        try:
            body = map_file(path, writable=False) if mapped else path.read_bytes()
            tree = unpack(body, longest_header=2**30)  # our own: a name a client may be in it
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
            )
        except (ProtocolError, KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"checkpoint {path}: expected a checkpoint of hansa, found {error}; delete it") from error


def lasting_repr(value: Any) -> str:
    """``repr`` that is the same in another process: without the addresses that functions have in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def replace_file(path: Path, pieces: Iterable[Buffer]) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    fail_point("coordinator.checkpoint.written")
    temporary.replace(path)
    fail_point("coordinator.checkpoint.renamed")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
