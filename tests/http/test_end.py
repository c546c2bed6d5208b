"""`mgpu serve` as a process: its start, its signals, its limits and its end."""

import asyncio
import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from mgpu_http import server
from mgpu_http.server import LAST_ANSWERS_S, MAX_HEAD_BYTES, bind
from tests.support.facade import Client, config, facade, serve_process, write_config
from tests.support.upstream import Upstream, eventually


async def test_sigterm_refuses_those_who_wait_and_lets_those_served_finish(
    tmp_path: Path, upstream: Upstream
) -> None:
    with serve_process(tmp_path, config(upstream)) as broker:
        async with (
            broker.connect() as served,
            broker.connect() as waiting,
            broker.connect() as uploading,
            broker.connect() as idle,
        ):
            order = "X-Upstream: do=stream chunks=4 gap=0.3"
            await served.send("POST", "/v1/tts", order, body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            await waiting.send("POST", "/v1/tts", body=b"")
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await uploading.send("POST", "/v1/tts", "Content-Length: 5")
            await idle.send("GET", "/")
            await idle.answer()

            broker.signal(signal.SIGTERM)
            refused = await waiting.answer()
            assert (refused.status, refused.error) == (503, "shutting_down")
            assert refused.json()["retryable"]
            with pytest.raises(ConnectionError):
                await Client(*await asyncio.open_connection("127.0.0.1", broker.port)).head()
            answer = await served.answer()
            assert answer.complete
            assert answer.body.endswith(b"data: 3\n\n")
            late = await uploading.answer()
            assert (late.status, late.error) == (503, "shutting_down")
            assert await idle.closed() == b""
        assert await broker.exit_code() == 0
    assert not broker.said("Traceback|ERROR"), broker.lines
    assert upstream.count("/do/tts") == 1


async def test_who_is_served_has_only_the_grace_time(tmp_path: Path, upstream: Upstream) -> None:
    content = config(upstream, scheduler={"shutdown_grace_s": 0.3})
    with serve_process(tmp_path, content) as broker:
        async with broker.connect() as served, broker.connect() as begun:
            await served.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            await begun.send("GET", "/audio/x?do=stream&chunks=2&gap=1000")
            await begun.head()
            broker.signal(signal.SIGINT)
            answer = await served.answer()
            assert (answer.status, answer.error) == (503, "shutting_down")
            assert b"0\r\n\r\n" not in await begun.closed()
        assert await broker.exit_code() == 0


async def test_sighup_takes_a_good_configuration_over_and_reports_a_bad_one(
    tmp_path: Path, upstream: Upstream
) -> None:
    with serve_process(tmp_path, config(upstream)) as broker:
        async with broker.connect() as client:
            # A request under way is not lost by it.
            await client.send("POST", "/v1/tts", "X-Upstream: do=echo delay=1", body=b"")
            await broker.until("served", lambda s: s["scheduler"]["in_flight"] == 1)
            broker.path.write_text("listen: [")
            broker.signal(signal.SIGHUP)
            await eventually(lambda: broker.said(r"old configuration goes on"))
            content = config(upstream)
            content["consumers"]["another"] = {"url": "http://127.0.0.1:9"}
            write_config(tmp_path, content)
            broker.signal(signal.SIGHUP)
            await broker.until("reloaded", lambda s: "another" in s["consumers"])
            assert (await client.answer()).status == 200
        broker.signal(signal.SIGTERM)
        assert await broker.exit_code() == 0


async def test_who_comes_by_a_reload_is_looked_at_at_once(
    tmp_path: Path, upstream: Upstream
) -> None:
    content = config(upstream, probe={"interval_s": 60, "timeout_s": 2})
    async with facade(tmp_path, content) as broker:
        content["consumers"]["another"] = {**content["consumers"]["worker"], "paths": {}}
        write_config(tmp_path, content)
        assert (await broker.ask("POST", "/v1/reload")).status == 200
        await broker.until("seen", lambda s: s["consumers"]["another"]["healthy"])


async def test_reload_over_http_reports_all_errors_and_the_old_one_goes_on(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        content = config(upstream, nonsense=1, routing={"tts": "nobody"})
        broker.path.write_text(json.dumps(content))
        answer = await broker.ask("POST", "/v1/reload")
        assert (answer.status, answer.error) == (400, "bad_request")
        assert "nonsense" in answer.json()["message"]
        assert "nobody" in answer.json()["message"]
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200
        write_config(tmp_path, config(upstream, routing={"stt": "worker"}))
        assert (await broker.ask("POST", "/v1/reload")).json() == {"reloaded": True}
        assert (await broker.ask("POST", "/v1/tts", body=b"")).error == "no_consumer"


async def test_a_reload_says_what_takes_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with facade(tmp_path, config(None)) as broker:
        elsewhere = {"dir": str(tmp_path / "elsewhere")}
        write_config(tmp_path, config(None, listen="127.0.0.1:1", event_log=elsewhere))
        assert (await broker.ask("POST", "/v1/reload")).json() == {"reloaded": True}
        for name in ("listen", "event_log"):
            assert f"a new `{name}` takes effect with the next start" in caplog.text
        assert broker.broker.settings.event_log.dir == str(tmp_path / "log")


async def test_an_address_in_use_is_a_clear_failure(tmp_path: Path) -> None:
    (taken,) = bind(["127.0.0.1:0"])
    with taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        path = write_config(tmp_path, config(None, listen=address))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "mgpu_http.cli", "serve", "--config", str(path)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 1
        assert f"cannot listen on {address}: Address already in use" in said.decode()


async def test_connections_send_what_they_have_without_waiting_for_the_client() -> None:
    (listening,) = bind(["127.0.0.1:0"])
    with listening, socket.create_connection(listening.getsockname()) as client:
        client.settimeout(5)
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_it_listens_on_every_address_of_a_list(tmp_path: Path) -> None:
    with serve_process(tmp_path, config(None, listen=["127.0.0.1:0", "127.0.0.2:0"])) as broker:
        await eventually(lambda: broker.said(r"listening on http://127\.0\.0\.2"))
        assert (await broker.ask("GET", "/healthz")).status == 200


# -------------------------------------------------------------------------------- limits


async def test_connections_beyond_the_limit_are_turned_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    async with (
        facade(tmp_path, config(None)) as broker,
        broker.connect() as first,
        broker.connect() as second,
    ):
        for client in (first, second):
            await client.send("GET", "/")
            await client.answer()
        async with broker.connect() as third:
            answer = await third.answer()
            assert (answer.status, answer.error) == (429, "overloaded")
            assert answer.headers["retry-after"] == "1"
            assert await third.closed() == b""
        first.close()
        await eventually(lambda: len(broker.server.connections) == 1)
        assert (await broker.ask("GET", "/")).status == 200


async def test_a_head_that_never_ends_is_refused(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        client.writer.write(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(2 * MAX_HEAD_BYTES // 65536):
            client.writer.write(b"x" * 65536)
        assert (await client.closed()).startswith(b"HTTP/1.1 431 ")


async def test_a_head_that_comes_too_slowly_ends_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.3)
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        client.writer.write(b"GET / HTTP/1.1\r\nHost:")
        assert await client.closed() == b""


async def test_what_is_no_http_is_refused(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        client.writer.write(b"SSH-2.0-whatever\r\n\r\n")
        assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_who_asks_after_the_end_of_the_broker_is_refused_at_once(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        await client.send("GET", "/healthz")
        await client.answer()
        await broker.broker.stop()
        broker.broker.stop = no_more  # type: ignore[method-assign]
        for body in (b"", bytes(100_000)):
            await client.send("POST", "/v1/tts", body=body)
            async with asyncio.timeout(LAST_ANSWERS_S):
                assert (await client.answer()).error == "shutting_down"


async def no_more() -> None:
    """The test has stopped it."""
