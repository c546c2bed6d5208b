"""One job's way to its service and back: nothing is kept, nothing added but what http.md names."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import ParamSpec

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    InvalidURL,
    ServerDisconnectedError,
    TCPConnector,
    hdrs,
)
from aiohttp.connector import Connection
from attrs import define

from mgpu_core.events import Outcome
from mgpu_effects.errors import BrokerError
from mgpu_effects.forwarding import request_headers, response_headers, url_of
from mgpu_effects.jobs import Job
from mgpu_effects.settings import ConsumerSettings
from mgpu_effects.waiting import Begun, within

P = ParamSpec("P")

# Servers close idle connections after 5 s, some sooner: a POST on a stale one would be lost.
KEEPALIVE_S = 2
MAX_FIELD_BYTES = 64 * 1024
# How long cutting a client off may take.
CUT_S = 5

OUTCOMES: Mapping[str, Outcome] = {
    "bad_consumer_url": "upstream_error",
    "consumer_unreachable": "upstream_error",
    "upstream_disconnected": "upstream_error",
    "upstream_timeout": "timeout",
}


class _Response(ClientResponse):
    async def start(self, connection: Connection) -> ClientResponse:
        """Give up at once: a polite close waits until a service that reads nothing has read all."""
        transport = connection.transport
        try:
            return await super().start(connection)
        except BaseException:
            if transport is not None:
                transport.abort()
            raise


def open_session() -> ClientSession:
    """Give a client that changes nothing on its own; to be closed by the caller."""
    return ClientSession(
        connector=TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=KEEPALIVE_S),
        response_class=_Response,
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        timeout=ClientTimeout(total=None),
        skip_auto_headers=(
            hdrs.ACCEPT,
            hdrs.ACCEPT_ENCODING,
            hdrs.CONTENT_TYPE,
            hdrs.USER_AGENT,
        ),
        max_line_size=MAX_FIELD_BYTES,
        max_field_size=MAX_FIELD_BYTES,
    )


async def serve(job: Job, session: ClientSession, consumer: ConsumerSettings) -> Outcome:
    """Proxy the job and answer its client, with an error of ours where the service gave nothing.

    Returns when the service's work is over, which may be long after the client left, unless
    `on_client_gone` is `close`. Cancelled, it closes the call and leaves the client to the caller.
    """
    return await _Exchange(job, session, consumer).run()


@define
class _Exchange:
    job: Job
    session: ClientSession
    consumer: ConsumerSettings
    status: int = 0  # of the answer, 0 before its head came
    complete: bool = False  # the client took the whole answer
    sending: asyncio.Timeout | None = None  # what is being handed to the client

    async def run(self) -> Outcome:
        failure: Exception | None = None
        whole = asyncio.timeout(self.consumer.timeout_s.total)
        try:
            async with whole:
                self.job.gone.call = partial(self._leave, whole)
                try:
                    await self._relay()
                finally:
                    self.job.gone.call = None
                self.complete = not self.job.gone.is_set()
                # From here on the client may close: it has all but the news that this was all.
                await self._send(self.job.responder.finish)
        except (ClientError, OSError) as error:
            failure = error
        if self.complete:
            return "upstream_error" if self.status >= 500 else "ok"
        if self.job.gone.is_set():
            return "disconnected"
        assert failure is not None, "neither complete nor gone nor failed"
        told = self._explain(failure, whole)
        await self._fail(told)
        return OUTCOMES[told.code]

    async def _relay(self) -> None:
        limits = self.consumer.timeout_s
        request = self.session.request(
            self.job.method,
            url_of(self.job, self.consumer),
            headers=request_headers(self.job, self.consumer),
            data=self.job.body.content() if self.job.body.size else None,
            allow_redirects=False,
            timeout=ClientTimeout(total=None, connect=limits.connect),
        )
        async with asyncio.timeout(limits.connect + limits.first_byte):
            upstream = await request
        async with upstream:
            if upstream.status < 200:
                raise ServerDisconnectedError("it switched protocols unasked")
            self.status = upstream.status
            copy = self.job.copy
            if copy is not None:
                copy.status = upstream.status
            responder = self.job.responder
            headers = response_headers(self.job, upstream.raw_headers)
            await self._send(responder.start, upstream.status, headers)
            while chunk := await self._next_chunk(upstream):
                if copy is not None:
                    copy.add(chunk)
                await self._send(responder.write, chunk)

    async def _next_chunk(self, upstream: ClientResponse) -> bytes:
        """Give what has come by now; empty at the end."""
        return await within(self.consumer.timeout_s.idle, upstream.content.readany())

    async def _send(
        self, send: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Have the client take it; one that takes nothing for too long counts as gone."""
        if self.job.gone.is_set():
            return
        too_slow = False
        try:
            sending = Begun(send(*args, **kwargs))
            if not sending.over:
                async with asyncio.timeout(self.consumer.timeout_s.client_write) as self.sending:
                    await sending
        except TimeoutError:
            too_slow = not self.job.gone.is_set()
        except OSError:
            self.job.gone.set()
        finally:
            self.sending = None
        if too_slow:
            self.job.gone.set()
            self.job.responder.cut()

    def _leave(self, whole: asyncio.Timeout) -> None:
        """The client has gone: end the call, or only what is being sent."""
        drained = self.consumer.on_client_gone != "close"
        scope = self.sending if drained else whole
        if scope is not None and not scope.expired():
            scope.reschedule(0)

    async def _fail(self, error: BrokerError) -> None:
        try:
            async with asyncio.timeout(CUT_S):
                await self.job.responder.fail(error)
        except OSError:
            self.job.gone.set()  # nobody is there to be told

    def _explain(self, failure: Exception, whole: asyncio.Timeout) -> BrokerError:
        match failure:
            case ClientConnectorError() | ConnectionTimeoutError():
                return self._error("consumer_unreachable", "could not be reached", retryable=True)
            case TimeoutError():
                # Not to be tried again by itself: the service may still be at work on it.
                return self._error("upstream_timeout", self._slowness(whole))
            case InvalidURL():
                return self._error("bad_consumer_url", "has no usable URL")
            case _:
                return self._error("upstream_disconnected", "broke off its answer", retryable=True)

    def _slowness(self, whole: asyncio.Timeout) -> str:
        limits = self.consumer.timeout_s
        if whole.expired():
            return f"did not finish its answer within {limits.total} s"
        if self.status:
            return f"sent nothing more for {limits.idle} s"
        return f"did not begin to answer within {limits.first_byte} s"

    def _error(self, code: str, what: str, *, retryable: bool = False) -> BrokerError:
        name = self.consumer.name
        return BrokerError(code=code, message=f"{name} {what}", consumer=name, retryable=retryable)
