"""``hansa serve``, ``invite`` and ``revoke``: the coordinator of a real federation."""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hansa import statistics
from hansa.aggregators.careful import careful
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Client, Slot
from hansa.network.failpoints import fail_point
from hansa.terminal import console, harmless, progress
from hansa.training.apps import App, load_app, with_settings
from hansa.training.check import refuse_unfit
from hansa.training.checkpoint import Checkpoint, lasting_repr
from hansa.training.long_rounds import LongRounds
from hansa.training.loop import Loop
from hansa.training.outcome import outcome
from hansa.training.privacy import bound
from hansa.training.run import Run
from hansa.training.simulate import initial_params

if TYPE_CHECKING:
    from hansa.network.coordinator import Coordinator
    from hansa.network.runtime import NetworkRuntime
    from hansa.network.store import Store

_ENDED = "ended"  # key of the run that is over and whose directory is complete


_LONGEST_STOP_S = 9.0
_LOOK_EVERY_S = 60.0  # whether another coordinator has taken over, while there is nothing to do


def run_serve(
    app_file: Path,
    state: Path,
    listen: str,
    url: str | None,
    seed: int,
    settings: list[str],
    out: Path | None,
    stay: bool,
) -> None:
    """Serve one run to its end; started again, go on with it."""
    app = with_settings(load_app(app_file), settings)
    refuse_unfit(app.federation, app.schedule)
    need_server()
    from hansa.network.coordinator import Coordinator
    from hansa.network.http import serve_in_thread
    from hansa.network.runtime import NetworkRuntime
    from hansa.network.sockets import raise_descriptor_limit
    from hansa.network.store import Store

    federation = bound(app.federation, app.schedule, app.schedule.cohort_size or app.schedule.clients_needed)
    named = json.dumps(
        {"seed": seed, "schedule": lasting_repr(app.schedule), "federation": lasting_repr(federation), "out": str(out)}
    )
    screen, store = console(), Store(state)
    raise_descriptor_limit()
    with ExitStack() as closing:
        _end_on_terminate(screen, closing)
        closing.callback(store.close)
        store.lock()
        _refuse_done(store, str(app.fingerprint), named, stay)
        served = replace(federation, aggregator=careful(federation.aggregator))
        coordinator = Coordinator(store, served, str(app.fingerprint), settings=named)
        closing.callback(coordinator.close)
        _collect_seldom()
        server = serve_in_thread(coordinator, listen, url=url)
        closing.callback(server.close)
        fail_point("coordinator.served")
        screen.print(f"{app.title}: serving on port {server.port}, clients use {server.url}")
        screen.print(f"app fingerprint {str(app.fingerprint)[:16]}, state {state}")
        runtime = NetworkRuntime(
            coordinator,
            deadline_s="auto" if app.schedule.buffer is not None else app.schedule.deadline_s,
            min_clients=app.schedule.min_clients or 1,
            on_wait=_Waiting(screen).tell,
        )
        left = _to_the_end(app, coordinator, runtime, seed, state, out, screen)
        if left:
            screen.print(f"not yet told that the run is over: {', '.join(left)}")
        while stay:
            time.sleep(_LOOK_EVERY_S)
            store.refuse_superseded()


def _to_the_end(
    app: App,
    coordinator: Coordinator,
    runtime: NetworkRuntime,
    seed: int,
    state: Path,
    out: Path | None,
    screen: Console,
) -> Sequence[Client]:
    """Train, write the run directory, tell clients; whom that did not reach. A full disk is waited for."""
    from hansa.network.room import when_there_is_room

    own, warn = state / "runs" / coordinator.run, partial(_warn, screen)
    folder = out or own
    if not coordinator.finished:
        _wait_for_clients(screen, runtime, app, state)
        train = partial(_train, app, coordinator, runtime, seed, own / "checkpoint", screen)
        run = when_there_is_room(train, state, warn)  # a second time it goes on from the checkpoint
        fail_point("coordinator.run.trained")
        when_there_is_room(partial(run.save, folder), folder, warn)
        fail_point("coordinator.run.saved")
        when_there_is_room(partial(coordinator.save_log, folder), folder, warn)
        screen.print(f"run directory {folder}, report {folder / 'report.html'}")
        screen.print(f"run {coordinator.run} is done: {_scores(run)}")
        for line in statistics.lines(run):
            screen.print(line, markup=False)
    left = when_there_is_room(runtime.finish, state, warn)  # after a restart too: some may not know yet
    when_there_is_room(partial(coordinator.save_log, folder), folder, warn)  # again, with the end
    fail_point("coordinator.run.logged")
    when_there_is_room(partial(coordinator.store.put, _ENDED, coordinator.run.encode()), state, warn)
    return left


