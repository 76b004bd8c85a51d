"""One call of ``TorchLearner.fit`` as tensors: the same record for the plain loop and for the batched way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.core.key import Key, Streams
from hansa.learners.torch_data import Examples, Rows
from hansa.learners.torch_module import FlatModel
from hansa.learners.torch_steps import Steps, Terms
from hansa.local_training import LocalTraining

Integers = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]


class Job(NamedTuple):
    """A block of clients to train."""

    params: Tensor  # (num_clients, num_params) float32 on the device; read only
    examples: Sequence[Examples]
    sizes: Integers  # (num_clients,)
    local: LocalTraining
    terms: Terms
    models: Mapping[str, Tensor]  # (1 or num_clients, num_params) by the name that the loss takes
    keys: Sequence[Key]
    change: bool = False  # what is asked for is local minus received parameters
    leaves_products: bool = False  # and only the sum of clients' changes is: a way may leave columns as products

    def take(self, clients: Integers) -> Job:
        """The job of some of the clients, in that order."""
        index = torch.from_numpy(clients).to(self.params.device)
        alike = self.params.stride(0) == 0
        return Job(
            self.params[:1].expand(len(clients), -1) if alike else self.params[index],
            self.examples.take(clients) if isinstance(self.examples, Rows) else [self.examples[i] for i in clients],
            self.sizes[clients],
            self.local,
            self.terms.take(index),
            {name: v if len(v) == 1 else v[index] for name, v in self.models.items()},
            Streams(clients.tolist(), self.keys.__getitem__),
            self.change,
            self.leaves_products,
        )

    def part(self, start: int, stop: int) -> Job:
        """The job of consecutive clients, as views."""
        return Job(
            self.params[start:stop],
            self.examples[start:stop],
            self.sizes[start:stop],
            self.local,
            self.terms.part(start, stop),
            {name: v if len(v) == 1 else v[start:stop] for name, v in self.models.items()},
            self.keys[start:stop],
            self.change,
            self.leaves_products,
        )


def steps_of(local: LocalTraining, terms: Terms, flat: FlatModel, received: list[Tensor]) -> Steps:
    """The optimizer of clients that start from ``received``; ``terms`` have one row, or one each."""
    one = received[0].dim() == len(flat.parameters[0].shape)

    def split(rows: Tensor | None) -> list[Tensor] | None:
        return None if rows is None else flat.split(rows[0] if one else rows)

    return Steps(local, received, terms.strength, split(terms.linear), split(terms.anchor), split(terms.trainable))


class Others:
    """The models that a loss looks at beside the one that it trains, by name: in evaluation mode, without gradients."""

    def __init__(self, build_model: Any, device: torch.device) -> None:
        self._build_model, self._device = build_model, device
        self._made: dict[str, FlatModel] = {}

    def __getitem__(self, name: str) -> FlatModel:
        """The model called ``name``, made at its first use."""
        if name not in self._made:
            made = FlatModel(self._build_model, self._device)
            made.module.eval().requires_grad_(False)
            self._made[name] = made
        return self._made[name]

    def load(self, models: Mapping[str, Tensor], client: int) -> dict[str, torch.nn.Module]:
        """The models of one client."""
        for name, vectors in models.items():
            self[name].load(vectors[0 if len(vectors) == 1 else client])
        return {name: self[name].module for name in models}
