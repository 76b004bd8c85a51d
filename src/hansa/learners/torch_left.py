"""What the batched way leaves as products: the columns of a chain's first layer, of clients of one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.learners.torch_dual import Dual
from hansa.learners.torch_module import FlatModel


@dataclass(frozen=True)
class Columns:
    """A layer in its dual form: ``places`` are its parameters, of which all learned ones are ``flat``'s."""

    dual: Dual
    flat: FlatModel
    places: list[int]

    def write(self, rows: Tensor, change: bool) -> None:
        """Write the layer into its columns of the clients' ``rows``."""
        parts = self.flat.split(rows)
        self.dual.write([parts[i] for i in self.places], change)


class Left:
    """The columns of some rows as a product (see unwritten.py); ``clients`` are the rows."""

    def __init__(self, own: Columns, clients: npt.NDArray[np.int64]) -> None:
        self._own, self.clients = own, clients
        self.columns: Sequence[slice] = [own.flat.columns(i) for i in own.places]

    def write(self, rows: npt.NDArray[np.float32]) -> None:
        """Write the columns of its clients into ``rows`` (all rows, all columns)."""
        out, first = torch.from_numpy(rows), int(self.clients[0])
        if (np.diff(self.clients) == 1).all():
            self._own.write(out[first : first + len(self.clients)], change=True)
            return
        own = out.new_zeros((len(self.clients), out.shape[1]))
        self._own.write(own, change=True)
        index = torch.from_numpy(self.clients)
        for columns in self.columns:
            out[:, columns].index_copy_(0, index, own[:, columns])

    def sums(self, weights: npt.NDArray[np.float64]) -> Sequence[npt.NDArray[np.float64]]:
        """The weighted sum over its clients, in its order: a vector for each of ``columns``."""
        return self._own.dual.sums(weights)
