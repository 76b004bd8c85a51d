"""A safetensors file, written and read by hand: nothing is made of a number that was not checked.

Eight bytes hold the length of the header, the header is JSON (each tensor's type, shape and place, and texts), and the
tensors lie behind it side by side. What is written is byte for byte what ``safetensors.numpy.save`` writes; what is
read may come from anybody.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from hansa.long_vectors import let_go, mapping

Buffer = bytes | bytearray | memoryview | mmap.mmap

_CODES = {  # by NumPy's name; tensors lie in a file in this order, so that each is aligned
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
DTYPES = tuple(_CODES)
_NAMES = {code: name for name, code in _CODES.items()}
_ORDER = {name: place for place, name in enumerate(DTYPES)}
_MOST_AXES = 32
_PIECE = 2**20


class Packed:
    """A file that is ready to be written: a header, and arrays that lie where they are until then.

    Arrays must be of ``DTYPES`` and must not change before the file was written.

    >>> packed = Packed({"a": np.ones(2, np.float32)}, {"tree": "{}"})
    >>> packed.size, len(bytes(packed))
    (104, 104)
    """

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]], texts: Mapping[str, str]) -> None:
        ordered = sorted(arrays.items(), key=lambda item: (_ORDER[str(item[1].dtype)], item[0]))
        header: dict[str, Any] = {"__metadata__": dict(texts)} if texts else {}
        end = 0
        for name, array in ordered:
            start, end = end, end + array.nbytes
            code = _CODES[str(array.dtype)]
            header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._arrays = [array for _, array in ordered]
        self.size = len(self._head) + end

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All bytes, at most 1 MiB at a time; an array that does not lie in order is copied for as long as it takes."""
        yield self._head
        for array in self._arrays:
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            for start in range(0, len(plain), _PIECE):
                yield plain[start : start + _PIECE].data
                let_go(plain)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces())

    @cached_property
    def sha256(self) -> str:
        """The hash of all bytes, in hex."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


def read_tensors(body: Buffer, longest_header: int) -> tuple[dict[str, str], dict[str, np.ndarray[Any, Any]]]:
    """The texts and the arrays of a file: views of a body that can be written to or is mapped, copies of another.

    Raises ``ValueError``, ``KeyError``, ``TypeError`` or ``RecursionError`` for anything malformed: a header over
    ``longest_header`` bytes; names twice; types, shapes or places that are not whole numbers of the right size;
    tensors that overlap or leave gaps. Until all of it is checked, nothing is allocated but the header's own values.
    """
    raw = np.frombuffer(body, np.uint8)
    if len(raw) < 8:
        raise ValueError(f"{len(raw)} bytes")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > len(raw) - 8:
        raise ValueError("the header is longer than the body")
    if length > longest_header:
        raise ValueError(f"a header of {length} bytes, {longest_header} may be")
    header = strict_json(raw[8 : 8 + length].tobytes().decode())
    if not isinstance(header, dict):
        raise ValueError("the header is not a mapping")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("metadata that is not texts")
    data = raw[8 + length :]
    places = {name: _place(name, entry) for name, entry in header.items()}
    _check_places([(start, stop) for _, _, start, stop in places.values()], len(data))
    return texts, {
        name: _own(data[start:stop].view(dtype).reshape(shape)) for name, (dtype, shape, start, stop) in places.items()
    }


def strict_json(text: str) -> Any:
    """The value of a JSON text; ``ValueError`` also for a name that comes twice in one mapping, and for NaN."""
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_not_json)


def _place(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """A tensor's type, shape and place (from, up to) in the data, of a size that fits."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:40]!r} without type, shape and place alone")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _NAMES:
        raise ValueError(f"tensor {name[:40]!r} of another type")
    shape, place = whole_numbers(entry["shape"]), whole_numbers(entry["data_offsets"])
    dtype = np.dtype(_NAMES[entry["dtype"]]).newbyteorder("<")
    if len(place) != 2 or place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name[:40]!r} of another size than its shape's")
    return dtype, shape, place[0], place[1]


def whole_numbers(value: Any) -> tuple[int, ...]:
    """A short list of whole numbers from 0 on, as they are in shapes."""
    if not isinstance(value, list) or len(value) > _MOST_AXES or any(type(n) is not int or n < 0 for n in value):
        raise ValueError("a list of whole numbers that is none")
    return tuple(value)


def _check_places(places: list[tuple[int, int]], size: int) -> None:
    """Side by side, from the first byte to the last."""
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise ValueError("tensors that overlap or leave gaps")
        end = stop
    if end != size:
        raise ValueError(f"tensors of {end} bytes, {size} are there")


def _own(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array itself if it can be used as any other or lies in a file, else a copy."""
    return array if (array.flags.writeable or mapping(array) is not None) and array.flags.aligned else array.copy()


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that comes twice")
    return found


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant}, which is not JSON")


__all__ = ["DTYPES", "Buffer", "Packed", "read_tensors", "strict_json", "whole_numbers"]
