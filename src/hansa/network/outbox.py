"""Reports that wait to leave: a short one in memory and in the client's database, a long one in a file of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from hansa.core.errors import RunError
from hansa.network.blobs import SMALL, cut, file_hash, read_pieces, sync_folder, write_new
from hansa.network.failpoints import fail_point
from hansa.tensors import Packed


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A report as it is to be sent: ``body`` when it is short, else ``path``.

    >>> parcel = Parcel.of(b"report")
    >>> parcel.size, b"".join(parcel.stretch(2, 4))
    (6, b'po')
    """

    sha256: str
    size: int
    body: bytes = b""
    path: Path | None = None

    @staticmethod
    def of(body: bytes) -> Parcel:
        """A report in memory."""
        return Parcel(sha256=hashlib.sha256(body).hexdigest(), size=len(body), body=body)

    def stretch(self, first: int, stop: int) -> Stretch:
        """The bytes from ``first`` up to ``stop``, which may be gone through any number of times."""
        return Stretch(self, first, stop)

    def check(self) -> None:
        """Raise ``RunError`` when the file is not what was written."""
        if self.path is not None and not (self.path.exists() and file_hash(self.path) == self.sha256):
            raise RunError(
                f"{self.path}: expected the report that was written there, found other bytes; the disk may be failing. "
                "Remove the file and join again: the report is made anew"
            )


@dataclass(frozen=True)
class Stretch:
    """Some bytes of a parcel."""

    parcel: Parcel
    first: int
    stop: int

    def __iter__(self) -> Iterator[bytes]:
        if self.parcel.path is None:
            yield from (self.parcel.body[start:end] for start, end in cut(self.first, self.stop))
            return
        left = self.stop - self.first
        for piece in read_pieces(self.parcel.path, self.first, self.stop):
            left -= len(piece)
            yield piece
        if left:
            self.parcel.check()


class Outbox:
    """The files of long reports, each named by its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, packed: Packed) -> Parcel:
        """A report that is ready to be sent; a long one survives a loss of power from here on."""
        if packed.size <= SMALL:
            return Parcel.of(bytes(packed))
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary, sha256 = write_new(self.folder, packed.pieces())
        os.replace(temporary, self.folder / sha256)
        sync_folder(self.folder)
        fail_point("client.parcel.kept")
        return Parcel(sha256=sha256, size=packed.size, path=self.folder / sha256)

    def find(self, sha256: str) -> Parcel | None:
        """The report in a file, or None when it is not there or was damaged."""
        path = self.folder / sha256
        if not path.is_file() or file_hash(path) != sha256:
            return None
        return Parcel(sha256=sha256, size=path.stat().st_size, path=path)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every other file, and what a crash left."""
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.name not in names:
                path.unlink(missing_ok=True)


__all__ = ["Outbox", "Parcel", "Stretch"]
