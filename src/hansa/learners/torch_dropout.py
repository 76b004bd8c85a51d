"""Dropout for a block of clients: each draws from its own key, in its own order, as in the plain loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hansa.learners.torch_block import BlockStep, on_block


def dropout(
    block: BlockStep, function: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Each value is zero with probability ``p``, else divided by ``1 - p``."""
    if not training or not 0 < p < 1:
        return function(x, p, training)
    return on_block(lambda rows: rows * block.noise(rows, 1 - p), x)


def feature_dropout(
    block: BlockStep, function: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Each feature (channel) of an example is zero with probability ``p``, all its values at once."""
    if not training or not 0 < p < 1:
        return function(x, p, training)

    def work(rows: Tensor) -> Tensor:
        flat = (*rows.shape[1:3], *(1,) * (rows.dim() - 3))
        return rows * block.noise(rows, 1 - p, flat)

    return on_block(work, x)
