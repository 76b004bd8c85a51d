"""DP-SGD for any PyTorch model without buffers: each record's own gradient, clipped, summed and made noisy.

Gradients by record come from ``torch.func`` (``vmap`` of ``grad``), which needs no layers of a special kind; a model
that it cannot map goes through autograd record by record. See ``DPSGD`` in ``local_training.py`` for the algorithm.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from hansa.core.errors import CheckError, HansaError, InputError
from hansa.learners.dp_sgd import Noise, factors, poisson_batches
from hansa.learners.failed import ClientFailed, why
from hansa.learners.torch_data import Examples, parts
from hansa.learners.torch_job import Job, Losses, Others, steps_of
from hansa.learners.torch_losses import NamedLoss, OwnLoss
from hansa.learners.torch_module import FlatModel, preserved, reseed
from hansa.learners.torch_vmap import Objective

_GRADIENT_BYTES = 64 << 20  # of gradients by record at a time


class PrivateLoop:
    """Trains clients one by one by DP-SGD."""

    def __init__(self, flat: FlatModel, loss: NamedLoss | OwnLoss, others: Others) -> None:
        self._flat, self._loss, self._others = flat, loss, others
        self._can_map = True

    def fit(self, job: Job, out: Tensor) -> Losses:
        """Train every client of the job into its row of ``out``; no loss is told.

        Raises ``CheckError`` for a model with buffers, whose statistics would leave without noise, and ``ClientFailed``
        where a client's data, the model or the loss do.
        """
        if self._flat.has_buffers:
            raise CheckError(
                ["DPSGD: expected a model without buffers, which leave without noise; use GroupNorm, say."]
            )
        noise = Noise(job.local, job.sizes, job.keys)
        self._flat.module.train()
        with torch.no_grad(), preserved(self._flat.device):
            for client in range(len(job.sizes)):
                reseed(job.keys[client].child("torch"), self._flat.device)
                try:
                    self._fit_client(job, client, noise)
                except HansaError:
                    raise
                except Exception as error:
                    raise ClientFailed(client, why(error)) from error
                self._flat.read(out[client], less=job.params[client] if job.change else None)
        return np.full(len(job.sizes), np.nan)

    def _fit_client(self, job: Job, client: int, noise: Noise) -> None:
        """Train one client in ``module``."""
        flat, examples = self._flat, job.examples[client]
        if examples.weights is not None and not self._loss.can_mask:
            raise InputError(
                "loss: a function loss(model, x, y) cannot weigh examples, found a dataset with weights; use a loss by "
                "name, or drop the weights"
            )
        flat.load(job.params[client])
        others = self._others.load(job.models, client) if job.models else {}
        objective = Objective(self._loss, flat.module, others)
        steps = steps_of(job.local, job.terms.part(client, client + 1), flat, flat.parameters)
        own = job.sizes[client : client + 1]
        for step, (rows, real) in enumerate(poisson_batches(job.keys[client : client + 1], own, job.local)):
            batch = examples.take(torch.from_numpy(rows[0][real[0]]).to(flat.device))
            total = self._clipped_sum(objective, batch, others, noise.clipping_norm)
            noisy = noise.gradient(client, step, total.cpu().numpy())
            gradient = flat.split(torch.from_numpy(noisy.astype(np.float32)).to(flat.device))
            steps.apply(flat.parameters, [g.clone() for g in gradient])

    def _clipped_sum(
        self, objective: Objective, batch: Examples, others: Mapping[str, nn.Module], clipping_norm: float
    ) -> Tensor:
        """The sum over a batch of its records' clipped gradients: (num_params,) float64."""
        size = self._flat.layout.num_params
        total = torch.zeros(size, dtype=torch.float64, device=self._flat.device)
        width = max(1, _GRADIENT_BYTES // (8 * size))
        for start in range(0, batch.num_rows, width):
            rows = self._gradients(objective, batch.part(start, min(start + width, batch.num_rows)), others).double()
            norms: npt.NDArray[np.float64] = rows.norm(dim=1).cpu().numpy()
            scale = torch.from_numpy(factors(norms, clipping_norm)).to(rows.device)
            total += scale @ torch.where(scale[:, None] > 0, rows, 0.0)
        return total

    def _gradients(self, objective: Objective, batch: Examples, others: Mapping[str, nn.Module]) -> Tensor:
        """Each record's gradient: (num_rows, num_params)."""
        if self._can_map:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", "There is a performance drop")  # slower than record by record
                    return self._mapped(objective, batch)
            except (RuntimeError, NotImplementedError, UserWarning):  # what vmap cannot do, autograd can
                self._can_map = False
        found = [self._one(batch.part(i, i + 1), others) for i in range(batch.num_rows)]
        return torch.stack(found)

    def _mapped(self, objective: Objective, batch: Examples) -> Tensor:
        """All records at once."""
        flat = self._flat
        shares = torch.ones(batch.num_rows, device=flat.device) if batch.weights is None else batch.weights
        tensors = {f"model.{name}": p.detach() for name, p in zip(flat.parameter_names, flat.parameters, strict=True)}

        def loss(tensors: dict[str, Tensor], x: Any, y: Tensor | None, share: Tensor) -> Any:
            lone = {name: part[None] for name, part in parts(x).items()}
            one = lone if isinstance(x, dict) else lone[""]
            return functional_call(objective, tensors, (one, None if y is None else y[None], share[None]))

        places = (None, 0, None if batch.y is None else 0, 0)
        mapped = torch.vmap(grad(loss), in_dims=places, randomness="different")
        found = mapped(tensors, batch.x, batch.y, shares)
        return torch.cat([found[name].detach().flatten(1) for name in tensors], dim=1)

    def _one(self, record: Examples, others: Mapping[str, nn.Module]) -> Tensor:
        """One record's gradient (num_params,), times its weight."""
        flat = self._flat
        with torch.enable_grad():
            value = self._loss.mean(flat.module, record._replace(weights=None), dict(others))
        found = torch.autograd.grad(value, flat.parameters, allow_unused=True)
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(flat.parameters, found, strict=True)]
        vector = torch.cat([g.reshape(-1) for g in own])
        return vector if record.weights is None else vector * record.weights[0]
