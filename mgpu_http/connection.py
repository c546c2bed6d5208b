"""Hypercorn's connection, for HTTP/1.1 without TLS, with a way to reset it.

Hypercorn as a whole changes to HTTP/2 for any client that asks, and leaves a failed stream of it
open for seconds; it accepts without limit, cannot stop accepting before it cancels handlers, and
lets no application end a connection otherwise than cleanly. So its protocol is used, but not its
way of accepting.
"""

import asyncio
import contextlib
import socket
import struct
from typing import Any

import h11
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

# SO_LINGER on, with no time: what is still unsent is thrown away, and no clean end is sent.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
FLUSH_BYTES = 1 << 16


class Http1(H11Protocol):
    """HTTP/1.1, whatever the client would rather speak."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Offer no upgrade to HTTP/2."""


class Connection(TCPServer):
    """One client's connection, from its acceptance to its end: `await` it.

    What an answer says within one turn of the loop goes out in one piece: a short answer is one
    packet, not three. The time to keep an idle connection is one timer, not two tasks.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._idle: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        sock = self.writer.get_extra_info("socket")
        try:
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
            async with TaskGroup(self.loop) as group:
                self._task_group = group
                self.protocol = Http1(  # type: ignore[assignment]
                    self.app,
                    self.config,
                    self.context,
                    group,
                    ConnectionState({"cut": self.cut}),
                    False,  # noqa: FBT003 - not TLS
                    client,
                    server,
                    self.protocol_send,
                )
                self._keep_for_a_while()
                await self._read_data()
        except OSError:
            pass
        finally:
            self._no_longer_idle()
            self._flush()
            await self._close()

    def cut(self) -> None:
        """Reset the connection: the client sees that something is missing."""
        with contextlib.suppress(OSError):  # it is closed already
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
            )
        self.writer.transport.abort()

    def close_if_idle(self) -> None:
        """Close it unless a request is being answered."""
        if self._idle is not None:
            self._flush()
            self._end()

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            try:
                self._write(event.data)
                await self.writer.drain()
            except (ConnectionError, RuntimeError):
                await self.protocol.handle(Closed())
        elif isinstance(event, Updated):
            if event.idle:
                self._keep_for_a_while()
            else:
                self._no_longer_idle()
        else:
            self._flush()
            await super().protocol_send(event)

    def _write(self, data: bytes) -> None:
        if not self._unsent:
            self.loop.call_soon(self._flush)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._unsent and not self.writer.is_closing():
            self.writer.write(b"".join(self._unsent))
        self._unsent.clear()
        self._unsent_bytes = 0

    async def _close(self) -> None:
        self.loop.call_soon(self._end)
        await super()._close()

    def _end(self, left_bytes: int | None = None) -> None:
        """Close it; a client that takes nothing more of what it is still owed is cut off."""
        self.writer.close()
        unsent_bytes = self.writer.transport.get_write_buffer_size()
        if unsent_bytes and unsent_bytes == left_bytes:
            self.cut()
        elif unsent_bytes:
            self.loop.call_later(self.config.keep_alive_timeout, self._end, unsent_bytes)

    def _keep_for_a_while(self) -> None:
        self._no_longer_idle()
        self._idle = self.loop.call_later(self.config.keep_alive_timeout, self._end)

    def _no_longer_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
