"""llama.cpp's server with one model, as recorded.

Its traps: while it loads every path is a 503; it has no unload; a stream ends with its client at
once.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn

USAGE = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
CHOICE = {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "Hi."}}
ROW = {"id": "gemma.gguf", "object": "model", "owned_by": "llamacpp"}


def refused(message: str, kind: str, status: int) -> web.Response:
    error = {"message": message, "type": kind, "code": status}
    return web.json_response({"error": error}, status=status)


class LlamaServer(StandIn):
    name = "llama-server"

    def __init__(self, card: Card, mib: int = 4_000, *, loading: bool = False, **more: Any) -> None:
        super().__init__(card, mib, **more)
        self.loading = loading
        assert self.take()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/v1/health", self.health),
            web.get("/v1/models", self.models),
            web.get("/models", self.models),
            web.get("/props", self.props),
            web.get("/slots", self.slots),
            web.options("/{rest:.*}", self.preflight),
            web.post("/v1/chat/completions", self.chat),
        ]

    def unknown(self, error: web.HTTPException) -> web.Response:
        if self.loading:
            return self._not_yet()
        return refused("File Not Found", "not_found_error", 404)

    async def health(self, _request: web.Request) -> web.Response:
        return self._not_yet() if self.loading else web.json_response({"status": "ok"})

    async def models(self, _request: web.Request) -> web.Response:
        if self.loading:
            return self._not_yet()
        return web.json_response({"object": "list", "data": [ROW]})

    async def props(self, _request: web.Request) -> web.Response:
        return self._not_yet() if self.loading else web.json_response({"total_slots": 2})

    async def slots(self, _request: web.Request) -> web.Response:
        rows = [{"id": at, "n_ctx": 1024, "is_processing": at < self.working} for at in range(2)]
        return web.json_response(rows)

    async def preflight(self, _request: web.Request) -> web.Response:
        return web.Response(content_type="text/html")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if self.loading:
            return self._not_yet()
        try:
            asked = await request.json()
        except ValueError:
            return refused("parse error", "invalid_request_error", 400)
        if "messages" not in asked:
            return refused("'messages' is required", "invalid_request_error", 400)
        told = {"choices": [CHOICE], "model": "gemma.gguf", "object": "chat.completion"}
        answer = web.json_response({**told, "usage": USAGE})
        if asked.get("stream"):
            text = 'data: {"choices": []}\n\ndata: [DONE]\n\n'
            answer = web.Response(text=text, content_type="text/event-stream")
        return await self.answer_work(request, answer)

    def _not_yet(self) -> web.Response:
        return refused("Loading model", "unavailable_error", 503)
