"""The federation of the large-model benchmark: a model of NUM_PARAMS parameters, which nobody here trains."""

import itertools
import os

import numpy as np

import hansa
from hansa.core.layout import Layout
from hansa.metrics import Metrics

NUM_PARAMS = int(os.environ.get("HANSA_BENCHMARK_PARAMS", "1000"))
PERIOD = 2**18 + 1  # values after which a row begins again: of no block of columns a multiple


class Wide:
    """Ten tensors; the loss is that of the first parameter."""

    reports_loss = False
    metrics = Metrics(())

    def __init__(self, num_params):
        sizes = np.diff(np.linspace(0, num_params, 11).astype(int)).tolist()
        self.layout = Layout(
            names=tuple(f"part{number}" for number in range(10)),
            shapes=tuple((size,) for size in sizes),
            dtypes=("float32",) * 10,
            roles=("parameter",) * 10,
        )

    def __repr__(self):
        return f"Wide({self.layout.num_params})"

    def initial(self, key):
        """All of it, in memory, as any learner gives it."""
        return np.resize(pattern("initial"), self.layout.num_params)

    def check(self, dataset, client):
        """Anything will do."""

    def evaluate(self, params, datasets):
        rows = [
            self.metrics.sums(row[:1], data.y, float(row[0]) ** 2, 1)
            for row, data in zip(params, datasets, strict=True)
        ]
        return np.array(rows)


def pattern(name):
    """What a row repeats: the model's first one, or a client's update."""
    return np.random.default_rng(list(name.encode())).normal(size=PERIOD).astype(np.float32)


def build_model():
    """The same parameters as a module of PyTorch's, in forty tensors."""
    import torch
    from torch import nn

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            places = np.linspace(0, NUM_PARAMS, 41).astype(int)
            for number, (start, stop) in enumerate(itertools.pairwise(places)):
                values = np.resize(np.roll(pattern("initial"), -start), stop - start)
                setattr(self, f"part{number:02}", nn.Parameter(torch.from_numpy(values)))

        def forward(self, x):
            return x * self.part00[:1]

    return Parts()


def evaluate_on():
    """A row of the server's own."""
    return hansa.Dataset(np.zeros((1, 1), np.float32), np.zeros(1, np.float32))


IS_TORCH = os.environ.get("HANSA_BENCHMARK_LEARNER") == "torch"
learner = hansa.TorchLearner(build_model, loss="mse", metrics=()) if IS_TORCH else Wide(NUM_PARAMS)
app = hansa.App(
    federation=hansa.Federation(learner=learner, algorithm=hansa.FedAvg(client_learning_rate=0.1)),
    schedule=hansa.Schedule(num_rounds=1, cohort_size=2),
    evaluate_on=None if IS_TORCH else evaluate_on,
)
