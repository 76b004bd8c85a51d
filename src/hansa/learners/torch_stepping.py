"""Linear layers and embeddings that take their own SGD step inside the backward pass.

A gradient as large as all clients' weights is then neither made nor added: the step is the product itself,
``W -= rate * gᵀ x``, and of an embedding only the rows that a batch looked up change. A layer's slope in its input is
taken before its weights change. Where a parameter is used twice, or another optimizer steps, the gradient is returned.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hansa.learners.torch_block import BlockStep, CannotBatch, apply, on_block


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: BlockStep, places: tuple[int, int | None], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        rows = x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
        across = weight.transpose(1, 2)
        out = torch.bmm(rows, across) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, across)
        ctx.save_for_backward(rows, weight, bias)
        ctx.block, ctx.places, ctx.shape = block, places, x.shape
        return out if x.dim() == 3 else out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        rows, weight, bias = ctx.saved_tensors
        block, (place, bias_place) = ctx.block, ctx.places
        slope = slope if slope.dim() == 3 else slope.reshape(len(slope), -1, slope.shape[-1])
        inner = torch.bmm(slope, weight).view(ctx.shape) if ctx.needs_input_grad[2] else None
        gradient, bias_gradient = None, None
        if block.take(place):
            weight.detach().baddbmm_(slope.transpose(1, 2), rows, alpha=-block.rate)
        else:
            gradient = torch.bmm(slope.transpose(1, 2), rows)
        if block.take(bias_place):
            bias.detach().sub_(slope.sum(1), alpha=block.rate)
        elif bias is not None:
            bias_gradient = slope.sum(1)
        return None, None, inner, gradient, bias_gradient


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: BlockStep, place: int, padding: int | None, tokens: Tensor, weight: Tensor) -> Tensor:
        first = torch.arange(len(weight), device=weight.device) * weight.shape[1]
        index = (tokens.reshape(len(tokens), -1) + first.unsqueeze(1)).view(-1)
        ctx.save_for_backward(index, tokens, weight)
        ctx.block, ctx.place, ctx.padding = block, place, padding
        return weight.reshape(-1, weight.shape[2]).index_select(0, index).view(*tokens.shape, -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        index, tokens, weight = ctx.saved_tensors
        if ctx.padding is not None:
            slope = slope * (tokens != ctx.padding).unsqueeze(-1)
        slope, num = slope.reshape(-1, weight.shape[2]), weight.shape[0] * weight.shape[1]
        index = index.unsqueeze(1).expand_as(slope)  # adding rows by an index alone is three times slower
        if ctx.block.take(ctx.place):
            weight.detach().view(num, -1).scatter_add_(0, index, slope.mul(-ctx.block.rate))
            return (None,) * 5
        gradient = slope.new_zeros(num, weight.shape[2]).scatter_add_(0, index, slope)
        return None, None, None, None, gradient.view(weight.shape)


def linear(block: BlockStep, function: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Any:
    """``x Wᵀ + b``."""
    place, bias_place = block.place(weight), block.place(bias)
    is_lower = torch.is_autocast_enabled(x.device.type)  # then autograd casts what goes back
    if is_lower or block.rate is None or place is None or (bias is not None and bias_place is None):
        return function(x, weight, bias)
    return on_block(partial(apply, _Linear, block, (place, bias_place)), x, weight, bias)


def embedding(
    block: BlockStep,
    function: Any,
    tokens: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """The rows of ``weight`` that ``tokens`` name."""
    place = block.place(weight)
    if max_norm is not None or scale_grad_by_freq:
        raise CannotBatch("an embedding with max_norm or scale_grad_by_freq")
    if block.rate is None or place is None:
        found = function(tokens, weight)
        if padding_idx is None:
            return found
        # Mapped over clients, PyTorch's embedding forgets that padding gets no gradient.
        return torch.where((tokens != padding_idx % weight.shape[0]).unsqueeze(-1), found, found.detach())
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else weight.shape[0] + padding_idx
    return on_block(partial(apply, _Embedding, block, place, padding), tokens, weight)


def embedding_bag(
    block: BlockStep,
    function: Any,
    tokens: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The mean, the sum or the maximum of the rows that each bag of ``tokens`` (num_bags, bag_size) names."""
    if offsets is not None or tokens.dim() != 2 or padding_idx is not None:
        raise CannotBatch("an EmbeddingBag with offsets or padding")
    rows = embedding(block, functional.embedding, tokens, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    return rows.amax(1) if mode == "max" else rows.sum(1) if mode == "sum" else rows.mean(1)
