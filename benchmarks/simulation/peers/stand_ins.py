"""Stand-ins for libraries that a peer imports at its start and a simulation on tensors never calls.

torchvision (whose newest wheel asks for a GPU build of torch), wandb, clearml, tensorboard, opacus, datasets, seaborn
and pynvml are imported by fluke and FedLab for data sets, logging and figures that are not used here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from unittest.mock import MagicMock


def stand_in(*names: str) -> None:
    """Let ``import name`` work where the library is not installed; a name may be that of a submodule."""
    absent = {name for name in names if importlib.util.find_spec(name.split(".")[0]) is None}
    for name in names:
        if name in absent:
            module = MagicMock(name=name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__path__ = []
            sys.modules[name] = module
