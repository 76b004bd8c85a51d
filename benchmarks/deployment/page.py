"""results.md: one table, what missed its bar, and what is not equal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trials import Killed, Row, Timed, Traffic

SERVING_BAR_S = 3.0
SHORT = {
    "hansa serve": "coordinator",
    "flower-superlink": "SuperLink",
    "flower-superexec": "SuperExec",
    "flwr-serverapp": "ServerApp",
    "hansa join": "hansa join",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
}
LEGEND = """\
A column is a way of running the whole, everything over loopback on one machine. **Round**: seconds from the beginning
of a round to that of the next, median and range of {num_rounds} rounds after one to warm up. **Set-up**: from the first
command to the beginning of the first round: certificates, keys or tokens, server, {num_clients} clients one after the
other, the run. **Memory**: highest sum of what all processes of the server held at one moment, looked at ten times a
second, and each one's own high-water mark (VmHWM); pages of files that are mapped count. **Bytes**: through a TCP proxy
that counts, in a run of its own, second round, server and all clients together: TLS and HTTP included, Flower's traffic
between its own processes on one machine not. **kill -9**: three rounds of the {killed_mb:g} MB model; half of the
clients take {slow_s:.0f} s to train; when the others' updates of round 2 have arrived, the server is killed and started
again at once by the same command. For Flower that is the SuperLink, with which its ServerApp ends unless that was
started apart; the last column kills both, as a machine that goes down does.
"""
UNEQUAL = """\
## What is not equal

- **Durability.** hansa has one way to run: whatever is acknowledged is on disk (fsync, at the clients too), and a
  round is a pure function of it. Flower keeps everything in memory unless it is given `--database`; that column is the
  nearest to hansa's (SQLite, `synchronous=NORMAL`: it outlives a kill, not every loss of power), and its SuperNodes
  keep nothing.
- **Who proves what.** hansa: mutual TLS, every request signed, every accepted update receipted, a hash-chained log.
  Flower: TLS of the server, SuperNodes registered by public key (`--enable-supernode-auth`) and every request signed by
  that key; chunks are named by their SHA-256.
- **Processes.** hansa: the coordinator and one process a client. Flower: SuperLink, SuperExec and ServerApp, and at
  each client SuperNode, SuperExec and a ClientApp that is started anew for every message (its only way but Kubernetes).
  Models travel once more from SuperNode to ClientApp and back, over HTTP within the client's machine, without TLS.
- **Asking.** As it comes, Flower's ServerApp looks for replies every 3 s, its SuperExec for work every 1 s and its
  SuperNode every 3 s: most of a small model's round. "Asking every 0.1 s" changes what can be changed from outside:
  `FLWR_SUPEREXEC_TASK_POLL_INTERVAL`, and a ServerApp that asks by `pull_messages` itself. hansa's clients wait in a
  request that is answered as soon as there is work.
- **Chunks.** Flower's own (5 MB, two at a time), on by default. Every client's update and every stretch of the model
  differ, so that nothing is sent once for two.
- **Result.** Flower averages new parameters in the type and the order in which they come, so that two of its runs may
  differ in the last bits. hansa sums updates in float64 in an order of their own. Both are compared with NumPy's
  float64.
- Telemetry and update checks of Flower are off; so is installing the app's dependencies, of which it has none.
"""


@dataclass(frozen=True)
class Bar:
    """Something that is claimed; ``is_met`` None where it was not measured."""

    claim: str
    is_met: bool | None

    def __str__(self) -> str:
        return f"{self.claim}: {'not measured' if self.is_met is None else 'met' if self.is_met else 'MISSED'}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """All records of one call of the benchmark."""

    rows: Sequence[Row]
    timed: Sequence[Timed]
    traffic: Sequence[Traffic]
    killed: Sequence[Killed]

    @property
    def sizes(self) -> list[float]:
        """The models' megabytes, in order."""
        return sorted({one.megabytes for one in self.timed})

    def timed_of(self, row: str, megabytes: float) -> Timed | None:
        """The timed run of a row, unless it failed."""
        found = (one for one in self.timed if (one.row, one.megabytes) == (row, megabytes) and not one.error)
        return next(found, None)

    def traffic_of(self, row: str, megabytes: float) -> Traffic | None:
        """The counted run of a row, unless it failed."""
        found = (one for one in self.traffic if (one.row, one.megabytes) == (row, megabytes) and not one.error)
        return next(found, None)

    def killed_of(self, row: str) -> Killed | None:
        """The run of a row whose server was killed, unless it failed."""
        return next((one for one in self.killed if one.row == row and not one.error), None)

    def errors(self) -> list[str]:
        """What could not be measured, and why."""
        found = [(one.row, f"{one.megabytes:g} MB", one.error) for one in (*self.timed, *self.traffic)]
        found += [(one.row, "kill -9", one.error) for one in self.killed]
        return [f"{row}, {what}: {error}" for row, what, error in found if error]


def median_s(timed: Timed) -> float:
    """Seconds a round, without the first."""
    return statistics.median(timed.seconds[1:])


