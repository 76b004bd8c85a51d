"""What the steps of a block of clients take, laid out ahead: which examples, what they count, and for how many clients.

Examples are gathered, some steps at a time, into a buffer that is used again and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.learners.batches import batches, laid_out, num_steps
from hansa.learners.torch_data import Examples, Features, Rows
from hansa.learners.torch_job import Integers, Job
from hansa.learners.torch_losses import NamedLoss, OwnLoss

_GATHERED_BYTES = 1 << 20  # examples gathered at once: what stays in cache until they are used
_AHEAD = 4 << 20  # places of examples that are laid out ahead
_MOST_STEPS = 64  # in a group: what a way keeps of each step until the group ends stays small


class Layout(NamedTuple):
    """Some consecutive steps of clients, laid out ahead: all that is small."""

    places: Tensor  # (num_steps, num_clients, width): rows among everyone's; (1, ...) where every step takes the same
    y: Tensor | None  # (num_steps, num_clients, width, ...)
    shares: Tensor  # (num_steps, num_clients, width): each example's share of its batch's mean, 0 where padded
    totals: Tensor  # (num_steps, num_clients): what the examples of each batch weigh
    counts: Integers  # (num_steps, num_clients): examples that are not padding
    num_active: list[int]  # clients that take each step
    alike: bool  # no example weighs more than another
    whole: bool = False  # every step takes all rows of each client as they lie

    @property
    def num_steps(self) -> int:
        """Steps of the client that takes the most."""
        return len(self.num_active)

    @property
    def repeats(self) -> bool:
        """Whether all steps take the same examples."""
        return len(self.places) == 1

    @property
    def width(self) -> int:
        """Examples of a client in one step."""
        return self.places.shape[2]

    def part(self, start: int, stop: int) -> Layout:
        """The same of consecutive clients."""
        cut, active = slice(start, stop), [min(num, stop) - start for num in self.num_active if num > start]
        num = 1 if self.repeats else len(active)
        y = None if self.y is None else self.y[:num, cut]
        own = (self.places[:num, cut], y, self.shares[:num, cut], self.totals[: len(active), cut])
        return Layout(*own, self.counts[:num, cut], active, self.alike, self.whole)

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Runs of steps that the same clients take: first, last (not with it), how many clients."""
        first = 0
        for num, steps in groupby(self.num_active):
            last = first + len(list(steps))
            yield first, last, num
            first = last


class Group(NamedTuple):
    """A few steps that the same clients take."""

    x: Sequence[Features]  # a batch a step: (num_clients, width, ...); none where a way has all examples already
    y: Tensor | None  # (num_steps, num_clients, width, ...)
    shares: Tensor  # (num_steps, num_clients, width)
    totals: Tensor  # (num_steps, num_clients)
    counts: Integers  # (num_steps, num_clients)
    even: Sequence[float]  # of each step: the share of every example, or 0 where they differ


