"""A PyTorch model as one vector, which one module loads and reads for many clients in turn.

The vector holds what training changes and what can be averaged, in the order of the model's ``state_dict``: parameters
that require a gradient (role ``parameter``) and floating buffers such as BatchNorm's statistics (role ``buffer``).
Frozen parameters and integer buffers stay outside; so do buffers that the model does not save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.long_vectors import give_back, is_long

_FROZEN = Key.of("hansa frozen parameters")  # equal everywhere: frozen layers drawn at random are the same for all


class Entry(NamedTuple):
    """One tensor of a module and where it hangs."""

    name: str
    owner: nn.Module
    attribute: str
    tensor: Tensor
    role: str  # "parameter" and "buffer" are in the vector; "frozen" and "outside" are not


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Afterwards, PyTorch's own generators are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def reseed(key: Key, device: torch.device) -> None:
    """Seed PyTorch's own generators from ``key``; only where they are ``preserved``."""
    seed = int.from_bytes(key.material[:8], "big")
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def build(build_model: Callable[[], Any], key: Key, device: torch.device) -> nn.Module:
    """A fresh float32 model whose random start is drawn from ``key``."""
    with preserved(device):
        reseed(key, device)
        module = build_model()
    if not isinstance(module, nn.Module):
        raise InputError(
            f"build_model: expected a function that returns a torch.nn.Module, found {type(module).__name__}; "
            "return the model"
        )
    return module.float().to(device)


def entries(module: nn.Module) -> list[Entry]:
    """Every tensor of ``module`` once (tied parameters under their first name), in the order of its ``state_dict``."""
    saved, seen, found = set(module.state_dict()), set[int](), list[Entry]()
    for prefix, owner in module.named_modules():
        tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for attribute, tensor in tensors:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Entry(name, owner, attribute, tensor, _role(name, tensor, name in saved)))
    return found


def _role(name: str, tensor: Tensor, is_saved: bool) -> str:
    if nn.parameter.is_lazy(tensor):
        raise InputError(f"build_model: expected parameters with a shape, found the lazy {name!r}; state its sizes")
    if isinstance(tensor, nn.Parameter):
        if tensor.requires_grad and tensor.is_complex():
            raise InputError(
                f"build_model: expected real parameters, found {tensor.dtype} in {name!r}; use two real ones"
            )
        return "parameter" if tensor.requires_grad else "frozen"
    return "buffer" if is_saved and tensor.is_floating_point() else "outside"