def run_invite(name: str, state: Path, uses: int, expires: str, again: bool) -> None:
    """Print a join token; the last line is the token alone."""
    need_server()
    from hansa.network.registry import invite

    token = invite(state, name, uses=uses, expires_s=seconds(expires), again=again)
    screen = console()
    many = f", {uses} uses" if uses > 1 else ", one use"
    screen.print(f"join token for {name}{many}, valid {expires}; whoever holds it can join as {name}: send it safely")
    screen.print(f"at the client: hansa join TOKEN APP --data PATH{' --state DIR' if '*' in name else ''}")
    print(token.encode())


def run_revoke(name: str, state: Path) -> None:
    """Refuse a client from now on, in a running coordinator too."""
    need_server()
    from hansa.network.registry import revoke

    revoke(state, name)
    console().print(f"{name} is refused from now on; hansa invite {name} --again lets it back with a new key")


def seconds(text: str) -> float:
    """A time such as 90s, 30m, 12h or 7d.

    >>> seconds("12h")
    43200.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or float(found[1]) <= 0:
        raise InputError(f"--expires {text}: expected a time such as 90s, 30m, 12h or 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _collect_seldom() -> None:
    """Let a full garbage collection wait for the end of a round: with thousands of clients it stops them for a second.

    A request leaves no cycles behind, so that there is next to nothing to collect meanwhile.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 100)


def _release(runtime: NetworkRuntime, *released: Any) -> None:
    """End a round."""
    runtime.release(*released)
    gc.collect()


def _end_on_terminate(screen: Console, closing: ExitStack) -> None:
    """When the system asks to end (SIGTERM): stop where we are, close what is open, exit with status 0.

    What is durable is so at every moment, so no harm is done when closing takes too long and is broken off.
    """
    asked = threading.Event()

    def handle(_signal: int, _frame: Any) -> None:
        if not asked.is_set():
            asked.set()
            last = threading.Timer(_LONGEST_STOP_S, os._exit, (0,))
            last.daemon = True
            last.start()
            sys.exit(0)

    def say() -> None:
        if asked.is_set():
            screen.print("stopped, as the system asked; the same line goes on where this one ended")

    if threading.current_thread() is threading.main_thread():
        closing.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, handle))
        closing.callback(say)


def _warn(screen: Console, sentence: str) -> None:
    """What a person should look at."""
    screen.print(f"[red]{harmless(sentence)}[/red]", soft_wrap=True)


class _Waiting:
    """Says who a round waits for, once a change and not before some seconds."""

    def __init__(self, screen: Console) -> None:
        self._screen, self._slot, self._since, self._said = screen, None, 0.0, ""

    def tell(self, slot: Slot, waiting: Any, accepted: int) -> None:
        """Called now and then while a slot is open."""
        if slot != self._slot:
            self._slot, self._since, self._said = slot, time.monotonic(), ""  # type: ignore[assignment]  # a Slot from now on
        text = ", ".join(list(waiting)[:5]) + (" ..." if len(waiting) > 5 else "")
        if time.monotonic() - self._since > 10 and text != self._said:
            self._screen.print(f"round {slot.round + 1}: {accepted} reports, waiting for {text}")
            self._said = text


