"""A loader that only cuts tensors into batches, in place of PyTorch's DataLoader: as a user in a hurry would do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload


class Slices:
    """Batches of two tensors in the order of the rows."""

    dataset = None

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self._x, self._y, self._size = x, y, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self._x.split(self._size), self._y.split(self._size), strict=True))

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)


class Loaders:
    """Each client's loader: of slices, or PyTorch's, which collects a batch row by row."""

    def __init__(self, workload: Workload, *, slices: bool, shared: bool = False) -> None:
        self._x, self._y = torch.from_numpy(workload.x), torch.from_numpy(workload.y)
        if shared:
            self._x.share_memory_()
            self._y.share_memory_()
        self._starts: list[int] = workload.starts.tolist()
        self._slices = slices

    def loader(self, client: int, batch_size: int) -> Slices | DataLoader[tuple[Tensor, ...]]:
        """The batches of one local epoch."""
        rows = slice(self._starts[client], self._starts[client + 1])
        if self._slices:
            return Slices(self._x[rows], self._y[rows], batch_size)
        return DataLoader(TensorDataset(self._x[rows], self._y[rows]), batch_size=batch_size)
