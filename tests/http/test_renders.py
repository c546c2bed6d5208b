"""A render is never cut by an eviction, however the requests interleave, over HTTP.

ComfyUI answers at once and draws on; a chat needs the same memory. Whenever ComfyUI is told to
unload, it must not draw: not for us, not for a client that has left, not for who asked it through
its page, and not for a broker that has died since. (What somebody begins past the broker is seen at
the next probe: test_past_the_broker.py.)
"""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web

from tests.support.comfyui import ComfyUI, comfyui
from tests.support.dev_http import serving
from tests.support.facade import Facade, facade, serve_process
from tests.support.gpu_service import Card
from tests.support.stand_ins.host import Host, host

PROMPT = json.dumps({"prompt": {"1": {}}}).encode()


class Chat:
    """Tells whether it is loaded, and takes no memory that is not there."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.broken = 0

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/unload":
            self._card.give_back("chat")
        elif request.method == "POST" and not self._card.take("chat", 9_000):
            self.broken += 1
            return web.json_response({"error": "out of memory"}, status=500)
        return web.json_response({"loaded": "chat" in self._card.held_mib})


class Calls(list[str]):
    """Calls of a service, and those among them that told it to unload while it drew."""

    def __init__(self, service: ComfyUI) -> None:
        super().__init__()
        self.cut: list[str] = []
        self._service = service

    def append(self, call: str) -> None:
        super().append(call)
        if call == "POST /free" and self._service.running:
            self.cut.append(f"call {len(self)}, while it draws {self._service.running}")


@contextlib.asynccontextmanager
async def drawing(service: ComfyUI) -> AsyncIterator[Calls]:
    """Let it draw each picture for a moment."""
    calls = Calls(service)
    service.calls = calls

    async def draw() -> None:
        while True:
            await asyncio.sleep(0.03)
            if service.running:
                service.end(service.running[0])

    task = asyncio.create_task(draw())
    try:
        yield calls
    finally:
        task.cancel()


@contextlib.asynccontextmanager
async def rack(at: Host) -> AsyncIterator[tuple[dict[str, Any], ComfyUI, Chat]]:
    """A card with room for one of both; gives the configuration too."""
    chat = Chat(at.card)
    async with comfyui(card=at.card) as service, serving(chat.answer) as url:
        content = {
            "listen": "127.0.0.1:0",
            "gpu": {"sampler": "simulated", "poll_interval_s": 0.2, "max_parallel": None},
            "probe": {"interval_s": 0.5},
            "routing": {"image": "image", "llm": "chat"},
            "consumers": {
                "image": service.settings(),
                "chat": {
                    "url": url,
                    "vram_resident_mib": 9_000,
                    "paths": {"llm": {"path": "/chat"}},
                    "residency": {"path": "/loaded", "resident": "loaded"},
                    "load": {"path": "/load"},
                    "unload": {"path": "/unload"},
                },
            },
        }
        yield content, service, chat


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Host]:
    async with host(tmp_path) as at:
        yield at


async def leaves(broker: Facade, after_s: float) -> None:
    """Ask for a picture and go away."""
    async with broker.connect() as client:
        await client.send("POST", "/v1/image?wait=1", body=PROMPT)
        await asyncio.sleep(after_s)


async def afternoon(broker: Facade, chance: Random) -> list[int]:
    """Ask for pictures and chats in all ways at drawn moments; gives the answers' statuses."""
    ways = {
        "chat": lambda: broker.ask("POST", "/v1/llm", body=b"{}"),
        "picture": lambda: broker.ask("POST", "/v1/image", body=PROMPT),
        "waits": lambda: broker.ask("POST", "/v1/image?wait=1", body=PROMPT),
        "page": lambda: broker.ask("POST", "/upstream/image/prompt", body=PROMPT),
        "leaves": lambda: leaves(broker, chance.random() / 10),
    }

    async def one(way: str, at_s: float) -> int | None:
        await asyncio.sleep(at_s)
        answer = await ways[way]()
        return answer and answer.status

    drawn = [(chance.choice([*ways, "chat", "chat"]), chance.random()) for _ in range(24)]
    statuses = await asyncio.gather(*(one(way, at_s) for way, at_s in drawn))
    return [status for status in statuses if status is not None]


@pytest.mark.parametrize("seed", range(3))
async def test_no_eviction_cuts_a_render(at: Host, seed: int) -> None:
    async with rack(at) as (content, service, chat), drawing(service) as calls:
        async with facade(at.directory, content) as broker:
            statuses = await afternoon(broker, Random(seed))
            await broker.until("at rest", lambda s: s["requests"] == [])
        assert set(statuses) == {200}
        assert service.times("POST /free") > 1
        assert (calls.cut, chat.broken) == ([], 0)


async def test_nor_does_one_of_the_next_broker(at: Host) -> None:
    """The first is killed in the middle; what it had asked for is still being drawn."""
    async with rack(at) as (content, service, chat):
        with serve_process(at.directory, content) as first:
            await first.ask("POST", "/v1/image", body=PROMPT)
            await first.until("at work", lambda s: s["consumers"]["image"]["active"] == 1)
            first.signal(signal.SIGKILL)
            await first.exit_code()
        assert service.running
        async with facade(at.directory, content) as second:
            await second.until("seen", lambda s: not s["consumers"]["chat"]["loaded"])
            asked = asyncio.create_task(second.ask("POST", "/v1/llm", body=b"{}"))
            await second.until("waiting", lambda s: s["requests"] and s["requests"][0]["why"])
            await asyncio.sleep(1)  # some rounds of probes
            assert service.times("POST /free") == 0
            service.end(service.running[0])
            assert (await asked).status == 200
        assert service.times("POST /free") >= 1
        assert chat.broken == 0
