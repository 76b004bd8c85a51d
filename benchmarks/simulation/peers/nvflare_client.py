"""What each of NVFlare's client processes runs: receive, train one local epoch, send; the first keeps the time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import models
import nvflare.client as flare
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from workloads import load


class Model(nn.Module):
    """The workload's model under a name that NVFlare's server can import."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = models.build(name)


def main(folder: str, clock: str) -> None:
    """``folder`` holds the workload; a line of seconds is added to ``clock`` whenever a round begins."""
    torch.set_num_threads(1)
    workload = load(Path(folder), mapped=True)
    setting = workload.setting
    flare.init()
    site = int(flare.get_site_name().split("-")[1]) - 1  # site-1, site-2, ...
    x, y = (torch.from_numpy(rows) for rows in workload.client(site))
    model = Model(setting.name)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        if site == 0:
            with open(clock, "a", encoding="utf-8") as file:
                file.write(f"{time.time()}\n")
        model.load_state_dict({name: torch.as_tensor(value) for name, value in received.params.items()})
        for batch_x, batch_y in zip(x.split(setting.batch_size), y.split(setting.batch_size), strict=True):
            optimizer.zero_grad()
            cross_entropy(model.layers(batch_x), batch_y).backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": len(x)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
