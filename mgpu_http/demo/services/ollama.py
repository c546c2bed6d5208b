"""A stand-in for Ollama: two models, which it loads and lets go of as it sees fit.

It looks at the free memory before it loads, drops what it used least recently to make place, and
lets go of a model some time after its last use. Its vices: nobody is asked, a model for which there
is no place runs on the processor, slowly and without a word, and memory that goes between its look
and the end of its load kills it.
"""

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web
from attrs import define, field, frozen

from mgpu_http.demo.services.common import Service

MODELS_MIB = {"chat": 1_900, "code": 1_300}
KEEP_ALIVE_S = 4.0  # the real one: 5 minutes
LOAD_S = 0.6
RECOVERY_S = 1.5  # how long it waits for what it let go of to be seen free
RECOVERY_POLL_S = 0.1
WORK_S = (0.4, 1.2)
PROCESSOR_SLOWDOWN = 3
TOKENS = (8, 24)
VERSION = "0.12.6"
WORDS = ("a", "the", "card", "model", "memory", "waits", "leaves", "comes", "full", "free", "again")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@define(eq=False)
class Model:
    name: str
    size_mib: int
    loaded: bool = False
    on_card: bool = False
    users: int = 0
    used_at: float = 0.0
    keep_alive_s: float = KEEP_ALIVE_S
    expiry: asyncio.TimerHandle | None = None
    turn: asyncio.Lock = field(factory=asyncio.Lock)

    @property
    def vram_mib(self) -> int:
        return self.size_mib if self.loaded and self.on_card else 0


