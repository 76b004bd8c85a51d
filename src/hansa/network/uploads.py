"""Reports on their way in: a file each, which grows by what arrives and outlives cut lines and restarts.

A file is named by slot, client and the SHA-256 that the whole report is to have. Its length is how far the upload is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from hansa.core.protocols import Slot
from hansa.network.blobs import file_hash
from hansa.network.failpoints import fail_point
from hansa.network.messages import Refusal
from hansa.network.ranges import Part
from hansa.network.room import LEAST_FREE, check_room


class Sent(NamedTuple):
    """Which report: who sends it, in answer to what, and its SHA-256 when it is all there."""

    client: str
    slot: Slot
    sha256: str


class WrongOffset(Refusal):
    """A part that does not begin where the upload is."""

    def __init__(self, offset: int, found: int) -> None:
        self.offset = offset
        super().__init__("offset", f"report: expected a part from byte {offset} on, found one from byte {found} on")


class Uploads:
    """The reports of a run that are not all there yet, below ``folder``; those of other runs are removed.

    Several threads may ask at once.

    >>> import tempfile
    >>> uploads, sent = Uploads(Path(tempfile.mkdtemp()), "run"), Sent("berlin", Slot(0, 0, "update"), "ab" * 32)
    >>> with uploads.open(sent, Part(0, 3, 5)) as file:
    ...     file.write(b"abc")
    >>> uploads.size(sent)
    3
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder = folder / run
        self._lock, self._open, self._claimed = threading.Lock(), dict[Path, Growing](), set[Path]()
        for other in folder.iterdir() if folder.exists() else ():
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)

    def path(self, sent: Sent) -> Path:
        """Where its bytes lie; the client and the slot must be known ones."""
        return self.folder / str(sent.slot) / sent.client / sent.sha256

    def size(self, sent: Sent) -> int:
        """How many of its bytes are there."""
        try:
            return self.path(sent).stat().st_size
        except FileNotFoundError:
            return 0

    def open(self, sent: Sent, part: Part) -> Growing:
        """The file to which the bytes of ``part`` are to be written; a file that was open for this report is closed.

        A part that is the whole report may begin before the end of what is there. Of each client and slot one report is
        kept: the newest. Raises ``WrongOffset``, ``Refusal`` while it is ``claimed``, and ``OSError`` when the disk is
        too full for the rest.
        """
        path = self.path(sent)
        with self._lock:
            self._check_free(path)
            self._close(path)
            size = self.size(sent)
            if size > part.total:  # of another length than was said before: one of the two is wrong
                path.unlink()
                size = 0
            if not (part.is_whole or part.first == size):
                raise WrongOffset(size, part.first)
            self._check_room(part.total - size)
            path.parent.mkdir(parents=True, exist_ok=True)
            for other in path.parent.iterdir():
                if other != path:
                    self._close(other)
                    other.unlink()
            self._open[path] = made = Growing(path, skip=size - part.first)
            return made

    def is_open(self, sent: Sent) -> bool:
        """Whether a request is adding to a report."""
        file = self._open.get(self.path(sent))
        return file is not None and not file.is_closed

    def close(self, sent: Sent) -> int:
        """How many bytes of a report are there; a request that was adding to it adds no more."""
        with self._lock:
            self._close(self.path(sent))
            return self.size(sent)

    @contextlib.contextmanager
    def claimed(self, sent: Sent) -> Iterator[None]:
        """Until the end of the block nothing is added to a report, and nobody else claims it (``Refusal``)."""
        path = self.path(sent)
        with self._lock:
            self._check_free(path)
            self._close(path)
            self._claimed.add(path)
        try:
            yield
        finally:
            with self._lock:
                self._claimed.remove(path)

    def hash(self, sent: Sent) -> str:
        """The SHA-256 of what is there of a report, which is on the disk from here on; empty if nothing is there."""
        try:
            with self.path(sent).open("rb") as file:
                os.fsync(file.fileno())
            return file_hash(self.path(sent))
        except FileNotFoundError:
            return ""

    def forget(self, sent: Sent) -> None:
        """Remove what is there of a report."""
        with self._lock:
            self._close(self.path(sent))
            self.path(sent).unlink(missing_ok=True)

    def keep_only(self, slots: Collection[str]) -> None:
        """Remove what was sent in answer to other slots."""
        with self._lock:
            for folder in self.folder.iterdir() if self.folder.exists() else ():
                if folder.name not in slots:
                    for path in [path for path in self._open if path.is_relative_to(folder)]:
                        self._close(path)
                    shutil.rmtree(folder, ignore_errors=True)

    def _close(self, path: Path) -> None:
        if path in self._open:
            self._open.pop(path).close()

    def _check_free(self, path: Path) -> None:
        """Raise ``Refusal`` while another request has claimed a report of this client for this slot."""
        if any(claimed.parent == path.parent for claimed in self._claimed):
            raise Refusal("offset", "report: expected one request at a time for it, found that it is being looked at")

    def _check_room(self, size: int) -> None:
        """Raise ``OSError`` when the disk has no room for so many bytes more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, size + LEAST_FREE, f"{size} bytes of a report")


class Growing:
    """One report's file, open to be added to. Once closed it takes no more: somebody else goes on with it."""

    def __init__(self, path: Path, skip: int) -> None:
        self._file = path.open("ab", buffering=0)  # nothing is held back: what arrived is there after a crash of ours
        self.size, self._skip, self._lock = self._file.tell(), skip, threading.Lock()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more."""
        return self._file.closed

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, piece: bytes) -> None:
        """Add bytes, less those that are there already. Raises ``OSError`` when the disk is full."""
        with self._lock:
            if self._file.closed:
                raise Refusal("offset", "report: expected one request at a time for it, found a newer one that goes on")
            rest = memoryview(piece)[self._skip :]
            self._skip -= len(piece) - len(rest)
            while rest:
                written = self._file.write(rest)
                self.size += written
                rest = rest[written:]
        fail_point("coordinator.upload.grown")

    def close(self) -> None:
        """Let go of the file; what was written stays."""
        with self._lock:
            self._file.close()
