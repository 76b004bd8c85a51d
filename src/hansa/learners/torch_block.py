"""What a layer's own batched form knows of the step that a block of clients takes, and how it gets at stacked tensors.

While a model is mapped over clients, its forward sees one client's tensors. ``on_block`` lifts that: work is called
with every client's tensors at once, (num_clients, ...) each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.core.key import Key

Work = Callable[..., Tensor | tuple[Tensor, ...]]
Streams = Callable[[], list[torch.Generator]]


class CannotBatch(Exception):
    """A layer, or an option of one, that has no form for a block of clients: the loop takes over."""


def stream(key: Key) -> torch.Generator:
    """A generator that draws what PyTorch's own draws on the CPU after ``reseed(key, device)``."""
    return torch.Generator().manual_seed(int.from_bytes(key.material[:8], "big"))


class BlockStep:
    """One step of some clients.

    ``counts`` (num_clients,) says how many of the ``width`` examples of each client's batch are real; they come first.
    ``streams`` gives the clients' generators, each seeded as the plain loop seeds PyTorch's own. ``rate`` is that of
    plain SGD, whose step a layer may take by itself, once: ``take`` says whether.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        counts: npt.NDArray[np.int64],
        width: int,
        rate: float | None = None,
        streams: Streams = list,
    ) -> None:
        self.parameters, self.counts, self.width, self.rate, self.streams = parameters, counts, width, rate, streams
        self.stepped = set[int]()  # parameters whose step is taken
        self.is_forward = True  # until the loss is known: a gradient asked for before is the model's own business
        self._places: dict[int, int] = {}
        self._uses: dict[int, int] = {}

    def watch(self, tensors: list[Tensor]) -> None:
        """These are the learned parameters as the mapped model sees them."""
        self._places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._uses = dict.fromkeys(range(len(tensors)), 0)

    def place(self, tensor: Any) -> int | None:
        """Which learned parameter ``tensor`` is, if any."""
        return self._places.get(id(tensor))

    def count(self, arguments: Any) -> None:
        """Remember which parameters a function was given."""
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self.count(argument)
            else:
                place = self._places.get(id(argument))
                if place is not None:
                    self._uses[place] += 1

    def take(self, place: int | None) -> bool:
        """Whether the one layer that uses this parameter is to take its SGD step now."""
        if place is None or self.rate is None or self.is_forward or self._uses[place] != 1:
            return False
        self.stepped.add(place)
        return True

    def repeats(self, num_rows: int) -> int:
        """How many consecutive rows of a tensor's first axis make one example."""
        if num_rows % self.width:
            raise CannotBatch("a layer that mixes examples, or draws at random, whose first axis is not the batch")
        return num_rows // self.width

    def mask(self, num_rows: int, device: torch.device) -> Tensor | None:
        """Which rows are real, (num_clients, num_rows) of 0 and 1; None where all are."""
        repeats = self.repeats(num_rows)
        if (self.counts == self.width).all():
            return None
        real = np.arange(num_rows) < self.counts[:, None] * repeats
        return torch.from_numpy(real.astype(np.float32)).to(device)

    def noise(self, like: Tensor, keep: float, shape: tuple[int, ...] | None = None, axis: int = 0) -> Tensor:
        """0 or 1/keep for each value of ``like`` (num_clients, ...), drawn as the loop does for each client alone.

        ``shape`` is that of one client's noise, if it is not that of its values; ``axis`` of it holds the batch. What
        is padding gets 0 and draws nothing. PyTorch draws in the order in which values lie in memory.
        """
        if like.device.type != "cpu":
            raise CannotBatch("on this device, PyTorch cannot draw for each client from its own key")
        order = list(range(like.dim() - 1))
        if shape is None:
            shape, strides = like.shape[1:], like.stride()[1:]
            order.sort(key=lambda axis: -strides[axis])
        out = like.new_zeros((len(self.counts), *(shape[i] for i in order)))
        for own, stream, count in zip(out, self.streams(), self.counts.tolist(), strict=True):
            if count < self.width:
                own = own.narrow(order.index(axis), 0, count * self.repeats(shape[axis]))
            own.bernoulli_(keep, generator=stream)
        return out.div_(keep).permute(0, *(1 + order.index(i) for i in range(len(order))))


class _OnBlock(torch.autograd.Function):
    @staticmethod
    def forward(*_: Any) -> Any:
        raise CannotBatch("a layer that no client has parameters or examples in")

    @staticmethod
    def setup_context(*_: Any) -> None:
        """Nothing: ``work`` is differentiated as it stands."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], work: Work, *tensors: Tensor | None) -> Any:
        """Call ``work`` with the client axis first; a tensor that all clients share is repeated."""
        stacked = [
            t if t is None else t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in zip(tensors, in_dims[1:], strict=True)
        ]
        out = work(*stacked)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0


def on_block(work: Work, *tensors: Tensor | None) -> Any:
    """What ``work`` gives for the clients' tensors (num_clients, ...), as the mapped model sees it."""
    return apply(_OnBlock, work, *tensors)


def apply(function: Any, *arguments: Any) -> Any:
    """Call a ``torch.autograd.Function``, which PyTorch does not annotate."""
    return function.apply(*arguments)
