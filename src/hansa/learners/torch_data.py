"""Clients' rows as tensors: one large tensor a column, from which a block of clients is gathered at once."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.data.block import Block

Features = Tensor | dict[str, Tensor]
Integers = npt.NDArray[np.int64]


class Examples(NamedTuple):
    """Rows of one client (num_examples, ...), or a batch of them."""

    x: Features
    y: Tensor | None
    weights: Tensor | None  # (num_examples,) float32

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return int(next(iter(parts(self.x).values())).shape[0])

    def split(self, counts: list[int]) -> list[Examples]:
        """Consecutive batches of ``counts`` examples, as views."""
        ys = [None] * len(counts) if self.y is None else self.y.split_with_sizes(counts)
        weights = [None] * len(counts) if self.weights is None else self.weights.split_with_sizes(counts)
        if isinstance(self.x, dict):
            pieces = {name: part.split_with_sizes(counts) for name, part in self.x.items()}
            xs: Any = [{name: own[i] for name, own in pieces.items()} for i in range(len(counts))]
        else:
            xs = self.x.split_with_sizes(counts)
        return [Examples(*batch) for batch in zip(xs, ys, weights, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return next(iter(parts(self.x).values())).device

    @property
    def row_bytes(self) -> int:
        """Memory of one example's features."""
        return sum(math.prod(p.shape[1:]) * p.element_size() for p in parts(self.x).values())

    def aligned(self) -> Examples:
        """The same rows where PyTorch would put them: products of rows that start elsewhere may differ in a bit."""
        x = {name: _aligned(part) for name, part in self.x.items()} if isinstance(self.x, dict) else _aligned(self.x)
        return self._replace(x=x)

    def part(self, start: int, stop: int) -> Examples:
        """Consecutive examples, as views."""
        cut = slice(start, stop)
        x = {name: part[cut] for name, part in self.x.items()} if isinstance(self.x, dict) else self.x[cut]
        own = [None if t is None else t[cut] for t in (self.y, self.weights)]
        return Examples(x, own[0], own[1])

    def take(self, rows: Tensor) -> Examples:
        """The examples at ``rows``."""
        x = (
            {name: part.index_select(0, rows) for name, part in self.x.items()}
            if isinstance(self.x, dict)
            else self.x.index_select(0, rows)
        )
        y = None if self.y is None else self.y.index_select(0, rows)
        return Examples(x, y, None if self.weights is None else self.weights.index_select(0, rows))


