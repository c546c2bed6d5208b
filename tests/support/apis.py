"""A stand-in for servers that speak OpenAI's, Anthropic's or Ollama's protocol.

    async with apis() as service:
        ...                     # a client of one of their libraries asks service.url
        service.seen            # what it was asked

What it answers follows from what it is asked: equal calls have equal answers. Shapes, errors
and the cutting into pieces are those recorded of llama-server and of a Whisper server, and the
documented ones where none was recorded.
"""

import array
import asyncio
import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiohttp import web

AT_S = 1_795_255_635
AT = "2026-11-21T10:07:15.000000Z"
N_CTX = 1024
EVENTS, LINES = "text/event-stream", "application/x-ndjson"
DONE = b"data: [DONE]\n\n"
OLLAMA_MODEL = "llama3.2:latest"

Asked: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """A stream where there are several pieces."""

    pieces: Sequence[bytes]
    content_type: str = "application/json; charset=utf-8"
    status: int = 200


def whole(told: Any, status: int = 200) -> Reply:
    return Reply([json.dumps(told).encode()], status=status)


def lines(*told: Any) -> Reply:
    return Reply([json.dumps(each).encode() + b"\n" for each in told], LINES)


def named_events(*told: Any) -> Reply:
    """Give events that carry their type as their name too."""
    texts = [f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in told]
    return Reply([text.encode() for text in texts], EVENTS)


def data(*told: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in told)


# ------------------------------------------------------------------ what follows from what is asked


def said(text: str) -> list[str]:
    """Give what a model says to a text, word by word."""
    first, *others = f"You said {text}".split()
    return [first, *(f" {word}" for word in others)]


def spoken(text: str) -> bytes:
    """Give the sound of a text: as long as it is, and its own."""
    return b"RIFF" + hashlib.sha256(text.encode()).digest() * (8 + len(text))


def heard(sound: bytes) -> str:
    return f" Heard {len(sound)} bytes, {hashlib.sha256(sound).hexdigest()[:8]}."


def seen_as(text: str) -> list[float]:
    """Give the vector of a text; single precision holds each of its values."""
    return [byte / 128 - 1 for byte in hashlib.sha256(text.encode()).digest()[:8]]


def drawn(prompt: str, image: bytes = b"") -> str:
    return base64.b64encode(b"\x89PNG" + hashlib.sha256(prompt.encode() + image).digest()).decode()


def count(text: str) -> int:
    return len(text.split())


# --------------------------------------------------------------------------------------- OpenAI's


def refusal(status: int, message: str, kind: str = "invalid_request_error", **more: Any) -> Reply:
    return whole({"error": {"code": status, "message": message, "type": kind, **more}}, status)


def chat(asked: Asked) -> Reply:
    if not asked.get("messages"):
        return refusal(400, "'messages' is required")
    text = asked["messages"][-1]["content"]
    if count(text) > N_CTX:
        message = f"request ({count(text)} tokens) exceeds the available context size"
        tokens = {"n_prompt_tokens": count(text), "n_ctx": N_CTX}
        return refusal(400, message, "exceed_context_size_error", **tokens)
    words, usage = said(text), usage_of(text)
    common = {
        "created": AT_S,
        "id": "chatcmpl-OwMX8kuKQaTjoZUycxjpY6TXCWuPQeyl",
        "model": "gemma.gguf",
        "system_fingerprint": "b0-unknown",
    }
    last = {"timings": {"prompt_n": usage["prompt_tokens"], "predicted_ms": 259.943}}
    reason = "tool_calls" if asked.get("tools") else "stop"
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "".join(words)}
        if asked.get("tools"):
            message = {"role": "assistant", "content": None, "tool_calls": [tool_call(asked)]}
        choice = {"finish_reason": reason, "index": 0, "message": message}
        told = {"choices": [choice], "object": "chat.completion", "usage": usage}
        return whole({**common, **told, **last})
    deltas = tool_deltas(asked) if asked.get("tools") else [{"content": word} for word in words]

    def chunk(delta: Any, reason: str | None = None, **more: Any) -> Any:
        choices = [{"finish_reason": reason, "index": 0, "delta": delta}]
        return {"choices": choices, **common, "object": "chat.completion.chunk", **more}

    # As recorded: the first piece has two events.
    first = data(chunk({"role": "assistant", "content": None}), chunk(deltas[0]))
    pieces = [first, *(data(chunk(delta)) for delta in deltas[1:]), data(chunk({}, reason, **last))]
    if asked.get("stream_options", {}).get("include_usage"):
        pieces.append(data({**chunk({}), "choices": [], "usage": usage}))
    return Reply([*pieces, DONE], EVENTS)


