"""``hansa demo``: a coordinator and four hospital processes on loopback, over mutual TLS, each with its own patients.

The network run is one split; the comparison (alone, federated, pooled) is averaged over many random splits of each
hospital's patients, simulated with the same app.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.data.dataset import hold_out
from hansa.data.population import Population
from hansa.data.source import Source
from hansa.demo_data import write_hospitals
from hansa.demo_secrecy import Copies, show_secrecy
from hansa.runtimes.inprocess import InProcess
from hansa.terminal import BETTER_LOW, bytes_words, console, mean_and_spread, new_table, number
from hansa.training.apps import App, load_app, pair_of
from hansa.training.run import Run, load_run
from hansa.training.simulate import simulate

_PATIENCE_S = 60.0  # without a word
_SEED = 0


def run_demo(
    *,
    data: Path | None,
    client: str,
    label: str | None,
    num_splits: int,
    num_rounds: int,
    secure: bool,
    keep: bool,
    write: Path | None,
    out: Path,
) -> None:
    """The main job, shown to a person."""
    screen = console()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="hansa-demo-") as temporary:
        folder = Path(temporary)
        if write is not None:
            if write.exists() and any(write.iterdir()):
                raise InputError(f"--write {write}: expected a new folder, found files in it; nothing was written")
            folder = write
        hospitals = write_hospitals(folder, data, client, label, num_rounds=num_rounds, secure=secure)
        app = load_app(folder / "app.py")
        _introduce(screen, app, hospitals)
        with Federation(folder, list(hospitals), out) as federation:
            copies = Copies(federation.state, folder / "copies") if secure else None
            with copies or nullcontext():
                federation.run(screen)
            run = load_run(out, app=app)
            _show_bits(screen, run, app, hospitals, secure=secure)
            run.save(out)
            _show_comparison(screen, app, hospitals, num_splits)
            _show_traffic(screen, run, hospitals, secure=secure)
            if copies is not None:
                show_secrecy(screen, app, run, _SEED, _training_rows(app, hospitals), federation.state, copies)
                shutil.rmtree(copies.folder)
            screen.print(f"\nreport   {out / 'report.html'}\nmodel    {out / 'parameters.safetensors'}")
            if write is not None:
                screen.print(f"app      {write / 'app.py'} and a folder a hospital: edit them, then")
                screen.print(f"         hansa simulate {write / 'app.py'} --data {write / 'hospitals'} --baselines")
            else:
                screen.print("next     hansa demo --write my-federation leaves the app and CSV files to edit")
            screen.print(f"[dim]{time.perf_counter() - begun:.0f} s in all[/dim]")
            if keep:
                federation.leave_running(screen)


class Federation:
    """A coordinator and one process a hospital, each in its own folder; stopped when the block ends."""

    def __init__(self, folder: Path, names: Sequence[str], out: Path) -> None:
        self.folder, self.names, self.out = folder, list(names), out
        self.state = folder / "coordinator"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._lines: list[str] = []
        self._news = threading.Condition()

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, screen: Console) -> None:
        """Serve, invite, join, and wait for the run to end."""
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / "run.json").exists():
                raise InputError(f"--out {self.out}: expected a new folder or an earlier run, found other files in it")
            shutil.rmtree(self.out)
        words = ("--state", str(self.state), "--listen", "127.0.0.1:0", "--out", str(self.out.absolute()), "--stay")
        self._start("coordinator", "serve", str(self.folder / "app.py"), *words, "--seed", str(_SEED))
        self._wait_for("serving on")
        for name in self.names:
            token = self._token(name)
            own = self.folder / "hospitals" / name
            options = ("--data", str(own), "--state", str(self.folder / "state" / name), "--stay")
            self._start(name, "join", f"@{token}", str(self.folder / "app.py"), *options)
        screen.print(
            f"[bold]network[/bold]  coordinator and {len(self.names)} hospitals, a process each, mutual TLS on loopback"
        )
        shown = 0
        end = time.monotonic() + _PATIENCE_S
        while not self._seen("is done"):
            self._check_alive()
            with self._news:
                self._news.wait(0.5)
                lines, shown = self._lines[shown:], len(self._lines)
            end = time.monotonic() + _PATIENCE_S if lines else end
            for line in lines:
                number = line.removeprefix("round ").split(" ")[0]
                if line.startswith("round ") and number.isdigit() and (number == "1" or int(number) % 5 == 0):
                    screen.print(f"  {line}")
            if time.monotonic() > end:
                raise RunError(
                    f"demo: expected another line within {_PATIENCE_S:.0f} s; the last lines: {self._lines[-5:]}"
                )

    def leave_running(self, screen: Console) -> None:
        """Until Ctrl-C."""
        screen.print(f"\nleft running: hansa status --state {self.state}   (Ctrl-C ends it)")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            screen.print("stopped")

    def _start(self, name: str, *words: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "hansa", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.processes[name] = process
        threading.Thread(target=self._read, args=(name, process), daemon=True).start()

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._news:
                self._lines.append(line.rstrip() if name == "coordinator" else f"{name}: {line.rstrip()}")
                self._news.notify_all()

    def _seen(self, text: str) -> bool:
        with self._news:
            return any(text in line for line in self._lines)

    def _wait_for(self, text: str) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not self._seen(text):
            self._check_alive()
            with self._news:
                self._news.wait(0.2)
            if time.monotonic() > end:
                raise RunError(f"demo: expected {text!r} from the coordinator, found {self._lines[-5:]}")

    def _check_alive(self) -> None:
        for name, process in self.processes.items():
            if process.poll() not in (None, 0):
                time.sleep(0.2)  # let its last lines arrive
                raise RunError(f"demo: {name} ended with status {process.returncode}:\n" + "\n".join(self._lines[-15:]))

    def _token(self, name: str) -> Path:
        words = [sys.executable, "-m", "hansa", "invite", name, "--state", str(self.state)]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        path = self.folder / "tokens" / f"{name}.token"
        path.parent.mkdir(exist_ok=True)
        path.write_text(printed.splitlines()[-1] + "\n", encoding="utf-8")
        return path


def _introduce(screen: Console, app: App, hospitals: dict[str, Any]) -> None:
    """Who holds what."""
    screen.print("[bold]Several hospitals learn one model together; no patient's record leaves its hospital.[/bold]\n")
    table = new_table("each hospital's own CSV file, in its own folder")
    for column in ("hospital", "patients", "ill", "share ill"):
        table.add_column(column, justify="left" if column == "hospital" else "right")
    for name, (patients, ill) in hospitals.items():
        table.add_row(name, str(patients), str(ill), f"{ill / patients:.0%}")
    screen.print(table)


def _show_bits(screen: Console, run: Run, app: App, hospitals: dict[str, Any], *, secure: bool) -> None:
    """The network's model is the simulation's, bit for bit; the report gains what only a simulation can know.

    ``secure``: but for the grid's rounding, which is drawn from each hospital's own secret.
    """
    again = simulate(app, population(app, list(hospitals)), seed=_SEED, runtime=InProcess(block_size=1), baselines=True)
    same = np.array_equal(again.parameters, run.parameters)
    run.info |= {"baselines": again.info["baselines"], "skew": again.info["skew"]}
    run.clients = again.clients
    words = "equals, bit for bit, that of" if same else "[red]differs from[/red] that of"
    if secure:
        apart, size = np.abs(again.parameters - run.parameters).max(), np.abs(run.parameters).max()
        words = f"is within {apart / size:.0e} of its size of that of"
    screen.print(f"  the network's final model {words} hansa simulate on the same files")
    if secure:
        screen.print("  (each hospital rounds to the grid of whole numbers by random draws of its own)")


def _training_rows(app: App, hospitals: dict[str, Any]) -> Callable[[str], Any]:
    """What each hospital trains on."""
    load = Source(population(app, list(hospitals)), app.holdout)
    return lambda name: load(name)[0]


def population(app: App, names: Sequence[str], split: int | None = None) -> Population:
    """The hospitals' files as a population; with ``split``, another random share of each held out."""
    assert app.path is not None
    assert app.load_data is not None
    clients: dict[str, Any] = {}
    for name in names:
        train, test = pair_of(app.load_data(app.path.parent / "hospitals" / name), name)
        clients[name] = train if split is None else hold_out(train, app.holdout or 0.3, Key.of(split).child(name))
        assert test is None, "the demo's app holds out by share"
    return Population(clients)


