"""Comments in a stream that has not begun: a client that waits for minutes sees that it waits.

The first comment commits the answer's 200. What goes wrong after it has no status of its own any
more, and becomes one event; the end is then without `[DONE]`.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from mgpu_effects.errors import BrokerError
from mgpu_effects.jobs import MAX_COPY_BYTES, Headers
from mgpu_http.body import MEMORY_BYTES, SpooledBody
from mgpu_http.dialects import Dialect, anthropic, openai
from mgpu_http.models import MAX_JSON_BYTES
from mgpu_http.respond import JobResponder

COMMENT_S = 5.0  # between two, where nobody says otherwise
EVENT_STREAM = b"text/event-stream"
HEAD: Headers = ((b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache"))


class Progress:
    """A `jobs.Responder` that says where its request stands until the service begins to answer.

    `place` gives that in one line, `waited` what the headers would have said in the end.
    """

    def __init__(
        self,
        responder: JobResponder,
        every_s: float,
        place: Callable[[], str],
        waited: Callable[[], str],
    ) -> None:
        self._responder = responder
        self._every_s = every_s
        self._place = place
        self._waited = waited
        self._committed = False
        self._began = False
        # The status of an answer that is no stream, which is told as one event at its end.
        self._status: int | None = None
        self._body = bytearray()
        self._turn = asyncio.Lock()
        self._ticking = asyncio.create_task(self._tick())

    def stop(self) -> None:
        """Say nothing more."""
        self._ticking.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        async with self._turn:
            self.stop()
        self._began = True
        if not self._committed:
            await self._responder.start(status, headers)
            return
        await self._comment(self._waited())
        type_ = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        if not (200 <= status < 300 and type_.startswith(EVENT_STREAM)):
            self._status = status

    async def write(self, chunk: bytes) -> None:
        if self._status is None:
            await self._responder.write(chunk)
        else:
            self._body += chunk[: MAX_COPY_BYTES - len(self._body)]

    async def finish(self) -> None:
        if self._status is not None:
            event = _answer(self._status, bytes(self._body), self._responder.dialect)
            await self._responder.write(event)
        await self._responder.finish()

    async def fail(self, error: BrokerError) -> None:
        async with self._turn:
            self.stop()
        if self._began or not self._committed:
            await self._responder.fail(error)
            return
        self._responder.error = error
        await self._responder.write(_failure(self._responder.dialect(error), error))
        await self._responder.finish()

    def cut(self) -> None:
        self.stop()
        self._responder.cut()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            async with self._turn:
                if not self._committed:
                    self._committed = True
                    await self._responder.start(200, HEAD)
                await self._comment(self._place())

    async def _comment(self, text: str) -> None:
        await self._responder.write(f": {' '.join(text.split())}\n\n".encode())


async def streams(body: SpooledBody) -> bool:
    """Say whether a body asks for a stream, as OpenAI's and Anthropic's do."""
    if body.size > MAX_JSON_BYTES:
        return False

    def look() -> bool:
        with body.view() as view:
            try:
                asked = json.loads(view[:])
            except (ValueError, RecursionError):
                return False
        return isinstance(asked, dict) and asked.get("stream") is True

    return look() if body.size <= MEMORY_BYTES else await asyncio.to_thread(look)


def _failure(told: Mapping[str, Any], error: BrokerError) -> bytes:
    """Give an error of ours as an event, in the words of the client's library where it has some."""
    shape = told if isinstance(told["error"], dict) else openai(error)
    return _event({**shape, "error": {**shape["error"], "status": error.status}})


def _answer(status: int, body: bytes, dialect: Dialect) -> bytes:
    """Give a service's answer that is no stream as an event: its error, or what it has to say."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = body.decode(errors="replace")
    if 200 <= status < 300:
        return _event(told)
    error = told.get("error", told) if isinstance(told, dict) else told
    members = error if isinstance(error, dict) else {"message": str(error)}
    event = {"error": {"code": f"http_{status}", **members, "status": status}}
    # Anthropic's library looks at events with a name only.
    return _event({"type": "error", **event} if dialect is anthropic else event)


def _event(told: Any) -> bytes:
    kind = "event: error\n" if isinstance(told, dict) and told.get("type") == "error" else ""
    return f"{kind}data: {json.dumps(told)}\n\n".encode()
