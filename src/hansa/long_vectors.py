"""Long vectors lie in files, and are worked on some columns at a time: none has to be in memory as a whole.

What is read of a file counts as this process's memory until it is let go. A method that is ``columnwise`` may be given
some columns of its vectors at a time, to the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

LONG = 2**26  # bytes from which on a vector is a long one
_WIDTH = 2**18  # columns at a time

Method = TypeVar("Method", bound=Callable[..., Any])


# ------------------------------------------------------------------------------------------------- what lies in files


def map_file(path: Path, *, writable: bool = True) -> memoryview:
    """A file, which must not be empty, as memory; what is written to it is this process's own and changes no file."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if writable else mmap.ACCESS_READ))


def let_go(held: Any) -> None:
    """Free the memory that a mapped file takes up; it is read again where it is looked at.

    What was written to it is lost, hence nothing happens to an array that can be written to.
    """
    if isinstance(held, Later):
        for source in held.sources:
            let_go(source)
        return
    found, may_be_changed = mapping(held), isinstance(held, np.ndarray) and held.flags.writeable
    if found is not None and not may_be_changed and hasattr(mmap, "MADV_DONTNEED"):
        found.madvise(mmap.MADV_DONTNEED)


def keep_as_read(values: Any) -> None:
    """Let nobody write to an array, or to what ``Later`` reads, so that it can be let go."""
    for array in values.sources if isinstance(values, Later) else (values,):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False


def mapping(held: Any) -> mmap.mmap | None:
    """The mapped file that an array or a ``memoryview`` lies in, or None."""
    while isinstance(held, np.ndarray):
        held = held.base
    held = held.obj if isinstance(held, memoryview) else held
    return held if isinstance(held, mmap.mmap) else None


def is_long(num_values: int, itemsize: int = 4) -> bool:
    """Whether a vector is a long one."""
    return num_values * itemsize >= LONG


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library keeps it for later (glibc's does)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class NewVector:
    """A vector that is written from the first value to the last, into a file without a name: a crash leaves nothing.

    >>> with NewVector(Path(tempfile.gettempdir()), np.dtype(np.float32)) as vector:
    ...     vector.add(np.ones(2, np.float32))
    ...     vector.add(np.zeros(1, np.float32))
    ...     print(vector.done())
    [1. 1. 0.]
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._dtype = tempfile.TemporaryFile(dir=folder, buffering=0), dtype  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> NewVector:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Add values at the end. Raises ``OSError`` when the disk is full."""
        rest = np.ascontiguousarray(values, self._dtype).data.cast("B")
        while rest:
            rest = rest[self._file.write(rest) :]

    def done(self) -> np.ndarray[Any, Any]:
        """The whole vector, mapped, read-only; there must be a value."""
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), self._dtype)


# ---------------------------------------------------------------------------------------------------- columns at a time


def columnwise(given: Callable[[Any], bool] = lambda _owner: True) -> Callable[[Method], Method]:
    """Mark a method whose results have in each column what follows from that column of its arguments alone.

    ``given(owner)`` says on what that depends (another method, say). One that overrides it is not marked by that.

    >>> class Mean:
    ...     @columnwise()
    ...     def reduce(self): ...
    >>> class Median(Mean):
    ...     def reduce(self): ...
    >>> is_columnwise(Mean().reduce), is_columnwise(Median().reduce)
    (True, False)
    """

    def mark(method: Method) -> Method:
        method.columnwise = given  # type: ignore[attr-defined]  # functions take any attribute
        return method

    return mark


def is_columnwise(method: Any) -> bool:
    """Whether a bound method is marked so."""
    given = getattr(method, "columnwise", None)
    return given is not None and bool(given(method.__self__))


def spans(num_columns: int, width: int | None = None, first: int = 0) -> Iterator[tuple[int, int]]:
    """Places from ``first`` up to ``num_columns``, side by side.

    >>> list(spans(5, width=2))
    [(0, 2), (2, 4), (4, 5)]
    """
    width = width or _WIDTH
    for start in range(first, num_columns, width):
        yield start, min(start + width, num_columns)


class Later(NDArrayOperatorsMixin):
    """An array (..., num_columns) of which some columns are made when they are asked for.

    Whoever asks for anything but ``columns`` is given all of it, in memory. ``sources`` are what columns are read from.

    >>> squares = Later((1, 4), lambda first, stop: np.arange(first, stop)[None] ** 2.0)
    >>> squares.columns(2, 4).tolist(), (squares + 1).tolist(), squares[0].sum().item()
    ([[4.0, 9.0]], [[1.0, 2.0, 5.0, 10.0]], 14.0)
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        columns: Callable[[int, int], np.ndarray[Any, Any]],
        dtype: Any = np.float64,
        sources: Sequence[np.ndarray[Any, Any]] = (),
    ) -> None:
        self.shape, self.ndim, self.columns = shape, len(shape), columns
        self.dtype, self.sources = np.dtype(dtype), tuple(sources)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        whole = np.empty(self.shape, self.dtype)
        for first, stop in spans(self.shape[-1]):
            whole[..., first:stop] = self.columns(first, stop)
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        if any(isinstance(out, Later) for out in options.get("out", ())):
            del options["out"]  # whoever adds to it in place gets a new array
        return getattr(ufunc, method)(*(np.asarray(i) if isinstance(i, Later) else i for i in inputs), **options)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


def columns_of(values: Any, first: int, stop: int) -> Any:
    """Some columns of any array (..., num_columns)."""
    return values.columns(first, stop) if isinstance(values, Later) else values[..., first:stop]
