"""What a connection to SQLite is told when it opens."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any


def tell(
    connection: Any,
    pragmas: Sequence[str],
    patience_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Set each pragma; a database that somebody else holds is waited for.

    SQLite's own patience (``busy_timeout``) does not cover all of it: what asks for write-ahead logging while another
    connection brings the log of a killed process in order is told at once that the database is locked.
    """
    end = time.monotonic() + patience_s
    for pragma in pragmas:
        while True:
            try:
                connection.execute(f"PRAGMA {pragma}").close()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
            sleep(0.01)
