"""The ledger: what was released, one entry a release, written before anything of it is published.

Entries are only ever appended. An entry is named by the noise (a hash of the secret it is drawn from), so that a round
that is replayed after a crash, from the same reports and with the same secret, is the same release and counts once;
whatever has another secret is another release and counts again. A crash can thus leave an entry too many, for a sum
that nobody saw, and never one too few.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Client
from hansa.privacy import events
from hansa.privacy.events import Event


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One release: in which round and attempt of which task, by which noise, over whom, and what it costs."""

    task: str
    round: int
    attempt: int
    noise: str
    counted: str
    event: Event

    @staticmethod
    def of(task: str, number: int, attempt: int, secret: Key, clients: Sequence[Client], event: Event) -> Entry:
        """The entry of a sum over ``clients`` that is about to get noise drawn from ``secret``."""
        names = "\n".join(sorted(clients)).encode()
        return Entry(
            task=task,
            round=number,
            attempt=attempt,
            noise=hashlib.sha256(b"hansa noise " + secret.material).hexdigest(),
            counted=hashlib.sha256(names).hexdigest(),
            event=event,
        )

    def as_json(self) -> dict[str, Any]:
        """Numbers and names."""
        return {**vars(self), "event": events.as_json(self.event)}

    @staticmethod
    def of_json(found: Mapping[str, Any]) -> Entry:
        """The entry that ``as_json`` wrote; ``InputError`` for anything else."""
        try:
            named = {name: found[name] for name in ("task", "round", "attempt", "noise", "counted")}
            return Entry(**named, event=events.event_of(found["event"]))
        except (KeyError, TypeError) as error:
            raise InputError(f"ledger: expected an entry of hansa's, found {found!r} ({error})") from error


class Ledger:
    """The entries of one run. ``write(entry)`` makes an entry durable; only then does it count as written.

    >>> event = events.GaussianEvent(noise_multiplier=1.0)
    >>> ledger = Ledger()
    >>> for _ in range(2):  # the second time as after a crash
    ...     ledger.add(Entry.of("train", 0, 0, Key.of(1), ("a", "b"), event))
    >>> len(ledger.entries)
    1
    """

    def __init__(self, entries: Iterable[Entry] = (), write: Callable[[Entry], None] | None = None) -> None:
        self._by_noise: dict[str, Entry] = {}
        self.counted: Counter[Event] = Counter()  # how often each event is in the ledger, for the accountant
        self._write = write
        self.restore(entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first."""
        return tuple(self._by_noise.values())

    def restore(self, entries: Iterable[Entry]) -> None:
        """Take over what was written before, as a checkpoint has it."""
        for entry in entries:
            self._keep(entry)

    def add(self, entry: Entry) -> None:
        """Write an entry, unless it is there already.

        Raises ``RunError`` for noise that another sum has already got: the difference of the two would be bare.
        """
        known = self._by_noise.get(entry.noise)
        if known == entry:
            return
        if known is not None:
            raise RunError(
                f"{entry.task} round {entry.round}, attempt {entry.attempt}: expected noise of its own, found that of "
                f"round {known.round}, attempt {known.attempt}, over other updates; nothing was released. Is the state "
                "folder an old copy? Begin anew with another --state"
            )
        if self._write:
            self._write(entry)
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        if entry.noise not in self._by_noise:
            self._by_noise[entry.noise] = entry
            self.counted[entry.event] += 1


__all__ = ["Entry", "Ledger"]
