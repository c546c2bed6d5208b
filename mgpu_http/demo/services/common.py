"""What the stand-in services have in common: their memory, their chance, their web server."""

import asyncio
import os
import random
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar, NoReturn

from aiohttp import web
from attrs import define, field

from mgpu_http.demo.card import CardConnection, OutOfMemory

MAX_BODY_BYTES = 64 * 2**20
MAX_REQUESTS = 128  # at once, in one service
LOAD_STEPS = 8  # a loader takes its memory piece by piece, so that two at once collide half-way
FINISH_S = 30.0  # for requests at work when a service that finishes them is stopped
OUT_OF_MEMORY_EXIT = 137

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@define(eq=False)
class Service:
    """One service. What comes later than the answer to a request is a task of `tasks`."""

    finishes_requests: ClassVar[bool] = False  # when stopped, before it lets go
    aborts_for_gone_clients: ClassVar[bool] = False

    card: CardConnection
    chance: random.Random
    tasks: asyncio.TaskGroup
    held_mib: int = field(default=0, init=False)

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def models_mib(self) -> Iterable[int]:
        """Give the size of each model that is in the card's memory."""
        raise NotImplementedError

    async def prepare(self) -> None:
        """Do what comes before the socket opens."""

    async def begin(self) -> None:
        """Do what goes on by itself once it listens."""

    async def hold(self, mib: int) -> None:
        """Hold so much, all in all; where that doesn't fit the process dies."""
        before_mib, self.held_mib = self.held_mib, mib
        try:
            await self.card.hold(mib)
        except OutOfMemory as error:
            die(
                f"CUDA out of memory. Tried to allocate {error.wanted_mib} MiB, of which only "
                f"{error.free_mib} MiB are free; this process holds {before_mib} MiB"
            )
        except ConnectionError as error:
            die(f"CUDA error: {error}")

    async def take(self, mib: int, over_s: float) -> None:
        """Take so much more, piece by piece."""
        for step in range(LOAD_STEPS):
            await asyncio.sleep(over_s / LOAD_STEPS)
            piece_mib = mib * (step + 1) // LOAD_STEPS - mib * step // LOAD_STEPS
            await self.hold(self.held_mib + piece_mib)

    async def give_back(self, mib: int) -> None:
        await self.hold(self.held_mib - mib)

    async def end(self) -> None:
        for mib in self.models_mib():
            await self.card.say("unload", mib)
        await self.card.leave()

    def happens(self, rate: float) -> bool:
        return self.chance.random() < rate


def die(why: str) -> NoReturn:
    """End without another word to anybody, as a process does whose allocation fails."""
    print(why, file=sys.stderr, flush=True)  # noqa: T201 - its log
    os._exit(OUT_OF_MEMORY_EXIT)


def make_app(service: Service) -> web.Application:
    at_work = 0

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal at_work
        if at_work >= MAX_REQUESTS:
            return web.Response(status=503, text=f"{MAX_REQUESTS} requests are at work already")
        at_work += 1
        try:
            return await handler(request)
        finally:
            at_work -= 1

    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[bounded])
    app.add_routes(service.routes())
    return app


def make_runner(service: Service) -> web.AppRunner:
    return web.AppRunner(
        make_app(service),
        access_log=None,
        handler_cancellation=service.aborts_for_gone_clients,
        shutdown_timeout=FINISH_S,
    )


async def content_of(request: web.Request, *, raw: bool = True) -> bytes:
    """Give the file of a multipart body, else, where `raw` ones are welcome, the body itself.

    Nothing where there is no such file.
    """
    if not request.content_type.startswith("multipart/"):
        return await request.read() if raw else b""
    try:
        part = (await request.post()).get("file")
    except (ValueError, AssertionError):  # not what its Content-Type says
        return b""
    if isinstance(part, web.FileField):
        with part.file as file:
            return file.read()
    return part.encode() if isinstance(part, str) else bytes(part or b"")
