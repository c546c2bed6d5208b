"""Speaches, by its source (routers/misc.py, routers/stt.py, executors/shared).

Its traps: a transcription goes on when its client has left; to unload a model in use is answered
with 409, and in versions that then take it off the list the model stays in memory for ever, where
no unload can name it; it does not tell how much its models hold.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, form_of, json_of


class Speaches(StandIn):
    name = "speaches"
    ends_with_client = False

    def __init__(self, card: Card, models: dict[str, int], **more: Any) -> None:
        super().__init__(card, **more)
        self.models = models  # MiB of each that is on disk
        self.listed: list[str] = []
        self.in_use = dict.fromkeys(models, 0)
        self.orphans: list[str] = []
        self.unloaded_status = 204  # 200 in its documentation

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/api/ps", self.ps),
            web.post("/api/ps/{model:.+}", self.load),
            web.delete("/api/ps/{model:.+}", self.unload),
            web.post("/v1/audio/transcriptions", self.transcribe),
            web.post("/v1/audio/speech", self.speak),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def ps(self, _request: web.Request) -> web.Response:
        return web.json_response({"models": self.listed})

    async def load(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if model not in self.models:
            return web.Response(status=404, text="Model not found")
        if model in self.listed:
            return web.Response(status=409, text="Model already loaded")
        return web.Response(status=201 if self._load(model) else 500)

    async def unload(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        if model not in self.listed:
            return web.Response(status=404, text="Model not found")
        self.listed.remove(model)
        if self.in_use[model]:
            self.orphans.append(model)
            return web.Response(status=409, text=f"Model {model} is still in use")
        self.give_back(f"/{model}")
        return web.Response(status=self.unloaded_status)

    async def transcribe(self, request: web.Request) -> web.StreamResponse:
        form = await form_of(request)
        if "file" not in form or "model" not in form:
            return web.json_response({"detail": [{"type": "missing"}]}, status=422)
        return await self._use(
            request, form["model"].decode(), web.json_response({"text": "Hello."})
        )

    async def speak(self, request: web.Request) -> web.StreamResponse:
        model = (await json_of(request)).get("model", "")
        return await self._use(request, model, web.Response(body=b"RIFF", content_type="audio/wav"))

    async def _use(
        self, request: web.Request, model: str, answer: web.Response
    ) -> web.StreamResponse:
        if model not in self.models:
            return web.json_response({"detail": f"Model '{model}' is not installed"}, status=404)
        if model not in self.listed and not self._load(model):
            return web.Response(status=500, text="Internal Server Error")
        self.in_use[model] += 1
        try:
            return await self.answer_work(request, answer)
        finally:
            self.in_use[model] -= 1

    def _load(self, model: str) -> bool:
        """Load it, beside itself where it is an orphan."""
        copy = "+" * self.orphans.count(model)
        if self.take(f"/{model}{copy}", self.models[model]):
            self.listed.append(model)
            return True
        return False