class Feed:
    """The examples of a layout: its other parts are views."""

    def __init__(self, job: Job, layout: Layout, buffers: dict[str, list[Tensor]]) -> None:
        assert isinstance(job.examples, Rows)
        self._layout, self._everyone, self._buffers = layout, job.examples.everyone.x, buffers
        self._whole = self._all_of(job.examples) if layout.whole else None
        self._place_bytes = max(1, layout.width * job.examples.everyone.row_bytes)

    def groups(self, first: int, last: int, num: int, gathers: bool = True) -> Iterator[Group]:
        """The steps from ``first`` up to ``last`` of the first ``num`` clients; ``x`` is empty without ``gathers``."""
        layout = self._layout
        most = _MOST_STEPS
        if gathers and not layout.repeats:
            most = min(most, max(1, _GATHERED_BYTES // self._place_bytes // num))
        for start in range(first, last, most):
            stop = min(start + most, last)
            cut = slice(0, 1) if layout.repeats else slice(start, stop)
            y, shares, counts = layout.y, layout.shares[cut, :num], layout.counts[cut, :num]
            y = None if y is None else y[cut, :num]
            x = self._features(cut, num) if gathers else ()
            if layout.repeats and stop - start > 1:
                shares, x = shares.expand(stop - start, -1, -1), [*x] * (stop - start)
                y = None if y is None else y.expand(stop - start, *y.shape[1:])
                counts = np.broadcast_to(counts, (stop - start, num))
            yield Group(x, y, shares, layout.totals[start:stop, :num], counts, self._even(counts))

    def _even(self, counts: Integers) -> list[float]:
        """Where no example weighs more than another and none is padding, each has the same share of its batch."""
        width = self._layout.width
        if not self._layout.alike:
            return [0.0] * len(counts)
        return [1.0 / width if is_full else 0.0 for is_full in (counts == width).all(axis=1).tolist()]

    def everything(self) -> Features:
        """The examples of all steps, client by client: (num_clients, num_places * width, ...)."""
        if self._whole is not None:
            return self._whole
        index = self._layout.places.transpose(0, 1)
        shape = (index.shape[0], index.shape[1] * index.shape[2])
        return self._gather(index.reshape(-1), shape)

    def _features(self, cut: slice, num: int) -> Sequence[Features]:
        """The examples of some steps: one (num_clients, width, ...) each."""
        if self._whole is not None:
            x = self._whole
            return [{name: part[:num] for name, part in x.items()} if isinstance(x, dict) else x[:num]]
        index = self._layout.places[cut, :num]
        found = self._gather(index.reshape(-1), index.shape)
        if not isinstance(found, dict):
            return found.unbind(0)
        return [{name: part[i] for name, part in found.items()} for i in range(len(index))]

    def _gather(self, index: Tensor, shape: tuple[int, ...]) -> Features:
        """Everyone's rows at ``index`` in a buffer, laid out as ``shape``."""
        if isinstance(self._everyone, dict):
            return {name: self._into(name, rows, index, shape) for name, rows in self._everyone.items()}
        return self._into("", self._everyone, index, shape)

    def _all_of(self, rows: Rows) -> Features:
        """The features of clients that hold equally many rows, all of them: (num_clients, num_rows, ...)."""
        x = rows.everyone.x
        if isinstance(x, dict):
            return {name: self._whole_into(name, rows, part) for name, part in x.items()}
        return self._whole_into("", rows, x)

    def _whole_into(self, name: str, rows: Rows, tensor: Tensor) -> Tensor:
        size = int(rows.sizes[0])
        place = self._buffer(name, tensor, len(rows) * size)
        return rows.whole(tensor, place.view(len(rows), size, *tensor.shape[1:]))

    def _into(self, name: str, rows: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        found = torch.index_select(rows, 0, index, out=self._buffer(name, rows, len(index)))
        return found.view(*shape, *rows.shape[1:])

    def _buffer(self, name: str, like: Tensor, num_rows: int) -> Tensor:
        held = self._buffers.get(f"x.{name}")
        if held is None or len(held[0]) < num_rows or held[0].shape[1:] != like.shape[1:]:
            held = self._buffers[f"x.{name}"] = [like.new_empty((num_rows, *like.shape[1:]))]
        return held[0][:num_rows]


Plan = tuple[Layout, Feed]  # all steps of some clients


def lay_out(job: Job, loss: NamedLoss | OwnLoss) -> Layout | None:
    """All steps of a block whose clients each take one at least; None where that would be too much at once."""
    if takes_all(job):
        return next(layouts(job, loss))
    plan = laid_out(job.keys, job.sizes, job.local, _AHEAD)
    return None if plan is None else _layout(job, loss, *plan)


def layouts(job: Job, loss: NamedLoss | OwnLoss) -> Iterator[Layout]:
    """The same, as many steps at a time as may be laid out ahead."""
    steps = num_steps(job.sizes, job.local)
    if takes_all(job):
        layout = _whole(job)
        if layout is None:
            rows = np.arange(int(job.sizes.max()))
            real = (rows < job.sizes[:, None])[None]
            layout = _layout(job, loss, rows * real, real)
        num = int(steps[0])
        yield layout._replace(totals=layout.totals.expand(num, -1), num_active=[len(steps)] * num)
        return
    assert job.local.batch_size is not None
    plan = batches(job.keys, job.sizes, job.local)
    size = max(1, _AHEAD // max(1, len(steps) * job.local.batch_size))
    while held := list(islice(plan, size)):
        yield _layout(job, loss, np.stack([rows for rows, _ in held]), np.stack([real for _, real in held]))


def _whole(job: Job) -> Layout | None:
    """The steps of clients that hold equally many rows and take all of them at once; None for any others."""
    assert isinstance(job.examples, Rows)
    everyone, size = job.examples.everyone, int(job.sizes[0])
    if everyone.weights is not None or (everyone.y is not None and everyone.y.dim() > 1) or (job.sizes != size).any():
        return None
    one, shape = torch.ones((1, 1, 1), device=job.params.device), (1, len(job.sizes), size)
    y = None if everyone.y is None else job.examples.whole(everyone.y)[None]
    counts = np.broadcast_to(np.int64(size), shape[:2])
    shares, totals = (one / size).expand(shape), (one[0] * size).expand(shape[:2])
    return Layout(one.long().expand(shape), y, shares, totals, counts, [len(job.sizes)], alike=True, whole=True)


def takes_all(job: Job) -> bool:
    """Whether every step takes all rows of each client: then all clients take as many steps."""
    return job.local.batch_size is None or job.local.batch_size >= int(job.sizes.max())


def _layout(job: Job, loss: NamedLoss | OwnLoss, rows: Integers, real: npt.NDArray[np.bool_]) -> Layout:
    """Steps as tensors, of ``rows`` (num_steps, num_clients, width) and which of them are real."""
    device = job.params.device
    assert isinstance(job.examples, Rows)
    everyone: Examples = job.examples.everyone
    places = torch.from_numpy(rows + job.examples.starts[:, None]).to(device)
    weights = torch.from_numpy(real.astype(np.float32)).to(device)
    flat = places.reshape(-1)
    if everyone.weights is not None:
        weights *= everyone.weights.index_select(0, flat).view(weights.shape)
    y = None if everyone.y is None else everyone.y.index_select(0, flat).view(*places.shape, *everyone.y.shape[1:])
    alike = everyone.weights is None and (y is None or y.dim() == 3)
    if y is not None and isinstance(loss, NamedLoss) and y.dim() > 3:
        weights *= loss.weights(y.flatten(0, 2), None).view(weights.shape)
    totals = weights.sum(dim=2)
    shares = weights / (totals + (totals == 0)).unsqueeze(2)
    counts = real.sum(axis=2)
    return Layout(places, y, shares, totals, counts, (counts > 0).sum(axis=1).tolist(), alike)


def width_of(job: Job) -> int:
    """Examples in the widest batch."""
    widest = int(job.sizes.max(initial=0))
    return widest if job.local.batch_size is None else min(job.local.batch_size, widest)


def batch_bytes(job: Job) -> int:
    """Memory of the features of one client's widest batch."""
    return width_of(job) * job.examples[int(job.sizes.argmax())].row_bytes
