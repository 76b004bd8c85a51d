"""Commands: ``hansa demo | simulate | check | audit | serve | join | ...``, one function each."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated

import typer

from hansa.core.errors import HansaError, InputError

_INTERRUPTED = 130  # typer's exit status after Ctrl-C

app = typer.Typer(
    help="Learn together; keep your data at home.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

AppFile = Annotated[
    Path, typer.Argument(metavar="APP", help="The app: a Python file that defines app = hansa.App(...).")
]
State = Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder that holds the federation's state.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Replace an option of the app, as in schedule.num_rounds=200."),
]


def printable(text: str) -> str:
    r"""A sentence as a terminal may show it: some hold a text of a peer's, or a file's name.

    >>> printable("found \x1b[2J")
    'found \\x1b[2J'
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def main() -> None:
    """Run the command line; an error that hansa raises on purpose is one sentence and an exit status."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except HansaError as error:
        if debug:
            raise
        sys.stderr.write(f"hansa: {printable(str(error))}\n")
        sys.exit(error.exit_status)
    except MemoryError:
        if debug:
            raise
        sys.stderr.write(
            "hansa: expected enough memory, found none left; what was committed is safe: serve and join go on by the "
            "same line on a machine with more\n"
        )
        sys.exit(1)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.stderr.write(
            f"hansa: expected room on the disk, found it full ({error}); what was committed is safe: free some space, "
            "then serve and join go on by the same line\n"
        )
        sys.exit(1)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            sys.stderr.write(
                "hansa: stopped by you; nothing half-written is left; serve and join go on by the same line\n"
            )
        raise


def _version(wanted: bool) -> None:
    if wanted:
        from hansa.version import __version__

        typer.echo(f"hansa {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Learn together; keep your data at home."""


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(metavar="CSV", help="Your own table, one row a patient.")] = None,
    client: Annotated[str, typer.Option(metavar="COLUMN", help="Its column that names the hospital.")] = "hospital",
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Its column to predict (yes if above 0).")] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="Under secure aggregation; shows what the coordinator could see.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to train.")] = 20,
    splits: Annotated[int, typer.Option(min=1, help="Random splits to average the comparison over.")] = 20,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the coordinator and the hospitals running.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="DIR", help="Leave the app and the CSV files there.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the run directory goes.")] = Path("hansa-demo"),
) -> None:
    """The main job, here: a coordinator and four hospital processes on loopback, over mutual TLS.

    Example: [bold]hansa demo[/bold]   or   [bold]hansa demo --data heart.csv --client hospital --label num[/bold]
    """
    from hansa.demo import run_demo

    run_demo(
        data=data,
        client=client,
        label=label,
        num_splits=splits,
        num_rounds=rounds,
        secure=secure,
        keep=keep,
        write=write,
        out=out,
    )


@app.command()
def simulate(
    app_file: AppFile,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder: each file is one client.")] = None,
    seed: Annotated[list[str] | None, typer.Option(help="Seeds: 0, or 0,1,2, or 0-4; may be repeated.")] = None,
    settings: Settings = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also each client alone, and all pooled.")] = False,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="Where clients run: inprocess[:BLOCK_SIZE], processes[:NUM_WORKERS], ray[:NUM_WORKERS], auto (in "
            "process or processes, whichever turns out faster), or virtual[:TRACE.csv] (on a simulated clock).",
        ),
    ] = "inprocess",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the run directory there.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Save each round in --out and go on from it.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where a round's time goes.")] = False,
) -> None:
    """Run an app here, every client on this machine.

    Example: [bold]hansa simulate heart.py --data hospitals/ --baselines --out run[/bold]
    """
    from hansa.commands.simulate import run_simulate

    run_simulate(app_file, data, seeds(seed), settings or [], baselines, runtime, out, resume, profile)


@app.command()
def check(
    app_file: AppFile,
    data: Annotated[Path | None, typer.Option(metavar="PATH", help="Your data, or a folder of clients' files.")] = None,
    settings: Settings = None,
) -> None:
    """Before a run: all problems at once; what leaves a client and who can read it; memory and bytes.

    Example: [bold]hansa check heart.py --data hospitals/[/bold]
    """
    from hansa.commands.check import run_check

    run_check(app_file, data, settings or [])


@app.command()
def audit(
    app_file: AppFile,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder: each file is one client.")] = None,
    show: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="claim: attack the claimed epsilon with canaries. leaks: what an attacker gets from an update and "
            "from the model, with and without the app's settings, in pictures.",
        ),
    ] = "claim",
    canaries: Annotated[int, typer.Option(help="Clients of the auditor's own; more find more.")] = 1000,
    rounds: Annotated[int | None, typer.Option(help="Rounds to attack (default: the schedule's).")] = None,
    seed: Annotated[int, typer.Option(help="Of the canaries and the noise.")] = 0,
    settings: Settings = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where audit.json and the page go; a run directory shows them.")
    ] = Path("hansa-audit"),
) -> None:
    """Attack the app's privacy in a simulation: how much epsilon must be at least, beside what is claimed.

    Exit status 1 where the claim is broken. Example: [bold]hansa audit heart.py --data hospitals/ --out run[/bold]
    """
    from hansa.commands.audit import run_audit

    run_audit(app_file, data, settings or [], show, canaries, rounds, seed, out)


