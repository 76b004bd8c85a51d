"""Client optimizers on lists of tensors, step for step as ``torch.optim`` has them, for one client or for a block.

The corrected gradient is ``g + linear + strength * (w - anchor)``; weight decay is added to it; coordinates that are
not trainable are then set to zero, so that they never move.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hansa.local_training import DPSGD, SGD, Adam, LocalTraining


class Terms(NamedTuple):
    """A correction as tensors on the device: (1, num_params) for all clients, or a row each."""

    linear: Tensor | None = None
    strength: float = 0.0
    anchor: Tensor | None = None
    trainable: Tensor | None = None

    def take(self, clients: Tensor) -> Terms:
        """The terms of some of the clients."""
        own = [t if t is None or len(t) == 1 else t[clients] for t in (self.linear, self.anchor, self.trainable)]
        return Terms(own[0], self.strength, own[1], own[2])

    def part(self, start: int, stop: int) -> Terms:
        """The terms of consecutive clients, as views."""
        own = [t if t is None or len(t) == 1 else t[start:stop] for t in (self.linear, self.anchor, self.trainable)]
        return Terms(own[0], self.strength, own[1], own[2])

    @property
    def is_none(self) -> bool:
        """Whether gradients stay as they are."""
        return self.linear is None and not self.strength and self.trainable is None


class Steps:
    """An optimizer whose moments start at zero; every list is by parameter.

    ``linear``, ``anchor`` and ``trainable`` are None or tensors that fit the parameters (a leading 1 stands for all
    clients); an anchor that is None is ``received``, where the clients start from.
    """

    def __init__(
        self,
        local: LocalTraining,
        received: list[Tensor],
        strength: float = 0.0,
        linear: list[Tensor] | None = None,
        anchor: list[Tensor] | None = None,
        trainable: list[Tensor] | None = None,
    ) -> None:
        self._local, self._strength, self._count = local, strength, 0
        if strength and anchor is None:
            anchor = [r.clone() for r in received]
        self._linear, self._anchor, self._trainable = linear, anchor, trainable
        optimizer = local.optimizer
        has_momentum = isinstance(optimizer, Adam) or bool(optimizer.momentum)
        self._momentum = [torch.zeros_like(r) for r in received] if has_momentum else None
        self._square = [torch.zeros_like(r) for r in received] if isinstance(optimizer, Adam) else None

    def keep(self, num_clients: int) -> None:
        """Go on with the first clients of a block: the others have finished."""

        def first(tensors: list[Tensor] | None) -> list[Tensor] | None:
            return None if tensors is None else [t[:num_clients] for t in tensors]

        self._linear, self._anchor, self._trainable = first(self._linear), first(self._anchor), first(self._trainable)
        self._momentum, self._square = first(self._momentum), first(self._square)

    def apply(self, parameters: list[Tensor], gradient: list[Tensor]) -> None:
        """One step in place; ``gradient`` is overwritten."""
        self._count += 1
        self._correct(parameters, gradient)
        optimizer, rate = self._local.optimizer, self._local.learning_rate
        if isinstance(optimizer, Adam):
            self._adam(optimizer, rate, parameters, gradient)
        else:
            torch._foreach_add_(parameters, self._sgd(optimizer, gradient), alpha=-rate)

    def _correct(self, parameters: list[Tensor], gradient: list[Tensor]) -> None:
        decay = self._local.optimizer.weight_decay
        if self._linear is not None:
            torch._foreach_add_(gradient, self._linear)
        if self._strength and self._anchor is not None:
            torch._foreach_add_(gradient, torch._foreach_sub(parameters, self._anchor), alpha=self._strength)
        if decay:
            torch._foreach_add_(gradient, parameters, alpha=decay)
        if self._trainable is not None:
            torch._foreach_mul_(gradient, self._trainable)

    def _sgd(self, sgd: SGD | DPSGD, gradient: list[Tensor]) -> list[Tensor]:
        if self._momentum is None:
            return gradient
        torch._foreach_mul_(self._momentum, sgd.momentum)
        torch._foreach_add_(self._momentum, gradient)
        if not sgd.nesterov:
            return self._momentum
        torch._foreach_add_(gradient, self._momentum, alpha=sgd.momentum)
        return gradient

    def _adam(self, adam: Adam, rate: float, parameters: list[Tensor], gradient: list[Tensor]) -> None:
        assert self._momentum is not None
        assert self._square is not None
        torch._foreach_lerp_(self._momentum, gradient, 1 - adam.beta1)
        torch._foreach_mul_(self._square, adam.beta2)
        torch._foreach_addcmul_(self._square, gradient, gradient, 1 - adam.beta2)
        bias1, bias2 = 1 - adam.beta1**self._count, 1 - adam.beta2**self._count
        denominator = torch._foreach_sqrt(self._square)
        torch._foreach_div_(denominator, math.sqrt(bias2))
        torch._foreach_add_(denominator, adam.eps)
        torch._foreach_addcdiv_(parameters, self._momentum, denominator, -rate / bias1)
