"""A stand-in for ComfyUI, in this process: it takes a prompt, answers, and works until it is told.

    async with comfyui() as service:
        ...                               # a client posts a prompt, and is answered at once
        service.end(service.running[0])   # now the work is over, and the next one begins

It behaves as recorded: one prompt at a time; what is over, in /history; `delete` acts on what
waits, `interrupt` on what runs; both answer 200 whatever they find.

With a card its first prompt takes memory. POST /free only sets a flag. Its worker acts on it after
the prompt that runs; while it handles an earlier one, or collects garbage, the flag wakes nobody
and stays until the next prompt's end or the next /free.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from mgpu_effects import presets
from tests.support.gpu_service import NO_PROMPT, Card

RESIDUE_MIB = 500  # the CUDA context

Service = TypeVar("Service", bound="ComfyUI")


@dataclass
class ComfyUI:
    runner: web.AppRunner
    url: str = ""
    running: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    taken: int = 0
    numbers: dict[str, float] = field(default_factory=dict)  # the lowest is next
    history: dict[str, Any] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # but probes: method and path
    bodies: list[Any] = field(default_factory=list)  # of the POSTs among them
    headers: dict[str, str] = field(default_factory=dict)  # of the last prompt
    # To answer in place of what it would, by path.
    instead: dict[str, web.Response] = field(default_factory=dict)
    hold: asyncio.Event | None = None  # to wait for before a prompt is answered
    hold_all: asyncio.Event | None = None  # the same for anything
    card: Card | None = None
    mib: int = 13_000
    frees_s: float = 0.05  # how long its worker takes to give memory back
    collecting: bool = False  # its worker is at something else than prompts and flags
    flagged: bool = False  # by a /free that it has not acted on
    freed: int = 0  # how often it acted on one

    def end(self, prompt_id: str, status: str = "success") -> None:
        """Let what runs be over; the next one begins at once."""
        self.running.remove(prompt_id)
        images = [
            {"filename": "preview.png", "subfolder": "", "type": "temp"},
            {"filename": "a b&c.png", "subfolder": "of/today", "type": "output"},
        ]
        self.history[prompt_id] = {
            "outputs": {"9": {"images": images}} if status == "success" else {},
            "status": {"status_str": status, "completed": status == "success", "messages": []},
        }
        self._act_on_flag()
        self._begin()

    def times(self, call: str) -> int:
        return self.calls.count(call)

    async def die(self) -> None:
        """From now on its port refuses connections."""
        await self.runner.cleanup()

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Give what its preset says of it, with its rounds of questions close by."""
        comfyui = presets.preset("comfyui").consumer
        job = {**comfyui["job"], "poll_s": 0.02, **changes.pop("job", {})}
        host = {"url": self.url, "vram_resident_mib": 13_000}
        return {**comfyui, **host, "job": job, **changes}

    def _begin(self) -> None:
        if self.pending and not self.running:
            self.running.append(self.pending.pop(0))
            if self.card is not None:
                assert self.card.take("comfyui", self.mib), "out of memory"

    def _flag(self, body: dict[str, Any]) -> None:
        self.flagged = self.flagged or bool(body.get("unload_models") or body.get("free_memory"))
        if not self.running and not self.collecting:
            self._act_on_flag()

    def _act_on_flag(self) -> None:
        if self.flagged:
            self.flagged, self.collecting = False, True
            asyncio.get_running_loop().call_later(self.frees_s, self._free)

    def _free(self) -> None:
        self.collecting = False
        self.freed += 1
        if self.card is not None:
            self.card.take("comfyui", RESIDUE_MIB)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/system_stats":
            return web.json_response({})
        if (request.method, request.path) == ("GET", "/prompt"):
            remaining = len(self.running) + len(self.pending)
            return web.json_response({"exec_info": {"queue_remaining": remaining}})
        self.calls.append(f"{request.method} {request.path}")
        body = await request.json() if request.can_read_body else {}
        if request.method == "POST":
            self.bodies.append(body)
        answer = await self._act(request, body)
        if self.hold_all is not None:
            await self.hold_all.wait()
        instead = self.instead.get(request.path)
        if instead is None:
            return answer
        return web.Response(status=instead.status, body=instead.body, headers=instead.headers)

    async def _act(self, request: web.Request, body: Any) -> web.Response:
        match request.method, request.path:
            case "POST", "/prompt":
                return await self._prompt(request, body)
            case "POST", "/queue":
                gone = self.pending if body.get("clear") else body.get("delete", [])
                self.pending = [each for each in self.pending if each not in gone]
            case "POST", "/interrupt" if body["prompt_id"] in self.running:
                self.end(body["prompt_id"], "error")
            case "POST", "/free":
                self._flag(body)
            case "GET", "/queue":
                queue = {"queue_running": self.running, "queue_pending": self.pending}
                rows = {key: [[0, each, {}, {}, []] for each in ids] for key, ids in queue.items()}
                return web.json_response(rows)
            case "GET", path if path.startswith("/history/"):
                wanted = request.match_info["rest"].removeprefix("history/")
                found = {wanted: self.history[wanted]} if wanted in self.history else {}
                return web.json_response(found)
            case "GET", "/view":
                shown = "{type}:{subfolder}/{filename}".format(**request.query)
                return web.Response(text=shown, content_type="image/png")
        return web.Response()

    async def _prompt(self, request: web.Request, body: Any) -> web.Response:
        if not body.get("prompt"):
            return web.json_response(NO_PROMPT, status=400)
        self.headers = dict(request.headers)
        prompt_id = body.get("prompt_id", str(uuid.uuid4()))
        number = body.get("number", -self.taken if body.get("front") else self.taken)
        self.taken += 1
        self.numbers[prompt_id] = number
        self.pending = sorted([*self.pending, prompt_id], key=self.numbers.__getitem__)
        self._begin()
        if self.hold is not None:
            await self.hold.wait()
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": {}})


@contextlib.asynccontextmanager
async def comfyui(
    made: Callable[..., Service] = ComfyUI, port: int = 0, **habits: Any
) -> AsyncIterator[Service]:
    application = web.Application()
    service = made(web.AppRunner(application, shutdown_timeout=0), **habits)
    application.router.add_route("*", "/{rest:.*}", service.answer)
    await service.runner.setup()
    site = web.TCPSite(service.runner, "127.0.0.1", port)
    await site.start()
    service.url = f"http://127.0.0.1:{service.runner.addresses[0][1]}"
    try:
        yield service
    finally:
        await service.die()