@app.command()
def serve(
    app_file: AppFile,
    state: State,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:8443",
    url: Annotated[str | None, typer.Option(metavar="URL", help="The address that clients use, if another.")] = None,
    seed: Annotated[int, typer.Option(help="The run's seed.")] = 0,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory (default STATE/runs/...).")] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Go on serving the model after the run.")] = False,
) -> None:
    """The coordinator of a real federation; ends with the run. Started again, it goes on where it was.

    Example: [bold]hansa serve heart.py --state fed --listen 0.0.0.0:8443 --url https://fl.example.org:8443[/bold]
    """
    from hansa.commands.serve import run_serve

    run_serve(app_file, state, listen, url, seed, settings or [], out, stay)


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="The client's name; a pattern such as 'gw-*' for a fleet.")],
    state: State,
    uses: Annotated[int, typer.Option(min=1, help="How many clients may join with it.")] = 1,
    expires: Annotated[str, typer.Option(help="Until when, as in 12h or 7d.")] = "7d",
    again: Annotated[
        bool, typer.Option("--again", help="Replace a lost machine's key; the old one is revoked.")
    ] = False,
) -> None:
    """Make one join token; the last line of the output is the token alone.

    Example: [bold]hansa invite charite --state fed | tail -1 > charite.token[/bold]
    """
    from hansa.commands.serve import run_invite

    run_invite(name, state, uses, expires, again)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The client's name.")], state: State) -> None:
    """Refuse a client from now on.

    Example: [bold]hansa revoke charite --state fed[/bold]
    """
    from hansa.commands.serve import run_revoke

    run_revoke(name, state)


@app.command()
def join(
    token: Annotated[str, typer.Argument(help="The join token, or @FILE, or - for standard input.")],
    app_file: Annotated[Path, typer.Argument(metavar="APP", help="The app file, or a folder of apps.")],
    data: Annotated[str, typer.Option(metavar="PATH", help="For the app's load_data; or my_data.py:load.")],
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="Key, memory and sent.csv live here.")] = None,
    device: Annotated[str | None, typer.Option(help="Where torch trains, as in cuda:1.")] = None,
    epsilon_budget: Annotated[
        float | None,
        typer.Option("--epsilon-budget", metavar="EPSILON", help="Most privacy to spend on these data, in all runs."),
    ] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="The delta of the budget (1e-6).")] = None,
    budget_dir: Annotated[
        Path | None, typer.Option("--budget-dir", metavar="DIR", help="Where budgets are kept (~/.hansa/budgets).")
    ] = None,
    peers: Annotated[
        Path | None,
        typer.Option("--peers", metavar="FILE", help="Sum securely only with these: lines that hansa status showed."),
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Wait for the next run after this one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train one round, write what it would send, send nothing.")
    ] = False,
) -> None:
    """Take part with your own data; the same line after a restart goes on.

    Example: [bold]hansa join @charite.token heart.py --data charite.csv[/bold]
    """
    from hansa.commands.join import Allowance, run_join

    allowance = Allowance(epsilon=epsilon_budget, delta=delta, folder=budget_dir)
    run_join(token, app_file, data, state, device, allowance, stay, dry_run, peers)


@app.command()
def status(
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="A coordinator's or a client's folder.")] = Path(
        "."
    ),
    json: Annotated[bool, typer.Option("--json", help="For a monitor: exit status 1 when a person is needed.")] = False,
) -> None:
    """What is going on: the round and every client; at a client, what was asked, sent and refused.

    Example: [bold]hansa status --state fed[/bold]
    """
    from hansa.commands.status import run_status

    run_status(state, json)


@app.command()
def log(
    where: Annotated[Path, typer.Argument(metavar="RUN_OR_STATE", help="A run directory, or a coordinator's --state.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that nothing was changed: exit status 1 if so.")
    ] = False,
    client: Annotated[str | None, typer.Option("--client", metavar="NAME", help="Only what this client did.")] = None,
) -> None:
    """The audit log: who did what, each line chained to the one before, and its check, offline.

    Example: [bold]hansa log run --verify[/bold]
    """
    from hansa.commands.log import run_log

    run_log(where, verify, client)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page there.")] = None,
) -> None:
    """The page of results of a run, as one HTML file.

    Example: [bold]hansa report run --out results.html[/bold]
    """
    from hansa.training.report import write_report

    typer.echo(str(write_report(run, out)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of several seeds.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture or page: .html, .pdf, .png or .svg.")
    ] = None,
) -> None:
    """Several runs side by side, with mean and spread over seeds.

    Example: [bold]hansa compare fedavg fedprox --out comparison.html[/bold]
    """
    from hansa.commands.compare import run_compare

    run_compare(runs, out)


def seeds(given: list[str] | None) -> list[int]:
    """Seeds from ``0``, ``0,1,2`` and ``0-4``.

    >>> seeds(["0,3", "7-9"])
    [0, 3, 7, 8, 9]
    """
    found: list[int] = []
    for text in ",".join(given or ["0"]).split(","):
        first, dash, last = text.strip().partition("-")
        try:
            found += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise InputError(f"--seed {text}: expected a whole number, a list as 0,1,2 or a range as 0-4") from None
    if not found:
        raise InputError("--seed: expected at least one seed, found none")
    return found


if __name__ == "__main__":
    main()