class RequestError(Exception):
    """A request that the service can't make sense of."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.response = web.json_response({"error": error}, status=status)


@frozen
class Asked:
    """What a request to a model says, in the shape of `/api/chat` or of `/api/generate`."""

    name: str  # as the client called the model
    model: Model
    chat: bool
    empty: bool  # nothing to be done but to load or to unload
    stream: bool
    keep_alive_s: float

    def line(self, text: str, **more: Any) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}}
        return {
            "model": self.name,
            "created_at": timestamp(0),
            **(said if self.chat else {"response": text}),
            "done": bool(more),
            **more,
        }


@define(eq=False)
class Ollama(Service):
    aborts_for_gone_clients = True

    _models: Mapping[str, Model] = field(init=False)
    _loading: asyncio.Lock = field(factory=asyncio.Lock, init=False)  # one load at a time

    @_models.default
    def _new_models(self) -> Mapping[str, Model]:
        return {name: Model(name, size_mib) for name, size_mib in MODELS_MIB.items()}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self._root),
            web.get("/api/version", self._version),
            web.get("/api/tags", self._tags),
            web.get("/api/ps", self._ps),
            web.post("/api/chat", self._ask),
            web.post("/api/generate", self._ask),
        ]

    def models_mib(self) -> Iterable[int]:
        return [model.vram_mib for model in self._models.values() if model.loaded]

    async def _root(self, _: web.Request) -> web.Response:
        return web.Response(text="Ollama is running")

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def _tags(self, _: web.Request) -> web.Response:
        return web.json_response({"models": [entry(model) for model in self._models.values()]})

    async def _ps(self, _: web.Request) -> web.Response:
        loaded = [model for model in self._models.values() if model.loaded]
        return web.json_response(
            {
                "models": [
                    {
                        **entry(model),
                        "expires_at": timestamp(expires_in_s(model)),
                        "size_vram": model.vram_mib * 2**20,
                    }
                    for model in loaded
                ]
            }
        )

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        try:
            asked = self._read(await request.read(), chat=request.path == "/api/chat")
        except RequestError as refused:
            return refused.response
        if asked.empty and not asked.keep_alive_s:
            self._unload_soon(asked.model)
            return web.json_response(asked.line("", done_reason="unload"))
        began = time.monotonic_ns()
        async with self._using(asked.model, asked.keep_alive_s):
            if asked.empty:
                return web.json_response(asked.line("", done_reason="load"))
            loaded = time.monotonic_ns()
            async with asked.model.turn:
                lines = self._lines(asked, began, loaded)
                if asked.stream:
                    return await streamed(request, lines)
                return web.json_response(whole(asked, [line async for line in lines]))

    def _read(self, body: bytes, *, chat: bool) -> Asked:
        """Raises RequestError."""
        try:
            said = json.loads(body)
        except ValueError as error:
            raise RequestError(400, str(error) if body else "missing request body") from error
        if not isinstance(said, dict) or not said.get("model"):
            raise RequestError(400, "model is required")
        name = str(said["model"])
        model = self._models.get(name.removesuffix(":latest"))
        if model is None:
            raise RequestError(404, f"model '{name}' not found")
        return Asked(
            name=name,
            model=model,
            chat=chat,
            empty=not said.get("messages" if chat else "prompt"),
            stream=said.get("stream") is not False,
            keep_alive_s=keep_alive(said.get("keep_alive")),
        )

    async def _lines(self, asked: Asked, began: int, loaded: int) -> AsyncIterator[dict[str, Any]]:
        tokens = self.chance.randint(*TOKENS)
        work_s = self.chance.uniform(*WORK_S)
        if not asked.model.on_card:
            work_s *= PROCESSOR_SLOWDOWN
        for _ in range(tokens):
            await asyncio.sleep(work_s / tokens)
            yield asked.line(f"{self.chance.choice(WORDS)} ")
        ended = time.monotonic_ns()
        yield asked.line(
            "",
            done_reason="stop",
            total_duration=ended - began,
            load_duration=loaded - began,
            eval_count=tokens,
            eval_duration=ended - loaded,
        )

    # ------------------------------------------------------------------ which models are in memory

    @asynccontextmanager
    async def _using(self, model: Model, keep_alive_s: float) -> AsyncIterator[None]:
        """Load it if need be, and keep it as long as somebody uses it."""
        model.users += 1
        model.keep_alive_s = keep_alive_s
        if model.expiry is not None:
            model.expiry.cancel()
        try:
            # A load goes on when its client has gone.
            await asyncio.shield(self.tasks.create_task(self._load(model)))
            yield
        finally:
            model.users -= 1
            self._rest(model)

    async def _load(self, model: Model) -> None:
        async with self._loading:
            if model.loaded:
                return
            model.on_card = await self._make_place(model.size_mib)
            if model.on_card:
                await self.take(model.size_mib, LOAD_S)
            else:
                await asyncio.sleep(LOAD_S)
            model.loaded = True
            await self.card.say("load", model.vram_mib)
        self._rest(model)

    async def _make_place(self, mib: int) -> bool:
        """Let go of what is idle, the least recently used first, until so much is free."""
        if await self.card.free_mib() >= mib:
            return True
        while idle := [m for m in self._models.values() if m.vram_mib and not m.users]:
            await self._let_go(min(idle, key=lambda model: model.used_at), "evict")
            if await self._recovered(mib):
                return True
        return False

    async def _recovered(self, mib: int) -> bool:
        for _ in range(round(RECOVERY_S / RECOVERY_POLL_S)):
            if await self.card.free_mib() >= mib:
                return True
            await asyncio.sleep(RECOVERY_POLL_S)
        return False

    def _unload_soon(self, model: Model) -> None:
        model.keep_alive_s = 0.0
        self._rest(model)

    def _rest(self, model: Model) -> None:
        """Where nobody uses it: from now on it waits for its next use, so long as it may."""
        if model.users or not model.loaded:
            return
        loop = asyncio.get_running_loop()
        model.used_at = loop.time()
        if model.expiry is not None:
            model.expiry.cancel()
        if model.keep_alive_s < math.inf:
            model.expiry = loop.call_later(model.keep_alive_s, self._expire, model)

    def _expire(self, model: Model) -> None:
        what = "expire" if model.keep_alive_s else "unload"
        self.tasks.create_task(self._let_go(model, what))

    async def _let_go(self, model: Model, what: str) -> None:
        if model.loaded and not model.users:
            freed_mib = model.vram_mib
            model.loaded = False
            await self.give_back(freed_mib)
            await self.card.say(what, freed_mib)


async def streamed(
    request: web.Request, lines: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    async for line in lines:
        await response.write(json.dumps(line).encode() + b"\n")
    await response.write_eof()
    return response


def whole(asked: Asked, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the last line, with the text of all of them."""
    if asked.chat:
        text = "".join(line["message"]["content"] for line in lines)
        return {**lines[-1], "message": {"role": "assistant", "content": text}}
    return {**lines[-1], "response": "".join(line["response"] for line in lines)}


def entry(model: Model) -> dict[str, Any]:
    name = f"{model.name}:latest"
    return {"name": name, "model": name, "size": model.size_mib * 2**20}


def keep_alive(said: object) -> float:
    """Give the seconds that a number, or a text such as `1h30m`, means. Raises RequestError."""
    if said is None:
        return KEEP_ALIVE_S
    if isinstance(said, int | float):
        return said if said >= 0 else math.inf
    text = str(said)
    parts = _DURATION.findall(text)
    if "".join(number + unit for number, unit in parts) != text.removeprefix("-") or not parts:
        raise RequestError(400, f'time: invalid duration "{text}"')
    if text.startswith("-"):
        return math.inf
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def expires_in_s(model: Model) -> float:
    if model.users or model.expiry is None:
        return min(model.keep_alive_s, 10**9)
    return max(0.0, model.expiry.when() - asyncio.get_running_loop().time())


def timestamp(in_s: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=in_s)).isoformat()
