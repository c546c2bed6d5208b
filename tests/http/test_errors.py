"""The second table of http.md section 1: each of the broker's own errors, as a client meets it."""

import asyncio
import json
from pathlib import Path

import pytest
from attrs import evolve

from mgpu_core.planners import View
from mgpu_effects.errors import STATUS
from mgpu_effects.settings import Settings
from mgpu_http.auth import hash_key
from tests.support.facade import Answer, Facade, config, facade
from tests.support.upstream import Upstream

NEVER = "X-Upstream: do=never"
ROUTES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}


def expect(answer: Answer, code: str, *, retryable: bool, consumer: str | None = "worker") -> str:
    """Check status, shape and headers of an error; give its message."""
    told = answer.json()
    assert (answer.status, told["error"]) == (STATUS[code], code)
    assert list(told) == ["error", "message", "consumer", "retryable"]
    assert (told["consumer"], told["retryable"]) == (consumer, retryable)
    assert answer.headers.get("x-should-retry") == (None if retryable else "false")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("x-mgpu-consumer") == consumer
    message: str = told["message"]
    return message


async def occupy(broker: Facade) -> None:
    """Wait until the worker serves somebody."""
    await broker.until("served", lambda status: status["consumers"]["worker"]["active"] == 1)


async def test_consumer_unreachable_when_its_probe_is_refused(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        await broker.until("down", lambda s: s["consumers"]["worker"]["healthy"] is False)
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", "Content-Length: 5")  # and no body
            answer = await client.answer()
        expect(answer, "consumer_unreachable", retryable=True)
        assert int(answer.headers["retry-after"]) >= 1


async def test_consumer_unreachable_when_the_connection_cannot_be_made(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream, probe={"interval_s": 1000})) as broker:
        await broker.until("up", lambda s: s["consumers"]["worker"]["healthy"])
        upstream.kill()
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        expect(answer, "consumer_unreachable", retryable=True)


