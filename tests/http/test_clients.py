"""What clients do to a server: http.md section 5, as far as it concerns their side."""

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mgpu_http import respond, server
from mgpu_http.body import MEMORY_BYTES
from mgpu_http.connection import Connection
from tests.support.facade import LIMIT_S, Client, Facade, config, facade
from tests.support.upstream import Upstream, eventually

NEVER = "X-Upstream: do=never"


async def active(broker: Facade, count: int) -> None:
    await broker.until("active", lambda s: s["consumers"]["worker"]["active"] == count)


async def leave(client: Client, how: str) -> None:
    if how == "reset":
        client.reset()
    elif how == "close":
        client.close()
    else:
        client.writer.write_eof()


@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
async def test_a_client_that_leaves_while_it_waits_is_cancelled(
    how: str, tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as busy:
        await busy.send("POST", "/v1/tts", NEVER, body=b"")
        await active(broker, 1)
        async with broker.connect() as client:
            await client.send("POST", "/v1/stt", body=bytes(3 * MEMORY_BYTES))
            await broker.until("waits", lambda s: s["scheduler"]["queue_depth"] == 1)
            await leave(client, how)
            await broker.until("cancelled", lambda s: s["scheduler"]["queue_depth"] == 0)
        assert upstream.count("/do/stt") == 0
        metrics = (await broker.ask("GET", "/metrics")).body.decode()
        assert 'mgpu_requests_total{consumer="worker",kind="stt",outcome="gone"} 1.0' in metrics


@pytest.mark.parametrize("how", ["reset", "close", "half-close"])
@pytest.mark.parametrize("order", ["do=never", "do=stream chunks=1000 gap=0.05"])
async def test_a_client_that_leaves_while_it_is_served_ends_the_upstream_call(
    order: str, how: str, tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", f"X-Upstream: {order}", body=b"abc")
            await active(broker, 1)
            await leave(client, how)
            await active(broker, 0)
        await eventually(lambda: upstream.stats()["active"] == 0)
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200


async def test_a_small_body_is_never_lost_while_its_client_is_watched(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        for _ in range(20):
            await client.send("POST", "/v1/tts", "Content-Length: 3")
            await asyncio.sleep(0)
            client.writer.write(b"abc")
            assert (await client.answer()).json()["body"] == "abc"


async def test_a_departure_in_mid_upload_is_seen_and_nothing_is_scheduled(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        async with broker.connect() as client:
            await client.send("POST", "/v1/tts", f"Content-Length: {5 << 20}")
            client.writer.write(bytes(4 << 20))
            await client.writer.drain()
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200
        assert (await broker.status())["scheduler"]["total_jobs"] == 1


async def test_the_request_is_scheduled_when_the_whole_body_is_there(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as slow:
        await slow.send("POST", "/v1/tts", "Content-Length: 4")
        slow.writer.write(b"ab")
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200  # it holds no slot
        assert (await broker.status())["scheduler"]["total_jobs"] == 1
        slow.writer.write(b"cd")
        assert (await slow.answer()).json()["body"] == "abcd"


async def test_a_refusal_reaches_a_client_that_still_uploads(tmp_path: Path) -> None:
    """Its socket is full of a body that nobody wants: a close at once would reset the answer."""
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        size = 64 << 20
        await client.send("POST", "/v1/image", f"Content-Length: {size}")
        client.writer.write(bytes(size))
        assert (await client.answer()).error == "no_consumer"
        await client.writer.drain()
        await client.send("GET", "/healthz")  # all was read: the connection is still good
        assert (await client.answer()).status == 200


async def test_a_refused_client_that_uploads_for_ever_is_let_go(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/image", "Transfer-Encoding: chunked")
        assert (await client.answer()).error == "no_consumer"

        async def upload() -> None:
            while True:
                client.writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                await client.writer.drain()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(upload(), LIMIT_S)


@pytest.mark.parametrize(
    ("order", "version"),
    [
        ("do=stream chunks=3 die=1", "1.1"),  # chunked, without the last chunk
        ("do=bytes size=100000 send=50000", "1.1"),  # a Content-Length that it falls short of
        ("do=stream chunks=3 die=1", "1.0"),  # ended by the close: only a reset tells
    ],
)
async def test_after_the_first_byte_an_upstreams_failure_cuts_the_connection(
    order: str, version: str, tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", f"X-Upstream: {order}", body=b"", version=version)
        answer = await client.answer()
        assert answer.status == 200
        assert not answer.complete
        assert b"error" not in answer.body
        await active(broker, 0)


async def test_an_upstream_that_falls_silent_in_mid_answer_cuts_the_connection(
    tmp_path: Path, upstream: Upstream
) -> None:
    content = config(upstream, worker={"timeout_s": {"idle": 0.2}})
    async with facade(tmp_path, content) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=stream chunks=2 gap=1000", body=b"")
        answer = await client.answer()
        assert not answer.complete
        assert answer.body == b"data: 0\n\n"


@contextlib.asynccontextmanager
async def stingy(broker: Facade) -> AsyncIterator[Client]:
    """Connect with a receive buffer as small as it gets."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", broker.port))
    client = Client(*await asyncio.open_connection(sock=sock, limit=4096))
    try:
        yield client
    finally:
        client.reset()


async def test_a_slow_reader_slows_the_upstream_and_costs_no_memory(
    tmp_path: Path, upstream: Upstream
) -> None:
    size = 256 << 20
    async with facade(tmp_path, config(upstream)) as broker, stingy(broker) as client:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await client.send("POST", "/v1/tts", f"X-Upstream: do=bytes size={size}", body=b"")
        assert (await client.head()).headers["content-length"] == str(size)
        await asyncio.sleep(1)  # enough for all of it, were it not held back
        # It has not got rid of it; the other may be a probe.
        assert upstream.stats()["active"] in {1, 2}
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        assert grown_kib < 32 << 10
        client.reset()
        await active(broker, 0)


async def test_a_client_that_takes_nothing_counts_as_gone(
    tmp_path: Path, upstream: Upstream
) -> None:
    content = config(upstream, worker={"timeout_s": {"client_write": 0.3}})
    async with facade(tmp_path, content) as broker, stingy(broker) as client:
        await client.send("POST", "/v1/tts", f"X-Upstream: do=bytes size={64 << 20}", body=b"")
        await active(broker, 1)
        await active(broker, 0)
        await eventually(lambda: upstream.stats()["active"] == 0)
        assert len(await client.closed()) < 64 << 20
        await eventually(lambda: not broker.server.connections)
        metrics = (await broker.ask("GET", "/metrics")).body
        assert b'mgpu_requests_total{consumer="worker",kind="tts",outcome="gone"} 1.0' in metrics


def send_buffers_of(broker: Facade, size: int) -> None:
    """Leave the kernel little room for what clients don't take."""
    for connection in broker.server.connections.values():
        sock = connection.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


async def test_a_client_that_takes_nothing_of_our_own_answers_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(respond, "TAKES_NOTHING_S", 0.3)
    async with facade(tmp_path, config(None)) as broker, stingy(broker) as client:
        await eventually(lambda: broker.server.connections)
        send_buffers_of(broker, 4096)
        for _ in range(100):
            await client.send("GET", "/openapi.json")
        await eventually(lambda: not broker.server.connections)


@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive"])
async def test_a_client_that_does_not_take_the_end_of_its_answer_is_cut_off(
    header: str, tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is over when the last of it is in our buffer, and that must not keep it."""
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 0.2)
    async with facade(tmp_path, config(upstream)) as broker, stingy(broker) as client:
        await eventually(lambda: broker.server.connections)
        send_buffers_of(broker, 4096)
        order = "X-Upstream: do=bytes size=60000"
        await client.send("POST", "/v1/tts", order, header, body=b"")
        await eventually(lambda: upstream.count("/do/tts") == 1)
        await eventually(lambda: not broker.server.connections)


async def test_an_idle_connection_that_is_closed_has_sent_its_answer(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may end in the very turn in which an answer was made."""
    keep = Connection._keep_for_a_while

    def keep_and_close(connection: Connection) -> None:
        keep(connection)
        if connection.protocol.keep_alive_requests:  # type: ignore[attr-defined]
            connection.close_if_idle()

    monkeypatch.setattr(Connection, "_keep_for_a_while", keep_and_close)
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=stream chunks=1", body=b"")
        assert (await client.answer()).complete


async def test_what_is_no_http_after_a_refusal_ends_the_connection_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        await client.send("POST", "/nothing", "Transfer-Encoding: chunked")
        client.writer.write(b"5\r\nhello\r\n")
        assert (await client.head()).status == 404
        client.writer.write(b"no chunk\r\n")
        await client.closed()
        await eventually(lambda: not broker.server.connections)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_connection_serves_one_request_after_the_other(
    tmp_path: Path, upstream: Upstream
) -> None:
    async with facade(tmp_path, config(upstream)) as broker, broker.connect() as client:
        for number in range(3):
            await client.send("POST", "/v1/tts", body=b"%d" % number)
            assert (await client.answer()).json()["body"] == str(number)
            await client.send("GET", "/nothing", body=b"unwanted")
            assert (await client.answer()).status == 404


async def test_a_short_answer_is_one_packet(tmp_path: Path, upstream: Upstream) -> None:
    async with facade(tmp_path, config(upstream)) as broker:
        with socket.create_connection(("127.0.0.1", broker.port)) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(client, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(LIMIT_S):
                first = await loop.sock_recv(client, 65536)
        head, _, body = first.partition(b"\r\n\r\n")
        assert b"200" in head
        assert body, "the body came apart from the head"


async def test_a_closed_idle_connection_is_let_go_at_once(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker:
        async with broker.connect() as client:
            await client.send("GET", "/")
            await client.answer()
            assert len(broker.server.connections) == 1
        await eventually(lambda: not broker.server.connections, within_s=5)


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
async def test_who_asks_for_another_protocol_gets_an_answer_in_this_one(
    upgrade: str, tmp_path: Path
) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        headers = [f"Upgrade: {upgrade}", "Connection: Upgrade", "HTTP2-Settings: AAMAAABk"]
        websocket = ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
        await client.send("GET", "/", *headers, *websocket)
        answer = await client.answer()
        assert (answer.status, "version" in answer.json()) == (200, True)


async def test_http2_by_prior_knowledge_is_not_spoken(tmp_path: Path) -> None:
    async with facade(tmp_path, config(None)) as broker, broker.connect() as client:
        client.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert (await client.closed()).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("end", ["client leaves", "handler is cancelled"])
async def test_the_work_goes_on_in_the_brokers_own_task(
    end: str, tmp_path: Path, upstream: Upstream
) -> None:
    """A service that works on after a close is drained, whatever becomes of the handler."""
    content = config(upstream, worker={"on_client_gone": "drain"})
    async with facade(tmp_path, content) as broker, broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=stream chunks=5 gap=0.1", body=b"")
        await client.head()
        if end == "client leaves":
            client.close()
        else:
            for connection in broker.server.connections:
                connection.cancel()
            await client.closed()
        assert (await broker.status())["consumers"]["worker"]["active"] == 1
        await active(broker, 0)
        assert upstream.stats()["gone"] == 0
        assert (await broker.ask("POST", "/v1/tts", body=b"")).status == 200
