"""A WebSocket client of ComfyUI's, unmodified: directly, and at the front port of a broker."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import frozen
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_sync

from tests.support.comfyui import comfyui
from tests.support.comfyui_socket import PREVIEW, PREVIEW_WITH_METADATA, Talking
from tests.support.dev_http import free_port
from tests.support.facade import Facade, facade
from tests.support.upstream import eventually

GRAPH = {"1": {"class_type": "KSampler"}, "3": {"class_type": "SaveImage"}}
PROMPT = "0efc429d-6df5-4566-a08e-c3e92608f05c"
FLAGS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
WAYS = ("direct", "front")


@frozen
class Page:
    """Where a client believes that ComfyUI is."""

    service: Talking
    port: int
    broker: Facade | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def socket(self, name: str = "A") -> str:
        return f"ws://127.0.0.1:{self.port}/ws?clientId={name}"

    async def at_rest(self) -> None:
        if self.broker is not None:
            await self.broker.until("at rest", lambda s: not s["requests"])

    async def post(self, name: str | None = "A", prompt_id: str = PROMPT) -> Any:
        body = {"prompt": GRAPH, "prompt_id": prompt_id}
        if name is not None:
            body["client_id"] = name
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            answer = await client.post("/prompt", json=body)
        return answer.json()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as client:
            return await client.get(path)


@contextlib.asynccontextmanager
async def front(directory: Path, service: Talking, way: str) -> AsyncIterator[Page]:
    """Give the service's own port, or one of a broker before it."""
    port = int(service.url.rpartition(":")[2])
    if way == "direct":
        yield Page(service, port)
        return
    content = {
        "listen": "127.0.0.1:0",
        "gpu": {"sampler": "none", "total_mib": 24_000},
        "probe": {"interval_s": 0.2, "timeout_s": 5},
        "consumers": {"comfyui": service.settings(front=(front_port := free_port()))},
    }
    async with facade(directory, content) as broker:
        await broker.until("up", lambda s: s["consumers"]["comfyui"]["healthy"])
        it = Page(service, front_port, broker)
        yield it
        await it.at_rest()


@contextlib.asynccontextmanager
async def page(directory: Path, way: str) -> AsyncIterator[Page]:
    async with comfyui(Talking) as service, front(directory, service, way) as it:
        yield it


def decoded(message: str | bytes) -> Any:
    return json.loads(message) if isinstance(message, str) else message


async def until_over(socket: ClientConnection) -> list[Any]:
    """Read as ComfyUI's own clients do: until nothing is executed any more."""
    heard = []
    async with asyncio.timeout(10):
        async for message in socket:
            heard.append(decoded(message))
            if is_over(heard[-1]):
                break
    return heard


def is_over(told: Any) -> bool:
    over = isinstance(told, dict) and told["type"] == "executing"
    return over and told["data"]["node"] is None


async def next_of(socket: ClientConnection) -> Any:
    return decoded(await asyncio.wait_for(socket.recv(), 10))


async def play(service: Talking) -> None:
    await eventually(lambda: bool(service.running))
    await service.begin(service.running[0])
    for step in (1, 2, 3):
        await service.progress(step)
    await service.finish()


def kinds(heard: list[Any]) -> list[str]:
    return [one["type"] if isinstance(one, dict) else f"preview {one[3]}" for one in heard]


def remaining(told: Any) -> int | None:
    """Give how many prompts are left, if that is told."""
    status = isinstance(told, dict) and told["type"] == "status"
    return told["data"]["status"]["exec_info"]["queue_remaining"] if status else None


NODE = ["progress_state", "executing"]
JOB = ["status", "status", "status", "execution_start", "execution_cached", *NODE, *NODE]
END = [*NODE, "executed", "progress_state", "execution_success", "status", "executing"]


@pytest.mark.parametrize(("flags", "preview"), [([], PREVIEW), ([FLAGS], PREVIEW_WITH_METADATA)])
async def test_who_draws_hears_of_it_as_without_us(
    tmp_path: Path, flags: list[Any], preview: int
) -> None:
    heard, found = {}, {}
    for way in WAYS:
        async with page(tmp_path, way) as it, connect(it.socket()) as socket:
            for flag in flags:
                await socket.send(json.dumps(flag))
                await eventually(lambda it=it: bool(it.service.flags))
            assert (await it.post())["prompt_id"] == PROMPT
            working = asyncio.create_task(play(it.service))
            heard[way] = await until_over(socket)
            await working
            image = (await it.get("/view?filename=a%20b%26c.png&subfolder=&type=output")).text
            found[way] = ((await it.get(f"/history/{PROMPT}")).json(), image)
    steps = ["progress_state", "progress", f"preview {preview}"] * 3
    answered = ["feature_flags" for _ in flags]
    assert kinds(heard["direct"]) == [JOB[0], *answered, *JOB[1:], *steps, *END]
    assert heard["front"] == heard["direct"]
    assert found["front"] == found["direct"]


