"""What the broker is compared with, served by Hypercorn alike.

`bare`: one constant answer, so the least that a server of this kind costs. `proxy`: Starlette and
aiohttp, each as their documentation shows it; it passes on a request and its answer, and schedules,
limits and records nothing.

`python -m mgpu_http.bench.baselines bare|proxy UPSTREAM_URL` prints its port.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import ClientSession, ClientTimeout, TCPConnector
from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mgpu_http.bench.upstream import ANSWER

METHODS = ["GET", "POST"]
PER_CONNECTION = {"connection", "keep-alive", "transfer-encoding"}


def bare(_url: str) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ANSWER})

    return app


def proxy(url: str) -> ASGIApp:
    session: ClientSession | None = None

    async def relay(request: Request) -> Response:
        nonlocal session
        if session is None:
            timeout = ClientTimeout(total=None)
            session = ClientSession(connector=TCPConnector(limit=0), timeout=timeout)
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        body = await request.body()
        answer = await session.request(
            request.method, url + request.url.path, headers=headers, data=body
        )

        async def chunks() -> AsyncIterator[bytes]:
            async with answer:
                async for chunk in answer.content.iter_any():
                    yield chunk

        kept = {k: v for k, v in answer.headers.items() if k.lower() not in PER_CONNECTION}
        return StreamingResponse(chunks(), answer.status, kept)

    return Starlette(routes=[Route("/{path:path}", relay, methods=METHODS)])


APPS: Mapping[str, Callable[[str], ASGIApp]] = {"bare": bare, "proxy": proxy}


async def main(name: str, url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = Config()
        config.bind = [f"fd://{sock.fileno()}"]
        config.loglevel = "WARNING"
        print(sock.getsockname()[1], flush=True)  # noqa: T201 - whoever started it waits
        await serve(APPS[name](url), config)  # type: ignore[arg-type]


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
