"""The way back to a client: one for every answer, and what the proxy sees of it."""

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache

from starlette.responses import JSONResponse
from starlette.types import Message, Send

from mgpu_effects.errors import BrokerError
from mgpu_effects.jobs import Headers
from mgpu_effects.waiting import within
from mgpu_http.body import Intake
from mgpu_http.dialects import Dialect

BEGINNINGS = {"http.response.start", "websocket.accept"}
SWITCHED = 101  # the status of a WebSocket that was accepted
LINGER_S = 2.0
TAKES_NOTHING_S = 60  # for an answer of ours; for a consumer's it is `timeout_s.client_write`


@lru_cache(maxsize=1)
def date(unix_s: int) -> bytes:
    """Give the `Date` of a second."""
    return formatdate(unix_s, usegmt=True).encode()


class Reply:
    """ASGI's `send` of one request, with the headers that every answer carries.

    It sends nothing to a client that has gone. What cannot be completed is cut off by a reset:
    after a mere close an answer without a length would look complete, and a client that reads
    nothing would keep its connection.
    """

    def __init__(self, send: Send, intake: Intake, cut: Callable[[], None]) -> None:
        self._send = send
        self._intake = intake
        self._cut = cut
        self.began = False
        self.complete = False
        self.was_cut = False
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}

    @property
    def over(self) -> bool:
        return self.complete or self.was_cut

    async def send(self, message: Message) -> None:
        """Send what is ours; a client that takes nothing of it for too long is cut off."""
        try:
            await within(TAKES_NOTHING_S, self.pass_on(message))
        except TimeoutError:
            self.cut()

    async def pass_on(self, message: Message) -> None:
        """Send it, however long that takes."""
        self._intake.watch()
        if self._intake.gone.is_set() or self.over:
            return
        if message["type"] in BEGINNINGS:
            if self.began:
                self.cut()
                return
            self.began = True
            self.status = message.get("status", SWITCHED)
            message = {**message, "headers": self._merged(message.get("headers", ()))}
        elif message["type"] == "websocket.close":
            self.complete = True
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._linger(message)
            self.complete = True
        await self._send(message)

    def cut(self) -> None:
        """End the connection with a reset, whatever was sent."""
        self.was_cut = True
        self._cut()

    def _merged(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        ours = self.headers.keys() - {b"vary"}
        kept = [(name, value) for name, value in headers if name.lower() not in ours]
        if not any(name.lower() == b"date" for name, _ in kept):
            kept.append((b"date", date(int(time.time()))))
        return [*kept, *self.headers.items()]

    async def _linger(self, message: Message) -> None:
        """Let a client that still uploads read the answer: a close now would reset it away."""
        if self._intake.over.is_set():
            return
        await self._send({**message, "more_body": True})
        message["body"] = b""
        try:
            async with asyncio.timeout(LINGER_S):
                await self._intake.over.wait()
        except TimeoutError:
            pass


class JobResponder:
    """What a request is answered through where it is not by a handler's response."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.error: BrokerError | None = None
        self.dialect: Dialect = BrokerError.to_json  # in which its client reads errors

    async def start(self, status: int, headers: Headers) -> None:
        await self._reply.pass_on(
            {"type": "http.response.start", "status": status, "headers": headers}
        )

    async def write(self, chunk: bytes) -> None:
        await self._reply.pass_on({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self) -> None:
        await self._reply.pass_on({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: BrokerError) -> None:
        self.error = error
        if self._reply.began:
            self.cut()
            return
        answer = error_response(error, self.dialect)
        head = {"type": "http.response.start", "status": error.status}
        await self._reply.send({**head, "headers": answer.raw_headers})
        await self._reply.send(
            {"type": "http.response.body", "body": bytes(answer.body), "more_body": False}
        )

    def cut(self) -> None:
        self._reply.cut()

    @property
    def outcome(self) -> str:
        """The code of our error, else the status of a whole answer, else `gone`."""
        if self.error is not None:
            return self.error.code
        whole = self._reply.complete and not self._reply.was_cut
        return str(self._reply.status) if whole else "gone"


def error_response(error: BrokerError, dialect: Dialect) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if not error.retryable:
        headers["x-should-retry"] = "false"
    if error.consumer is not None:
        headers["x-mgpu-consumer"] = error.consumer
    return JSONResponse(dialect(error), error.status, headers)
