"""vLLM with sleep mode, by its documentation (features/sleep_mode) and its API server.

Its traps: it claims its memory when it starts; asleep it keeps a CUDA context; a sleep aborts the
work under way; without development mode the routes of sleep are not there.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn

CHAT = {
    "id": "chat-1",
    "object": "chat.completion",
    "choices": [{"message": {"content": "Hello."}}],
}


class Vllm(StandIn):
    name = "vllm"
    residue_mib = 1_024

    def __init__(
        self, card: Card, mib: int = 12_000, *, dev_mode: bool = True, **more: Any
    ) -> None:
        super().__init__(card, mib, **more)
        self.dev_mode = dev_mode
        assert self.take(), "it needs all of it to start"

    def routes(self) -> list[web.RouteDef]:
        always = [
            web.get("/health", self.health),
            web.get("/v1/models", self.models),
            web.post("/v1/chat/completions", self.chat),
        ]
        sleep = [
            web.get("/is_sleeping", self.is_sleeping),
            web.post("/sleep", self.sleep),
            web.post("/wake_up", self.wake_up),
        ]
        return always + (sleep if self.dev_mode else [])

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "one", "object": "model"}]})

    async def is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": not self.loaded})

    async def sleep(self, request: web.Request) -> web.Response:
        assert request.query.get("level", "1") in {"1", "2"}
        if request.query.get("mode", "abort") == "abort":
            self.cut_work()
        self.give_back()
        return web.Response()

    async def wake_up(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.take() else 500)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if not self.loaded:
            return web.json_response({"error": {"message": "asleep"}}, status=503)
        return await self.answer_work(request, web.json_response(CHAT))
