"""results.md: a table a workload, who could not run and why, versions and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from measure import Record
from rows import Row
from summary import Line
from workloads import SETTINGS

HEAD = (
    "| | setting | s a round | range | × hansa | × bare loop | RSS, PSS MiB | ready, first result s "
    "| rounds | loss | off |"
)
LEGEND = """\
Seconds a round, without the first: median over rounds (LR-on-MNIST: mean), then median over repeats, which take turns;
range: over repeats. × hansa: times the TorchLearner row's. Memory: highest sum over all processes, examples included;
shared pages count in each (RSS) or once (PSS). Start-up: from the command until the first round begins (ready) and
until it has ended (imports, loading, compiling, starting workers). Off: final loss against the bare loop's after as
many rounds. Bold: hansa; italic: written by hand.
"""
KINDS = {"hansa": "**{}**", "line": "*{}*", "peer": "{}"}
DRAWS = {
    "nothing": "nothing",
    "filling": "a short batch filled up with first rows",
    "order": "the order of a client's rows",
    "clients": "the clients",
}


def markdown(
    lines: Sequence[Line], records: Sequence[Record], versions: Mapping[str, Mapping[str, str]], said: str
) -> str:
    """The whole page; ``said`` is the machine and the options."""
    parts = [f"# Simulation: seconds a round\n\n{said}\n"]
    parts.append(LEGEND)
    parts += [_workload(name, [line for line in lines if line.workload == name]) for name in _names(lines)]
    failed = {(r.row, r.workload): r.error for r in records if r.error}
    if failed:
        parts.append(
            "## Could not run\n\n" + "".join(f"- {row}, {name}: {why}\n" for (row, name), why in failed.items())
        )
    parts.append(_versions(lines, versions))
    return "\n".join(parts)


def seconds(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: float) -> str:
    """Two digits that count, no powers of ten."""
    return "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def times(line: Line, base: float) -> str:
    """How many times ``base`` its seconds are; "over" that where it had fewer clients than the others."""
    told = ratio(line.seconds / base)
    return f"over {told}" if line.row.only_clients and told else told


def _names(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line.workload for line in lines))


def _workload(name: str, lines: Sequence[Line]) -> str:
    has_accuracy = any(not math.isnan(line.accuracy) for line in lines)
    head = HEAD + (" accuracy |" if has_accuracy else "")
    by_name = {line.row.name: line.seconds for line in lines}
    rule = "|---" * (head.count("|") - 1) + "|"
    text = [f"## {name}: {SETTINGS[name].says}\n", head, rule]
    for line in lines:
        cells = [
            KINDS[line.row.kind].format(line.row.title),
            line.setting,
            seconds(line.seconds),
            f"{seconds(min(line.repeats))} to {seconds(max(line.repeats))}",
            *(times(line, by_name.get(name, math.nan)) for name in ("hansa", "R0")),
            f"{line.rss:,.0f}, {line.pss:,.0f}" if line.rss else "not known",
            f"{line.startup:.1f}, {line.first_result:.1f}",
            str(line.num_rounds),
            f"{line.loss:.4f}",
            "" if math.isnan(line.off) else f"{line.off:.2%}{'' if line.agrees else ' DISAGREES'}",
        ]
        cells += [f"{line.accuracy:.3f}"] if has_accuracy else []
        text.append("| " + " | ".join(cells) + " |")
    if has_accuracy:
        text.append("\nAccuracy: on all clients' held-out rows, mean of the last 10 rounds and of the repeats' seeds.")
    return "\n".join(text) + "\n"


def _versions(lines: Sequence[Line], versions: Mapping[str, Mapping[str, str]]) -> str:
    text = [
        "## Versions, settings, tolerances\n",
        "| | versions | tuned | draws itself | loss may be off by |",
        "|---" * 5 + "|",
    ]
    for row in {line.row.name: line.row for line in lines}.values():
        installed = ", ".join(f"{name} {number}" for name, number in versions.get(row.name, {}).items())
        text.append(f"| {row.title} | {installed} | {row.tuned} | {DRAWS[row.draws]} | {_tolerances(row, lines)} |")
    return "\n".join(text) + "\n"


def _tolerances(row: Row, lines: Sequence[Line]) -> str:
    own = {line.workload: line.tolerance for line in lines if line.row.name == row.name}
    wider = {name: share for name, share in own.items() if share != min(own.values())}
    return ", ".join([f"{min(own.values()):.1%}", *(f"{share:.1%} on {name}" for name, share in wider.items())])
