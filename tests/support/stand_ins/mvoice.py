"""mvoice, by the routes that hosts with it declare: nothing else is known of it."""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn


class Mvoice(StandIn):
    """`load_mib` is what it holds while it loads, where that is more."""

    name = "mvoice"

    def __init__(self, card: Card, mib: int = 6_000, *, load_mib: int = 0, **more: Any) -> None:
        super().__init__(card, mib, **more)
        self.load_mib = max(mib, load_mib)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.post("/tts", self.speak),
            web.post("/stt", self.hear),
            web.post("/load", self.load),
            web.post("/unload", self.unload),
            web.get("/audio/{name}", self.sound),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def speak(self, request: web.Request) -> web.StreamResponse:
        sound = web.Response(body=b"RIFF", content_type="audio/wav")
        return await self._work(request, sound)

    async def sound(self, request: web.Request) -> web.Response:
        return web.Response(text=f"sound of {request.match_info['name']}")

    async def hear(self, request: web.Request) -> web.StreamResponse:
        return await self._work(request, web.json_response({"text": "Hello."}))

    async def _work(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        if not self.loaded:
            return web.Response(status=503, text="not loaded")
        return await self.answer_work(request, answer)

    async def load(self, _request: web.Request) -> web.Response:
        enough = self.loaded or (self.take(mib=self.load_mib) and self.take())
        return web.Response(status=200 if enough else 500)

    async def unload(self, _request: web.Request) -> web.Response:
        self.cut_work()
        self.give_back()
        return web.Response()
