"""LSTM, GRU and plain recurrent layers for a block of clients: in each time step, one product for all clients.

PyTorch's own recurrent kernels cannot be mapped over clients. Backward through time is written out, so that the
gradient of the recurrent weights is one product over all time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hansa.learners.torch_block import BlockStep, CannotBatch, apply, on_block

_sigmoid_slope = torch.ops.aten.sigmoid_backward
_tanh_slope = torch.ops.aten.tanh_backward


class _Slopes(NamedTuple):
    """What one step passes back: to its two shares of the gates, past the product to ``h``, and to ``c``."""

    given: Tensor  # in what the input brings to the gates
    hidden: Tensor  # in what the hidden state brings to them
    h: Tensor | None
    c: Tensor | None


class _Cell(Protocol):
    """One time step without its products; ``saved`` is what ``backward`` needs of ``forward``."""

    num_gates: int

    def forward(self, given: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Any, Any]: ...
    def backward(self, saved: Any, h: Tensor, c: Tensor | None) -> _Slopes: ...


class _Lstm:
    num_gates = 4

    def forward(self, given: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        assert c is not None
        gates, size = hidden.add_(given), h.shape[-1]
        gates[..., : 2 * size].sigmoid_()
        gates[..., 3 * size :].sigmoid_()
        i, f, n, o = gates.chunk(4, -1)
        n.tanh_()
        after = (f * c).addcmul_(i, n)
        bent = torch.tanh(after)
        return o * bent, after, (gates, c, bent)

    def backward(self, saved: Any, h: Tensor, c: Tensor | None) -> _Slopes:
        gates, before, bent = saved
        i, f, n, o = gates.chunk(4, -1)
        slope = _tanh_slope(h * o, bent)
        slope = slope if c is None else slope.add_(c)
        out, size = torch.empty_like(gates), h.shape[-1]
        di, df, dn, do = out.chunk(4, -1)
        torch.mul(slope, n, out=di)
        torch.mul(slope, before, out=df)
        torch.mul(slope, i, out=dn)
        torch.mul(h, bent, out=do)
        for part in (slice(0, 2 * size), slice(3 * size, None)):
            _sigmoid_slope.grad_input(out[..., part], gates[..., part], grad_input=out[..., part])
        _tanh_slope.grad_input(dn, n, grad_input=dn)
        return _Slopes(out, out, None, slope.mul_(f))


class _Gru:
    num_gates = 3

    def forward(self, given: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None, Any]:
        size = h.shape[-1]
        both = torch.sigmoid(given[..., : 2 * size] + hidden[..., : 2 * size])
        r, z = both.chunk(2, -1)
        own = hidden[..., 2 * size :]
        n = torch.addcmul(given[..., 2 * size :], r, own).tanh_()
        return torch.lerp(n, h, z), None, (both, own, n, h)

    def backward(self, saved: Any, h: Tensor, c: Tensor | None) -> _Slopes:
        both, own, n, before = saved
        size = h.shape[-1]
        r, z = both.chunk(2, -1)
        given = h.new_empty((*h.shape[:-1], 3 * size))
        dr, dz, dn = given.chunk(3, -1)
        dn.copy_(_tanh_slope(h - h * z, n))
        torch.mul(dn, own, out=dr)
        torch.mul(h, before - n, out=dz)
        given[..., : 2 * size].copy_(_sigmoid_slope(given[..., : 2 * size], both))
        hidden = given.clone()
        hidden[..., 2 * size :].mul_(r)
        return _Slopes(given, hidden, h * z, None)


class _Plain:
    num_gates = 1

    def __init__(self, is_tanh: bool) -> None:
        self._is_tanh = is_tanh

    def forward(self, given: Tensor, hidden: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, None, Any]:
        gates = hidden.add_(given)
        out = gates.tanh_() if self._is_tanh else gates.relu_()
        return out, None, out

    def backward(self, saved: Any, h: Tensor, c: Tensor | None) -> _Slopes:
        slope = _tanh_slope(h, saved) if self._is_tanh else h * (saved > 0)
        return _Slopes(slope, slope, None, None)


class _Scan(torch.autograd.Function):
    """All time steps: ``given`` (num_clients, length, batch, gates) to ``h`` (num_clients, length, batch, size)."""

    @staticmethod
    def forward(
        ctx: Any, cell: _Cell, given: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, c: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        across = weight.transpose(1, 2).contiguous()  # a product with it is half as fast otherwise
        row = None if bias is None else bias.unsqueeze(1)
        ctx.cell, ctx.saved, outs, first = cell, [], [], h
        for now in given.unbind(1):
            hidden = torch.bmm(h, across) if row is None else torch.baddbmm(row, h, across)
            h, c, saved = cell.forward(now, hidden, h, c)
            ctx.saved.append(saved)
            outs.append(h)
        out = torch.stack(outs, 1)
        ctx.save_for_backward(weight, bias, first, out)
        return out, out.new_empty(0) if c is None else c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, c: Tensor) -> Any:
        weight, bias, first, out = ctx.saved_tensors
        cell, carried = ctx.cell, torch.zeros_like(first)
        c_slope: Tensor | None = c if cell.num_gates == 4 else None
        given, hidden = [], []
        for saved, now in zip(reversed(ctx.saved), reversed(slope.unbind(1)), strict=True):
            step = cell.backward(saved, carried + now, c_slope)
            carried, c_slope = torch.bmm(step.hidden, weight), step.c
            if step.h is not None:
                carried.add_(step.h)
            given.append(step.given)
            hidden.append(step.hidden)
        to_given = torch.stack(given[::-1], 1)
        to_hidden = to_given if hidden[0] is given[0] else torch.stack(hidden[::-1], 1)
        before = torch.cat([first.unsqueeze(1), out[:, :-1]], 1).flatten(1, 2)
        flat = to_hidden.flatten(1, 2)
        to_weight = torch.bmm(flat.transpose(1, 2), before)
        return None, to_given, to_weight, None if bias is None else flat.sum(1), carried, c_slope


class _Options(NamedTuple):
    has_biases: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool


def _layers(
    block: BlockStep, cell: _Cell, options: _Options, x: Tensor, h: Tensor, c: Tensor | None, own: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Every layer and direction, of all clients: the outputs, and the last ``h`` (and ``c``) of each."""
    num_directions, per = 1 + options.bidirectional, 4 if options.has_biases else 2
    x = x.transpose(1, 2) if options.batch_first else x
    last_h, last_c = [], []
    for layer in range(options.num_layers):
        outs = []
        for direction in range(num_directions):
            number = layer * num_directions + direction
            weights = own[number * per : (number + 1) * per]
            state = h[:, number], None if c is None else c[:, number]
            out, end = _run(cell, x.flip(1) if direction else x, weights, *state)
            last_h.append(out[:, -1])
            last_c.append(end)
            outs.append(out.flip(1) if direction else out)
        x = torch.cat(outs, -1) if num_directions > 1 else outs[0]
        if options.dropout and options.training and layer < options.num_layers - 1:
            x = x * block.noise(x, 1 - options.dropout, axis=1)
    x = x.transpose(1, 2) if options.batch_first else x
    ends = [torch.stack(last_h, 1)] + ([] if c is None else [torch.stack(last_c, 1)])
    return (x, *ends)


