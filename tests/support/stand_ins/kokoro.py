"""Kokoro-FastAPI, by its source (api/src/routers).

Its traps: an unload does not look at the work under way; without ALLOW_DEV_UNLOAD it is a 403; the
next request loads the model again.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn


class Kokoro(StandIn):
    name = "kokoro"

    def __init__(
        self, card: Card, mib: int = 2_500, *, may_unload: bool = True, **more: Any
    ) -> None:
        super().__init__(card, mib, **more)
        self.may_unload = may_unload

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/v1/audio/voices", self.voices),
            web.post("/v1/audio/speech", self.speak),
            web.post("/dev/unload", self.unload),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    async def voices(self, _request: web.Request) -> web.Response:
        return web.json_response({"voices": ["af_heart"]})

    async def speak(self, request: web.Request) -> web.StreamResponse:
        if not self.loaded and not self.take():
            return web.json_response({"detail": {"error": "processing_error"}}, status=500)
        sound = web.Response(body=b"ID3", content_type="audio/mpeg")
        return await self.answer_work(request, sound)

    async def unload(self, _request: web.Request) -> web.Response:
        if not self.may_unload:
            return web.json_response({"detail": "Forbidden"}, status=403)
        self.cut_work()
        self.give_back()
        return web.json_response({"status": "unloaded"})
