"""What a body holds: trees of arrays, numbers and names, and nothing else.

A body is one safetensors file: arrays are its tensors, and the tree that holds them is JSON in its metadata. Nothing
in it names a class, a module or a path, so that reading one can only ever give dictionaries, lists, numbers, text,
bytes and arrays.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hansa.core.errors import ProtocolError
from hansa.core.protocols import Codec, Plan, Report, Slot, Updates
from hansa.tensors import DTYPES, Buffer, Packed, read_tensors, strict_json, whole_numbers

_MALFORMED = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)  # of a tree of another form
_DEPTH = 32
_LONGEST_HEADER = 2**22  # names, numbers and texts of one body
_LONGEST_SUM = 2**24  # numbers in a row of sums whose length the plan does not say


def pack(tree: Any) -> bytes:
    """One body. Raises ``TypeError`` for anything but trees of arrays, numbers, names, bytes and None.

    >>> unpack(pack({"round": 3, "values": np.ones(2, np.float32)}))["values"]
    array([1., 1.], dtype=float32)
    """
    return bytes(lay_out(tree))


def lay_out(tree: Any) -> Packed:
    """The same body, ready to be written piece by piece: its arrays are not copied.

    >>> packed = lay_out({"values": np.ones(3)})
    >>> bytes(packed) == pack({"values": np.ones(3)})
    True
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    skeleton = json.dumps(_flatten(tree, arrays), separators=(",", ":"), allow_nan=False)  # mappings keep their order
    return Packed(arrays, {"tree": skeleton})


