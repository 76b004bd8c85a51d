"""hansa by its public calls alone: a plain ``nn.Module``, a population, one ``simulate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import models
import numpy as np
from job import Job

import hansa


class Replay:
    """The workload's own cohorts, one a round, so that hansa trains the clients that every peer trains."""

    def __init__(self, schedule: Sequence[Sequence[int]]) -> None:
        self._rounds: Iterator[Sequence[int]] = iter([sorted(cohort) for cohort in schedule])

    def cohort(self, ids: Sequence[str], cohort_size: int, key: hansa.Key) -> tuple[str, ...]:
        """The next cohort, in the order of ``ids``."""
        return itemgetter(*next(self._rounds))(ids)  # type: ignore[no-any-return]


def federation_of(job: Job) -> tuple[hansa.Federation, np.ndarray]:
    """What is learned, and the vector it starts from."""
    setting, initial = job.workload.setting, job.workload.initial
    rate, learner = setting.learning_rate, job.options.get("learner", "torch")
    if learner == "torch":
        chosen: Any = hansa.TorchLearner(partial(models.build, setting.name))
    else:
        chosen = hansa.LinearLearner(num_features=setting.shape[0], num_classes=setting.num_classes)
        if setting.num_classes == 2:  # one logit instead of two: their difference, which moves twice as fast
            initial, rate = tuple(value[1:] - value[:1] for value in initial), 2 * rate
    algorithm = hansa.FedAvg(client_learning_rate=rate, local_epochs=1, batch_size=setting.batch_size)
    return hansa.Federation(learner=chosen, algorithm=algorithm), np.concatenate([v.reshape(-1) for v in initial])


def runtime_of(word: str) -> Any:
    """``auto``, or a runtime by its name, with a number of workers: ``InProcess``, ``Processes:2``, ``Ray:2``."""
    if word == "auto":
        return word
    name, _, num_workers = word.partition(":")
    make = getattr(hansa, name)
    return make(num_workers=int(num_workers)) if num_workers else make()


def as_tensors(vector: Any, job: Job) -> list[np.ndarray]:
    """A parameter vector cut into the model's tensors."""
    shapes = [value.shape for value in job.workload.initial]
    flat = np.asarray(vector)
    if flat.size < sum(int(np.prod(shape)) for shape in shapes):  # one logit: the other class's is zero
        weight, bias = np.zeros(shapes[0], np.float32), np.zeros(shapes[1], np.float32)
        weight[1], bias[1] = flat[:-1], flat[-1]
        return [weight, bias]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def main() -> None:
    job = Job()
    workload = job.workload
    if job.options.get("threads"):
        import torch

        torch.set_num_threads(job.threads)
    population = hansa.Population(
        {f"client-{c}": hansa.Dataset(*workload.client(c)) for c in range(len(workload.sizes))}
    )
    federation, start = federation_of(job)
    scored = {"evaluate_on": hansa.Dataset(workload.test_x, workload.test_y)} if job.options.get("score") else {}
    job.begin()
    run = hansa.simulate(
        federation,
        population,
        num_rounds=job.num_rounds,
        cohort_size=workload.setting.cohort_size,
        sampler=Replay(job.schedule),
        start_from=start,
        evaluate_every=1 if scored else 10**9,
        runtime=runtime_of(job.options.get("runtime", "auto")),
        on_round=lambda row: job.round_done(list),
        **scored,
    )
    job.keep(job.num_rounds, as_tensors(run.parameters, job))
    accuracies = [row.metrics["accuracy"] for row in run.history] if scored else []
    job.report(accuracies=accuracies, note=f"runtime {run.info['runtime']}")


if __name__ == "__main__":
    main()
