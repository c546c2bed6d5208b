import asyncio

import pytest
from aiohttp import web

from mgpu_core.config import Config
from mgpu_core.state import initial_state
from mgpu_effects import probes
from mgpu_effects.calls import control_session
from mgpu_effects.clock import Clock
from mgpu_effects.footprints import Footprints
from mgpu_effects.gpu_processes import Holders, Holding
from mgpu_effects.probes import ProbeFacts
from mgpu_effects.settings import (
    BusySettings,
    ConsumerSettings,
    DriverSettings,
    Endpoint,
    GpuSettings,
    ProcessSettings,
    ResidencySettings,
    Settings,
    Step,
    SystemdSettings,
)
from mgpu_effects.watch import Watch
from tests.support.dev_http import free_port, serving, serving_raw


async def probe(session, consumer, *args, **settings) -> ProbeFacts:
    """Look at a consumer that is the only one of its server."""
    facts = await probes.probe(session, [consumer], *args, **settings)
    return facts[consumer.name]


@pytest.fixture
async def session():
    async with control_session() as session:
        yield session


class Running:
    """A driver, as far as a probe asks it."""

    def __init__(self, answer: bool | None) -> None:
        self._answer = answer

    async def running(self) -> bool | None:
        return self._answer

    async def start(self) -> str | None:
        raise AssertionError

    async def stop(self) -> str | None:
        raise AssertionError

    async def close(self) -> None:
        raise AssertionError


def consumer(url: str, **more: object) -> ConsumerSettings:
    return ConsumerSettings(name="one", url=url, **more)


async def ok(_request: web.Request) -> web.Response:
    return web.Response(text="fine")


async def test_any_2xx_is_healthy(session):
    async def no_content(_request: web.Request) -> web.Response:
        return web.Response(status=204)

    for handler in (ok, no_content):
        async with serving(handler) as url:
            assert await probe(session, consumer(url), 5) == ProbeFacts(healthy=True)


async def test_the_health_path_is_asked_with_its_method_and_the_consumers_headers(session):
    asked = []

    async def keep(request: web.Request) -> web.Response:
        asked.append((request.method, request.path_qs, request.headers.get("X-Key")))
        return web.Response()

    async with serving(keep) as url:
        health = Endpoint(path="/system_stats?x=1", method="HEAD")
        settings = consumer(url, health=health, headers={"X-Key": "k"})
        assert (await probe(session, settings, 5)).healthy
    assert asked == [("HEAD", "/system_stats?x=1", "k")]


@pytest.mark.parametrize("status", [302, 404, 500, 503])
async def test_another_status_is_a_failure_of_that_kind(session, status):
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="secret words", headers={"Location": "/"})

    async with serving(answer) as url:
        assert await probe(session, consumer(url), 5) == ProbeFacts(
            healthy=False, failure="status", error=f"http_{status}"
        )


async def test_nobody_there_is_refused(session):
    url = f"http://127.0.0.1:{free_port()}"
    facts = await probe(session, consumer(url), 5)
    assert facts == ProbeFacts(healthy=False, failure="refused", error="refused")


async def test_no_answer_in_time_is_a_timeout(session):
    async def hang(_request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async with serving(hang) as url:
        facts = await probe(session, consumer(url), 0.1)
        assert facts == ProbeFacts(healthy=False, failure="timeout", error="timeout")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", "disconnected"),
        (b"nonsense\r\n\r\n", "bad_answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "disconnected"),
    ],
)
async def test_what_is_no_whole_answer_is_a_failure_of_that_kind(session, said, error):
    async def say(_reader, writer):
        writer.write(said)
        await writer.drain()

    async with serving_raw(say) as url:
        facts = await probe(session, consumer(url), 5)
        assert facts == ProbeFacts(healthy=False, failure="answer", error=error)


