"""Rounds of long vectors: the server's state lies in files, and a step is taken some columns at a time.

The steps are the core's own ``combine`` and the algorithm's own ``init``, on a few columns of everything, so that the
bits are those of the whole. An algorithm, an aggregator or a transform that must see whole vectors is given them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from hansa.core import round as core
from hansa.core.chain import Transform
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Aggregate, Array, Plan, Updates
from hansa.core.round import Context, ServerState
from hansa.core.tasks import Evaluation, Parts
from hansa.long_vectors import Later, NewVector, columns_of, is_columnwise, is_long, let_go, spans
from hansa.network.failpoints import fail_point

Groups = Sequence[tuple[Plan, Updates]]
Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LongRounds:
    """Keeps long vectors in files without names in ``folder``, read-only; what is short stays in memory."""

    folder: Path

    def keep(self, vector: Vector) -> Vector:
        """The same values, in a file where there are many."""
        if not _is_long_vector(vector):
            return vector
        with NewVector(self.folder, vector.dtype) as kept:
            for first, stop in spans(len(vector)):
                kept.add(vector[first:stop])
            return kept.done()

    def begin(self, parts: Parts, params: Array, update_size: int | None = None) -> ServerState:
        """The core's ``begin``."""
        if not (_is_long_vector(params) and is_columnwise(parts.algorithm.init)):
            return core.begin(parts, params, update_size)
        state = self._joined(len(params), lambda first, stop: parts.algorithm.init(params[first:stop]), params)
        size = len(params) if update_size is None else update_size
        return ServerState(state, tuple(transform.init(size) for transform in parts.transforms))

    def combine(
        self, parts: Parts, state: ServerState, groups: Groups, scales: Sequence[float], secret: Key, context: Context
    ) -> tuple[ServerState, Aggregate]:
        """The core's ``combine``."""
        length = _num_columns(parts, state, groups)
        if length is None:
            return core.combine(parts, state, groups, scales, secret, context)
        found: list[tuple[ServerState, Aggregate]] = []

        def step(first: int, stop: int) -> Any:
            here = state._replace(algorithm=_part_of_state(state.algorithm, length, first, stop))
            some = [(plan, _part_of_sum(block, length, first, stop)) for plan, block in groups]
            around = context._replace(layout=_part_of_layout(context.layout, length, first, stop))
            found[:] = [core.combine(parts, here, some, scales, secret, around)]
            for value in state.algorithm.values():
                let_go(value)
            fail_point("coordinator.columns.added")
            return found[0][0].algorithm

        def mean_of(first: int, stop: int) -> Vector:
            same = parts._replace(algorithm=Evaluation(trained=parts.algorithm))  # its step changes nothing
            some = [(plan, block._replace(values=columns_of(block.values, first, stop))) for plan, block in groups]
            values: Vector = core.combine(same, state, some, scales, secret, context)[1].values
            return values

        algorithm = self._joined(length, step)
        [(after, mean)] = found
        values = Later(groups[0][1].values.shape[1:], mean_of)
        return after._replace(algorithm=algorithm), mean._replace(values=values, layout=context.layout)

    def _joined(
        self, length: int, make: Callable[[int, int], Mapping[str, Any]], params: Vector | None = None
    ) -> dict[str, Any]:
        """The state of some columns after the other as one; what is no vector is the same in all of them.

        What is given back as a view of ``params`` is ``params``.
        """
        joined: dict[str, Any] = {}
        with ExitStack() as files:
            new: dict[str, NewVector] = {}
            for first, stop in spans(length):
                for name, value in make(first, stop).items():
                    joined[name] = value
                    if params is not None and isinstance(value, np.ndarray) and np.may_share_memory(value, params):
                        joined[name] = params
                    elif _is_vector(value, stop - first):
                        if name not in new:
                            new[name] = files.enter_context(NewVector(self.folder, value.dtype))
                        new[name].add(value)
            return {**joined, **{name: vector.done() for name, vector in new.items()}}


def _num_columns(parts: Parts, state: ServerState, groups: Groups) -> int | None:
    """The length of the server's vectors; None where they are short or must be seen as wholes."""
    params = state.algorithm.get("params") if isinstance(state.algorithm, Mapping) else None
    if not _is_long_vector(params):
        return None
    methods = [parts.algorithm.server_update, parts.aggregator.reduce]
    for transform in parts.transforms:
        kind = type(transform)
        methods += [transform.decode] if getattr(kind, "decode", None) is not Transform.decode else []
        methods += [transform.release] if getattr(kind, "release", None) is not Transform.release else []
    folded = all(block.folded and block.values.shape[1] % len(params) == 0 for _, block in groups)
    return len(params) if folded and all(map(is_columnwise, methods)) else None


def _is_vector(value: Any, length: int) -> TypeGuard[Vector]:
    return isinstance(value, np.ndarray) and value.shape == (length,)


def _is_long_vector(value: Any) -> TypeGuard[Vector]:
    return isinstance(value, np.ndarray) and value.ndim == 1 and len(value) > 0 and is_long(len(value), value.itemsize)


def _part_of_state(state: Mapping[str, Any], length: int, first: int, stop: int) -> dict[str, Any]:
    return {name: value[first:stop] if _is_vector(value, length) else value for name, value in state.items()}


def _part_of_sum(block: Updates, length: int, first: int, stop: int) -> Updates:
    """Some columns of each vector that an update holds side by side (SCAFFOLD's are two)."""
    starts = range(0, block.values.shape[1], length)
    parts = [columns_of(block.values, start + first, start + stop) for start in starts]
    return block._replace(values=np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])


def _part_of_layout(layout: Layout | None, length: int, first: int, stop: int) -> Layout | None:
    """Names and roles of some columns; a tensor that is cut is flat."""
    if layout is None or layout.num_params != length:
        return layout
    here = [
        (name, (min(start + size, stop) - max(start, first),), dtype, role)
        for name, start, size, dtype, role in zip(
            layout.names, layout.offsets, layout.sizes, layout.dtypes, layout.roles, strict=True
        )
        if max(start, first) < min(start + size, stop)
    ]
    names, shapes, dtypes, roles = zip(*here, strict=True)
    return Layout(names=names, shapes=shapes, dtypes=dtypes, roles=roles)
