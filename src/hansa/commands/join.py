"""``hansa join``: a client; the same line after a restart goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hansa.core.errors import InputError
from hansa.data.source import held_out
from hansa.federation import Federation, Pair
from hansa.network.budget import Budget, budget_of
from hansa.network.client_store import ClientStore
from hansa.network.credentials import Enrolled, read_peers
from hansa.network.participant import Participant
from hansa.terminal import console, harmless
from hansa.training.apps import App, app_files, fingerprint, load_app, load_function, pair_of
from hansa.training.privacy import bound_locally


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """The privacy budget that an owner sets, if any, and where budgets are kept."""

    epsilon: float | None = None
    delta: float | None = None
    folder: Path | None = None

    def of(self, data: str, store: ClientStore | None, *, is_set: bool = True) -> Budget | None:
        """The budget of ``data``, or None where none was ever set; it is not touched unless ``is_set``."""
        folder = self.folder or Path.home() / ".hansa" / "budgets"
        return budget_of(data, folder, store, **({"epsilon": self.epsilon, "delta": self.delta} if is_set else {}))


@dataclass(frozen=True)
class Owner:
    """The data owner's side of a participant: which apps it agreed to, where its data are, how it trains."""

    apps: Path
    data: str
    device: str | None
    budget: Budget | None = None

    def app(self, file: Path) -> tuple[App, Federation]:
        """An app, with the device of this machine, and with this client's own noise sized for the app's rounds."""
        app = load_app(file)
        federation, learner = bound_locally(app.federation, app.schedule), app.federation.learner
        if self.device is None:
            return app, federation
        if not hasattr(learner, "on_device"):
            raise InputError(
                f"--device {self.device}: expected a learner with a device, found {type(learner).__name__}"
            )
        return app, replace(federation, learner=learner.on_device(self.device))

    def loader(self, app: App, name: str) -> Callable[[], Pair]:
        """A function that reads the owner's rows anew, with the held-out share set aside."""
        own = load_function(self.data)
        if own is None and not Path(self.data).exists():
            raise InputError(f"--data {self.data}: expected a file or folder, found nothing there")
        if own is None and app.load_data is None:
            raise InputError(
                f"{app.path}: expected load_data=function(path) in the app, found none; or --data my.py:load"
            )

        def load() -> Pair:
            loaded = own() if own is not None else app.load_data(Path(self.data))  # type: ignore[misc]  # checked above
            return held_out(*pair_of(loaded, self.data), app.holdout, name)

        return load


def run_join(
    token: str,
    apps: Path,
    data: str,
    state: Path | None,
    device: str | None,
    allowance: Allowance,
    stay: bool,
    dry_run: bool,
    peers: Path | None = None,
) -> None:
    """Take part until the run is over (or for ever, with ``stay``)."""
    from hansa.network.client import Connection, run_participant
    from hansa.network.enrolment import enrol
    from hansa.network.token import JoinToken

    screen, owner = console(), Owner(apps, data, device)
    known = None if peers is None else read_peers(peers)
    files = app_files(apps)
    join = JoinToken.decode(token_text(token))
    name = None if join.is_pattern else join.name
    folder = state or Path.home() / ".hansa" / f"{name or 'client'}-{join.authority[:8]}"
    app, federation = owner.app(files[0])
    if dry_run:
        from hansa.commands.dry_run import dry_run as try_once
        from hansa.commands.dry_run import price_once

        try_once(screen, federation, name or "client", owner.loader(app, name or "client"), folder)
        price_once(screen, app, allowance.of(data, None, is_set=False), allowance)
        return
    federation.check_data(owner.loader(app, name or "client")(), name or "client")
    store = ClientStore(folder)
    store.lock()
    budget = allowance.of(data, store)
    if budget is not None:
        owner = replace(owner, budget=budget)
        screen.print(harmless(str(budget)), soft_wrap=True)
    who = enrol(join, folder, _fleet_name(join.name) if join.is_pattern else None)
    screen.print(f"{who.name}: joined {who.url}, state {folder}")
    credentials = Enrolled(folder, known)
    make = partial(_participant, owner=owner, name=who.name, store=store, screen=screen, credentials=credentials)
    with closing(Connection(who, store, on_event=partial(_tell, screen))) as connection:
        _on_terminate(connection.stop.set)
        run_participant(connection, lambda: _offered(apps, make), stay=stay)


def token_text(token: str) -> str:
    """The token itself, or what ``@FILE`` or ``-`` (standard input) holds: its last line."""
    if token == "-":
        text = sys.stdin.read()
    elif token.startswith("@"):
        path = Path(token[1:])
        if not path.is_file():
            raise InputError(f"join token {token}: expected a file {path}, found none")
        text = path.read_text(encoding="utf-8")
    else:
        return token
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"join token {token}: expected a token, found nothing")
    return lines[-1].strip()


def _participant(
    file: Path, *, owner: Owner, name: str, store: Any, screen: Console, credentials: Enrolled
) -> Participant:
    app, federation = owner.app(file)

    def problem(error: Exception) -> None:
        reason = harmless(f"{type(error).__name__}: {error}")
        screen.print(f"[red]left out of this round[/red] {reason}", soft_wrap=True)

    return Participant(
        federation,
        name,
        owner.loader(app, name),
        store,
        on_problem=problem,
        app=(fingerprint(file), file.read_bytes()),
        budget=owner.budget,
        credentials=credentials,
    )


def _offered(apps: Path, make: Callable[[Path], Participant]) -> Mapping[str, Callable[[], Participant]]:
    """The apps that the owner agrees to now, by fingerprint: looked up in the folder each time."""
    return {fingerprint(file): partial(make, file) for file in app_files(apps)}


def _tell(screen: Console, what: str, more: Mapping[str, Any]) -> None:
    """One line for what matters to the owner."""
    more = {name: harmless(value) if isinstance(value, str) else value for name, value in more.items()}
    if what == "welcome":
        screen.print(f"welcome to run {more['run']}")
    elif what == "receipt" and more["task"] == "train":
        reason = f" ({more['reason']})" if more.get("reason") else ""
        screen.print(f"round {more['round'] + 1}: update {more['status']}{reason}")
    elif what == "unreachable":
        screen.print(f"{more['url']} cannot be reached ({more['reason']}); trying again")
    elif what == "connected":
        screen.print(f"{more['url']} is back")
    elif what == "another-app":
        screen.print(f"waiting for an app that this folder has: {more['reason']}")
    elif what == "finished":
        screen.print("the run is over")


def _fleet_name(pattern: str) -> str:
    """A name for one machine of a fleet: its host name where that fits the pattern."""
    import fnmatch
    import platform
    import re
    import secrets

    host = re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:40]
    if host and fnmatch.fnmatchcase(host, pattern):
        return host
    return pattern.replace("*", host or secrets.token_hex(4)).replace("?", secrets.choice("0123456789"))


def _on_terminate(stop: Callable[[], None]) -> None:
    """End between two requests when the system asks."""

    def handle(_signal: int, _frame: Any) -> None:
        stop()

    signal.signal(signal.SIGTERM, handle)