async def test_an_endless_answer_is_read_to_a_bound_only(session):
    async def pour(_reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
            await writer.drain()

    async with serving_raw(pour) as url:
        assert (await probe(session, consumer(url), 20)).healthy


@pytest.mark.parametrize(("running", "resident"), [(True, None), (False, False), (None, None)])
async def test_without_an_answer_the_driver_tells_whether_it_is_gone(session, running, resident):
    url = f"http://127.0.0.1:{free_port()}"
    facts = await probe(session, consumer(url), 5, Running(running))
    assert facts.resident is resident


async def test_with_a_driver_alone_who_answers_is_resident(session):
    async with serving(ok) as url:
        assert (await probe(session, consumer(url), 5, Running(True))).resident is True


async def test_a_stranger_in_place_of_a_process_of_ours_is_not_resident(session):
    ours = DriverSettings(process=ProcessSettings(command=("serve",)))
    async with serving(ok) as url:
        settings = consumer(url, driver=ours)
        facts = await probe(session, settings, 5, Running(False))
        assert facts == ProbeFacts(healthy=True, resident=False)
        assert (await probe(session, settings, 5, Running(True))).resident is True


async def test_who_answers_in_place_of_a_unit_is_resident(session):
    unit = DriverSettings(systemd=SystemdSettings(unit="a.service"))
    async with serving(ok) as url:
        facts = await probe(session, consumer(url, driver=unit), 5, Running(False))
        assert facts.resident is True


@pytest.mark.parametrize("routes", [{"load": (Step(path="/"),)}, {"unload": (Step(path="/"),)}])
async def test_with_routes_of_its_own_a_probe_says_nothing_about_memory(session, routes):
    async with serving(ok) as url:
        facts = await probe(session, consumer(url, **routes), 5, Running(True))
        assert (facts.healthy, facts.resident) == (True, None)
    facts = await probe(session, consumer(url, **routes), 5, Running(False))
    assert (facts.healthy, facts.resident) == (False, None)


# ----------------------------------------------------------------- is it loaded, does it work


class Service:
    """Answers each path with its JSON, text or status, and keeps what was asked."""

    def __init__(self, **answers: object) -> None:
        self.answers = {"health": {}, **answers}
        self.asked: list[str] = []
        self.hold: dict[str, asyncio.Event] = {}

    async def answer(self, request: web.Request) -> web.Response:
        name = request.path.removeprefix("/")
        self.asked.append(f"{request.method} {request.path}")
        if name in self.hold:
            await self.hold[name].wait()
        answer = self.answers[name]
        if isinstance(answer, int):
            return web.Response(status=answer, headers={"Location": "/health"})
        return web.Response(text=answer) if isinstance(answer, str) else web.json_response(answer)


PS = ResidencySettings(path="/ps", resident="loaded", mib="mib", unit="mib")
QUEUE = BusySettings(path="/queue", when="length > `0`")
LOADED = {"loaded": True, "mib": 2000}


async def test_health_is_asked_first_and_then_the_rest(session):
    service = Service(ps=LOADED, queue={"length": 1})
    async with serving(service.answer) as url:
        facts = await probe(session, consumer(url, residency=PS, busy=QUEUE), 5)
    assert facts == ProbeFacts(healthy=True, resident=True, vram_mib=2000, busy=True)
    assert service.asked[0] == "GET /health"
    assert sorted(service.asked[1:]) == ["GET /ps", "GET /queue"]


async def test_a_path_that_tells_all_is_asked_once(session):
    service = Service(ps={**LOADED, "length": 0})
    settings = {"residency": PS, "busy": BusySettings(path="/ps", when="length > `0`")}
    async with serving(service.answer) as url:
        facts = await probe(session, consumer(url, health=Endpoint(path="/ps"), **settings), 5)
    assert facts == ProbeFacts(healthy=True, resident=True, vram_mib=2000, busy=False)
    assert service.asked == ["GET /ps"]


async def test_another_method_is_another_question(session):
    service = Service(ps=LOADED)
    health = Endpoint(path="/ps", method="HEAD")
    async with serving(service.answer) as url:
        assert (await probe(session, consumer(url, health=health, residency=PS), 5)).resident
    assert service.asked == ["HEAD /ps", "GET /ps"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (404, "residency: http_404"),
        (302, "residency: http_302"),
        ("Ollama is running", "residency: bad_answer"),
        ({}, "residency: no_value"),
    ],
)
async def test_who_is_healthy_and_cannot_tell_is_healthy(session, answer, error):
    service = Service(ps=answer, queue={"length": 0})
    async with serving(service.answer) as url:
        facts = await probe(session, consumer(url, residency=PS, busy=QUEUE), 5)
    assert facts == ProbeFacts(healthy=True, busy=False, error=error)