class FlatModel:
    """A module for use by many clients in turn: ``load`` a vector, train or run ``module``, ``read`` the vector."""

    def __init__(self, build_model: Callable[[], Any], device: torch.device) -> None:
        self._build_model, self.device = build_model, device
        self.module = build(build_model, _FROZEN, device)
        self._entries = entries(self.module)
        self.layout = _layout(self._entries)
        self.parameters = [e.tensor for e in self._entries if e.role == "parameter"]
        self._buffers = [e for e in self._entries if e.role == "buffer"]
        self._outside = [(e, e.tensor.clone()) for e in self._entries if e.role == "outside"]
        self._sizes = list(self.layout.sizes)
        own = list(enumerate(zip(self.layout.names, self.layout.shapes, self.layout.roles, strict=True)))
        self._places = [(i, name, shape) for i, (name, shape, role) in own if role == "parameter"]
        self._buffer_places = [(i, name, shape) for i, (name, shape, role) in own if role == "buffer"]
        self.has_buffers = bool(self._buffers)
        self.stacks: dict[str, list[Tensor]] = {}  # of blocks of clients; kept, so that no step asks for memory
        self.batch_norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        for norm in self.batch_norms:
            norm.register_forward_pre_hook(_running_statistics_for_one_value)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the learned parameters, in order."""
        return [name for _, name, _ in self._places]

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Views of the learned parameters in vectors (..., num_params), each (..., *shape), in order."""
        lead, parts = vectors.shape[:-1], vectors.split_with_sizes(self._sizes, dim=-1)
        return [parts[i].view(*lead, *shape) for i, _, shape in self._places]

    def columns(self, parameter: int) -> slice:
        """Where a learned parameter lies in the vector."""
        place = self._places[parameter][0]
        start = sum(self._sizes[:place])
        return slice(start, start + self._sizes[place])

    def split_buffers(self, vectors: Tensor) -> dict[str, Tensor]:
        """Views of the floating buffers in vectors (..., num_params), each (..., *shape), by name."""
        lead, parts = vectors.shape[:-1], vectors.split_with_sizes(self._sizes, dim=-1)
        return {name: parts[i].view(*lead, *shape) for i, name, shape in self._buffer_places}

    def load(self, vector: Tensor) -> None:
        """Make ``module`` the model of ``vector`` (num_params,); what is outside the vector is as it was built."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.split(vector))
            for entry, value in zip(self._buffers, self.split_buffers(vector).values(), strict=True):
                setattr(entry.owner, entry.attribute, value.clone())
            for entry, value in self._outside:
                setattr(entry.owner, entry.attribute, value.clone())

    def read(self, out: Tensor, less: Tensor | None = None) -> None:
        """Write the vector of ``module``, ``less`` another, into ``out`` (num_params,)."""
        with torch.no_grad():
            places, buffers = self.split(out), list(self.split_buffers(out).values())
            now = [*self.parameters, *(getattr(entry.owner, entry.attribute) for entry in self._buffers)]
            if less is None:
                torch._foreach_copy_([*places, *buffers], now)
                return
            before = [*self.split(less), *self.split_buffers(less).values()]
            for place, value, start in zip([*places, *buffers], now, before, strict=True):
                torch.sub(value, start, out=place)

    def initial(self, key: Key) -> Tensor:
        """The vector (num_params,) of a fresh model drawn from ``key``.

        Of a long one there is hardly more than one copy in memory at any time: values move, and ``module``, which is
        loaded before each use, is zero until then, which takes no memory.
        """
        is_moved = is_long(self.layout.num_params) and self.device.type == "cpu"
        if is_moved:
            zeros = torch.from_numpy(np.zeros(self.layout.num_params, np.float32))  # no memory until written to
            for parameter, zero in zip(self.parameters, self.split(zeros), strict=True):
                parameter.data = zero
        found = entries(build(self._build_model, key, self.device))
        if {id(e.tensor) for e in found} & {id(e.tensor) for e in self._entries}:
            raise InputError(
                "build_model: expected a fresh model at every call, found the one of the call before; "
                "build it within the function"
            )
        if _layout(found) != self.layout:
            raise InputError(
                "build_model: expected the same model at every call, found other names or shapes; make it deterministic"
            )
        learned = [e.tensor for e in found if e.role in ("parameter", "buffer")]
        vector = torch.empty(self.layout.num_params, device=self.device)
        num_moved = 0
        for tensor, place in zip(learned, vector.split_with_sizes(self._sizes), strict=True):
            place.copy_(tensor.detach().reshape(-1))
            if is_moved:
                tensor.data = tensor.data.new_empty(0)
                num_moved += len(place)
                if is_long(num_moved):
                    give_back()
                    num_moved = 0
        return vector

    def fresh(self, vector: Tensor) -> nn.Module:
        """A new module with the parameters and buffers of ``vector``, in evaluation mode."""
        module = build(self._build_model, _FROZEN, self.device)
        start = 0
        with torch.no_grad():
            for entry in entries(module):
                if entry.role in ("parameter", "buffer"):
                    stop = start + entry.tensor.numel()
                    entry.tensor.copy_(vector[start:stop].view(entry.tensor.shape))
                    start = stop
        return module.eval()

    def frozen_hash(self) -> str | None:
        """SHA-256 in hex of the frozen parameters and their names; None where there are none."""
        frozen = [e for e in self._entries if e.role == "frozen"]
        digest = hashlib.sha256()
        for entry in frozen:
            values = entry.tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{entry.name} {values.shape} {values.dtype}\n".encode() + values.tobytes())
        return digest.hexdigest() if frozen else None


def _layout(found: list[Entry]) -> Layout:
    learned = [e for e in found if e.role in ("parameter", "buffer")]
    if not any(e.role == "parameter" for e in learned):
        raise InputError(
            "build_model: expected a model with parameters that require a gradient, found none; unfreeze some"
        )
    return Layout(
        names=tuple(e.name for e in learned),
        shapes=tuple(tuple(e.tensor.shape) for e in learned),
        dtypes=("float32",) * len(learned),
        roles=tuple(e.role for e in learned),
    )


def _running_statistics_for_one_value(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Where a batch has one value a channel, there is no deviation (PyTorch refuses): use the running statistics.

    Whoever trains puts the module back into training mode afterwards.
    """
    if norm.training and norm.track_running_stats and inputs and inputs[0].numel() == inputs[0].shape[1]:
        norm.eval()
