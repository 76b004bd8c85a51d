"""TLS on an accepted socket, as a transport for one of asyncio's protocols.

asyncio's own keeps 256 KiB for each connection, and two buffers and a second transport beneath it. This one lets
OpenSSL read and write the socket itself, so that an idle connection costs little more than OpenSSL's own 25 kB.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
from collections.abc import Callable
from typing import Any

_RECORD = 16 * 1024  # the most that TLS packs into one record, and that one read or write of OpenSSL moves
_READS_AT_ONCE = 8  # then others have their turn
_HIGH, _LOW = 64 * 1024, 16 * 1024  # of what is not sent yet: above, the protocol is asked to pause; below, to go on
_CLOSE_S = 5.0  # for the other end to read the last of an answer
_HANDSHAKES_AT_ONCE = 4  # steps of them, half a millisecond each: then requests have their turn
_MOST_DUE = 32


class Turns:
    """Handshakes, a few in each turn of the loop: a crowd that arrives at once keeps nobody else waiting."""

    def __init__(self) -> None:
        self._loop, self._due = asyncio.get_running_loop(), dict[Callable[[], None], None]()

    @property
    def are_many(self) -> bool:
        """Whether so many wait that it is better to let in no more connections."""
        return len(self._due) > _MOST_DUE

    def ask(self, step: Callable[[], None]) -> None:
        """Take ``step`` when it is its turn; asked again before, it is taken once."""
        if not self._due:
            self._loop.call_soon(self._take)
        self._due[step] = None

    def _take(self) -> None:
        for step in list(itertools.islice(self._due, _HANDSHAKES_AT_ONCE)):
            del self._due[step]
            step()
        if self._due:
            self._loop.call_soon(self._take)


class Tls(asyncio.Transport):
    """A connection: first its handshake, then the transport of the protocol that ``make_protocol`` gives.

    ``on_lost`` is called once, at the end. The protocol's ``connection_lost(None)`` follows, however it ended.
    """

    __slots__ = (
        "_context",
        "_is_closing",
        "_is_full",
        "_is_lost",
        "_is_reading",
        "_loop",
        "_make_protocol",
        "_on_lost",
        "_protocol",
        "_tls",
        "_turns",
        "_unsent",
        "address",
        "client",
        "since",
    )

    def __init__(
        self,
        found: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[Tls], asyncio.Protocol],
        on_lost: Callable[[Tls], None],
        address: str = "",
        turns: Turns | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._make_protocol, self._on_lost, self._context = make_protocol, on_lost, context
        self._protocol: asyncio.Protocol | None = None
        self._is_closing = self._is_lost = self._is_full = False
        self._is_reading, self._unsent = True, bytearray()
        self.address, self.client, self.since = address, "", self._loop.time()
        self._turns = turns or Turns()
        found.setblocking(False)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the end of an answer waits 40 ms for an ACK
        self._tls = context.wrap_socket(found, server_side=True, do_handshake_on_connect=False)
        self._loop.add_reader(self._tls.fileno(), self._readable)

    @property
    def is_shaking_hands(self) -> bool:
        """Whether TLS is still to be agreed on."""
        return self._protocol is None

    @property
    def certificate(self) -> bytes | None:
        """The certificate (DER) that the other end showed."""
        return self._tls.getpeercert(binary_form=True)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What asyncio's transports tell: ``socket``, ``peername``, ``sockname``, ``ssl_object``, ``sslcontext``."""
        if name in ("socket", "ssl_object"):
            return self._tls
        if name == "sslcontext":
            return self._context
        with contextlib.suppress(OSError):  # not connected any more
            if name == "peername":
                return self._tls.getpeername()
            if name == "sockname":
                return self._tls.getsockname()
        return default

    # ---------------------------------------------------------------------------------------------------- reading

    def is_reading(self) -> bool:
        """Whether bytes are taken from the other end."""
        return self._is_reading and not self.is_closing()

    def pause_reading(self) -> None:
        """Leave bytes to the system's buffers."""
        if self.is_reading():
            self._is_reading = False
            self._loop.remove_reader(self._tls.fileno())

    def resume_reading(self) -> None:
        """Take bytes again."""
        if not self._is_reading and not self.is_closing():
            self._is_reading = True
            self._loop.add_reader(self._tls.fileno(), self._readable)
            self._loop.call_soon(self._readable)  # OpenSSL may hold some, which the system does not know of

    def _readable(self) -> None:
        if self._is_lost:
            return
        if self._protocol is None:
            self._turns.ask(self._shake_hands)
        else:
            self._read()

    def _shake_hands(self) -> None:
        if self._is_lost or self._protocol is not None:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._loop.remove_writer(self._tls.fileno())
        except ssl.SSLWantWriteError:
            self._loop.add_writer(self._tls.fileno(), self._shake_hands)
        except OSError:  # no TLS, or a certificate of another authority: OpenSSL has told the other end
            self._lose()
        else:
            self._loop.remove_writer(self._tls.fileno())
            protocol = self._protocol = self._make_protocol(self)
            protocol.connection_made(self)
            if self.is_reading():
                self._read()

    def _read(self) -> None:
        """Give the protocol what came, a few records at once."""
        protocol = self._protocol
        assert protocol is not None
        for _ in range(_READS_AT_ONCE):
            if not self.is_reading():
                return
            try:
                data = self._tls.recv(_RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLWantWriteError:  # OpenSSL has to answer first: new keys, say
                self._loop.add_writer(self._tls.fileno(), self._writable)
                return
            except OSError:
                self._lose()
                return
            if not data:
                protocol.eof_received()
                self.close()
                return
            protocol.data_received(data)
        if self.is_reading() and self._tls.pending():
            self._loop.call_soon(self._readable)
        if self._unsent:  # a write may have waited for what OpenSSL has just read
            self._flush()

    # ---------------------------------------------------------------------------------------------------- writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send now what can be, and keep the rest."""
        if self.is_closing() or not data:
            return
        self._unsent += data
        self._flush()

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent yet."""
        return len(self._unsent)

    def can_write_eof(self) -> bool:
        """TLS has no half-closed connection that HTTP could use."""
        return False

    def _writable(self) -> None:
        self._flush()
        if self.is_reading():
            self._read()

    def _flush(self) -> None:
        """Send what can be; the system says when there is room for more."""
        wants_room = False
        while self._unsent and not self._is_lost:
            try:
                sent = self._tls.send(self._unsent)
            except ssl.SSLWantWriteError:
                wants_room = True
                break
            except ssl.SSLWantReadError:
                break
            except OSError:
                self._lose()
                return
            del self._unsent[:sent]
        if self._is_lost:
            return
        if wants_room:
            self._loop.add_writer(self._tls.fileno(), self._writable)
        else:
            self._loop.remove_writer(self._tls.fileno())
        self._tell_protocol()
        if self._is_closing and not self._unsent:
            self._say_goodbye()

    def _tell_protocol(self) -> None:
        assert self._protocol is not None
        if len(self._unsent) > _HIGH and not self._is_full:
            self._is_full = True
            self._protocol.pause_writing()
        elif len(self._unsent) <= _LOW and self._is_full:
            self._is_full = False
            self._protocol.resume_writing()

    # ---------------------------------------------------------------------------------------------------- closing

    def is_closing(self) -> bool:
        """Whether it is closed, or will be once the last bytes are sent."""
        return self._is_closing or self._is_lost

    def close(self) -> None:
        """Send what is kept, say so to the other end, and close."""
        if self.is_closing():
            return
        self._is_closing = True
        self._loop.remove_reader(self._tls.fileno())
        if self._unsent:
            self._loop.call_later(_CLOSE_S, self.abort)
        else:
            self._say_goodbye()

    def abort(self) -> None:
        """Close now."""
        self._lose()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # WantRead: the other end's goodbye is not waited for
            self._tls.unwrap()
        self._lose()

    def _lose(self) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        if self._tls.fileno() >= 0:
            self._loop.remove_reader(self._tls.fileno())
            self._loop.remove_writer(self._tls.fileno())
        self._tls.close()
        self._unsent.clear()
        self._on_lost(self)
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, None)
            self._protocol = None  # they refer to each other


__all__ = ["Tls", "Turns"]
