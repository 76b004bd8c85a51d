"""What a person sees in the terminal: progress, tables, sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hansa.training.history import Row
from hansa.training.profile import WORDS

BETTER_LOW = ("loss", "mse")


def console(*, error: bool = False) -> Console:
    """The terminal, without colours where there is none."""
    return Console(stderr=error, highlight=False, soft_wrap=True)


@contextmanager
def progress(out: Console, num_rounds: int, title: str) -> Iterator[Callable[[Row], None]]:
    """Show each round as it comes: a bar on a terminal, at most about twenty lines in a file."""
    if out.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[scores]}"), console=out, transient=True) as bar:
            task = bar.add_task(title, total=num_rounds, scores="")
            yield lambda row: bar.update(task, completed=row.round + 1, scores=round_words(row) + _spent(row))
        return
    every = max(1, num_rounds // 20)

    def line(row: Row) -> None:
        if (row.round + 1) % every == 0 or row.round + 1 == num_rounds or row.round == 0:
            out.print(
                f"round {row.round + 1} of {num_rounds}  {round_words(row)}  {row.num_clients} clients{_spent(row)}"
            )

    yield line


def _spent(row: Row) -> str:
    """Epsilon so far, where there is one."""
    return "" if row.epsilon is None else f"  epsilon {row.epsilon:.3g}"


def round_words(row: Row) -> str:
    """Loss and metrics of a round in a few words."""
    shown = {"loss": row.loss, **row.metrics}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if not math.isnan(value))


def bytes_words(count: float) -> str:
    """A number of bytes as people read it.

    >>> bytes_words(61_400)
    '61.4 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def metrics_table(title: str, rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Table:
    """One row a name, one column a metric."""
    table = new_table(title)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row, scores in rows.items():
        table.add_row(row, *(number(scores.get(name)) for name in names))
    return table


def harmless(text: str) -> str:
    r"""A text from elsewhere as it may be printed: no control characters, and nothing that rich takes for markup.

    >>> harmless("[/bold] \x1b[31m")
    '\\[/bold] \\x1b[31m'
    """
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text))


def new_table(title: str = "", *, tight: bool = False) -> Table:
    """An empty table; ``tight`` for one of many columns."""
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0 if tight else (0, 1),
    )


def comparison_table(title: str, baselines: Mapping[str, Any], names: Sequence[str]) -> Table:
    """Each client alone, federated and pooled, on its own held-out rows and on everyone's: two metrics at most."""
    names = list(names)[:2]
    table = new_table(title)
    table.add_column("held-out rows of")
    for name in names:
        for way in ("alone", "federated", "pooled"):
            table.add_column(f"{name}\n{way}", justify="right")
    for client, ways in baselines["clients"].items():
        table.add_row(client, *_cells(ways, names))
    table.add_section()
    table.add_row("everyone", *_cells(baselines["everyone"], names), style="bold")
    return table


def profile_table(profile: Mapping[str, Any], more: str = "") -> Table:
    """Seconds by stage of a median round and of the first one; those of workers are a mean worker's."""
    first, median, workers = profile["first_round"], profile["median_round"], profile["workers"]
    whole = sum(median.values())
    unit, digits, times = ("s", 3, 1) if whole >= 1 else ("ms", 2, 1000)
    table = new_table(f"where a round's time goes{more}")
    for name in ("", f"{unit} a round", "share", f"first round, {unit}"):
        table.add_column(name, justify="right" if name else "left")

    def row(words: str, usual_s: float, first_s: float, style: str = "") -> None:
        shown = (f"{times * usual_s:.{digits}f}", f"{usual_s / whole:.1%}", f"{times * first_s:.{digits}f}")
        table.add_row(words, *shown, style=style)

    for name in (name for name in WORDS if name in median or name in first):
        row(WORDS[name], median.get(name, 0.0), first.get(name, 0.0))
    row("the whole round", whole, sum(first.values()), "bold")
    if workers:
        count, usual, began = workers["num_workers"], workers["median_round"], workers["first_round"]
        table.add_section()
        row(f"in {count} workers, the mean of them", sum(usual.values()) / count, sum(began.values()) / count)
        for name in (name for name in WORDS if name in usual or name in began):
            row(f"  {WORDS[name]}", usual.get(name, 0.0) / count, began.get(name, 0.0) / count)
    return table


def _cells(ways: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        alone, federated = ways["alone"].get(name, math.nan), ways["federated"].get(name, math.nan)
        gained = federated < alone if name in BETTER_LOW else federated > alone
        shown = number(federated)
        cells += [number(alone), f"[green]{shown}[/green]" if gained else shown, number(ways["pooled"].get(name))]
    return cells


def number(value: float | None) -> str:
    """Three decimals, or a dash for what is not known."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of what is known; NaN where nothing is."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return math.nan, math.nan
    mean = sum(known) / len(known)
    spread = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1)) if len(known) > 1 else math.nan
    return mean, spread