async def test_a_client_in_a_thread_hears_the_same(tmp_path: Path) -> None:
    def ask(it: Page) -> list[Any]:
        with connect_sync(it.socket()) as socket:
            httpx.post(
                f"{it.url}/prompt",
                json={"prompt": GRAPH, "prompt_id": PROMPT, "client_id": "A"},
                trust_env=False,
            )
            heard = [decoded(socket.recv(10))]
            while not is_over(heard[-1]):
                heard.append(decoded(socket.recv(10)))
            return heard

    heard = {}
    for way in WAYS:
        async with page(tmp_path, way) as it:
            asking = asyncio.create_task(asyncio.to_thread(ask, it))
            await play(it.service)
            heard[way] = await asking
    assert heard["front"] == heard["direct"]


@pytest.mark.parametrize("way", WAYS)
async def test_others_hear_the_status_only(tmp_path: Path, way: str) -> None:
    async with (
        page(tmp_path, way) as it,
        connect(it.socket()) as mine,
        connect(it.socket("B")) as others,
    ):
        await it.post()
        await play(it.service)
        assert len(await until_over(mine)) > 10
        heard = [await next_of(others) for _ in range(4)]
        assert kinds(heard) == ["status"] * 4
        assert [remaining(one) for one in heard] == [0, 1, 1, 0]


@pytest.mark.parametrize("way", WAYS)
async def test_a_prompt_of_nobody_shows_its_progress_to_all(tmp_path: Path, way: str) -> None:
    async with (
        page(tmp_path, way) as it,
        connect(it.socket()) as one,
        connect(it.socket("B")) as other,
    ):
        await it.post(name=None)
        await play(it.service)
        for socket in (one, other):
            heard = [await next_of(socket), await next_of(socket)]
            while remaining(heard[-1]) != 0:
                heard.append(await next_of(socket))
            assert kinds(heard).count(f"preview {PREVIEW}") == 3
            assert not {"execution_start", "executing", "executed"} & set(kinds(heard))


async def test_who_comes_back_in_the_middle_hears_the_rest(tmp_path: Path) -> None:
    heard = {}
    for way in WAYS:
        async with page(tmp_path, way) as it:
            async with connect(it.socket()) as socket:
                await it.post()
                await it.service.begin(PROMPT)
                while (await next_of(socket))["type"] != "execution_start":
                    pass
            await eventually(lambda it=it: not it.service.sockets)
            await it.service.progress(1)  # nobody hears that
            async with connect(it.socket()) as socket:
                first = [await next_of(socket), await next_of(socket)]
                await it.service.progress(2)
                await it.service.finish()
                heard[way] = first + await until_over(socket)
    assert heard["front"] == heard["direct"]
    status, executing = heard["direct"][:2]
    assert (status["data"]["sid"], executing["data"]) == ("A", {"node": "2"})


@pytest.mark.parametrize("way", WAYS)
async def test_the_older_of_two_sockets_of_one_client_takes_the_newer_with_it_but_here(
    tmp_path: Path, way: str
) -> None:
    """The service's own trap: through the broker the newer one hears on."""
    async with page(tmp_path, way) as it:
        older = await connect(it.socket())
        async with connect(it.socket()) as newer:
            assert (await next_of(newer))["data"]["sid"] == "A"
            await older.close()
            if way == "direct":
                await eventually(lambda: not it.service.sockets)
            await it.post()
            await play(it.service)
            if way == "front":
                assert kinds(await until_over(newer))[-1] == "executing"
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(newer.recv(), 0.2)


@pytest.mark.parametrize("way", WAYS)
async def test_a_restart_of_the_service(tmp_path: Path, way: str) -> None:
    async with page(tmp_path, way) as it:
        port = int(it.service.url.rpartition(":")[2])
        async with connect(it.socket()) as socket:
            await next_of(socket)
            it.service.drop()
            with pytest.raises(ConnectionClosed) as closed:
                await next_of(socket)
            assert closed.value.rcvd is None  # nobody said good-bye
        await it.service.die()
        with pytest.raises(InvalidStatus if way == "front" else OSError):
            await connect(it.socket())
        async with comfyui(Talking, port) as again, connect(it.socket()) as socket:
            assert (await next_of(socket))["data"]["sid"] == "A"
            await it.post()
            playing = asyncio.create_task(play(again))
            assert kinds(await until_over(socket)) == [
                *JOB[1:], *["progress_state", "progress", f"preview {PREVIEW}"] * 3, *END,
            ]  # fmt: skip
            await playing
            await it.at_rest()
