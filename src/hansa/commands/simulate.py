"""``hansa simulate``: an app over a folder of files, for one seed or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

import hansa
from hansa import statistics
from hansa.core.errors import InputError
from hansa.data.population import Population
from hansa.runtimes.devices import Devices
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.runtimes.virtual_time import VirtualTime
from hansa.terminal import bytes_words, comparison_table, console, mean_and_spread, number, profile_table, progress
from hansa.training.apps import App, load_app, with_settings
from hansa.training.profile import advice
from hansa.training.run import Run
from hansa.training.simulate import simulate


def run_simulate(
    app_file: Path,
    data: Path | None,
    seeds: list[int],
    settings: list[str],
    baselines: bool,
    runtime: str,
    out: Path | None,
    resume: bool,
    profile: bool = False,
) -> None:
    """Simulate, show, and write the run directory (one a seed where there are several)."""
    if resume and out is None:
        raise InputError("--resume: expected --out DIR, where the rounds are saved; found none")
    app = with_settings(load_app(app_file), settings)
    population, screen = population_of(app, data), console()
    where = runtime_of(runtime)
    runs = []
    for seed in seeds:
        folder = out if out is None or len(seeds) == 1 else out / f"seed-{seed}"
        if folder is not None and not resume:
            refuse_foreign(folder)
        title = f"{app.title}, seed {seed}" if len(seeds) > 1 else app.title
        with progress(screen, app.schedule.num_rounds, title) as show:
            run = simulate(
                app,
                population,
                seed=seed,
                baselines=baselines,
                runtime=where,
                checkpoint=folder / "checkpoint" if resume and folder is not None else None,
                profile=profile,
                on_round=lambda row, show=show: show(row),  # type: ignore[misc]  # mypy cannot infer a default argument
            )
        runs.append(run)
        if folder is not None:
            run.save(folder)
    show_runs(screen, runs, seeds)
    if profile:
        show_profiles(screen, runs, seeds)
    show_where(screen, out, len(seeds))


def population_of(app: App, data: Path | None) -> Population:
    """The clients: the files of a folder, or the app's own population."""
    if data is None:
        if app.population is None:
            raise InputError("simulate: expected --data DIR or population= in the app, found neither")
        return app.population()
    if app.load_data is None:
        raise InputError(f"{app.path}: expected load_data=function(path) in the app to read {data}, found none; add it")
    return Population.from_folder(data, load=app.load_data)


def runtime_of(text: str) -> Any:
    """The runtime that a word names, as ``simulate`` takes it.

    >>> runtime_of("processes:2")
    Processes(num_workers=2, block_size='auto')
    """
    kind, colon, more = text.partition(":")
    count = int(more) if more.isdecimal() and int(more) > 0 else None
    if not colon and kind == "auto":
        return "auto"
    if kind in ("inprocess", "processes", "ray") and (count or not colon):
        if kind == "inprocess":
            return InProcess(block_size=count or "auto")
        return Processes(num_workers=count) if kind == "processes" else hansa.Ray(num_workers=count)
    if kind == "virtual" and (more or not colon):
        return VirtualTime(devices=Devices.from_csv(more) if colon else Devices.phones())
    raise InputError(
        f"--runtime {text}: expected inprocess[:BLOCK_SIZE], processes[:NUM_WORKERS], auto, ray[:NUM_WORKERS] or "
        "virtual[:TRACE.csv]"
    )


def refuse_foreign(folder: Path) -> None:
    """Refuse to write a run over something else than a run."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.json").exists():
        raise InputError(
            f"--out {folder}: expected a new folder or an earlier run, found other files in it; nothing written"
        )


def show_runs(screen: Console, runs: list[Run], seeds: list[int]) -> None:
    """What came out, as a person wants to see it."""
    first = runs[0]
    screen.print(first.info["skew"]["summary"])
    for note in first.info["notes"]:
        screen.print(f"[yellow]note[/yellow] {note}")
    if len(runs) == 1:
        show_one(screen, first)
        return
    screen.print(
        f"[bold]final model, {first.info['scored_on']}, mean (standard deviation) of {len(seeds)} seeds[/bold]"
    )
    for name in first.final:
        mean, spread = mean_and_spread([run.final[name] for run in runs])
        screen.print(f"  {name} {number(mean)} ({number(spread)})")


def show_one(screen: Console, run: Run) -> None:
    """One run: its final scores, and the comparison if there is one."""
    names = sorted(run.final, key=lambda name: name == "loss")  # the first metric, then the loss
    scores = ", ".join(f"{name} {number(value)}" for name, value in run.final.items())
    answered = statistics.lines(run)
    if not answered:
        screen.print(f"[bold]after {len(run.history)} rounds[/bold], on {run.info['scored_on']}: {scores}")
    for line in answered:
        screen.print(line, markup=False)
    up, down = (sum(getattr(row, f"bytes_{way}") for row in run.history) for way in ("up", "down"))
    screen.print(f"bytes: {bytes_words(up)} up, {bytes_words(down)} down, {run.info['seconds']:.1f} s")
    if run.info.get("virtual_time"):
        screen.print(clock_words(run.info["virtual_time"]))
    if run.info.get("privacy"):
        screen.print(run.info["privacy"]["statement"])
    if run.info.get("baselines"):
        baselines: dict[str, Any] = run.info["baselines"]
        screen.print(comparison_table("was joining worth it?", baselines, [names[0], "loss"]))


def clock_words(found: dict[str, Any]) -> str:
    """What a run on a simulated clock took, in one sentence.

    >>> found = {"hours": 2.5, "asked": 30, "accepted": 24, "late": 4, "dropped": 1, "unavailable": 1}
    >>> clock_words({**found, "wasted_share": 0.125})
    'virtual time: 2.5 hours; of 30 asked 24 counted, 4 late, 1 dropped out, 1 away; 12% of the work wasted'
    """
    return (
        f"virtual time: {found['hours']:.3g} hours; of {found['asked']:,} asked {found['accepted']:,} counted, "
        f"{found['late']:,} late, {found['dropped']:,} dropped out, {found['unavailable']:,} away; "
        f"{found['wasted_share']:.0%} of the work wasted"
    )


def show_profiles(screen: Console, runs: list[Run], seeds: list[int]) -> None:
    """Where each run's rounds spent their time, and what may be done."""
    for run, seed in zip(runs, seeds, strict=True):
        screen.print(profile_table(run.info["profile"], f", seed {seed}" if len(runs) > 1 else ""))
        advised = advice(run.info)
        if advised:
            screen.print(advised, markup=False)


def show_where(screen: Console, out: Path | None, count: int) -> None:
    """Where the run lies."""
    if out is None:
        screen.print("nothing was written; --out DIR keeps the model, the history and a report")
    elif count == 1:
        screen.print(f"run directory {out}, report {out / 'report.html'}")
    else:
        screen.print(f"run directories {out}/seed-*; hansa compare {out} shows them side by side")


def read_info(folder: Path) -> dict[str, Any]:
    """``run.json`` of a run directory."""
    try:
        info: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: expected a run directory with run.json, found {error}") from error
    return info
