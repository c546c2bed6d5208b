"""TabbyAPI, by its source (endpoints/core/router.py, common/model.py).

Its traps: an unload cancels the work under way; without a model its routes answer an error (400,
later 503) in place of telling so; a load answers with its progress, and is done when that ends.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, json_of
from tests.support.stand_ins.vllm import CHAT

KEY = "secret"


class TabbyApi(StandIn):
    name = "tabbyapi"

    def __init__(
        self, card: Card, mib: int = 6_000, *, absent_status: int = 503, **more: Any
    ) -> None:
        super().__init__(card, mib, **more)
        self.absent_status = absent_status

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/v1/model", self.model),
            web.post("/v1/model/load", self.load),
            web.post("/v1/model/unload", self.unload),
            web.post("/v1/chat/completions", self.chat),
        ]

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy", "issues": []})

    async def model(self, _request: web.Request) -> web.Response:
        if not self.loaded:
            return self._absent()
        return web.json_response({"id": "one", "object": "model", "owned_by": "tabbyAPI"})

    async def load(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("x-admin-key") != KEY:
            return web.json_response({"detail": "Invalid admin key"}, status=401)
        if not (await json_of(request)).get("model_name"):
            return web.json_response({"detail": "A model name was not provided"}, status=400)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b'data: {"module": 1, "modules": 2, "status": "processing"}\n\n')
        status = b"finished" if self.loaded or self.take() else b"error"
        await answer.write(b'data: {"module": 2, "modules": 2, "status": "%s"}\n\n' % status)
        await answer.write_eof()
        return answer

    async def unload(self, request: web.Request) -> web.Response:
        if request.headers.get("x-admin-key") != KEY:
            return web.json_response({"detail": "Invalid admin key"}, status=401)
        if not self.loaded:
            return self._absent()
        self.cut_work()
        self.give_back()
        return web.json_response(None)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if not self.loaded:
            return self._absent()
        return await self.answer_work(request, web.json_response(CHAT))

    def _absent(self) -> web.Response:
        detail = {"detail": "No models are currently loaded."}
        return web.json_response(detail, status=self.absent_status)
