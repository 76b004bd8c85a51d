"""The owner's privacy budget for one data set: what answers have cost so far, in every run, and how much is left.

It lies outside of every federation's folder, holds for whoever joins with these data, and is durable before a report
leaves: a crash can leave an entry too many and never one too few. Each different report has an entry of its own, each
entry is counted as one release by everyone (no amplification; neighbours: zero-out), and all of them are composed at
the budget's delta. What has no finite price is refused, and so is everything once the record is broken.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hansa.core.errors import InputError, RunError
from hansa.core.protocols import Slot
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import fail_point
from hansa.network.messages import LASTING
from hansa.network.pricing import Price
from hansa.network.record import Broken, Record
from hansa.network.signing import canonical
from hansa.privacy import events
from hansa.privacy.events import Event

DELTA = 1e-6  # unless the owner says another
_NOTE = "budget "  # before the name of the data, in a state folder's small values


class Overspent(RunError):
    """Work that the budget has no room for. ``told`` is what the server hears, and holds no figure of the owner's."""

    def __init__(self, sentence: str, told: str) -> None:
        super().__init__(sentence)
        self.told = LASTING + told


class Budget:
    """A record of budgets and of what was spent; ``store``, of a state folder, keeps how far the record had come."""

    def __init__(self, record: Record, store: ClientStore | None = None) -> None:
        self.record, self._store, self._num_read = record, store, 0
        self.data, self.epsilon, self.delta = "", 0.0, DELTA
        self.counted, self._answers, self._slots = Counter[Event](), set[tuple[str, ...]](), set[tuple[str, ...]]()
        self.runs: dict[str, Counter[Event]] = {}
        self.kept = Counter[str]()
        self._read()
        self._check_note()

    @property
    def spent(self) -> float:
        """Epsilon so far, at the budget's delta."""
        return self._cost(self.counted)

    @property
    def left(self) -> float:
        """What is left of the budget."""
        return max(0.0, self.epsilon - self.spent)

    def cost_of(self, run: str) -> float:
        """Epsilon of one run's entries alone."""
        return self._cost(self.runs[run])

    def with_one_more(self, event: Event) -> float:
        """Epsilon after one release more."""
        return self._cost(self.counted + Counter([event]))

    def __str__(self) -> str:
        return (
            f"privacy budget for {self.data}: epsilon {self.epsilon:g} at delta {self.delta:g}, "
            f"{self.spent:.3g} spent, {self.left:.3g} left"
        )

    def set(self, epsilon: float, delta: float | None) -> None:
        """The owner's word, recorded unless it is what holds already; ``delta=None`` keeps the one that holds."""
        with self.record.appending():
            self._read()
            said = _said(epsilon, self.delta if delta is None else delta)
            if said != {"epsilon": self.epsilon, "delta": self.delta}:
                self.record.append("budget", said)
        self._read()
        self.note()

    def check(self, run: str, slot: Slot, price: Price | None) -> Price:
        """Raise ``Overspent`` where an answer to a plan could not be paid: before anything is done about it."""
        if price is None:
            raise Overspent(
                f"{self}: this work ({slot.task}) adds no noise that could be counted, and would cost more than any "
                "budget; nothing was sent",
                "this work adds no noise that could be counted",
            )
        self.record.catch_up()
        self._read()
        if (run, str(slot)) not in self._slots:
            self._check_room(price.event)
        return price

    def spend(self, run: str, slot: Slot, sha256: str, price: Price) -> None:
        """Record a report before it leaves, unless these very bytes are recorded; ``Overspent`` without room."""
        with self.record.appending() as record:
            self._read()
            if (run, str(slot), sha256) in self._answers:
                return
            self._check_room(price.event)
            more = {"event": events.as_json(price.event), "kept": price.kept}
            record.append("spent", {"run": run, "slot": str(slot), "sha256": sha256, **more})
            fail_point("client.budget.spending")
        fail_point("client.budget.spent")
        self._read()
        self.note()

    def _check_room(self, event: Event) -> None:
        then = self.with_one_more(event)
        if then > self.epsilon * (1 + 1e-9):
            raise Overspent(
                f"{self}: this round would make it {then:.3g}; nothing was sent; --epsilon-budget raises it",
                "this round would overspend it",
            )

    def _cost(self, counted: Counter[Event]) -> float:
        return events.cost(counted, self.delta, neighbours="zero out one").epsilon

    def _read(self) -> None:
        """Take over the entries that were not read yet and are there to stay."""
        for entry in self.record.entries[self._num_read :]:
            try:
                self._take(entry["kind"], entry["what"])
            except (KeyError, TypeError, ValueError, InputError) as error:
                raise Broken(
                    f"{self.record.folder}: expected entries of a budget, found {entry['kind']!r} that is none "
                    f"({error}); install the version of hansa that wrote it"
                ) from error
            self._num_read += 1

    def _take(self, kind: str, what: Mapping[str, Any]) -> None:
        if kind == "opened":
            self.data = str(what["data"])
        elif kind == "budget":
            self.epsilon, self.delta = float(what["epsilon"]), float(what["delta"])
        elif kind == "spent":
            event = events.event_of(what["event"])
            self.counted[event] += 1
            self.runs.setdefault(what["run"], Counter())[event] += 1
            self.kept[what["kept"]] += 1
            self._answers.add((what["run"], what["slot"], what["sha256"]))
            self._slots.add((what["run"], what["slot"]))
        else:
            raise ValueError("unknown")

    def _check_note(self) -> None:
        """The record must have come as far as it had when this state folder last saw it."""
        note = None if self._store is None else self._store.get(_NOTE + self.data)
        if note is None:
            return
        head, entries = json.loads(note), self.record.entries
        number = head["number"]
        is_there = 0 < number <= len(entries) and entries[number - 1]["hash"] == head["hash"]
        if not is_there or not self.record.is_signed("budget", _without_signature(head), head["signature"]):
            raise Broken(
                f"{self.record.folder}: expected at least the {number} entries that this client has seen, found a "
                f"record of {len(entries)} that is cut short or another one; put it back from a copy"
            )

    def note(self) -> None:
        """Note in the state folder how far the record has come, with its next transaction."""
        if self._store is not None:
            newest = self.record.newest
            head = {"folder": str(self.record.folder), "number": newest["number"], "hash": newest["hash"]}
            signature = self.record.signature("budget", head)
            self._store.note(_NOTE + self.data, canonical({**head, "signature": signature}))


