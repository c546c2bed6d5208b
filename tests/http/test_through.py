"""`front` ports and /upstream/: a service behind the broker, as if it were asked directly."""

import asyncio
import contextlib
import signal
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError, web

from mgpu_http.auth import hash_key
from tests.support.brokers import logged
from tests.support.dev_http import free_port, serving
from tests.support.facade import Facade, config, facade, serve_process, write_config

PASSIVE = ["*", "!POST /work*", "!/ws/work"]


class Service:
    """Answers what it was asked; has a WebSocket that repeats, and one that only hears."""

    def __init__(self) -> None:
        self.sockets: list[web.WebSocketResponse] = []
        self.headers: list[Any] = []
        self.hold = asyncio.Event()
        self.ended = asyncio.Event()  # a socket

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path != "/health":
            self.headers.append(request.headers)
        if request.path.startswith("/ws"):
            return await self._socket(request)
        body = (await request.read()).decode()
        if request.path == "/work/long":
            await self.hold.wait()
        told = {"method": request.method, "path": request.raw_path, "body": body}
        return web.json_response(told, headers={"X-Own": "1"})

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ws/refused":
            return web.json_response({}, status=418)
        socket = web.WebSocketResponse(protocols=("a", "b"), max_msg_size=0)
        await socket.prepare(request)
        self.sockets.append(socket)
        async for message in socket:
            if message.data == "close":
                await socket.close(code=4001, message=b"enough")
            elif message.data == "drop":
                request.transport.abort()
            elif message.type is WSMsgType.TEXT:
                await socket.send_str(f"{socket.ws_protocol} {message.data}")
            else:
                await socket.send_bytes(message.data)
        self.ended.set()
        return socket


@contextlib.asynccontextmanager
async def broker_of(directory: Path, **worker: Any):
    """A broker before a service that has a front port; gives it, the service and the port."""
    service, port = Service(), free_port()
    async with serving(service.answer) as url:
        keys = {"url": url, "passive": PASSIVE, "front": port, **worker}
        content = config(None, worker=keys)
        async with facade(directory, content) as broker:
            await broker.until("up", lambda status: status["consumers"]["worker"]["healthy"])
            yield broker, service, port


async def at(port: int, method: str, target: str, *headers: str, body: bytes | None = None):
    return await Facade(port, broker=None, server=None, path=None).ask(
        method, target, *headers, body=body
    )


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_any_method_goes_to_the_same_path(tmp_path: Path, method: str) -> None:
    async with broker_of(tmp_path) as (broker, _, port):
        for told in (
            await broker.ask(method, "/upstream/worker/a%20b/?q=%2F", body=b"x"),
            await at(port, method, "/a%20b/?q=%2F", body=b"x"),
        ):
            assert told.status == 200
            assert told.headers["x-own"] == "1"
            assert told.headers["x-mgpu-consumer"] == "worker"
            assert told.json() == {"method": method, "path": "/a%20b/?q=%2F", "body": "x"}


