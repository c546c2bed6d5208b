"""What a service really takes, measured by its processes and shown beside what was declared."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgpu_http.commands.remote import screen
from tests.support.facade import ServeProcess
from tests.support.gpu_host import GpuHost, at_rest, gpu_host, ready

ROUTES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}
VOICE: dict[str, Any] = {
    **ROUTES,
    "paths": {"tts": {"path": "/tts"}},
    "vram_resident_mib": 4_000,
    "residency": {"path": "/state", "resident": "loaded", "mib": "mib", "unit": "mib"},
}
FIGURES = {"residue_mib": 400, "steady_mib": 5_000, "load_peak_mib": 7_000, "work_peak_mib": 6_000}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GpuHost]:
    with gpu_host(tmp_path, total_mib=16_000) as host:
        yield host


async def memory_until(broker: ServeProcess, true: Callable[[Any], bool]) -> Any:
    """Give what the status says of the memory of `voice`, once that is so."""
    status = await broker.until("measured", lambda s: true(s["consumers"]["voice"]["memory"]))
    return status["consumers"]["voice"]["memory"]


async def measured(broker: ServeProcess, **figures: int | None) -> Any:
    return await memory_until(broker, lambda memory: figures.items() <= memory["measured"].items())


async def live_through(host: GpuHost, broker: ServeProcess) -> None:
    """Unload, load, work and rest: each until it was measured."""
    await ready(broker)
    await measured(broker, steady_mib=5_000)
    await broker.ask("POST", "/v1/consumers/voice/unload")
    await measured(broker, residue_mib=400)
    host.services["voice"].rule("/load", delay=0.6)
    await broker.ask("POST", "/v1/consumers/voice/load")
    await measured(broker, load_peak_mib=7_000)
    async with broker.connect() as client:
        await client.send("POST", "/v1/tts", "X-Upstream: do=never", body=b"")
        await measured(broker, work_peak_mib=6_000)
    await at_rest(broker)
    await memory_until(broker, lambda memory: memory["held_mib"] == 5_000)


async def test_four_figures_and_two_times_are_measured_and_outlive_the_broker(
    host: GpuHost,
) -> None:
    host.start("voice", mib=5_000, load_mib=7_000, work_mib=6_000, residue_mib=400)
    with host.serve(consumers={"voice": VOICE}, routing={"tts": "voice"}) as broker:
        await live_through(host, broker)
        status = await broker.status()
        broker.process.terminate()
        assert await broker.exit_code() == 0
    told = status["consumers"]["voice"]["memory"]
    load_s, unload_s = told["load_s"], told["unload_s"]
    assert told == {
        "declared_mib": 4_000,
        "api_mib": 5_000,
        "held_mib": 5_000,
        "measured": FIGURES,
        "load_s": load_s,
        "unload_s": unload_s,
        "suggested_mib": 5_000,
    }
    assert load_s >= 0.6
    assert unload_s > 0
    assert (host.directory / "log" / "footprints.json").stat().st_mode & 0o777 == 0o600

    shown = screen(status).splitlines()
    row = next(line for line in shown if line.split()[:2] == ["voice", "4000"])
    assert row.split()[2:8] == ["5000", "5000", "5000", "7000", "6000", "400"]
    assert "suggest for voice: vram_resident_mib: 5000 (declared 4000)" in shown

    with host.serve(consumers={"voice": VOICE}) as broker:
        kept = await memory_until(broker, lambda _memory: True)
    assert kept["measured"] == FIGURES
    assert (kept["load_s"], kept["unload_s"]) == (load_s, unload_s)


async def test_auto_is_what_its_processes_hold_whatever_others_took_meanwhile(
    host: GpuHost,
) -> None:
    host.start("voice", mib=5_000, loaded=False)
    host.services["voice"].rule("/load", delay=0.3)
    voice = {**ROUTES, "paths": VOICE["paths"], "vram_resident_mib": "auto"}
    with host.serve(consumers={"voice": voice}, routing={"tts": "voice"}) as broker:
        await ready(broker)
        await broker.ask("POST", "/v1/consumers/voice/unload")
        await broker.until("out", lambda s: not s["consumers"]["voice"]["loaded"])
        loading = asyncio.create_task(broker.ask("POST", "/v1/tts", body=b"one"))
        await broker.until("loading", lambda s: s["consumers"]["voice"]["residency"] == "loading")
        host.card.take("a game", 600)  # in this process
        assert (await loading).status == 200
        status = await broker.until(
            "measured", lambda s: s["consumers"]["voice"]["gpu_resident_mib"] == 5_000
        )
    told = status["consumers"]["voice"]["memory"]
    assert (told["declared_mib"], told["api_mib"]) == (None, None)
    assert (told["measured"]["steady_mib"], told["suggested_mib"]) == (5_000, 5_000)
    assert "suggest" not in screen(status)


async def test_where_no_processes_are_told_nothing_is_measured_and_nothing_suggested(
    host: GpuHost,
) -> None:
    host.card.fail("not_supported")
    host.start("voice", mib=5_000)
    consumers = {"voice": {**VOICE, "residency": "assumed"}}
    with host.serve(consumers=consumers) as broker:
        await ready(broker)
        status = await broker.status()
    told = status["consumers"]["voice"]["memory"]
    assert (told["declared_mib"], told["held_mib"], told["suggested_mib"]) == (4_000, None, None)
    assert set(told["measured"].values()) == {None}
    assert "STEADY" not in screen(status)
