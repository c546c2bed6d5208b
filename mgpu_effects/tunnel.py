"""WebSockets between clients and services: each message is passed on as it comes."""

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs, urlsplit

from aiohttp import (
    ClientError,
    ClientSession,
    ClientWebSocketResponse,
    ClientWSTimeout,
    WSMsgType,
    WSServerHandshakeError,
)
from attrs import define

from mgpu_core.events import Outcome
from mgpu_effects.errors import BrokerError
from mgpu_effects.forwarding import request_headers, response_headers, url_of
from mgpu_effects.jobs import Job, Socket
from mgpu_effects.settings import ConsumerSettings
from mgpu_effects.waiting import within

# How long a service may take to say good-bye.
CLOSE_S = 2
# A close frame may not carry the codes that stand for its absence.
NO_CODE = {1005, 1006, 1015}
NORMAL, GOING_AWAY = 1000, 1001
MAX_MESSAGE_BYTES = 64 << 20
HANDSHAKE = "sec-websocket-"
# The names by which a client says that it is the one of before. ComfyUI keeps one socket for each
# id, and forgets the newer one when the older closes after it.
CLIENT_IDS = ("clientId", "client_id")


class Tunnels:
    """All that are open."""

    def __init__(self, session: ClientSession) -> None:
        self._session = session
        self._by_client: dict[str, _Tunnel] = {}

    async def serve(self, job: Job, socket: Socket, consumer: ConsumerSettings) -> Outcome:
        """Connect the client with the service until one of them ends it.

        Raises BrokerError where the service can't be reached.
        """
        client = _client(job, consumer)
        if client in self._by_client:
            await self._by_client[client].give_way()
        try:
            upstream = await self._connect(job, socket, consumer)
        except WSServerHandshakeError as refusal:
            await _refuse(job, refusal)
            return "upstream_error" if refusal.status >= 500 else "ok"
        tunnel = _Tunnel(job, socket, consumer, upstream)
        if client is not None:
            self._by_client[client] = tunnel
        try:
            return await tunnel.run()
        finally:
            if client is not None and self._by_client.get(client) is tunnel:
                del self._by_client[client]
            await upstream.close()

    async def _connect(
        self, job: Job, socket: Socket, consumer: ConsumerSettings
    ) -> ClientWebSocketResponse:
        headers = request_headers(job, consumer)
        for name in [name for name in headers if name.lower().startswith(HANDSHAKE)]:
            headers.popall(name, None)
        try:
            async with asyncio.timeout(consumer.timeout_s.connect):
                return await self._session.ws_connect(
                    url_of(job, consumer),
                    protocols=socket.offered,
                    headers=headers,
                    max_msg_size=MAX_MESSAGE_BYTES,
                    timeout=ClientWSTimeout(ws_close=CLOSE_S),
                )
        except WSServerHandshakeError:
            raise
        except (ClientError, OSError) as error:
            raise BrokerError(
                code="consumer_unreachable",
                message=f"{consumer.name} could not be reached",
                consumer=consumer.name,
                retryable=True,
            ) from error


@define(eq=False)
class _Tunnel:
    job: Job
    socket: Socket
    consumer: ConsumerSettings
    upstream: ClientWebSocketResponse
    gave_way: bool = False

    async def run(self) -> Outcome:
        """Pass messages on until it ends. One with a lease may not be silent for long."""
        idle_s = self.consumer.timeout_s.idle if self.job.granted is not None else None
        await self._send(self.socket.accept(self.upstream.protocol, response_headers(self.job, ())))
        try:
            async with asyncio.timeout(idle_s) as silence:
                return await self._until_one_ends(silence, idle_s)
        except TimeoutError:
            await self._send(self.socket.close(GOING_AWAY, "silent for too long"))
            return "timeout"

    async def give_way(self) -> None:
        """Close the service's end, and leave the client's open and deaf, as the service would."""
        self.gave_way = True
        await self.upstream.close()

    async def _until_one_ends(self, silence: asyncio.Timeout, idle_s: float | None) -> Outcome:
        def heard() -> None:
            if idle_s is not None:
                silence.reschedule(asyncio.get_running_loop().time() + idle_s)

        ways = [asyncio.create_task(way(heard)) for way in (self._up, self._down)]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _up(self, heard: Callable[[], None]) -> Outcome:
        """From the client to the service, until the client has gone."""
        while (message := await self.socket.next_message()) is not None:
            heard()
            if self.gave_way:
                continue
            try:
                if isinstance(message, str):
                    await self.upstream.send_str(message)
                else:
                    await self.upstream.send_bytes(message)
            except OSError:  # it is closing: `_down` hears of it
                await self.job.gone.wait()
        return "ok"

    async def _down(self, heard: Callable[[], None]) -> Outcome:
        """From the service to the client, until the service ends it or breaks."""
        while True:
            message = await self.upstream.receive()
            heard()
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await self._send(self.socket.send(message.data))
            elif self.gave_way:
                await self.job.gone.wait()
                return "ok"
            elif message.type is WSMsgType.CLOSE:
                code = NORMAL if message.data in NO_CODE else message.data
                await self._send(self.socket.close(code, message.extra or ""))
                return "ok"
            else:
                self.job.responder.cut()
                return "upstream_error"

    async def _send(self, sending: Awaitable[None]) -> None:
        """Have the client take it; one that takes nothing for too long counts as gone."""
        try:
            await within(self.consumer.timeout_s.client_write, sending)
        except TimeoutError:
            self.job.gone.set()
            self.job.responder.cut()


def _client(job: Job, consumer: ConsumerSettings) -> str | None:
    """Name who is at the client's end, where it says so."""
    asked = parse_qs(urlsplit(job.path).query)
    return next(
        (f"{consumer.server} {asked[name][0]}" for name in CLIENT_IDS if name in asked), None
    )


async def _refuse(job: Job, refusal: WSServerHandshakeError) -> None:
    """Give the client the service's own refusal, as far as it is known: not its body."""
    await job.responder.start(refusal.status, response_headers(job, ((b"content-length", b"0"),)))
    await job.responder.finish()
