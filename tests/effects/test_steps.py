import asyncio
import json

import pytest
from aiohttp import web

from mgpu_effects.calls import control_session
from mgpu_effects.settings import ConsumerSettings, Step
from mgpu_effects.steps import run_steps
from tests.support.dev_http import free_port, serving, serving_raw


@pytest.fixture
async def session():
    async with control_session() as session:
        yield session


class Upstream:
    """Keeps what was asked and answers with a status by path: /unload/409 answers 409."""

    def __init__(self) -> None:
        self.asked = []

    async def answer(self, request: web.Request) -> web.Response:
        headers = {"Location": "/elsewhere/200"} if "302" in request.path else {}
        self.asked.append(
            (request.method, request.path, request.headers.copy(), await request.read())
        )
        return web.Response(status=int(request.path.rsplit("/", 1)[1]), headers=headers)


def consumer(url: str, **more: object) -> ConsumerSettings:
    return ConsumerSettings(name="one", url=url, **more)


async def test_steps_are_carried_out_in_order(session):
    upstream = Upstream()
    async with serving(upstream.answer) as url:
        steps = (Step(path="/a/200"), Step(path="/b/204", method="DELETE"), Step(path="/c/201"))
        assert await run_steps(session, consumer(url), steps) is None
    assert [asked[:2] for asked in upstream.asked] == [
        ("POST", "/a/200"),
        ("DELETE", "/b/204"),
        ("POST", "/c/201"),
    ]


async def test_the_first_failure_ends_them_with_its_status(session):
    upstream = Upstream()
    async with serving(upstream.answer) as url:
        steps = (Step(path="/a/200"), Step(path="/b/409"), Step(path="/c/200"))
        assert await run_steps(session, consumer(url), steps) == "http_409"
    assert [asked[1] for asked in upstream.asked] == ["/a/200", "/b/409"]


async def test_a_status_that_is_listed_counts_and_no_other(session):
    async with serving(Upstream().answer) as url:
        listed = (200, 409)
        assert await run_steps(session, consumer(url), [Step(path="/a/409", ok=listed)]) is None
        error = await run_steps(session, consumer(url), [Step(path="/a/204", ok=listed)])
        assert error == "http_204"


async def test_a_mapping_is_sent_as_json_and_text_as_it_is(session):
    upstream = Upstream()
    body = {"unload_models": True, "name": "é"}
    async with serving(upstream.answer) as url:
        steps = (Step(path="/json/200", body=body), Step(path="/text/200", body="plain é"))
        assert await run_steps(session, consumer(url), steps) is None
    (_, _, json_headers, sent_json), (_, _, text_headers, sent_text) = upstream.asked
    assert json_headers["Content-Type"] == "application/json"
    assert json.loads(sent_json) == body
    assert text_headers["Content-Type"].startswith("text/plain")
    assert sent_text == "plain é".encode()


async def test_headers_of_the_consumer_are_sent_and_those_of_the_step_win(session):
    upstream = Upstream()
    settings = {"headers": {"Authorization": "Bearer a", "X-Kind": "consumer"}}
    step = Step(
        path="/a/200", headers={"x-kind": "step", "content-type": "application/x-own"}, body={}
    )
    async with serving(upstream.answer) as url:
        assert await run_steps(session, consumer(url, **settings), [step]) is None
    headers = upstream.asked[0][2]
    assert headers["Authorization"] == "Bearer a"
    assert headers["x-kind"] == "step"
    assert headers["content-type"] == "application/x-own"


async def test_the_path_comes_after_that_of_the_url(session):
    upstream = Upstream()
    async with serving(upstream.answer) as url:
        assert await run_steps(session, consumer(f"{url}/base/"), [Step(path="/a/200")]) is None
    assert upstream.asked[0][1] == "/base/a/200"


async def test_a_redirect_is_not_followed(session):
    upstream = Upstream()
    async with serving(upstream.answer) as url:
        assert await run_steps(session, consumer(url), [Step(path="/a/302")]) == "http_302"
    assert len(upstream.asked) == 1


async def test_nobody_there_is_refused(session):
    url = f"http://127.0.0.1:{free_port()}"
    assert await run_steps(session, consumer(url), [Step(path="/")]) == "refused"


async def test_a_server_without_tls_is_unreachable_over_https(session):
    async with serving(Upstream().answer) as url:
        there = consumer(url.replace("http:", "https:"))
        assert await run_steps(session, there, [Step(path="/a/200")]) == "unreachable"


async def test_each_step_has_its_own_time_limit(session):
    async def hang(_request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async with serving(hang) as url:
        step = Step(path="/", timeout_s=0.1)
        assert await run_steps(session, consumer(url), [step]) == "timeout"


async def test_an_answer_that_stalls_after_its_head_times_out(session):
    async def stall(_reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await asyncio.sleep(30)

    async with serving_raw(stall) as url:
        step = Step(path="/", timeout_s=0.2)
        assert await run_steps(session, consumer(url), [step]) == "timeout"


async def test_a_connection_closed_instead_of_an_answer_is_disconnected(session):
    async def close(_reader, _writer):
        pass

    async with serving_raw(close) as url:
        assert await run_steps(session, consumer(url), [Step(path="/")]) == "disconnected"


async def test_an_answer_cut_short_is_disconnected(session):
    async def cut(_reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await writer.drain()

    async with serving_raw(cut) as url:
        assert await run_steps(session, consumer(url), [Step(path="/")]) == "disconnected"


async def test_no_http_is_a_bad_answer(session):
    async def babble(_reader, writer):
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        await writer.drain()

    async with serving_raw(babble) as url:
        assert await run_steps(session, consumer(url), [Step(path="/")]) == "bad_answer"


async def test_a_step_is_over_when_its_answer_is_complete(session):
    finished = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        for percent in range(0, 100, 10):
            await answer.write(b"data: %d\n\n" % percent)
            await asyncio.sleep(0.01)
        finished.set()
        await answer.write_eof()
        return answer

    async with serving(stream) as url:
        assert await run_steps(session, consumer(url), [Step(path="/")]) is None
        assert finished.is_set()