def tool_call(asked: Asked) -> dict[str, Any]:
    arguments = json.dumps({"text": asked["messages"][-1]["content"]})
    function = {"name": asked["tools"][0]["function"]["name"], "arguments": arguments}
    return {"type": "function", "id": "call_1", "function": function}


def tool_deltas(asked: Asked) -> list[dict[str, Any]]:
    call = tool_call(asked)
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    begin = {**call, "index": 0, "function": {"name": name, "arguments": ""}}
    parts = [arguments[at : at + 5] for at in range(0, len(arguments), 5)]
    rest = [{"index": 0, "function": {"arguments": part}} for part in parts]
    return [{"tool_calls": [each]} for each in (begin, *rest)]


def usage_of(text: str) -> dict[str, int]:
    prompt, told = count(text), len(said(text))
    return {"completion_tokens": told, "prompt_tokens": prompt, "total_tokens": prompt + told}


def completion(asked: Asked) -> Reply:
    words = said(asked["prompt"])
    common = {
        "created": AT_S,
        "model": "gemma.gguf",
        "object": "text_completion",
        "id": "chatcmpl-1",
    }

    def chunk(text: str, reason: str | None = None, **more: Any) -> Any:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        return {"choices": [choice], **common, **more}

    usage = usage_of(asked["prompt"])
    if not asked.get("stream"):
        return whole(chunk("".join(words), "length", usage=usage))
    pieces = [data(chunk(word)) for word in words]
    return Reply([*pieces, data(chunk("", "length", usage=usage)), DONE], EVENTS)


def response(asked: Asked) -> Reply:
    words = said(asked["input"])
    text = "".join(words)
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text}
    item = {"content": [part], "id": "msg_1", "role": "assistant", "type": "message"}
    finished = {**item, "status": "completed"}
    usage = {"input_tokens": count(asked["input"]), "output_tokens": len(words)}
    begun = {
        "id": "resp_1",
        "object": "response",
        "created_at": AT_S,
        "model": "gemma.gguf",
        "output": [],
        "status": "in_progress",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    over = {**begun, "output": [finished], "status": "completed", "usage": usage}
    if not asked.get("stream"):
        return whole(over)
    at = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    told = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **at, "part": {**part, "text": ""}},
        *({"type": "response.output_text.delta", **at, "delta": word} for word in words),
        {"type": "response.output_text.done", **at, "text": text},
        {"type": "response.content_part.done", **at, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": finished},
        {"type": "response.completed", "response": over},
    ]
    return named_events(*({**each, "sequence_number": n} for n, each in enumerate(told)))


def embeddings(asked: Asked) -> Reply:
    """Answer with numbers, or with what their library asks for by itself."""
    texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]

    def row(index: int, text: str) -> dict[str, Any]:
        vector: Any = seen_as(text)
        if asked.get("encoding_format") == "base64":
            vector = packed(vector)
        return {"embedding": vector, "index": index, "object": "embedding"}

    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    rows = [row(index, text) for index, text in enumerate(texts)]
    return whole({"model": asked["model"], "object": "list", "usage": usage, "data": rows})


def packed(vector: list[float]) -> str:
    return base64.b64encode(array.array("f", vector).tobytes()).decode()


def speech(asked: Asked) -> Reply:
    sound = spoken(asked["input"])
    return Reply([sound[at : at + 128] for at in range(0, len(sound), 128)], "audio/wav")


def transcription(asked: Asked) -> Reply:
    text = heard(asked["file"])
    match asked.get("response_format"), asked.get("stream"):
        case "text", _:
            return Reply([text.encode()], "text/plain")
        case "verbose_json", _:
            told = {"task": "transcribe", "language": "en", "duration": 2.4, "text": text}
            return whole({**told, "segments": []})
        case "srt", _:
            message = "Unsupported response_format: srt"
            error = {"message": message, "type": "invalid_request_error"}
            return whole({"detail": {"error": error}}, 400)
        case _, "true":
            words = [f" {word}" for word in text.split()]
            deltas = [{"type": "transcript.text.delta", "delta": word} for word in words]
            return named_events(*deltas, {"type": "transcript.text.done", "text": text})
    return whole({"text": text})


