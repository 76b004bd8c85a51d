"""State folders of an older version, and a process that dies while it brings one up to date."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "network" / "fixtures"


def older(folder: Path, name: str = "schema_1") -> Path:
    """A state folder as an older version left it: its database as SQL, and its blobs."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    with sqlite3.connect(folder / "coordinator.db") as db:
        db.executescript((folder / "coordinator.sql").read_text())
    db.close()
    return folder


def contents(folder: Path) -> list[str]:
    """All that a database holds, as SQL."""
    with sqlite3.connect(folder / "coordinator.db") as db:
        found = list(db.iterdump())
    db.close()
    return found


def open_and_die(folder: Path, after: int) -> None:
    """Open a store, and be killed after so many statements that change it."""
    import sqlalchemy as sa

    from hansa.network.store import Store

    left = [after]

    def count(_db: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.split()[0] not in ("BEGIN", "PRAGMA", "SELECT"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sa.event.listen(sa.engine.Engine, "before_cursor_execute", count)
    Store(folder).close()
