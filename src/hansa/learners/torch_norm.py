"""BatchNorm for a block of clients: statistics over each client's real examples, running ones in each client's buffers.

A client that has one value a channel uses its running statistics and leaves them alone, as in the plain loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hansa.learners.torch_block import BlockStep, CannotBatch, on_block


def batch_norm(
    block: BlockStep,
    function: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` by channel; in training it moves the running statistics."""
    if not training:
        return function(x, running_mean, running_var, weight, bias, False, momentum, eps)

    def work(
        rows: Tensor, mean: Tensor | None, var: Tensor | None, scale: Tensor | None, shift: Tensor | None
    ) -> Tensor:
        return _normalised(block, rows, (mean, var), (scale, shift), momentum, eps)

    return on_block(work, x, running_mean, running_var, weight, bias)


def _normalised(
    block: BlockStep,
    rows: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    affine: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> Tensor:
    """``rows`` (num_clients, num_rows, num_channels, ...)."""
    values = (rows.flatten(3) if rows.dim() > 3 else rows.unsqueeze(3)).float()
    mask = block.mask(values.shape[1], rows.device)
    nums = block.counts * block.repeats(values.shape[1]) * values.shape[3]
    count = torch.from_numpy(nums.astype(np.float32)).to(rows.device).unsqueeze(1)
    if mask is None:
        var, mean = torch.var_mean(values, (1, 3), correction=0)
    else:
        mask = mask[:, :, None, None]
        mean = (values * mask).sum((1, 3)) / count
        var = ((values - mean[:, None, :, None]).square() * mask).sum((1, 3)) / count
    running_mean, running_var = running
    if running_mean is not None and running_var is not None:
        single = (count == 1).to(rows.dtype)
        found = mean.detach(), var.detach() * (count / (count - 1).clamp(min=1))
        if bool((nums == 1).any()):
            mean, var = torch.lerp(mean, running_mean, single), torch.lerp(var, running_var, single)
        running_mean.detach().lerp_(found[0], momentum * (1 - single))
        running_var.detach().lerp_(found[1], momentum * (1 - single))
    elif bool((nums == 1).any()):
        raise CannotBatch("BatchNorm without running statistics cannot normalise a single value")
    scale = torch.rsqrt(var + eps)
    scale = scale if affine[0] is None else scale * affine[0]
    shift = -mean * scale if affine[1] is None else affine[1] - mean * scale
    return (values * scale[:, None, :, None] + shift[:, None, :, None]).view(rows.shape).to(rows.dtype)