async def test_no_consumer_for_a_kind_that_is_not_routed(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        answer = await broker.ask("POST", "/v1/image", body=b"")
        assert "image" in expect(answer, "no_consumer", retryable=False, consumer=None)


async def test_no_consumer_of_that_name(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        answer = await broker.ask("POST", "/v1/consumers/nobody/load")
        assert "nobody" in expect(answer, "no_consumer", retryable=False, consumer=None)


async def test_scheduler_error_when_the_scheduler_has_a_defect(
    tmp_path: Path, upstream: Upstream
) -> None:
    class Broken:
        def victims(self, _target: str, _view: View) -> tuple[str, ...] | None:
            raise RuntimeError("a planner of the user's own")

    async with facade(tmp_path, config(upstream), planner=Broken()) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        assert (answer.status, answer.error) == (503, "scheduler_error")
        assert broker.broker.failed.is_set()
        assert (await broker.ask("GET", "/healthz")).status == 500


async def test_bad_consumer_url_that_no_check_saw(tmp_path: Path, upstream: Upstream) -> None:
    def alter(settings: Settings) -> Settings:
        broken = evolve(settings.consumers["worker"], url="http://")
        return evolve(settings, consumers={"worker": broken})

    async with facade(tmp_path, config(upstream, probe={"failures": 1000}), alter=alter) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        expect(answer, "bad_consumer_url", retryable=False)


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/v1/tts", "X-Mgpu-Priority: 5"),
        ("/v1/tts", "X-Mgpu-Priority: high"),
        ("/v1/tts", "X-Mgpu-Max-Wait: soon"),
        ("/v1/tts", "X-Mgpu-Max-Wait: -1"),
        ("/v1/tts", "X-Mgpu-Max-Wait: nan"),
        ("/v1/tts", f"X-Large: {'x' * 70000}"),
        ("/../etc/passwd", "X: y"),
        ("/audio/%2e%2e%2f%2e%2e%2fetc/passwd", "X: y"),
    ],
)
async def test_bad_request(target: str, header: str, tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        answer = await broker.ask("POST", target, header, body=b"")
        expect(answer, "bad_request", retryable=False, consumer=None)
        assert upstream.count("/do/tts") == 0


async def test_overloaded_beyond_max_pending(tmp_path: Path, upstream: Upstream) -> None:
    content = config(upstream, worker={"max_pending": 1})
    async with facade(tmp_path, content) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await occupy(broker)
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        expect(answer, "overloaded", retryable=True)
        assert int(answer.headers["retry-after"]) >= 1


async def test_queue_timeout_says_for_whom_it_waited(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await occupy(broker)
        answer = await broker.ask("POST", "/v1/tts", "X-Mgpu-Max-Wait: 0.2", body=b"")
        assert "worker" in expect(answer, "queue_timeout", retryable=True)


async def test_insufficient_vram_with_the_numbers(tmp_path: Path, upstream: Upstream) -> None:
    content = config(upstream, worker={"vram_resident_mib": 10000, "unload": {"path": "/unload"}})
    content["consumers"]["keeper"] = {
        "url": upstream.url,
        "vram_resident_mib": 20000,
        "pinned": True,
        **ROUTES,
    }
    async with facade(tmp_path, content) as broker:
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        message = expect(answer, "insufficient_vram", retryable=False)
        assert "10000 MiB" in message
        assert "4000 MiB" in message
        assert "keeper" in message


async def test_load_failed(tmp_path: Path, upstream: Upstream) -> None:
    upstream.rule("/load", status=500)
    worker = {"vram_resident_mib": 100, **ROUTES}
    async with facade(tmp_path, config(upstream, worker=worker)) as broker:
        await broker.ask("POST", "/v1/consumers/worker/unload")
        await broker.until("out", lambda s: s["consumers"]["worker"]["residency"] == "absent")
        answer = await broker.ask("POST", "/v1/tts", body=b"")
        expect(answer, "load_failed", retryable=True)


async def test_unloaded_by_an_operator_while_it_waits(tmp_path: Path, upstream: Upstream) -> None:
    content = config(upstream, worker={"vram_resident_mib": 100, **ROUTES})
    async with facade(tmp_path, content) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await occupy(broker)
        async with broker.connect() as waiting:
            await waiting.send("POST", "/v1/tts", body=b"")
            await broker.until("waiting", lambda s: s["scheduler"]["queue_depth"] == 1)
            await broker.ask("POST", "/v1/consumers/worker/unload")
            expect(await waiting.answer(), "unloaded", retryable=True)


async def test_shutting_down_while_draining(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        assert (await broker.ask("POST", "/v1/drain")).json() == {"draining": True}
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", "Content-Length: 5")  # and no body
            expect(await client.answer(), "shutting_down", retryable=True)
        assert (await broker.ask("POST", "/v1/resume")).json() == {"draining": False}
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200


async def test_upstream_timeout(tmp_path: Path, upstream: Upstream) -> None:
    worker = {"timeout_s": {"first_byte": 0.2, "connect": 0.2}}
    async with facade(tmp_path, config(upstream, worker=worker)) as broker:
        answer = await broker.ask("POST", "/v1/tts", NEVER, body=b"")
        expect(answer, "upstream_timeout", retryable=False)


async def test_upstream_disconnected_before_it_answered(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        answer = await broker.ask("POST", "/v1/tts", "X-Upstream: do=drop", body=b"")
        assert (answer.status, answer.error) == (502, "upstream_disconnected")


@pytest.mark.parametrize("large", ["declared", "chunked"])
async def test_body_too_large(large: str, tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream, max_body_mib=1)) as broker:
        async with broker.connect() as client:
            if large == "declared":
                await client.send("POST", "/v1/tts", f"Content-Length: {2**20 + 1}")
            else:
                await client.send("POST", "/v1/tts", "Transfer-Encoding: chunked")
                piece = b"%x\r\n%s\r\n" % (2**19, bytes(2**19))
                client.writer.write(piece * 3 + b"0\r\n\r\n")
            answer = await client.answer()
        assert "1 MiB" in expect(answer, "body_too_large", retryable=False, consumer=None)
        assert upstream.count("/do/tts") == 0


async def test_upload_timeout_when_a_body_stalls(tmp_path: Path, upstream: Upstream) -> None:
    worker = {"timeout_s": {"upload": 0.2}}
    async with facade(tmp_path, config(upstream, worker=worker)) as broker:
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", "Content-Length: 10")
            client.writer.write(b"half")
            expect(await client.answer(), "upload_timeout", retryable=True, consumer=None)
        status = await broker.status()
        assert status["consumers"]["worker"]["total_requests"] == 0


async def test_method_not_allowed_says_which_are(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        answer = await broker.ask("GET", "/v1/tts")
        expect(answer, "method_not_allowed", retryable=False, consumer=None)
        assert answer.headers["allow"] == "POST"
        answer = await broker.ask("PUT", "/v1/requests/r1", body=b"x")
        assert answer.headers["allow"] == "GET, HEAD, DELETE"


async def test_not_found(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        for target in ("/nothing", "/v1/requests/nobody", "/v1/tts/more"):
            answer = await broker.ask("GET", target)
            expect(answer, "not_found", retryable=False, consumer=None)


async def test_cancelled_by_an_operator_while_it_waits_and_while_it_is_served(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await occupy(broker)
        async with broker.connect() as waiting:
            await waiting.send("POST", "/v1/tts", body=b"")
            status = await broker.until("waiting", lambda s: s["scheduler"]["queue_depth"] == 1)
            served, waits = [row["id"] for row in status["requests"]]
            for name, client in ((waits, waiting), (served, busy)):
                answer = await broker.ask("DELETE", f"/v1/requests/{name}")
                assert answer.json() == {"request": name, "cancelled": True}
                answer = await client.answer()
                assert (answer.status, answer.error) == (503, "cancelled")
                assert answer.headers["x-mgpu-request"] == name
        await broker.until("empty", lambda s: not s["requests"])
        assert (await broker.ask("DELETE", f"/v1/requests/{served}")).status == 404


async def test_internal_error_has_an_id_that_is_in_the_log(
    tmp_path: Path, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        routing = broker.broker.settings
        broker.broker.settings = evolve(routing, routing=None)
        answer = await broker.ask("POST", "/v1/tts", body=b"a secret prompt")
        broker.broker.settings = routing
        message = expect(answer, "internal_error", retryable=False, consumer=None)
        assert answer.headers["x-mgpu-request"] in message
        assert answer.headers["x-mgpu-request"] in caplog.text
        assert "secret" not in caplog.text
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200


@pytest.mark.parametrize(
    ("key", "target", "code"),
    [("wrong", "/v1/status", "unauthorized"), ("client", "/v1/drain", "forbidden")],
)
async def test_unauthorized_and_forbidden(key: str, target: str, code: str, tmp_path: Path) -> None:
    keys = [{"name": "someone", "hash": hash_key("client")}]
    async with facade(tmp_path, config(None, auth={"keys": keys})) as broker:
        method = "GET" if target == "/v1/status" else "POST"
        answer = await broker.ask(method, target, f"X-Api-Key: {key}")
        expect(answer, code, retryable=False, consumer=None)


async def test_exactly_one_answer_for_each_of_many_at_once(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream, worker={"max_concurrency": 8})) as broker:
        bodies = [json.dumps({"n": n}).encode() for n in range(40)]
        answers = await asyncio.gather(
            *(broker.ask("POST", "/v1/tts", body=body) for body in bodies)
        )
        assert [a.json()["body"].encode() for a in answers] == bodies
        assert upstream.count("/do/tts") == 40
