"""OpenAI's and Anthropic's endpoints: who has the model does the work; errors as they read them."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mgpu_effects.errors import STATUS, BrokerError
from mgpu_effects.settings import MODEL_PATHS
from mgpu_http.dialects import TYPES, anthropic, dialect_of, openai
from tests.support.dev_http import free_port, serving
from tests.support.facade import Client, config, facade

FORM = "Content-Type: multipart/form-data; boundary=b"


async def echo(request: web.Request) -> web.Response:
    """Tell what came; list two models."""
    if request.path == "/v1/models":
        return web.json_response({"data": [{"id": "met/one"}, {"id": "two"}, {"id": 3}]})
    body = (await request.read()).decode()
    return web.json_response({"path": request.path_qs, "body": body})


def consumers(url: str) -> dict[str, object]:
    """One that has names, one with models of its own, and one that takes any."""
    some = {"url": url, "health": {"path": "/health"}}
    mapped = {"fine": {"upstream": "org/fine:1", "aliases": ["gpt-fine"]}, "plain": {}}
    return {
        "voice": {**some, "paths": {"tts": {"path": "/speak"}}, "models": ["tts-1", "whisper-1"]},
        "router": {**some, "models": mapped},
        "any": {**some, "paths": {"llm": {"path": "/chat"}}, "models": {"*": {}}},
    }


def rack(all_: Mapping[str, Any], routing: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A configuration with these consumers and no others."""
    plain = config(None)
    return {key: plain[key] for key in ("listen", "gpu", "probe")} | {
        "consumers": all_,
        "routing": routing or {},
    }


def asks(**body: object) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("path", MODEL_PATHS)
async def test_who_has_the_model_gets_it_at_the_same_path(tmp_path: Path, path: str) -> None:
    async with serving(echo) as url, facade(tmp_path, rack(consumers(url))) as b:
        for model, owner, sent in (
            ("tts-1", "voice", "tts-1"),
            ("plain", "router/plain", "plain"),
            ("gpt-fine", "router/fine", "org/fine:1"),
            ("org/fine:1", "router/fine", "org/fine:1"),
            ("met/one:7b", "any/met/one:7b", "met/one:7b"),
        ):
            answer = await b.ask("POST", f"{path}?x=1", body=asks(model=model, n=1))
            assert answer.status == 200, answer.body
            assert answer.headers["x-mgpu-consumer"] == owner
            assert answer.json() == {
                "path": f"{path}?x=1",
                "body": asks(model=sent, n=1).decode(),
            }


async def test_a_form_names_its_model_too(tmp_path: Path) -> None:
    def form(model: str) -> str:
        return (
            f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            "abc\r\n--b--\r\n"
        )

    async with serving(echo) as url, facade(tmp_path, rack(consumers(url))) as b:
        body = form("gpt-fine").encode()
        answer = await b.ask("POST", "/v1/audio/transcriptions", FORM, body=body)
        assert answer.headers["x-mgpu-consumer"] == "router/fine"
        assert answer.json()["body"] == form("org/fine:1")


async def test_without_a_name_the_kind_decides(tmp_path: Path) -> None:
    async with serving(echo) as url:
        content = rack(consumers(url), {"tts": "voice", "llm": "any"})
        content["consumers"]["more"] = {"url": url, "models": {"*": {}}}
        async with facade(tmp_path, content) as broker:
            answer = await broker.ask("POST", "/v1/audio/speech", body=asks(input="hi"))
            assert answer.headers["x-mgpu-consumer"] == "voice"
            # Two take any: the one that is routed for the kind.
            answer = await broker.ask("POST", "/v1/embeddings", body=asks(model="new"))
            assert answer.headers["x-mgpu-consumer"] == "any/new"
            answer = await broker.ask("POST", "/v1/images/generations", body=asks(model="other"))
            assert (answer.status, answer.error) == (404, "no_consumer")
            answer = await broker.ask("POST", "/v1/images/generations", body=asks(prompt="a cat"))
            assert (answer.status, answer.error) == (404, "no_consumer")


async def test_its_paths_may_lead_elsewhere(tmp_path: Path) -> None:
    async with serving(echo) as url:
        paths = {"stt": {"path": "/inference"}, "/v1/audio/transcriptions": {"path": "/inference"}}
        worker = {"url": url, "paths": paths, "models": ["whisper-1"]}
        async with facade(tmp_path, rack({"worker": worker})) as b:
            answer = await b.ask("POST", "/v1/audio/transcriptions", body=asks(model="whisper-1"))
            assert answer.json()["path"] == "/inference"


