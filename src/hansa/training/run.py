"""``Run``: what came out of training, ready to predict, score, save and report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hansa.core.errors import InputError
from hansa.core.layout import Layout
from hansa.core.protocols import Array
from hansa.data.dataset import Dataset
from hansa.federation import Federation
from hansa.tensors import Packed
from hansa.training.evaluate import on_dataset
from hansa.training.history import Row, hours_to, read_history, read_rows, write_csv
from hansa.training.report_words import better


class Run:
    """A finished (or stopped) run.

    ``history`` has one ``Row`` a round, ``clients`` one mapping a client (``num_examples`` and the metrics on its own
    held-out rows), ``parameters`` is the vector and ``layout`` names its parts; ``info`` is what ``run.json`` holds.

    >>> import hansa, numpy as np
    >>> rows = hansa.Dataset(np.array([[0.0], [1.0]], np.float32), np.array([1.0, 3.0], np.float32))
    >>> federation = hansa.Federation(
    ...     learner=hansa.LinearLearner(num_features=1), algorithm=hansa.FedAvg(client_learning_rate=0.5)
    ... )
    >>> run = hansa.simulate(federation, {"a": rows}, num_rounds=100)
    >>> run.predict(np.array([[2.0]])).round(2).tolist(), run.layout.names
    ([5.0], ('weight', 'bias'))
    """

    def __init__(
        self,
        *,
        parameters: Array,
        layout: Layout,
        totals: Sequence[Array],
        history: Sequence[Row],
        clients: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
        federation: Federation | None,
        app_source: bytes | None = None,
    ) -> None:
        self.parameters, self.layout, self.totals = parameters, layout, tuple(totals)
        self.history, self.clients, self.info = list(history), [dict(row) for row in clients], dict(info)
        self.federation, self._app_source = federation, app_source

    def __repr__(self) -> str:
        final = ", ".join(f"{name} {value:.4g}" for name, value in self.final.items())
        return f"<Run of {len(self.history)} rounds: {final}>"

    @property
    def final(self) -> dict[str, float]:
        """Loss and metrics of the final model, on ``info["scored_on"]``."""
        return {name: float("nan") if value is None else value for name, value in self.info["final"].items()}

    def predict(self, x: Any) -> np.ndarray[Any, Any]:
        """Class labels (num_examples,) or values, for raw features prepared as in training."""
        ready = self._ready(Dataset(x))
        predicted: np.ndarray[Any, Any] = self._federation.learner.predict(self.parameters, ready.x)
        return predicted

    def predict_proba(self, x: Any) -> np.ndarray[Any, Any]:
        """Class probabilities (num_examples, num_classes), for raw features prepared as in training."""
        ready = self._ready(Dataset(x))
        shares: np.ndarray[Any, Any] = self._federation.learner.predict_proba(self.parameters, ready.x)
        return shares

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Loss and metrics on a raw dataset."""
        return on_dataset(self._federation, self.parameters, self.totals, dataset)

    def model(self) -> Any:
        """What the learner trains, with the final parameters: a torch module, a scikit-learn estimator, ..."""
        return self._federation.learner.model(self.parameters)

    def hours_to(self, metric: str, target: float) -> float:
        """Simulated hours until ``metric`` first reached ``target``, of a run with ``VirtualTime``; NaN if never.

        Loss and errors (mse, ...) reach it from above, every other metric from below.
        """
        if self.history and metric not in self.history[0]:
            raise InputError(f"hours_to: expected one of {', '.join(self.final)}, found {metric!r}")
        return hours_to(self.history, metric, target, lower_is_better=better(metric) == "lower")

    def save(self, path: str | Path) -> Path:
        """Write a run directory: run.json, history.csv, clients.csv, parameters.safetensors, report.html, app.py."""
        folder = Path(path)
        if folder.is_file():
            raise InputError(f"{folder}: expected a folder to write the run to, found a file; give another path")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "parameters.safetensors").open("wb") as file:
            file.writelines(Packed(self._tensors(), {}).pieces())
        write_csv([dict(row) for row in self.history], folder / "history.csv")
        write_csv(self.clients, folder / "clients.csv")
        info = {**self.info, "layout": self.layout.as_json()}
        (folder / "run.json").write_text(
            json.dumps(json_ready(info), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        if self._app_source is not None:
            (folder / "app.py").write_bytes(self._app_source)
        self.report(folder / "report.html", folder)
        return folder

    def report(self, path: str | Path, folder: Path | None = None) -> Path:
        """Write the page of results as one self-contained HTML file."""
        from tempfile import TemporaryDirectory

        from hansa.training.report import write_report

        if folder is not None:
            return write_report(folder, Path(path))
        with TemporaryDirectory() as temporary:
            self.save(temporary)
            return write_report(Path(temporary), Path(path))

    @property
    def _federation(self) -> Federation:
        if self.federation is None:
            raise InputError('run: expected the app that made it; found none; use hansa.load_run(path, app="app.py")')
        return self.federation

    def _ready(self, dataset: Dataset) -> Dataset:
        return self._federation.prepared(dataset, self.totals)

    def _tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        named = {
            name: np.ascontiguousarray(t) for name, t in self.layout.unflatten(np.asarray(self.parameters)).items()
        }
        return {**named, **{f"prepare.{i}": np.asarray(total) for i, total in enumerate(self.totals)}}


def load_run(path: str | Path, app: Any = None) -> Run:
    """The run in a run directory; ``app`` (a path or an App) gives back its learner, for predict and evaluate.

    Raises ``InputError`` for a folder that is not a run directory, or an app with another layout.

    >>> load_run("no_such_run")
    Traceback (most recent call last):
    hansa.core.errors.InputError: no_such_run: expected a run directory (run.json, parameters.safetensors), found ...
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(path)
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "parameters.safetensors")
        layout = Layout.from_json(info.pop("layout"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: expected a run directory (run.json, parameters.safetensors), found {error}"
        ) from error
    totals = [tensors[f"prepare.{i}"] for i in range(sum(name.startswith("prepare.") for name in tensors))]
    federation = _federation_of(app, folder)
    if federation is not None and federation.learner.layout != layout:
        raise InputError(f"{folder}: expected an app whose model has {layout.names} with these shapes, found another")
    return Run(
        parameters=layout.flatten({name: tensors[name] for name in layout.names}),
        layout=layout,
        totals=totals,
        history=read_history(folder / "history.csv") if (folder / "history.csv").exists() else [],
        clients=read_rows(folder / "clients.csv") if (folder / "clients.csv").exists() else [],
        info=info,
        federation=federation,
    )


def starting_params(start_from: Any, layout: Layout) -> Array:
    """Parameters to start from: a Run, a run directory, a safetensors file or a vector (num_params,)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if isinstance(start_from, Run):
        return layout.flatten(start_from.layout.unflatten(np.asarray(start_from.parameters)))
    if isinstance(start_from, str | Path):
        path = Path(start_from)
        path = path / "parameters.safetensors" if path.is_dir() else path
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"start_from={str(start_from)!r}: expected parameters to read, found {error}") from error
        return layout.flatten({name: t for name, t in tensors.items() if not name.startswith("prepare.")})
    vector = np.asarray(start_from, dtype=np.float32)
    if vector.shape != (layout.num_params,):
        raise InputError(f"start_from=: expected a run, a path or ({layout.num_params},) values, found {vector.shape}")
    return vector


def json_ready(value: Any) -> Any:
    """``value`` with None for numbers that JSON has not, and plain Python types throughout."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _federation_of(app: Any, folder: Path) -> Federation | None:
    if app is None:
        return None
    if hasattr(app, "federation"):
        federation: Federation = app.federation
        return federation
    from hansa.training.apps import load_app

    path = Path(app)
    return load_app(path if path.exists() else folder / path).federation
