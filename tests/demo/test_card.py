"""The simulated card: what is taken is seen at once, what is let go of late."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mgpu_effects.gpu import SIMULATED_GPU, CardId, SimulatedSampler
from mgpu_http.demo.card import DESKTOP_MIB, TOTAL_MIB, OutOfMemory
from tests.support.demo_host import DemoHost, demo_host

USABLE_MIB = TOTAL_MIB - DESKTOP_MIB


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[DemoHost]:
    async with demo_host(tmp_path) as host:
        yield host


async def test_what_is_taken_is_seen_at_once_and_what_is_let_go_of_late(host: DemoHost) -> None:
    voice = await host.join("voice")
    assert await voice.hold(10_000) == USABLE_MIB - 10_000
    assert host.held("voice") == 10_000
    assert await voice.hold(4_000) == USABLE_MIB - 10_000
    await host.until("seen free", lambda: host.free_mib == USABLE_MIB - 4_000)
    assert host.held("voice") == 4_000
    assert await voice.free_mib() == USABLE_MIB - 4_000


async def test_growth_beyond_what_is_free_is_refused_and_recorded(host: DemoHost) -> None:
    await host.join("voice", 10_000)
    pictures = await host.join("pictures", 5_000)
    with pytest.raises(OutOfMemory) as refused:
        await pictures.hold(6_000)
    assert (refused.value.wanted_mib, refused.value.free_mib) == (1_000, USABLE_MIB - 15_000)
    assert host.held("pictures") == 5_000
    assert host.journal("pictures") == [("out_of_memory", 1_000)]


async def test_a_process_takes_back_what_it_has_just_let_go_of(host: DemoHost) -> None:
    voice = await host.join("voice", USABLE_MIB)
    await voice.hold(0)
    assert await voice.hold(USABLE_MIB) == 0


async def test_two_processes_of_one_name_are_shown_together(host: DemoHost) -> None:
    old = await host.join("voice", 2_000)
    await host.join("voice", 3_000)
    assert host.held("voice") == 5_000
    await old.leave()
    await host.until("the old one is gone", lambda: host.held("voice") == 3_000)


async def test_the_memory_of_a_killed_process_comes_free_and_is_a_crash(host: DemoHost) -> None:
    whisper = await host.start("whisper-server")
    assert host.held("whisper-server") == 2_100
    whisper.process.kill()
    await host.until("free again", lambda: host.free_mib == USABLE_MIB)
    assert host.journal("whisper-server") == [("load", 2_100), ("crash", 2_100)]


async def test_who_takes_leave_has_not_crashed(host: DemoHost) -> None:
    voice = await host.join("voice", 2_000)
    await voice.say("unload", 2_000)
    await voice.leave()
    await host.until("free again", lambda: host.free_mib == USABLE_MIB)
    assert host.journal("voice") == [("unload", 2_000)]


async def test_a_cancelled_call_leaves_its_answer_to_nobody_else(host: DemoHost) -> None:
    voice = await host.join("voice")
    call = asyncio.create_task(voice.hold(USABLE_MIB + 1))
    await asyncio.sleep(0)  # it has begun
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    assert await voice.hold(1_000) == USABLE_MIB - 1_000


async def test_the_broker_can_read_it(host: DemoHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATED_GPU, str(host.directory / "card.json"))
    await host.join("voice", 2_000)
    [reading] = await SimulatedSampler([CardId(0)]).read()
    assert (reading.total_mib, reading.free_mib) == (TOTAL_MIB, USABLE_MIB - 2_000)
    assert reading.used_mib == DESKTOP_MIB + 2_000


async def test_it_ends_when_told_to(host: DemoHost) -> None:
    [card] = host.processes
    card.terminate()
    assert await asyncio.wait_for(card.wait(), 20) == 0
