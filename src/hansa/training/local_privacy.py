"""Noise that clients add themselves: what it releases each round, what does not fit beside it, and what to say of it.

Two kinds: a local noise on each client's whole update (``transforms/local_noise.py``), and DP-SGD, which hides single
records of a client (``DPSGD``). The server sees noisy updates only, whatever it does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hansa.core import chain
from hansa.core.check import Problem
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Plan, Slot, Updates
from hansa.federation import Federation
from hansa.learners.dp_sgd import noise_multiplier_of, steps_of
from hansa.local_training import DPSGD, local_training
from hansa.privacy import events
from hansa.privacy.events import Event, RecordBudgetEvent, RecordEvent
from hansa.training.schedule import Schedule
from hansa.transforms.local_noise import LocalNoise


@dataclass(frozen=True, kw_only=True)
class RecordNoise:
    """An algorithm's DP-SGD as the accounts see it.

    Where each client sizes its noise for its own number of records, the server knows the budget that all keep to. With
    a ``noise_multiplier`` it counts every record as in every batch: right for a client of ``batch_size`` records, and
    too much for larger ones, whose own sampling hides more.
    """

    optimizer: DPSGD
    num_steps: int  # of a round
    batch_size: int | None

    @property
    def delta(self) -> float | None:
        """At which epsilon is stated."""
        return self.optimizer.delta

    @property
    def budget(self) -> float | None:
        """The epsilon that a run stops short of."""
        return self.optimizer.epsilon

    def event(self, number: int, num_rounds: int) -> Event:
        """What a client releases of one record by its report of round ``number``."""
        if self.batch_size is not None and self.optimizer.epsilon is not None:
            assert self.optimizer.delta is not None
            return RecordBudgetEvent(epsilon=self.optimizer.epsilon, delta=self.optimizer.delta, num_rounds=num_rounds)
        multiplier = noise_multiplier_of(self.optimizer, 1, None, self.num_steps)
        return RecordEvent(noise_multiplier=multiplier, num_steps=self.num_steps)


def record_noise(federation: Federation) -> RecordNoise | None:
    """The algorithm's DP-SGD, if its clients train by it."""
    optimizer = getattr(federation.algorithm, "client_optimizer", None)
    if not isinstance(optimizer, DPSGD):
        return None
    local = local_training(federation.algorithm, 0)
    return RecordNoise(optimizer=optimizer, num_steps=steps_of(local), batch_size=local.batch_size)


def local_problems(federation: Federation, schedule: Schedule) -> list[Problem]:
    """What does not fit beside noise that clients add, each with the line to paste."""
    if not federation.is_locally_private:
        return []
    name = _name(federation)
    found = leak_problems(federation, name)
    if schedule.buffer is not None:
        found.append(Problem(f"{name} counts one report a round, and in buffered rounds a client may send more."))
    if any(getattr(t, "adds_local_noise", False) for t in federation.transforms):
        found += encode_problems(federation, _trial)
    if isinstance(getattr(federation.algorithm, "client_optimizer", None), DPSGD):
        found += _record_problems(federation)
    return found


def leak_problems(federation: Federation, name: str) -> list[Problem]:
    """What would leave a client beside its noisy update."""
    found = []
    if getattr(federation.aggregator, "weighting", "clients") != "clients":
        found.append(
            Problem(
                f"weights by examples tell how many each client has, which {name} does not cover.",
                f'aggregator=hansa.{type(federation.aggregator).__name__}(weighting="clients")',
            )
        )
    if not all(getattr(preparation, "is_public", False) for preparation in federation.prepare):
        found.append(
            Problem(
                f"prepare= sends exact sums of every client's rows, beside which {name} protects nothing.",
                "prepare=(hansa.Rescale(center=..., scale=...),)",
            )
        )
    kinds = [t for t in federation.transforms if getattr(t, "adds_noise", False)]
    kinds += [t for t in federation.transforms if getattr(t, "adds_local_noise", False)]
    kinds += [t for t in federation.transforms if getattr(t, "adds_distributed_noise", False)]
    if len(kinds) + isinstance(getattr(federation.algorithm, "client_optimizer", None), DPSGD) > 1:
        found.append(Problem("noise is added in several places, and a privacy statement covers one; keep one of them."))
    return found


def _trial(transform: Any) -> Any:
    """Local noise of any size, to see what its client half refuses."""
    return replace(transform, epsilon=None, noise_multiplier=1.0) if isinstance(transform, LocalNoise) else transform


