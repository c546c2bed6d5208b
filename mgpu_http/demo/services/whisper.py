"""A stand-in for whisper.cpp's server: it hears, one request after the other.

Its vices: its model is in memory as long as the process lives, its socket opens only when that is
loaded, a stopped one finishes all that it has begun with, and its errors say nothing. A client that
goes ends its own work, which is a virtue.
"""

import asyncio
from collections.abc import Iterable

from aiohttp import web
from attrs import define, field

from mgpu_http.demo.services.common import Service, content_of
from mgpu_http.demo.services.sound import SoundError, heard

RESIDENT_MIB = 2_100
WORK_MIB = 200  # more, while it works
LOAD_S = 0.7
WORK_S = (0.2, 0.6)


@define(eq=False)
class WhisperServer(Service):
    finishes_requests = True
    aborts_for_gone_clients = True

    _turn: asyncio.Lock = field(factory=asyncio.Lock, init=False)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/health", self._health), web.post("/inference", self._inference)]

    def models_mib(self) -> Iterable[int]:
        return [RESIDENT_MIB] if self.held_mib >= RESIDENT_MIB else []

    async def prepare(self) -> None:
        await self.take(RESIDENT_MIB, LOAD_S)
        await self.card.say("load", RESIDENT_MIB)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _inference(self, request: web.Request) -> web.Response:
        try:
            text = heard(await content_of(request, raw=False))
        except SoundError:
            return web.Response(status=400, text="Invalid request")
        async with self._turn:
            try:
                await self.hold(RESIDENT_MIB + WORK_MIB)
                await asyncio.sleep(self.chance.uniform(*WORK_S))
            finally:
                await self.hold(RESIDENT_MIB)
        return web.json_response({"text": f" {text}\n"})
