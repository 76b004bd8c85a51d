"""A TCP proxy that treats a connection as bad networks do: slow, late, cut, garbled, refused or silent.

    with FaultProxy(port, Faults(bytes_per_s=8000, cut=At(way="up", after=20_000))) as proxy:
        ...  # call 127.0.0.1:proxy.port instead
        proxy.set(Faults())  # the network heals

"up" is from whoever calls to the server, "down" the other way. Bytes are passed on unread: TLS ends at the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["up", "down"]
_WAYS: tuple[Way, Way] = ("up", "down")
_PIECE = 65536
_SMALL_BUFFER = 16384  # of the kernel, so that who sends soon feels that the line is slow


@dataclass(frozen=True, kw_only=True)
class At:
    """After how many bytes of a connection something happens, and to how many connections (None: to each)."""

    way: Way
    after: int
    times: int | None = None


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with the line. ``bytes_per_s`` is shared by all connections, each way by itself.

    ``silent`` ways hold what they are given until the line heals, as TCP does when packets are lost.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    cut: At | None = None
    corrupt: At | None = None
    refuse: bool = False
    silent: tuple[Way, ...] = ()


class FaultProxy:
    """A proxy in a thread of its own; ``port`` is where it listens, ``counts`` what it did so far."""

    def __init__(self, target: int, faults: Faults | None = None, *, port: int = 0) -> None:
        self.target, self.port, self.counts = target, port, Counter[str]()
        self._faults, self._free_at = faults or Faults(), dict.fromkeys(_WAYS, 0.0)
        self._loop = asyncio.new_event_loop()
        self._changed: asyncio.Event | None = None
        self._lines: set[Any] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        """What a client calls."""
        return f"https://127.0.0.1:{self.port}"

    def set(self, faults: Faults) -> None:
        """From now on the line is like this, for open connections too."""
        self._call(self._set(faults))

    def cut(self) -> None:
        """Cut every connection now."""
        self._call(self._abort())

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _open(self) -> None:
        self._changed = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        self.port = listener.getsockname()[1]
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def _close(self) -> None:
        self._server.close()
        await self._abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _set(self, faults: Faults) -> None:
        assert self._changed is not None
        self._faults = faults
        self._changed.set()
        self._changed = asyncio.Event()

    async def _abort(self) -> None:
        for writer in list(self._lines):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; a proxy that is closed ends it."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._join(reader, writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Two ways, until either end or a fault ends them."""
        self.counts["connections"] += 1
        if self._faults.refuse:
            self.counts["refused"] += 1
            writer.transport.abort()
            return
        try:
            there, on = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, on}
        self._lines |= both
        pumps = [
            asyncio.create_task(self._pump("up", reader, on)),
            asyncio.create_task(self._pump("down", there, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in both:
                end.close()  # what was passed on arrives, then the line is gone
            self._lines -= both

    async def _pump(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way of a connection, until its end has been passed on or a fault cuts it."""
        queue: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(64)
        taking = asyncio.create_task(self._take(reader, queue))
        try:
            await self._pass_on(way, queue, writer)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, queue: Any) -> None:
        """Read what comes, and note when it may be passed on."""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(self._piece()):
                await queue.put((self._loop.time() + self._faults.latency_s, piece))
        await queue.put(None)

    async def _pass_on(self, way: Way, queue: Any, writer: asyncio.StreamWriter) -> None:
        passed, struck = 0, set[At]()
        while (given := await queue.get()) is not None:
            due, piece = given
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            while way in self._faults.silent:
                assert self._changed is not None
                await self._changed.wait()
            await self._throttle(way, len(piece))
            corrupt, cut = self._faults.corrupt, self._faults.cut
            if self._strikes(corrupt, way, passed, len(piece), "corrupted", struck):
                assert corrupt is not None
                place = corrupt.after - passed
                piece = piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
            ends = self._strikes(cut, way, passed, len(piece), "cut", struck)
            if ends:
                assert cut is not None
                piece = piece[: cut.after - passed]
            writer.write(piece)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            passed += len(piece)
            self.counts[way] += len(piece)
            if ends:
                return

    def _strikes(self, at: At | None, way: Way, passed: int, size: int, what: str, struck: set[At]) -> bool:
        """Whether a fault happens within the next ``size`` bytes; counted if so."""
        if at is None or at.way != way or at in struck or not passed <= at.after < passed + size:
            return False
        if at.times is not None and self.counts[what] >= at.times:
            return False
        struck.add(at)
        self.counts[what] += 1
        return True

    async def _throttle(self, way: Way, size: int) -> None:
        rate = self._faults.bytes_per_s
        if rate is not None:
            self._free_at[way] = max(self._free_at[way], self._loop.time()) + size / rate
            await asyncio.sleep(self._free_at[way] - self._loop.time())

    def _piece(self) -> int:
        """How much is read at once: a twentieth of a second's worth on a slow line."""
        rate = self._faults.bytes_per_s
        return _PIECE if rate is None else max(64, min(_PIECE, int(rate / 20)))