def picture(asked: Asked) -> Reply:
    b64 = drawn(asked["prompt"], asked.get("image", b""))
    if not asked.get("stream"):
        return whole({"created": AT_S, "data": [{"b64_json": b64}], "output_format": "png"})
    common = {
        "created_at": AT_S,
        "size": "1024x1024",
        "quality": "low",
        "background": "opaque",
        "output_format": "png",
    }
    partial = {"type": "image_generation.partial_image", "partial_image_index": 0, **common}
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    over = {"type": "image_generation.completed", "usage": usage, **common}
    return named_events({**partial, "b64_json": b64[:8]}, {**over, "b64_json": b64})


def models(_asked: Asked) -> Reply:
    row = {"id": "gemma", "object": "model", "owned_by": "llamacpp", "created": AT_S}
    return whole({"object": "list", "data": [row]})


# ------------------------------------------------------------------------------------ Anthropic's


def message(asked: Asked) -> Reply:
    if not asked["messages"]:
        error = {"type": "invalid_request_error", "message": "messages: at least one is required"}
        return whole({"type": "error", "error": error}, 400)
    text = asked["messages"][-1]["content"]
    words = said(text)
    begun = {
        "id": "chatcmpl-OwMX8kuKQaTjoZUycxjpY6TXCWuPQeyl",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "gemma.gguf",
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"cache_read_input_tokens": 0, "input_tokens": count(text), "output_tokens": 0},
    }
    usage = {**begun["usage"], "output_tokens": len(words)}
    if not asked.get("stream"):
        content = [{"type": "text", "text": "".join(words)}]
        return whole({**begun, "content": content, "stop_reason": "end_turn", "usage": usage})
    deltas = [{"type": "text_delta", "text": word} for word in words]
    return named_events(
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    )


def tokens(asked: Asked) -> Reply:
    return whole({"input_tokens": sum(count(each["content"]) for each in asked["messages"])})


# --------------------------------------------------------------------------------------- Ollama's


def ollama(asked: Asked) -> Reply:
    """Answer to /api/chat and /api/generate; without a prompt it only loads or unloads."""
    common = {"model": asked["model"], "created_at": AT}
    end = {"done": True, "done_reason": "stop", "total_duration": 5_043_500, "eval_count": 2}
    if asked["model"] != OLLAMA_MODEL:
        return whole({"error": f"model '{asked['model']}' not found"}, 404)
    chats = "messages" in asked
    text = asked["messages"][-1]["content"] if chats else asked.get("prompt")
    if not text:
        return whole({**common, "response": "", **end, "done_reason": "load"})

    def part(word: str, more: Asked) -> Asked:
        as_ = {"message": {"role": "assistant", "content": word}} if chats else {"response": word}
        return {**common, **as_, **more}

    if not asked.get("stream", True):
        return whole(part("".join(said(text)), end))
    return lines(*(part(word, {"done": False}) for word in said(text)), part("", end))


def embed(asked: Asked) -> Reply:
    texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
    vectors = [seen_as(text) for text in texts]
    return whole({"model": asked["model"], "embeddings": vectors, "load_duration": 1})


def pull(asked: Asked) -> Reply:
    layer = "sha256:970aa74c0a90ef7482477cf803618e776e173c007bf957f635f1015bfcfef0e6"
    part = {"status": f"pulling {layer[7:19]}", "digest": layer, "total": 274_290_656}
    told = [
        {"status": "pulling manifest"},
        *({**part, "completed": done} for done in (0, 100_000_000, 274_290_656)),
        {"status": "verifying sha256 digest"},
        {"status": "success"},
    ]
    if asked["model"] == "none":
        told = [told[0], {"error": "pull model manifest: file does not exist"}]
    return lines(*told) if asked.get("stream", True) else whole(told[-1])


DETAILS = {"format": "gguf", "family": "llama", "parameter_size": "3.2B", "parent_model": ""}
ROW = {"name": OLLAMA_MODEL, "model": OLLAMA_MODEL, "size": 2_019_393_189, "details": DETAILS}
RUNS = {"expires_at": "2318-01-01T00:00:00Z", "size_vram": 2_019_393_189}


def show(asked: Asked) -> Reply:
    if asked["model"] != OLLAMA_MODEL:
        return whole({"error": f"model '{asked['model']}' not found"}, 404)
    info = {"general.architecture": "llama", "general.parameter_count": 3_212_749_888}
    return whole({"details": DETAILS, "model_info": info, "capabilities": ["completion"]})


