"""``simulate``: a whole federation on this machine, from one call."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Array
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.source import Source
from hansa.federation import Federation, Pair, named_totals
from hansa.runtimes.auto import Auto
from hansa.runtimes.inprocess import InProcess, InProcessRuntime
from hansa.statistics import Questions
from hansa.stopwatch import watching
from hansa.training.apps import check_holdout
from hansa.training.baselines import baselines_of
from hansa.training.check import refuse_unfit
from hansa.training.checkpoint import Checkpoint, lasting_repr
from hansa.training.history import Row
from hansa.training.loop import Loop
from hansa.training.outcome import outcome
from hansa.training.privacy import bound
from hansa.training.profile import profile_of
from hansa.training.run import Run, starting_params
from hansa.training.schedule import Schedule

OnRound = Callable[[Row], bool | None]


def simulate(
    federation: Any,
    population: Population | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    holdout: float | None = None,
    evaluate_on: Dataset | None = None,
    start_from: Any = None,
    baselines: bool = False,
    on_round: OnRound | None = None,
    runtime: Any = None,
    checkpoint: str | Path | None = None,
    profile: bool = False,
    **schedule: Any,
) -> Run:
    """Train a federation over a population in this process.

    ``federation`` is a ``Federation`` or an ``App`` (whose schedule, holdout, population, ... are then the defaults).
    The fields of ``Schedule`` are given by name: ``num_rounds=``, ``cohort_size=``, .... ``holdout`` sets that share of
    each client's rows aside for good, by the client's name; ``baselines`` also trains each client alone and all pooled;
    ``on_round(row)`` may return False to stop early. With ``checkpoint=PATH`` every round is saved there, and a call
    with the same arguments goes on from it to the same bits. With ``profile`` it is measured where the rounds' time
    goes: ``run.info["profile"]`` holds seconds by stage, of the first round and of a median one after it.

    Raises ``InputError`` for what cannot be used and ``CheckError`` for a federation that does not fit together.

    >>> import hansa, numpy as np
    >>> x = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32)
    >>> hospitals = {name: hansa.Dataset(x, np.array([0, 0, 1, 1])) for name in ("berlin", "lyon")}
    >>> federation = hansa.Federation(
    ...     learner=hansa.LinearLearner(num_features=1, num_classes=2), algorithm=hansa.FedAvg(client_learning_rate=1.0)
    ... )
    >>> run = hansa.simulate(federation, hospitals, num_rounds=5)
    >>> run.predict(np.array([[-3.0], [3.0]])).tolist(), run.history[-1].num_clients
    ([0, 1], 2)
    """
    app = federation if hasattr(federation, "federation") else None
    if app is not None:
        federation, holdout = app.federation, app.holdout if holdout is None else holdout
        start_from = app.start_from if start_from is None else start_from
        evaluate_on = app.evaluate_on() if evaluate_on is None and app.evaluate_on else evaluate_on
    if not isinstance(federation, Federation):
        raise InputError(f"simulate: expected a hansa.Federation or hansa.App, found {type(federation).__name__}")
    check_holdout(holdout)
    simulation = _Simulation(
        federation=federation,
        population=_population(app, population),
        schedule=_schedule(app, schedule),
        seed=seed,
        holdout=holdout,
        evaluate_on=evaluate_on,
        start_from=start_from,
        on_round=on_round,
        runtime=_runtime(runtime),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        profile=profile,
        app=app,
    )
    run = simulation.run()
    if baselines:
        run.info["baselines"] = simulation.baselines(run)
    return run


@dataclass(frozen=True, kw_only=True)
class _Simulation:
    """What ``simulate`` was asked for, with every default filled in."""

    federation: Federation
    population: Population
    schedule: Schedule
    seed: int
    holdout: float | None
    evaluate_on: Dataset | None
    start_from: Any
    on_round: OnRound | None
    runtime: Any
    checkpoint: Path | None
    profile: bool
    app: Any

    def run(self) -> Run:
        """Check, train and score."""
        started, key = datetime.datetime.now(datetime.UTC), Key.of(self.seed)
        refuse_unfit(self.federation, self.schedule, len(self.population))
        own = _simulated(bound(self.federation, self.schedule, len(self.population)), self.schedule)
        _check_clients(own, self.population, self.load)
        site = self.runtime.open(own, self.load, key.child("secrets"), keep=self.load.keep)
        try:
            return self._run(own, site, key, started)
        finally:
            site.close()

    def _run(self, own: Federation, site: Any, key: Key, started: datetime.datetime) -> Run:
        """Train and score in a runtime that is open."""
        site.min_clients = self.schedule.min_clients or 0
        site.num_rounds = self.schedule.num_rounds
        loop = Loop(
            federation=own,
            schedule=self.schedule,
            runtime=site,
            key=key,
            clients=lambda: self.population.ids,
            params=initial_params(own, key, self.start_from),
            evaluate_on=self.evaluate_on,
            on_round=self.on_round,
        )
        with watching(self.profile) as watch:
            point = self._trained(loop, site)
        sizes = _sizes(self.population, self.load)
        return outcome(
            loop,
            point,
            sizes,
            [client for client, (_, num_test) in sizes.items() if num_test],
            app=self.app,
            seed=self.seed,
            started=started,
            simulated=True,
            runtime=str(site),
            skew=self.population.skew().as_json(),
            bodies=site.traffic.as_json(),
            refused=site.refusals(),
            notes=_notes(own, self.population, self.load, point),
            **({"profile": profile_of(watch.rounds)} if self.profile else {}),
        )

    def baselines(self, run: Run) -> dict[str, Any]:
        """Each client alone and all pooled, beside ``run``."""
        return baselines_of(run, self.federation, self.schedule, self.population, self.load, Key.of(self.seed))

    @property
    def load(self) -> Source:
        """A client's training and held-out rows: its own pair, or a share set aside by the client's name."""
        return Source(self.population, self.holdout)

    def _trained(self, loop: Loop, site: InProcessRuntime) -> Checkpoint:
        """Run the loop, saving each round and going on from it where there is a checkpoint."""
        path = self.checkpoint
        if path is None:
            return loop.run()
        settings = self._settings(loop.federation)
        loop.save = lambda point: replace(point, settings=settings, clients=site.kept()).write(path)
        if not path.exists():
            return loop.run()
        resume = Checkpoint.read(path)
        if resume.settings != settings:
            raise InputError(
                f"checkpoint {path}: expected one of this federation, schedule, population and seed, found another's; "
                "delete it or give another path"
            )
        site.restore(resume.clients)
        return loop.run(resume)

    def _settings(self, federation: Federation) -> str:
        """A hash that names what a checkpoint belongs to; the number of rounds may grow."""
        schedule = lasting_repr(replace(self.schedule, num_rounds=1))
        named = (lasting_repr(federation), schedule, self.seed, self.population.ids, self.holdout)
        return hashlib.sha256(repr(named).encode()).hexdigest()


def _simulated(federation: Federation, schedule: Schedule) -> Federation:
    """The federation with what stands for its aggregator in a simulation, where that is another."""
    instead = getattr(federation.aggregator, "simulated", None)
    if instead is None:
        return federation
    return replace(federation, aggregator=instead(buffered=schedule.buffer is not None))


def initial_params(federation: Federation, key: Key, start_from: Any) -> Array:
    """Where the run starts: ``start_from``, or the learner's initial parameters for this seed."""
    if start_from is not None:
        return starting_params(start_from, federation.learner.layout)
    return np.asarray(federation.learner.initial(key.child("initial")), dtype=np.float32)