def _wait_for_clients(screen: Console, runtime: NetworkRuntime, app: App, state: Path) -> None:
    """Until enough clients are here; says how to invite them."""
    needed, here = app.schedule.clients_needed, -1
    while True:
        present = runtime.wait_for_clients(needed, timeout_s=2.0)
        if len(present) != here:
            here = len(present)
            some = ", ".join(present[:5]) + (" ..." if here > 5 else "")
            names = f": {some}" if present else f"; hansa invite NAME --state {state}"
            screen.print(f"{here} of {needed} clients are here{names}")
        if here >= needed:
            return


def _train(
    app: App, coordinator: Coordinator, runtime: NetworkRuntime, seed: int, checkpoint: Path, screen: Console
) -> Run:
    """The loop of a simulation, with the network as its runtime."""
    from hansa.network.ledgers import stored_ledger

    started, key, long = datetime.datetime.now(datetime.UTC), Key.of(seed), LongRounds(checkpoint.parent)
    federation, schedule = coordinator.federation, app.schedule
    resume = Checkpoint.read_either(checkpoint, partial(_warn, screen))
    if resume is None and coordinator.released is not None:
        raise InputError(
            f"checkpoint {checkpoint}: expected the one of {coordinator.released.round + 1} rounds that are done, "
            "found none; restore the state folder from a backup, or begin anew with another --state"
        )
    with progress(screen, schedule.num_rounds, app.title) as show:
        loop = Loop(
            federation=federation,
            schedule=schedule,
            runtime=runtime,
            key=key,
            clients=runtime.clients,
            params=long.keep(initial_params(federation, key, app.start_from)) if resume is None else None,
            evaluate_on=app.evaluate_on() if app.evaluate_on else None,
            on_round=lambda row: show(row),
            save=lambda point: point.write_twice(checkpoint),
            release=lambda *released: _release(runtime, *released),
            pause=time.sleep,
            long=long,
            ledger=stored_ledger(coordinator.store, coordinator.run),
        )
        if resume is not None:
            screen.print(f"going on after {resume.next_round} of {schedule.num_rounds} rounds")
            _release_again(resume, runtime)
        point = loop.run(resume)
        runtime.let_go()
    sizes = {client: (round(runtime.weights.get(client, 0)), 0) for client in runtime.clients()}
    return outcome(
        loop,
        point,
        sizes,
        runtime.clients(),
        app=app,
        seed=seed,
        started=started,
        simulated=False,
        runtime="NetworkRuntime",
        skew={
            "summary": f"{len(sizes)} clients; only they know their data",
            "classes": None,
            "label_distance": None,
            "clients": {client: {"num_examples": size, "labels": None} for client, (size, _) in sizes.items()},
        },
        bodies=runtime.bodies(),
        refused=runtime.refusals(),
        notes=[],
    )


def _release_again(point: Checkpoint, runtime: NetworkRuntime) -> None:
    """A crash may have come between a round's checkpoint and its release, and a disk may have damaged what was."""
    if point.next_round:
        constants = {f"prepare.{i}": total for i, total in enumerate(point.totals)}
        runtime.release(point.next_round - 1, point.state.algorithm["params"], constants)


def _refuse_done(store: Store, fingerprint: str, settings: str, stay: bool) -> None:
    """A finished run is not begun again by a restart, which only tells those who do not know that it is over."""
    from hansa.network.registry import Registry

    run = json.loads(store.get("run") or b"{}")
    same = run.get("fingerprint") == fingerprint and run.get("settings") == settings
    ended = same and (store.get(_ENDED) or b"").decode() == run["id"]
    if ended and not stay and not Registry(store).present(run["id"], without_goodbye=True):
        raise InputError(
            f"run {run['id']} of this app and seed is done; give another --out or --seed for a new one, "
            "or --stay to go on serving"
        )


def _scores(run: Run) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in run.final.items() if not math.isnan(value))


def need_server() -> None:
    """Name the extra that is missing, if it is."""
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn", "sqlalchemy") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve: expected {', '.join(missing)} to be installed; run pip install 'hansa[server]'")
