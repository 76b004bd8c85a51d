"""``Mapped``: any module that ``torch.vmap`` can map over a block of clients; autograd goes back through all.

Layers that have a batched form of their own use it: see torch_substitutes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hansa.learners.torch_block import BlockStep, stream
from hansa.learners.torch_data import Examples, Stacked, parts
from hansa.learners.torch_job import Job
from hansa.learners.torch_layout import Group, Plan, batch_bytes
from hansa.learners.torch_losses import NamedLoss, OwnLoss, scores_of
from hansa.learners.torch_module import FlatModel
from hansa.learners.torch_substitutes import Substitutes


class Objective(nn.Module):
    """The loss of one client as a module, so that the model's tensors can be exchanged for those of each client."""

    def __init__(self, loss: NamedLoss | OwnLoss, model: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._loss, self._names, self.model = loss, tuple(others), model
        for name, other in others.items():
            self.add_module(f"other_{name}", other)

    def forward(self, x: Any, y: Tensor | None, shares: Tensor) -> Tensor:
        """The loss of one batch: its examples' losses by their shares, or the mean as the user's function takes it."""
        value: Tensor
        if isinstance(self._loss, NamedLoss):
            value = (self._loss.each(scores_of(self.model, x), y) * shares).sum()
        else:
            others = {name: self.get_submodule(f"other_{name}") for name in self._names}
            value = self._loss.mean(self.model, Examples(x, y, None), others)
        return value


class Mapped:
    """The batched twin of a module that is no chain; what cannot be mapped raises, and the loop takes over."""

    def __init__(self, flat: FlatModel, loss: NamedLoss | OwnLoss, others: Mapping[str, FlatModel]) -> None:
        self._flat, self._can_mask = flat, loss.can_mask
        self._objective = Objective(loss, flat.module, {name: other.module for name, other in others.items()})
        self._names = [f"model.{name}" for name in flat.parameter_names]
        self._buffers: dict[str, Tensor] = {}
        self._streams: list[torch.Generator] | None = None

    def mode(self, job: Job) -> AbstractContextManager[object]:
        """Autograd is turned on where it is needed."""
        return torch.no_grad()

    def client_bytes(self, job: Job) -> int:
        """A client's parameters and one batch."""
        return batch_bytes(job) + 4 * job.params.shape[1]

    def begin(self, job: Job, plan: Plan | None) -> Sequence[int]:
        """These clients train next: buffers start as they received them, random draws from their keys.

        Returns the parameters that need no stack: none.
        """
        flat = self._flat
        if flat.has_buffers:
            flat.load(job.params[0])  # what is outside the vector starts anew, as for each client of the plain loop
            self._buffers = {f"model.{n}": v.clone() for n, v in flat.split_buffers(job.params).items()}
        self._keys, self._streams = job.keys, None
        return ()

    def finish(self, job: Job, rows: Tensor) -> None:
        """Leave no products; write the buffers as training left them, or their change, into the clients' ``rows``."""
        received = self._flat.split_buffers(job.params)
        for name, place in self._flat.split_buffers(rows).items():
            place.copy_(self._buffers[f"model.{name}"])
            if job.change:
                place.sub_(received[name])

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None, constants: dict[str, Tensor]) -> None:
        """Work on these parameters (num_clients, *shape), in place; without ``gradient`` a step is plain SGD.

        ``constants`` are the buffers and the tensors of the other models, (num_clients, *shape) each, by name.
        """
        own = {name: value[: len(parameters[0])] for name, value in self._buffers.items()}
        self._parameters, self._gradient, self._constants = parameters, gradient, {**constants, **own}

    def train(self, group: Group, rate: float | None, apply: Callable[[], None] | None) -> Tensor:
        """Take the steps of ``group``: each by ``rate``, or by ``apply`` once the gradient is written if it is None.

        Returns for each client the sum of its batches' losses before the step, times what their examples weigh.
        """
        sums = torch.zeros(group.totals.shape[1], dtype=torch.float64, device=group.totals.device)
        for step, x in enumerate(group.x):
            y = None if group.y is None else group.y[step]
            losses = self._backward(Stacked(x, y, group.shares[step], group.counts[step]), rate)
            sums += losses * group.totals[step]
            if apply is not None:
                apply()
        return sums

    def _backward(self, batch: Stacked, rate: float | None) -> Tensor:
        """Each client's loss (num_clients,) on its batch; steps by ``rate``, or writes the gradient if it is None."""
        losses = self._parameters[0].new_empty(len(self._parameters[0]))
        for rows, width in self._groups(batch.counts):
            parameters = [p[rows] for p in self._parameters]  # views for a slice, else copies
            constants = {name: value[rows] for name, value in self._constants.items()}
            picked = range(len(batch.counts))[rows] if isinstance(rows, slice) else rows.tolist()
            block = BlockStep(parameters, batch.counts[list(picked)], width, rate, partial(self._streams_of, picked))
            losses[rows], slopes = self._slopes(block, constants, _rows_of(batch, rows, width))
            if rate is None:
                assert self._gradient is not None
                for place, slope in zip(self._gradient, slopes, strict=True):
                    place[rows] = 0 if slope is None else slope
            else:
                left = [(p, s) for p, s in zip(parameters, slopes, strict=True) if s is not None]
                if left:
                    torch._foreach_add_([p for p, _ in left], [s for _, s in left], alpha=-rate)
            if not isinstance(rows, slice):
                for place, stepped in zip(self._parameters, parameters, strict=True):
                    place[rows] = stepped
                for name in self._buffers:
                    self._constants[name][rows] = constants[name]
        return losses

    def _slopes(
        self, block: BlockStep, constants: dict[str, Tensor], batch: Stacked
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The losses, and their slope in each parameter; None where there is none, or where its step is taken."""
        leaves = [p.detach().requires_grad_() for p in block.parameters]
        with torch.enable_grad():
            tensors = {**dict(zip(self._names, leaves, strict=True)), **constants}

            def call(tensors: dict[str, Tensor], x: Any, y: Tensor | None, shares: Tensor) -> Any:
                block.watch([tensors[name] for name in self._names])
                with Substitutes(block):
                    return functional_call(self._objective, tensors, (x, y, shares))

            mapped = torch.vmap(call, in_dims=(0, 0, None if batch.y is None else 0, 0), randomness="error")
            losses = mapped(tensors, batch.x, batch.y, batch.shares)
            block.is_forward = False
            torch.autograd.backward(losses.sum())
        if self._flat.batch_norms:
            self._flat.module.train()  # a layer that met a single value has turned this off: see torch_module.py
        return losses.detach(), [leaf.grad for leaf in leaves]

    def _streams_of(self, clients: Sequence[int]) -> list[torch.Generator]:
        if self._streams is None:
            self._streams = [stream(key.child("torch")) for key in self._keys]
        return [self._streams[i] for i in clients]

    def _groups(self, counts: np.ndarray) -> Iterator[tuple[Any, int]]:
        """Rows whose batches can go together, and how many examples these have.

        A loss that is a function of the whole batch cannot leave out padding: there, only batches of one length meet.
        """
        sizes = np.unique(counts).tolist()
        if len(sizes) == 1 or self._can_mask:
            yield slice(None), sizes[-1]
            return
        for size in sizes:
            yield torch.from_numpy(np.flatnonzero(counts == size)).to(self._parameters[0].device), size


def _rows_of(batch: Stacked, rows: Any, width: int) -> Stacked:
    """The batches of some clients, without the padding that none of them needs."""
    x = {name: part[rows, :width] for name, part in parts(batch.x).items()}
    return Stacked(
        x if isinstance(batch.x, dict) else x[""],
        None if batch.y is None else batch.y[rows, :width],
        batch.shares[rows, :width],
        batch.counts,
    )
