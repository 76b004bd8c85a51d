"""R0: one client after another in plain PyTorch, with everything that can be reused reused."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import models
import torch
from job import Job
from torch import Tensor
from torch.nn.functional import cross_entropy
from workloads import Setting, Workload


class Client:
    """One model that trains as any client, and the tensors of them all."""

    def __init__(self, workload: Workload) -> None:
        self.setting: Setting = workload.setting
        self.x, self.y = torch.from_numpy(workload.x), torch.from_numpy(workload.y)
        self.starts: list[int] = workload.starts.tolist()
        self.model = models.build_with(self.setting.name, workload.initial)
        self.parameters = list(self.model.parameters())

    def train(self, received: list[Tensor], client: int) -> int:
        """One local epoch from ``received``; the result is in ``parameters``. Returns the number of examples."""
        start, stop = self.starts[client], self.starts[client + 1]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, received)
        for first in range(start, stop, self.setting.batch_size):
            rows = slice(first, min(first + self.setting.batch_size, stop))
            gradient = torch.autograd.grad(cross_entropy(self.model(self.x[rows]), self.y[rows]), self.parameters)
            with torch.no_grad():
                torch._foreach_add_(self.parameters, gradient, alpha=-self.setting.learning_rate)
        return stop - start

    def add_all(self, total: list[Tensor], received: list[Tensor], clients: Iterable[int]) -> int:
        """Train each of ``clients`` and add its parameters to ``total``, times its examples. Returns their number."""
        num_examples = 0
        for client in clients:
            count = self.train(received, client)
            with torch.no_grad():
                torch._foreach_add_(total, self.parameters, alpha=float(count))
            num_examples += count
        return num_examples


def main() -> None:
    job = Job()
    torch.set_num_threads(job.threads)
    client = Client(job.workload)
    current = [p.detach().clone() for p in client.parameters]
    job.begin()
    for cohort in job.schedule:
        total = [torch.zeros_like(p) for p in current]
        num_examples = client.add_all(total, current, cohort)
        current = [t / num_examples for t in total]
        job.round_done(partial(models.arrays, current))
    job.report()


if __name__ == "__main__":
    main()
