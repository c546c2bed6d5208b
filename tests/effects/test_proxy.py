"""The proxy between a client and a real service that behaves as it is told."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import ClientSession

from mgpu_core.events import Outcome
from mgpu_effects.jobs import Job
from mgpu_effects.proxy import open_session, serve
from mgpu_effects.settings import ConsumerSettings, Timeouts
from tests.support.clients import Client, make_job
from tests.support.upstream import Upstream, eventually, start_upstream


@pytest.fixture(scope="module")
def shared() -> Iterator[Upstream]:
    with start_upstream() as upstream:
        yield upstream


@pytest.fixture
def upstream(shared: Upstream) -> Upstream:
    """One for all, but for the tests that kill it."""
    return shared


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with open_session() as session:
        yield session


def consumer(upstream: Upstream, timeouts: Timeouts | None = None, **more: object):
    return ConsumerSettings(name="a", url=upstream.url, timeout_s=timeouts or Timeouts(), **more)


async def proxied(
    session: ClientSession, settings: ConsumerSettings, path: str, **more: object
) -> tuple[Outcome, Client]:
    job, client = make_job(path, **more)
    return await serve(job, session, settings), client


def echoed(client: Client) -> dict[str, object]:
    seen: dict[str, object] = json.loads(client.body)
    return seen


def sent_headers(client: Client) -> dict[str, str]:
    return {name.lower(): value for name, value in echoed(client)["headers"]}


# ------------------------------------------------------------------------------ the way there


async def test_method_path_query_and_body_go_out_as_they_came(session, upstream):
    target = "/a%2Fb/..%2f/%C3%A4?q=%20+%2B&q=%7E&empty="
    outcome, client = await proxied(
        session, consumer(upstream), target, method="PATCH", body=b"\x00\xff" * 100_000
    )

    seen = echoed(client)
    assert outcome == "ok"
    assert (seen["method"], seen["target"], seen["size"]) == ("PATCH", target, 200_000)
    assert sent_headers(client)["content-length"] == "200000"
    assert "transfer-encoding" not in sent_headers(client)


async def test_nothing_is_added_to_a_request_but_what_a_proxy_adds(session, upstream):
    _, client = await proxied(
        session,
        consumer(upstream),
        "/x",
        body=b"x",
        client="10.0.0.7",
        host="gpu.example:8770",
        scheme="https",
    )

    assert sent_headers(client) == {
        "content-length": "1",
        "host": upstream.url.removeprefix("http://"),
        "x-forwarded-for": "10.0.0.7",
        "x-forwarded-host": "gpu.example:8770",
        "x-forwarded-proto": "https",
    }


async def test_hop_by_hop_headers_end_at_the_broker(session, upstream):
    _, client = await proxied(
        session,
        consumer(upstream),
        "/x",
        body=b"hello",
        client="10.0.0.7",
        headers=[
            (b"Connection", b"keep-alive, X-Only-Here"),
            (b"X-Only-Here", b"1"),
            (b"Keep-Alive", b"timeout=5"),
            (b"TE", b"trailers"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Upgrade", b"h2c"),
            (b"Expect", b"100-continue"),
            (b"Proxy-Authorization", b"Basic x"),
            (b"X-Mgpu-Priority", b"4"),
            (b"Host", b"gpu.example"),
            (b"X-Forwarded-For", b"192.0.2.1"),
            (b"X-Forwarded-Proto", b"gopher"),
            (b"Accept-Encoding", b"br"),
            (b"Content-Type", b"audio/wav"),
        ],
    )

    sent = sent_headers(client)
    assert sent == {
        "host": upstream.url.removeprefix("http://"),
        "content-length": "5",
        "x-forwarded-for": "192.0.2.1, 10.0.0.7",
        "x-forwarded-proto": "http",
        "accept-encoding": "br",
        "content-type": "audio/wav",
    }


async def test_a_consumers_own_headers_win_over_the_clients(session, upstream):
    settings = consumer(upstream, headers={"Authorization": "Bearer upstreams"})
    _, client = await proxied(
        session, settings, "/x", headers=[(b"authorization", b"Bearer clients")]
    )

    assert sent_headers(client)["authorization"] == "Bearer upstreams"


async def test_the_services_base_path_comes_first(session, upstream):
    settings = ConsumerSettings(name="a", url=f"{upstream.url}/base/")
    _, client = await proxied(session, settings, "/x?y=1")

    assert echoed(client)["target"] == "/base/x?y=1"


# ------------------------------------------------------------------------------- the way back


async def test_an_answer_comes_back_unchanged_and_tells_whose_it_is(session, upstream):
    path = "/x?do=text&body=hi&type=text/html&header=Set-Cookie:a%3D1,Set-Cookie:b%3D2,Keep-Alive:x"
    job, client = make_job(path, method="GET")
    job.submitted, job.granted, job.loading_us = 1_000_000, 1_250_000, 200_000

    assert await serve(job, session, consumer(upstream)) == "ok"

    assert (client.status, client.body, client.finished) == (200, b"hi", True)
    assert client.header("content-type") == ["text/html"]
    assert client.header("content-length") == ["2"]
    assert client.header("set-cookie") == ["a=1", "b=2"]
    assert client.header("keep-alive") == []
    assert client.header("x-mgpu-request") == [job.request]
    assert client.header("x-mgpu-consumer") == ["a"]
    assert client.header("x-mgpu-queue-ms") == ["250"]
    assert client.header("x-mgpu-load-ms") == ["200"]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(302, "ok"), (400, "ok"), (404, "ok"), (429, "ok"), (500, "upstream_error")],
)
async def test_the_services_own_errors_and_redirects_are_the_answer(
    session, upstream, status, outcome
):
    path = f"/x?do=text&body=mine&status={status}&header=Location:/elsewhere"
    got, client = await proxied(session, consumer(upstream), path)

    assert (got, client.status, client.body) == (outcome, status, b"mine")
    assert client.calls == ["start", "finish"]


async def test_a_compressed_answer_stays_as_it_is(session, upstream):
    path = "/x?do=text&body=not-really-gzip&header=Content-Encoding:gzip"
    outcome, client = await proxied(session, consumer(upstream), path)

    assert (outcome, client.body) == ("ok", b"not-really-gzip")
    assert client.header("content-encoding") == ["gzip"]


async def test_cookies_of_one_client_never_reach_another(session, upstream):
    await proxied(session, consumer(upstream), "/x?header=Set-Cookie:secret%3D1")
    _, client = await proxied(session, consumer(upstream), "/x")

    assert "cookie" not in sent_headers(client)


async def test_a_header_of_60_kib_passes(session, upstream):
    job, client = make_job("/x", headers=[(b"X-Long", b"v" * 60_000)])
    upstream.rule("/long", header=f"X-Long:{'w' * 60_000}")
    assert await serve(job, session, consumer(upstream)) == "ok"
    assert len(sent_headers(client)["x-long"]) == 60_000

    _, client = await proxied(session, consumer(upstream), "/long")

    assert len(client.header("x-long")[0]) == 60_000


async def test_a_stream_is_passed_on_chunk_by_chunk_as_it_comes(session, upstream):
    job, client = make_job("/x?do=stream&chunks=3&gap=0.4")
    work = asyncio.create_task(serve(job, session, consumer(upstream)))

    await eventually(lambda: client.body == b"data: 0\n\n")
    assert not work.done()
    await eventually(lambda: client.body == b"data: 0\n\ndata: 1\n\n")
    assert not work.done()
    assert await work == "ok"
    assert (client.chunks, client.finished) == (
        [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"],
        True,
    )
    assert client.header("transfer-encoding") == []
    assert client.header("trailer") == []


async def test_an_answer_without_a_length_ends_with_its_connection(session, upstream):
    outcome, client = await proxied(session, consumer(upstream), "/x?do=stream&plain=1")

    assert (outcome, client.finished) == ("ok", True)
    assert client.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"


@pytest.mark.parametrize(
    ("method", "query"), [("HEAD", "do=bytes&size=9"), ("GET", "status=204"), ("GET", "status=304")]
)
async def test_answers_without_a_body_end_at_once(session, upstream, method, query):
    if method == "HEAD":
        query = "do=text&body=ninebytes"
    outcome, client = await proxied(session, consumer(upstream), f"/x?{query}", method=method)

    assert (outcome, client.body, client.finished) == ("ok", b"", True)


async def test_a_slow_reader_slows_the_service(session, upstream):
    size = 64 << 20
    job, client = make_job(f"/x?do=bytes&size={size}", method="GET")
    before = upstream.stats()["active"]
    client.taking.clear()
    work = asyncio.create_task(serve(job, session, consumer(upstream)))

    await eventually(lambda: client.calls == ["start"])
    for _ in range(20):  # the service would be through with it long before
        await asyncio.sleep(0.02)
        assert upstream.stats()["active"] == before + 1
    client.taking.set()

    assert await work == "ok"
    assert len(client.body) == size


# ------------------------------------------------------------------------------ what goes wrong


def unused_url() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def failing(
    session: ClientSession, settings: ConsumerSettings, path: str, **more: object
) -> tuple[Outcome, str, int, bool]:
    """Give the outcome, and the one error that the client was told before anything else."""
    outcome, client = await proxied(session, settings, path, **more)
    assert client.calls == ["fail"]
    assert client.error is not None
    assert client.error.consumer == "a"
    return outcome, client.error.code, client.error.status, client.error.retryable


async def test_a_service_that_is_down_is_unreachable(session):
    settings = ConsumerSettings(name="a", url=unused_url())

    failed = await failing(session, settings, "/x")

    assert failed == ("upstream_error", "consumer_unreachable", 503, True)


async def test_a_host_that_does_not_exist_is_unreachable(session):
    settings = ConsumerSettings(name="a", url="http://nowhere.invalid:1")

    failed = await failing(session, settings, "/x")

    assert failed == ("upstream_error", "consumer_unreachable", 503, True)


async def test_a_host_that_takes_no_connection_is_unreachable_after_its_time(session):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        # Fill what the kernel accepts by itself: the next connection hangs.
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        settings = ConsumerSettings(
            name="a", url=f"http://127.0.0.1:{address[1]}", timeout_s=Timeouts(connect=0.3)
        )

        failed = await failing(session, settings, "/x")

        for filler in fillers:
            filler.close()
    assert failed == ("upstream_error", "consumer_unreachable", 503, True)


@pytest.mark.parametrize("query", ["do=drop", "do=garbage", "status=101"])
async def test_a_service_that_dies_before_it_answers(session, upstream, query):
    failed = await failing(session, consumer(upstream), f"/x?{query}", body=b"x")

    assert failed == ("upstream_error", "upstream_disconnected", 502, True)


async def test_a_process_that_ends_in_the_middle_of_a_request(session):
    with start_upstream() as upstream:
        failed = await failing(session, consumer(upstream), "/x?do=exit", body=b"x")

    assert failed == ("upstream_error", "upstream_disconnected", 502, True)


@pytest.mark.parametrize("query", ["do=stream&die=1", "do=bytes&size=100&send=99"])
async def test_an_answer_that_breaks_off_is_cut_and_never_ended(session, upstream, query):
    outcome, client = await proxied(session, consumer(upstream), f"/x?{query}")

    assert outcome == "upstream_error"
    assert client.calls == ["start", "fail"]
    assert not client.finished


async def test_a_service_that_never_answers(session, upstream):
    gone = upstream.stats()["gone"]
    settings = consumer(upstream, Timeouts(connect=0.1, first_byte=0.2))

    failed = await failing(session, settings, "/x?do=never")

    assert failed == ("timeout", "upstream_timeout", 504, False)
    await eventually(lambda: upstream.stats()["gone"] == gone + 1)


async def test_a_service_that_reads_nothing_keeps_no_connection(session, upstream):
    settings = consumer(upstream, Timeouts(connect=0.1, first_byte=0.3))
    before = open_sockets()

    failed = await failing(session, settings, "/x?do=deaf", body=bytes(20 << 20))

    assert failed == ("timeout", "upstream_timeout", 504, False)
    await eventually(lambda: open_sockets() <= before)


def open_sockets() -> int:
    with os.scandir("/proc/self/fd") as entries:
        return sum("socket:" in str(Path(entry.path).readlink()) for entry in entries)


async def test_a_service_that_stops_in_the_middle_of_its_answer(session, upstream):
    settings = consumer(upstream, Timeouts(idle=0.2))
    outcome, client = await proxied(session, settings, "/x?do=stream&chunks=2&gap=60")

    assert (outcome, client.calls) == ("timeout", ["start", "fail"])
    assert client.body == b"data: 0\n\n"


async def test_an_answer_that_takes_too_long_as_a_whole(session, upstream):
    settings = consumer(upstream, Timeouts(total=0.5))
    outcome, client = await proxied(session, settings, "/x?do=stream&chunks=10000&gap=0.05")

    assert (outcome, client.calls) == ("timeout", ["start", "fail"])
    assert client.error is not None
    assert "0.5 s" in client.error.message


async def test_a_post_is_never_sent_twice(session, upstream):
    await proxied(session, consumer(upstream), "/once?do=drop", body=b"x")
    await proxied(session, consumer(upstream), "/once?do=drop")

    assert upstream.count("/once") == 2


async def test_a_connection_is_not_used_again_after_two_idle_seconds(session):
    with start_upstream(idle_s=2.2) as upstream:
        connections = []
        for pause_s in (0, 0, 2.1):
            await asyncio.sleep(pause_s)
            outcome, _ = await proxied(session, consumer(upstream), "/x", body=b"x")
            assert outcome == "ok"
            connections.append(upstream.count("/x"))
        # Each question about the statistics takes a connection of its own.
        assert upstream.stats()["connections"] == 2 + len(connections) + 1


async def test_a_hundred_and_fifty_calls_at_once_all_get_through(session, upstream):
    settings = consumer(upstream)
    calls = [proxied(session, settings, "/x?delay=0.5") for _ in range(150)]

    outcomes = [outcome for outcome, _ in await asyncio.gather(*calls)]

    assert outcomes == ["ok"] * 150
    most = upstream.stats()["most_active"]
    assert isinstance(most, int)
    assert most > 100  # aiohttp's own limit


# --------------------------------------------------------------------------- clients that leave


async def served_until(
    job: Job, session: ClientSession, settings: ConsumerSettings, upstream: Upstream
) -> "asyncio.Task[Outcome]":
    """Begin to serve and wait until the service has the request."""
    path = job.path.partition("?")[0]
    before = upstream.count(path)
    work = asyncio.create_task(serve(job, session, settings))
    await eventually(lambda: upstream.count(path) > before)
    return work


@pytest.mark.parametrize("query", ["do=never", "do=stream&chunks=2&gap=60"])
async def test_a_client_that_leaves_closes_the_call_at_once(session, upstream, query):
    job, client = make_job(f"/leaves?{query}")
    gone = upstream.stats()["gone"]
    work = await served_until(job, session, consumer(upstream), upstream)
    await eventually(lambda: client.chunks or "never" in query)

    job.gone.set()

    assert await asyncio.wait_for(work, 5) == "disconnected"
    assert "fail" not in client.calls
    await eventually(lambda: upstream.stats()["gone"] == gone + 1)


@pytest.mark.parametrize("query", ["delay=0.6", "do=stream&chunks=4&gap=0.2"])
async def test_with_drain_the_work_of_a_gone_client_is_over_when_the_service_is_done(
    session, upstream, query
):
    job, client = make_job(f"/drains?{query}")
    before = upstream.stats()
    settings = consumer(upstream, on_client_gone="drain")
    work = await served_until(job, session, settings, upstream)

    job.gone.set()

    assert await work == "disconnected"
    assert not client.finished
    stats = upstream.stats()
    assert (stats["gone"], stats["active"]) == (before["gone"], before["active"])


async def test_with_drain_a_write_under_way_ends_when_the_client_goes(session, upstream):
    job, client = make_job("/x?do=bytes&size=3000000", method="GET")
    client.taking.clear()
    settings = consumer(upstream, on_client_gone="drain")
    work = asyncio.create_task(serve(job, session, settings))
    await eventually(lambda: client.calls == ["start"])

    job.gone.set()

    assert await asyncio.wait_for(work, 5) == "disconnected"
    assert client.calls == ["start"]


@pytest.mark.parametrize("on_client_gone", ["close", "drain"])
async def test_a_client_that_takes_nothing_counts_as_gone(session, upstream, on_client_gone):
    job, client = make_job("/x?do=bytes&size=3000000", method="GET")
    client.taking.clear()
    settings = consumer(upstream, Timeouts(client_write=0.2), on_client_gone=on_client_gone)

    outcome = await asyncio.wait_for(serve(job, session, settings), 5)

    assert outcome == "disconnected"
    assert client.calls == ["start", "cut"]
    assert job.gone.is_set()


async def test_a_client_may_leave_in_the_moment_in_which_its_time_is_over(session, upstream):
    loop, failures = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _loop, context: failures.append(context))
    job, _ = make_job("/late?do=never")
    settings = consumer(upstream, Timeouts(total=0.3))
    work = await served_until(job, session, settings, upstream)
    (whole,) = job.gone.call.args
    loop.call_at(whole.when() + 1e-6, job.gone.set)  # the loop takes both in one turn

    assert await asyncio.wait_for(work, 5) == "disconnected"
    assert failures == []


async def test_a_client_that_closes_after_the_last_byte_had_its_answer(session, upstream):
    job, client = make_job("/x?do=text&body=hi")
    finish = client.finish

    async def leave_and_finish() -> None:
        job.gone.set()
        await asyncio.sleep(0.05)
        await finish()

    client.finish = leave_and_finish  # type: ignore[method-assign]

    assert await serve(job, session, consumer(upstream)) == "ok"
    assert client.finished


async def test_a_cancelled_call_is_closed_and_its_client_left_to_the_caller(session, upstream):
    job, client = make_job("/cancelled?do=never")
    gone = upstream.stats()["gone"]
    work = await served_until(job, session, consumer(upstream), upstream)

    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work

    assert client.calls == []
    await eventually(lambda: upstream.stats()["gone"] == gone + 1)
