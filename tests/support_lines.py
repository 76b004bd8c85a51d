"""Lines that are cut: a small TCP proxy on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading


class CuttingProxy:
    """Passes bytes on to a port of this machine; cuts each line after ``up`` bytes to it or ``down`` bytes from it.

    ``ups`` and ``downs`` hold how many bytes each line passed on, in order.
    """

    def __init__(self, port: int, *, up: int | None = None, down: int | None = None) -> None:
        self._target, self.up, self.down = port, up, down
        self.ups: list[int] = []
        self.downs: list[int] = []
        self._lines: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in list(self._lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            number = len(self.ups)
            self.ups.append(0)
            self.downs.append(0)
            self._lines |= {client, server}
            for source, to, counts, most in (
                (client, server, self.ups, self.up),
                (server, client, self.downs, self.down),
            ):
                self._threads.append(threading.Thread(target=self._pump, args=(source, to, counts, number, most)))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, to: socket.socket, counts: list[int], number: int, most: int | None) -> None:
        with contextlib.suppress(OSError):
            while most is None or counts[number] < most:
                piece = source.recv(2**16 if most is None else min(2**16, most - counts[number]))
                if not piece:
                    break
                to.sendall(piece)
                counts[number] += len(piece)
        for line in (to, source):  # what was passed on still arrives
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._lines -= {source}
        source.close()
