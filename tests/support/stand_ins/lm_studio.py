"""LM Studio, by the documentation of its REST API (v1).

Its traps: a second load of a model makes a second instance under another name; with just-in-time
loading, which is on unless switched off, a request loads by itself.
"""

from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, json_of
from tests.support.stand_ins.vllm import CHAT


class LmStudio(StandIn):
    name = "lm-studio"

    def __init__(self, card: Card, models: dict[str, int], **more: Any) -> None:
        super().__init__(card, **more)
        self.models = models
        self.instances: dict[str, str] = {}  # the model of each

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/v1/models", self.list),
            web.post("/api/v1/models/load", self.load),
            web.post("/api/v1/models/unload", self.unload),
            web.post("/v1/chat/completions", self.chat),
        ]

    async def list(self, _request: web.Request) -> web.Response:
        rows = [
            {
                "type": "llm",
                "key": model,
                "size_bytes": mib << 20,
                "loaded_instances": [
                    {"id": one, "config": {}} for one, its in self.instances.items() if its == model
                ],
            }
            for model, mib in self.models.items()
        ]
        return web.json_response({"models": rows})

    async def load(self, request: web.Request) -> web.Response:
        model = (await json_of(request)).get("model", "")
        if model not in self.models:
            return web.json_response({"error": {"type": "model_not_found"}}, status=404)
        number = 1 + list(self.instances.values()).count(model)
        instance = model if number == 1 else f"{model}:{number}"
        if not self.take(f"/{instance}", self.models[model]):
            return web.json_response({"error": {"type": "model_load_failed"}}, status=500)
        self.instances[instance] = model
        told = {"type": "llm", "instance_id": instance, "load_time_seconds": 1.0}
        return web.json_response({**told, "status": "loaded"})

    async def unload(self, request: web.Request) -> web.Response:
        instance = (await json_of(request)).get("instance_id", "")
        if instance not in self.instances:
            return web.json_response({"error": {"type": "model_not_found"}}, status=404)
        self.cut_work()
        del self.instances[instance]
        self.give_back(f"/{instance}")
        return web.json_response({"instance_id": instance})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        model = (await json_of(request)).get("model", "")
        if model not in self.instances.values():
            return web.json_response({"error": {"type": "model_not_loaded"}}, status=400)
        return await self.answer_work(request, web.json_response(CHAT))
