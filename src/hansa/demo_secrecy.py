"""What the coordinator of ``hansa demo --secure`` could see of a hospital's update, beside the update itself.

A demo may do what no server can: it holds every hospital's files, makes each update again, and looks for it in all that
the coordinator stored while it ran.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from rich.console import Console

from hansa.aggregators.rows import Rows
from hansa.aggregators.secure_mean import SecureMean
from hansa.core.chain import limits
from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Slot
from hansa.core.round import Context, begin, make_plan
from hansa.network.messages import SHA256, slot_of
from hansa.secagg.grid import signed, step_of, width_of
from hansa.secagg.packing import unpack as words_of
from hansa.terminal import new_table
from hansa.training.apps import App
from hansa.training.run import Run
from hansa.wire import unpack

_EVERY_S = 0.002
_FEW = 5  # numbers that are shown
_ROUNDING = 1e-3  # of a mean on the grid
_RUN = 4  # numbers in a row that nobody stores by chance


class Copies:
    """Every report and vector that a coordinator ever stores, linked into another folder before it removes them."""

    def __init__(self, state: Path, folder: Path) -> None:
        self.watched, self.folder = (state / "blobs", state / "updates"), folder
        self._done, self._names = threading.Event(), set[str]()
        folder.mkdir(parents=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Copies:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def get(self, name: str) -> bytes:
        """The content of a file; ``RunError`` where it was gone too soon."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise RunError(
                f"demo: expected a copy of the coordinator's file {name}, found none; run it again"
            ) from None

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.look()
        self.look()

    def look(self) -> None:
        """Link what has come since the last look."""
        for folder in self.watched:
            if not folder.exists():  # the coordinator has not begun
                continue
            for name in set(filter(SHA256.fullmatch, os.listdir(folder))) - self._names:
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    os.link(folder / name, self.folder / name)
                    self._names.add(name)


class Said(NamedTuple):
    """One report that the coordinator counted, and the vector of parameters that its client had been sent."""

    slot: Slot
    client: str
    sha256: str
    params: str


class Pair(NamedTuple):
    """What was received in an update's place, and the numbers that it stands for, in steps of the grid."""

    words: np.ndarray  # (num_params,) whole numbers modulo 2**width
    own: np.ndarray  # (num_params,)
    width: int


class Found(NamedTuple):
    """What came of looking for updates in what was stored."""

    num_numbers: int  # that were received
    num_near: int  # of those, within a step of the grid of the number that they stand for
    by_chance: float  # how many that would be of numbers drawn at random
    correlation: float
    in_clear: tuple[str, ...]  # whose update was found, and where

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found that chance does not give."""
        return not self.in_clear and self.num_near <= 5 + 10 * self.by_chance


def said(state: Path) -> list[Said]:
    """All accepted reports of a coordinator's database, in the order of their exchanges."""
    with sqlite3.connect(f"file:{state / 'coordinator.db'}?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT s.slot, r.client, r.sha256, coalesce(v.sha256, '') FROM reports r JOIN slots s ON s.id = r.slot_id "
            "LEFT JOIN vectors v ON v.slot_id = s.id AND v.name = 'params' WHERE r.status = 'accepted' "
            "AND s.state = 'aggregated' ORDER BY s.id, r.client"
        ).fetchall()
    return [Said(slot_of(slot), client, sha256, params) for slot, client, sha256, params in rows]


def update_again(app: App, run: Run, seed: int, slot: Slot, params: np.ndarray, client: str, rows: Any) -> np.ndarray:
    """The update (num_params,) that left a hospital's model in a round, clipped as it was, from its own ``rows``."""
    federation = replace(app.federation, aggregator=Rows())
    parts, totals = federation.task("train"), {f"prepare.{i}": total for i, total in enumerate(run.totals)}
    context = Context(Key.of(seed).child("run"), federation.learner.layout, totals)
    plan = make_plan(parts, begin(parts, params), context, (client,), slot)
    ready = federation.prepared(rows, run.totals)
    report, _, _ = federation.exchange(plan, (client,), [ready], Memory([{}]), {}, [Key.of("unused")])
    return np.asarray(report.payload.values[0])


