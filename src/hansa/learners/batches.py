"""Which rows make up each local step of each client: one plan for the plain loop and for the batched way.

A client walks through a random order of its rows, drawn anew from its own key in every local epoch; the last batch of
an epoch may be short. A batch that holds all of a client's rows (``batch_size=None``, or no fewer than it has) takes
them as they lie: nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hansa.core.key import Key
from hansa.data.permutations import permutations
from hansa.local_training import LocalTraining

Indices = npt.NDArray[np.int64]


def num_steps(sizes: Indices, local: LocalTraining) -> Indices:
    """Local steps of clients with ``sizes`` rows: (num_clients,); an empty client takes none.

    >>> num_steps(np.array([5, 4, 0]), LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)).tolist()
    [4, 2, 0]
    """
    if local.steps is not None:
        return np.where(sizes > 0, local.steps, 0)
    return (local.epochs or 0) * _per_epoch(sizes, local)


def batches(
    keys: Sequence[Key], sizes: Indices, local: LocalTraining
) -> Iterator[tuple[Indices, npt.NDArray[np.bool_]]]:
    """For each local step: rows (num_clients, batch_size) and which of them are real, False where a client has none.

    Padded places point at row 0. A client's own rows do not depend on the other clients of the block.
    """
    steps, per_epoch = num_steps(sizes, local), np.maximum(_per_epoch(sizes, local), 1)
    widest = int(sizes.max(initial=0))
    width = widest if local.batch_size is None else min(local.batch_size, widest)
    order = np.tile(np.arange(widest, dtype=np.int64), (len(sizes), 1))
    shuffled = sizes > width
    clients, columns = np.arange(len(sizes))[:, None], np.arange(width)
    for step in range(int(steps.max(initial=0))):
        epoch, within = np.divmod(step, per_epoch)
        fresh = np.flatnonzero(shuffled & (within == 0) & (step < steps))
        if len(fresh):
            streams = [keys[i].child("epoch", int(epoch[i])) for i in fresh.tolist()]
            drawn = permutations(streams, sizes[fresh])
            order[fresh, : drawn.shape[1]] = drawn
        places = within[:, None] * width + columns if width else columns[None, :]
        real = (places < sizes[:, None]) & (step < steps)[:, None]
        yield np.where(real, order[clients, np.minimum(places, max(widest - 1, 0))], 0), real


def laid_out(
    keys: Sequence[Key], sizes: Indices, local: LocalTraining, most: int
) -> tuple[Indices, npt.NDArray[np.bool_]] | None:
    """All that ``batches`` gives, at once: rows and which are real, both (num_steps, num_clients, batch_size).

    None where that would be more than ``most`` rows, or drawing it ahead would.
    """
    steps, per_epoch = num_steps(sizes, local), np.maximum(_per_epoch(sizes, local), 1)
    num, widest = int(steps.max(initial=0)), int(sizes.max(initial=0))
    width = widest if local.batch_size is None else min(local.batch_size, widest)
    epochs = -(-steps // per_epoch)
    if not num or len(sizes) * max(num * width, int(epochs.max()) * widest) > most:
        return None
    drawn = np.flatnonzero((sizes > width) & (epochs > 0))
    order = np.broadcast_to(np.arange(widest, dtype=np.int64), (int(epochs.max()), len(sizes), widest))
    if len(drawn):
        order, pairs = order.copy(), [(e, i) for i in drawn.tolist() for e in range(int(epochs[i]))]
        epoch, client = np.array(pairs).T
        found = permutations([keys[i].child("epoch", e) for e, i in pairs], sizes[client])
        order[epoch, client, : found.shape[1]] = found
    step = np.arange(num)[:, None]
    within = (step % per_epoch)[:, :, None] * width + np.arange(width)
    real = (within < sizes[:, None]) & (step < steps)[:, :, None]
    rows = order[(step // per_epoch)[:, :, None] * real, np.arange(len(sizes))[:, None], np.where(real, within, 0)]
    return np.where(real, rows, 0), real


def _per_epoch(sizes: Indices, local: LocalTraining) -> Indices:
    """Batches in one local epoch of each client."""
    if local.batch_size is None:
        return np.minimum(sizes, 1)
    return -(-sizes // local.batch_size)
