"""A client's WebSocket. Until it is accepted it is a GET like any other, and refused like one."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from mgpu_effects.jobs import Headers
from mgpu_http.respond import Reply

# So many messages of a client wait here while those before them are passed on.
MOST_WAITING = 8
# After a good-bye: how long its answer may take.
CLOSE_S = 5
HANDSHAKE = {
    "http.response.start": "websocket.http.response.start",
    "http.response.body": "websocket.http.response.body",
}


class ClientSocket:
    """Speaks ASGI's `websocket` with the server and its `http` with all that decides on requests.

    Once accepted it has messages.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.offered: tuple[str, ...] = tuple(scope["subprotocols"])
        self._receive = receive
        self._send = send
        self._messages: asyncio.Queue[str | bytes | None] = asyncio.Queue(MOST_WAITING)
        self._gone = False
        self._over = False  # nobody wants to hear more of it

    # ------------------------------------------------------------------- as an HTTP request

    def as_request(self, scope: Scope) -> MutableMapping[str, Any]:
        """Give the scope of the GET that it begins as."""
        return {**scope, "type": "http", "method": "GET", "scheme": "http"}

    async def receive(self) -> Message:
        """Wait for what a request's reader knows: its (empty) body, then that the client has gone.

        Messages of the tunnel are put aside on the way.
        """
        while True:
            message = await self._receive()
            if message["type"] == "websocket.connect":
                return {"type": "http.request", "body": b"", "more_body": False}
            if message["type"] == "websocket.disconnect":
                self._leave()
                return {"type": "http.disconnect"}
            text = message.get("text")
            if not self._over:
                await self._messages.put(message["bytes"] if text is None else text)

    async def send(self, message: Message) -> None:
        """Send an answer instead of accepting it, or what a tunnel has to send."""
        await self._send({**message, "type": HANDSHAKE.get(message["type"], message["type"])})

    def _leave(self) -> None:
        """Let who waits for a message know; who has more to read learns it after that."""
        self._gone = True
        if not self._messages.full():
            self._messages.put_nowait(None)

    async def next_message(self) -> str | bytes | None:
        if self._gone and self._messages.empty():
            return None
        return await self._messages.get()

    def listen_no_more(self) -> None:
        """Let what still comes be thrown away."""
        self._over = True
        while not self._messages.empty():
            self._messages.get_nowait()


class Tunnel:
    """The client's end of a tunnel, as `jobs.Socket` describes it."""

    def __init__(self, socket: ClientSocket, reply: Reply) -> None:
        self.offered = socket.offered
        self._socket = socket
        self._reply = reply

    async def accept(self, subprotocol: str | None, headers: Headers) -> None:
        message = {"subprotocol": subprotocol, "headers": headers}
        await self._reply.pass_on({"type": "websocket.accept", **message})

    async def next_message(self) -> str | bytes | None:
        return await self._socket.next_message()

    async def send(self, message: str | bytes) -> None:
        kind = "text" if isinstance(message, str) else "bytes"
        await self._reply.pass_on({"type": "websocket.send", kind: message})

    async def close(self, code: int, reason: str) -> None:
        await self._reply.pass_on({"type": "websocket.close", "code": code, "reason": reason})
        self._socket.listen_no_more()
        asyncio.get_running_loop().call_later(CLOSE_S, self._reply.cut)