class Rows(Sequence[Examples]):
    """A block's clients: client ``i`` holds ``starts[i] : starts[i] + sizes[i]`` of ``everyone``."""

    def __init__(self, everyone: Examples, starts: Integers, sizes: Integers) -> None:
        self.everyone, self.starts, self.sizes = everyone, starts, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.everyone, self.starts[index], self.sizes[index])
        start = int(self.starts[index])
        return self.everyone.part(start, start + int(self.sizes[index]))

    def take(self, clients: Integers) -> Rows:
        """Some of the clients, in that order."""
        return Rows(self.everyone, self.starts[clients], self.sizes[clients])

    def whole(self, tensor: Tensor, place: Tensor | None = None) -> Tensor:
        """Each client's rows of ``tensor``, where all hold equally many, perhaps in a ``place`` for them.

        (num_clients, num_rows, ...).
        """
        size = int(self.sizes[0])
        if (self.starts % size).any():
            index = torch.from_numpy(self.starts[:, None] + np.arange(size)).to(tensor.device)
            flat = None if place is None else place.view(index.numel(), *tensor.shape[1:])
            return torch.index_select(tensor, 0, index.reshape(-1), out=flat).view(*index.shape, *tensor.shape[1:])
        last = (int(self.starts.max()) + size) // size  # clients stand at multiples of their size: take each at once
        clients = torch.from_numpy(self.starts // size).to(tensor.device)
        by_client = tensor[: last * size].view(last, size, *tensor.shape[1:])
        return torch.index_select(by_client, 0, clients, out=place)


class Stacked(NamedTuple):
    """One batch of each client of a block."""

    x: Features  # (num_clients, width, ...)
    y: Tensor | None
    shares: Tensor  # (num_clients, width): each example's share of its batch's mean, 0 where padded
    counts: npt.NDArray[np.int64]  # (num_clients,): examples that are not padding; they come first


def _aligned(tensor: Tensor) -> Tensor:
    return (
        tensor
        if tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def parts(x: Features) -> dict[str, Tensor]:
    """The tensors of ``x`` by name; a lone one is called ''."""
    return x if isinstance(x, dict) else {"": x}


def columns_of(dataset: Any, label_type: str | None) -> dict[str, npt.NDArray[Any]]:
    """A dataset's arrays in the types that tensors will have.

    Floating features become float32; so do truth values and bytes (images); other integers become int64 (tokens).
    ``label_type`` is the type of ``y``: None keeps integers as int64 and floats as float32.
    """
    x = dataset.x
    named = {f"x.{name}": part for name, part in x.items()} if isinstance(x, dict) else {"x": x}
    columns = {name: _converted(part, _own_type(np.asarray(part), True)) for name, part in named.items()}
    if dataset.y is not None:
        y = np.asarray(dataset.y)
        columns["y"] = _converted(y, label_type or _own_type(y, False))
    if dataset.weights is not None:
        columns["weights"] = _converted(dataset.weights, "float32")
    return columns


def _converted(array: Any, dtype: str) -> npt.NDArray[Any]:
    return np.asarray(array).astype(dtype, copy=False)


class Reader:
    """Datasets as tensors on one device; a shelf's arrays go to a GPU once, and what is added to them as it comes."""

    def __init__(self, device: torch.device, label_type: torch.dtype | None) -> None:
        self._device = device
        self._label_type = None if label_type is None else str(label_type).removeprefix("torch.")
        self._kept: dict[int, tuple[weakref.ref[npt.NDArray[Any]], Tensor, int]] = {}

    def columns(self, dataset: Any) -> dict[str, npt.NDArray[Any]]:
        """A dataset as a shelf keeps it."""
        return columns_of(dataset, self._label_type)

    def rows(self, datasets: Sequence[Any]) -> Sequence[Examples]:
        """The datasets of a block: ``Rows`` where they have the same columns, else one by one."""
        block = datasets if isinstance(datasets, Block) else Block.of(datasets, self.columns)
        if block is None:
            return [self.examples(dataset) for dataset in datasets]
        tensors = {name: self._tensor(array, block.num_rows) for name, array in block.columns.items()}
        return Rows(_examples(tensors), block.starts, block.sizes)

    def examples(self, dataset: Any) -> Examples:
        """All rows of a dataset."""
        return _examples({name: view(array).to(self._device) for name, array in self.columns(dataset).items()})

    def features(self, x: Any) -> Features:
        """An array or a dict of arrays."""
        if isinstance(x, dict):
            return {name: self.features(part) for name, part in x.items()}  # type: ignore[misc]  # parts are arrays
        array = np.asarray(x)
        return view(_converted(array, _own_type(array, True))).to(self._device)

    def _tensor(self, array: npt.NDArray[Any], num_rows: int) -> Tensor:
        """The first rows of a column on the device."""
        if self._device.type == "cpu":
            return view(array[:num_rows])
        kept = self._kept.get(id(array))
        tensor, known = (kept[1], kept[2]) if kept is not None and kept[0]() is array else (None, 0)
        if tensor is None or len(tensor) < num_rows:
            room = min(len(array), max(num_rows, 2 * known))
            grown = torch.empty((room, *array.shape[1:]), dtype=view(array[:0]).dtype, device=self._device)
            if tensor is not None:
                grown[:known] = tensor[:known]
            tensor = grown
        if known < num_rows:
            tensor[known:num_rows] = view(array[known:num_rows]).to(self._device)
            name = id(array)
            self._kept[name] = (weakref.ref(array, lambda _: self._kept.pop(name, None)), tensor, num_rows)
        return tensor[:num_rows]


def _examples(tensors: dict[str, Tensor]) -> Examples:
    named = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("x.")}
    return Examples(named or tensors["x"], tensors.get("y"), tensors.get("weights"))


def view(array: npt.NDArray[Any]) -> Tensor:
    """A tensor on the memory of ``array``, which nobody here writes to."""
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # torch warns that it cannot keep an array read-only
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _own_type(array: npt.NDArray[Any], is_feature: bool) -> str:
    is_byte = is_feature and array.dtype in (np.uint8, np.bool_)
    return "float32" if array.dtype.kind == "f" or is_byte else "int64"
