"""A stand-in for ComfyUI: a queue of jobs, of which one at a time makes a picture.

Its vices: a job is accepted long before its work is done, the first one loads everything and
nothing goes by itself, `/free` is only a flag that the worker looks at between two jobs, a second
`/free` right after a first may go unseen, all of it hangs while it collects its garbage, and some
of its memory never comes back.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from aiohttp import web
from attrs import define, field

from mgpu_http.demo.services.common import Service

CONTEXT_MIB = 500  # from the first job on, for good
MODELS_MIB = 12_500
LOAD_S = 1.5
WORK_S = (0.8, 1.8)
PROGRESS_S = 0.05  # between two looks at whether the job was interrupted
GARBAGE_S = 0.15
JOB_FAILURE_RATE = 0.04
MAX_PENDING = 100
MAX_HISTORY = 1_000
VERSION = "0.27.0"
OUTPUT_NODES = {"SaveImage", "PreviewImage"}

Json = dict[str, Any]
Item = tuple[float, str, Json, Json, list[str]]  # number, prompt_id, prompt, extra_data, outputs


class PromptError(Exception):
    """A prompt that is refused; `type`, `message` and `details` are for the client."""

    def __init__(self, kind: str, message: str, details: str = "", **extra_info: Any) -> None:
        super().__init__(message)
        error = {"type": kind, "message": message, "details": details, "extra_info": extra_info}
        self.response = web.json_response({"error": error, "node_errors": {}}, status=400)


class JobError(Exception):
    """A job failed, for a reason of its own."""


class Interrupted(Exception):  # noqa: N818 - no error
    """Somebody did not want the job any more."""


@define(eq=False)
class ComfyUI(Service):
    _pending: list[Item] = field(factory=list, init=False)
    _running: Item | None = field(default=None, init=False)
    _history: dict[str, Json] = field(factory=dict, init=False)
    _accepted: int = field(default=0, init=False)
    _loaded: bool = field(default=False, init=False)
    _free: bool = field(default=False, init=False)  # the flag
    _interrupted: bool = field(default=False, init=False)
    _wake: asyncio.Event = field(factory=asyncio.Event, init=False)

    def routes(self) -> list[web.RouteDef]:
        handlers = [
            (web.get, "/system_stats", self._system_stats),
            (web.get, "/queue", self._queue),
            (web.post, "/queue", self._change_queue),
            (web.get, "/prompt", self._exec_info),
            (web.post, "/prompt", self._submit),
            (web.get, "/history", self._all_history),
            (web.get, "/history/{prompt_id}", self._history_of),
            (web.post, "/free", self._set_free),
            (web.post, "/interrupt", self._interrupt),
        ]
        return [
            make(prefix + path, handler)
            for prefix in ("", "/api")
            for make, path, handler in handlers
        ]

    def models_mib(self) -> Iterable[int]:
        return [MODELS_MIB] if self._loaded else []

    async def begin(self) -> None:
        self.tasks.create_task(self._work())

    # ------------------------------------------------------------------------------------- seeing

    async def _system_stats(self, _: web.Request) -> web.Response:
        torch_bytes = max(0, self.held_mib - CONTEXT_MIB) * 2**20
        device = {
            "name": "cuda:0 simulated : native",
            "type": "cuda",
            "index": 0,
            "vram_total": self.card.total_mib * 2**20,
            "vram_free": await self.card.free_mib() * 2**20,
            "torch_vram_total": torch_bytes,
            "torch_vram_free": 0,
        }
        system = {"os": "linux", "comfyui_version": VERSION, "argv": ["main.py"]}
        return web.json_response({"system": system, "devices": [device]})

    async def _queue(self, _: web.Request) -> web.Response:
        running = [self._running] if self._running else []
        return web.json_response({"queue_running": running, "queue_pending": self._pending})

    async def _exec_info(self, _: web.Request) -> web.Response:
        remaining = len(self._pending) + bool(self._running)
        return web.json_response({"exec_info": {"queue_remaining": remaining}})

    async def _all_history(self, _: web.Request) -> web.Response:
        return web.json_response(self._history)

    async def _history_of(self, request: web.Request) -> web.Response:
        """Empty for what is queued, runs, was deleted or never was: all alike."""
        prompt_id = request.match_info["prompt_id"]
        found = self._history.get(prompt_id)
        return web.json_response({prompt_id: found} if found else {})

    # ------------------------------------------------------------------------------------ ordering
    # A body that is no JSON object is a 500, as it is there, whatever its Content-Type.

    async def _submit(self, request: web.Request) -> web.Response:
        said = json.loads(await request.read())
        try:
            item = self._item(said)
        except PromptError as invalid:
            return invalid.response
        if len(self._pending) >= MAX_PENDING:
            return web.Response(status=503, text=f"{MAX_PENDING} jobs are waiting already")
        self._accepted += 1
        self._pending.append(item)
        self._wake.set()
        return web.json_response({"prompt_id": item[1], "number": item[0], "node_errors": {}})

    def _item(self, said: Json) -> Item:
        """Raises PromptError."""
        if "prompt" not in said:
            raise PromptError("no_prompt", "No prompt provided", "No prompt provided")
        number = float(said["number"]) if "number" in said else self._accepted
        if said.get("front"):
            number = -number
        prompt_id = said.get("prompt_id")
        if prompt_id is None:
            prompt_id = str(uuid.uuid4())
        elif not is_canonical_uuid(prompt_id):
            raise PromptError("invalid_prompt_id", "prompt_id must be a valid UUID")
        extra_data = dict(said.get("extra_data", {}))
        if "client_id" in said:
            extra_data["client_id"] = said["client_id"]
        extra_data["create_time"] = now_ms()
        return number, prompt_id, said["prompt"], extra_data, outputs(said["prompt"])

    async def _change_queue(self, request: web.Request) -> web.Response:
        said = json.loads(await request.read())
        if said.get("clear"):
            self._pending.clear()
        unwanted = set(said.get("delete", ()))
        self._pending = [item for item in self._pending if item[1] not in unwanted]
        return web.Response()

    async def _set_free(self, request: web.Request) -> web.Response:
        said = json.loads(await request.read())
        if said.get("unload_models") or said.get("free_memory"):
            self._free = True
            self._wake.set()
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        """Without a job's id, or with a body that makes no sense, it means whatever runs."""
        said: Json = {}
        with contextlib.suppress(ValueError):
            said = json.loads(await request.read())
        prompt_id = said.get("prompt_id")
        if not prompt_id or (self._running and self._running[1] == prompt_id):
            self._interrupted = True
        return web.Response()

    # ------------------------------------------------------------------------------------- working

    async def _work(self) -> None:
        while True:
            if not self._pending:
                # What called while it was busy is forgotten here: the `/free` that goes unseen.
                self._wake.clear()
                await self._wake.wait()
            if self._pending:
                await self._run_next()
            if self._free:
                self._free = False
                await self._unload()

    async def _run_next(self) -> None:
        item = min(self._pending, key=lambda item: item[0])
        self._pending.remove(item)
        self._running = item
        self._interrupted = False
        messages = [message("execution_start", item), message("execution_cached", item, nodes=[])]
        made: Json = {}
        try:
            await self._load()
            made = await self._make_picture(item)
            messages.append(message("execution_success", item))
        except Interrupted:
            messages.append(message("execution_interrupted", item, **node(item), executed=[]))
        except JobError as error:
            told = {"exception_type": "RuntimeError", "exception_message": str(error)}
            messages.append(message("execution_error", item, **node(item), **told, traceback=[]))
        self._remember(item, made, messages)
        self._running = None

    async def _load(self) -> None:
        if self._loaded:
            return
        await self.hold(CONTEXT_MIB)
        await self.take(MODELS_MIB, LOAD_S)
        self._loaded = True
        await self.card.say("load", MODELS_MIB)

    async def _make_picture(self, item: Item) -> Json:
        """Give the outputs. Raises Interrupted, and JobError now and then."""
        ends_at = time.monotonic() + self.chance.uniform(*WORK_S)
        fails = self.happens(JOB_FAILURE_RATE)
        while time.monotonic() < ends_at:
            await asyncio.sleep(PROGRESS_S)
            if self._interrupted:
                raise Interrupted
        if fails:
            raise JobError("the picture came out all black")
        name = f"ComfyUI_{self._accepted:05}_.png"
        image = {"filename": name, "subfolder": "", "type": "output"}
        return {node_id: {"images": [image]} for node_id in item[4]}

    def _remember(self, item: Item, made: Json, messages: list[Any]) -> None:
        success = messages[-1][0] == "execution_success"
        status_str = "success" if success else "error"
        status = {"status_str": status_str, "completed": success, "messages": messages}
        self._history[item[1]] = {"prompt": item, "outputs": made, "status": status, "meta": {}}
        if len(self._history) > MAX_HISTORY:
            del self._history[next(iter(self._history))]

    async def _unload(self) -> None:
        time.sleep(GARBAGE_S)  # noqa: ASYNC251 - all requests hang meanwhile
        if self._loaded:
            self._loaded = False
            await self.hold(CONTEXT_MIB)
            await self.card.say("unload", MODELS_MIB)


def outputs(prompt: Json) -> list[str]:
    """Give the nodes that something comes out of. Raises PromptError."""
    for node_id, node in prompt.items():
        if "class_type" not in node:
            raise PromptError(
                "missing_node_type",
                f"Node 'ID #{node_id}' has no class_type.",
                f"Node ID '#{node_id}'",
                node_id=node_id,
                class_type=None,
            )
    found = [node_id for node_id, node in prompt.items() if node["class_type"] in OUTPUT_NODES]
    if not found:
        raise PromptError("prompt_no_outputs", "Prompt has no outputs")
    return found


def node(item: Item) -> Json:
    """Name the node at which a job ended before its time."""
    node_id = item[4][0]
    return {"node_id": node_id, "node_type": item[2][node_id]["class_type"]}


def message(kind: str, item: Item, **more: Any) -> tuple[str, Json]:
    return kind, {**more, "prompt_id": item[1], "timestamp": now_ms()}


def is_canonical_uuid(said: object) -> bool:
    try:
        return str(uuid.UUID(str(said))) == said
    except ValueError:
        return False


def now_ms() -> int:
    return time.time_ns() // 1_000_000