def look(pairs: Sequence[Pair], stored: Mapping[str, bytes], updates: Mapping[str, np.ndarray]) -> Found:
    """Look for ``updates`` (by whose they are) in ``stored`` files, and beside the words that came in their place."""
    received = np.concatenate([signed(pair.words, pair.width) for pair in pairs]).astype(np.float64)
    own = np.concatenate([pair.own for pair in pairs])
    sizes = np.concatenate([np.full(len(pair.own), 2.0**pair.width) for pair in pairs])
    apart = (received - own) % sizes
    return Found(
        num_numbers=len(own),
        num_near=int((np.minimum(apart, sizes - apart) <= 1).sum()),
        by_chance=float((2 / sizes).sum()),
        correlation=float(np.corrcoef(received, own)[0, 1]),
        in_clear=tuple(
            f"{name} in {where}" for name, row in updates.items() for where, body in stored.items() if is_in(row, body)
        ),
    )


def is_in(row: np.ndarray, body: bytes) -> bool:
    """Whether four numbers in a row, as float32 or float64, are among the bytes of a file.

    >>> (
    ...     is_in(np.arange(9.0), b"some bytes" + np.arange(9, dtype=np.float32).tobytes()),
    ...     is_in(np.arange(9.0), b"others"),
    ... )
    (True, False)
    """
    parts = [row[start : start + _RUN] for start in range(0, max(1, len(row) - _RUN + 1), _RUN)]
    return any(
        part.any() and part.astype(kind).tobytes() in body for part in parts for kind in (np.float32, np.float64)
    )


def show_secrecy(
    screen: Console, app: App, run: Run, seed: int, rows: Callable[[str], Any], state: Path, copies: Copies
) -> None:
    """Make each update again, show one beside what was received for it, look for all of them, and say what was seen.

    ``rows(name)`` are a hospital's own training rows. Raises ``RunError`` where an update is found.
    """
    everything = said(state)
    trained = [one for one in everything if one.slot.task == "train"]
    masked = [one for one in trained if one.slot.exchange == "masked"]
    models = {sha256: np.array(unpack(copies.get(sha256))) for sha256 in {one.params for one in masked}}
    secure = cast(SecureMean, app.federation.aggregator)
    updates, pairs = dict[str, np.ndarray](), list[Pair]()
    steps = _steps(run, masked, models)
    for one in masked:
        num_keys = sum(other.slot == one.slot._replace(exchange="keys") for other in trained)
        own = rows(one.client)
        row = update_again(app, run, seed, one.slot, models[one.params], one.client, own)
        pair = _pair(app, run, copies.get(one.sha256), row, len(own), num_keys)
        if not pairs:
            _show_one(screen, one, row, pair, len(own), secure)
        steps[one.slot] -= row * (len(own) / sum(len(rows(other.client)) for other in masked if other.slot == one.slot))
        updates[f"{one.client}'s update of round {one.slot.round + 1}"] = row
        pairs.append(pair)
    stored = {path.name: path.read_bytes() for path in [*copies.folder.iterdir(), *state.glob("coordinator.db*")]}
    if not all(any(is_in(model, body) for body in stored.values()) for model in models.values() if model.any()):
        raise RunError("demo: expected the global models among what the coordinator stored, found some missing")
    if max(np.abs(left).max() for left in steps.values()) > _ROUNDING:
        raise RunError("demo: expected updates that add up to the models' steps, found others; please report this")
    found = look(pairs, stored, updates)
    _show_found(screen, found, len(updates), len(stored), len({one.sha256 for one in everything} - set(stored)))
    _show_seen(screen, secure, [one for one in everything if one.slot.exchange == "keys"], copies)
    if not found.is_clean:
        raise RunError(f"demo: expected no hospital's update in what the coordinator stored, found {found}")


def _steps(run: Run, masked: Sequence[Said], models: Mapping[str, np.ndarray]) -> dict[Slot, np.ndarray]:
    """How far each round moved the model."""
    begun = {one.slot: models[one.params] for one in masked}
    ended = [*list(begun.values())[1:], np.asarray(run.parameters)]
    return {slot: after - before for (slot, before), after in zip(begun.items(), ended, strict=True)}


