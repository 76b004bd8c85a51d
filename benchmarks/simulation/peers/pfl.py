"""pfl: ``SimulatedBackend`` with FederatedAveraging; under torchrun, a share of the clients in each process."""

from __future__ import annotations

import os
from functools import partial
from types import MethodType
from typing import Any

import models
import numpy as np
import torch
from job import Job, is_first_process
from torch import Tensor
from torch.nn.functional import cross_entropy

os.environ["PFL_PYTORCH_DEVICE"] = "cpu"

from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


def loss(self: Any, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
    """What pfl asks of a model."""
    return cross_entropy(self(x), y)


def metrics(self: Any, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, Any]:
    """Called for evaluation only, which happens before round 1."""
    return {"loss": Weighted(cross_entropy(self(x), y, reduction="sum").item(), len(y))}


def main() -> None:
    job = Job()
    torch.set_num_threads(job.threads)
    setting = job.workload.setting
    model = models.build_with(setting.name, job.workload.initial)
    model.loss, model.metrics = MethodType(loss, model), MethodType(metrics, model)
    x, y = torch.from_numpy(job.workload.x), torch.from_numpy(job.workload.y)
    starts = job.workload.starts.tolist()
    order = iter([client for cohort in job.schedule for client in cohort])

    def dataset(client: int) -> Dataset:
        rows = slice(starts[client], starts[client + 1])
        return Dataset([x[rows], y[rows]], user_id=str(client))

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            if is_first_process():
                job.round_done(partial(models.arrays, model.parameters()))
            return False, Metrics()

    np.random.seed(0)
    clients = FederatedDataset(dataset, lambda: next(order, 0))
    backend = SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()])
    central = PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0))
    plan = NNAlgorithmParams(
        central_num_iterations=job.num_rounds,
        evaluation_frequency=10**6,
        train_cohort_size=setting.cohort_size,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(
        local_learning_rate=setting.learning_rate, local_num_epochs=1, local_batch_size=setting.batch_size
    )
    job.begin()
    FederatedAveraging().run(plan, backend, central, local, callbacks=[Clock()], send_metrics_to_platform=False)
    if is_first_process():
        job.report()


if __name__ == "__main__":
    main()