ANSWERS: Mapping[str, Callable[[Asked], Reply]] = {
    "GET /health": lambda _: whole({"status": "ok"}),
    "GET /v1/models": models,
    "GET /v1/models/gemma": lambda _: whole(json.loads(models({}).pieces[0])["data"][0]),
    "POST /v1/chat/completions": chat,
    "POST /v1/completions": completion,
    "POST /v1/responses": response,
    "POST /v1/embeddings": embeddings,
    "POST /v1/audio/speech": speech,
    "POST /v1/audio/transcriptions": transcription,
    "POST /v1/audio/translations": transcription,
    "POST /v1/images/generations": picture,
    "POST /v1/images/edits": picture,
    "POST /v1/messages": message,
    "POST /v1/messages/count_tokens": tokens,
    "GET /api/version": lambda _: whole({"version": "0.13.0"}),
    "GET /api/tags": lambda _: whole({"models": [{**ROW, "modified_at": AT}]}),
    "GET /api/ps": lambda _: whole({"models": [{**ROW, **RUNS}]}),
    "POST /api/show": show,
    "POST /api/pull": pull,
    "POST /api/chat": ollama,
    "POST /api/generate": ollama,
    "POST /api/embed": embed,
}
PROBES = {"GET /health", "GET /api/version", "GET /api/ps"}


# ------------------------------------------------------------------------------------- the server


@dataclass
class Apis:
    url: str = ""
    gap_s: float = 0.001  # between two pieces
    # Where there is one: each piece but the first takes a turn.
    turns: asyncio.Semaphore | None = None
    hold: asyncio.Event | None = None  # to wait for before anything but probes is answered
    # To answer in place of what it would; None: it breaks off instead.
    instead: list[Reply | None] = field(default_factory=list)
    cut_after: int | None = None  # so many pieces of a stream, and then it breaks off
    seen: list[tuple[str, Asked]] = field(default_factory=list)  # but probes
    working: int = 0
    left: int = 0  # so many clients left before they had all

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = f"{request.method} {request.path}"
        asked = await asked_of(request)
        if call in PROBES:
            return await self.send(request, ANSWERS[call](asked))
        self.seen.append((call, asked))
        self.working += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
            return await self.work(request, call, asked)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.working -= 1

    async def work(self, request: web.Request, call: str, asked: Asked) -> web.StreamResponse:
        if not self.instead:
            known = ANSWERS.get(call)
            reply = known(asked) if known else refusal(404, "File Not Found", "not_found_error")
            return await self.send(request, reply)
        instead = self.instead.pop(0)
        if instead is None:
            self.drop(request)
            return web.Response()
        return await self.send(request, instead)

    async def send(self, request: web.Request, reply: Reply) -> web.StreamResponse:
        headers = {"Content-Type": reply.content_type}
        if len(reply.pieces) == 1:
            return web.Response(body=reply.pieces[0], status=reply.status, headers=headers)
        answer = web.StreamResponse(status=reply.status, headers=headers)
        await answer.prepare(request)
        for number, piece in enumerate(reply.pieces):
            if number == self.cut_after:
                self.drop(request)
                return answer
            if number:
                await (self.turns.acquire() if self.turns else asyncio.sleep(self.gap_s))
            await answer.write(piece)
        return answer

    def drop(self, request: web.Request) -> None:
        assert request.transport is not None
        request.transport.abort()

    def forget(self) -> None:
        """Be as at the beginning."""
        self.turns = self.hold = self.cut_after = None
        self.instead, self.seen, self.left = [], [], 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[asyncio.Event]:
        """Answer nothing but probes until the event is set, or to the end of the block."""
        self.hold = event = asyncio.Event()
        try:
            yield event
        finally:
            event.set()
            self.hold = None


async def asked_of(request: web.Request) -> Asked:
    """Give the members of the JSON or the fields of the form that was sent."""
    if request.content_type == "multipart/form-data":
        form = await request.post()
        files = {name: value for name, value in form.items() if isinstance(value, web.FileField)}
        return {**form, **{name: one.file.read() for name, one in files.items()}}
    body = await request.read()
    return json.loads(body) if body else {}


@contextlib.asynccontextmanager
async def apis(service: Apis | None = None, port: int = 0) -> AsyncIterator[Apis]:
    service = service or Apis()
    application = web.Application(client_max_size=64 << 20)
    application.router.add_route("*", "/{path:.*}", service.answer)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield service
    finally:
        await runner.cleanup()
