"""hansa: learn together, keep your data at home.

One model over data that many owners hold: a ``Federation`` says what is learned and how updates travel, a
``Population`` (or real clients over the network) holds the data, and ``simulate`` or ``hansa serve`` runs it.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hansa import statistics
from hansa.aggregators.krum import Krum
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.aggregators.trimmed_mean import TrimmedMean
from hansa.algorithms.averaged import Averaged
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from hansa.algorithms.fedprox import FedProx
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import (
    Abandoned,
    CheckError,
    HansaError,
    InputError,
    ProtocolError,
    RunError,
)
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Aggregate, Memory, Updates
from hansa.data.dataset import Dataset
from hansa.data.partition import IID, Dirichlet, QuantitySkew, Shards
from hansa.data.population import Population
from hansa.data.prepare import Standardize
from hansa.data.rescale import Rescale
from hansa.data.sampling import All, Poisson, Uniform
from hansa.data.separation import MinSeparation
from hansa.federation import Federation
from hansa.learners.function import FunctionLearner
from hansa.learners.linear import LinearLearner
from hansa.learners.sklearn import SklearnLearner
from hansa.learners.torch import TorchLearner
from hansa.local_training import DPSGD, SGD, Adam
from hansa.metrics import Metric
from hansa.privacy.blt import BLT
from hansa.privacy.strategies import Banded, Tree
from hansa.runtimes.devices import Devices, Diurnal, LogNormal
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.processes import Processes
from hansa.runtimes.virtual_time import VirtualTime
from hansa.server_optimizers import ServerAdagrad, ServerAdam, ServerSGD, ServerYogi
from hansa.training.apps import App, load_app
from hansa.training.buffered import Buffered
from hansa.training.history import Row
from hansa.training.run import Run, load_run
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.correlated_noise import CorrelatedNoise
from hansa.transforms.local_noise import LocalGaussianNoise, LocalLaplaceNoise
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from hansa.version import __version__

if TYPE_CHECKING:
    from hansa.aggregators.secure_mean import SecureMean, SecureSum
    from hansa.runtimes.ray import Ray
    from hansa.transforms.distributed_noise import SkellamNoise
    from hansa.transforms.random_mask import RandomMask
    from hansa.transforms.rotate import Rotate

# Parts that not every federation has, by module: imported when they are asked for, so that other clients stay small.
_LATER = {
    "Ray": "hansa.runtimes.ray",
    "SecureMean": "hansa.aggregators.secure_mean",
    "SecureSum": "hansa.aggregators.secure_mean",
    "SkellamNoise": "hansa.transforms.distributed_noise",
    "RandomMask": "hansa.transforms.random_mask",
    "Rotate": "hansa.transforms.rotate",
}


def compare(runs: Mapping[str, Any], path: Path | str) -> Path:
    """Draw runs side by side: ``hansa.compare({"FedAvg": [run, ...], "FedProx": [...]}, "comparison.html")``.

    A run is a ``Run`` or a run directory; several under one name are its seeds. ``path`` ends in .html, .pdf, .png or
    .svg. Raises ``InputError`` for no runs or another suffix.
    """
    from hansa.training.compare import compare as draw  # a deployed client never draws: its memory is small

    return draw(runs, path)


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'hansa' has no attribute {name!r}")


__all__ = [
    "simulate",
    "Federation",
    "App",
    "Schedule",
    "load_app",
    "Run",
    "Row",
    "load_run",
    "compare",
    "InProcess",
    "Processes",
    "Ray",
    "VirtualTime",
    "Devices",
    "LogNormal",
    "Diurnal",
    "Buffered",
    "LinearLearner",
    "TorchLearner",
    "SklearnLearner",
    "FunctionLearner",
    "SGD",
    "Adam",
    "DPSGD",
    "Metric",
    "FedAvg",
    "FedProx",
    "FedAvgM",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "FedOpt",
    "SCAFFOLD",
    "Averaged",
    "ServerSGD",
    "ServerAdagrad",
    "ServerAdam",
    "ServerYogi",
    "Clip",
    "AdaptiveClip",
    "GaussianNoise",
    "CorrelatedNoise",
    "BLT",
    "Banded",
    "Tree",
    "LocalGaussianNoise",
    "LocalLaplaceNoise",
    "SkellamNoise",
    "Rotate",
    "RandomMask",
    "Quantize",
    "TopK",
    "Mean",
    "Median",
    "TrimmedMean",
    "Krum",
    "SecureMean",
    "SecureSum",
    "statistics",
    "Dataset",
    "Population",
    "Standardize",
    "Rescale",
    "IID",
    "Dirichlet",
    "Shards",
    "QuantitySkew",
    "Uniform",
    "All",
    "Poisson",
    "MinSeparation",
    "Updates",
    "Aggregate",
    "Memory",
    "Key",
    "Layout",
    "HansaError",
    "InputError",
    "CheckError",
    "RunError",
    "Abandoned",
    "ProtocolError",
    "__version__",
]
