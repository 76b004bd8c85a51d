"""``hansa check``: before a run, all problems at once, what leaves a client, and what it costs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from hansa.core.check import Problem, refuse
from hansa.core.errors import CheckError, InputError
from hansa.data.population import Population
from hansa.federation import Federation
from hansa.terminal import bytes_words, console, new_table
from hansa.training.apps import App, load_app, pair_of, with_settings
from hansa.training.check import leaves, problems
from hansa.training.privacy import bound, noise_of, planned
from hansa.training.privacy_statement import statement
from hansa.training.schedule import Schedule
from hansa.training.secrecy import secrecy


def run_check(app_file: Path, data: Path | None, settings: list[str]) -> None:
    """Print what an app means; raise one error with every problem."""
    app, screen = with_settings(load_app(app_file), settings), console()
    population = _population(app, data)
    count = len(population) if population else None
    found = problems(app.federation, app.schedule, count) + (_data_problems(app, population) if population else [])
    if population and not found:
        screen.print(population.skew().summary())
    try:
        _show(screen, app, count or app.schedule.cohort_size or app.schedule.clients_needed)
    except CheckError:  # noise that cannot be sized cannot be shown
        refuse(found)
        raise
    refuse(found)
    screen.print("[green]no problem found[/green]")


def _show(screen: Console, app: App, num_clients: int) -> None:
    """What leaves a client and who can read it; bytes and memory; epsilon."""
    federation, schedule = bound(app.federation, app.schedule, num_clients), app.schedule
    table = new_table("what leaves a client")
    for column in ("what", "bytes", "when", "who can read it"):
        table.add_column(column)
    for row in leaves(federation, app.holdout):
        size = "-" if row["bytes"] is None else row["most"] * "up to " + bytes_words(row["bytes"])
        table.add_row(row["what"], size, row["when"], row["reader"])
    screen.print(table)
    update = next(r["bytes"] for r in leaves(federation, app.holdout) if r["bytes"] is not None)
    cohort = min(schedule.cohort_size or num_clients, num_clients)
    params = federation.learner.layout.num_params
    total = schedule.num_rounds * cohort
    screen.print(
        f"{params:,} parameters, {schedule.num_rounds} rounds of {cohort} clients: about "
        f"{bytes_words(total * update)} up and {bytes_words(total * 4 * params)} down in all; memory for the model "
        f"about {bytes_words(16 * params)} at a client and {bytes_words(24 * params)} at the server"
    )
    for sentence in secrecy(federation, min(schedule.num_counted(num_clients), num_clients)):
        screen.print(sentence, soft_wrap=True)
    _show_privacy(screen, federation, schedule, num_clients)
    if app.fingerprint:
        screen.print(f"fingerprint {app.fingerprint[:16]}")


def _show_privacy(screen: Console, federation: Federation, schedule: Schedule, num_clients: int) -> None:
    """The statement that the whole schedule will earn, with epsilon at several deltas."""
    noise = noise_of(federation)
    if noise is None or getattr(noise, "noise_multiplier", 1.0) is None:
        return
    released = Counter(planned(noise, schedule, num_clients))
    stated = statement(federation, released, num_clients, simulated=False)
    assert stated is not None
    table = new_table(f"privacy after {schedule.num_rounds} rounds")
    for column in ("", ""):
        table.add_column(column)
    for name, fact in stated["facts"].items():
        table.add_row(name, fact)
    for one in stated["epsilons"]:
        beside = "" if one["rdp"] is None else f" (RDP: {one['rdp']:.3g})"
        table.add_row(f"at delta {one['delta']:.0e}", f"epsilon {one['epsilon']:.3g}{beside}")
    screen.print(table)


def _population(app: App, data: Path | None) -> Population | None:
    if data is None:
        return app.population() if app.population else None
    if not data.exists():
        raise InputError(f"--data {data}: expected a file or a folder of clients' files, found nothing there")
    if app.load_data is None:
        raise InputError(f"{app.path}: expected load_data=function(path) in the app to read {data}, found none; add it")
    if data.is_dir():
        return Population.from_folder(data, load=app.load_data)
    return Population({data.stem: pair_of(app.load_data(data), str(data))})


def _data_problems(app: App, population: Population) -> list[Problem]:
    """One problem a client whose data do not fit, up to 100 clients."""
    found = []
    for client in population.ids[:100]:
        try:
            app.federation.check_data(population.load(client), client)
        except InputError as error:
            found.append(Problem(str(error)))
    return found