async def test_health_that_is_no_json_is_health_all_the_same(session):
    service = Service(health="fine")
    about = ResidencySettings(path="/health", resident="loaded")
    async with serving(service.answer) as url:
        facts = await probe(session, consumer(url, residency=about), 5)
    assert facts == ProbeFacts(healthy=True, error="residency: bad_answer")


async def test_who_is_not_healthy_is_asked_nothing_more(session):
    service = Service(health=503, ps=LOADED)
    async with serving(service.answer) as url:
        facts = await probe(session, consumer(url, residency=PS, busy=QUEUE), 5)
    assert facts == ProbeFacts(healthy=False, failure="status", error="http_503")
    assert service.asked == ["GET /health"]


async def test_all_questions_share_one_time_limit(session):
    service = Service(ps=LOADED, queue={"length": 1})
    service.hold = {"ps": asyncio.Event(), "queue": asyncio.Event()}
    async with serving(service.answer) as url, asyncio.timeout(10):
        facts = await probe(session, consumer(url, residency=PS, busy=QUEUE), 0.5)
    assert facts == ProbeFacts(healthy=True, error="residency: timeout, busy: timeout")


async def test_a_stranger_is_not_asked_for_who_does_not_run(session):
    ours = DriverSettings(process=ProcessSettings(command=("serve",)))
    async with serving(Service(ps=LOADED).answer) as url:
        facts = await probe(session, consumer(url, driver=ours, residency=PS), 5, Running(False))
    assert (facts.healthy, facts.resident, facts.vram_mib) == (True, False, None)


async def test_what_the_service_says_goes_before_that_its_process_runs(session):
    for said in (True, False):
        async with serving(Service(ps={"loaded": said, "mib": 5}).answer) as url:
            facts = await probe(session, consumer(url, residency=PS), 5, Running(True))
        assert facts.resident is said


async def test_by_its_processes(session):
    holding = Holding(index=0, pid=1, name="x", mib=700, owners=frozenset({"one"}))

    async def read() -> Holders:
        return Holders(taken=1, used_mib={0: 700}, holdings=(holding,))

    async with serving(ok) as url:
        settings = consumer(url, residency="nvml")
        facts = await probe(session, settings, 5, read_holders=read)
        assert facts == ProbeFacts(healthy=True, resident=True, vram_mib=700)
        # Nobody else pays for such a reading.
        facts = await probe(session, consumer(url), 5, read_holders=read)
        assert facts == ProbeFacts(healthy=True)


async def test_a_reading_of_the_processes_has_the_same_time_limit(session):
    async def read() -> Holders:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(ok) as url, asyncio.timeout(10):
        facts = await probe(session, consumer(url, residency="nvml"), 0.5, read_holders=read)
    assert facts == ProbeFacts(healthy=True, error="residency: timeout")


async def test_a_watch_is_closed_when_the_probe_under_way_has_ended(tmp_path):
    """A command of a driver that was cut off has to be killed and reaped first."""
    begun, reaped = asyncio.Event(), asyncio.Event()

    class Slow:
        async def owners(self) -> tuple[()]:
            return ()

        def server_of(self, name: str) -> str:
            return name

        async def probe(self, *_args: object) -> dict[str, ProbeFacts]:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.1)
                reaped.set()

    footprints = Footprints(tmp_path, lambda: initial_state(Config(consumers={})))
    watch = Watch(Slow(), Clock(), lambda _event: None, footprints)
    await watch.configure(Settings(gpus=(GpuSettings(sampler="none"),)))
    watch.follow(["a"])
    watch.probe("a")
    await begun.wait()
    await watch.close()
    assert reaped.is_set()