def _show_comparison(screen: Console, app: App, hospitals: dict[str, Any], num_splits: int) -> None:
    """Alone, federated, pooled: mean and spread over random splits, on the same held-out patients."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for split in range(num_splits):
        run = simulate(app, population(app, list(hospitals), split), seed=split, baselines=True)
        baselines = run.info["baselines"]
        for who, ways in [*baselines["clients"].items(), ("everyone", baselines["everyone"])]:
            for way, scores in ways.items():
                for name, value in scores.items():
                    found.setdefault((who, name, way), []).append(value)
    table = new_table(f"\nwas joining worth it? held-out patients, mean±sd of {num_splits} random splits", tight=True)
    table.add_column("patients of", no_wrap=True)
    for metric in ("auc", "log-loss"):
        for way in ("alone", "federated", "pooled*"):
            table.add_column(f"{metric}\n{way}", justify="right", no_wrap=True)
    for who in [*hospitals, "everyone"]:
        if who == "everyone":
            table.add_section()
        cells = [_cell(found, who, name, way) for name in ("auc", "loss") for way in ("alone", "federated", "pooled")]
        table.add_row(who, *cells, style="bold" if who == "everyone" else "")
    screen.print(table)
    screen.print("[dim]* pooled is what could not be done: all records in one place. Green: better than alone.")
    screen.print(
        "[dim]  Higher auc and lower log-loss are better; 'alone' on everyone is the mean of the hospitals' models."
    )


def _cell(found: dict[tuple[str, str, str], list[float]], who: str, name: str, way: str) -> str:
    mean, spread = mean_and_spread(found[who, name, way])
    alone, _ = mean_and_spread(found[who, name, "alone"])
    shown = short(mean) if np.isnan(spread) else f"{short(mean)}±{short(spread)}"
    better = mean < alone if name in BETTER_LOW else mean > alone
    return f"[green]{shown}[/green]" if way == "federated" and better else shown


def _show_traffic(screen: Console, run: Run, hospitals: dict[str, Any], *, secure: bool) -> None:
    """Everything that crossed the wire, by kind and size."""
    meaning = _MEANING | (_MASKED if secure else {})
    table = new_table("\nwhat crossed the wire: no patient's record")
    for column in ("body", "", "count", "bytes", "what it is"):
        table.add_column(column, justify="right" if column in ("count", "bytes") else "left")
    for body in sorted(run.info["bodies"], key=lambda b: (b["direction"] != "up", -b["bytes"])):
        table.add_row(
            body["kind"],
            body["direction"],
            str(body["count"]),
            bytes_words(body["bytes"]),
            meaning.get(body["kind"], ""),
        )
    screen.print(table)
    up, down = (sum(b["bytes"] for b in run.info["bodies"] if b["direction"] == way) for way in ("up", "down"))
    each = bytes_words(up / len(hospitals))
    screen.print(
        f"in all {bytes_words(up)} up and {bytes_words(down)} down: each hospital sent {each} (its own list: sent.csv)"
    )


def short(value: float) -> str:
    """Three decimals without the zero before the point."""
    return number(value).removeprefix("0")


_MEANING = {
    "update": "change of the parameters by training",
    "metrics": "sums of held-out metrics",
    "statistics": "count, sum, sum of squares a column",
    "certificate request": "a public key, once",
    "hello": "name and app fingerprint",
    "plan": "what to do in a round",
    "model": "the global parameters",
    "prepare.0": "the pooled sums",
    "no plan yet": "answers while waiting",
    "receipt": "an update was counted",
    "certificate": "proof of enrolment, once",
    "welcome": "the run to take part in",
    "refusal": "a reason not to take part",
}

_MASKED = {
    "update": "a masked update: numbers at random",
    "metrics": "masked sums of held-out metrics",
    "statistics": "masked count, sums, sums of squares",
    "mail": "public keys and shares of masks",
}