async def test_the_models_of_all_are_listed(tmp_path: Path) -> None:
    async with serving(echo) as url:
        content = rack(consumers(url))
        content["routing"] = {"llm": "any"}
        content["consumers"]["down"] = {
            "url": f"http://127.0.0.1:{free_port()}",
            "models": {"*": {}, "asleep": {}},
        }
        async with facade(tmp_path, content) as broker:
            await broker.ask("POST", "/v1/embeddings", body=asks(model="nonsense"))
            listed = (await broker.ask("GET", "/v1/models")).json()
            assert {row["id"]: row["owned_by"] for row in listed["data"]} == {
                "tts-1": "voice",
                "whisper-1": "voice",
                "fine": "router",
                "gpt-fine": "router",
                "org/fine:1": "router",
                "plain": "router",
                "met/one": "any",
                "two": "any",
                "asleep": "down",
            }
            one = await broker.ask("GET", "/v1/models/org/fine:1")
            assert one.json() in listed["data"]
            none = await broker.ask("GET", "/v1/models/gpt-9")
            assert (none.status, none.error) == (404, "not_found")
            assert none.json()["error"]["type"] == "not_found_error"


UNKNOWN, NONSENSE, DOWN = asks(model="gpt-9"), b"[]", asks(model="m")
ERRORS = [
    ("/v1/chat/completions", UNKNOWN, (404, "not_found_error", "no_consumer")),
    ("/v1/chat/completions", NONSENSE, (400, "invalid_request_error", "bad_request")),
    ("/v1/messages", UNKNOWN, (404, "not_found_error", "no_consumer")),
    ("/v1/messages/count_tokens", NONSENSE, (400, "invalid_request_error", "bad_request")),
    ("/v1/messages", DOWN, (503, "overloaded_error", "consumer_unreachable")),
    ("/v1/embeddings", DOWN, (503, "server_error", "consumer_unreachable")),
]


@pytest.mark.parametrize(("path", "body", "expected"), ERRORS)
async def test_an_error_has_the_shape_that_its_library_reads(
    tmp_path: Path, path: str, body: bytes, expected: tuple[int, str, str]
) -> None:
    worker = {"url": f"http://127.0.0.1:{free_port()}", "models": ["m"]}
    async with facade(tmp_path, rack({"worker": worker})) as broker:
        await broker.until("down", lambda status: status["consumers"]["worker"]["error"])
        answer = await broker.ask("POST", path, body=body)
        told, error = answer.json(), answer.json()["error"]
        assert (answer.status, error["type"], error["code"]) == expected
        assert error["message"]
        assert told.get("type") == ("error" if path.startswith("/v1/messages") else None)
        told_not_to = answer.headers.get("x-should-retry") == "false"
        assert told_not_to is not error["retryable"]


def test_every_status_has_a_type() -> None:
    assert set(STATUS.values()) == set(TYPES)
    assert dialect_of("/v1/tts") is not dialect_of("/v1/models") is openai
    assert dialect_of("/v1/messages/count_tokens") is anthropic
    error = BrokerError(code="overloaded", message="full")
    assert dialect_of("/api/chat")(error)["error"] == "full"


async def test_a_wrong_key_is_told_in_the_same_shape(tmp_path: Path) -> None:
    keys = {"auth": {"keys": [{"name": "me", "hash": "0" * 64}]}}
    async with facade(tmp_path, config(None, **keys)) as broker:
        answer = await broker.ask("POST", "/v1/chat/completions", body=asks(model="m"))
        assert answer.status == 401
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_a_client_that_leaves_with_its_body_half_sent_asks_for_nothing(
    tmp_path: Path,
) -> None:
    async with serving(echo) as url, facade(tmp_path, rack(consumers(url))) as b:
        async with b.connect() as client:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            client.writer.write(head.encode())
            await client.writer.drain()
            await asyncio.sleep(0)
        answer = await b.ask("POST", "/v1/embeddings", body=asks(model="plain"))
        assert answer.status == 200
        assert (await b.status())["scheduler"]["queue_depth"] == 0


# ------------------------------------------------------------------------- comments while it waits


STREAM = {"text": "data: {}\n\ndata: [DONE]\n\n", "content_type": "text/event-stream"}
ASKS = "X-Mgpu-Progress: sse"
HURRY = "X-Mgpu-Max-Wait: 0.4"


