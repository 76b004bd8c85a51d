"""A folder of immutable files, each named by the SHA-256 of its content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from hansa.core.errors import ProtocolError
from hansa.network.messages import SHA256


class Blobs:
    """Content-addressed files: once ``put`` returns, the content survives a loss of power.

    >>> import tempfile
    >>> blobs = Blobs(Path(tempfile.mkdtemp()))
    >>> blobs.get(blobs.put(b"model"))
    b'model'
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, body: bytes) -> str:
        """Store ``body`` and return its SHA-256: temporary file, fsync, rename, fsync of the folder."""
        name = hashlib.sha256(body).hexdigest()
        path = self.folder / name
        if path.exists():
            return name
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_folder(self.folder)
        return name

    def get(self, name: str) -> bytes:
        """The content called ``name``, checked against its name.

        Raises ``KeyError`` when there is none and ``ProtocolError`` when the file on disk was changed.
        """
        path = self.path(name)
        if path is None:
            raise KeyError(name)
        body = path.read_bytes()
        if hashlib.sha256(body).hexdigest() != name:
            raise ProtocolError(f"{path}: expected content with this SHA-256, found another; the disk may be failing")
        return body

    def path(self, name: str) -> Path | None:
        """Where the content called ``name`` lies, or None; anything but a SHA-256 in hex names nothing."""
        path = self.folder / name
        return path if SHA256.fullmatch(name) and path.is_file() else None

    def drop(self, names: Collection[str]) -> None:
        """Remove some blobs."""
        for name in names:
            if (path := self.path(name)) is not None:
                path.unlink(missing_ok=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every other blob, and temporary files that a crash left behind."""
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, body: bytes, *, private: bool = False) -> None:
    """Replace ``path`` by one rename; ``private`` files can be read by their owner alone, from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mkstemp makes it 0600
    with os.fdopen(handle, "wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    if not private:
        os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    sync_folder(path.parent)
