"""Flower: ``run_simulation`` with Ray actors, the examples memory-mapped and the model kept in each actor.

Flower draws its own clients, so that its loss is another draw's.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0", RAY_memory_monitor_refresh_ms="0")

import models
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from job import Job
from torch import nn
from torch.nn.functional import cross_entropy
from workloads import Workload, load


@cache
def resident(folder: str, threads: int) -> tuple[Workload, nn.Module]:
    """The workload and a model, once in each actor."""
    torch.set_num_threads(threads)
    workload = load(Path(folder), mapped=True)
    return workload, models.build(workload.setting.name)


def client_app(folder: str, threads: int) -> ClientApp:
    """What a client does when it is asked to train."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from peers.flower import resident  # the actor's own, not a copy that travels with this function

        workload, model = resident(folder, threads)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = (torch.from_numpy(rows) for rows in workload.client(int(context.node_config["partition-id"])))
        optimizer = torch.optim.SGD(model.parameters(), lr=workload.setting.learning_rate)
        size = workload.setting.batch_size
        for batch_x, batch_y in zip(x.split(size), y.split(size), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(batch_x), batch_y).backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(job: Job) -> ServerApp:
    """FedAvg that tells the job when a round ends: when the next one is configured, and at the end."""
    app, setting = ServerApp(), job.workload.setting

    def values(arrays: ArrayRecord) -> Any:
        return lambda: [tensor.numpy() for tensor in arrays.to_torch_state_dict().values()]

    class Timed(FedAvg):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid) -> Any:
            if server_round > 1:
                job.round_done(values(arrays))
            return super().configure_train(server_round, arrays, config, grid)

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        fraction = setting.cohort_size / setting.num_clients
        strategy = Timed(fraction_train=fraction, fraction_evaluate=0.0, min_available_nodes=setting.num_clients)
        initial = ArrayRecord(models.build_with(setting.name, job.workload.initial).state_dict())
        job.begin()
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=job.num_rounds)
        job.round_done(values(result.arrays))

    return app


def run() -> None:
    job = Job(mapped=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    actors = int(job.options["actors"])
    run_simulation(
        server_app=server_app(job),
        client_app=client_app(str(job.folder), job.threads),
        num_supernodes=job.workload.setting.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 2 / actors, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": 2,
                "object_store_memory": 500 * 2**20,
                "logging_level": "ERROR",
                "log_to_driver": False,
            },
        },
    )
    job.report()


if __name__ == "__main__":
    run()
