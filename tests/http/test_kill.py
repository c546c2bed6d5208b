"""A real broker under load is killed, again and again; the log of each run is whole, and the next
run begins with what it knew. `--kills 20` for more.
"""

import asyncio
import contextlib
import itertools
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from mgpu_core.lifecycle import carried_over
from mgpu_core.replay import Record, Replay
from mgpu_core.state import State
from mgpu_effects.event_log import Item, Segment, Torn, read
from tests.support.facade import ServeProcess
from tests.support.gpu_host import GpuHost, gpu_host, sampled_anew

SIDES = {"load": {"path": "/load"}, "unload": {"path": "/unload"}}
# Two that exclude each other, one whose size is measured, and one that does not load.
CONSUMERS: dict[str, Any] = {
    "big": {"paths": {"tts": {"path": "/work"}}, "vram_resident_mib": 9_000, **SIDES},
    "large": {"paths": {"llm": {"path": "/work"}}, "vram_resident_mib": 9_000, **SIDES},
    "small": {"paths": {"stt": {"path": "/work"}}, "vram_resident_mib": "auto", **SIDES},
    "broken": {"paths": {"image": {"path": "/work"}}, "vram_resident_mib": 1_000, **SIDES},
}
ROUTING = {"tts": "big", "llm": "large", "stt": "small", "image": "broken"}
CLIENTS = 6


async def warm_up(broker: ServeProcess) -> None:
    """Have something measured, and something cool down."""
    for name in ("small", "broken", "large"):
        answer = await broker.ask("POST", f"/v1/consumers/{name}/unload")
        assert answer.status == 200, answer
    await broker.until(
        "unloaded",
        lambda s: all(not s["consumers"][n]["loaded"] for n in ("small", "broken", "large")),
    )
    await sampled_anew(broker)
    for kind in ("stt", "image"):
        await broker.ask("POST", f"/v1/{kind}", body=b"{}")
        await sampled_anew(broker)


async def client(broker: ServeProcess, kinds: list[str]) -> None:
    """Ask until the broker is gone."""
    with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
        for kind in kinds:
            await broker.ask("POST", f"/v1/{kind}", body=b"{}")


async def kill_under_load(broker: ServeProcess, chance: random.Random) -> None:
    clients = [
        asyncio.create_task(client(broker, chance.choices(list(ROUTING), k=500)))
        for _ in range(CLIENTS)
    ]
    await asyncio.sleep(chance.uniform(0.05, 0.8))
    broker.signal(signal.SIGKILL)
    assert await broker.exit_code() == -signal.SIGKILL
    await asyncio.gather(*clients)


def replayed(items: list[Item]) -> list[tuple[State, State]]:
    """Replay all runs exactly; give the state with which each began, and that of its last event."""
    runs: list[tuple[State, State]] = []
    replay = Replay()
    for item in items:
        if isinstance(item, Segment):
            replay.begin(item.state)
            assert replay.state is not None
            runs.append((item.state, replay.state))
        elif isinstance(item, Record):
            assert replay.step(item) is None, item
            assert replay.state is not None
            runs[-1] = (runs[-1][0], replay.state)
    return runs


def host_with_services(host: GpuHost) -> None:
    host.start("big", mib=9_000)
    host.start("large", mib=9_000, loaded=False)
    host.start("small", mib=3_000, loaded=False)
    host.start("broken", mib=1_000, loaded=False).rule("/load", status=500)


@pytest.mark.timeout(300)
async def test_after_a_kill_the_log_is_whole_and_the_next_run_knows_what_the_last_one_knew(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chance = random.Random()
    kills: int = request.config.getoption("--kills")
    with gpu_host(tmp_path) as host:
        host_with_services(host)
        for number in range(kills):
            with host.serve(consumers=CONSUMERS, routing=ROUTING) as broker:
                if number == 0:
                    await warm_up(broker)
                await kill_under_load(broker, chance)
        with host.serve(consumers=CONSUMERS, routing=ROUTING) as broker:
            broker.signal(signal.SIGTERM)
            assert await broker.exit_code() == 0

    items = list(read(tmp_path / "log"))
    assert not any(isinstance(item, Torn) for item in items), "what a kill tears is set aside"
    runs = replayed(items)
    assert len(runs) == kills + 1
    for (_, last), (begun, _) in itertools.pairwise(runs):
        assert begun == carried_over(last, last.config, last.at)
    seqs = [item.seq for item in items if isinstance(item, Record)]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) > 20 * kills, "it was under load"
    known = runs[-1][0].consumers
    assert known["small"].measured_mib == 3_000
    assert known["big"].last_used is not None
    assert known["broken"].load_cooldown is not None
