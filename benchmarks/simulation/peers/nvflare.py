"""NVFlare's simulator: FedAvgRecipe in a SimEnv, a process for each client, the server's model on disk at the end.

The clients are the first ones of the workload, all of them in every round. A round lasts from the moment when the first
client receives the parameters until it receives the next, the last one until the model is saved.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import models
import numpy as np
import torch
from job import Job
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

SCRIPT = Path(__file__).with_name("nvflare_client.py")


def main() -> None:
    job = Job()
    setting = job.workload.setting
    scratch = Path(tempfile.mkdtemp())
    os.chdir(scratch)
    clock, checkpoint = scratch / "clock", scratch / "initial.pt"
    initial = models.build_with(setting.name, job.workload.initial).state_dict()
    torch.save({f"layers.{name}": tensor for name, tensor in initial.items()}, checkpoint)
    recipe = FedAvgRecipe(
        name="job",
        model={"class_path": "peers.nvflare_client.Model", "args": {"name": setting.name}},
        initial_ckpt=str(checkpoint),
        min_clients=setting.cohort_size,
        num_rounds=job.num_rounds,
        train_script=str(SCRIPT),
        train_args=f"{job.folder} {clock}",
    )
    environment = SimEnv(num_clients=setting.cohort_size, num_threads=setting.cohort_size, workspace_root=str(scratch))
    job.begin()
    recipe.execute(environment)
    began = [float(line) for line in clock.read_text().split()]
    saved = next(scratch.rglob("FL_global_model.pt"))
    job.rounds_were(np.diff([*began, saved.stat().st_mtime]).tolist(), first_result_at=began[1])
    job.keep(job.num_rounds, [tensor.numpy() for tensor in torch.load(saved, weights_only=False)["model"].values()])
    job.report()


if __name__ == "__main__":
    main()
