"""While a model is mapped over clients: PyTorch's functions that have a batched form of their own, replaced by it.

A ``TorchFunctionMode`` sees every function that the model's forward calls, whether in a layer of ``torch.nn`` or in the
user's own code. What has no entry here runs as ``torch.vmap`` maps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hansa.learners.torch_attention import attend, multi_head
from hansa.learners.torch_block import BlockStep
from hansa.learners.torch_dropout import dropout, feature_dropout
from hansa.learners.torch_norm import batch_norm
from hansa.learners.torch_recurrent import gru, lstm, rnn_relu, rnn_tanh
from hansa.learners.torch_stepping import embedding, embedding_bag, linear

# Each takes the block, the function that it stands for, and that function's arguments.
_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: linear,
    functional.embedding: embedding,
    functional.embedding_bag: embedding_bag,
    functional.batch_norm: batch_norm,
    functional.dropout: dropout,
    torch.dropout: dropout,
    functional.dropout1d: feature_dropout,
    functional.dropout2d: feature_dropout,
    functional.dropout3d: feature_dropout,
    functional.scaled_dot_product_attention: attend,
    functional.multi_head_attention_forward: multi_head,
    torch.lstm: lstm,
    torch.gru: gru,
    torch.rnn_tanh: rnn_tanh,
    torch.rnn_relu: rnn_relu,
}


class Substitutes(TorchFunctionMode):
    """Inside, a mapped model uses the batched forms of its layers, for one step of ``block``."""

    def __init__(self, block: BlockStep) -> None:
        super().__init__()
        self._block = block

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what stands for it."""
        options = kwargs or {}
        self._block.count(args)
        if options:
            self._block.count(options.values())
        own = _OWN.get(func)
        return func(*args, **options) if own is None else own(self._block, func, *args, **options)
