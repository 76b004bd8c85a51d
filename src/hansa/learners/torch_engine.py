"""Everything of ``TorchLearner`` that needs PyTorch: made at first use, kept for as long as the learner lives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Array
from hansa.learners.batches import num_steps
from hansa.learners.torch_choice import Trainer
from hansa.learners.torch_data import Reader, parts, view
from hansa.learners.torch_evaluate import Evaluator
from hansa.learners.torch_job import Job, Others
from hansa.learners.torch_losses import Loss, make_loss
from hansa.learners.torch_module import FlatModel
from hansa.learners.torch_precision import flushed, lower
from hansa.learners.torch_steps import Terms
from hansa.local_training import Correction, Fitted, LocalTraining
from hansa.metrics import Metrics
from hansa.unwritten import Unwritten


class Engine:
    """One model on one device, and what trains and evaluates it. Not for use by several threads at once."""

    def __init__(
        self, build_model: Callable[[], Any], loss: Loss, device: str, batched: bool | None, precision: str = "float32"
    ) -> None:
        self.device, self._is_lower = _device(device), precision == "bf16"
        self._build_model, self._batched, self._loss = build_model, batched, make_loss(loss)
        self._tried: dict[str, tuple[int, ...]] = {}
        self.reader = Reader(self.device, self._loss.label_type)

    @cached_property
    def flat(self) -> FlatModel:
        """The model."""
        flat = FlatModel(self._build_model, self.device)
        if self._is_lower:
            lower(flat.module, self.device)
        return flat

    @cached_property
    def trainer(self) -> Trainer:
        """What trains it."""
        others = Others(self._build_model, self.device)
        return Trainer(self.flat, self._loss, others, self._batched, self._is_lower)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What runs it over rows."""
        return Evaluator(self.flat, self._loss)

    def fit(
        self,
        params: Array,
        datasets: Sequence[Any],
        local: LocalTraining,
        correction: Correction,
        keys: Sequence[Key],
        change: bool = False,
        unwritten: bool = False,
    ) -> Fitted:
        """Local training of a block; arrays come back as they came: NumPy's, or tensors on the learner's device.

        With ``unwritten``, which goes with ``change``, columns of NumPy's may come back as products.
        """
        sizes = getattr(datasets, "sizes", None)
        sizes = np.array([len(dataset) for dataset in datasets], dtype=np.int64) if sizes is None else sizes
        received = self.tensor(params)
        job = Job(
            params=received,
            examples=self.reader.rows(datasets),
            sizes=sizes,
            local=local,
            terms=self._terms(correction),
            models={name: self._rows(vectors) for name, vectors in correction.models.items()},
            keys=keys,
            change=change,
            leaves_products=unwritten and change and isinstance(params, np.ndarray) and self.device.type == "cpu",
        )
        # NumPy asks for large pages, which a matrix as wide as all clients' models needs.
        out = view(np.empty(received.shape, np.float32)).to(self.device)
        with flushed():
            losses, left = self.trainer.fit(job, out)
        fitted: Any = out if isinstance(params, Tensor) else out.cpu().numpy()
        if left:
            fitted = Unwritten(fitted, left)
        return Fitted(fitted, num_steps(sizes, local), sizes, losses)

    def evaluate(self, params: Array, datasets: Sequence[Any], metrics: Metrics) -> npt.NDArray[np.float64]:
        """Metric sums: (num_clients, metrics.size)."""
        examples = self.reader.rows(datasets)
        return self.evaluator.evaluate(self.tensor(params), examples, metrics)

    def scores(self, params: Array, x: Any) -> npt.NDArray[np.float32]:
        """What the model gives for ``x``, an array or a dict of arrays."""
        return self.evaluator.scores(self.tensor(params), self.reader.features(x))

    def trial(self, x: Any) -> tuple[int, ...]:
        """The shape of the scores of ``x``, for the model as it stands; remembered by the form of ``x``."""
        features = self.reader.features(x)
        form = str({name: (part.shape, part.dtype) for name, part in parts(features).items()})
        if form not in self._tried:
            self._tried[form] = self.evaluator.shape(features)
        return self._tried[form]

    def initial(self, key: Key) -> npt.NDArray[np.float32]:
        """Parameters drawn from ``key``: (num_params,)."""
        vector: npt.NDArray[np.float32] = self.flat.initial(key).cpu().numpy()
        return vector

    def model(self, params: Array) -> nn.Module:
        """A module of the user's with these parameters."""
        return self.flat.fresh(self.tensor(params))

    def tensor(self, vectors: Array) -> Tensor:
        """A vector or a block as float32 on the device; nothing is copied where nothing need be."""
        if not isinstance(vectors, Tensor):
            vectors = view(np.asarray(vectors, dtype=np.float32))
        if vectors.dim() == 2 and vectors.stride(0) == 0:  # one vector for all: it travels once
            return self.tensor(vectors[0]).expand(len(vectors), -1)
        tensor: Tensor = vectors.to(self.device, torch.float32)
        if tensor.shape[-1:] != (self.flat.layout.num_params,):
            raise InputError(
                f"parameters: expected {self.flat.layout.num_params} values for this model, "
                f"found shape {tuple(tensor.shape)}; use the parameters of the same build_model"
            )
        return tensor

    def _terms(self, correction: Correction) -> Terms:
        given = (correction.linear, correction.anchor, correction.trainable)
        own = [None if vectors is None else self._rows(vectors) for vectors in given]
        return Terms(own[0], float(correction.strength), own[1], own[2])

    def _rows(self, vectors: Array) -> Tensor:
        """(num_params,) or (num_clients, num_params) as rows: one for all, or one each."""
        tensor = self.tensor(vectors)
        return tensor[None] if tensor.dim() == 1 else tensor


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"TorchLearner(device=): expected 'auto', 'cpu' or 'cuda', found {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"TorchLearner(device=): expected a device of this machine, found {name!r} and no GPU; use 'auto'"
        )
    return device
