"""``Chain``: linear layers and activations in a row, forward and backward for a whole block by batched products.

A tensor is (num_clients, batch, ...): every client's rows meet that client's weights in one ``baddbmm``. Backward is
written out, so that plain SGD needs no gradient: the step is the product itself, ``W -= rate * gᵀ x``. A layer's own
gradient in its input is taken before its weights change.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hansa.learners.torch_data import Stacked
from hansa.learners.torch_losses import NamedLoss
from hansa.learners.torch_module import FlatModel

# Elementwise and without parameters: these mean the same with a client axis in front.
_ACTIVATIONS = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Hardtanh, nn.Mish, nn.SELU,
)  # fmt: skip


class Layer(Protocol):
    """One layer of a chain; ``backward`` is called once after each ``forward``."""

    def forward(self, x: Tensor) -> Tensor: ...
    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor: ...


class _Linear:
    """``x Wᵀ + b`` for each client; ``bind`` says where its weights and their gradient lie."""

    def __init__(self, weight: int, bias: int | None) -> None:
        self._places = (weight, bias)

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None) -> None:
        """Use these of all learned parameters (num_clients, *shape), and of the gradient."""
        place, bias = self._places
        self._weight, self._bias = parameters[place], None if bias is None else parameters[bias]
        self._weight_gradient = None if gradient is None else gradient[place]
        self._bias_gradient = None if gradient is None or bias is None else gradient[bias]
        self._transposed = self._weight.transpose(1, 2)
        self._row = None if self._bias is None else self._bias.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """(num_clients, ..., num_outputs) of ``x`` (num_clients, ..., num_inputs)."""
        self._shape = x.shape
        self._x = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
        if self._row is None:
            out = torch.bmm(self._x, self._transposed)
        else:
            out = torch.baddbmm(self._row, self._x, self._transposed)
        return out if len(self._shape) == 3 else out.view(*self._shape[:-1], -1)

    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor:
        """The slope in the input; steps by ``rate``, or writes the gradient where ``rate`` is None."""
        slope = slope if slope.dim() == 3 else slope.reshape(len(slope), -1, slope.shape[-1])
        inner = torch.bmm(slope, self._weight).view(self._shape) if needs_input else slope
        across = slope.transpose(1, 2)
        if rate is not None:
            self._weight.baddbmm_(across, self._x, alpha=-rate)
            if self._bias is not None:
                self._bias.sub_(slope.sum(1), alpha=rate)
        else:
            assert self._weight_gradient is not None
            torch.bmm(across, self._x, out=self._weight_gradient)
            if self._bias_gradient is not None:
                torch.sum(slope, 1, out=self._bias_gradient)
        return inner


class _Relu:
    def forward(self, x: Tensor) -> Tensor:
        self._out = torch.relu(x)
        return self._out

    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor:
        if not needs_input:
            return slope
        inner: Tensor = torch.ops.aten.threshold_backward(slope, self._out, 0)
        return inner


class _Activation:
    """Any other activation: autograd takes its derivative."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self._x = x.detach().requires_grad_()
            self._out: Tensor = self._module(self._x)
        out: Tensor = self._out.detach()
        return out

    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor:
        if not needs_input:
            return slope
        inner: Tensor = torch.autograd.grad(self._out, self._x, slope)[0]
        return inner


class _Flatten:
    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return x.flatten(2)

    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor:
        return slope.view(self._shape) if needs_input else slope


class Chain:
    """The batched twin of an ``nn.Linear`` or of an ``nn.Sequential`` of linear layers, activations and ``Flatten``."""

    def __init__(self, layers: list[Layer], loss: NamedLoss) -> None:
        self._layers, self._loss = layers, loss
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, _Linear)]
        self._first = linear[0]
        self._minus = torch.empty(0)

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None, constants: dict[str, Tensor]) -> None:
        """Work on these parameters (num_clients, *shape), in place; without ``gradient`` a step is fused."""
        for layer in self._layers:
            if isinstance(layer, _Linear):
                layer.bind(parameters, gradient)

    def backward(self, batch: Stacked, rate: float | None) -> Tensor | None:
        """Each client's loss (num_clients,) on its batch, or None where ``batch.seen`` got each example's.

        Steps by ``rate``, or writes the gradient if it is None.
        """
        x = batch.x
        assert isinstance(x, Tensor)
        for layer in self._layers:
            x = layer.forward(x)
        losses, slope = self._loss_slope(x, batch)
        for i in range(len(self._layers) - 1, self._first - 1, -1):
            slope = self._layers[i].backward(slope, rate, i > self._first)
        return losses

    def _loss_slope(self, scores: Tensor, batch: Stacked) -> tuple[Tensor | None, Tensor]:
        """The losses (num_clients,) and their slope in the scores."""
        y, shares = batch.y, batch.shares
        assert y is not None
        if self._loss.is_cross_entropy and scores.dim() == 3:
            logs, labels = torch.log_softmax(scores, -1), y.unsqueeze(-1)
            losses = None
            if batch.seen is not None:
                torch.gather(logs, -1, labels, out=batch.seen)
            else:
                losses = -(logs.gather(-1, labels).squeeze(-1) * shares).sum(1)
            slope = logs.exp_().scatter_add_(-1, labels, self._minus_ones(labels))
            return losses, slope.mul_(shares.unsqueeze(-1))
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            each = self._loss.each(leaf.flatten(0, 1), y.flatten(0, 1)).view(shares.shape)
            losses = (each * shares).sum(1)
            slope = torch.autograd.grad(losses.sum(), leaf)[0]
        return losses.detach(), slope

    def _minus_ones(self, like: Tensor) -> Tensor:
        """-1 wherever ``like`` has a place."""
        if self._minus.numel() < like.numel() or self._minus.device != like.device:
            self._minus = torch.full((like.numel(),), -1.0, device=like.device)
        return self._minus[: like.numel()].view(like.shape)


def chain_of(flat: FlatModel, loss: Any) -> Chain | None:
    """The chain that ``flat.module`` is, or None where it is something else."""
    modules = _in_a_row(flat.module)
    if not isinstance(loss, NamedLoss) or flat.has_buffers or modules is None:
        return None
    places = {id(parameter): i for i, parameter in enumerate(flat.parameters)}
    layers: list[Layer] = []
    used: list[int] = []
    for module in modules:
        if type(module) is nn.Linear:
            own = [places.get(id(p), -1) for p in module.parameters(recurse=False)]
            used += own
            layers.append(_Linear(own[0], own[1] if len(own) > 1 else None))
        elif type(module) is nn.ReLU:
            layers.append(_Relu())
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            layers.append(_Flatten())
        elif type(module) in _ACTIVATIONS and not getattr(module, "inplace", False):
            layers.append(_Activation(module))
        elif type(module) is not nn.Identity:
            return None
    # Each parameter once: none is frozen (-1), shared or tied, which one step in place would not suit.
    return Chain(layers, loss) if sorted(used) == list(range(len(flat.parameters))) else None


def _in_a_row(module: nn.Module) -> list[nn.Module] | None:
    """The layers of nested ``nn.Sequential``s in order; None where hooks may change a result."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is not nn.Sequential:
        return [module]
    row: list[nn.Module] = []
    for child in module:
        inner = _in_a_row(child)
        if inner is None:
            return None
        row += inner
    return row
