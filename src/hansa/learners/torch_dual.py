"""``Dual``: the first linear layer of a model under plain SGD, without a copy of its weights for each client.

Whatever steps a client takes, its weights stay the received ones plus a mix of the examples that it has seen:

    W_t = W - rate * sum_{s<t} g_sᵀ x_s,     so     x_t W_tᵀ = x_t Wᵀ - rate * sum_{s<t} (x_t x_sᵀ) g_s

with ``x_s`` (width, num_inputs) the examples of step ``s`` and ``g_s`` (width, num_outputs) the loss's slope in the
layer's outputs. So the products with ``W``, which all clients received, are one product for all of them ahead of the
first step; a step needs the small products of examples with examples; and the change of the weights is one product at
the end, written where it is wanted. A bias is a weight of an input that is always 1. This is the dual form of the
perceptron (Aizerman, Braverman and Rozonoer, 1964) for one layer of a network; it changes rounding alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

_NARROW = 4  # outputs: a product with so few is faster the other way round
_CONVOLVED = 1 << 24  # multiplications: so many go by oneDNN, twice as fast as MKL where the processor is AMD's
_SUMMED = 1 << 12  # rows that are added in float32
_LONG = 8192  # weights: so many clients' are written to their rows by the product itself, fewer by way of a stack


class Dual:
    """One chunk of clients in the layer's dual form, from the first step to the last.

    ``x`` (num_clients, num_places * width, num_inputs) are the examples of all steps, or of one step where every step
    ``repeats`` them. ``received`` are the weight and perhaps a bias (num_clients, ...), with a stride of 0 where all
    clients received the same.
    """

    def __init__(self, x: Tensor, width: int, repeats: bool, received: list[Tensor], rate: float) -> None:
        self._x, self._width, self._repeats, self._received, self._rate = x, width, repeats, received, rate
        self._scores = _scores(x, *received)
        self._slopes = self._scores  # once there are any: (num_clients, num_rows, num_outputs)
        self._num_weights = received[0][0].numel()
        self._start, self._num, self._products = 0, len(x), x[:, :0]

    @staticmethod
    def pays(num_steps: int, width: int, repeats: bool, num_outputs: int) -> bool:
        """Whether the products of examples with examples cost less than weights of each client's own would.

        Where examples differ from step to step, a step's products take ``num_inputs * width`` multiplications for each
        example before; reading and writing the weights in each step takes longer than the arithmetic of as many
        examples as there are outputs.
        """
        if repeats:
            return num_steps == 1 or width <= 2 * (num_steps - 1) * num_outputs
        return (num_steps - 1) * width <= num_outputs

    def keep(self, num_clients: int) -> None:
        """Go on with the first clients: the others have finished."""
        self._num = num_clients

    def forward(self, x: Tensor) -> Tensor:
        """The layer's outputs (num_clients, width, num_outputs) in the next step; ``x`` is known already."""
        start, num = self._start, self._num
        stop = self._width if self._repeats else start + self._width
        scores = self._scores[:num, stop - self._width : stop]
        if not start:
            return scores
        if self._repeats:
            return torch.baddbmm(scores, self._all_products()[:num], self._slopes[:num], alpha=-self._rate)
        own = self._x[:num]
        products = self._shifted(torch.bmm(own[:, start:stop], own[:, :start].transpose(1, 2)))
        return torch.baddbmm(scores, products, self._slopes[:num, :start], alpha=-self._rate)

    def backward(self, slope: Tensor, rate: float | None, needs_input: bool) -> Tensor:
        """Take a step by ``rate``, of which the slope in the outputs is remembered."""
        assert rate is not None
        slope = slope if rate == self._rate else slope * (rate / self._rate)
        if slope.shape == self._slopes.shape and not self._start:  # the first step, perhaps the only one, is all rows
            self._slopes = slope
        elif self._repeats:
            self._slopes[: self._num] += slope
        else:
            if not self._start:
                self._slopes = torch.zeros_like(self._scores)  # of who has finished they stay zero
            self._slopes[: self._num, self._start : self._start + self._width] = slope
        self._start += self._width
        return slope

    def write(self, places: list[Tensor], change: bool) -> None:
        """Write the layer as the clients leave it, or its ``change``, into its places in their rows."""
        across = self._slopes.transpose(1, 2)
        if self._num_weights < _LONG:
            torch.mul(torch.bmm(across, self._x), -self._rate, out=places[0])
        else:
            places[0].baddbmm_(across, self._x, beta=0, alpha=-self._rate)
        for bias in places[1:]:
            torch.sum(self._slopes, 1, out=bias).mul_(-self._rate)
        if not change:
            torch._foreach_add_(places, self._received)

    @property
    def may_wait(self) -> bool:
        """Whether the change had better stay a product: its rows would be long, and the examples take no more memory.

        Examples of a client with many rows are let go, as those of other layers are.
        """
        return self._num_weights >= _LONG and self._x[0].numel() <= 2 * self._num_weights

    def sums(self, weights: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
        """The weighted sum of the clients' changes: of the layer's weights (flat), and perhaps of its bias.

        The examples of many clients meet in one product, in float32; such products are added in float64.
        """
        largest = float(weights.max(initial=0.0)) or 1.0  # shares of it are exact where all clients weigh the same
        slopes = self._slopes
        if (weights != largest).any():
            slopes = slopes * torch.from_numpy((weights / largest).astype(np.float32))[:, None, None]
        size = max(1, _SUMMED // self._x.shape[1])
        some = [slice(start, start + size) for start in range(0, len(slopes), size)]
        found = [sum(_across(slopes[part], self._x[part]).double().flatten().numpy() for part in some)]
        if len(self._received) > 1:
            found.append(sum(slopes[part].sum((0, 1)).double().numpy() for part in some))
        return [np.multiply(part, -self._rate * largest) for part in found]

    def _all_products(self) -> Tensor:
        """Every example of a client with every other, where all steps take the same."""
        if not self._products.numel():
            self._products = self._shifted(torch.bmm(self._x, self._x.transpose(1, 2)))
        return self._products

    def _shifted(self, products: Tensor) -> Tensor:
        """Plus 1 for the bias: what the two inputs that are always 1 give."""
        return products.add_(1.0) if len(self._received) > 1 else products


def _across(slopes: Tensor, x: Tensor) -> Tensor:
    """``Sᵀ X`` over all rows of all clients: (num_outputs, num_inputs)."""
    if x.numel() * slopes.shape[-1] < _CONVOLVED or not (x.is_contiguous() and slopes.is_contiguous()):
        return slopes.flatten(0, 1).t() @ x.flatten(0, 1)
    shape = (slopes.shape[-1], x.shape[-1], 1, 1)
    found: Tensor = conv2d_weight(_as_images(x), shape, _as_images(slopes))  # type: ignore[no-untyped-call]
    return found.flatten(1)


def _as_images(x: Tensor) -> Tensor:
    """Each client's rows as an image, one row of pixels high, whose channels are the rows' values."""
    return x.unsqueeze(1).permute(0, 3, 1, 2)


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` for each client: (num_clients, num_rows, num_outputs)."""
    if weight.stride(0) == 0 or len(weight) == 1:
        across = weight[0].t()
        flat = x.reshape(-1, x.shape[-1])
        if across.shape[1] <= _NARROW:
            turned = weight[0] @ flat.t() if bias is None else torch.addmm(bias[0].unsqueeze(1), weight[0], flat.t())
            return turned.view(-1, *x.shape[:2]).permute(1, 2, 0)
        if flat.numel() * across.shape[1] < _CONVOLVED or not x.is_contiguous():
            found = flat @ across if bias is None else torch.addmm(bias[0], flat, across)
            return found.view(*x.shape[:2], -1)
        found = functional.conv2d(_as_images(x), weight[0, :, :, None, None], None if bias is None else bias[0])
        return found.permute(0, 2, 3, 1).squeeze(1)
    across = weight.transpose(1, 2)
    return torch.bmm(x, across) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, across)
