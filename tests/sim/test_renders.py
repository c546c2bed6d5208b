"""A render is never cut by an eviction, however requests, departures and restarts interleave.

Some services go on with their work when its client has left, and when the broker has died. Whether
an unload ends such work is looked up in the simulated host itself, not in what the scheduler
believes.
"""

from collections.abc import Iterator
from random import Random

import pytest

from mgpu_core import events as ev
from mgpu_core import lifecycle, scheduler, swaps
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.draft import Draft
from mgpu_core.effects import StartUnload
from mgpu_core.simulation.world import Ask, BrokerCrash, Busy, Script, Traits, World

RUNS = 120
END_S = 90
RENDERS = ("film", "image")


def host() -> Config:
    """Give two that render, one of which its driver stops, and two that are in their way."""
    routes = {"load_route": True, "unload_route": True}
    return config_of(
        Consumer(name="image", vram_mib={0: 11_000}, max_concurrency=2, **routes),
        Consumer(name="film", vram_mib={0: 9_000}, driver="systemd"),
        Consumer(name="chat", vram_mib={0: 8_000}, **routes),
        Consumer(name="voice", vram_mib={0: 3_000}, priority=4, **routes),
        gpus=(Gpu(total_mib=16_000, max_parallel=None),),
        queue_timeout_us=60 * SECOND_US,
        overtake_bound=2,
        probe_interval_us=5 * SECOND_US,
    )


def afternoon(chance: Random) -> Iterator[tuple[int, object]]:
    """Draw who comes when; renders are long, and everybody is impatient now and then."""
    for _ in range(chance.randint(4, 14)):
        at = chance.randint(1, 60_000) * 1_000
        name = chance.choice((*RENDERS, "chat", "voice"))
        work_s = chance.randint(5, 40) if name in RENDERS else chance.randint(1, 3)
        patience = chance.randint(1, 30) * SECOND_US if chance.random() < 0.3 else None
        yield at, Ask(consumer=name, work_us=work_s * SECOND_US, patience_us=patience)
    for _ in range(chance.choice((0, 1, 2))):
        yield (
            chance.randint(1, 60_000) * 1_000,
            BrokerCrash(down_us=chance.randint(1, 40) * 100_000),
        )
    if chance.random() < 0.2:
        yield chance.randint(1, 60_000) * 1_000, Busy(consumer="image", us=20 * SECOND_US)
    if chance.random() < 0.2:
        unload = ev.Unload(at=0, consumers=(chance.choice(RENDERS),))
        yield chance.randint(1, 60_000) * 1_000, unload


def world_of(seed: int) -> World:
    chance = Random(seed)
    script: Script = tuple(sorted(afternoon(chance), key=lambda act: act[0]))  # type: ignore
    tells = {"tells_residency": True, "tells_busy": True, "mute_at_work": False}
    traits = {name: Traits(probe_ms=(1, 1_500), **tells) for name in host().consumers}
    return World(
        host(), chance=Random(seed), script=script, traits=traits, renders=frozenset(RENDERS)
    )


def first_cut() -> int | None:
    """Give the first seed whose run cuts a render."""
    for seed in range(RUNS):
        world = world_of(seed)
        for _ in world.run(world.now + END_S * SECOND_US):
            if world.cut:
                return seed
    return None


def test_no_eviction_cuts_a_render() -> None:
    assert first_cut() is None


def test_and_there_was_something_to_cut() -> None:
    """Renders wait and are waited for, go on without their client and without their broker."""
    left = unloads = gone = 0
    for seed in range(RUNS // 2):
        world = world_of(seed)
        for event, transition in world.run(world.now + END_S * SECOND_US):
            unloads += any(isinstance(one, StartUnload) for one in transition.effects)
            running = any(world.services[name].jobs for name in RENDERS)
            gone += isinstance(event, ev.Cancel) and running
            left += isinstance(event, ev.Started) and any(
                world.services[name].left_until > world.now for name in RENDERS
            )
    assert unloads > RUNS
    assert gone > 10
    assert left > 10


def test_it_would_if_who_serves_could_be_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swaps, "at_work", lambda d, name: name in d.owed)
    assert first_cut() is not None


def test_it_would_if_nobody_looked_at_what_the_last_run_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unaware(d: Draft, event: ev.Started) -> None:
        lifecycle.on_started(d, event)
        for name in d.consumers:
            d.update(name, busy_seen=None)

    monkeypatch.setitem(scheduler.HANDLERS, ev.Started, unaware)  # type: ignore[arg-type]
    assert first_cut() is not None
