"""A stand-in for ComfyUI with its real page: what the page asks for is answered as recorded.

    async with comfyui(static, card, mib=13_000) as service:
        service.go.clear()     # a job that begins now stays in the middle of its sampling
        ...
        service.go.set()
        await service.stop()   # a crash: its sockets break, its memory and its jobs are gone
        await service.start()  # at the same port

Each route is there with /api before it and without. One job at a time; its messages go to the
sockets of its client, `status` to all. The first job takes the memory of a simulated card, and
/free gives it back once no job runs. Two sockets of one client are one too many for it: when the
older one closes, the newer one is forgotten.
"""

import asyncio
import contextlib
import json
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from tests.page.jobs import ENDS, Job
from tests.page.nodes import MODEL_FOLDERS, NODES
from tests.page.picture import picture
from tests.support.dev_http import Handler
from tests.support.gpu_service import NO_PROMPT, Card

NAME = "comfyui"
RESIDUE_MIB = 500
STEP_S = 0.15
LOADER = "UNETLoader"
SAMPLER = "KSampler"
PREVIEW = 4  # a binary message: a picture with a description of it
PICTURE_PX, PREVIEW_PX = 512, 128
FEATURES = {
    "supports_preview_metadata": True,
    "max_upload_size": 104857600,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}
# What the broker asks all the time; the page asks it under /api.
PROBES = {("GET", "/system_stats"), ("GET", "/prompt"), ("GET", "/queue")}
# Somebody has been here before, and likes to read small nodes.
SETTINGS: dict[str, Any] = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
# What never changes here.
ANSWERS: dict[str, Any] = {
    "/embeddings": [],
    "/experiment/models": [{"name": name, "folders": []} for name in MODEL_FOLDERS],
    "/extensions": [],
    "/features": FEATURES,
    "/global_subgraphs": {},
    "/i18n": {},
    "/node_replacements": {},
    "/object_info": NODES,
    "/users": {"storage": "server", "migrated": True},
    "/workflow_templates": {},
}


class Interrupted(Exception):  # noqa: N818 - no error: somebody wanted it
    pass


