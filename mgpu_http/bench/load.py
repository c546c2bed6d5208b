"""A client that costs little: keep-alive connections, one request at a time on each.

It reads just enough of HTTP/1.1 to find the end of an answer, so that what is measured is the
server. Answers with a status other than 200, or cut off, raise `LoadError`.
"""

import asyncio
import time
from collections.abc import Sequence

from attrs import frozen

from mgpu_http.bench.upstream import LENGTH

# Hypercorn closes a connection after 1,000 requests: no round sends more on one.
ROUND_LIMIT_S = 120.0
_LAST_CHUNK = b"0\r\n\r\n"


class LoadError(Exception):
    """A server did not answer as it should; the message says what came."""


@frozen
class Round:
    """What some clients saw: one latency per answer, and how long all of it took, in seconds."""

    latencies_s: tuple[float, ...]
    took_s: float


class _Client(asyncio.Protocol):
    """One connection. `ask` sends a request and gives the latency of its whole answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._left: int | None = None  # bytes of the body still to come; None: chunked
        self._tail = b""
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(LoadError(f"the connection was lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        if not self._head_is_whole():
            data = self._take_head(data)
        if not self._head_is_whole() or self._answered is None or self._answered.done():
            return
        if self._left is None:
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
            over = self._tail == _LAST_CHUNK
        else:
            self._left -= len(data)
            over = self._left <= 0
        if over:
            self._answered.set_result(None)

    def _head_is_whole(self) -> bool:
        return self._head.endswith(b"\r\n\r\n")

    def _take_head(self, data: bytes) -> bytes:
        """Give what of the data belongs to the body."""
        head, end, body = (self._head + data).partition(b"\r\n\r\n")
        self._head = head + end
        if end:
            assert self._answered is not None
            if not head.startswith(b"HTTP/1.1 200"):
                self._answered.set_exception(LoadError(head.decode("latin-1")))
            length = LENGTH.search(head)
            self._left = int(length[1]) if length else None
        return body

    async def ask(self, request: bytes) -> float:
        assert self._transport is not None
        self._head, self._tail = b"", b""
        self._answered = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(request)
        await self._answered
        return time.perf_counter() - began

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()


async def send(port: int, request: bytes, *, clients: int, requests: int) -> Round:
    """Send so many requests over so many connections, each as soon as the last was answered."""
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(_Client, "127.0.0.1", port))[1] for _ in range(clients)
    ]
    left = iter(range(requests))

    async def work(client: _Client) -> Sequence[float]:
        return [await client.ask(request) for _ in left]

    try:
        async with asyncio.timeout(ROUND_LIMIT_S):
            began = time.perf_counter()
            latencies = await asyncio.gather(*map(work, connections))
            took_s = time.perf_counter() - began
    finally:
        for client in connections:
            client.close()
    return Round(tuple(latency for each in latencies for latency in each), took_s)


def post(path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """Give the bytes of one request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
