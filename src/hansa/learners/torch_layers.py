"""``Chain``: linear layers and activations in a row, forward and backward for a whole block by batched products.

A tensor is (num_clients, batch, ...): every client's rows meet that client's weights in one ``baddbmm``. Backward is
written out, so that plain SGD needs no gradient: the step is the product itself, ``W -= rate * gᵀ x``. A layer's own
gradient in its input is taken before its weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hansa.learners.batches import num_steps
from hansa.learners.torch_data import Rows
from hansa.learners.torch_dual import Dual
from hansa.learners.torch_job import Job
from hansa.learners.torch_layout import Group, Plan, batch_bytes, takes_all, width_of
from hansa.learners.torch_left import Columns
from hansa.learners.torch_losses import NamedLoss
from hansa.learners.torch_module import FlatModel
from hansa.learners.torch_slopes import FEW_CLASSES, AnyLoss, FewClasses, Slopes

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

    def __init__(self, places: list[int], num_outputs: int) -> None:
        self.places, self.num_outputs = places, num_outputs

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None) -> None:
        """Use these of all learned parameters (num_clients, *shape), and of the gradient."""
        place, bias = self.places[0], self.places[1] if len(self.places) > 1 else None
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

    def __init__(self, layers: list[Any], flat: FlatModel, loss: NamedLoss) -> None:
        self._layers, self._flat, self._loss = layers, flat, loss
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, _Linear)]
        self._first, self._last = linear[0], linear[-1]
        self._dual: Dual | None = None
        # Whether derivatives are written out: autograd cannot take one of what was made without its records.
        self._is_own = not any(isinstance(layer, _Activation) for layer in layers) and loss.is_cross_entropy

    def mode(self, job: Job) -> AbstractContextManager[object]:
        """Without autograd's records, which take a tenth of the time of small steps, where nothing needs them."""
        assert isinstance(job.examples, Rows)
        y = job.examples.everyone.y
        return torch.inference_mode() if self._is_own and y is not None and y.dim() == 1 else torch.no_grad()

    def client_bytes(self, job: Job) -> int:
        """A client's parameters and one batch; of a layer in its dual form no weights, but all batches."""
        most, num_params = int(num_steps(job.sizes, job.local).max(initial=0)), job.params.shape[1]
        if not self._is_dual(job, most, width_of(job), takes_all(job)):
            return batch_bytes(job) + 4 * num_params
        first: int = sum(self._flat.parameters[i].numel() for i in self._layers[self._first].places)
        return batch_bytes(job) * (1 if takes_all(job) else most) + 4 * (num_params - first)

    def _is_dual(self, job: Job, steps: int, width: int, repeats: bool) -> bool:
        """Whether the first linear layer had better be in its dual form."""
        if not (job.local.optimizer.is_plain and job.terms.is_none):
            return False
        return Dual.pays(steps, width, repeats, self._layers[self._first].num_outputs)

    def begin(self, job: Job, plan: Plan | None) -> Sequence[int]:
        """These clients train next; ``plan`` are all their steps, where they are laid out together.

        Returns the parameters that need no stack: those of the first linear layer where its dual form pays.
        """
        self._dual = None
        if plan is None or not self._is_dual(job, plan[0].num_steps, plan[0].width, plan[0].repeats):
            return ()
        (layout, feed), received = plan, self._flat.split(job.params)
        places: list[int] = self._layers[self._first].places
        x = feed.everything()
        assert isinstance(x, Tensor)
        for layer in self._layers[: self._first]:
            x = layer.forward(x)
        if x.dim() != 3:
            return ()
        self._dual = Dual(x, layout.width, layout.repeats, [received[i] for i in places], job.local.learning_rate)
        return places

    def finish(self, job: Job, rows: Tensor) -> Columns | None:
        """Write what has no stack into the clients' ``rows``, or leave it as a product."""
        if self._dual is None:
            return None
        left = Columns(self._dual, self._flat, self._layers[self._first].places)
        if job.leaves_products and self._dual.may_wait:
            self._flat.stacks.pop("x.", None)  # the examples are the product's from now on
            return left
        left.write(rows, job.change)
        return None

    def bind(self, parameters: list[Tensor], gradient: list[Tensor] | None, constants: dict[str, Tensor]) -> None:
        """Work on these parameters (num_clients, *shape), in place; without ``gradient`` a step is fused."""
        for layer in self._layers:
            if isinstance(layer, _Linear):
                layer.bind(parameters, gradient)
        if self._dual is not None:
            self._dual.keep(len(parameters[0]))

    def train(self, group: Group, rate: float | None, apply: Callable[[], None] | None) -> Tensor:
        """Take the steps of ``group``: each by ``rate``, or by ``apply`` once the gradient is written if it is None.

        Returns for each client the sum of its batches' losses before the step, times what their examples weigh.
        """
        first, layers = self._first, list(self._layers)
        if self._dual is not None:
            layers[first] = self._dual
            forward, xs = layers[first:], [group.shares] * len(group.totals)  # the dual has its examples
        else:
            forward, xs = layers, list(group.x)  # type: ignore[arg-type]  # a chain takes one tensor
        backward = [(layer, i > 0) for i, layer in enumerate(layers[first:])][::-1]
        slopes = self._slopes(group, rate is not None)
        for step, x in enumerate(xs):
            for layer in forward:
                x = layer.forward(x)
            slope, share = slopes.of(x, step)
            own = None if rate is None else rate * share
            for layer, needs_input in backward:
                slope = layer.backward(slope, own, needs_input)
            if apply is not None:
                apply()
        return slopes.losses()

    def _slopes(self, group: Group, may_scale: bool) -> Slopes:
        """What the loss says of the scores of each step."""
        assert group.y is not None
        num_outputs = self._layers[self._last].num_outputs
        if self._loss.is_cross_entropy and group.y.dim() == 3 and num_outputs <= FEW_CLASSES:
            return FewClasses(group, num_outputs, may_scale)
        return AnyLoss(group, self._loss)


def chain_of(flat: FlatModel, loss: Any) -> Chain | None:
    """The chain that ``flat.module`` is, or None where it is something else."""
    modules = _in_a_row(flat.module)
    if not isinstance(loss, NamedLoss) or flat.has_buffers or modules is None:
        return None
    places = {id(parameter): i for i, parameter in enumerate(flat.parameters)}
    layers: list[Any] = []
    used: list[int] = []
    for module in modules:
        if type(module) is nn.Linear:
            own = [places.get(id(p), -1) for p in module.parameters(recurse=False)]
            used += own
            layers.append(_Linear(own, module.out_features))
        elif type(module) is nn.ReLU:
            layers.append(_Relu())
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            layers.append(_Flatten())
        elif type(module) in _ACTIVATIONS and not getattr(module, "inplace", False):
            layers.append(_Activation(module))
        elif type(module) is not nn.Identity:
            return None
    # Each parameter once: none is frozen (-1), shared or tied, which one step in place would not suit.
    return Chain(layers, flat, loss) if sorted(used) == list(range(len(flat.parameters))) else None


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
