"""``hansa status``: what a coordinator or a client is doing, for people and for monitors."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hansa.core.errors import InputError
from hansa.terminal import bytes_words, console, harmless, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from hansa.network.client_store import ClientStore


def run_status(state: Path, as_json: bool) -> None:
    """Print the status of the state folder; with ``as_json`` exit status 1 says that a person is needed."""
    if (state / "coordinator.db").exists():
        found = _coordinator(state)
        show = _show_coordinator
    elif (state / "client.db").exists():
        found = _client(state)
        show = _show_client
    else:
        raise InputError(
            f"--state {state}: expected the state folder of a coordinator or of a client, found neither; "
            "give the --state that serve or join uses"
        )
    if as_json:
        print(json.dumps(found, indent=1))
        if found["needs_a_person"]:
            sys.exit(1)
        return
    show(found)


def _coordinator(state: Path) -> dict[str, Any]:
    from hansa.commands.serve import need_server

    need_server()
    from hansa.network.room import LEAST_FREE
    from hansa.network.status import status
    from hansa.network.store import Store

    store = Store(state)
    found = status(store)
    store.close()
    refused = [client["name"] for client in found["clients"] if client["refused"]]
    full = found["free_bytes"] < LEAST_FREE
    return {"kind": "coordinator", **found, "disk_full": full, "needs_a_person": bool(refused) or full}


def _show_coordinator(found: dict[str, Any]) -> None:
    screen = console()
    if found["round"] is None or found["state"] == "finished":
        screen.print(f"run {found['run'] or '-'}: {found['state']}")
    else:
        screen.print(
            f"run {found['run']}: {found['state']}, {found['task']} round {found['round'] + 1} is {found['phase']}, "
            f"{found['reported']} of {found['asked']} reports"
        )
        if found["deadline_s"] is not None:
            screen.print(f"open for {found['open_s']:.0f} s, closes after {found['deadline_s']:.0f} s at the latest")
        if found["over_selection"] is not None:
            screen.print(f"asks {found['over_selection']:.2f} times the clients it counts, learned from past rounds")
    if found["disk_full"]:
        free = bytes_words(found["free_bytes"])
        screen.print(f"[red]the disk of the state folder has {free} left: free some; rounds and reports wait[/red]")
    table = new_table()
    for column in ("client", "state", "last seen", "rounds counted", "too late", "refused"):
        table.add_column(column)
    for client in found["clients"]:
        seen = "never" if client["last_seen_s"] is None else f"{client['last_seen_s']:.0f} s ago"
        last = client["refused"][-1] if client["refused"] else ""
        cells = (
            client["name"],
            client["state"],
            seen,
            str(client["rounds_counted"]),
            str(client["late"]),
            harmless(last),
        )
        table.add_row(*cells)
    screen.print(table)


def _client(state: Path) -> dict[str, Any]:
    from hansa.network.client_store import ClientStore
    from hansa.network.credentials import own_line
    from hansa.network.enrolment import Identity

    who, store = Identity.of(state), ClientStore(state)
    answers, receipts, budgets = store.answers(limit=10), store.receipts(), _budgets(store)
    store.close()
    sent: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    last = None
    path = state / "sent.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                sent[line["kind"]][0] += 1
                sent[line["kind"]][1] += int(line["bytes"])
                last = line["time"]
    return {
        "kind": "client",
        "name": who.name if who else None,
        "url": who.url if who else None,
        "peer_line": own_line(who) if who else None,
        "last_sent": last,
        "answers": answers,
        "receipts": receipts,
        "sent": [{"kind": kind, "count": count, "bytes": size} for kind, (count, size) in sorted(sent.items())],
        "model": str(state / "model") if (state / "model").exists() else None,
        "budgets": budgets,
        "needs_a_person": who is None or any(budget["problem"] for budget in budgets),
    }


def _budgets(store: ClientStore) -> list[dict[str, Any]]:
    """The privacy budgets that bind this client, each checked from its first entry to its last."""
    from hansa.network.budget import Budget, budgets_seen
    from hansa.network.record import Record

    found = []
    for data, folder in budgets_seen(store).items():
        row: dict[str, Any] = {"data": data, "record": str(folder), "problem": None}
        try:
            budget = Budget(Record(folder), store)
        except InputError as error:
            found.append({**row, "problem": str(error)})
            continue
        runs = {
            run: {"entries": counted.total(), "epsilon": budget.cost_of(run)} for run, counted in budget.runs.items()
        }
        row |= {"epsilon": budget.epsilon, "delta": budget.delta, "spent": budget.spent, "left": budget.left}
        found.append({**row, "entries": budget.counted.total(), "noise": dict(budget.kept), "runs": runs})
        budget.record.close()
    return found


def _show_client(found: dict[str, Any]) -> None:
    screen = console()
    who, last = found["name"] or "(not enrolled)", found["last_sent"] or "never"
    screen.print(f"client {who} of {found['url'] or '-'}; last sent {last}")
    table = new_table("sent")
    for column in ("kind", "bodies", "bytes"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in found["sent"]:
        table.add_row(row["kind"], str(row["count"]), bytes_words(row["bytes"]))
    screen.print(table)
    asked = new_table("newest plans")
    for column in ("task", "round", "answer", "counted"):
        asked.add_column(column)
    for row in found["answers"]:
        reason = f": {row['reason']}" if row["reason"] else ""
        counted = {None: "not known yet", 0: "no", 1: "yes"}[row["counted"]]
        asked.add_row(row["task"], str(row["round"] + 1), harmless(f"{row['status']}{reason}"), counted)
    screen.print(asked)
    kept = ", ".join(f"{count} {status}" for status, count in found["receipts"].items())
    screen.print(f"signed receipts: {kept or 'none yet'}")
    for budget in found["budgets"]:
        _show_budget(screen, budget)
    if found["peer_line"]:
        screen.print(f"for others' lists of peers (join --peers): {found['peer_line']}", soft_wrap=True)
    if found["model"]:
        screen.print(f"newest released model: {found['model']}")


def _show_budget(screen: Console, budget: dict[str, Any]) -> None:
    data = harmless(budget["data"])
    if budget["problem"]:
        screen.print(f"[red]privacy budget for {data}[/red]: all work is refused: {harmless(budget['problem'])}")
        return
    noise = "; ".join(f"noise {kept}: {count}" for kept, count in sorted(budget["noise"].items()))
    screen.print(
        f"privacy budget for {data}: epsilon {budget['epsilon']:g} at delta {budget['delta']:g}, "
        f"{budget['spent']:.3g} spent in {budget['entries']} entries, {budget['left']:.3g} left"
        + (f" ({noise})" if noise else "")
    )
    if budget["runs"]:
        table = new_table("spent by run")
        for column in ("run", "entries", "epsilon alone"):
            table.add_column(column, justify="left" if column == "run" else "right")
        for run, row in budget["runs"].items():
            table.add_row(harmless(run), str(row["entries"]), f"{row['epsilon']:.3g}")
        screen.print(table)
