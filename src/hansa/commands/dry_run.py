"""``hansa join --dry-run``: train one round on one's own data, write what would be sent, and send nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hansa.aggregators.mean import Mean
from hansa.commands.rehearsal import rehearse
from hansa.core.key import Key
from hansa.core.protocols import Plan, Slot
from hansa.core.round import Context, ServerState, begin, make_plan
from hansa.data.dataset import Dataset
from hansa.federation import Federation, Pair
from hansa.network.budget import DELTA, Budget
from hansa.network.participant import in_the_clear
from hansa.network.pricing import priced
from hansa.privacy import events
from hansa.privacy.events import Event
from hansa.terminal import bytes_words, new_table
from hansa.training.apps import App
from hansa.training.privacy import bound
from hansa.wire import pack_report

if TYPE_CHECKING:
    from hansa.commands.join import Allowance


def dry_run(screen: Console, federation: Federation, name: str, load: Callable[[], Pair], folder: Path) -> None:
    """Write each body of a first round to ``folder/dry-run``; pooled sums are this client's own alone."""
    key, out = Key.of("dry run"), folder / "dry-run"
    out.mkdir(parents=True, exist_ok=True)
    train, test = load()
    table = new_table("what would leave this machine in round 1")
    for column in ("kind", "bytes", "file", "protection"):
        table.add_column(column)
    totals: list[Any] = []
    for number, preparation in enumerate(federation.prepare):
        if getattr(preparation, "is_public", False):
            totals.append(np.zeros(0))
            continue
        plan, known = _plan(federation, Slot(number, 0, "update", "prepare"), key, totals), list(totals)
        visible = replace(federation, aggregator=Mean())  # its own sums, for what comes after
        [(_, report)] = rehearse(visible, plan, name, _rows(federation, plan, name, (train, test), known))
        totals.append(np.asarray(report.payload.values[0], dtype=np.float64))
        for told, said in rehearse(federation, plan, name, _rows(federation, plan, name, (train, test), known)):
            _write(table, out, "statistics", said, federation, told)
    for task, kind in (("train", "update"), ("evaluate", "metrics")):
        plan = _plan(federation, Slot(0, 0, "update", task), key, totals)
        if task == "evaluate" and (not federation.sends_metrics or test is None):
            continue
        for told, report in rehearse(federation, plan, name, _rows(federation, plan, name, (train, test), totals)):
            for reason in report.refused.values():
                screen.print(f"[yellow]this client would be left out of the round[/yellow]: {reason}")
            if report.clients:
                _write(table, out, kind, report, federation, told)
    screen.print(table)
    screen.print(f"nothing was sent; the bodies lie in {out} (safetensors)")


def price_once(screen: Console, app: App, budget: Budget | None, allowance: Allowance) -> None:
    """Say what one round would cost of the owner's privacy budget, as far as this machine can know; spend nothing."""
    if budget is None and allowance.epsilon is None:
        return
    federation = bound(app.federation, app.schedule, app.schedule.clients_needed)
    train = federation.task("train")
    state = begin(train, np.zeros(federation.learner.layout.num_params, np.float32), federation.update_size())
    settings = make_plan(train, state, Context(Key.of("dry run")), (), Slot(0, 0, "update")).settings
    price = priced(federation, Slot(0, 0, "update"), settings)
    delta = budget.delta if budget and allowance.delta is None else allowance.delta or DELTA
    epsilon = budget.epsilon if budget and allowance.epsilon is None else allowance.epsilon
    if price is None:
        screen.print(f"[yellow]a privacy budget of epsilon {epsilon:g} refuses this app[/yellow]: no noise to count")
        return
    before = Counter[Event]() if budget is None else budget.counted
    alone, then = (
        events.cost(counted, delta, neighbours="zero out one").epsilon
        for counted in (Counter([price.event]), before + Counter([price.event]))
    )
    screen.print(
        f"privacy: a round costs epsilon {alone:.3g} at delta {delta:g} by itself (noise {price.kept}); of the budget "
        f"of {epsilon:g}, {then:.3g} would be spent after it",
        soft_wrap=True,
    )


def _plan(federation: Federation, slot: Slot, key: Key, totals: list[Any]) -> Plan:
    context = Context(key, federation.learner.layout, {f"prepare.{i}": total for i, total in enumerate(totals)})
    params = np.asarray(federation.learner.initial(key.child("initial")), np.float32)
    parts = federation.parts(slot)
    state = begin(federation.task("train"), params, federation.update_size())
    if slot.task == "prepare":
        state = ServerState({}, ())
    elif slot.task == "evaluate":
        state = ServerState(state.algorithm, ())
    return make_plan(parts, state, context, (), slot)


def _rows(federation: Federation, plan: Plan, name: str, pair: Pair, totals: list[Any]) -> Dataset:
    """What the plan's task is about, prepared."""
    train, test = pair
    ready = federation.prepared(train, totals)
    if plan.slot.task != "prepare":
        federation.learner.check(ready, name)
    if plan.slot.task == "evaluate":
        ready = ready.take([]) if test is None else federation.prepared(test, totals)
    return ready


def _write(table: Table, out: Path, kind: str, report: Any, federation: Federation, plan: Plan) -> None:
    body = pack_report(report, federation.codec(plan.slot))
    kind = kind if plan.learn else plan.slot.exchange
    file = out / f"{plan.slot.task}-{plan.slot.round}-{kind}.safetensors"
    file.write_bytes(body)
    table.add_row(kind, bytes_words(len(body)), file.name, in_the_clear(federation, plan.slot))
