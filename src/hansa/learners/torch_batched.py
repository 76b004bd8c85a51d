"""The batched way: a block of clients trains at once, its parameters stacked as rows of one matrix.

Clients are sorted by their number of steps, so that those who have finished leave the block from its end. Blocks are
cut into chunks that stay in the processor's cache. Short batches are padded with rows that have no share in the mean.
What a step needs besides is laid out ahead for all steps; its examples are gathered into a buffer that every step uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, repeat
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hansa.learners.batches import batches, laid_out, num_steps
from hansa.learners.torch_data import Examples, Features, Rows, Stacked
from hansa.learners.torch_job import Integers, Job, Losses, Others, steps_of
from hansa.learners.torch_losses import NamedLoss, OwnLoss
from hansa.learners.torch_module import FlatModel

Loss = NamedLoss | OwnLoss

_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 1 << 30}  # parameters and one batch of a chunk's clients
_GATHERED_BYTES = 1 << 20  # examples gathered at once: what stays in cache until they are used
_AHEAD = 4 << 20  # places of examples that are laid out ahead
_FEWEST = 8  # a chunk is not made smaller than this: shorter products do not pay


class Way(Protocol):
    """How a block of clients goes forward and backward: ``Chain`` or ``Mapped``."""

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None, constants: dict[str, Tensor]) -> None: ...
    def backward(self, batch: Stacked, rate: float | None) -> Tensor | None: ...


class Batched:
    """Trains blocks of clients at once."""

    def __init__(self, flat: FlatModel, loss: Loss, way: Way, others: Others) -> None:
        self._flat, self._loss, self._way, self._others = flat, loss, way, others

    def fit(self, job: Job, out: Tensor) -> Losses:
        """Train every client of the job into its row of ``out``; the mean loss that each has seen (num_clients,)."""
        if not isinstance(job.examples, Rows):
            raise ValueError("clients' examples have other shapes or types than their neighbours'")
        steps = num_steps(job.sizes, job.local)
        order = np.argsort(-steps, kind="stable")
        is_sorted = bool((order == np.arange(len(order))).all())
        ordered, rows = (job, out) if is_sorted else (job.take(order), torch.empty_like(out))
        num_active, most = int((steps > 0).sum()), chunk_size(job)
        size = max(1, -(-num_active // -(-num_active // most))) if num_active else 1  # chunks of one size
        totals, sums = np.zeros(len(order)), np.zeros(len(order))
        self._flat.module.train()
        with torch.no_grad():
            if num_active:
                self._fit_chunks(ordered.part(0, num_active), rows, size, totals, sums)
            rows[num_active:].copy_(ordered.params[num_active:])
            if job.change:
                rows[num_active:].zero_()
        losses: Losses = np.where(totals > 0, sums / np.where(totals > 0, totals, 1), np.nan)
        if is_sorted:
            return losses
        out.index_copy_(0, torch.from_numpy(order).to(out.device), rows)
        return losses[np.argsort(order)]

    def _fit_chunks(self, job: Job, rows: Tensor, size: int, totals: Losses, sums: Losses) -> None:
        """Train clients sorted by their steps, of which each takes one at least; add up what they have seen."""
        ahead = _ahead(job, self._loss)  # drawing batches for all clients costs little more than for those of a chunk
        for start in range(0, len(job.sizes), size):
            part = job.part(start, min(start + size, len(job.sizes)))
            layouts = _layouts(part, self._loss) if ahead is None else [ahead.part(start, start + size)]
            cut = slice(start, start + len(part.sizes))
            totals[cut], sums[cut] = self._fit_chunk(part, rows[cut], layouts)

    def _fit_chunk(self, job: Job, rows: Tensor, layouts: Iterable[_Layout]) -> tuple[Losses, Losses]:
        """Train one chunk's clients into their ``rows``; what their examples weighed, and the sums of their losses."""
        is_plain = job.local.optimizer.is_plain and job.terms.is_none
        parameters, gradient = self._stack("parameters", len(rows)), None
        received = self._flat.split(job.params)
        torch._foreach_copy_(parameters, received)
        steps, rate = None, job.local.learning_rate if is_plain else None
        if not is_plain:
            gradient = self._stack("gradient", len(rows))
            steps = steps_of(job.local, job.terms, self._flat, parameters)
        constants, held, slopes, num_bound = self._constants(job), parameters, gradient, -1
        totals, sums = np.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        backward = self._way.backward
        for layout in layouts:
            feed = _Feed(job, layout, self._flat.stacks)
            for first, last, num in layout.segments():
                if num != num_bound:
                    held, slopes, num_bound = [p[:num] for p in held], slopes and [s[:num] for s in slopes], num
                    self._way.bind(held, slopes, {name: part[:num] for name, part in constants.items()})
                    if steps is not None:
                        steps.keep(num)
                for step, batch in enumerate(feed.batches(first, last, num), first):
                    losses = backward(batch, rate)
                    if losses is not None:
                        sums[:num] += losses * layout.totals[step, :num]
                    if steps is not None and slopes is not None:
                        steps.apply(held, slopes)
            totals += layout.totals.sum(dim=0, dtype=torch.float64).cpu().numpy()
            sums -= feed.likelihoods()
        if self._flat.has_buffers:
            rows.zero_() if job.change else rows.copy_(job.params)
        self._write(job, parameters, received, self._flat.split(rows))
        return totals, sums.cpu().numpy()

    def _write(self, job: Job, parameters: list[Tensor], received: list[Tensor], places: list[Tensor]) -> None:
        """The stacks as rows, less what the clients received where the job asks for the change."""
        if not job.change:
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


