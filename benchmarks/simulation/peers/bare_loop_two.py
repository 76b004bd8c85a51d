"""R1: the bare loop in two processes of one thread, with parameters and sums in shared memory."""

from __future__ import annotations

from functools import partial
from multiprocessing.connection import Connection

import models
import torch
import torch.multiprocessing as processes
from job import Job
from peers.bare_loop import Client
from torch import Tensor
from workloads import Workload

NUM_PROCESSES = 2


def work(workload: Workload, received: list[Tensor], total: list[Tensor], line: Connection) -> None:
    """Train the cohorts that come down the line; what it sums up is in ``total``. Ends at None."""
    torch.set_num_threads(1)
    client = Client(workload)
    while (cohort := line.recv()) is not None:
        for tensor in total:
            tensor.zero_()
        line.send(client.add_all(total, received, cohort))


def main() -> None:
    job = Job()
    torch.set_num_threads(1)
    processes.set_start_method("fork")  # the examples are shared as they lie
    current = [torch.from_numpy(value).share_memory_() for value in job.workload.initial]
    totals = [[torch.zeros_like(t).share_memory_() for t in current] for _ in range(NUM_PROCESSES)]
    lines, workers = [], []
    for total in totals:
        line, end = processes.Pipe()
        workers.append(processes.Process(target=work, args=(job.workload, current, total, end)))
        workers[-1].start()
        lines.append(line)
    job.begin()
    for cohort in job.schedule:
        for number, line in enumerate(lines):
            line.send(cohort[number::NUM_PROCESSES])
        num_examples = sum(line.recv() for line in lines)
        for tensor, *parts in zip(current, *totals, strict=True):
            torch.sum(torch.stack(parts), 0, out=tensor).div_(num_examples)
        job.round_done(partial(models.arrays, current))
    for line in lines:
        line.send(None)
    for worker in workers:
        worker.join()
    job.report()


if __name__ == "__main__":
    main()
