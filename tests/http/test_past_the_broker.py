"""What happens to a service past the broker is seen: work for others, an unload, a load."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mgpu_http.commands.remote import screen
from tests.support.facade import Address, ServeProcess
from tests.support.gpu_host import GpuHost, at_rest, counts, gpu_host, ready

STATE = {"path": "/state", "resident": "loaded", "mib": "mib", "unit": "mib"}
BY_STATE = {
    "vram_resident_mib": 9_000,
    "load": {"path": "/load"},
    "unload": {"path": "/unload"},
    "residency": STATE,
    "busy": {"path": "/state", "when": "working > `0`"},
}
OWN_NAME = Path("/proc/self/comm").read_text().strip()
ROUTING = {"tts": "voice", "image": "pictures"}
CONSUMERS = {
    "voice": {**BY_STATE, "paths": {"tts": {"path": "/tts"}}},
    "pictures": {**BY_STATE, "paths": {"image": {"path": "/draw"}}},
}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    with gpu_host(tmp_path, total_mib=16_000) as host:
        yield host


@asynccontextmanager
async def work_past(host: GpuHost, name: str) -> AsyncIterator[None]:
    """Have somebody use a service directly, until the block ends."""
    async with Address(host.services[name].port).connect() as client:
        await client.send("POST", "/tts", "X-Upstream: do=never", body=b"")
        yield


async def probed_anew(broker: ServeProcess, name: str) -> Any:
    """Wait for what a probe saw that began after this call."""
    for _ in range(2):  # the next one may have begun already
        before = (await broker.status())["consumers"][name]["last_probe"]
        status = await broker.until(
            "probed", lambda s, before=before: s["consumers"][name]["last_probe"] > before
        )
    return status


async def test_who_works_for_somebody_past_the_broker_is_not_evicted(host: GpuHost) -> None:
    host.start("voice", mib=9_000)
    host.start("pictures", mib=9_000, loaded=False)
    with host.serve(consumers=CONSUMERS, routing=ROUTING) as broker:
        await ready(broker)
        await probed_anew(broker, "pictures")  # it counts as loaded until it says otherwise
        async with work_past(host, "voice"):
            await probed_anew(broker, "voice")
            drawing = asyncio.create_task(broker.ask("POST", "/v1/image", body=b"a cat"))
            waiting = await broker.until(
                "waiting", lambda s: s["requests"] and s["requests"][0]["why"]
            )
            for _ in range(3):  # it stays so
                await probed_anew(broker, "voice")
            assert host.calls() == ["voice POST /tts"]
            assert not drawing.done()
        answer = await drawing
        status = await at_rest(broker)
    why = waiting["requests"][0]["why"]
    assert (why["type"], why["who"]) == ("victim_busy", ["voice"])
    assert answer.status == 200
    assert host.calls()[1:] == [
        "voice POST /unload",
        "pictures POST /load",
        "pictures POST /draw",
    ]
    assert counts(status) == (1, 1)


@pytest.mark.parametrize("residency", [STATE, "nvml"])
async def test_who_is_unloaded_past_the_broker_is_seen_out_and_loaded_again(
    host: GpuHost, residency: Any
) -> None:
    host.start("voice", mib=9_000)
    consumers = {"voice": {**CONSUMERS["voice"], "residency": residency}}
    with host.serve(consumers=consumers, routing={"tts": "voice"}) as broker:
        await ready(broker)
        voice = (await probed_anew(broker, "voice"))["consumers"]["voice"]
        assert (voice["residency"], voice["residency_source"]) == ("resident", "probe")
        assert (await broker.ask("POST", "/v1/tts", body=b"one")).status == 200

        await Address(host.services["voice"].port).ask("POST", "/unload", body=b"")
        status = await broker.until("out", lambda s: not s["consumers"]["voice"]["loaded"])
        assert status["consumers"]["voice"]["residency_source"] == "probe"
        answer = await broker.ask("POST", "/v1/tts", body=b"two")

        await Address(host.services["voice"].port).ask("POST", "/unload", body=b"")
        await broker.until("out", lambda s: not s["consumers"]["voice"]["loaded"])
        await Address(host.services["voice"].port).ask("POST", "/load", body=b"")
        status = await broker.until("in", lambda s: s["consumers"]["voice"]["loaded"])
    assert (answer.status, answer.json()["body"]) == (200, "two")
    assert host.calls()[:5] == [
        "voice POST /tts",
        "voice POST /unload",
        "voice POST /load",
        "voice POST /tts",
        "voice POST /unload",
    ]
    assert status["consumers"]["voice"]["residency_source"] == "probe"
    assert status["consumers"]["voice"]["error"] is None


async def test_its_own_word_for_its_memory_counts(host: GpuHost) -> None:
    host.start("voice", mib=7_500)
    with host.serve(consumers={"voice": CONSUMERS["voice"]}) as broker:
        await ready(broker)
        status = await probed_anew(broker, "voice")
    assert status["consumers"]["voice"]["gpu_resident_mib"] == 7_500


async def test_what_it_cannot_tell_stands_in_the_status_and_once_in_the_log(
    host: GpuHost,
) -> None:
    host.start("voice", mib=9_000)
    consumers = {"voice": {**CONSUMERS["voice"], "residency": {**STATE, "resident": "lodaed"}}}
    with host.serve(consumers=consumers) as broker:
        await ready(broker)
        await probed_anew(broker, "voice")
        status = await probed_anew(broker, "voice")
        voice = status["consumers"]["voice"]
    assert (voice["healthy"], voice["error"]) == (True, "residency: no_value")
    assert (voice["loaded"], voice["residency_source"]) == (True, "assumed")
    assert "ok (residency: no_value)" in screen(status)
    said = [line for line in broker.lines if "residency: no_value" in line]
    assert len(said) == 1
    assert "voice answers, but cannot tell all that it is asked" in said[0]


async def test_the_status_names_the_processes_that_are_nobodys(host: GpuHost) -> None:
    host.start("voice", mib=9_000)
    host.card.take("a game", 600)  # in this process
    with host.serve(consumers={"voice": CONSUMERS["voice"]}) as broker:
        await ready(broker)
        status = await broker.status()
        shown = screen(status).splitlines()
        host.card.fail("nvml_failed")
        nothing = await broker.until("unknown", lambda s: s["gpu"][0]["foreign"] is None)
    [stranger] = status["gpu"][0]["foreign"]
    assert stranger == {"pid": os.getpid(), "name": OWN_NAME, "mib": 600}
    assert shown[-2].split() == ["GPU", "PID", "NO", "CONSUMER'S", "PROCESS", "MIB"]
    assert shown[-1].split() == ["0", str(os.getpid()), *OWN_NAME.split(), "600"]
    assert nothing["gpu"][0]["error"] in {None, "nvml_failed"}
