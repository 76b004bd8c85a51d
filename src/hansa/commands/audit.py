"""``hansa audit``: attack an app's privacy claim with canaries, or show what leaks from its updates."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from hansa.commands.simulate import population_of
from hansa.core.errors import InputError
from hansa.data.population import Population
from hansa.terminal import console, new_table
from hansa.training.apps import App, load_app, with_settings
from hansa.training.audit import Audit, audit
from hansa.training.audit_page import audit_page
from hansa.training.leaks import find_leaks
from hansa.training.leaks_page import headline, leaks_page
from hansa.training.privacy import noise_of
from hansa.training.report import write_report
from hansa.training.report_audit import FILE
from hansa.training.report_page import write_page
from hansa.training.run import json_ready

SHOWS = ("claim", "leaks")
_BARE = (
    "this app adds no noise: its epsilon is infinite, and there is no claim to attack. What leaks is shown instead; "
    "hansa.Clip and hansa.GaussianNoise in transforms= make a claim."
)


def run_audit(
    app_file: Path,
    data: Path | None,
    settings: list[str],
    show: str,
    num_canaries: int,
    num_rounds: int | None,
    seed: int,
    out: Path,
) -> None:
    """Print the verdict and write ``audit.json`` and a page; exit status 1 where the claim is broken."""
    if show not in SHOWS:
        raise InputError(f"--show: expected {' or '.join(SHOWS)}, found {show!r}")
    if out.is_file():
        raise InputError(f"--out {out}: expected a folder, found a file; give another path")
    app = with_settings(load_app(app_file), settings)
    population, screen = population_of(app, data), console()
    if noise_of(app.federation) is None and show == "claim":
        screen.print(_BARE)
        show = "leaks"
    if show == "leaks":
        _leaks(screen, app, population, num_rounds, seed, out)
        return
    found = _attacked(screen, app, population, num_canaries, num_rounds, seed)
    _print(screen, found)
    out.mkdir(parents=True, exist_ok=True)
    record = {"app": app.title, "fingerprint": app.fingerprint, "seed": seed, **found.as_json()}
    (out / FILE).write_text(json.dumps(json_ready(record), indent=1) + "\n", encoding="utf-8")
    page = write_page(audit_page(found, app.title), out / "audit.html")
    screen.print(f"{page} shows it; {out / FILE} has the figures")
    if (out / "run.json").exists():
        screen.print(f"{write_report(out)} shows it beside the run's claim")
    if found.is_broken:
        raise typer.Exit(1)


def _attacked(
    screen: Console, app: App, population: Population, num_canaries: int, num_rounds: int | None, seed: int
) -> Audit:
    """The audit, with a bar where there is more than one run."""
    done = 0

    def told(number: int, of: int) -> None:
        nonlocal done
        if of > 1 and number * 10 // of > done:
            done = number * 10 // of
            screen.print(f"{number} of {of} runs")

    return audit(
        app.federation,
        population,
        app.schedule,
        num_canaries=num_canaries,
        num_rounds=num_rounds,
        seed=seed,
        holdout=app.holdout,
        start_from=app.start_from,
        on_run=told,
    )


def _print(screen: Console, found: Audit) -> None:
    table = new_table(f"privacy audit: {found.num_canaries:,} canaries, {found.num_rounds} rounds")
    table.add_column("")
    table.add_column("epsilon", justify="right")
    table.add_column("what it is")
    share = f"{found.confidence:.0%}"
    table.add_row(
        "claimed", f"{found.claim.epsilon:.3g}", f"at delta {found.claim.delta:.0e}, as hansa check states it"
    )
    table.add_row("proved", f"at least {found.lower_bound:.3g}", f"with {share} confidence: the larger of the next two")
    table.add_row(
        "  one-run audit", f"at least {found.one_run.epsilon:.3g}",
        f"{found.one_run.num_correct} of {found.one_run.num_guesses} guesses right; for any mechanism",
    )  # fmt: skip
    table.add_row(
        "  one-shot audit", f"at least {found.one_shot.epsilon:.3g}", "canaries' cosines; taken for independent"
    )
    for level in found.levels[1:]:
        words = f"at delta {level.delta:g}, where the same releases claim {level.claimed:.3g}"
        table.add_row("  one-shot audit", f"at least {level.proved:.3g}", words)
    table.add_row("estimate", f"{found.estimate:.3g}", "one-shot audit; no bound")
    screen.print(table)
    screen.print(f"[{'red' if found.is_broken else 'green'}]{found.verdict}[/]")


def _leaks(screen: Console, app: App, population: Population, num_rounds: int | None, seed: int, out: Path) -> None:
    """Attack updates and models, say how it went, and write the page."""
    found = find_leaks(app, population, seed=seed, num_rounds=num_rounds)
    table = new_table("what leaks")
    for name in ("", "rows read back", "members told, AUC", "found at 1% false alarms"):
        table.add_column(name, justify="right" if name else "left")
    for view in found.views:
        likeness = sum(one.likeness(view) for one in found.readbacks) / len(found.readbacks)
        told = found.members.get(view)
        shown = ("-", "-") if told is None else (f"{told.auc:.3f}", f"{told.found_at_1:.1%}")
        table.add_row(view, f"{likeness:.3f}", *shown)
    screen.print(table)
    screen.print("rows read back: correlation with the row, 1 is the row itself; members told: 0.5 is chance")
    screen.print(f"[bold]{headline(found)}[/bold]")
    page = write_page(leaks_page(found, app.title), out / "leaks.html")
    screen.print(f"{page} shows it in pictures")


__all__ = ["SHOWS", "run_audit"]