class _Layout(NamedTuple):
    """Some consecutive steps of clients, laid out ahead: all that is small."""

    places: Tensor  # (num_steps, num_clients, width): rows among everyone's; (1, ...) where every step takes the same
    y: Tensor | None  # (num_steps, num_clients, width, ...)
    shares: Tensor  # (num_steps, num_clients, width): each example's share of its batch's mean, 0 where padded
    totals: Tensor  # (num_steps, num_clients): what the examples of each batch weigh
    counts: Integers  # (num_steps, num_clients): examples that are not padding
    num_active: list[int]  # clients that take each step
    whole: bool = False  # every step takes all rows of each client as they lie

    def part(self, start: int, stop: int) -> _Layout:
        """The same of consecutive clients."""
        cut, active = slice(start, stop), [min(num, stop) - start for num in self.num_active if num > start]
        num = 1 if len(self.places) == 1 else len(active)
        y = None if self.y is None else self.y[:num, cut]
        own = (self.places[:num, cut], y, self.shares[:num, cut], self.totals[: len(active), cut])
        return _Layout(*own, self.counts[:num, cut], active, self.whole)

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Runs of steps that the same clients take: first, last (not with it), how many clients."""
        first = 0
        for num, steps in groupby(self.num_active):
            last = first + len(list(steps))
            yield first, last, num
            first = last


class _Feed:
    """The batches of a chunk: views of its layout, and its examples in a buffer that is used again and again."""

    def __init__(self, job: Job, layout: _Layout, buffers: dict[str, list[Tensor]]) -> None:
        assert isinstance(job.examples, Rows)
        self._layout, self._everyone, self._buffers = layout, job.examples.everyone.x, buffers
        self._repeats = len(layout.places) == 1 and len(layout.num_active) > 1
        self._seen = torch.zeros_like(layout.shares)  # each example's log-likelihood, where the way writes it
        self._whole = job.examples.whole().x if layout.whole else None
        place_bytes = layout.places.shape[2] * job.examples.everyone.row_bytes
        self._most = max(1, _GATHERED_BYTES // max(1, place_bytes))  # clients' batches gathered at once

    def batches(self, first: int, last: int, num: int) -> Iterator[Stacked]:
        """One batch a step, of the first ``num`` clients."""
        layout = self._layout
        if self._repeats:
            x = self._features(0, 1, num)[0]
            y = None if layout.y is None else layout.y[0, :num]
            yield from repeat(Stacked(x, y, layout.shares[0, :num], layout.counts[0, :num]), last - first)
            return
        size = max(1, self._most // num)
        for start in range(first, last, size):
            cut = slice(start, min(start + size, last))
            xs = self._features(cut.start, cut.stop, num)
            ys = [None] * len(xs) if layout.y is None else layout.y[cut, :num].unbind(0)
            shares, seen = layout.shares[cut, :num].unbind(0), self._seen[cut, :num].unsqueeze(-1).unbind(0)
            yield from map(Stacked, xs, ys, shares, layout.counts[cut, :num], seen)

    def likelihoods(self) -> Tensor:
        """Each client's sum of log-likelihoods, by their examples' weights: (num_clients,) float64."""
        layout = self._layout
        if self._repeats:
            return layout.totals.new_zeros(len(layout.places[0]), dtype=torch.float64)
        weights = layout.shares * layout.totals.unsqueeze(2)
        return (self._seen * weights).sum(dim=(0, 2), dtype=torch.float64)

    def _features(self, first: int, last: int, num: int) -> Sequence[Features]:
        """The examples of some steps: one (num_clients, width, ...) each."""
        if self._whole is not None:
            x = self._whole
            return [{name: part[:num] for name, part in x.items()} if isinstance(x, dict) else x[:num]]
        index = self._layout.places[first:last, :num]
        flat = index.reshape(-1)
        if not isinstance(self._everyone, dict):
            return self._gather("", self._everyone, flat, index.shape).unbind(0)
        named = {name: self._gather(name, part, flat, index.shape) for name, part in self._everyone.items()}
        return [{name: part[i] for name, part in named.items()} for i in range(last - first)]

    def _gather(self, name: str, rows: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """``rows[index]`` in a buffer, laid out as ``shape``."""
        held = self._buffers.get(f"x.{name}")
        if held is None or len(held[0]) < len(index) or held[0].shape[1:] != rows.shape[1:]:
            held = self._buffers[f"x.{name}"] = [rows.new_empty((len(index), *rows.shape[1:]))]
        return torch.index_select(rows, 0, index, out=held[0][: len(index)]).view(*shape, *rows.shape[1:])


def _ahead(job: Job, loss: Loss) -> _Layout | None:
    """All steps of a block, where they may be laid out ahead."""
    if job.local.batch_size is None or job.local.batch_size >= int(job.sizes.max()):  # all take as many steps
        return next(_layouts(job, loss))
    plan = laid_out(job.keys, job.sizes, job.local, _AHEAD)
    return None if plan is None else _layout(job, loss, *plan)


def _layouts(job: Job, loss: Loss) -> Iterator[_Layout]:
    """All steps of clients that each take one at least, as many at a time as may be laid out ahead."""
    steps = num_steps(job.sizes, job.local)
    plan = batches(job.keys, job.sizes, job.local)
    if job.local.batch_size is None or job.local.batch_size >= int(job.sizes.max()):
        rows, real = next(plan)
        layout, num = _layout(job, loss, rows[None], real[None]), int(steps[0])
        whole = bool((job.sizes == job.sizes[0]).all())
        yield layout._replace(totals=layout.totals.expand(num, -1), num_active=[len(steps)] * num, whole=whole)
        return
    size = max(1, _AHEAD // max(1, len(steps) * job.local.batch_size))
    while held := list(islice(plan, size)):
        yield _layout(job, loss, np.stack([rows for rows, _ in held]), np.stack([real for _, real in held]))


def _layout(job: Job, loss: Loss, rows: Integers, real: npt.NDArray[np.bool_]) -> _Layout:
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
    if y is not None and isinstance(loss, NamedLoss) and y.dim() > 3:
        weights *= loss.weights(y.flatten(0, 2), None).view(weights.shape)
    totals = weights.sum(dim=2)
    shares = weights / (totals + (totals == 0)).unsqueeze(2)
    counts = real.sum(axis=2)
    return _Layout(places, y, shares, totals, counts, (counts > 0).sum(axis=1).tolist())


def _width(job: Job) -> int:
    """Examples in the widest batch."""
    widest = int(job.sizes.max(initial=0))
    return widest if job.local.batch_size is None else min(job.local.batch_size, widest)


def chunk_size(job: Job) -> int:
    """How many clients train at once: as many as keep parameters and a batch in the processor's cache."""
    row_bytes = job.examples[int(job.sizes.argmax())].row_bytes
    client_bytes = 4 * job.params.shape[1] + _width(job) * row_bytes
    return max(_FEWEST, _CHUNK_BYTES[job.params.device.type] // max(1, client_bytes))
