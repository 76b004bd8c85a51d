"""A ``Layout`` says which part of a vector is which named tensor, so that a whole model is one vector.

Roles mark what a part is: ``parameter`` (what training steps), ``buffer`` (running statistics: averaged, never stepped
by a server optimizer) or ``control`` (an algorithm's own vector, such as SCAFFOLD's control variate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError

ROLES = ("parameter", "buffer", "control")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names, shapes, dtypes and roles of the tensors that lie one after another in a vector.

    >>> layout = Layout.of({"weight": np.zeros((2, 3)), "bias": np.zeros(2)})
    >>> layout.num_params, layout.offsets
    (8, (0, 6))
    >>> layout.unflatten(np.arange(8))["bias"]
    array([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    roles: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise InputError(f"layout: expected names that differ, found {list(self.names)}; rename one")
        unknown = sorted(set(self.roles) - set(ROLES))
        if unknown:
            raise InputError(f"layout: expected roles among {ROLES}, found {unknown}")

    @staticmethod
    def of(tensors: Mapping[str, npt.ArrayLike], roles: Mapping[str, str] | None = None) -> Layout:
        """The layout of ``tensors`` in their order; a role that is not given is ``parameter``."""
        arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
        return Layout(
            names=tuple(arrays),
            shapes=tuple(a.shape for a in arrays.values()),
            dtypes=tuple(str(a.dtype) for a in arrays.values()),
            roles=tuple((roles or {}).get(name, "parameter") for name in arrays),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values in each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts."""
        return tuple(int(i) for i in np.cumsum((0, *self.sizes))[:-1])

    @property
    def num_params(self) -> int:
        """Length of the vector."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, npt.ArrayLike]) -> npt.NDArray[np.float32]:
        """One new float32 vector (num_params,) of ``tensors``, which must have this layout's names and shapes."""
        if set(tensors) != set(self.names):
            missing, extra = sorted(set(self.names) - set(tensors)), sorted(set(tensors) - set(self.names))
            raise InputError(f"tensors: expected the names of the layout; missing {missing}, not expected {extra}")
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            part = np.asarray(tensors[name], dtype=np.float32)
            if part.shape != shape:
                raise InputError(f"tensor {name!r}: expected shape {shape}, found {part.shape}")
            parts.append(part.reshape(-1))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def unflatten(self, vector: npt.NDArray[np.floating], copy: bool = True) -> dict[str, npt.NDArray[np.generic]]:
        """Named tensors of a vector (num_params,), each in its own dtype; without ``copy`` perhaps views of it."""
        if vector.shape != (self.num_params,):
            raise InputError(f"vector: expected {self.num_params} values for this layout, found shape {vector.shape}")
        return {
            name: vector[start : start + size].reshape(shape).astype(dtype, copy=copy)
            for name, start, size, shape, dtype in zip(
                self.names, self.offsets, self.sizes, self.shapes, self.dtypes, strict=True
            )
        }

    def mask(self, *roles: str) -> npt.NDArray[np.bool_]:
        """True where the vector holds one of ``roles``: (num_params,)."""
        return np.repeat(np.array([role in roles for role in self.roles], dtype=bool), self.sizes)

    def as_json(self) -> dict[str, Any]:
        """The layout as plain lists, for a run directory."""
        return {"names": self.names, "shapes": self.shapes, "dtypes": self.dtypes, "roles": self.roles}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> Layout:
        """The layout that ``as_json`` gave. ``KeyError`` or ``TypeError`` for anything else."""
        shapes = tuple(tuple(int(n) for n in shape) for shape in tree["shapes"])
        rest = {name: tuple(tree[name]) for name in ("names", "dtypes", "roles")}
        return Layout(shapes=shapes, **rest)

    def slices(self, names: Sequence[str]) -> tuple[slice, ...]:
        """Where the named tensors lie, in the order asked for."""
        where = dict(zip(self.names, zip(self.offsets, self.sizes, strict=True), strict=True))
        unknown = [name for name in names if name not in where]
        if unknown:
            raise InputError(f"layout: no tensor named {unknown}; there are {list(self.names)}")
        return tuple(slice(where[name][0], sum(where[name])) for name in names)
