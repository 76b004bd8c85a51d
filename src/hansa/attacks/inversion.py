"""Gradient inversion: a client's rows, read back from its update.

* ``from_first_layer``: where the first layer is ``weight @ x + bias``, one row's gradient of a line of the weight is
  the row itself times that of the bias, so that a division gives it back; so does the sum of several steps on that row.
  Phong, Aono, Hayashi, Wang and Moriai, "Privacy-preserving deep learning: revisited and enhanced", ATIS 2017, section
  3; Geiping, Bauermeister, Droege and Moeller, "Inverting gradients: how easy is it to break privacy in federated
  learning?", NeurIPS 2020, proposition 3.1. Of several rows it gives a mean, weighted by their errors.
* ``by_matching``: rows are moved until their gradient has the direction of the update: Geiping et al., section 4, with
  their cosine and total variation (Zhu, Liu and Han, "Deep leakage from gradients", NeurIPS 2019, algorithm 1, had the
  distance). Differences: Adam on the gradient itself instead of on its sign, and the best of two starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.key import Key
from hansa.core.layout import Layout

Floats = npt.NDArray[np.float32]
_SMALLEST = 1e-12  # of the largest entry: a bias that did not move more says nothing


def first_layer(layout: Layout, num_features: int) -> tuple[str, str] | None:
    """The names of weight (num_outputs, num_features) and bias of the first layer, if it takes the features so.

    >>> import hansa
    >>> first_layer(hansa.LinearLearner(num_features=3, num_classes=2).layout, 3)
    ('weight', 'bias')
    """
    own = [(n, s) for n, s, r in zip(layout.names, layout.shapes, layout.roles, strict=True) if r == "parameter"]
    if not own:
        return None
    name, shape = own[0]
    bias = f"{name.removesuffix('weight')}bias"
    fits = name.endswith("weight") and len(shape) == 2 and shape[1] == num_features
    return (name, bias) if fits and dict(own).get(bias) == (shape[0],) else None


def from_first_layer(update: Floats, layout: Layout, names: tuple[str, str]) -> Floats:
    """The row (num_features,) behind an update (num_params,): the line whose bias moved most, over that.

    Zeros where no bias moved.

    >>> layout = Layout.of({"weight": np.zeros((2, 3)), "bias": np.zeros(2)})
    >>> row, errors = np.array([1.0, 5.0, -2.0]), np.array([0.1, -0.3])
    >>> update = np.concatenate([np.outer(errors, row).ravel(), errors]).astype(np.float32)
    >>> from_first_layer(update, layout, ("weight", "bias")).round(4).tolist()
    [1.0, 5.0, -2.0]
    """
    weights, biases = (update[part].astype(np.float64) for part in layout.slices(names))
    table = weights.reshape(len(biases), -1)
    line = int(np.argmax(np.abs(biases)))
    if abs(biases[line]) <= _SMALLEST * float(np.abs(update).max(initial=0.0)):
        return np.zeros(table.shape[1], np.float32)
    found: Floats = (table[line] / biases[line]).astype(np.float32)
    return found


def by_matching(
    module: Any,
    loss: Callable[[Any, Any], Any],
    update: Floats,
    layout: Layout,
    shape: tuple[int, ...],
    *,
    key: Key,
    num_steps: int = 400,
    smoothness: float = 0.0,
    num_starts: int = 2,
) -> Floats:
    """Rows (num_rows, ...) of ``shape`` whose gradient is as parallel as can be to minus the update (num_params,).

    ``module`` is a torch model with the received parameters; ``loss(module, x)`` the mean loss of rows whose labels the
    attacker knows. ``smoothness`` weighs the total variation of the last two axes, for images.
    """
    import torch

    named = dict(module.named_parameters())
    places = [(named[n], part) for n, part in zip(layout.names, layout.slices(layout.names), strict=True) if n in named]
    parameters = [parameter for parameter, _ in places]
    target = torch.cat([torch.from_numpy(np.array(-update[part], np.float32)) for _, part in places])
    target = target / target.norm().clamp(min=1e-30)
    best, found = float("inf"), np.zeros(shape, np.float32)
    for start in range(num_starts):
        drawn = key.child("start", start).generator().standard_normal(shape, dtype=np.float32)
        x = torch.from_numpy(drawn).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
        for _ in range(num_steps):
            gradient = torch.autograd.grad(loss(module, x), parameters, create_graph=True)
            flat = torch.cat([part.reshape(-1) for part in gradient])
            distance = 1 - (flat @ target) / flat.norm().clamp(min=1e-30)
            total = distance + smoothness * _variation(x) if smoothness else distance
            (x.grad,) = torch.autograd.grad(total, [x])
            optimizer.step()
            scheduler.step()
        if float(total.detach()) < best:
            best, found = float(total.detach()), x.detach().numpy().copy()
    return found


def _variation(x: Any) -> Any:
    """The mean absolute difference of neighbours along the last two axes."""
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., :, 1:] - x[..., :, :-1]).abs().mean()


def likeness(truth: npt.ArrayLike, found: npt.ArrayLike) -> float:
    """The correlation of what was read back with what was there, whatever the scale: 1 is the same, 0 nothing of it.

    >>> likeness([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]), likeness([0.0, 1.0, 2.0], [3.0, 3.0, 3.0])
    (1.0, 0.0)
    """
    one, other = (np.asarray(values, np.float64).ravel() for values in (truth, found))
    one, other = one - one.mean(), other - other.mean()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return round(float(one @ other) / lengths, 12) if lengths > 0 and np.isfinite(lengths) else 0.0


__all__ = ["by_matching", "first_layer", "from_first_layer", "likeness"]
