"""FedLab: the serial trainer and the synchronous server in its stand-alone pipeline.

Its server weighs clients equally; here an update carries its number of examples, and FedLab's aggregator gets them.
"""

from __future__ import annotations

from functools import partial

import models
import torch
from job import Job
from peers.slices import Loaders
from peers.stand_ins import stand_in
from torch import Tensor


def main() -> None:
    stand_in("torchvision", "torchvision.transforms", "torchvision.datasets", "pynvml")
    from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
    from fedlab.contrib.algorithm.basic_server import SyncServerHandler
    from fedlab.core.standalone import StandalonePipeline
    from fedlab.utils.aggregator import Aggregators
    from fedlab.utils.serialization import SerializationTool

    job = Job()
    torch.set_num_threads(job.threads)
    setting, sizes = job.workload.setting, job.workload.sizes
    loaders = Loaders(job.workload, slices=job.options.get("slices", False))

    class Examples:
        def get_dataloader(self, client: int, batch_size: int) -> object:
            return loaders.loader(client, batch_size)

    class Weighted(SGDSerialClientTrainer):
        def local_process(self, payload: list[Tensor], id_list: list[int]) -> None:
            for client in id_list:
                loader = self.dataset.get_dataloader(client, self.batch_size)
                self.cache.append([*self.train(payload[0], loader), int(sizes[client])])

    class Replay(SyncServerHandler):
        def sample_clients(self) -> list[int]:
            return job.schedule[self.round]

        def global_update(self, buffer: list[list[Tensor]]) -> None:
            parameters, weights = zip(*buffer, strict=True)
            mean = Aggregators.fedavg_aggregate(list(parameters), list(weights))
            SerializationTool.deserialize_model(self._model, mean)

    class Timed(StandalonePipeline):
        def evaluate(self) -> None:
            job.round_done(partial(models.arrays, self.handler._model.parameters()))

    trainer = Weighted(models.build_with(setting.name, job.workload.initial), setting.num_clients)
    trainer.setup_dataset(Examples())
    trainer.setup_optim(1, setting.batch_size, setting.learning_rate)
    server = Replay(
        models.build_with(setting.name, job.workload.initial),
        job.num_rounds,
        setting.cohort_size / setting.num_clients + 1e-9,
    )
    pipeline = Timed(server, trainer)
    job.begin()
    pipeline.main()
    job.report()


if __name__ == "__main__":
    main()
