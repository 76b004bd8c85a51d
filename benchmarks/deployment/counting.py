"""A TCP proxy that counts bytes, both ways, by the moment they came. It passes on unread what it is given: TLS too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from bisect import bisect_right

_PIECE = 1 << 18


class CountingProxy:
    """A proxy on 127.0.0.1 in a thread of its own; "up" is towards the server."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        self._times: list[float] = [0.0]
        self._sums: list[tuple[int, int]] = [(0, 0)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def between(self, began: float, ended: float) -> tuple[int, int]:
        """Bytes (up, down) between two moments of the wall clock."""
        first, last = (self._sums[bisect_right(self._times, moment) - 1] for moment in (began, ended))
        return last[0] - first[0], last[1] - first[1]

    def close(self) -> None:
        """End every connection."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._until_closed())
        self._loop.close()

    async def _until_closed(self) -> None:
        self._closing = asyncio.Event()
        server = await asyncio.start_server(self._serve, sock=self._listener)
        await self._closing.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        with contextlib.suppress(OSError, asyncio.CancelledError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(there_writer)
            await asyncio.gather(self._pass(reader, there_writer, 0), self._pass(there_reader, writer, 1))
        for one in writers:
            one.close()
            with contextlib.suppress(OSError):
                await one.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                up, down = self._sums[-1]
                self._sums.append((up + len(piece), down) if way == 0 else (up, down + len(piece)))
                self._times.append(time.time())
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
