"""The plain loop: one client after another through one module, whatever the model; the law that blocks answer to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from hansa.core.errors import HansaError
from hansa.learners.batches import batches, num_steps
from hansa.learners.failed import ClientFailed, why
from hansa.learners.torch_data import Examples
from hansa.learners.torch_job import Integers, Job, Losses, Others, steps_of
from hansa.learners.torch_losses import NamedLoss, OwnLoss
from hansa.learners.torch_module import FlatModel, preserved, reseed
from hansa.learners.torch_steps import Steps

_TOGETHER = 32  # clients whose batches are drawn in one go: drawing them one by one costs as much as a step
_DRAWN = 1 << 20  # rows drawn in one go, unless a single client takes more
_WINDOW_BYTES = 4 << 20  # of examples that are put in order ahead


class Loop:
    """Trains clients one by one in ``flat.module``, which is reused and never rebuilt."""

    def __init__(self, flat: FlatModel, loss: NamedLoss | OwnLoss, others: Others) -> None:
        self._flat, self._loss, self._others = flat, loss, others

    def fit(self, job: Job, out: Tensor) -> Losses:
        """Train every client of the job into its row of ``out``; the mean loss that each has seen (num_clients,).

        What the model or the loss draws at random (dropout) comes from each client's key. Raises ``ClientFailed``
        where a client's data, the model or the loss do.
        """
        losses = np.full(len(job.sizes), np.nan)
        self._flat.module.train()
        with torch.no_grad(), preserved(self._flat.device):
            for client, plan in _plans(job):
                if plan is None:
                    out[client].copy_(job.params[client] * (not job.change))
                    continue
                reseed(job.keys[client].child("torch"), self._flat.device)
                try:
                    losses[client] = self._fit_client(job, client, plan)
                except HansaError:
                    raise
                except Exception as error:
                    raise ClientFailed(client, why(error)) from error
                self._flat.read(out[client], less=job.params[client] if job.change else None)
        return losses

    def _fit_client(self, job: Job, client: int, plan: Iterator[Examples]) -> float:
        """Train one client in ``module``; the mean loss that it has seen."""
        flat, rate = self._flat, job.local.learning_rate
        flat.load(job.params[client])
        others = self._others.load(job.models, client) if job.models else {}
        is_plain = job.local.optimizer.is_plain and job.terms.is_none
        steps = None if is_plain else steps_of(job.local, job.terms.part(client, client + 1), flat, flat.parameters)
        values, weights = [], []
        for batch in plan:
            values.append(self._step(batch, others, steps, rate))
            weights.append(self._loss.total(batch))
        total = sum(weights)
        seen = sum(value * weight for value, weight in zip(torch.stack(values).tolist(), weights, strict=True))
        return seen / total if total else math.nan

    def _step(self, batch: Examples, others: dict[str, nn.Module], steps: Steps | None, rate: float) -> Tensor:
        """One gradient step on ``batch``; its loss before the step."""
        flat = self._flat
        with torch.enable_grad():
            value: Tensor = self._loss.mean(flat.module, batch, others)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(value, flat.parameters, allow_unused=True)
        gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(flat.parameters, found, strict=True)]
        if steps is None:
            torch._foreach_add_(flat.parameters, gradient, alpha=-rate)
        else:
            steps.apply(flat.parameters, gradient)
        if flat.batch_norms and batch.num_rows == 1:
            flat.module.train()  # a layer that met a single value uses its running statistics: see torch_module.py
        return value.detach()


def _plans(job: Job) -> Iterator[tuple[int, Iterator[Examples] | None]]:
    """Each client with the batches of its steps; None for a client without steps."""
    width = job.local.batch_size
    steps = num_steps(job.sizes, job.local)
    whole = (job.sizes <= width) if width is not None else np.ones(len(job.sizes), bool)
    for client in np.flatnonzero(whole).tolist():
        own = [job.examples[client].aligned()] * int(steps[client])
        yield client, iter(own) if own else None
    drawn = np.flatnonzero(~whole)
    if width is None or not len(drawn):
        return
    together = int(np.clip(_DRAWN // (width * max(1, int(steps.max()))), 1, _TOGETHER))
    for start in range(0, len(drawn), together):
        clients = drawn[start : start + together]
        yield from zip(clients.tolist(), _drawn(clients, job, width), strict=True)


def _drawn(clients: Integers, job: Job, width: int) -> list[Iterator[Examples] | None]:
    """The batches of some clients, whose rows are drawn together."""
    plan = batches([job.keys[i] for i in clients], job.sizes[clients], job.local)
    steps = num_steps(job.sizes[clients], job.local).tolist()
    if len(clients) == 1:
        pairs: Iterator[tuple[Integers, int]] = ((rows[0], int(real[0].sum())) for rows, real in plan)
        return [_in_order(job.examples[clients[0]], pairs, width) if steps[0] else None]
    kept = [(rows, real.sum(axis=1).tolist()) for rows, real in plan]

    def of(place: int) -> Iterator[tuple[Integers, int]]:
        return ((rows[place], counts[place]) for rows, counts in kept[: steps[place]])

    return [_in_order(job.examples[i], of(n), width) if steps[n] else None for n, i in enumerate(clients.tolist())]


def _in_order(examples: Examples, plan: Iterator[tuple[Integers, int]], width: int) -> Iterator[Examples]:
    """Batches of ``examples``: the rows of several steps are gathered at once, then cut."""
    size = max(1, _WINDOW_BYTES // max(1, width * examples.row_bytes))
    while window := list(islice(plan, size)):
        counts = [count for _, count in window]
        rows = torch.from_numpy(np.concatenate([rows[:count] for rows, count in window]))
        yield from examples.take(rows.to(examples.device)).split(counts)
