"""KoboldCpp with its admin routes, by its source (koboldcpp.py 1.102).

Its trap: to load and to unload it starts anew, and meanwhile connections are refused, for as long
as the load takes. A refusal of such an order is a 200 as well.
"""

import asyncio
from typing import Any

from aiohttp import web

from tests.support.gpu_service import Card
from tests.support.stand_ins.base import StandIn, json_of
from tests.support.stand_ins.vllm import CHAT


class KoboldCpp(StandIn):
    name = "koboldcpp"

    def __init__(
        self,
        card: Card,
        mib: int = 6_000,
        *,
        admin: bool = True,
        restart_s: float = 0.1,
        **more: Any,
    ) -> None:
        super().__init__(card, mib, **more)
        self.admin, self.restart_s = admin, restart_s
        self._restart: asyncio.Task[None] | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/api/extra/version", self.version),
            web.get("/api/v1/model", self.model),
            web.get("/api/extra/perf", self.perf),
            web.post("/api/admin/reload_config", self.reload),
            web.post("/v1/chat/completions", self.chat),
        ]

    async def version(self, _request: web.Request) -> web.Response:
        return web.json_response({"result": "KoboldCpp", "version": "1.102", "admin": 2})

    async def model(self, _request: web.Request) -> web.Response:
        return web.json_response({"result": "koboldcpp/one" if self.loaded else "inactive"})

    async def perf(self, _request: web.Request) -> web.Response:
        idle = int(not self.working)
        return web.json_response({"last_process": 0, "queue": 0, "idle": idle, "uptime": 60})

    async def reload(self, request: web.Request) -> web.Response:
        filename = (await json_of(request)).get("filename")
        if not self.admin or filename not in {"unload_model", "initial_model", "one.kcpps"}:
            return web.json_response({"success": False})
        self._restart = asyncio.create_task(self._start_anew(load=filename != "unload_model"))
        return web.json_response({"success": True})

    async def _start_anew(self, *, load: bool) -> None:
        await asyncio.sleep(0)  # let the answer go out
        port = self.port
        await self.refuse()
        self.give_back()
        await asyncio.sleep(self.restart_s)
        if load:
            self.take()
        await self.listen(port)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        if not self.loaded:
            return web.json_response({"detail": {"type": "service_unavailable"}}, status=503)
        return await self.answer_work(request, web.json_response(CHAT))
