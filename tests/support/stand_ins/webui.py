"""AUTOMATIC1111's web UI and Forge, by their source (modules/api/api.py, shared_state.py).

Their traps: the memory that they tell is the whole card's; an unload does not wait for the job
under way; `job_count` is -1 while a job begins, before it is a number of pictures; a picture whose
client has left is drawn to its end; Forge's reload does nothing, its next job loads the model.
"""

import asyncio
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn

PICTURE = {"images": ["iVBORw0KGgo="], "parameters": {}, "info": "{}"}


class Automatic1111(StandIn):
    name = "automatic1111"
    ends_with_client = False
    residue_mib = 500

    def __init__(self, card: Card, mib: int = 7_000, **more: Any) -> None:
        super().__init__(card, mib, **more)
        self.begins = False  # a job under way has not told yet how many pictures it makes
        self._turn = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/sdapi/v1/memory", self.memory),
            web.get("/sdapi/v1/options", self.options),
            web.get("/sdapi/v1/progress", self.progress),
            web.post("/sdapi/v1/txt2img", self.draw),
            web.post("/sdapi/v1/unload-checkpoint", self.unload),
            web.post("/sdapi/v1/reload-checkpoint", self.reload),
        ]

    async def memory(self, _request: web.Request) -> web.Response:
        used = sum(self.card.held_mib.values()) << 20
        total = 16_000 << 20
        system = {"free": total - used, "used": used, "total": total}
        return web.json_response({"ram": {}, "cuda": {"system": system}})

    async def options(self, _request: web.Request) -> web.Response:
        return web.json_response({"sd_model_checkpoint": "one.safetensors"})

    async def progress(self, _request: web.Request) -> web.Response:
        count = (-1 if self.begins else 1) if self.working else 0
        state = {"job": "txt2img" if count else "", "job_count": count, "job_no": 0}
        return web.json_response({"progress": 0.0, "eta_relative": 0.0, "state": state})

    async def draw(self, request: web.Request) -> web.StreamResponse:
        async with self._turn:
            if not self.loaded and not self.take():
                return web.json_response({"error": "OutOfMemoryError"}, status=500)
            return await self.answer_work(request, web.json_response(PICTURE))

    async def unload(self, _request: web.Request) -> web.Response:
        self.cut_work()
        self.give_back()
        return web.json_response({})

    async def reload(self, _request: web.Request) -> web.Response:
        if not self.loaded and not self.take():
            return web.json_response({"error": "OutOfMemoryError"}, status=500)
        return web.json_response({})


class Forge(Automatic1111):
    name = "forge"

    async def reload(self, _request: web.Request) -> web.Response:
        return web.json_response({})
