"""mvoice, by the routes that hosts with it declare: nothing else is known of it."""

from aiohttp import web

from tests.support.stand_ins.base import StandIn


class Mvoice(StandIn):
    name = "mvoice"

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.post("/tts", self.speak),
            web.post("/stt", self.hear),
            web.post("/load", self.load),
            web.post("/unload", self.unload),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def speak(self, request: web.Request) -> web.StreamResponse:
        sound = web.Response(body=b"RIFF", content_type="audio/wav")
        return await self._work(request, sound)

    async def hear(self, request: web.Request) -> web.StreamResponse:
        return await self._work(request, web.json_response({"text": "Hello."}))

    async def _work(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        if not self.loaded:
            return web.Response(status=503, text="not loaded")
        return await self.answer_work(request, answer)

    async def load(self, _request: web.Request) -> web.Response:
        enough = self.loaded or self.take()
        return web.Response(status=200 if enough else 500)

    async def unload(self, _request: web.Request) -> web.Response:
        self.cut_work()
        self.give_back()
        return web.Response()
