"""The first table of http.md section 1: what is where."""

import hashlib
from pathlib import Path

import pytest

from tests.support.facade import config, facade
from tests.support.upstream import Upstream

NEVER = "X-Upstream: do=never"


@pytest.mark.parametrize("kind", ["tts", "stt", "llm", "image"])
async def test_work_goes_to_the_routed_path_as_it_came(
    kind: str, tmp_path: Path, upstream: Upstream
) -> None:
    worker = {"paths": {kind: {"method": "PUT", "path": "/made/here?fixed=1"}}}
    content = config(upstream, worker=worker, routing={kind: "worker"})
    async with facade(tmp_path, content) as broker:
        answer = await broker.ask(
            "POST",
            f"/v1/{kind}?voice=a%20b&x=%2F",
            "Content-Type: audio/x-odd; a=b",
            body=b"\x00\xff some bytes",
        )
    assert answer.status == 200
    seen = answer.json()
    assert (seen["method"], seen["target"]) == ("PUT", "/made/here?fixed=1&voice=a%20b&x=%2F")
    assert seen["sha256"] == hashlib.sha256(b"\x00\xff some bytes").hexdigest()
    assert ["content-type", "audio/x-odd; a=b"] in seen["headers"]
    assert answer.headers["x-mgpu-consumer"] == "worker"
    assert answer.headers["x-mgpu-request"].startswith(broker.broker.run)
    assert int(answer.headers["x-mgpu-queue-ms"]) >= 0
    assert int(answer.headers["x-mgpu-load-ms"]) == 0


async def test_a_body_larger_than_the_memory_for_it_arrives_whole(
    tmp_path: Path, upstream: Upstream
) -> None:
    body = bytes(range(256)) * 4096 * 5  # 5 MiB
    async with facade(tmp_path, config(upstream)) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=body)
    assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()


async def test_an_upstreams_own_errors_reach_the_client_unchanged(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        for status in (400, 404, 500, 503):
            answer = await broker.ask(
                "POST", "/v1/tts", f"X-Upstream: do=text status={status} body=its-own", body=b""
            )
            assert (answer.status, answer.body) == (status, b"its-own")
            assert "x-should-retry" not in answer.headers


async def test_an_answer_streams_piece_by_piece(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        order = "X-Upstream: do=stream chunks=2 gap=1000"
        await client.send("POST", "/v1/llm", order, body=b"")
        assert (await client.head()).status == 200
        assert b"data: 0" in await client.reader.readuntil(b"0\n\n")  # the second is hours away


async def test_audio_needs_no_lease(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await broker.until("served", lambda status: status["consumers"]["worker"]["active"] == 1)
        answer = await broker.ask("GET", "/audio/a%20b/c.wav?q=1")
        assert answer.json()["target"] == "/audio/a%20b/c.wav?q=1"
        assert answer.headers["x-mgpu-consumer"] == "worker"
        head = await broker.ask("HEAD", "/audio/c.wav")
        assert (head.status, head.body) == (200, b"")


async def test_audio_without_an_audio_proxy_has_no_consumer(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream, audio_proxy=None)) as broker:
        answer = await broker.ask("GET", "/audio/c.wav")
        assert (answer.status, answer.error) == (404, "no_consumer")


async def test_it_lives_and_says_what_it_is(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        assert (await broker.ask("GET", "/healthz")).status == 200
        about = await broker.ask("GET", "/")
        assert "share a GPU" in about.json()["what"]
        assert (await broker.ask("HEAD", "/")).headers["content-length"] == str(len(about.body))


async def test_every_answer_has_an_id_of_its_own_and_a_date(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        answers = [await broker.ask("GET", path) for path in ("/", "/nothing", "/v1/tts")]
        assert len({answer.headers["x-mgpu-request"] for answer in answers}) == 3
        assert all("date" in answer.headers for answer in answers)
        assert all("server" not in answer.headers for answer in answers)


async def test_the_description_lists_every_operation_with_its_errors(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        told = (await broker.ask("GET", "/openapi.json")).json()
        assert told["openapi"].startswith("3.")
        assert set(told["paths"]["/v1/requests/{id}"]) == {"get", "delete"}
        assert told["paths"]["/audio/{path}"]["get"]["parameters"][0]["name"] == "path"
        for path, methods in told["paths"].items():
            for method in methods:
                target = path.replace("{path}", "x").replace("{name}", "x").replace("{id}", "x")
                verb = "HEAD" if target == "/v1/events" else method.upper()  # that has no end
                answer = await broker.ask(verb, target, body=b"")
                routed = answer.status < 400 or answer.error not in {
                    "method_not_allowed",
                    "internal_error",
                }
                assert routed, (method, path, answer)
        codes = told["components"]["schemas"]["Error"]["properties"]["error"]["enum"]
        assert "queue_timeout" in codes
