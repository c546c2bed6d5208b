"""The calls of the libraries of OpenAI, Anthropic and Ollama, and what becomes of them.

A call is a function of a client, the same for one that waits and for one that is awaited.
"""

import asyncio
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import anthropic
import httpx
import httpx2
import ollama
import openai
import pydantic

from tests.support.apis import OLLAMA_MODEL

Call: TypeAlias = Callable[[Any], Any]
OnItem: TypeAlias = Callable[[], Any]

MODEL = "gemma"
SOUND = ("a.wav", b"RIFF" + bytes(range(256)) * 500, "audio/wav")
IMAGE = ("a.png", b"\x89PNG" + bytes(300), "image/png")
PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}}
FUNCTION = {"name": "repeat", "description": "repeats a text", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]


def asks(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


CHAT, MESSAGE = asks("hello there"), asks("hello there", max_tokens=50)
USAGE = {"include_usage": True}
HEAR = {"model": MODEL, "file": SOUND}
DRAW = {"model": MODEL, "prompt": "a cat"}
OPENAI: Mapping[str, Call] = {
    "chat": lambda c: c.chat.completions.create(**CHAT),
    "chat streamed": lambda c: c.chat.completions.create(**CHAT, stream=True),
    "chat with usage": lambda c: c.chat.completions.create(
        **CHAT, stream=True, stream_options=USAGE
    ),
    "chat as events": lambda c: c.chat.completions.stream(**CHAT),
    "tools": lambda c: c.chat.completions.create(**CHAT, tools=TOOLS),
    "tools streamed": lambda c: c.chat.completions.create(**CHAT, tools=TOOLS, stream=True),
    "completion": lambda c: c.completions.create(model=MODEL, prompt="The capital"),
    "completion streamed": lambda c: c.completions.create(
        model=MODEL, prompt="The capital", stream=True
    ),
    "response": lambda c: c.responses.create(model=MODEL, input="hi"),
    "response streamed": lambda c: c.responses.create(model=MODEL, input="hi", stream=True),
    "response as events": lambda c: c.responses.stream(model=MODEL, input="hi"),
    "embeddings": lambda c: c.embeddings.create(model=MODEL, input=["one", "two"]),
    "embeddings as numbers": lambda c: c.embeddings.create(
        model=MODEL, input="one", encoding_format="float"
    ),
    "speech": lambda c: c.audio.speech.create(model=MODEL, voice="alloy", input="hello"),
    "speech to a file": lambda c: c.audio.speech.with_streaming_response.create(
        model=MODEL, voice="alloy", input="a longer text"
    ),
    "transcription": lambda c: c.audio.transcriptions.create(**HEAR),
    "transcription in detail": lambda c: c.audio.transcriptions.create(
        **HEAR, response_format="verbose_json", timestamp_granularities=["segment"]
    ),
    "transcription as text": lambda c: c.audio.transcriptions.create(
        **HEAR, response_format="text"
    ),
    "transcription streamed": lambda c: c.audio.transcriptions.create(**HEAR, stream=True),
    "translation": lambda c: c.audio.translations.create(**HEAR),
    "picture": lambda c: c.images.generate(**DRAW),
    "picture streamed": lambda c: c.images.generate(**DRAW, stream=True, partial_images=1),
    "picture changed": lambda c: c.images.edit(**DRAW, image=IMAGE, mask=IMAGE),
    "of the service: format": lambda c: c.audio.transcriptions.create(
        **HEAR, response_format="srt"
    ),
    "of the service: context": lambda c: c.chat.completions.create(**asks("word " * 1025)),
    "of the service: no messages": lambda c: c.chat.completions.create(
        model=MODEL, messages=[], stream=True
    ),
}
ANTHROPIC: Mapping[str, Call] = {
    "message": lambda c: c.messages.create(**MESSAGE),
    "message streamed": lambda c: c.messages.create(**MESSAGE, stream=True),
    "message as events": lambda c: c.messages.stream(**MESSAGE),
    "tokens": lambda c: c.messages.count_tokens(**CHAT),
    "of the service: no messages": lambda c: c.messages.create(**{**MESSAGE, "messages": []}),
}
TALK = {**CHAT, "model": OLLAMA_MODEL}
OLLAMA: Mapping[str, Call] = {
    "chat": lambda c: c.chat(**TALK),
    "chat streamed": lambda c: c.chat(**TALK, stream=True),
    "generate": lambda c: c.generate(model=OLLAMA_MODEL, prompt="hi"),
    "generate streamed": lambda c: c.generate(model=OLLAMA_MODEL, prompt="hi", stream=True),
    "embed": lambda c: c.embed(model=OLLAMA_MODEL, input=["one", "two"]),
    "list": lambda c: c.list(),
    "ps": lambda c: c.ps(),
    "show": lambda c: c.show(OLLAMA_MODEL),
    "pull": lambda c: c.pull("new"),
    "pull streamed": lambda c: c.pull("new", stream=True),
    "of the service: show": lambda c: c.show("none"),
    "of the service: pull": lambda c: c.pull("none", stream=True),
}
CALLS: Mapping[str, Mapping[str, Call]] = {
    "openai": OPENAI,
    "anthropic": ANTHROPIC,
    "ollama": OLLAMA,
}
TALKS = {"openai": "chat streamed", "anthropic": "message streamed", "ollama": "chat streamed"}
STREAMS = {library: [n for n in calls if "streamed" in n] for library, calls in CALLS.items()}


# ------------------------------------------------------------------------------------- clients


def client_of(library: str, url: str, *, awaited: bool, retries: int = 0, **more: Any) -> Any:
    """Make a library's client; `url` is where the service is, without a path of the protocol."""
    match library:
        case "openai":
            made = openai.AsyncOpenAI if awaited else openai.OpenAI
            return made(base_url=f"{url}/v1", **{"api_key": "none", "max_retries": retries, **more})
        case "anthropic":
            made = anthropic.AsyncAnthropic if awaited else anthropic.Anthropic
            return made(base_url=url, **{"api_key": "none", "max_retries": retries, **more})
    return (ollama.AsyncClient if awaited else ollama.Client)(host=url, **more)


ERRORS = (
    openai.OpenAIError,
    anthropic.AnthropicError,
    ollama.ResponseError,
    ConnectionError,
    httpx.HTTPError,
    httpx2.HTTPError,
)


async def outcome(call: Call, client: Any, on_item: OnItem = lambda: None) -> Any:
    """Give what a call returns in plain values, or what it raises."""
    if not isinstance(client, openai.OpenAI | anthropic.Anthropic | ollama.Client):
        try:
            result = call(client)
            return await read_async(
                await result if inspect.isawaitable(result) else result, on_item
            )
        except ERRORS as error:
            return told_by(error)
    loop = asyncio.get_running_loop()

    def in_thread() -> Any:
        try:
            return read(call(client), lambda: loop.call_soon_threadsafe(on_item))
        except ERRORS as error:
            return told_by(error)

    return await asyncio.to_thread(in_thread)


def told_by(error: Exception) -> dict[str, Any]:
    """Give what a program may read of an exception."""
    members = ("status_code", "code", "type", "body", "message", "error")
    return {"raised": type(error)} | {
        name: getattr(error, name) for name in members if hasattr(error, name)
    }


def read(result: Any, on_item: OnItem) -> Any:
    if isinstance(result, pydantic.BaseModel):
        return dumped(result)
    if hasattr(result, "content"):
        return result.content
    if isinstance(result, Iterator):
        return [_taken(item, on_item) for item in result]
    if hasattr(result, "stream_to_file"):
        with tempfile.TemporaryDirectory() as directory:
            result.stream_to_file(f"{directory}/it")
            return Path(directory, "it").read_bytes()
    if hasattr(result, "__enter__"):
        with result as entered:
            return read(entered, on_item)
    return result


async def read_async(result: Any, on_item: OnItem) -> Any:
    if isinstance(result, pydantic.BaseModel):
        return dumped(result)
    if hasattr(result, "content"):
        return result.content
    if hasattr(result, "__aiter__"):
        return [_taken(item, on_item) async for item in result]
    if hasattr(result, "stream_to_file"):
        # Cancelled in the wrong moment, the library would forget the file that it opens.
        return b"".join([piece async for piece in result.iter_bytes()])
    if hasattr(result, "__aenter__"):
        async with result as entered:
            return await read_async(entered, on_item)
    return result


def _taken(item: Any, on_item: OnItem) -> Any:
    on_item()
    return dumped(item) if isinstance(item, pydantic.BaseModel) else item


def dumped(model: pydantic.BaseModel) -> Any:
    return model.model_dump(warnings=False)  # a library's generic types are wider than its values
