"""whisper.cpp's server, as recorded.

Its traps: after a load that failed its health is an error for ever, though it works on with the
model that it had; only a load that succeeds heals it. To load a file that is no model ends the
process. It works on one request at a time, and a load waits for its turn like one.
"""

import asyncio
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, form_of

FORMATS = {
    "text": "text/html",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
}
VERBOSE = {"task": "transcribe", "language": "english", "duration": 2.4, "text": " Hello.\n"}
INVALID = "Invalid request"
MODEL = b"ggml"


class Whisper(StandIn):
    name = "whisper-server"

    def __init__(self, card: Card, mib: int = 2_100, **more: Any) -> None:
        super().__init__(card, mib, **more)
        self.disk = card.path.parent / "models"  # a file that begins with MODEL is one
        self.disk.mkdir(exist_ok=True)
        (self.disk / "tiny.bin").write_bytes(MODEL)
        self.model = "tiny.bin"
        self.healthy = True
        self._turn = asyncio.Lock()
        assert self.take()  # its model is there before its socket is

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/", self.page, allow_head=False),
            web.options("/{rest:.*}", self.page),
            web.post("/inference", self.inference),
            web.post("/load", self.load),
        ]

    def unknown(self, error: web.HTTPException) -> web.Response:
        status = 404 if error.status == 405 else error.status
        return web.Response(status=status, text="File Not Found")

    async def health(self, _request: web.Request) -> web.Response:
        if self.healthy:
            return web.json_response({"status": "ok"})
        return web.Response(status=404, text="File Not Found (/health)")

    async def page(self, request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return web.Response()
        return web.Response(text="<html></html>", content_type="text/html")

    async def inference(self, request: web.Request) -> web.StreamResponse:
        form = await form_of(request)
        if form.get("file", b"")[:4] != b"RIFF":
            return web.Response(status=400, text=INVALID)
        async with self._turn:
            wanted = form.get("response_format", b"json").decode()
            if wanted in FORMATS:
                answer = web.Response(text=" Hello.\n", content_type=FORMATS[wanted])
            elif wanted == "verbose_json":
                answer = web.json_response(VERBOSE)
            else:
                answer = web.json_response({"text": " Hello.\n"})
            answer.headers["X-Model"] = self.model  # for the tests' eyes: the real one tells nobody
            return await self.answer_work(request, answer)

    async def load(self, request: web.Request) -> web.StreamResponse:
        model = (await form_of(request)).get("model", b"").decode()
        async with self._turn:
            self.healthy = False
            if not model or not (self.disk / model).is_file():
                return web.Response(status=400, text=INVALID)
            if not (self.disk / model).read_bytes().startswith(MODEL):
                await self.exit(request)
                return web.Response(status=500)
            self.model, self.healthy = model, True
            return web.Response(text="Load was successful!", content_type="application/text")

    async def exit(self, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()
        self.card.give_back(self.name)
        asyncio.get_running_loop().call_soon(asyncio.ensure_future, self.refuse())