def bars(results: Results) -> list[Bar]:
    """What hansa claims of itself here."""
    peers = [row.name for row in results.rows if row.setting is not None]
    found = [Bar("every result is NumPy's", all(one.is_right for one in results.timed) if results.timed else None)]
    for megabytes in results.sizes:
        own = results.timed_of("hansa", megabytes)
        others = [one for name in peers if (one := results.timed_of(name, megabytes)) is not None]
        both = own is not None and bool(others)
        fastest = own is not None and all(median_s(own) <= median_s(other) for other in others)
        smallest = own is not None and all(own.server_together <= other.server_together for other in others)
        found.append(Bar(f"{megabytes:g} MB: hansa's round is the fastest", fastest if both else None))
        found.append(Bar(f"{megabytes:g} MB: hansa's server needs the least memory", smallest if both else None))
    own_kill = next((one for one in results.killed if one.row == "hansa"), None)
    goes_on = None if own_kill is None else not own_kill.error and own_kill.goes_on and own_kill.same_bits
    found.append(Bar("kill -9: hansa's run goes on to the same bits", goes_on))
    kept = None if own_kill is None else not own_kill.error and own_kill.goes_on and own_kill.again == 0
    found.append(Bar("kill -9: no client of hansa's trains twice", kept))
    served = None if own_kill is None else not own_kill.error and own_kill.serving_s < SERVING_BAR_S
    found.append(Bar(f"kill -9: hansa answers again within {SERVING_BAR_S:g} s", served))
    return found


def markdown(results: Results, said: str, versions: Mapping[str, str], legend: Mapping[str, float]) -> str:
    """The whole page; ``said`` is the machine and the date."""
    installed = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts = [
        f"# Deployment: hansa and Flower, {legend['num_clients']:g} clients, TLS\n",
        f"{said}. Flower's environment: {installed or 'not installed'}.\n",
        table(results),
        LEGEND.format(**legend),
        "## Bars\n\n" + "".join(f"- {bar}\n" for bar in bars(results)),
    ]
    if errors := results.errors():
        parts.append("## Could not be measured\n\n" + "".join(f"- {error}\n" for error in errors))
    return "\n".join([*parts, UNEQUAL])


def table(results: Results) -> str:
    """One column a row of ``results.rows``, one line a measure."""
    lines = [
        "| | " + " | ".join(row.title for row in results.rows) + " |",
        "|---" * (len(results.rows) + 1) + "|",
    ]

    def add(title: str, cell: Callable[[Row], str]) -> None:
        cells = [cell(row) for row in results.rows]
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for size in results.sizes:
        add(f"round, {size:g} MB: s", lambda row, size=size: _round(results.timed_of(row.name, size)))
    for size in results.sizes:
        add(f"server's memory, {size:g} MB: MB", lambda row, size=size: _server(results.timed_of(row.name, size)))
    for size in results.sizes:
        add(f"a client's memory, {size:g} MB: MB", lambda row, size=size: _client(results.timed_of(row.name, size)))
    for size in results.sizes:
        add(f"a round's bytes, {size:g} MB: MB down, up", lambda row, size=size: _bytes(results, row, size))
    for size in results.sizes[:1]:
        add("set-up: s", lambda row, size=size: _setup(results.timed_of(row.name, size)))
    for size in results.sizes:
        add(f"largest error, {size:g} MB", lambda row, size=size: _off(results.timed_of(row.name, size)))
    add("kill -9: answers again after s", lambda row: _killed(results, row, lambda one: f"{one.serving_s:.1f}"))
    add("kill -9: the run", lambda row: _killed(results, row, _what_became))
    add("kill -9: lost", lambda row: _killed(results, row, _lost))
    return "\n".join(lines) + "\n"


def _round(one: Timed | None) -> str:
    if one is None:
        return ""
    counted = one.seconds[1:]
    return f"**{_digits(median_s(one))}** ({_digits(min(counted))} to {_digits(max(counted))})"


def _server(one: Timed | None) -> str:
    return "" if one is None else _peaks(one.server_together, one.server_bytes)


def _client(one: Timed | None) -> str:
    return "" if one is None else _peaks(one.client_together, one.client_bytes)


def _peaks(together: int, kinds: Mapping[str, int]) -> str:
    if len(kinds) == 1:
        return f"**{max(together, *kinds.values()) / 1e6:,.0f}**"
    each = ", ".join(f"{SHORT[kind]} {peak / 1e6:,.0f}" for kind, peak in kinds.items())
    return f"**{together / 1e6:,.0f}** ({each})"


def _bytes(results: Results, row: Row, megabytes: float) -> str:
    one = results.traffic_of(row.name, megabytes)
    return "" if one is None else f"{one.down / 1e6:,.1f}, {one.up / 1e6:,.1f}"


def _setup(one: Timed | None) -> str:
    return "" if one is None else f"{one.setup_s:.0f}"


def _off(one: Timed | None) -> str:
    return "" if one is None else f"{one.off:.0e}{'' if one.is_right else ' WRONG'}"


def _killed(results: Results, row: Row, cell: Callable[[Killed], str]) -> str:
    one = results.killed_of(row.name)
    return "" if one is None else cell(one)


def _what_became(one: Killed) -> str:
    if one.goes_on:
        return f"goes on, done {one.waited_s:.0f} s after the kill"
    done = "not done in time" if one.afresh_s is None else f"done {one.afresh_s:.0f} s later, from round 1"
    again = f"; `flwr run` by hand: {done}" if one.row != "hansa" else ""
    return f"does not go on: {one.status} after {one.waited_s:.0f} s{again}"


def _lost(one: Killed) -> str:
    if not one.goes_on:
        return f"the run: round 1, and {one.reported} updates of round 2"
    same = "the result has the same bits" if one.same_bits else "the result has other bits"
    return (
        f"nothing; {one.again} trainings done again; {same}"
        if not one.again
        else (f"{one.again} trainings done again; {same}")
    )


def _digits(seconds: float) -> str:
    """Three digits that count."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
