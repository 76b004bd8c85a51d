"""A folder of immutable files, each named by the SHA-256 of its content; and how files are written and read here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator
from io import RawIOBase
from pathlib import Path

from hansa.core.errors import ProtocolError
from hansa.long_vectors import map_file
from hansa.network.failpoints import fail_point
from hansa.network.messages import SHA256
from hansa.tensors import Buffer, Packed

SMALL = 2**20  # bytes that are held in memory and travel in one piece; what is longer lies in a file
_LOG = logging.getLogger("hansa")
_READ = 2**16  # bytes from which on a blob is mapped, as thousands of them may be looked at together
_FIRST_PIECE, _PIECE = 2**12, 2**18


class Blobs:
    """Content-addressed files: once ``put`` returns, the content survives a loss of power.

    >>> import tempfile
    >>> blobs = Blobs(Path(tempfile.mkdtemp()))
    >>> blobs.get(blobs.put(b"model"))
    b'model'
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._good: set[str] = set()  # looked at since this process began
        self._quiet, self._num_storing, self._sweeping = threading.Condition(), 0, False
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, body: bytes | Packed | Path) -> str:
        """Store a body and return its SHA-256: temporary file, fsync, rename, fsync of the folder.

        A file, of the same disk and already named by its SHA-256, is moved here. What was damaged on disk is replaced.
        Raises ``OSError`` when the disk is full; then nothing is left behind.
        """
        if isinstance(body, Path):
            return self._take(body)
        name = body.sha256 if isinstance(body, Packed) else hashlib.sha256(body).hexdigest()
        if not self._is_good(name):
            temporary, _ = write_new(self.folder, _pieces(body))
            fail_point("coordinator.blob.synced")
            self._name(temporary, name)
        return name

    def _take(self, path: Path) -> str:
        if self._is_good(path.name):
            path.unlink()
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            self._name(path, path.name)
        return path.name

    def get(self, name: str) -> bytes | memoryview:
        """The content called ``name``, checked against its name; a long one is mapped, not read into memory.

        Raises ``KeyError`` when there is none and ``ProtocolError`` when the file on disk was changed.
        """
        path = self.path(name)
        if path is None:
            raise KeyError(name)
        if file_hash(path) != name:
            raise ProtocolError(f"{path}: expected content with this SHA-256, found another; the disk may be failing")
        if path.stat().st_size > _READ:
            with contextlib.suppress(OSError):  # as many files are open, or mapped, as may be
                return map_file(path)
        return path.read_bytes()

    def path(self, name: str) -> Path | None:
        """Where the content called ``name`` lies, or None; anything but a SHA-256 in hex names nothing."""
        path = self.folder / name
        return path if SHA256.fullmatch(name) and path.is_file() else None

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Until the end of the block nothing is removed: time to write the row that names what was put."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._sweeping)
            self._num_storing += 1
        try:
            yield
        finally:
            with self._quiet:
                self._num_storing -= 1
                self._quiet.notify_all()

    @contextlib.contextmanager
    def sweeping(self) -> Iterator[None]:
        """Until the end of the block nobody is ``storing``: time to ask for all rows, and to ``keep_only`` theirs."""
        with self._quiet:
            self._sweeping = True
            self._quiet.wait_for(lambda: self._num_storing == 0)
        try:
            yield
        finally:
            with self._quiet:
                self._sweeping = False
                self._quiet.notify_all()

    def drop(self, names: Collection[str]) -> None:
        """Remove some blobs."""
        for name in names:
            if (path := self.path(name)) is not None:
                path.unlink(missing_ok=True)

    def drop_damaged(self) -> None:
        """Remove what is not what its name says, so that nobody is sent it; whoever stored it may do so again."""
        for path in self.folder.iterdir():
            if self.path(path.name) is not None and not self._is_good(path.name):
                path.unlink(missing_ok=True)
                _LOG.error("%s: expected content with this SHA-256, found another; the disk may be failing", path)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every other blob, and temporary files that a crash left behind."""
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)
        self._good &= set(names)

    def _is_good(self, name: str) -> bool:
        """Whether the content is there; a file from before this process is looked at, once."""
        path = self.path(name)
        if path is None or (name not in self._good and file_hash(path) != name):
            return False
        if name not in self._good:
            sync_folder(self.folder)  # whoever named it may have been killed before
            self._good.add(name)
        return True

    def _name(self, path: Path, name: str) -> None:
        os.replace(path, self.folder / name)
        fail_point("coordinator.blob.renamed")
        sync_folder(self.folder)
        fail_point("coordinator.blob.durable")
        self._good.add(name)


def write_new(folder: Path, pieces: Iterable[Buffer], prefix: str = ".new-") -> tuple[Path, str]:
    """A new file in ``folder`` that holds all pieces and is on the disk, and its SHA-256. Fails without a trace."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=prefix)  # its owner's alone
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
            file.flush()
            fail_point("file.filled")
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return Path(temporary), digest.hexdigest()


def write_file(path: Path, body: bytes | Packed, *, private: bool = False) -> None:
    """Replace ``path`` by one rename; ``private`` files can be read by their owner alone, from the first byte on."""
    write_all(path, _pieces(body), private=private)


def write_all(path: Path, pieces: Iterable[Buffer], *, private: bool = False) -> None:
    """``write_file``, of pieces that are never in memory together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".new-{path.name}-"
    for left in path.parent.glob(f"{prefix}*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    temporary, _ = write_new(path.parent, pieces, prefix)
    if not private:
        os.chmod(temporary, 0o644)
    fail_point("file.written")
    os.replace(temporary, path)
    sync_folder(path.parent)


def _pieces(body: bytes | Packed) -> Iterable[Buffer]:
    return body.pieces() if isinstance(body, Packed) else (body,)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cut(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Places from ``first`` up to ``stop``, side by side: small at first, so that a line that is often cut gets on.

    (What is sent at once travels in TLS records of its own, and of a record that was cut nothing arrives.)

    >>> list(cut(100, 10_000))
    [(100, 4196), (4196, 9316), (9316, 10000)]
    """
    size = _FIRST_PIECE
    while first < stop:
        yield first, min(first + size, stop)
        first, size = first + size, min(size + _FIRST_PIECE // 4, _PIECE)


def at_hand(file: RawIOBase, first: int, size: int) -> bytes | None:
    """What the system has in memory of ``size`` bytes of a file from ``first`` on, without waiting for the disk.

    None where it has nothing, or cannot tell: all but Linux, and some of its file systems.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    piece = bytearray(size)
    try:
        found = os.preadv(file.fileno(), [piece], first, os.RWF_NOWAIT)
    except OSError:
        return None
    return bytes(memoryview(piece)[:found]) or None


def read_pieces(path: Path, first: int, stop: int) -> Iterator[bytes]:
    """The bytes of a file from ``first`` up to ``stop``, ``cut``; fewer where the file ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(first)
        for start, end in cut(first, stop):
            yield file.read(end - start)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, read piece by piece, in hex."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()