class ComfyUI:
    def __init__(self, static: Path, card: Card, mib: int) -> None:
        self.go = asyncio.Event()  # a job that samples waits for it
        self.go.set()
        self.calls: list[str] = []  # all but probes: method and path with its query
        self.settings = dict(SETTINGS)
        self.port = 0
        self._static = static
        self._card = card
        self._mib = mib
        self._runner: web.AppRunner | None = None
        self._worker: asyncio.Task[None] | None = None
        self._forget()

    def _forget(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self._transports: set[asyncio.BaseTransport] = set()
        self._number = 0
        self._wake = asyncio.Event()
        self._freeing = self._interrupted = False
        self._running: Job | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def in_state(self, *states: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.state in states]

    # --------------------------------------------------------------------------- its process

    async def start(self) -> None:
        self._forget()
        application = web.Application(middlewares=[self._guard], client_max_size=100 << 20)
        application.add_routes([*self._routes(""), *self._routes("/api")])
        application.router.add_get("/{file:.*}", self._file)
        self._runner = web.AppRunner(application, shutdown_timeout=0, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End as it does on SIGTERM: at once, and without a good-bye to its sockets."""
        if self._worker is None or self._runner is None:
            return
        self._worker.cancel()
        await asyncio.wait([self._worker])
        for transport in self._transports:
            transport.close()
        await self._runner.cleanup()
        self._card.give_back(NAME)
        self._worker = self._runner = None

    # ----------------------------------------------------------------------------- its routes

    def _routes(self, prefix: str) -> Iterator[web.RouteDef]:
        for path, answer in ANSWERS.items():
            yield web.get(prefix + path, _always(answer))
        for method, path, handler in (
            ("GET", "/ws", self._socket),
            ("GET", "/prompt", self._get_prompt),
            ("POST", "/prompt", self._post_prompt),
            ("GET", "/queue", self._get_queue),
            ("POST", "/queue", self._post_queue),
            ("POST", "/interrupt", self._post_interrupt),
            ("POST", "/free", self._post_free),
            ("GET", "/history", self._get_history),
            ("GET", "/history/{id}", self._get_history),
            ("GET", "/view", self._get_view),
            ("GET", "/system_stats", self._get_system_stats),
            ("GET", "/settings", self._get_settings),
            ("POST", "/settings/{id}", self._post_setting),
            ("GET", "/userdata", self._get_userdata),
        ):
            yield web.route(method, prefix + path, handler)
        if prefix:
            yield web.get(f"{prefix}/jobs", self._get_jobs)
            yield web.get(f"{prefix}/jobs/{{id}}", self._get_job)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Refuse pages of other origins, as it does for a host of this machine."""
        if (request.method, request.path) not in PROBES:
            self.calls.append(f"{request.method} {request.path_qs}")
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            return web.Response(status=403)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = (self._static / (request.match_info["file"] or "index.html")).resolve()
        if not path.is_relative_to(self._static) or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Cache-Control": "no-cache"})

    async def _get_prompt(self, _: web.Request) -> web.Response:
        return await _json(self._exec_info)

    @property
    def _exec_info(self) -> dict[str, Any]:
        return {"exec_info": {"queue_remaining": len(self.in_state("pending", "in_progress"))}}

    async def _post_prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not body.get("prompt"):
            return web.json_response(NO_PROMPT, status=400)
        now = _now_ms()
        extra = {**body.get("extra_data", {}), "create_time": now}
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        job = Job(self._number, body.get("prompt_id") or str(uuid.uuid4()), body["prompt"], extra)
        job.times["create_time"] = now
        self._number += 1
        self.jobs[job.id] = job
        await self._tell_status()
        self._wake.set()
        return await _json({"prompt_id": job.id, "number": job.number, "node_errors": {}})

    async def _get_queue(self, _: web.Request) -> web.Response:
        rows = {"queue_running": "in_progress", "queue_pending": "pending"}
        return await _json({k: [job.row for job in self.in_state(s)] for k, s in rows.items()})

    async def _post_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        for job in self.in_state("pending"):
            if body.get("clear") or job.id in body.get("delete", ()):
                del self.jobs[job.id]
        await self._tell_status()
        return web.Response()

    async def _post_interrupt(self, request: web.Request) -> web.Response:
        wanted = (await request.json()).get("prompt_id") if request.can_read_body else None
        if self._running is not None and wanted in {None, self._running.id}:
            self._interrupted = True
        return web.Response()

    async def _post_free(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._freeing = self._freeing or bool(body.get("unload_models") or body.get("free_memory"))
        self._wake.set()
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        wanted = request.match_info.get("id")
        over = [job for job in self.in_state(*ENDS) if wanted in {None, job.id}]
        rows = {
            job.id: {"prompt": job.row, "outputs": job.outputs, "status": job.status, "meta": {}}
            for job in over
        }
        return await _json(rows)

    async def _get_jobs(self, request: web.Request) -> web.Response:
        states = request.query.get("status", "pending,in_progress,completed,failed,cancelled")
        limit = int(request.query["limit"]) if "limit" in request.query else None
        found = [job.listed for job in reversed(self.in_state(*states.split(",")))]
        pages = {"offset": 0, "limit": limit, "total": len(found), "has_more": False}
        return await _json({"jobs": found[:limit], "pagination": pages})

    async def _get_job(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.json_response({"error": "Job not found"}, status=404)
        workflow = {"prompt": job.prompt, "extra_data": job.extra}
        return await _json({**job.listed, "outputs": job.outputs, "workflow": workflow})

    async def _get_view(self, request: web.Request) -> web.Response:
        images = (
            image
            for job in self.jobs.values()
            for out in job.outputs.values()
            for image in out["images"]
        )
        if not any(image["filename"] == request.query.get("filename") for image in images):
            return web.Response(status=404)
        return web.Response(body=picture(PICTURE_PX, 1.0), content_type="image/png")

    async def _get_system_stats(self, _: web.Request) -> web.Response:
        system = {
            "os": "linux",
            "comfyui_version": "0.27.0",
            "python_version": "3.11",
            "pytorch_version": "2.13.0",
            "embedded_python": False,
            "argv": ["main.py"],
            "ram_total": 16 << 30,
            "ram_free": 8 << 30,
            "deploy_environment": "local-git",
        }
        device = {
            "name": "simulated",
            "type": "cuda",
            "index": 0,
            "vram_total": 16_000 << 20,
            "vram_free": 8_000 << 20,
            "torch_vram_total": 0,
            "torch_vram_free": 0,
        }
        return await _json({"system": system, "devices": [device]})

    async def _get_settings(self, _: web.Request) -> web.Response:
        return await _json(self.settings)

    async def _post_setting(self, request: web.Request) -> web.Response:
        self.settings[request.match_info["id"]] = json.loads(await request.text())
        return web.Response()

    async def _get_userdata(self, _: web.Request) -> web.Response:
        return web.Response(status=404, text="Directory not found")

    # ------------------------------------------------------------------------------ its socket

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        assert request.transport is not None
        self._transports.add(request.transport)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[sid] = socket
        await self._tell("status", {"status": self._exec_info, "sid": sid}, sid)
        running = self._running
        if running is not None and running.extra.get("client_id") == sid:
            await self._tell("executing", {"node": self._node_of(running)}, sid)
        first = True
        async for message in socket:
            if first and message.type is WSMsgType.TEXT and "feature_flags" in message.data:
                await self._tell("feature_flags", FEATURES, sid)
            first = False
        self._transports.discard(request.transport)
        self.sockets.pop(sid, None)  # whoever has it by now
        return socket

    async def _tell(self, event: str, data: Any, sid: str | None = None) -> None:
        """Tell one client, or all."""
        message = json.dumps({"type": event, "data": data})
        await self._send([sid] if sid is not None else list(self.sockets), message)

    async def _send(self, sids: list[str], message: str | bytes) -> None:
        for sid in sids:
            if socket := self.sockets.get(sid):
                with contextlib.suppress(ConnectionError):
                    await (
                        socket.send_str(message)
                        if isinstance(message, str)
                        else socket.send_bytes(message)
                    )

    async def _tell_status(self) -> None:
        await self._tell("status", {"status": self._exec_info})

    # -------------------------------------------------------------------------------- its work

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            if self._freeing:
                self._freeing = False
                if NAME in self._card.held_mib:
                    self._card.take(NAME, RESIDUE_MIB)
            waiting = sorted(self.in_state("pending"), key=lambda job: job.number)
            if waiting:
                await self._run(waiting[0])
            else:
                await self._wake.wait()

    async def _run(self, job: Job) -> None:
        client = job.extra.get("client_id", "")
        self._running, self._interrupted = job, False
        job.state = "in_progress"
        job.times["execution_start_time"] = _now_ms()
        await self._tell_status()
        await self._about(job, "execution_start")
        await self._about(job, "execution_cached", nodes=[])
        state, told = "completed", {}
        try:
            for key in TopologicalSorter(_needs(job.prompt)).static_order():
                await self._node(job, key)
        except Interrupted:
            state = "cancelled"
        except MemoryError as error:
            state, told = "failed", _failure(self._node_of(job), error)
        await self._about(job, ENDS[state], **told)
        job.times["execution_end_time"] = _now_ms()
        job.state = state
        self._running = None
        await self._tell_status()
        await self._tell("executing", {"node": None, "prompt_id": job.id}, client)

    async def _node(self, job: Job, key: str) -> None:
        node = job.prompt[key]
        steps = node["inputs"]["steps"] if node["class_type"] == SAMPLER else 1
        await self._progress(job, key, 0, steps, "running")
        await self._about(job, "executing", node=key, display_node=key)
        if node["class_type"] == LOADER and not self._card.take(NAME, self._mib):
            raise MemoryError("Allocation on device")
        if node["class_type"] == SAMPLER:
            for step in range(1, steps + 1):
                await self._step(job, key, step, steps)
        if NODES[node["class_type"]]["output_node"]:
            name = f"{node['inputs']['filename_prefix']}_{job.number + 1:05}_.png"
            job.outputs[key] = {"images": [{"filename": name, "subfolder": "", "type": "output"}]}
            await self._about(job, "executed", node=key, display_node=key, output=job.outputs[key])
        await self._progress(job, key, steps, steps, "finished")

    async def _step(self, job: Job, key: str, step: int, steps: int) -> None:
        await asyncio.sleep(STEP_S)
        if step == steps // 2:
            await self.go.wait()
        if self._interrupted:
            raise Interrupted
        await self._progress(job, key, step, steps, "running")
        await self._about(job, "progress", value=step, max=steps, node=key)
        about = {"node_id": key, "display_node_id": key, "parent_node_id": None}
        told = json.dumps(
            {**about, "real_node_id": key, "prompt_id": job.id, "image_type": "image/png"}
        ).encode()
        head = struct.pack(">II", PREVIEW, len(told))
        message = head + told + picture(PREVIEW_PX, step / steps)
        await self._send([job.extra.get("client_id", "")], message)

    async def _progress(self, job: Job, key: str, value: float, most: float, state: str) -> None:
        ids = {"node_id": key, "display_node_id": key, "real_node_id": key}
        about = {"value": value, "max": most, "state": state, "prompt_id": job.id}
        job.nodes[key] = {**about, **ids, "parent_node_id": None}
        await self._about(job, "progress_state", nodes=job.nodes)

    async def _about(self, job: Job, event: str, **data: Any) -> None:
        """Tell the job's client; nobody else hears more than the status."""
        told = {"prompt_id": job.id, "timestamp": _now_ms(), **data}
        await self._tell(event, told, job.extra.get("client_id", ""))

    def _node_of(self, job: Job) -> str:
        return next(key for key, node in reversed(job.nodes.items()) if node["state"] == "running")


def _needs(prompt: dict[str, Any]) -> dict[str, set[str]]:
    """Give the nodes that each node takes something from."""
    return {
        key: {value[0] for value in node["inputs"].values() if isinstance(value, list)}
        for key, node in prompt.items()
    }


def _failure(key: str, error: Exception) -> dict[str, Any]:
    about = {"node_id": key, "node_type": LOADER, "executed": [], "traceback": []}
    said = {"exception_message": str(error), "exception_type": type(error).__name__}
    return {**about, **said, "current_inputs": {}, "current_outputs": []}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _always(content: Any) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response(content)

    return handler


async def _json(content: Any) -> web.Response:
    return web.json_response(content)


@contextlib.asynccontextmanager
async def comfyui(static: Path, card: Card, mib: int) -> AsyncIterator[ComfyUI]:
    service = ComfyUI(static, card, mib)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()