def _pair(app: App, run: Run, body: bytes, row: np.ndarray, num_examples: int, num_clients: int) -> Pair:
    """A received body beside the numbers that it stands for."""
    secure, chain = cast(SecureMean, app.federation.aggregator), app.federation.transforms
    proved = limits(chain, [transform.settings(transform.init(run.layout.num_params)) for transform in chain])
    width, step = width_of(proved, secure.bits, num_clients), step_of(proved, secure.bits)
    mail, share = unpack(body)["mail"], min(1.0, num_examples / (secure.max_weight or num_examples))
    return Pair(words_of(mail["values"], width, mail["count"]), row * (share / step), width)


def _show_one(screen: Console, one: Said, row: np.ndarray, pair: Pair, num_examples: int, secure: SecureMean) -> None:
    """A hospital's own numbers beside those that arrived."""
    table = new_table(
        f"\n{one.client} in round {one.slot.round + 1}: the first {_FEW} of {len(row)} numbers", tight=True
    )
    table.show_header = False
    for column in range(_FEW + 1):
        table.add_column("", justify="right" if column else "left", no_wrap=True)
    table.add_row("its update, which stays there", *(f"{value:+.4f}" for value in row[:_FEW]))
    table.add_row("the same, weighted, on a grid *", *(f"{value:+,.0f}" for value in pair.own[:_FEW]))
    table.add_row("[bold]what the coordinator received **[/bold]", *(f"{int(word):,}" for word in pair.words[:_FEW]))
    screen.print(table)
    share = f"{num_examples} of at most {secure.max_weight:g}"
    screen.print(f"[dim]*  times {share} patients, which the coordinator does not see either; in whole steps")
    screen.print(f"[dim]** whole numbers below {2**pair.width:,}, each as likely as any other")


def _show_found(screen: Console, found: Found, num_updates: int, num_files: int, num_gone: int) -> None:
    """What came of looking for all updates everywhere."""
    gone = f" ({num_gone} more were gone too soon)" if num_gone else ""
    clear = "none is there" if not found.in_clear else f"[red]found: {', '.join(found.in_clear[:5])}[/red]"
    chance = f"{found.by_chance:.2f}", f"±{found.num_numbers**-0.5:.3f}"
    for line in (
        f"all {num_updates} updates were made again from the hospitals' files; they add up to the steps of the model",
        f"looked for in {num_files:,} files that the coordinator had{gone}, where its models are found: {clear}",
        f"of {found.num_numbers:,} numbers received {found.num_near} are within a step of the hospital's own (chance: "
        f"{chance[0]}), correlation {found.correlation:+.3f} (chance: {chance[1]})",
    ):
        screen.print(line)


def _show_seen(screen: Console, secure: SecureMean, keys: Sequence[Said], copies: Copies) -> None:
    """What a reader must know of what is hidden and what is not."""
    num_hospitals = len({one.client for one in keys})
    fewest = secure.terms.fewest(secure.terms.graph(num_hospitals))
    are_signed = all(unpack(copies.get(one.sha256))["mail"]["signature"] for one in keys)
    others = "the other one" if num_hospitals == 2 else f"the other {num_hospitals - 1} together"
    signed_or_not = (
        "that the coordinator puts its own keys in the place of a hospital's: they are signed by its certificate"
        if are_signed
        else "[red]keys were not signed:[/red] a coordinator that puts its own in their place was not guarded against"
    )
    for line in (
        "\n[bold]the coordinator saw[/bold]",
        "  who took part, when, and how many bytes each sent",
        f"  sums over all {num_hospitals} hospitals, never over fewer than {fewest}: of updates, weights and metrics",
        "  public keys that are new each time, sealed shares, and shares that take the masks off those sums",
        "[bold]it did not see[/bold]",
        "  any one hospital's update, number of patients or metrics, or its part of the columns' means",
        "  (what the tables above and the report say of one hospital comes from the simulation, which has all files)",
        "[bold]not hidden, or not by this[/bold]",
        f"  a hospital from {others}, who can subtract their own from the sum",
        "  what sums and the model itself tell: that takes noise, see docs/how-to/privacy.md",
        f"[bold]refused[/bold]\n  {signed_or_not}" if are_signed else f"  {signed_or_not}",
    ):
        screen.print(line)


__all__ = ["Copies", "look", "show_secrecy"]