def encode_problems(federation: Federation, trial: Callable[[Any], Any]) -> list[Problem]:
    """What the chain's client half refuses, found by sending a short update of zeros through ``trial`` of its parts."""
    transforms = tuple(trial(transform) for transform in federation.transforms)
    settings = tuple(t.settings(t.init(8)) for t in transforms)
    plan = Plan(Slot(0, 0, "update"), True, {}, settings, Key.of("check"))
    block = Updates(("",), np.zeros((1, 8), np.float32), np.ones(1))
    try:
        chain.encode(transforms, block, plan, Memory([{}]), [Key.of("check")])
    except CheckError as error:
        return [Problem(sentence) for sentence in error.problems]
    return []


def _record_problems(federation: Federation) -> list[Problem]:
    """Whether learner and algorithm can keep to DP-SGD."""
    learner, algorithm = federation.learner, type(federation.algorithm).__name__
    found = []
    if not getattr(learner, "protects_records", False):
        found.append(
            Problem(
                f"{type(learner).__name__} cannot train by DPSGD.",
                "learner=hansa.LinearLearner(...) or hansa.TorchLearner(...)",
            )
        )
    buffers = [n for n, role in zip(learner.layout.names, learner.layout.roles, strict=True) if role == "buffer"]
    if buffers:
        found.append(
            Problem(
                f"the model's buffers ({buffers[0]}, ...) leave without noise, and mix records; DPSGD needs a model "
                "without them: GroupNorm in the place of BatchNorm, say."
            )
        )
    try:
        record_noise(federation)
    except InputError as error:
        found.append(Problem(str(error), f"hansa.{algorithm}(local_steps=10, batch_size=..., ...)"))
    return found


def _name(federation: Federation) -> str:
    noisy = [type(t).__name__ for t in federation.transforms if getattr(t, "adds_local_noise", False)]
    return noisy[0] if noisy else "DPSGD"


def facts_of(noise: Any, num_rounds: int) -> Mapping[str, str]:
    """What a privacy statement says of noise that clients add."""
    if isinstance(noise, RecordNoise):
        return _record_facts(noise, num_rounds)
    one = noise.event(0, num_rounds)
    delta = (0.0 if one.noise == "laplace" else 1e-5) if noise.delta is None else noise.delta
    alone = events.cost([one], delta).epsilon
    return {
        "title": f"Local {one.noise.capitalize()} noise on each client's own update",
        "setting": "local: each client adds the noise before anything leaves it; the server need not be trusted",
        "unit": "one client's report, made of all its data; epsilon is that of a client that takes part in every round",
        "neighbours": "one client's data are replaced by any other: any two reports are twice the norm bound apart",
        "released": f"each client's noisy update of each round, {type(noise).__name__}",
        "one report": f"epsilon {alone:.3g} at delta {delta:.1g}",
        "not covered": "who took part, when, and who refused; other runs on the same data add to this",
        "trust": "Nothing but noisy updates of equal weight leaves a client: no losses, no metrics, no sizes.",
    }


def _record_facts(noise: RecordNoise, num_rounds: int) -> Mapping[str, str]:
    optimizer = noise.optimizer
    rate = (
        "each step takes all records of a client: no amplification"
        if noise.batch_size is None
        else f"each step takes each of a client's n records by a coin with chance {noise.batch_size} / n"
    )
    if noise.batch_size is not None and optimizer.epsilon is None:
        rate += "; this epsilon leaves it out, so that it holds for the smallest client, and larger ones pay less"
    hides_size = noise.batch_size is None and optimizer.divisor is not None
    size = "a client's number of records does not leave" if hides_size else "a client's number of records is not hidden"
    sized = "" if optimizer.epsilon is None else "; each client sizes its noise for its own number of records"
    return {
        "title": "DP-SGD at each client, on its own records",
        "setting": "local: each client adds noise to its sums of gradients; the server need not be trusted",
        "unit": "one record of one client, in every round; a person with several records is not covered as a whole",
        "neighbours": f"one record of one client gives nothing, or comes to give something (zero-out); {size}",
        "sampling": rate,
        "released": f"each client's parameters after {noise.num_steps} noisy steps a round, {num_rounds} rounds, "
        f"{noise.num_steps * num_rounds} steps in all (steps are counted, not epochs){sized}",
        "not covered": "who took part, when, and who refused; other runs on the same data add to this",
        "trust": "Nothing but updates made of noisy steps leaves a client, all of equal weight: no losses, no metrics.",
    }


__all__ = ["RecordNoise", "encode_problems", "facts_of", "leak_problems", "local_problems", "record_noise"]
