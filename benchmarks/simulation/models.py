"""The models in plain PyTorch, and how a trained one is scored; every peer that uses PyTorch trains these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from workloads import Floats, Integers, Workload


def build(name: str) -> nn.Module:
    """The model of a workload, as anybody would write it."""
    if name == "W1":
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    if name == "W3":
        return nn.Linear(30, 2)
    if name == "lr_mnist":
        return nn.Linear(784, 10)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Linear(128, 62),
    )


def build_with(name: str, values: Sequence[Floats]) -> nn.Module:
    """The model with the given parameters."""
    model = build(name)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.from_numpy(np.array(value)))
    return model


def arrays(tensors: Iterable[torch.Tensor]) -> list[Floats]:
    """Parameters as arrays: views of them."""
    return [tensor.detach().numpy() for tensor in tensors]


def loss(workload: Workload, parameters: Sequence[Floats]) -> float:
    """Mean cross-entropy over all training rows of all clients."""
    return _score(workload, parameters, workload.x, workload.y)[0]


def accuracy(workload: Workload, parameters: Sequence[Floats]) -> float:
    """The share of all clients' held-out rows that is classified right."""
    return _score(workload, parameters, workload.test_x, workload.test_y)[1]


def _score(workload: Workload, parameters: Sequence[Floats], x: Floats, y: Integers) -> tuple[float, float]:
    model, total, right = build_with(workload.setting.name, parameters), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(x), 2000):
            rows = slice(start, start + 2000)
            scores, labels = model(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])
            total += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
            right += int((scores.argmax(1) == labels).sum())
    return total / len(x), right / len(x)
