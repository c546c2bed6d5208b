"""A mixed afternoon: calls of many clients over services that do not fit on the card together.

Who and what is drawn; `SEED=N` in the environment draws another afternoon.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from attrs import frozen

from tests.clients.calls import client_of, read, read_async
from tests.support import facade
from tests.support.apis import drawn, heard, said, seen_as, spoken
from tests.support.facade import ServeProcess
from tests.support.gpu_host import GpuHost, at_rest, counts, gpu_host, ready
from tests.support.upstream import eventually

SEED = int(os.environ.get("SEED", "7"))
CALLS, AT_ONCE, PATIENCE_S = 200, 24, 50

# On a card of 15,000 MiB nothing fits beside the picture.
MIB = {"llm": 8_000, "voice": 5_000, "image": 11_000}
MODELS = {"llm": ["gemma"], "voice": ["tts-1", "whisper-1"], "image": ["sd"]}
SOUND = b"RIFF" + bytes(5_000)
PNG = b"\x89PNG" + bytes(500)
TIMEOUTS = (openai.APITimeoutError, anthropic.APITimeoutError)


@frozen
class Kind:
    """A call of a library, and what is due for it. `text` is what is asked."""

    library: str
    call: Callable[[Any, str, Mapping[str, Any]], Any]
    due: Callable[[str], Any]
    got: Callable[[Any], Any]
    streams: bool = False


def talk(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gemma", "messages": [{"role": "user", "content": text}], **more}


def speak(text: str) -> dict[str, Any]:
    return {"model": "tts-1", "voice": "alloy", "input": text}


def hear(text: str) -> dict[str, Any]:
    return {"model": "whisper-1", "file": ("a.wav", SOUND + text.encode())}


def draw(text: str) -> dict[str, Any]:
    return {"model": "sd", "prompt": text}


def answer(text: str) -> str:
    return "".join(said(text))


def of_chunks(told: Any) -> str:
    return "".join(each["choices"][0]["delta"]["content"] or "" for each in told)


def of_deltas(told: Any) -> str:
    return "".join(each["delta"] for each in told if each["type"] == "response.output_text.delta")


def of_blocks(told: Any) -> str:
    deltas = [each["delta"] for each in told if each["type"] == "content_block_delta"]
    return "".join(delta["text"] for delta in deltas)


def of_sound(told: Any) -> Any:
    return told["text"]


def transcribed(text: str) -> str:
    return heard(SOUND + text.encode())


def of_picture(told: Any) -> Any:
    return told["data"][0]["b64_json"]


KINDS: Mapping[str, Kind] = {
    "chat": Kind(
        "openai",
        lambda c, text, o: c.chat.completions.create(**talk(text), **o),
        answer,
        lambda told: told["choices"][0]["message"]["content"],
    ),
    "chat streamed": Kind(
        "openai",
        lambda c, text, o: c.chat.completions.create(**talk(text, stream=True), **o),
        answer,
        of_chunks,
        streams=True,
    ),
    "response streamed": Kind(
        "openai",
        lambda c, text, o: c.responses.create(model="gemma", input=text, stream=True, **o),
        answer,
        of_deltas,
        streams=True,
    ),
    "message": Kind(
        "anthropic",
        lambda c, text, o: c.messages.create(**talk(text, max_tokens=9), **o),
        answer,
        lambda told: told["content"][0]["text"],
    ),
    "message streamed": Kind(
        "anthropic",
        lambda c, text, o: c.messages.create(**talk(text, max_tokens=9, stream=True), **o),
        answer,
        of_blocks,
        streams=True,
    ),
    "embeddings": Kind(
        "openai",
        lambda c, text, o: c.embeddings.create(model="gemma", input=text, **o),
        seen_as,
        lambda told: told["data"][0]["embedding"],
    ),
    "speech": Kind(
        "openai", lambda c, text, o: c.audio.speech.create(**speak(text), **o), spoken, bytes
    ),
    "speech to a file": Kind(
        "openai",
        lambda c, text, o: c.audio.speech.with_streaming_response.create(**speak(text), **o),
        spoken,
        bytes,
    ),
    "transcription": Kind(
        "openai",
        lambda c, text, o: c.audio.transcriptions.create(**hear(text), **o),
        transcribed,
        of_sound,
    ),
    "picture": Kind(
        "openai", lambda c, text, o: c.images.generate(**draw(text), **o), drawn, of_picture
    ),
    "picture changed": Kind(
        "openai",
        lambda c, text, o: c.images.edit(**draw(text), image=("a.png", PNG), **o),
        lambda text: drawn(text, PNG),
        of_picture,
    ),
}
FATES = {
    "whole": 12,
    "in a thread": 2,
    "broken off": 2,
    "cancelled": 3,
    "timed out": 2,
    "hurried": 2,
    "no such model": 1,
    "nonsense": 1,
}


@dataclass
class Afternoon:
    url: str
    chance: random.Random
    clients: dict[Any, Any] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def spend(self) -> None:
        """Make all calls, some at once; their kinds and fates are drawn before."""
        names, fates = list(KINDS), list(FATES)
        drawn_ = [
            (f"this is call {n}", self.chance.choice(names), fate, self.chance.uniform(0, 1))
            for n, fate in enumerate(self.chance.choices(fates, list(FATES.values()), k=CALLS))
        ]
        waiting = iter(drawn_)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._one_by_one(waiting))
        finally:
            for (_, awaited), client in self.clients.items():
                closing = client.close()
                if awaited:
                    await closing

    async def _one_by_one(self, waiting: Iterator[Any]) -> None:
        for text, name, fate, luck in waiting:
            try:
                how = await getattr(self, fate.replace(" ", "_"))(KINDS[name], text, luck)
                self.ended[f"{fate}: {how}"] += 1
            except Exception as error:  # noqa: BLE001
                self.wrong.append(f"{text}, {name}, {fate}: {error!r}")

    def client(self, kind: Kind, *, awaited: bool = True) -> Any:
        key = (kind.library, awaited)
        if key not in self.clients:
            self.clients[key] = client_of(
                kind.library, self.url, awaited=awaited, timeout=PATIENCE_S
            )
        return self.clients[key]

    async def ask(self, kind: Kind, text: str, **options: Any) -> str:
        """Make a call, and compare what it returns with what is due."""
        result = kind.call(self.client(kind), text, options)
        told = await read_async(
            await result if hasattr(result, "__await__") else result, lambda: None
        )
        self.compare(kind, text, told)
        return "answered"

    def compare(self, kind: Kind, text: str, told: Any) -> None:
        assert kind.got(told) == kind.due(text), told

    # ------------------------------------------------------------------- what becomes of a call

    async def whole(self, kind: Kind, text: str, _luck: float) -> str:
        return await self.ask(kind, text)

    async def in_a_thread(self, kind: Kind, text: str, _luck: float) -> str:
        client = self.client(kind, awaited=False)
        told = await asyncio.to_thread(lambda: read(kind.call(client, text, {}), lambda: None))
        self.compare(kind, text, told)
        return "answered"

    async def broken_off(self, kind: Kind, text: str, _luck: float) -> str:
        """Take the beginning of a stream only."""
        kind = kind if kind.streams else KINDS["chat streamed"]
        stream = await kind.call(self.client(kind), text, {})
        async for item in stream:
            assert item.model_dump(warnings=False)
            break
        await stream.close()
        return "broken off"

    async def cancelled(self, kind: Kind, text: str, luck: float) -> str:
        task = asyncio.create_task(self.ask(kind, text))
        done, _ = await asyncio.wait([task], timeout=2 * luck)
        if done:
            return task.result()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return "cancelled"

    async def timed_out(self, kind: Kind, text: str, luck: float) -> str:
        try:
            return await self.ask(kind, text, timeout=0.05 + luck)
        except TIMEOUTS:
            return "timed out"

    async def hurried(self, kind: Kind, text: str, luck: float) -> str:
        try:
            return await self.ask(kind, text, extra_headers={"X-Mgpu-Max-Wait": f"{luck / 2:.3f}"})
        except (openai.APIError, anthropic.APIStatusError) as error:
            if "queue_timeout" not in json.dumps(error.body):
                raise
            return "refused"

    async def no_such_model(self, _kind: Kind, text: str, luck: float) -> str:
        wrong: Any = {**talk(text), "model": "gpt-9"}
        if luck < 0.5:
            call = self.client(KINDS["chat"]).chat.completions.create
            with pytest.raises(openai.NotFoundError, match="no model gpt-9 is known"):
                await call(**wrong)
        else:
            call = self.client(KINDS["message"]).messages.create
            with pytest.raises(anthropic.NotFoundError, match="no model gpt-9 is known"):
                await call(**wrong, max_tokens=9)
        return "refused"

    async def nonsense(self, _kind: Kind, _text: str, luck: float) -> str:
        """Ask what the service itself refuses."""
        if luck < 0.5:
            call = self.client(KINDS["chat"]).chat.completions.create
            with pytest.raises(openai.BadRequestError, match="'messages' is required"):
                await call(model="gemma", messages=[])
        else:
            call = self.client(KINDS["message"]).messages.create
            with pytest.raises(anthropic.BadRequestError, match="at least one is required"):
                await call(model="gemma", messages=[], max_tokens=9)
        return "refused"


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GpuHost, Any]]:
    monkeypatch.setattr(facade, "LIMIT_S", PATIENCE_S)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with gpu_host(tmp_path, total_mib=15_000) as host:
        consumers: dict[str, Any] = {}
        for name, mib in MIB.items():
            lazy = name == "image"
            host.start_apis(name, mib=mib, lazy=lazy, free_s=0.02)
            consumers[name] = {
                "health": {"path": "/health"},
                "models": MODELS[name],
                "vram_resident_mib": mib,
                "residency": {"path": "/state", "resident": "holds", "mib": "bytes"},
                "unload": {"path": "/unload"},
                **({} if lazy else {"load": {"path": "/load"}}),
            }
        consumers["llm"] |= {"max_concurrency": 4, "wait_comments_s": 0.2}
        with host.serve(consumers=consumers, gpu={"max_parallel": 2}) as served:
            yield host, served


def state(port: int) -> Any:
    return httpx.get(f"http://127.0.0.1:{port}/state").json()


@pytest.mark.timeout(120)
async def test_every_call_of_a_mixed_afternoon_ends_as_its_library_expects(
    broker: tuple[GpuHost, ServeProcess],
) -> None:
    print(f"SEED={SEED}")
    host, served = broker
    await ready(served)
    afternoon = Afternoon(served.url, random.Random(SEED))
    async with asyncio.timeout(PATIENCE_S):
        await afternoon.spend()
    status = await at_rest(served)
    print(afternoon.ended, counts(status))
    assert not afternoon.wrong
    assert afternoon.ended.total() == CALLS
    for name, service in host.services.items():
        await eventually(lambda port=service.port: state(port)["working"] == 0)
        assert state(service.port)["wrong"] == [], name
    assert sum(host.card.held_mib.values()) <= 15_000
    evictions, loads = counts(status)
    assert evictions > 4  # they did have to share
    assert loads > 2
    assert not served.said("Traceback|ERROR|CRITICAL"), served.lines
