"""What leaks from a client's update and from the model, by an app's own model and rows, with its settings and without.

Two attacks: rows are read back from updates (``attacks/inversion.py``), and members are told by their losses
(``attacks/membership.py``). Each is done on what an attacker would see with no transforms at all, and on what one sees
with the app's: the server before it adds noise, and everybody once it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.attacks.inversion import by_matching, first_layer, from_first_layer, likeness
from hansa.attacks.membership import Membership, membership
from hansa.core import chain
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Memory, Plan, Slot
from hansa.core.round import Context, begin, make_plan
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.source import Source
from hansa.federation import Federation
from hansa.learners.torch import TorchLearner
from hansa.training.apps import App
from hansa.training.privacy import bound, noise_of
from hansa.training.run import Run
from hansa.training.simulate import initial_params, simulate

Floats = npt.NDArray[np.float32]
RAW, SERVER, RELEASED = "raw update", "what your server sees", "what is released"
_HOLDOUT = 0.3  # where the app sets nothing aside, and no client brings held-out rows
_MOST_ROWS = 1000  # of members and of others, each
_SMOOTH = 1e-2
_SMALLEST_IMAGE = 8


@dataclass(frozen=True, kw_only=True)
class Readback:
    """Some rows of one client and what was read back from an update on them, by who looked; arrays (...) as x has."""

    truth: Floats
    label: float
    found: Mapping[str, Floats]

    def likeness(self, view: str) -> float:
        """The correlation of what was read back with the row."""
        return likeness(self.truth, self.found[view])


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """What both attacks found; ``views`` are those that differ for this app."""

    client: str
    views: tuple[str, ...]
    method: str
    readbacks: tuple[Readback, ...]
    together: tuple[
        Readback, ...
    ]  # of one update on several rows: each of them, or their mean where a mixture comes back
    members: Mapping[str, Membership]
    num_rows: tuple[int, int]  # members and others
    feature_names: tuple[str, ...] | None
    protections: tuple[str, ...]
    num_rounds: int


def find_leaks(
    app: App, population: Population, *, seed: int = 0, num_rounds: int | None = None, num_rows: int = 4
) -> Leaks:
    """Train the app with its settings and without, then attack both; ``num_rows`` rows of one client are read back.

    Raises ``InputError`` for rows that are not one array of numbers each.
    """
    rounds = num_rounds or app.schedule.num_rounds
    own = bound(app.federation, app.schedule, len(population))
    bare = replace(app.federation, transforms=())
    source = Source(population, _holdout(app, population))
    apps = {RAW: replace(app, federation=bare)}
    if app.federation.transforms:
        apps[RELEASED if noise_of(own) else SERVER] = app
    runs = {
        view: simulate(one, population, seed=seed, num_rounds=rounds, holdout=_holdout(app, population))
        for view, one in apps.items()
    }
    members, others = _rows(app, population, source)
    told = {view: _members(run, members, others) for view, run in runs.items()}
    client = max(population.ids[:100], key=lambda one: len(source(one)[0]))
    victim = bare.prepared(source(client)[0], runs[RAW].totals)
    inverter = _Inverter(app, own, bare, runs[RAW].totals, victim, len(population), seed)
    views = (RAW, *((SERVER,) if own.transforms else ()), *((RELEASED,) if noise_of(own) else ()))
    chosen = inverter.chosen(num_rows)
    readbacks = tuple(one for row in chosen for one in inverter.rows([row], views))
    return Leaks(
        client=client,
        views=views,
        method=inverter.method,
        readbacks=readbacks,
        together=inverter.mixture(views) if inverter.is_closed else inverter.rows(chosen, views),
        members=told,
        num_rows=(len(members), len(others)),
        feature_names=getattr(victim, "feature_names", None),
        protections=tuple(repr(transform) for transform in own.transforms),
        num_rounds=rounds,
    )


class _Inverter:
    """Reads rows of one client back from updates as they would be in the first round."""

    def __init__(
        self, app: App, own: Federation, bare: Federation, totals: Any, victim: Any, num_clients: int, seed: int
    ) -> None:
        if isinstance(victim.x, dict) or not len(victim):
            raise InputError("--show leaks: expected a client with rows of one array of numbers each, found none")
        self.own, self.bare, self.victim, self.totals = own, bare, victim, totals
        self._key = Key.of(seed)
        self._params = initial_params(own, self._key, app.start_from)
        self._denominator = getattr(own.aggregator, "denominator", None) or float(app.schedule.num_counted(num_clients))
        size = int(np.prod(victim.x.shape[1:]))
        self._layer = first_layer(own.learner.layout, size)
        self.method = (
            f"{self._layer[0]} divided by {self._layer[1]}" if self._layer else "rows moved until their gradient fits"
        )
        if self._layer is None and not isinstance(own.learner, TorchLearner):
            kind = type(own.learner).__name__
            raise InputError(f"--show leaks: expected a LinearLearner or a TorchLearner to invert, found {kind}")

    def chosen(self, count: int) -> list[int]:
        """Rows with labels that differ, as far as there are."""
        y = self.victim.y
        order = range(len(self.victim)) if y is None else np.unique(y.reshape(len(y), -1)[:, 0], return_index=True)[1]
        rows = [int(row) for row in order][:count]
        return rows + [row for row in range(len(self.victim)) if row not in rows][: max(0, count - len(rows))]

    @property
    def is_closed(self) -> bool:
        """Whether a division gives the row back."""
        return self._layer is not None

    def rows(self, numbers: Sequence[int], views: Sequence[str]) -> tuple[Readback, ...]:
        """Rows of one update, of a client that holds nothing else."""
        rows = self.victim.take(numbers)
        found = {view: self._inverted(update, rows) for view, update in self._updates(rows, views).items()}
        return tuple(
            Readback(
                truth=np.asarray(rows.x[i], np.float32),
                label=float("nan") if rows.y is None else float(np.ravel(rows.y[i])[0]),
                found={view: several[i] for view, several in found.items()},
            )
            for i in range(len(rows))
        )

    def mixture(self, views: Sequence[str]) -> tuple[Readback, ...]:
        """All rows of the client in one update, of which a division gives a mean."""
        if len(self.victim) < 2:
            return ()
        updates = self._updates(self.victim, views)
        found = {view: self._inverted(update, self.victim)[0] for view, update in updates.items()}
        truth = np.asarray(self.victim.x, np.float32).mean(axis=0)
        return (Readback(truth=truth, label=float("nan"), found=found),)

    def _updates(self, rows: Any, views: Sequence[str]) -> dict[str, Floats]:
        """The first round's update on some rows, as each viewer sees it: others' part of the mean is known."""
        raw, _ = self._sent(self.bare, rows)
        updates = {RAW: raw}
        if SERVER in views:
            updates[SERVER], plan = self._sent(self.own, rows)
        if RELEASED in views:
            updates[RELEASED] = self._released(updates[SERVER], plan)
        return updates

    def _sent(self, federation: Federation, rows: Any) -> tuple[Floats, Plan]:
        parts, slot = federation.task("train"), Slot(0, 0, "update")
        constants = {f"prepare.{i}": total for i, total in enumerate(self.totals)}
        context = Context(self._key.child("run"), federation.learner.layout, constants)
        plan = make_plan(parts, begin(parts, self._params, federation.update_size()), context, ("victim",), slot)
        report, _, _ = federation.exchange(plan, ("victim",), [rows], Memory([{}]), {}, [self._key.child("victim")])
        if not report.clients:
            raise InputError(f"--show leaks: expected an update to look at, found {dict(report.refused)}")
        return np.asarray(report.payload.values[0], np.float32), plan

    def _released(self, sent: Floats, plan: Plan) -> Floats:
        """The mean with its noise, less what others added, times the number of clients."""
        transforms = self.own.transforms
        states = begin(self.own.task("train"), self._params, self.own.update_size()).transforms
        sensitivity = self.own.aggregator.sensitivity(chain.norm_bound(transforms, plan.settings))
        values = chain.decode(transforms, sent[None].astype(np.float64), plan)[0] / self._denominator
        tail = {name: 0.0 for transform in transforms for name in getattr(transform, "tail_names", ())}
        secret = self._key.child("released", float(sent.sum()).hex())
        mean, _ = chain.release(transforms, Aggregate(values, tail), states, sensitivity, secret)
        return (np.asarray(mean.values) * self._denominator).astype(np.float32)

    def _inverted(self, update: Floats, rows: Any) -> Floats:
        layout, shape = self.own.learner.layout, (len(rows), *self.victim.x.shape[1:])
        update = update[: layout.num_params]
        if self._layer is not None:
            return from_first_layer(update, layout, self._layer).reshape(1, *shape[1:])
        import torch

        from hansa.learners.torch_data import Examples
        from hansa.learners.torch_losses import make_loss

        loss = make_loss(self.own.learner.loss)
        is_whole = rows.y is not None and rows.y.dtype.kind in "biu"
        kind = loss.label_type or (torch.int64 if is_whole else torch.float32)
        y = None if rows.y is None else torch.as_tensor(np.array(rows.y), dtype=kind)

        def mean(module: Any, x: Any) -> Any:
            return loss.mean(module, Examples(x, y, None), {})

        smooth = _SMOOTH if len(shape) > 2 else 0.0
        module = self.own.learner.model(self._params).to("cpu")
        return by_matching(module, mean, update, layout, shape, key=self._key.child("invert"), smoothness=smooth)


def as_image(x: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """One row as a picture (height, width), if it looks like one: two long axes, or a vector of a square number.

    >>> as_image(np.zeros((3, 28, 28))).shape, as_image(np.zeros(64)).shape, as_image(np.zeros(13)) is None
    ((28, 28), (8, 8), True)
    """
    side = round(x.size**0.5)
    if x.ndim == 1 and side * side == x.size and side >= _SMALLEST_IMAGE:
        return x.reshape(side, side)
    if x.ndim == 3 and min(x.shape[1:]) >= _SMALLEST_IMAGE:
        return np.asarray(x.mean(axis=0))
    return x if x.ndim == 2 and min(x.shape) >= _SMALLEST_IMAGE else None


def _holdout(app: App, population: Population) -> float | None:
    brings = population.load(population.ids[0])[1] is not None
    return app.holdout if app.holdout or brings else _HOLDOUT


def _rows(app: App, population: Population, source: Source) -> tuple[Dataset, Dataset]:
    """Rows that were trained on and rows that were not, of the first clients."""
    pairs = [source(client) for client in population.ids[:100]]
    members = Dataset.concatenate([train for train, _ in pairs])
    others = [test for _, test in pairs if test is not None and len(test)]
    if not others or not len(members):
        raise InputError("--show leaks: expected rows to train on and held-out rows, found none; give holdout=0.3")
    draw = Key.of("leaks").generator()
    some = [one.take(draw.permutation(len(one))[:_MOST_ROWS]) for one in (members, Dataset.concatenate(others))]
    return some[0], some[1]


def _members(run: Run, members: Dataset, others: Dataset) -> Membership:
    return membership(_losses(run, members), _losses(run, others))


def _losses(run: Run, rows: Dataset) -> npt.NDArray[np.float64]:
    """The final model's loss on each row."""
    assert run.federation is not None
    learner, ready = run.federation.learner, run.federation.prepared(rows, run.totals)
    params = np.broadcast_to(np.asarray(run.parameters), (len(ready), len(run.parameters)))
    sums = learner.evaluate(params, [ready.rows(i, i + 1) for i in range(len(ready))])
    return np.array([sums[i, 0] / sums[i, 1] if sums[i, 1] else np.nan for i in range(len(ready))])


__all__ = ["RAW", "RELEASED", "SERVER", "Leaks", "Readback", "as_image", "find_leaks"]
