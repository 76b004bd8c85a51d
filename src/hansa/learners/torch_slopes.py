"""The loss of a chain's scores, and its slope: step by step, with what can wait until a group of steps has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hansa.learners.torch_layout import Group
from hansa.learners.torch_losses import NamedLoss

FEW_CLASSES = 64  # scores of a group of steps are kept: beyond that many classes they would be large
_SHORT = 16  # classes: PyTorch runs along a last axis as short as that several times slower than along another

_FEW = 256  # scores: to turn so few would take longer


class Slopes(Protocol):
    """One group of steps. ``of`` gives the slope in the scores, still to be multiplied by the number beside it."""

    def of(self, scores: Tensor, step: int) -> tuple[Tensor, float]: ...
    def losses(self) -> Tensor: ...


class FewClasses:
    """Cross-entropy over few classes: ``softmax - one_hot``; the losses are found for all steps at once."""

    def __init__(self, group: Group, num_classes: int, may_scale: bool) -> None:
        assert group.y is not None
        self._group, self._labels = group, group.y.unsqueeze(-1)
        self._even = group.even if may_scale else [0.0] * len(group.even)
        self._targets: Sequence[Tensor] = ()
        if len(group.y) > 1:
            target = torch.zeros((*group.y.shape, num_classes), device=group.y.device)
            self._targets = target.scatter_(-1, self._labels, 1.0).unbind(0)
        self._shares = group.shares.unsqueeze(-1).unbind(0)
        self._scores: list[Tensor] = []
        self._likelihoods: Tensor | None = None  # of a lone step, whose probabilities are at hand

    def of(self, scores: Tensor, step: int) -> tuple[Tensor, float]:
        """The slope of the batches' mean loss in ``scores`` (num_clients, width, num_classes)."""
        self._scores.append(scores)
        slope = _by_class(torch.softmax, scores)
        if self._targets:
            slope.sub_(self._targets[step])
        else:
            self._likelihoods = slope.gather(-1, self._labels[0]).log_()
            slope.scatter_add_(-1, self._labels[0], slope.new_full((1, 1, 1), -1.0).expand(self._labels[0].shape))
        share = self._even[step]
        return (slope, share) if share else (slope.mul_(self._shares[step]), 1.0)

    def losses(self) -> Tensor:
        """Each client's losses, times what the batches weigh, added up: (num_clients,) float64."""
        found = self._likelihoods
        if found is None or not torch.isfinite(found).all():  # of zero there is none
            scores = torch.stack(self._scores) if len(self._scores) > 1 else self._scores[0].unsqueeze(0)
            found = _by_class(torch.log_softmax, scores).gather(-1, self._labels)
        likelihoods = found.view(self._group.y.shape) if self._group.y is not None else found
        weights = self._group.shares * self._group.totals.unsqueeze(2)
        return -(likelihoods * weights).sum(dim=(0, 2), dtype=torch.float64)


class AnyLoss:
    """A loss by name: autograd takes its slope; cross-entropy over many classes takes its own in place."""

    def __init__(self, group: Group, loss: NamedLoss) -> None:
        self._group, self._loss, self._seen = group, loss, list[Tensor]()

    def of(self, scores: Tensor, step: int) -> tuple[Tensor, float]:
        """The slope of the batches' mean loss in ``scores`` (num_clients, width, ...)."""
        assert self._group.y is not None
        y, shares = self._group.y[step], self._group.shares[step]
        if self._loss.is_cross_entropy and scores.dim() == 3:
            logs, labels = torch.log_softmax(scores, -1), y.unsqueeze(-1)
            self._seen.append(-(logs.gather(-1, labels).squeeze(-1) * shares).sum(1))
            slope = logs.exp_().scatter_add_(-1, labels, logs.new_full((1, 1, 1), -1.0).expand(labels.shape))
            return slope.mul_(shares.unsqueeze(-1)), 1.0
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            each = self._loss.each(leaf.flatten(0, 1), y.flatten(0, 1)).view(shares.shape)
            losses = (each * shares).sum(1)
            slope = torch.autograd.grad(losses.sum(), leaf)[0]
        self._seen.append(losses.detach())
        return slope, 1.0

    def losses(self) -> Tensor:
        """Each client's losses, times what the batches weigh, added up: (num_clients,) float64."""
        return (torch.stack(self._seen) * self._group.totals).sum(dim=0, dtype=torch.float64)


def _by_class(function: Callable[[Tensor, int], Tensor], scores: Tensor) -> Tensor:
    """``softmax`` or ``log_softmax`` over the last axis."""
    if scores.shape[-1] > _SHORT or scores.numel() < _FEW:
        return function(scores, -1)
    return function(scores.transpose(-1, -2), -2).transpose(-1, -2)
