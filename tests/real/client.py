"""Clients of the broker: they speak, listen and ask, and look at how it comes back."""

import json
import re
import time
from typing import Any

import aiohttp

CALL_S = 90


class CheckError(Exception):
    """Something is not as it must be; the message says what."""


def check(condition: object, otherwise: str) -> None:
    if not condition:
        raise CheckError(otherwise)


def words(text: str) -> list[str]:
    """What was said: neither case nor punctuation can be heard."""
    return re.findall(r"[a-z0-9']+", text.lower())


def question(text: str, *, tokens: int, **more: object) -> dict[str, object]:
    """Give the body that asks an LLM, which then answers the same each time."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "cache_prompt": False,  # what was computed before must not matter
        **more,
    }


class Answer:
    """A whole answer, and how long it took on the way to the service."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes, took_s: float) -> None:
        self.body = body
        self.took_s = took_s
        self.queued_s = int(response.headers["X-Mgpu-Queue-Ms"]) / 1000
        self.loading_s = int(response.headers["X-Mgpu-Load-Ms"]) / 1000
        self.consumer = response.headers["X-Mgpu-Consumer"]


class Stream:
    """An LLM's answer as server-sent events: each piece of it, and when that came."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.at_s: list[float] = []
        self.whole = False
        self.timings: dict[str, float] = {}  # as the service itself took them
        self._rest = b""

    def take(self, data: bytes) -> None:
        now = time.monotonic()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            told = event.removeprefix(b"data: ")
            if told == b"[DONE]":
                self.whole = True
                continue
            chunk = json.loads(told)
            self.timings = chunk.get("timings", self.timings)
            if piece := chunk["choices"][0]["delta"].get("content"):
                self.pieces.append(piece)
                self.at_s.append(now)

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    def check_pace(self) -> str:
        """They came as they were made, one by one, and not all at the end."""
        made_s = self.timings["predicted_ms"] / 1000
        span_s = self.at_s[-1] - self.at_s[0]
        moments = len(set(self.at_s))
        told = f"{len(self.pieces)} pieces at {moments} moments of {span_s:.2f} s"
        check(len(self.pieces) >= 0.8 * self.timings["predicted_n"], f"pieces are missing: {told}")
        check(moments >= len(self.pieces) / 2, f"they came in heaps: {told}")
        check(span_s >= made_s / 2, f"{told}, but making them took {made_s:.2f} s")
        return told


class Client:
    """Speaks, listens and asks through the broker."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def speak(self, text: str) -> Answer:
        """Give the WAV of the text."""
        answer = await self._post("/v1/tts", "piper", json={"text": text})
        said = answer.body
        size = int.from_bytes(said[4:8], "little") + 8
        check(said[:4] == b"RIFF" and size == len(said), f"{len(said)} bytes are no whole WAV")
        return answer

    async def listen(self, wav: bytes) -> tuple[str, Answer]:
        """Give the text that is heard in the WAV."""
        form = aiohttp.FormData()
        form.add_field("file", wav, filename="speech.wav", content_type="audio/wav")
        form.add_field("temperature", "0")  # else it tries doubtful passages again, by chance
        answer = await self._post("/v1/stt", "whisper", data=form)
        heard: str = json.loads(answer.body)["text"]
        return heard.strip(), answer

    async def ask(self, asked: dict[str, object], consumer: str) -> tuple[str, Answer]:
        """Give an LLM's answer, which comes as a whole."""
        answer = await self._post("/v1/llm", consumer, json=asked)
        text: str = json.loads(answer.body)["choices"][0]["message"]["content"]
        return text.strip(), answer

    async def ask_streamed(
        self, asked: dict[str, object], consumer: str, *, leave_after: int | None = None
    ) -> tuple[Stream, Answer]:
        """Give an LLM's streamed answer; who leaves after so many pieces has just these."""
        stream, began = Stream(), time.monotonic()
        async with self._session.post("/v1/llm", json={**asked, "stream": True}) as response:
            check(response.status == 200, f"POST /v1/llm: {response.status}")
            answer = Answer(response, b"", 0)
            check(answer.consumer == consumer, f"answered by {answer.consumer}, not {consumer}")
            check(response.content_type == "text/event-stream", f"it is {response.content_type}")
            async for data in response.content.iter_any():
                stream.take(data)
                if leave_after is not None and len(stream.pieces) >= leave_after:
                    response.close()
                    return stream, answer
        answer.took_s = time.monotonic() - began
        check(stream.whole, "the stream ended without [DONE]")
        return stream, answer

    async def status(self) -> dict[str, Any]:
        async with self._session.get("/v1/status") as response:
            status: dict[str, Any] = await response.json()
            return status

    async def _post(self, path: str, consumer: str, **request: Any) -> Answer:
        began = time.monotonic()
        async with self._session.post(path, **request) as response:
            body = await response.read()
            check(response.status == 200, f"POST {path}: {response.status} {body[:500]!r}")
            answer = Answer(response, body, time.monotonic() - began)
        check(answer.consumer == consumer, f"{path} was answered by {answer.consumer}")
        return answer
