"""What the stand-ins for services that cannot be installed here have in common.

    async with running(Ollama(card)) as ollama:
        ollama.url                   # answers as Ollama does, and holds memory as it does
        ollama.go.clear()            # from now on work lasts until `go` is set again
        ollama.calls                 # what it was asked to do: everything but GETs

Each is a real HTTP server in this process with a service's routes, answers and traps. What is
known of the service, and how, stands in the stand-in's own words.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card


class StandIn:
    """`mib` is what it holds while it is loaded, `residue_mib` what an unload leaves behind."""

    name = "service"
    # Its work ends when the client closes the connection; else it works on to the end.
    ends_with_client = True
    residue_mib = 0

    def __init__(
        self,
        card: Card,
        mib: int = 6_000,
        *,
        loaded: bool = False,
        residue_mib: int | None = None,
        calls: list[str] | None = None,
    ) -> None:
        self.card, self.mib = card, mib
        if residue_mib is not None:
            self.residue_mib = residue_mib
        self.calls: list[str] = calls if calls is not None else []
        self.url = ""
        self.working = 0
        self.finished = 0  # work that came to its end
        self.broken = 0  # work that an unload has cut off
        self.loaded = False
        self.go = asyncio.Event()
        self.go.set()
        self._cut = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.port = 0
        if loaded:
            assert self.take()

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def unknown(self, error: web.HTTPException) -> web.StreamResponse:
        """Answer what it has no route for."""
        return web.Response(status=error.status, text=f"{error.status}: {error.reason}")

    # ------------------------------------------------------------------------------ its memory

    def take(self, what: str = "", mib: int | None = None) -> bool:
        """Hold memory for itself, or for one of its models; False: there is not enough."""
        self.loaded = self.card.take(self.name + what, self.mib if mib is None else mib)
        return self.loaded

    def give_back(self, what: str = "") -> None:
        self.loaded = False
        if self.residue_mib:
            self.card.take(self.name + what, self.residue_mib)
        else:
            self.card.give_back(self.name + what)

    def held_mib(self, what: str = "") -> int:
        return self.card.held_mib.get(self.name + what, 0)

    # -------------------------------------------------------------------------------- its work

    async def work(self) -> bool:
        """Work until `go` is set; False: an unload has cut it off."""
        cut = self._cut
        self.working += 1
        try:
            ends = {asyncio.create_task(each.wait()) for each in (self.go, cut)}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in ends:
                    each.cancel()
        finally:
            self.working -= 1
        whole = not cut.is_set()
        self.finished += whole
        self.broken += not whole
        return whole

    def cut_work(self) -> None:
        """End all work under way, as an unload that does not wait for it."""
        self._cut.set()
        self._cut = asyncio.Event()

    async def answer_work(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        """Answer after the work; who is cut off sees the connection break."""
        if await self.work():
            return answer
        assert request.transport is not None
        request.transport.abort()
        return web.Response(status=500)

    # ------------------------------------------------------------------------------ its server

    async def listen(self, port: int = 0, more: Sequence[web.RouteDef] = ()) -> None:
        @web.middleware
        async def recorded(request: web.Request, handler: Any) -> web.StreamResponse:
            if request.method != "GET":
                self.calls.append(f"{self.name} {request.method} {request.path}")
            try:
                answer: web.StreamResponse = await handler(request)
            except web.HTTPException as error:
                return self.unknown(error)
            return answer

        application = web.Application(middlewares=[recorded], client_max_size=64 << 20)
        application.add_routes([*self.routes(), *more])
        self._runner = web.AppRunner(
            application, handler_cancellation=self.ends_with_client, shutdown_timeout=0
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def refuse(self) -> None:
        """From now on connections to its port are refused."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            self.cut_work()
            await runner.cleanup()

    async def die(self) -> None:
        """End as a process does: nothing is left."""
        await self.refuse()
        self.residue_mib = 0
        self.give_back()


@contextlib.asynccontextmanager
async def running(*services: StandIn) -> AsyncIterator[tuple[StandIn, ...]]:
    for service in services:
        await service.listen()
    try:
        yield services
    finally:
        for service in services:
            service.go.set()
            await service.refuse()


def card(directory: Path, total_mib: int = 16_000) -> Card:
    made = Card(directory)
    made.create(total_mib)
    return made


async def json_of(request: web.Request) -> dict[str, Any]:
    """Read the request's JSON, whatever type it says it has; {} where there is none."""
    body: dict[str, Any] = json.loads(await request.read() or b"{}")
    return body


async def form_of(request: web.Request) -> dict[str, bytes]:
    """Read the fields of a form in parts; {} where it is none."""
    boundary = re.search(r'boundary="?([^";]+)', request.headers.get("Content-Type", ""))
    body = await request.read()
    if boundary is None:
        return {}
    fields = {}
    for part in body.split(b"--" + boundary[1].encode())[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if name := re.search(rb'[; ]name="([^"]*)"', head):
            fields[name[1].decode()] = content.removesuffix(b"\r\n")
    return fields
