"""The batched way: a block of clients trains at once, its parameters stacked as rows of one matrix.

Clients are sorted by their number of steps, so that those who have finished leave the block from its end. Blocks are
cut into chunks that stay in the processor's cache. Short batches are padded with rows that have no share in the mean.
What a step needs besides is laid out ahead for all steps: see torch_layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hansa.learners.batches import num_steps
from hansa.learners.torch_data import Rows
from hansa.learners.torch_job import Integers, Job, Losses, Others, steps_of
from hansa.learners.torch_layout import Feed, Group, Layout, Plan, lay_out, layouts
from hansa.learners.torch_left import Columns, Left
from hansa.learners.torch_losses import NamedLoss, OwnLoss
from hansa.learners.torch_module import FlatModel
from hansa.unwritten import other_columns

Loss = NamedLoss | OwnLoss

_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # what a chunk's clients need
_FEWEST = 8  # a chunk is not made smaller than this: shorter products do not pay


class Way(Protocol):
    """How a block of clients goes forward and backward: ``Chain`` or ``Mapped``."""

    def mode(self, job: Job) -> AbstractContextManager[object]: ...
    def client_bytes(self, job: Job) -> int: ...  # what a step reads and writes of a client
    def begin(self, job: Job, plan: Plan | None) -> Sequence[int]: ...  # parameters that need no stack
    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None, constants: dict[str, Tensor]) -> None: ...
    def train(self, group: Group, rate: float | None, apply: Callable[[], None] | None) -> Tensor: ...
    def finish(self, job: Job, rows: Tensor) -> Columns | None: ...  # what is left as a product


class Batched:
    """Trains blocks of clients at once."""

    def __init__(self, flat: FlatModel, loss: Loss, way: Way, others: Others) -> None:
        self._flat, self._loss, self._way, self._others = flat, loss, way, others
        self.left: list[Left] = []  # of the last job: products that are not written

    def fit(self, job: Job, out: Tensor) -> Losses:
        """Train every client of the job into its row of ``out``; the mean loss that each has seen (num_clients,)."""
        if not isinstance(job.examples, Rows):
            raise ValueError("clients' examples have other shapes or types than their neighbours'")
        steps = num_steps(job.sizes, job.local)
        is_sorted = bool((steps[1:] <= steps[:-1]).all())
        order = np.arange(0) if is_sorted else np.argsort(-steps, kind="stable")
        ordered, rows = (job, out) if is_sorted else (job.take(order), torch.empty_like(out))
        num_active, most = int((steps > 0).sum()), self.chunk_size(job)
        size = max(1, -(-num_active // -(-num_active // most))) if num_active else 1  # chunks of one size
        totals, sums = np.zeros(len(steps)), np.zeros(len(steps))
        self.left = []
        self._flat.module.train()
        with self._way.mode(job):
            if num_active:
                everyone = np.arange(len(steps)) if is_sorted else order
                self._fit_chunks(ordered.part(0, num_active), rows, size, totals, sums, everyone)
            if num_active < len(steps):
                left = rows[num_active:]
                left.zero_() if job.change else left.copy_(ordered.params[num_active:])
        losses: Losses = np.divide(sums, totals, out=np.full(len(steps), np.nan), where=totals > 0)
        if is_sorted:
            return losses
        index = torch.from_numpy(order).to(out.device)
        if self.left:  # the columns of products are not there yet, and are none of those without a step
            out[index[num_active:]] = 0
            for columns in other_columns(self.left, rows.shape[1]):
                out[:, columns].index_copy_(0, index, rows[:, columns])
        else:
            out.index_copy_(0, index, rows)
        return losses[np.argsort(order)]

    def chunk_size(self, job: Job) -> int:
        """How many clients train at once: as many as keep what a step needs in the processor's cache."""
        return max(_FEWEST, _CHUNK_BYTES[job.params.device.type] // max(1, self._way.client_bytes(job)))

    def _fit_chunks(self, job: Job, rows: Tensor, size: int, totals: Losses, sums: Losses, clients: Integers) -> None:
        """Train clients sorted by their steps, of which each takes one at least; add up what they have seen.

        ``clients`` are their rows in the job as it was given.
        """
        ahead = lay_out(job, self._loss)  # drawing batches for all clients costs little more than for those of a chunk
        for start in range(0, len(job.sizes), size):
            part = job.part(start, min(start + size, len(job.sizes)))
            plan = None if ahead is None else ahead.part(start, start + size)
            cut = slice(start, start + len(part.sizes))
            totals[cut], sums[cut], left = self._fit_chunk(part, rows[cut], plan)
            if left is not None:
                self.left.append(Left(left, clients[cut]))

    def _fit_chunk(self, job: Job, rows: Tensor, layout: Layout | None) -> tuple[Losses, Losses, Columns | None]:
        """Train one chunk's clients into their ``rows``; what their examples weighed, and the sums of their losses.

        Third, columns of the rows that are left as products.
        ``layout`` are all their steps; where it is None, some at a time are laid out here.
        """
        is_plain, way, buffers = job.local.optimizer.is_plain and job.terms.is_none, self._way, self._flat.stacks
        received, parameters = self._flat.split(job.params), self._stack("parameters", len(rows))
        plan = None if layout is None else (layout, Feed(job, layout, buffers))
        without = way.begin(job, plan)
        stacked = [i for i in range(len(parameters)) if i not in without]
        if stacked:
            torch._foreach_copy_([parameters[i] for i in stacked], [received[i] for i in stacked])
        gradient = None if is_plain else self._stack("gradient", len(rows))
        steps = None if is_plain else steps_of(job.local, job.terms, self._flat, parameters)
        rate, apply = job.local.learning_rate if is_plain else None, None
        constants, held, slopes, num_bound = self._constants(job), parameters, gradient, -1
        totals, sums = np.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        plans = ((part, Feed(job, part, buffers)) for part in layouts(job, self._loss)) if plan is None else [plan]
        for layout, feed in plans:
            for first, last, num in layout.segments():
                if num != num_bound:
                    held, slopes, num_bound = [p[:num] for p in held], slopes and [s[:num] for s in slopes], num
                    way.bind(held, slopes, {name: part[:num] for name, part in constants.items()})
                    if steps is not None and slopes is not None:
                        steps.keep(num)
                        apply = partial(steps.apply, held, slopes)
                for group in feed.groups(first, last, num, gathers=not without):
                    sums[:num] += way.train(group, rate, apply)
            totals += layout.totals.sum(dim=0, dtype=torch.float64).cpu().numpy()
        if self._flat.has_buffers:
            rows.zero_() if job.change else rows.copy_(job.params)
        places = self._flat.split(rows)
        self._write(job, *([tensors[i] for i in stacked] for tensors in (parameters, received, places)))
        left = way.finish(job, rows)
        return totals, sums.cpu().numpy(), left

    def _write(self, job: Job, parameters: list[Tensor], received: list[Tensor], places: list[Tensor]) -> None:
        """The stacks as rows, less what the clients received where the job asks for the change."""
        if not job.change and places:
            torch._foreach_copy_(places, parameters)
            return
        for place, trained, start in zip(places, parameters, received, strict=True):
            torch.sub(trained, start, out=place)

    def _stack(self, name: str, num_clients: int) -> list[Tensor]:
        """One (num_clients, *shape) a parameter, contiguous (products in place are three times slower otherwise)."""
        stacks = self._flat.stacks
        if name not in stacks or len(stacks[name][0]) < num_clients:
            stacks[name] = [p.new_empty((num_clients, *p.shape)) for p in self._flat.parameters]
        return [stack[:num_clients] for stack in stacks[name]]

    def _constants(self, job: Job) -> dict[str, Tensor]:
        """What is a client's own and stays as it is: the model's buffers and the tensors of the loss's other models."""
        constants = {f"model.{name}": value for name, value in self._flat.split_buffers(job.params).items()}
        for name, vectors in job.models.items():
            other, own = self._others[name], vectors.expand(len(job.sizes), -1)
            held = dict(zip(other.parameter_names, other.split(own), strict=True))
            held |= other.split_buffers(own)
            constants |= {f"other_{name}.{key}": value for key, value in held.items()}
        return constants