@contextlib.asynccontextmanager
async def waiting(
    directory: Path, path: str, *headers: str, answer: Mapping[str, Any] = STREAM, **worker: Any
) -> AsyncIterator[tuple[Client, asyncio.Event]]:
    """A client whose stream waits behind another's, until the event is set."""
    hold = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.Response()
        await request.read()
        await hold.wait()
        return web.Response(**answer)

    keys = {"models": ["m"], "paths": {"llm": {"path": "/chat"}}, **worker}
    async with serving(handle) as url:
        content = rack({"worker": {"url": url, **keys}}, {"llm": "worker"})
        async with facade(directory, content) as broker, broker.connect() as client:
            first = asyncio.create_task(broker.ask("POST", "/v1/llm", body=asks(model="m")))
            await broker.until("at work", lambda s: s["consumers"]["worker"]["active"] == 1)
            await client.send("POST", path, *headers, body=asks(model="m", stream=True))
            try:
                yield client, hold
            finally:
                hold.set()
                await first


async def test_who_waits_for_a_stream_is_told_its_place(tmp_path: Path) -> None:
    keys = {"wait_comments_s": 0.05}
    async with waiting(tmp_path, "/v1/chat/completions", **keys) as (client, hold):
        head = await client.head()
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        comment = (await client.reader.readexactly(size)).decode()
        assert re.fullmatch(r": position 1 of 1: waits for a place at worker \(\S+\)\n\n", comment)
        await client.reader.readexactly(2)
        hold.set()
        rest = await client.rest(head)
        assert rest.complete
        *comments, waited, data, done, _ = rest.body.decode().split("\n\n")
        assert all(each.startswith(": ") for each in comments)
        assert re.fullmatch(r": x-mgpu-queue-ms: \d+, x-mgpu-load-ms: 0", waited)
        assert (data, done) == ("data: {}", "data: [DONE]")


@pytest.mark.parametrize(
    ("path", "answer", "expected"),
    [
        (
            "/v1/chat/completions",
            {"status": 400, "text": '{"error": {"message": "no", "code": 7}}'},
            'data: {"error": {"code": 7, "message": "no", "status": 400}}',
        ),
        (
            "/v1/llm",
            {"status": 500, "text": "boom"},
            'data: {"error": {"code": "http_500", "message": "boom", "status": 500}}',
        ),
        ("/v1/llm", {"text": '{"whole": 1}'}, 'data: {"whole": 1}'),
    ],
)
async def test_an_answer_that_is_no_stream_is_one_event(
    tmp_path: Path, path: str, answer: Mapping[str, Any], expected: str
) -> None:
    keys = {"wait_comments_s": 0.05}
    async with waiting(tmp_path, path, ASKS, answer=answer, **keys) as (client, hold):
        head = await client.head()
        hold.set()
        rest = await client.rest(head)
        assert rest.complete
        assert rest.body.decode().split("\n\n")[-2] == expected


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/chat/completions", 'data: {"error": {"type": "server_error"'),
        ("/v1/llm", 'data: {"error": {"type": "server_error"'),
        ("/v1/messages", 'event: error\ndata: {"type": "error", "error": {"type": "overloaded_er'),
    ],
)
async def test_an_error_after_the_first_comment_is_an_event(
    tmp_path: Path, path: str, begins: str
) -> None:
    keys = {"wait_comments_s": 0.05}
    async with waiting(tmp_path, path, ASKS, HURRY, **keys) as (client, _):
        rest = await client.rest(await client.head())
        assert rest.complete
        event = rest.body.decode().split("\n\n")[-2]
        assert event.startswith(begins)
        error = json.loads(event.rpartition("data: ")[2])["error"]
        assert (error["code"], error["status"]) == ("queue_timeout", 503)


@pytest.mark.parametrize(
    ("headers", "worker"), [((), {}), ((ASKS,), {"wait_comments_s": 60}), ((HURRY,), {})]
)
async def test_else_the_head_waits_for_the_service(
    tmp_path: Path, headers: tuple[str, ...], worker: Mapping[str, Any]
) -> None:
    async with waiting(tmp_path, "/v1/completions", *headers, **worker) as (client, hold):
        if HURRY not in headers:
            hold.set()
        answer = await client.answer()
        assert answer.status == (503 if HURRY in headers else 200)
        assert b": " not in answer.body.split(b"data")[0] or HURRY in headers


async def test_the_header_has_one_value(tmp_path: Path) -> None:
    async with serving(echo) as url, facade(tmp_path, rack(consumers(url))) as broker:
        answer = await broker.ask(
            "POST", "/v1/embeddings", "X-Mgpu-Progress: yes", body=asks(model="plain")
        )
        assert (answer.status, answer.error) == (400, "bad_request")