def _check_clients(
    federation: Federation, population: Population, load: Callable[[str], Pair], limit: int = 100
) -> None:
    """Look at up to ``limit`` clients before round 0; the others are looked at when they first take part."""
    num_examples = 0
    for client in population.ids[:limit]:
        pair = load(client)
        federation.check_data(pair, client)
        num_examples += len(pair[0])
    if not num_examples and len(population) <= limit:
        raise InputError(
            f"simulate: expected training examples, found none at any of the {len(population)} clients; look at "
            "load_data and holdout"
        )


def _notes(federation: Federation, population: Population, load: Callable[[str], Pair], point: Checkpoint) -> list[str]:
    """Sentences worth a reader's eye: what preparation found, and what was not scored."""
    said: list[str] = []
    if hasattr(federation.aggregator, "secure"):
        said.append(
            "Secure sums are those of the ideal functionality, the same numbers without the cryptography; "
            'SecureMean(simulate="protocol") runs all of it.'
        )
    if federation.prepare and point.totals:
        dataset, _ = load(population.ids[0])
        for preparation, total in zip(federation.prepare, point.totals, strict=True):
            named = named_totals(preparation, dataset, total)
            said += preparation.check(named, getattr(dataset, "feature_names", None))
            dataset = preparation.apply(dataset, named)
    if not federation.sends_metrics and not point.scored_on and not isinstance(federation.learner, Questions):
        said.append("Clients send no metrics beside noise: give evaluate_on= to score each round.")
    return said


def _schedule(app: Any, given: Mapping[str, Any]) -> Schedule:
    """The app's schedule with what was given by name, or a new one."""
    known = [field.name for field in fields(Schedule)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"simulate: unknown options {unknown}; a schedule has {', '.join(known)}")
    given = {name: value for name, value in given.items() if value is not None}
    if app is not None:
        planned: Schedule = replace(app.schedule, **given)
        return planned
    if "num_rounds" not in given:
        raise InputError("simulate: expected num_rounds=, found none; give num_rounds=50, say")
    return Schedule(**given)


def _population(app: Any, population: Any) -> Population:
    if population is None and app is not None and app.population is not None:
        population = app.population()
    if isinstance(population, Mapping):
        population = Population(population)
    if not isinstance(population, Population):
        hint = (
            "give --data DIR, or population= in the app"
            if app is not None
            else "give hansa.Population({name: dataset})"
        )
        raise InputError(f"simulate: expected a population, found {type(population).__name__}; {hint}")
    return population


def _runtime(runtime: Any) -> Any:
    if runtime is None:
        return InProcess()
    if isinstance(runtime, str) and runtime == "auto":
        return Auto()
    if isinstance(runtime, type) or not callable(getattr(runtime, "open", None)):
        raise InputError(
            f'simulate(runtime=): expected hansa.InProcess() or another runtime, or "auto", found {runtime!r}'
        )
    return runtime


def _sizes(population: Population, load: Source) -> dict[str, tuple[int, int]]:
    """Training and held-out rows of up to 10,000 clients."""
    ids = population.ids[:10_000]
    if load.flat is not None and population.sizes is not None:  # as many as were given, and nothing held out
        return {client: (size, 0) for client, size in zip(ids, population.sizes[: len(ids)].tolist(), strict=True)}
    pairs = ((client, load(client)) for client in ids)
    return {client: (len(train), 0 if test is None else len(test)) for client, (train, test) in pairs}