def _run(cell: _Cell, x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer in one direction over ``x`` (num_clients, length, batch, num_inputs)."""
    bias = hidden_bias = None
    if len(weights) == 4:
        is_apart = cell.num_gates == 3  # a GRU multiplies its hidden share, bias and all, by the reset gate
        bias, hidden_bias = (weights[2], weights[3]) if is_apart else (weights[2] + weights[3], None)
    flat, across = x.flatten(1, 2), weights[0].transpose(1, 2)
    given = torch.bmm(flat, across) if bias is None else torch.baddbmm(bias.unsqueeze(1), flat, across)
    given = given.view(*x.shape[:3], -1)
    out: tuple[Tensor, Tensor] = apply(_Scan, cell, given, weights[1], hidden_bias, h, c)
    return out


def _recurrent(
    block: BlockStep, cell: _Cell, x: Tensor, states: Sequence[Tensor], own: Any, options: tuple[Any, ...]
) -> Any:
    if not isinstance(own, (list, tuple)):
        raise CannotBatch("a recurrent layer on packed sequences; pad them")
    settings = _Options(*options)
    per = (4 if settings.has_biases else 2) * settings.num_layers * (1 + settings.bidirectional)
    if len(own) != per or own[1].shape[0] != cell.num_gates * own[1].shape[1]:
        raise CannotBatch("a recurrent layer with projections")
    if torch.is_autocast_enabled(x.device.type):
        raise CannotBatch("a recurrent layer in bf16")
    num = len(states)

    def work(rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        c = tensors[1] if num > 1 else None
        return _layers(block, cell, settings, rows, tensors[0], c, tensors[num:])

    return on_block(work, x, *states, *own)


def lstm(block: BlockStep, function: Any, x: Tensor, states: Sequence[Tensor], own: Any, *options: Any) -> Any:
    """Long short-term memory: outputs, last ``h``, last ``c``."""
    return _recurrent(block, _Lstm(), x, states, own, options)


def gru(block: BlockStep, function: Any, x: Tensor, h: Tensor, own: Any, *options: Any) -> Any:
    """Gated recurrent units: outputs, last ``h``."""
    return _recurrent(block, _Gru(), x, [h], own, options)


def rnn_tanh(block: BlockStep, function: Any, x: Tensor, h: Tensor, own: Any, *options: Any) -> Any:
    """A plain recurrent layer: outputs, last ``h``."""
    return _recurrent(block, _Plain(True), x, [h], own, options)


def rnn_relu(block: BlockStep, function: Any, x: Tensor, h: Tensor, own: Any, *options: Any) -> Any:
    """A plain recurrent layer with ReLU: outputs, last ``h``."""
    return _recurrent(block, _Plain(False), x, [h], own, options)
