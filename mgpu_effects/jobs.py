"""A client's piece of work on its way through the broker."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeAlias

from attrs import define, field, frozen

from mgpu_effects.errors import BrokerError

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

# The answer to a job that goes on at the service is short: it names the job.
MAX_COPY_BYTES = 1 << 20


class Body(Protocol):
    """A request's body, taken in whole before: in memory, or in a temporary file."""

    @property
    def size(self) -> int:
        """How many bytes."""

    def content(self) -> bytes | AsyncIterator[bytes]:
        """Give it from the beginning: whole if it is in memory, else in pieces."""

    def close(self) -> None:
        """Let go of the memory or the file."""


@frozen
class NoBody:
    size: int = 0

    def content(self) -> bytes:
        return b""

    def close(self) -> None:
        """There is nothing to let go of."""


class Responder(Protocol):
    """The way back to the client. Calls come from one task, in this order, each at most once
    but `write`; every call but `cut` returns when the client took what was sent.
    """

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer."""

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body."""

    async def finish(self) -> None:
        """Say that the answer is complete."""

    async def fail(self, error: BrokerError) -> None:
        """Answer with the error, or cut the connection if the answer has begun."""

    def cut(self) -> None:
        """Cut the connection of a client that takes nothing."""


class Socket(Protocol):
    """The client's end of a WebSocket. Until it is accepted, `Job.responder` may refuse it."""

    @property
    def offered(self) -> Sequence[str]:
        """The subprotocols that the client would speak."""

    async def accept(self, subprotocol: str | None, headers: Headers) -> None:
        """Let it begin."""

    async def next_message(self) -> str | bytes | None:
        """Wait for what the client says next; None: it has gone."""

    async def send(self, message: str | bytes) -> None:
        """Send it; returns when the client took it."""

    async def close(self, code: int, reason: str) -> None:
        """Say good-bye, and see to it that it ends."""


class Departure(asyncio.Event):
    """The client has gone. Who has to act on it at once is in `call`."""

    call: Callable[[], None] | None = None

    def set(self) -> None:
        news = not self.is_set()
        super().set()
        if news and self.call is not None:
            self.call()


@define(kw_only=True, eq=False)
class AnswerCopy:
    """What a service answered, read beside the client: its status, 0 without one, and its body.

    Of a body that is too long there is too much by one byte, and nothing more.
    """

    status: int = 0
    body: bytearray = field(factory=bytearray)

    def add(self, chunk: bytes) -> None:
        self.body += chunk[: MAX_COPY_BYTES + 1 - len(self.body)]


@define(kw_only=True, eq=False)
class Kept:
    """An answer that its client may never see: it is kept until that is known."""

    status: int = 0
    headers: Headers = ()
    body: bytearray = field(factory=bytearray)
    error: BrokerError | None = None
    whole: bool = False

    async def start(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    async def write(self, chunk: bytes) -> None:
        if len(self.body) + len(chunk) > MAX_COPY_BYTES:
            raise OSError("too long to be kept")
        self.body += chunk

    async def finish(self) -> None:
        self.whole = True

    async def fail(self, error: BrokerError) -> None:
        self.error = error

    def cut(self) -> None:
        """It takes whatever comes."""

    async def pass_on(self, responder: Responder) -> None:
        """Let the client see it after all."""
        if self.error is not None:
            await responder.fail(self.error)
            return
        await responder.start(self.status, self.headers)
        await responder.write(bytes(self.body))
        await responder.finish()


@define(kw_only=True, eq=False)
class Job:
    """One request of one client, from its whole body to the end of its work.

    The runtime owns it: whoever submits it only waits for `done` and says when the client `gone`.
    """

    request: str
    consumer: str
    kind: str
    method: str
    path: str  # under the consumer's URL, query included, exactly as it goes out
    headers: Headers  # as the client sent them, less the credentials that were for the broker
    body: Body
    responder: Responder
    socket: Socket | None = None  # it is a WebSocket, and this is its client's end
    priority: int | None = None
    max_wait_s: float | None = None
    client: str | None = None  # its address, for X-Forwarded-For
    scheme: str = "http"
    host: str | None = None
    gone: Departure = field(factory=Departure)
    # An operator wants its work ended, which may go on when the client has its answer.
    revoked: asyncio.Event = field(factory=asyncio.Event)
    done: asyncio.Event = field(factory=asyncio.Event)  # the client's part of it
    submitted: int = 0  # microseconds, as the events' `at`
    granted: int | None = None
    loading_us: int = 0  # how much of the wait was spent in a swap of its consumer
    copy: AnswerCopy | None = None  # to be made where the work may go on after the answer
    waits: bool = False  # its client wants the finished work, not the news that it was taken
    decided: bool = False  # it is being served or refused: nothing else will answer its client
