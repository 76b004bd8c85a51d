"""Precision: numbers too small to matter, and modules that train under ``torch.autocast`` in bfloat16.

Parameters, gradients and the optimizer's state stay float32, and so does every loss by name: scores are cast back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def flushed() -> Iterator[None]:
    """Numbers below 1e-38 count as zero for as long as this lasts, in this thread.

    A processor takes some hundred cycles for each: where a model is sure of a class, the probabilities of the others
    are as small, and training took up to three times as long.
    """
    was_on = bool(np.float32(1e-40) * np.float32(1) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_on)


def lower(module: nn.Module, device: torch.device) -> None:
    """From now on ``module`` trains in bfloat16; in evaluation mode nothing changes."""
    forward = module.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        # Weights change between two forwards: a cast copy must not outlive one.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            out = forward(*args, **kwargs)
        return _float(out)

    module.forward = mixed


def _float(out: Any) -> Any:
    if isinstance(out, tuple) and type(out) is tuple:
        return tuple(_float(part) for part in out)
    return out.float() if isinstance(out, Tensor) and out.is_floating_point() else out
