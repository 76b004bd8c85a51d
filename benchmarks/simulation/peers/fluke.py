"""fluke: its FedAVG with its own loader, which cuts tensors; evaluation is off."""

from __future__ import annotations

from functools import partial
from typing import Any

import models
import torch
from job import Job
from peers.stand_ins import stand_in

ABSENT = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.datasets",
    "torchvision.datasets.utils",
    "torchvision.models",
    "wandb",
    "clearml",
    "seaborn",
    "opacus",
    "datasets",
    "tensorboard",
    "torch.utils.tensorboard",
)


def main() -> None:
    stand_in(*ABSENT)
    from fluke import FlukeENV
    from fluke.algorithms.fedavg import FedAVG
    from fluke.client import Client
    from fluke.config import OptimizerConfigurator
    from fluke.data import FastDataLoader
    from fluke.evaluation import ClassificationEval
    from fluke.server import Server

    job = Job()
    torch.set_num_threads(job.threads)
    setting = job.workload.setting
    environment = FlukeENV()
    environment.set_seed(1)
    environment.set_device("cpu")
    environment.set_evaluator(ClassificationEval(eval_every=10**6, n_classes=setting.num_classes))
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    cohorts = iter(job.schedule)

    class Replay(Server):
        def get_eligible_clients(self, *_: Any) -> list[Client]:
            return [self.clients[client] for client in next(cohorts)]

        def aggregate(self, *given: Any, **named: Any) -> None:
            super().aggregate(*given, **named)
            job.round_done(partial(models.arrays, self.model.parameters()))

    class Training(FedAVG):
        def finalize(self) -> None:
            """Nothing after the last round."""

    optimizer = OptimizerConfigurator(
        {"name": "SGD", "lr": setting.learning_rate}, {"name": "StepLR", "step_size": 1, "gamma": 1}
    )

    def client(number: int) -> Client:
        x, y = (torch.from_numpy(rows) for rows in job.workload.client(number))
        batches = FastDataLoader(
            x,
            y,
            num_labels=setting.num_classes,
            batch_size=setting.batch_size,
            shuffle=False,
            skip_singleton=False,  # it would leave out a last batch of one row
        )
        loss = torch.nn.CrossEntropyLoss()
        return Client(number, batches, None, optimizer, loss, local_epochs=1, persistency=False)

    clients = [client(number) for number in range(setting.num_clients)]
    server = Replay(models.build_with(setting.name, job.workload.initial), None, clients, weighted=True)
    training = Training(setting.num_clients, None, None, clients=clients, server=server)
    job.begin()
    training.run(job.num_rounds, setting.cohort_size / setting.num_clients + 1e-9)
    job.report()


if __name__ == "__main__":
    main()
