"""A request's body, and the only place that reads what a client sends."""

import asyncio
import mmap
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from starlette.types import Receive

from mgpu_effects.errors import BrokerError
from mgpu_effects.waiting import within

MEMORY_BYTES = 1 << 20  # a body beyond this waits in a temporary file
PIECE_BYTES = 1 << 16


class ClientGoneError(Exception):
    """The client has left: there is nobody to answer."""


class SpooledBody:
    """A body that was taken in whole: in memory up to `MEMORY_BYTES`, then in a temporary file."""

    def __init__(self) -> None:
        self.size = 0
        self._memory = bytearray()
        self._file: BinaryIO | None = None

    async def append(self, piece: bytes) -> None:
        """Add a piece; raises OSError where the disk has no room for it."""
        self.size += len(piece)
        if self._file is None and self.size <= MEMORY_BYTES:
            self._memory += piece
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by close()
            piece = bytes(self._memory) + piece
            self._memory.clear()
        await asyncio.to_thread(_write_all, self._file.fileno(), piece)

    def content(self) -> bytes | AsyncIterator[bytes]:
        return bytes(self._memory) if self._file is None else self._pieces(self._file)

    async def _pieces(self, file: BinaryIO) -> AsyncIterator[bytes]:
        for start in range(0, self.size, PIECE_BYTES):
            yield await asyncio.to_thread(os.pread, file.fileno(), PIECE_BYTES, start)

    @contextmanager
    def view(self) -> Iterator[bytes | mmap.mmap]:
        """Give all of it for looking at, without taking a file into memory."""
        if self._file is None:
            yield bytes(self._memory)
            return
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view

    def close(self) -> None:
        self._memory.clear()
        if self._file is not None:
            self._file.close()


def _write_all(file: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(file, view) :]


class Intake:
    """Everything that comes from one client during one request.

    There is one reader at any time: the handler while it takes the body in or waits for the
    departure, else a task in the background, and a body that nobody wants is thrown away.
    Left unread it would fill Hypercorn's queue of ten messages and block the connection for ever,
    our answer and the news of the client's departure included.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = False  # the handler reads
        self._watcher: asyncio.Task[None] | None = None
        # The body came to its end, or the client has gone.
        self.over = asyncio.Event()
        # The client left or half-closed; or Hypercorn has sent it the whole answer.
        self.gone = asyncio.Event()

    async def take(self, limit_bytes: int, stall_s: float) -> SpooledBody:
        """Take the body in; after it somebody has to go on reading: `until_gone`.

        Raises `body_too_large`; `upload_timeout` when nothing comes for `stall_s` seconds; and
        `ClientGoneError`.
        """
        body = SpooledBody()
        try:
            while not self.over.is_set():
                message = await self._next(stall_s)
                piece = message.get("body", b"")
                refuse_beyond(limit_bytes, body.size + len(piece))
                await body.append(piece)
        except BaseException:
            body.close()
            self.watch()
            raise
        if self.gone.is_set():
            body.close()
            raise ClientGoneError
        return body

    def watch(self) -> None:
        """Read on in the background to the end; what still comes of a body is thrown away."""
        if self._watcher is None and not self._read:
            self._watcher = asyncio.create_task(self._read_to_the_end(), name="intake")

    async def until_gone(self) -> None:
        """Read on to the end here, in the handler itself."""
        self._read = True
        try:
            await self._read_to_the_end()
        finally:
            self._read = False

    async def _read_to_the_end(self) -> None:
        while not self.gone.is_set():
            await self._next(None)

    async def _next(self, stall_s: float | None) -> Mapping[str, Any]:
        try:
            message = await within(stall_s, self._receive())
        except TimeoutError as error:
            raise BrokerError(
                code="upload_timeout",
                message=f"the body brought nothing for {stall_s:g} seconds",
                retryable=True,
            ) from error
        if message["type"] == "http.disconnect":
            self.gone.set()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.over.set()
        return message


def refuse_beyond(limit_bytes: int, size: int) -> None:
    if size > limit_bytes:
        raise BrokerError(
            code="body_too_large", message=f"the body is larger than {limit_bytes >> 20} MiB"
        )
