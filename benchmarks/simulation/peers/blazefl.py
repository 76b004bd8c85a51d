"""BlazeFL: its FedAvg, one client after another, in a pool of threads, or in a pool of processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import blazefl.contrib.fedavg as fedavg
import models
import torch
from job import Job
from peers.slices import Loaders
from torch import nn

fedavg.tqdm = lambda steps, **_: steps  # no progress bar


class Models:
    """BlazeFL asks for models by name."""

    def select_model(self, name: str) -> nn.Module:
        """A fresh one."""
        return models.build(name)


class Examples:
    """BlazeFL asks for loaders by client."""

    def __init__(self, job: Job) -> None:
        mode = job.options.get("mode")
        self._loaders = Loaders(job.workload, slices=job.options.get("slices", False), shared=mode == "process")

    def get_dataset(self, type_: Any, cid: int) -> None:
        """Not called for FedAvg."""

    def set_dataset(self, type_: Any, cid: int, dataset: Any) -> None:
        """Not called for FedAvg."""

    def get_dataloader(self, type_: Any, cid: int, batch_size: int, generator: Any = None) -> Any:
        """One client's batches."""
        return self._loaders.loader(cid, batch_size)


def trainer_of(job: Job, examples: Examples) -> Any:
    """The trainer of the setting's mode."""
    setting = job.workload.setting
    shared = {
        "model_selector": Models(),
        "model_name": setting.name,
        "dataset": examples,
        "device": "cpu",
        "num_clients": setting.num_clients,
        "epochs": 1,
        "batch_size": setting.batch_size,
        "lr": setting.learning_rate,
        "seed": 1,
    }
    mode = job.options.get("mode")
    if mode == "thread":
        return fedavg.FedAvgThreadPoolClientTrainer(**shared, num_parallels=2)
    if mode == "process":
        folder = Path(mkdtemp())
        places = {"share_dir": folder / "share", "state_dir": folder / "state"}
        memory = fedavg.IPCMode.SHARED_MEMORY
        return fedavg.FedAvgProcessPoolClientTrainer(**shared, **places, num_parallels=2, ipc_mode=memory)
    return fedavg.FedAvgBaseClientTrainer(**shared)


def main() -> None:
    job = Job()
    torch.set_num_threads(job.threads)
    setting, examples = job.workload.setting, Examples(job)
    server = fedavg.FedAvgBaseServerHandler(
        Models(),
        setting.name,
        examples,
        job.num_rounds,
        setting.num_clients,
        setting.cohort_size / setting.num_clients,
        "cpu",
        setting.batch_size,
        1,
    )
    server.model.load_state_dict(models.build_with(setting.name, job.workload.initial).state_dict())
    server.num_clients_per_round = setting.cohort_size
    trainer = trainer_of(job, examples)
    job.begin()
    for cohort in job.schedule:
        trainer.local_process(server.downlink_package(), cohort)
        for package in trainer.uplink_package():
            server.load(package)
        job.round_done(partial(models.arrays, server.model.parameters()))
    job.report()


if __name__ == "__main__":
    main()
