"""Sockets that dawdle: headers byte by byte, bodies at one byte a second, downloads that nobody reads.

Each is opened again when it is cut, the readers' at times of their own. A third are strangers; the others have a
client's certificate.
"""

import asyncio
import contextlib
import random
import socket

from calls import LOST, Refused


async def headers(caller):
    """A request whose headers never end."""
    await caller.connect()
    transport = caller.answers.transport
    transport.write(b"GET /v1/authority HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    while not caller.answers.lost:
        transport.write(b"x")
        await asyncio.sleep(1)


async def body(caller):
    """A body at one byte a second."""
    await caller.connect()
    transport = caller.answers.transport
    transport.write(b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
    while not caller.answers.lost:
        transport.write(b"x")
        await asyncio.sleep(1)


async def reader(caller, path):
    """Downloads that nobody reads. A cut is not noticed, so they begin anew after some 12 seconds."""
    loop, found = asyncio.get_running_loop(), socket.socket()
    found.setblocking(False)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await loop.sock_connect(found, ("127.0.0.1", caller.port))
    await caller.connect(found)
    with contextlib.suppress(Refused):
        await caller.ask("GET", "/v1/blobs/x")  # to learn the time for signatures
    transport = caller.answers.transport
    transport.pause_reading()
    for _ in range(20):
        signed = "".join(f"{k}: {v}\r\n" for k, v in caller.signer.headers("GET", path.encode()).items())
        transport.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{signed}\r\n".encode())
    await asyncio.sleep(random.uniform(8, 16))


async def again(dawdle, caller, *more):
    """For ever, counted."""
    while True:
        with contextlib.suppress(LOST):
            await dawdle(caller, *more)
        caller.close()
        await asyncio.sleep(0.5)
