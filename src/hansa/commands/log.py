"""``hansa log``: the audit log of a run directory or of a coordinator's state folder, as a table or checked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError, RunError
from hansa.network import audit, identity
from hansa.terminal import console, harmless, new_table

_FILE = "log.jsonl"


def run_log(where: Path, verify: bool, client: str | None) -> None:
    """Print the log, or with ``verify`` check all of it; a log that is not whole is a ``RunError`` (exit status 1)."""
    if (where / _FILE).is_file():
        lines, live, pem = _file_lines(where / _FILE), False, where / "authority.pem"
    elif (where / "coordinator.db").is_file():
        lines, live, pem = _state_lines(where), True, where / "authority" / "authority.pem"
    else:
        raise InputError(
            f"{where}: expected a run directory with {_FILE}, or a coordinator's state folder, found neither; "
            "give the --out or the --state of hansa serve"
        )
    if not pem.is_file():
        raise InputError(f"{pem}: expected the authority's certificate, found none; copy it from --state/authority")
    if verify:
        _verify(where, lines, live, pem.read_bytes())
        return
    _show(lines, client)


def _verify(where: Path, lines: Iterator[bytes], live: bool, authority: bytes) -> None:
    found, screen = audit.check(lines, authority, live=live), console()
    for problem in found.problems:
        screen.print(harmless(problem), style="red")
    screen.print(
        f"{found.num_entries} entries, {found.num_reports} reports ({found.num_open} in slots that are still open), "
        f"{found.num_after_head} entries after the signed head; authority {identity.fingerprint(authority)[:16]}"
    )
    if found.problems:
        more = len(found.problems) - 1
        others = f" (and {more} more)" if more else ""
        raise RunError(f"{where}: expected a log that is whole, found that it is not: {found.problems[0]}{others}")
    screen.print("whole: nothing was changed, removed or moved, and each report was dealt with once")


def _show(lines: Iterator[bytes], client: str | None) -> None:
    table = new_table()
    for column in ("number", "time (UTC)", "what happened", "who", "details"):
        table.add_column(column, justify="right" if column == "number" else "left")
    for number, line in enumerate(lines, 1):
        try:
            entry = audit.read_line(line)
            if "head" in entry:
                continue
            cells = _cells(entry)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"line {number}: expected an entry of an audit log, found {type(error).__name__}; look with --verify"
            ) from error
        if client is None or _names(entry, client):
            table.add_row(*(harmless(cell) for cell in cells))
    console().print(table)


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """An entry as a person reads it."""
    when = datetime.fromtimestamp(entry["at"], UTC).strftime("%Y-%m-%d %H:%M:%S")
    details = ", ".join(f"{name} {_short(value)}" for name, value in entry["what"].items())
    return str(entry["number"]), when, str(entry["kind"]), entry["who"] or "coordinator", details


def _short(value: Any) -> str:
    """A value in a cell: hashes and long lists are cut."""
    if isinstance(value, list):
        return str(len(value))
    if isinstance(value, dict):
        return " ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def _names(entry: dict[str, Any], client: str) -> bool:
    """Whether an entry is by a client or about it."""
    what = entry["what"]
    listed = [*what.get("counted", ()), *what.get("dropped", ())]
    listed += [pair[0] for name in ("reports", "refused") for pair in what.get(name, ())]
    return entry["who"] == client or client in listed


def _file_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; one that does not end is no line, and is handed on as it is to be named."""
    with path.open("rb") as file:
        for line in file:
            yield line[:-1] if line.endswith(b"\n") else line + b"\x00"


def _state_lines(state: Path) -> Iterator[bytes]:
    """The lines in a state folder, while it is being served or not."""
    from hansa.commands.serve import need_server

    need_server()
    from hansa.network.journal import lines
    from hansa.network.store import Store

    store = Store.existing(state)
    try:
        yield from lines(store)
    finally:
        store.close()
