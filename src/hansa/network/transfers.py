"""What is too long for one request: an upload that goes on where the server is, a download where the client is.

Each ``go_on`` is one try. It raises ``Unreachable`` when the line was cut, with ``moved`` when bytes had gone over, and
is then called again; nothing that arrived is sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import httpx2 as httpx

from hansa.core.errors import ProtocolError, RunError
from hansa.long_vectors import map_file
from hansa.network.blobs import SMALL, file_hash
from hansa.network.calls import Answer, Line, Unreachable
from hansa.network.failpoints import fail_point
from hansa.network.messages import Refusal
from hansa.network.outbox import Parcel, Stretch
from hansa.network.ranges import Part, read_content_range, read_length
from hansa.tensors import Buffer

_LONGEST_PART = 2**25  # bytes of an upload in one request: between two of them the server can say that it is late
_PART = ".part"


class Upload:
    """One report on its way to the server. A short one goes out whole; what the server lacks then goes in parts."""

    def __init__(self, line: Line, path: str, parcel: Parcel) -> None:
        self._line, self._path, self._parcel = line, path, parcel
        self._is_first = parcel.path is None  # and may go out whole
        self._offset = 0 if self._is_first else None  # None: the server is to be asked
        self._reached, self._was_wrong = 0, False

    def go_on(self) -> bytes:
        """Send what the server does not have: the receipt's body. Raises ``Refusal`` when it wants none of it."""
        before = self._reached
        try:
            while (answer := self._send()).status != httpx.codes.OK:
                self._advance(answer)
            return answer.body
        except Unreachable as error:
            self._offset = None
            raise Unreachable(str(error), moved=self._reached > before) from error

    def _send(self) -> Answer:
        """One request: the next part, or the question how far the server is."""
        total, first = self._parcel.size, self._offset
        part = Part(0, 0, total) if first is None else Part(first, min(first + _LONGEST_PART, total), total)
        content: bytes | Stretch = b"" if part.stop == part.first else self._parcel.stretch(part.first, part.stop)
        headers = {"Content-Length": str(part.stop - part.first)}  # else httpx sends a body of any length
        if self._is_first and part.is_whole:
            content, headers = self._parcel.body, {}
        else:
            headers["Content-Range"] = part.content_range
        self._is_first = False
        try:
            return self._line.call("PUT", self._path, content=content, headers=headers)
        except Refusal as error:
            if error.code == "offset":
                raise Unreachable("the server is at another place of the report") from error
            if error.code == "digest" and not self._was_wrong:  # damaged on the server's disk, or on ours
                self._parcel.check()
                self._was_wrong = True
                raise Unreachable(str(error)) from error
            raise

    def _advance(self, answer: Answer) -> None:
        """Take the server's word for how far it is."""
        told = answer.headers.get("Upload-Offset", "")
        offset = int(told) if told.isdecimal() and len(told) < 16 else -1
        if not (0 if self._offset is None else self._offset + 1) <= offset <= self._parcel.size:
            raise Unreachable(f"the server does not get on with the report, of which it has {told[:16] or 'no'} bytes")
        self._offset, self._reached = offset, max(offset, self._reached)


class Vectors:
    """The vectors that a client holds: short ones in memory, long ones in files that a restart finds again."""

    def __init__(self, line: Callable[[], Line], folder: Path) -> None:
        self._line, self._folder = line, folder  # the line is another one after the client's certificate was renewed
        self._held: dict[str, bytes | Path] = {}

    def get(self, sha256: str) -> Buffer | None:
        """A vector's body, if it is here; a long one is mapped."""
        held, path = self._held.get(sha256), self._folder / sha256
        if held is None and path.is_file() and file_hash(path) == sha256:
            held = self._held[sha256] = path
        return map_file(held) if isinstance(held, Path) else held

    def fetch(self, sha256: str) -> Callable[[], None]:
        """One try after another to bring a vector here; after the first that does not raise it can be had."""
        download = Download(self._line(), sha256, self._folder)

        def go_on() -> None:
            self._held[sha256] = download.go_on()

        return go_on

    def keep_only(self, wanted: Collection[str]) -> None:
        """Let go of other vectors, and of what is here of them."""
        self._held = {sha256: body for sha256, body in self._held.items() if sha256 in wanted}
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if path.name.removesuffix(_PART) not in wanted:
                path.unlink(missing_ok=True)


class Download:
    """One vector on its way here: in memory when it is short, else in a file that grows."""

    def __init__(self, line: Line, sha256: str, folder: Path) -> None:
        self._line, self._sha256, self._folder = line, sha256, folder
        self._path, self._short = folder / f"{sha256}{_PART}", bytearray()
        self._may_be_damaged = self._path.exists()  # some of it is from before a restart
        self._moved = False

    def go_on(self) -> bytes | Path:
        """Fetch what is missing: the body or the file, which has the right SHA-256."""
        have, self._moved = self._size(), False
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{self._sha256}"'} if have else {}
        try:
            with self._line.open("GET", f"/v1/blobs/{self._sha256}", headers=headers) as answer:
                self._receive(answer, _place(answer, have))
        except Unreachable as error:
            raise Unreachable(str(error), moved=self._moved) from error
        except Refusal as error:
            if error.code != "range":  # else there is nothing behind what is here
                raise
        return self._checked()

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else len(self._short)

    def _receive(self, answer: httpx.Response, part: Part) -> None:
        """Keep each piece as it comes."""
        if part.total <= SMALL:
            del self._short[part.first :]
            for piece in _pieces(answer, part):
                self._short += piece
                self._moved = True
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._path.open("ab" if part.first else "wb") as file:
            for piece in _pieces(answer, part):
                file.write(piece)
                self._moved = True
                fail_point("client.download.grown")

    def _checked(self) -> bytes | Path:
        """All of it, if it is what was asked for."""
        in_file = self._path.exists()
        found = file_hash(self._path) if in_file else hashlib.sha256(self._short).hexdigest()
        if found == self._sha256 and in_file:
            fail_point("client.download.whole")
            return self._path.rename(self._folder / self._sha256)
        if found == self._sha256:
            return bytes(self._short)
        self._path.unlink(missing_ok=True)
        self._short.clear()
        if self._may_be_damaged:
            self._may_be_damaged = False
            raise Unreachable("what was here of a vector was damaged; it is fetched anew")
        raise ProtocolError(
            f"blob: expected content with SHA-256 {self._sha256[:16]}..., found another; do not trust this server"
        )


def _pieces(answer: httpx.Response, part: Part) -> Iterator[bytes]:
    """An answer's body, which must not be longer than the part that it said to be."""
    left = part.stop - part.first
    for piece in answer.iter_raw():
        left -= len(piece)
        if left < 0:
            raise ProtocolError(f"blob: expected {part.content_range}, found more bytes; do not trust this server")
        yield piece


def _place(answer: httpx.Response, have: int) -> Part:
    """Which bytes of a vector an answer brings: those from ``have`` on, or all of them."""
    try:
        if answer.status_code == httpx.codes.PARTIAL_CONTENT:
            part = read_content_range(answer.headers.get("Content-Range", ""))
        else:
            size = read_length(answer.headers.get("Content-Length"), answer.headers.get("Transfer-Encoding"))
            part = Part(0, size, size)
    except Refusal as error:
        raise RunError(f"blob: expected an answer of known length, found one without; {error}") from error
    if part.first not in (0, have) or part.stop != part.total:
        raise RunError(f"blob: expected the bytes from {have} on, found those of {part.content_range}")
    return part