async def test_work_waits_for_its_turn_and_what_is_passive_does_not(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (broker, service, port):
        first = asyncio.create_task(at(port, "POST", "/work/long"))
        await broker.until("at work", lambda s: s["consumers"]["worker"]["active"] == 1)
        second = asyncio.create_task(broker.ask("POST", "/upstream/worker/work"))
        await broker.until("waiting", lambda s: s["consumers"]["worker"]["waiting"] == 1)
        kinds = {row["kind"] for row in (await broker.status())["requests"]}
        assert kinds == {"tts"}  # the first of what it does
        assert (await at(port, "GET", "/anything")).status == 200
        assert not second.done()
        service.hold.set()
        assert {(await first).status, (await second).status} == {200}


async def test_it_wakes_nothing_and_keeps_nothing(tmp_path: Path) -> None:
    keys = {"vram_resident_mib": 1_000, "unload": {"path": "/free"}, "idle_unload_s": 0.3}
    async with (
        broker_of(tmp_path, **keys) as (broker, _, port),
        ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/ws"),
    ):
        assert (await at(port, "GET", "/")).status == 200
        row = (await broker.status())["consumers"]["worker"]
        assert (row["total_requests"], row["loaded"]) == (0, False)
        assert (await at(port, "POST", "/work")).status == 200
        # The open socket does not count as use.
        await broker.until("unloaded", lambda s: not s["consumers"]["worker"]["loaded"])


async def test_one_that_is_down_is_not_started_for_it(tmp_path: Path) -> None:
    driver = {"process": {"command": ["false"]}}
    keys = {"url": f"http://127.0.0.1:{free_port()}", "driver": driver}
    async with facade(tmp_path, config(None, worker=keys)) as broker:
        answer = await broker.ask("GET", "/upstream/worker/page")
        assert (answer.status, answer.error) == (503, "consumer_unreachable")
        assert (await broker.status())["scheduler"]["loads"] == 0


async def test_nobody_there(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (broker, _, _):
        answer = await broker.ask("GET", "/upstream/nobody/x")
        assert (answer.status, answer.error) == (404, "no_consumer")
        answer = await broker.ask("GET", "/upstream/worker/../../v1/status")
        assert "scheduler" in answer.json()  # a path that climbs is what it climbs to


async def test_a_page_of_its_own_is_not_foreign_to_the_service(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (_, service, port):
        own = f"http://localhost:{port}"
        host = f"localhost:{port}"
        front = Facade(port, broker=None, server=None, path=None)
        assert (await front.ask("GET", "/x", f"Origin: {own}", host=host)).status == 200
        assert "Origin" not in service.headers[-1]
        foreign = await front.ask("GET", "/x", "Origin: http://evil.example", host=host)
        assert (foreign.status, foreign.error) == (403, "forbidden")
        foreign = await front.ask("GET", "/x", host="evil.example")
        assert (foreign.status, foreign.error) == (403, "forbidden")


async def test_where_keys_are_needed_a_front_needs_one_too(tmp_path: Path) -> None:
    keys = {"auth": {"keys": [{"name": "me", "hash": hash_key("secret")}]}}
    service, port = Service(), free_port()
    async with serving(service.answer) as url:
        content = config(None, worker={"url": url, "front": port}, **keys)
        async with facade(tmp_path, content):
            answer = await at(port, "GET", "/x")
            assert (answer.status, answer.error) == (401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Basic ")
            for wrong in ("Basic !", "Basic bWU6d3Jvbmc=", "Digest secret", "Basic c2VjcmV0"):
                answer = await at(port, "GET", "/x", f"Authorization: {wrong}")
                assert (answer.status, answer.error) == (401, "unauthorized"), wrong
            password = {"Authorization": f"Basic {b64encode(b'anybody:secret').decode()}"}
            async with ClientSession(headers=password) as session:
                assert (await session.get(f"http://127.0.0.1:{port}/x")).status == 200
                assert "Authorization" not in service.headers[-1]
                async with session.ws_connect(f"http://127.0.0.1:{port}/ws") as socket:
                    await socket.send_str("hi")
                    assert await socket.receive_str(timeout=5) == "None hi"
            async with ClientSession() as session:
                with pytest.raises(WSServerHandshakeError) as refused:
                    await session.ws_connect(f"http://127.0.0.1:{port}/ws")
                assert refused.value.status == 401


async def test_ports_follow_the_configuration(tmp_path: Path) -> None:
    service, ports = Service(), [free_port(), free_port()]
    async with serving(service.answer) as url:

        def content(port: int | None) -> dict[str, Any]:
            more = {} if port is None else {"front": port}
            return config(None, worker={"url": url, "passive": ["*"], **more})

        async with facade(tmp_path, content(ports[0])) as broker:
            assert (await at(ports[0], "GET", "/x")).status == 200
            write_config(tmp_path, content(ports[1]))
            assert (await broker.ask("POST", "/v1/reload")).status == 200
            assert (await at(ports[1], "GET", "/x")).status == 200
            with pytest.raises(ConnectionRefusedError):
                await at(ports[0], "GET", "/x")
            taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", ports[0])
            async with taken:
                write_config(tmp_path, content(ports[0]))
                refused = await broker.ask("POST", "/v1/reload")
                assert refused.status == 400
                assert f"127.0.0.1:{ports[0]}" in refused.json()["message"]
            assert (await at(ports[1], "GET", "/x")).status == 200


# ----------------------------------------------------------------------------------- WebSocket


async def test_messages_pass_both_ways(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (broker, service, port), ClientSession() as session:
        for url in (f"{broker.url}/upstream/worker/ws?x=1", f"http://127.0.0.1:{port}/ws?x=1"):
            async with session.ws_connect(url, protocols=("b", "c"), max_msg_size=0) as socket:
                assert socket.protocol == "b"
                await socket.send_str("hi")
                assert await socket.receive_str(timeout=5) == "b hi"
                large = bytes(range(256)) * 40_000  # beyond what aiohttp takes by itself
                await socket.send_bytes(large)
                assert await socket.receive_bytes(timeout=5) == large
                await socket.send_str("close")
                message = await socket.receive(timeout=5)
                assert (message.type, message.data) == (WSMsgType.CLOSE, 4001)
                assert message.extra == "enough"
        assert service.headers[-1]["X-Forwarded-Host"] == f"127.0.0.1:{port}"
        assert (await broker.status())["scheduler"]["total_jobs"] == 0


async def test_a_service_that_drops_it_drops_the_client(tmp_path: Path) -> None:
    async with (
        broker_of(tmp_path) as (_, _, port),
        ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/ws") as socket,
    ):
        await socket.send_str("drop")
        message = await socket.receive(timeout=5)
        assert message.type is not WSMsgType.CLOSE  # nobody said good-bye


async def test_a_client_that_leaves_ends_it_at_the_service(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (_, service, port), ClientSession() as session:
        socket = await session.ws_connect(f"http://127.0.0.1:{port}/ws")
        await socket.close()
        async with asyncio.timeout(5):
            await service.ended.wait()
    # What took no turn is nothing that the scheduler hears of, its end included.
    assert logged(tmp_path / "log", "Started")
    assert not logged(tmp_path / "log", "Cancel")


async def test_a_refusal_of_the_service_is_its_own(tmp_path: Path) -> None:
    async with broker_of(tmp_path) as (broker, _, port), ClientSession() as session:
        for url, status in (
            (f"http://127.0.0.1:{port}/ws/refused", 418),
            (f"{broker.url}/upstream/nobody/ws", 404),
            (f"{broker.url}/v1/events/no", 404),
        ):
            with pytest.raises(WSServerHandshakeError) as refused:
                await session.ws_connect(url)
            assert refused.value.status == status


async def test_one_that_is_work_has_a_lease_for_as_long_as_it_is_used(tmp_path: Path) -> None:
    keys = {"timeout_s": {"idle": 0.5}}
    async with broker_of(tmp_path, **keys) as (broker, _, port), ClientSession() as session:
        async with session.ws_connect(f"http://127.0.0.1:{port}/ws/work") as socket:
            await broker.until("at work", lambda s: s["consumers"]["worker"]["active"] == 1)
            await socket.send_str("hi")
            assert await socket.receive_str(timeout=5) == "None hi"
            message = await socket.receive(timeout=5)
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        await broker.until("over", lambda s: s["consumers"]["worker"]["active"] == 0)


async def test_who_comes_again_closes_his_old_one_first(tmp_path: Path) -> None:
    """ComfyUI forgets the newer of two sockets of one client when the older closes after it."""
    async with broker_of(tmp_path) as (_, service, port), ClientSession() as session:
        url = f"http://127.0.0.1:{port}/ws?clientId=me"
        async with session.ws_connect(url) as old, session.ws_connect(url) as new:
            assert [socket.closed for socket in service.sockets] == [True, False]
            await old.send_str("deaf")
            await new.send_str("hi")
            assert await new.receive_str(timeout=5) == "None hi"
            await old.close()
            await new.send_str("still")
            assert await new.receive_str(timeout=5) == "None still"
        async with (
            session.ws_connect(url.replace("me", "you")) as one,
            session.ws_connect(url.replace("me", "they")) as other,
        ):
            assert not any(socket.closed for socket in service.sockets[2:])
            assert not any(socket.closed for socket in (one, other))


async def test_the_end_of_the_broker_does_not_wait_for_an_idle_one(tmp_path: Path) -> None:
    service, port = Service(), free_port()
    async with serving(service.answer) as url:
        content = config(None, worker={"url": url, "front": port, "passive": ["*"]})
        with serve_process(tmp_path, content) as broker:
            async with (
                ClientSession() as session,
                session.ws_connect(f"http://127.0.0.1:{port}/ws") as socket,
            ):
                broker.signal(signal.SIGTERM)
                message = await socket.receive(timeout=10)
                assert message.type is not WSMsgType.TEXT
            assert await broker.exit_code() == 0
