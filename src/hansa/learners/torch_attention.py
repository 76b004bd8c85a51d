"""Attention for a block of clients, as batched products: PyTorch's fused kernels cannot be mapped over clients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hansa.learners.torch_block import BlockStep, CannotBatch
from hansa.learners.torch_dropout import dropout
from hansa.learners.torch_stepping import linear


def attend(
    block: BlockStep,
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``softmax(q kᵀ / sqrt(d) + mask) v`` over the last two axes."""
    if enable_gqa:
        raise CannotBatch("attention with grouped queries")
    weights = _weights(query, key, attn_mask, is_causal, scale)
    return dropout(block, functional.dropout, weights, dropout_p) @ value


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


def multi_head(
    block: BlockStep,
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """``nn.MultiheadAttention`` on (length, batch, features), as ``functional.multi_head_attention_forward`` has it."""
    plain = in_weight is not None and bias_k is None and bias_v is None and static_k is None and static_v is None
    if not plain or use_separate_proj_weight or add_zero_attn or query.dim() != 3:
        raise CannotBatch("attention with separate projections, extra keys or no batch axis")
    length, batch, _ = query.shape
    if key is value and query is key:
        parts = linear(block, functional.linear, query, in_weight, in_bias).chunk(3, -1)
    else:
        biases = [None] * 3 if in_bias is None else in_bias.chunk(3)
        assert in_weight is not None
        own = zip((query, key, value), in_weight.chunk(3), biases, strict=True)
        parts = tuple(functional.linear(x, weight, bias) for x, weight, bias in own)
    q, k, v = (p.reshape(len(p), batch, num_heads, -1).permute(1, 2, 0, 3) for p in parts)
    mask = _mask(attn_mask, key_padding_mask, (batch, num_heads, length, k.shape[2]), is_causal, query)
    weights = _weights(q, k, mask, False, None)
    weights = dropout(block, functional.dropout, weights, dropout_p, training)
    mixed = (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, -1)
    out = linear(block, functional.linear, mixed, out_weight, out_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _mask(
    mask: Tensor | None, padding: Tensor | None, shape: tuple[int, int, int, int], is_causal: bool, like: Tensor
) -> Tensor | None:
    """What is added to the scores (batch, heads, length, keys); where a truth value is true, none attends."""
    if mask is None and is_causal:
        raise CannotBatch("attention that is causal without a mask")
    total: Tensor | None = None
    for part in (
        None if mask is None else mask if mask.dim() < 3 else mask.view(shape),
        None if padding is None else padding.view(shape[0], 1, 1, shape[3]),
    ):
        if part is None:
            continue
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=like.dtype).masked_fill(part, -math.inf)
        total = part if total is None else total + part
    return total