def unpack(body: Buffer, *, longest_header: int = _LONGEST_HEADER) -> Any:
    """The tree in a body. Raises ``ProtocolError`` for anything malformed; no class is ever looked up.

    Arrays are views of ``body`` where it can be written to or is a mapped file, and copies where not. A body whose
    names, numbers and texts are longer than ``longest_header`` bytes is malformed.
    """
    try:
        texts, arrays = read_tensors(body, longest_header)
        tree = _rebuild(strict_json(texts["tree"]), arrays, 0)
        if len(texts) > 1 or arrays:
            raise ValueError("more texts or tensors than the tree names")
        return tree
    except (*_MALFORMED, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ProtocolError(f"body: expected a safetensors body of hansa, found {found[:300]}") from error


def pack_report(report: Report, codec: Codec) -> bytes:
    """The body of one client's report."""
    return pack(report_tree(report, codec))


def report_tree(report: Report, codec: Codec) -> dict[str, Any]:
    """What one client's report holds; the client's name is not in it: its certificate says who it is."""
    payload = report.payload
    if not report.clients:  # refused: there is no row to pack
        content: Any = {"mail": None}
    elif isinstance(payload, Updates):
        arrays = dict(codec.pack(payload))
        content = {"updates": {"arrays": arrays, "weights": payload.weights, "tail": dict(payload.tail)}}
    else:
        content = {"mail": payload.get(report.clients[0])}
    return {**content, "refused": next(iter(report.refused.values()), None)}


def unpack_report(body: Buffer, slot: Slot, client: str, codec: Codec, num_params: int | None) -> Report:
    """One client's report. ``num_params`` is the length that an update must have, None where it is not known before.

    Raises ``ProtocolError`` when shapes, names or types are not those of a report.
    """
    tree = unpack(body)
    if not isinstance(tree, dict) or not set(tree) <= {"updates", "mail", "refused"}:
        raise ProtocolError("report: expected updates or mail, and refused; found other fields")
    if tree.get("refused") is not None:
        return Report(slot, (), {}, {client: str(tree["refused"])[:500]})
    if "updates" not in tree:
        return Report(slot, (client,), {client: tree.get("mail")})
    return Report(slot, (client,), _updates(tree["updates"], client, codec, num_params))


def _updates(tree: Any, client: str, codec: Codec, num_params: int | None) -> Updates:
    """The one-row block of a report, checked shape by shape."""
    try:
        if set(tree) != {"arrays", "weights", "tail"}:
            raise ValueError("other fields than arrays, weights and tail")
        arrays, weights, tail = _Read(tree["arrays"]), tree["weights"], dict(tree["tail"])
        length = num_params if num_params is not None or "values" not in arrays else arrays["values"].shape[1]
        values, side = codec.unpack(arrays, length)
        if arrays.unread - {f"side.{name}" for name in side}:
            raise ValueError("arrays that are not the codec's")
        columns = [weights, *tail.values(), *side.values()]
        if values.ndim != 2 or len(values) != 1 or (num_params is not None and values.shape[1] != num_params):
            raise ValueError(f"values of shape {values.shape}, expected (1, {num_params})")
        if any(getattr(c, "shape", None) != (1,) for c in columns):
            raise ValueError("a column that is not of shape (1,)")
    except _MALFORMED as error:
        raise ProtocolError(f"report of {client}: expected one row of updates, found {error}") from error
    return Updates((client,), values, weights, tail, side)


class _Read(dict[str, Any]):
    """Arrays by name, and the names that nobody has looked at."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        super().__init__(arrays)
        self.unread = set(arrays)

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return super().__getitem__(name)


class Nonzeros:
    """Packs one row of sums, most of them zero (histograms, say), by position where that is shorter."""

    def pack(self, updates: Updates) -> Mapping[str, Any]:
        """The row as it is, or the places and values of what is not zero and its length."""
        values = np.asarray(updates.values)
        where = np.flatnonzero(values[0])
        if len(values) > 1 or 2 * len(where) > values.shape[1]:
            return {"values": values}
        return {"places": where.astype(np.uint32), "nonzero": values[0, where], "length": values.shape[1]}

    def unpack(self, arrays: Mapping[str, Any], num_params: int | None) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
        """The row again. ``ValueError`` where places lie outside or a length is not the one expected."""
        if "values" in arrays:
            return np.asarray(arrays["values"]), {}
        where, length = np.asarray(arrays["places"]), int(arrays["length"])
        if (num_params is not None and length != num_params) or not 0 <= length <= _LONGEST_SUM:
            raise ValueError(f"a sum of {length} numbers, expected {num_params}")
        if where.dtype != np.uint32 or (np.diff(where.astype(np.int64)) <= 0).any():
            raise ValueError("places that are not whole numbers, repeat or fall")
        row = np.zeros((1, length))
        row[0, where] = np.asarray(arrays["nonzero"], dtype=np.float64)
        return row, {}

    def row_bytes(self, num_params: int) -> int:
        """A float64 a number; fewer where most are zero."""
        return 8 * num_params


def plan_parts(plan: Plan, client: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one client is sent: a small tree, and its broadcast vectors (which travel as blobs of their own)."""
    small = {
        "slot": list(plan.slot),
        "learn": plan.learn,
        "settings": list(plan.settings),
        "key": plan.key.material,
        "variant": plan.variants.get(client),
        "mail": plan.mail.get(client),
    }
    return small, dict(plan.broadcast)


def _flatten(tree: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """JSON for a tree; arrays go to ``arrays`` and leave their name behind."""
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"#f": str(tree)}
    if isinstance(tree, np.generic):
        return _flatten(tree.item(), arrays)
    if isinstance(tree, bytes):
        return {"#b": base64.b64encode(tree).decode()}
    if isinstance(tree, np.ndarray):
        if str(tree.dtype) not in DTYPES:
            raise TypeError(f"body: expected an array of {DTYPES}, found {tree.dtype}")
        name = str(len(arrays))
        arrays[name] = tree if tree.ndim else tree.reshape(1)
        return {"#a": name, "s": list(tree.shape)}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) for key in tree):
            raise TypeError("body: expected mappings with text keys")
        return {"#m": {key: _flatten(value, arrays) for key, value in tree.items()}}
    if isinstance(tree, Sequence):
        return [_flatten(value, arrays) for value in tree]
    if hasattr(tree, "detach"):
        return _flatten(tree.detach().cpu().numpy(), arrays)
    raise TypeError(f"body: expected arrays, numbers and names, found {type(tree).__name__}")


def _rebuild(skeleton: Any, arrays: dict[str, np.ndarray[Any, Any]], depth: int) -> Any:
    """The tree of a skeleton; takes each array out of ``arrays``, shaped as the sender said and as its bytes allow."""
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(skeleton, list):
        return [_rebuild(value, arrays, depth + 1) for value in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if "#m" in skeleton:
        return {str(key): _rebuild(value, arrays, depth + 1) for key, value in skeleton["#m"].items()}
    if "#b" in skeleton:
        return base64.b64decode(skeleton["#b"], validate=True)
    if "#f" in skeleton:
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[skeleton["#f"]]
    return arrays.pop(skeleton["#a"]).reshape(whole_numbers(skeleton["s"]))
