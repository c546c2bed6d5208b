"""Ollama, by its API's documentation and its source (docs/api.md, server/routes.go).

Its traps: an unload is answered at once and done after the requests under way; `size_vram` is the
weights and the cache without the CUDA context; without room a model works on the processor.
"""

import asyncio
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, json_of

CONTEXT_MIB = 600
UNLOADS_S = 0.05
MESSAGE = {"role": "assistant", "content": "Hello."}
SAID = {"response": "Hello.", "message": MESSAGE, "choices": [{"index": 0, "message": MESSAGE}]}
CHAT_KEYS = {"/api/chat": "message", "/v1/chat/completions": "choices"}


class Ollama(StandIn):
    name = "ollama"

    def __init__(self, card: Card, models: dict[str, int], **more: Any) -> None:
        super().__init__(card, **more)
        self.models = models  # MiB of each as the card shows it
        self.sizes_mib: dict[str, int] = {}  # of those that are loaded, as it tells them
        self.busy = dict.fromkeys(models, 0)
        self.going: set[str] = set()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.root),
            web.get("/api/version", self.version),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.ps),
            web.post("/api/generate", self.generate),
            web.post("/api/chat", self.chat),
            web.post("/v1/chat/completions", self.chat),
            web.get("/v1/models", self.listed),
        ]

    async def root(self, _request: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "0.17.0"})

    async def tags(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {"models": [{"name": each, "model": each} for each in self.models]}
        )

    async def listed(self, _request: web.Request) -> web.Response:
        rows = [{"id": each, "object": "model", "owned_by": "library"} for each in self.models]
        return web.json_response({"object": "list", "data": rows})

    async def ps(self, _request: web.Request) -> web.Response:
        rows = [
            {
                "name": model,
                "model": model,
                "size": (self.models[model] - CONTEXT_MIB) << 20,
                "size_vram": mib << 20,
                "expires_at": "2318-03-02T01:02:03Z",
                "context_length": 4096,
            }
            for model, mib in self.sizes_mib.items()
        ]
        return web.json_response({"models": rows})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await json_of(request)
        model = body.get("model", "")
        if model not in self.models:
            return self._no_model(model)
        if body.get("prompt"):
            return await self._served(request, model, "response")
        if body.get("keep_alive") == 0:
            self._expire(model)
            return web.json_response(self._done(model, "unload"))
        self._load(model)
        return web.json_response(self._done(model, "load"))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await json_of(request)
        model = body.get("model", "")
        if model not in self.models:
            return self._no_model(model)
        return await self._served(request, model, CHAT_KEYS[request.path])

    async def _served(self, request: web.Request, model: str, key: str) -> web.StreamResponse:
        self._load(model)
        self.busy[model] += 1
        try:
            answer = {**self._done(model, "stop"), key: SAID[key]}
            return await self.answer_work(request, web.json_response(answer))
        finally:
            self.busy[model] -= 1
            if model in self.going and not self.busy[model]:
                self._expire(model)

    def _load(self, model: str) -> None:
        if model not in self.sizes_mib:
            mib = self.models[model]
            fits = self.card.free_mib >= mib and self.take(f"/{model}", mib)
            self.sizes_mib[model] = self.models[model] - CONTEXT_MIB if fits else 0
        self.going.discard(model)

    def keep_alive_ends(self) -> None:
        """Whatever is loaded goes by itself."""
        for model in tuple(self.sizes_mib):
            self._expire(model)

    def _expire(self, model: str) -> None:
        if self.busy[model]:
            self.going.add(model)
        else:
            asyncio.get_running_loop().call_later(UNLOADS_S, self._unload, model)

    def _unload(self, model: str) -> None:
        if not self.busy[model]:
            self.going.discard(model)
            self.sizes_mib.pop(model, None)
            self.give_back(f"/{model}")

    def _done(self, model: str, reason: str) -> dict[str, Any]:
        return {
            "model": model,
            "created_at": "2026-11-21T10:00:00Z",
            "response": "",
            "done": True,
            "done_reason": reason,
        }

    def _no_model(self, model: str) -> web.Response:
        return web.json_response({"error": f"model '{model}' not found"}, status=404)
