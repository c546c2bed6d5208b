"""Hypercorn's connection, for HTTP/1.1 without TLS, with a way to reset it.

Hypercorn as a whole changes to HTTP/2 for any client that asks, and leaves a failed stream of it
open for seconds; it accepts without limit, cannot stop accepting before it cancels handlers, and
lets no application end a connection otherwise than cleanly. So its protocol is used, but not its
way of accepting.
"""

import contextlib
import socket
import struct

import h11
from hypercorn.asyncio.task_group import TaskGroup
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

# SO_LINGER on, with no time: what is still unsent is thrown away, and no clean end is sent.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Http1(H11Protocol):
    """HTTP/1.1, whatever the client would rather speak."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Offer no upgrade to HTTP/2."""


class Connection(TCPServer):
    """One client's connection, from its acceptance to its end: `await` it."""

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
                await self.idle_task.restart(group, self._idle_timeout)
                await self._read_data()
                # Else a client's close is answered only when the time to keep it alive is over.
                await self.idle_task.stop()
        except OSError:
            pass
        finally:
            await self._close()

    def cut(self) -> None:
        """Reset the connection: the client sees that something is missing."""
        with contextlib.suppress(OSError):  # it is closed already
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
            )
        self.writer.transport.abort()