def budget_of(
    reference: str,
    folder: Path,
    store: ClientStore | None = None,
    *,
    epsilon: float | None = None,
    delta: float | None = None,
) -> Budget | None:
    """The budget of the data that ``reference`` (as for ``--data``) names, in ``folder``; None where none was ever set.

    ``epsilon`` sets it, for the first time or anew. Raises ``Broken`` for a record that is not whole, or gone.
    """
    data = name_of(reference)
    place = folder.resolve() / _folder_name(data)
    if delta is not None and epsilon is None:
        raise InputError(f"--delta {delta:g}: expected --epsilon-budget beside it, found none; give both")
    said = None if epsilon is None else _said(epsilon, DELTA if delta is None else delta)
    if not place.exists():
        if store is not None and (note := store.get(_NOTE + data)) is not None:
            raise Broken(
                f"{place}: expected the privacy budget for {data}, which was in {json.loads(note)['folder']}, found "
                "none; put it back from a copy, or give its --budget-dir"
            )
        if said is None:
            return None
        Record.make(place, [("opened", {"data": data}), ("budget", said)])
    found = Budget(Record(place), store)
    if found.data != data:
        raise Broken(f"{place}: expected the privacy budget for {data}, found that for {found.data}")
    if epsilon is not None:
        found.set(epsilon, delta)
    found.note()
    return found


def budgets_seen(store: ClientStore) -> dict[str, Path]:
    """The budgets that bound a state folder's client: by data, the folder of each record."""
    return {key[len(_NOTE) :]: Path(json.loads(note)["folder"]) for key, note in store.noted(_NOTE).items()}


def name_of(reference: str) -> str:
    """What a data set is known by: the resolved path, and the function where ``--data`` names one.

    >>> name_of("/data/../data/patients.csv"), name_of("/data/mine.py:load")
    ('/data/patients.csv', '/data/mine.py:load')
    """
    file, colon, name = reference.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).resolve()}:{name}"
    return str(Path(reference).resolve())


def _folder_name(data: str) -> str:
    """A name for people, and a hash that no other data set has."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", data.replace("\\", "/").rpartition("/")[2])[:40]
    return f"{plain}-{hashlib.sha256(data.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _said(epsilon: float, delta: float) -> dict[str, float]:
    """An owner's budget, if it can be one."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(f"--epsilon-budget: expected a number above 0, found {epsilon}")
    if not 0 < delta < 1:
        raise InputError(f"--delta: expected a number between 0 and 1, found {delta}")
    return {"epsilon": float(epsilon), "delta": float(delta)}


def _without_signature(head: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in head.items() if name != "signature"}


__all__ = ["DELTA", "Budget", "Overspent", "budget_of", "budgets_seen", "name_of"]
