"""``TorchLearner``: any PyTorch model, trained on each client with a loss of your choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Array
from hansa.learners.checks import check_labels
from hansa.learners.scores import labels, probabilities
from hansa.learners.torch_check import check_finite, check_scores, check_targets, input_size, output_size
from hansa.learners.torch_losses import Loss, check_loss, check_models
from hansa.local_training import Correction, Fitted, LocalTraining
from hansa.metrics import CLASS_METRICS, Metric, Metrics

if TYPE_CHECKING:
    from hansa.learners.torch_engine import Engine


class TorchLearner:
    """A PyTorch model. ``build_model()`` returns a fresh ``nn.Module``, whose parameters are float32.

    ``loss`` is ``"cross_entropy"`` (integer labels; classes on the last axis of the scores), ``"mse"``, ``"mae"``,
    ``"binary_cross_entropy"`` (of logits), ``"huber"``, ``"poisson"`` (of log rates), or a function
    ``loss(model, x, y)`` that returns the mean over the batch. Models that an algorithm names arrive besides, in
    evaluation mode and without gradients: ``loss(model, x, y, teacher=None)``. Where a dataset's ``x`` is a dict, the
    model is called ``model(**x)``; a loss of your own gets the dict. Floats, bytes and truth values arrive as float32,
    other integers as int64.

    ``num_classes=None``: for a loss or metrics of classes it is read off the model's last layer. ``metrics=None`` is
    accuracy for classes, R² for values.

    What is learned and averaged is parameters that require a gradient and floating buffers (BatchNorm's statistics).
    Frozen parameters stay as ``build_model`` makes them, from one seed everywhere; ``frozen_hash`` compares them.

    - BatchNorm: where a batch has one value a channel (one example), that layer uses its running statistics, since
      PyTorch cannot normalise a single value; the step is taken and counted.
    - Dropout, and what else is drawn, comes from each client's key; PyTorch's own generators stay as they were.
    - Clients of a block train at once where that is faster in a short trial and gives the same (``batched=None``);
      ``batched=False`` never, ``batched=True`` wherever it can be done. What was chosen stands in ``choices``.
    - ``precision="bf16"``: in training, the model runs forward and backward under ``torch.autocast`` in bfloat16, whose
      numbers have 8 significant bits. Products round to them: after one local epoch, updates of small models differ by
      1 to 5 % of their length from those of float32, of convolutional ones by up to 20 %, their losses in the fourth
      digit. Parameters, updates, the optimizer's state and losses by name stay float32, and evaluation runs in
      float32. It saves time only for large layers, on hardware that multiplies bfloat16; small models take longer.

    A learner is not for several threads at once. Raises ``InputError`` for unknown options, and at first use where
    PyTorch is not installed.

    >>> from torch import nn
    >>> learner = TorchLearner(lambda: nn.Linear(3, 2), metrics=("accuracy", "auc"))
    >>> learner.layout.names, learner.layout.num_params, learner.metrics.names
    (('weight', 'bias'), 8, ('loss', 'accuracy', 'auc'))
    """

    corrections = frozenset({"linear", "strength", "anchor", "trainable", "models"})
    reports_loss = True
    protects_records = True  # it can train by DPSGD
    gives_change = True
    leaves_products = True

    def __init__(
        self,
        build_model: Callable[[], Any],
        *,
        loss: Loss = "cross_entropy",
        metrics: Sequence[str | Metric] | None = None,
        device: str = "auto",
        num_classes: int | None = None,
        batched: bool | None = None,
        precision: str = "float32",
    ) -> None:
        is_model = hasattr(build_model, "state_dict") and not isinstance(build_model, type)
        if is_model or not callable(build_model):
            raise InputError(
                "TorchLearner(build_model): expected a function that builds a fresh model, "
                f"found {type(build_model).__name__}; write a function that returns it"
            )
        check_loss(loss)
        if batched not in (None, True, False):
            raise InputError(f"TorchLearner(batched=): expected None, True or False, found {batched!r}")
        if precision not in ("float32", "bf16"):
            raise InputError(f"TorchLearner(precision=): expected 'float32' or 'bf16', found {precision!r}")
        self.build_model, self.loss, self.device, self.batched = build_model, loss, device, batched
        self.precision = precision
        self._asked, self._num_classes = metrics, num_classes
        Metrics(self._names, num_classes=(num_classes or 2) if self._has_classes else None)  # refuses unknown names

    def __repr__(self) -> str:
        build, loss = getattr(self.build_model, "__qualname__", self.build_model), self.loss
        own = [f"{build}", f"loss={loss!r}" if isinstance(loss, str) else f"loss={getattr(loss, '__qualname__', loss)}"]
        own.append(f"metrics={tuple(m if isinstance(m, str) else m.name for m in self._names)!r}")
        options = (
            ("device", self.device, "auto"),
            ("num_classes", self._num_classes, None),
            ("batched", self.batched, None),
            ("precision", self.precision, "float32"),
        )
        own += [f"{name}={value!r}" for name, value, default in options if value != default]
        return f"TorchLearner({', '.join(own)})"

    def __getstate__(self) -> dict[str, Any]:
        """The options, without what was made from them: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_engine", "layout", "metrics")}

    def on_device(self, device: str) -> TorchLearner:
        """The same learner on another device, as ``hansa join --device cuda:1`` asks for."""
        return TorchLearner(
            self.build_model,
            loss=self.loss,
            metrics=self._asked,
            device=device,
            num_classes=self._num_classes,
            batched=self.batched,
            precision=self.precision,
        )

    @cached_property
    def layout(self) -> Layout:
        """The learned parameters and the floating buffers, in the order of the model's ``state_dict``."""
        return self._engine.flat.layout

    @cached_property
    def metrics(self) -> Metrics:
        """The loss and the metrics asked for."""
        size = output_size(self._engine.flat.module)
        return Metrics(self._names, num_classes=self.num_classes, num_outputs=1 if self._has_classes else size or 1)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for a regression."""
        if self._num_classes is not None or not self._has_classes:
            return self._num_classes
        size = output_size(self._engine.flat.module)
        if self.loss == "binary_cross_entropy" or (size == 1 and self.loss != "cross_entropy"):
            return 2
        if size is None or size < 2:
            raise InputError(
                f"TorchLearner(num_classes=): expected a last layer with an output a class, found "
                f"{'one that does not say its size' if size is None else 'one output'}; "
                f"give num_classes={', or use binary_cross_entropy' if size else ''}"
            )
        return size

    @property
    def batches_clients(self) -> bool:
        """Whether wide blocks may pay."""
        return self.batched is not False

    @property
    def block_bytes(self) -> int:
        """Parameters of all clients of a block together: what stays in a processor's cache, much more on a GPU."""
        return (1 << 30) if self._engine.device.type == "cuda" else 10 << 20

    @property
    def choices(self) -> Mapping[str, str]:
        """What trials have chosen so far: situation -> ``loop`` or ``batched``."""
        return dict(self._engine.trainer.choices)

    def choose(self, choices: MutableMapping[str, str]) -> None:
        """Keep to ``choices``, and add to them what trials find: workers that share a run must choose alike."""
        self._engine.trainer.choices = choices

    @property
    def frozen_hash(self) -> str | None:
        """SHA-256 in hex of the frozen parameters, or None: every client and the server must have the same."""
        return self._engine.flat.frozen_hash()

    def initial(self, key: Key) -> npt.NDArray[np.float32]:
        """The parameters (num_params,) of a model built with PyTorch's generator seeded from ``key``."""
        return self._engine.initial(key)

    def fit(
        self,
        params: Array,
        datasets: Sequence[Any],
        local: LocalTraining,
        correction: Correction,
        keys: Sequence[Key],
        *,
        change: bool = False,
        unwritten: bool = False,
    ) -> Fitted:
        """Local training of a block: ``params`` (num_clients, num_params) is left as it is.

        With ``change`` what comes back is local minus received parameters, written in one pass. With ``unwritten``
        besides, only the sum of rows is wanted: some columns may come as products (``unwritten.py``).

        The loss is the mean over all examples seen, by their weights; NaN for a client that took no step. A batch of
        zero total weight has gradient zero. Buffers take no correction.
        """
        check_models(self.loss, correction.models)
        if math.isnan(local.learning_rate):
            raise InputError("TorchLearner: expected a client_learning_rate, found none; give client_learning_rate=0.1")
        return self._engine.fit(params, datasets, local, correction, keys, change, unwritten)

    def columns(self, dataset: Any) -> dict[str, npt.NDArray[Any]]:
        """A dataset's arrays in the types that the model takes, as blocks of clients keep them."""
        return self._engine.reader.columns(dataset)

    def evaluate(self, params: Array, datasets: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Metric sums of each client's rows: (num_clients, metrics.size) float64; zeros for an empty dataset."""
        return self._engine.evaluate(params, datasets, self.metrics)

    def scores(self, params: Array, x: Any) -> npt.NDArray[np.float32]:
        """What the model gives for ``x`` (an array or a dict): (num_rows, ...), a single column as (num_rows,)."""
        return self._engine.scores(params, x)

    def predict(self, params: Array, x: Any) -> npt.NDArray[Any]:
        """Class labels (num_rows, ...) int64, or values."""
        scores = self.scores(params, x)
        if self.num_classes is None:
            return scores
        if self.loss == "binary_cross_entropy":
            return (scores > 0).astype(np.int64)
        return labels(scores) if scores.ndim < 3 else scores.argmax(axis=-1)

    def predict_proba(self, params: Array, x: Any) -> npt.NDArray[Any]:
        """Each class's probability: (num_rows, num_classes); refused for a regression."""
        scores = self.scores(params, x)
        if self.num_classes is None or scores.ndim > 2:
            raise InputError("predict_proba: expected a model of classes, one label a row, found another; use scores")
        return probabilities(scores)

    def model(self, params: Array) -> Any:
        """A new ``nn.Module`` with these parameters, in evaluation mode."""
        return self._engine.model(params)

    def check(self, dataset: Any, client: str) -> None:
        """Refuse rows that the model cannot take, missing values, and labels that the loss cannot take."""
        if isinstance(self.loss, str):
            if dataset.y is None or len(dataset):
                check_targets(dataset, client, self.loss, self.num_classes)
        elif self._num_classes is not None and dataset.y is not None and np.ndim(dataset.y) == 1:
            check_labels(dataset, client, self._num_classes)
        if len(dataset):
            check_finite(dataset, client)
            self._try_one(dataset, client)

    def _try_one(self, dataset: Any, client: str) -> None:
        """Run the model on the first example, once for each form that examples take."""
        first = dataset.take([0])
        try:
            shape = self._engine.trial(first.x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            size = input_size(self._engine.flat.module)
            takes = f"examples that the model takes{f' ({size} features)' if size else ''}"
            found = {n: a.shape for n, a in dataset.x.items()} if isinstance(dataset.x, dict) else dataset.x.shape
            raise InputError(
                f"client {client!r}: expected {takes}, found x of shape {found} ({str(error).splitlines()[0]}); "
                "give every client the same features, and build_model sizes that fit them"
            ) from error
        if isinstance(self.loss, str):
            check_scores(shape, dataset.y, client, self.loss, self.num_classes)

    @property
    def _has_classes(self) -> bool:
        named = [m for m in self._asked or () if isinstance(m, str)]
        by_loss = self.loss in ("cross_entropy", "binary_cross_entropy")
        return by_loss or self._num_classes is not None or any(name in CLASS_METRICS for name in named)

    @property
    def _names(self) -> Sequence[str | Metric]:
        if self._asked is not None:
            return self._asked
        return ("accuracy",) if self._has_classes else ("r2",) if isinstance(self.loss, str) else ()

    @cached_property
    def _engine(self) -> Engine:
        try:
            from hansa.learners.torch_engine import Engine
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "torch":
                raise
            raise InputError(
                "TorchLearner: expected PyTorch to be installed, found that it is not; pip install 'hansa[torch]'"
            ) from error
        return Engine(self.build_model, self.loss, self.device, self.batched, self.precision)
