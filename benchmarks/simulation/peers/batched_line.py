"""R2b: many clients as one batched matrix product, forward, backward and step written out by hand.

For the MLP and for linear models. Clients of different sizes are sorted by size; a batch that is short weighs its
absent rows with zero, and who has finished leaves the block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import models
import numpy as np
import torch
from job import Job
from torch import Tensor

Step = Callable[[list[Tensor], Tensor, Tensor, float, Tensor | None], None]


def linear_step(parameters: list[Tensor], x: Tensor, target: Tensor, rate: float, parts: Tensor | None) -> None:
    """x: (clients, batch, features); target: one-hot; ``rate``: of a row; parts: (clients, batch, 1), None: ones."""
    weight, bias = parameters
    error = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2)).softmax(-1).sub_(target)
    if parts is not None:
        error.mul_(parts)
    weight.baddbmm_(error.transpose(1, 2), x, alpha=-rate)
    bias.sub_(error.sum(1), alpha=rate)


def mlp_step(parameters: list[Tensor], x: Tensor, target: Tensor, rate: float, parts: Tensor | None) -> None:
    """One hidden layer with ReLU; all rows count as one."""
    weight1, bias1, weight2, bias2 = parameters
    hidden = torch.baddbmm(bias1.unsqueeze(1), x, weight1.transpose(1, 2)).relu_()
    scores = torch.baddbmm(bias2.unsqueeze(1), hidden, weight2.transpose(1, 2))
    error = scores.softmax(-1).sub_(target)
    inner = torch.bmm(error, weight2) * (hidden > 0)
    weight2.baddbmm_(error.transpose(1, 2), hidden, alpha=-rate)
    bias2.sub_(error.sum(1), alpha=rate)
    weight1.baddbmm_(inner.transpose(1, 2), x, alpha=-rate)
    bias1.sub_(inner.sum(1), alpha=rate)


class Line:
    """All clients' examples and one way to train a block of them."""

    def __init__(self, job: Job) -> None:
        workload = job.workload
        self.setting = workload.setting
        self.step: Step = mlp_step if len(workload.initial) == 4 else linear_step
        self.x, labels = torch.from_numpy(workload.x), torch.from_numpy(workload.y)
        self.target = torch.nn.functional.one_hot(labels, self.setting.num_classes).float()
        self.starts, self.sizes = workload.starts[:-1], workload.sizes
        self.places = np.arange(self.setting.batch_size)
        self.is_even = bool((self.sizes == self.sizes[0]).all())

    def train(self, block: np.ndarray, parameters: list[Tensor]) -> None:
        """One local epoch of clients, largest first; ``parameters`` (clients, ...) are stepped in place."""
        if self.is_even:
            self._train_even(block, parameters)
        else:
            self._train_ragged(block, parameters)

    def _train_even(self, block: np.ndarray, parameters: list[Tensor]) -> None:
        size, batch, rate = int(self.sizes[0]), self.setting.batch_size, self.setting.learning_rate
        clients = torch.from_numpy(block)
        x = self.x.view(-1, size, self.x.shape[1])[clients]
        target = self.target.view(-1, size, self.target.shape[1])[clients]
        for first in range(0, size, batch):
            rows = slice(first, first + batch)
            self.step(parameters, x[:, rows], target[:, rows], rate / len(range(*rows.indices(size))), None)

    def _train_ragged(self, block: np.ndarray, parameters: list[Tensor]) -> None:
        batch, rate = self.setting.batch_size, self.setting.learning_rate / self.setting.batch_size
        firsts = np.arange(0, int(self.sizes[block[0]]), batch)
        left = self.sizes[block] - firsts[:, None]  # (steps, clients): rows not yet seen
        starts = self.starts[block] + firsts[:, None]
        for step, alive in enumerate((left > 0).sum(1).tolist()):
            if alive < len(parameters[0]):
                parameters = [p[:alive] for p in parameters]
            taken, start = np.minimum(left[step, :alive], batch), starts[step, :alive]
            parts = None if taken.min() == batch else self._parts(taken)
            if alive == 1 and parts is None:  # the largest client goes on alone: its rows lie side by side
                own = slice(int(start[0]), int(start[0]) + batch)
                x, target = self.x[None, own], self.target[None, own]
            else:
                rows = np.minimum(self.places, taken[:, None] - 1) + start[:, None]
                chosen = torch.from_numpy(rows.reshape(-1))
                x, target = (t.index_select(0, chosen).view(alive, batch, -1) for t in (self.x, self.target))
            self.step(parameters, x, target, rate, parts)

    def _parts(self, taken: np.ndarray) -> Tensor:
        """What each row counts where a client has ``taken`` rows left: nothing beyond them, more for these."""
        batch = self.setting.batch_size
        parts = np.where(self.places < taken[:, None], batch / taken[:, None], 0).astype(np.float32)
        return torch.from_numpy(parts).unsqueeze(-1)


@torch.no_grad()
def main() -> None:
    job = Job()
    torch.set_num_threads(job.threads)
    line, width = Line(job), int(job.options["block"])
    current = [torch.from_numpy(value) for value in job.workload.initial]
    job.begin()
    for cohort in job.schedule:
        clients = np.array(cohort)
        clients = clients[np.argsort(-line.sizes[clients], kind="stable")]
        total = [torch.zeros_like(p) for p in current]
        for first in range(0, len(clients), width):
            block = clients[first : first + width]
            parameters = [p.expand(len(block), *p.shape).contiguous() for p in current]
            line.train(block, parameters)
            weights = torch.from_numpy(line.sizes[block].astype(np.float32))
            for t, p in zip(total, parameters, strict=True):
                t.add_(p.sum(0), alpha=float(weights[0])) if line.is_even else t.add_(torch.tensordot(weights, p, 1))
        current = [t / float(line.sizes[clients].sum()) for t in total]
        job.round_done(partial(models.arrays, current))
    job.report()


if __name__ == "__main__":
    main()
