"""Orders to the services: in turn for one server, and only to those who are there."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession
from attrs import evolve

from mgpu_effects.calls import control_session
from mgpu_effects.gpu_processes import Holders
from mgpu_effects.services import Services
from mgpu_effects.settings import (
    ConsumerSettings,
    DriverSettings,
    ProcessSettings,
    SchedulerSettings,
    Settings,
    Step,
)
from tests.support.brokers import logged, over, paths, running, settings_of, submit, told
from tests.support.dev_http import free_port
from tests.support.upstream import Upstream, eventually

STUBBORN = Path(__file__).parent.parent / "support" / "dev_service.py"


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with control_session() as session:
        yield session


async def nobody_asks() -> Holders:
    raise AssertionError("its residency is not read from its processes")


def services(
    session: ClientSession, consumer: ConsumerSettings, limits: SchedulerSettings | None = None
) -> Services:
    made = Services(session, on_exit=lambda _name: None)
    settings = Settings(
        consumers={consumer.name: consumer}, scheduler=limits or SchedulerSettings()
    )
    made.configure(settings)
    return made


def routed(upstream: Upstream) -> ConsumerSettings:
    return ConsumerSettings(
        name="a", url=upstream.url, load=(Step(path="/load"),), unload=(Step(path="/unload"),)
    )


@pytest.mark.parametrize("first", ["load", "unload"])
async def test_orders_to_one_server_are_carried_out_in_turn(session, upstream, first):
    upstream.rule("/load", delay=0.3)
    upstream.rule("/unload", delay=0.3)
    made = services(session, routed(upstream))
    orders = {"load": lambda: made.load("a"), "unload": lambda: made.unload("a", "routes")}
    second = "unload" if first == "load" else "load"

    errors = await asyncio.gather(orders[first](), orders[second]())

    assert errors == [None, None]
    stats = upstream.stats()
    assert stats["targets"] == [f"POST /{first}", f"POST /{second}"]
    assert stats["most_active"] == 1


@pytest.mark.parametrize(
    ("read_mib", "times"),
    [
        ([9_000, 9_000, 5_000], 1),  # of 8,000 less a residue of 500 at least half
        ([9_000, 9_000, 6_000, 6_000], 2),
        ([9_000, 9_500], 2),  # somebody else took some
        ([9_000, None], 2),
        ([None], 2),
    ],
)
async def test_an_unload_that_may_be_lost_is_told_again_unless_memory_came_free(
    session, upstream, monkeypatch, read_mib, times
):
    monkeypatch.setattr("mgpu_effects.services.ASK_AGAIN_S", 0.02)
    asked = []

    async def used_mib(cards):
        asked.append(tuple(cards))
        return read_mib.pop(0) if len(read_mib) > 1 else read_mib[0]

    consumer = evolve(
        routed(upstream), vram_resident_mib=8_000, vram_residue_mib=500, unload_again_s=0.2
    )
    made = Services(session, lambda _name: None, used_mib)
    made.configure(Settings(consumers={"a": consumer}))
    assert await made.unload("a", "routes") is None
    assert upstream.count("/unload") == times
    assert set(asked) == {(0,)}


async def test_a_process_that_does_not_run_holds_nothing_to_unload(session):
    command = ("python-that-does-not-exist",)
    consumer = ConsumerSettings(
        name="a",
        url="http://127.0.0.1:9",
        unload=(Step(path="/unload"),),
        driver=DriverSettings(process=ProcessSettings(command=command)),
    )
    made = services(session, consumer)

    assert await made.unload("a", "routes") is None
    assert await made.load("a") == "not_found"


async def test_a_process_that_takes_all_its_time_to_stop_is_killed(session):
    port = free_port()
    command = (sys.executable, str(STUBBORN), "--port", str(port), "--ignore-terms", "9")
    process = ProcessSettings(command=command, grace_s=60, ready_s=20)
    consumer = ConsumerSettings(
        name="a", url=f"http://127.0.0.1:{port}", driver=DriverSettings(process=process)
    )
    made = services(session, consumer, SchedulerSettings(unload_timeout_s=4))

    assert await made.load("a") is None
    assert await made.unload("a", "driver") is None
    facts = await made.probe("a", 1, nobody_asks)
    assert facts["a"].error == "refused"


async def test_a_stranger_at_the_address_of_a_process_of_ours_is_not_believed(
    session, upstream, tmp_path
):
    command = ("python-that-does-not-exist",)
    consumer = ConsumerSettings(
        name="a", url=upstream.url, driver=DriverSettings(process=ProcessSettings(command=command))
    )
    async with running(settings_of(consumer), tmp_path) as broker:
        await eventually(lambda: broker.state.consumers["a"].healthy)
        job, client = submit(broker, "a")
        await over(job)
    assert told(client) == "load_failed"
    assert {event["error"] for event in logged(tmp_path, "SwapDone")} == {"not_ours"}
    assert "/work" not in paths(upstream)


async def test_steps_in_order_until_one_fails(session, upstream):
    steps = (Step(path="/one"), Step(path="/two"), Step(path="/three"))
    upstream.rule("/two", status=409)
    made = services(session, evolve(routed(upstream), load=steps))

    assert await made.load("a") == "http_409"
    assert upstream.stats()["targets"] == ["POST /one", "POST /two"]
