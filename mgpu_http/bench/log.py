"""What the event log costs: the loop that writes it, and who reads it back.

The traffic is simulated: the four services of the design on one card that holds two or three of
them, a request every other second, probes and readings as on a real host.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TypeAlias

from attrs import frozen

from mgpu_core.codec import encode_config, encode_effect, encode_event, encode_note, encode_state
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.events import Event
from mgpu_core.replay import Record, Replay
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation import Ask, World
from mgpu_effects.event_log import EventLog, Segment, read
from mgpu_effects.settings import EventLogSettings

EVENTS = 20_000
APPEND_LIMIT_US = 30
REPLAY_GOAL_PER_S = 15_000
Steps: TypeAlias = Iterable[tuple[Event, Transition]]


@frozen
class Costs:
    """Microseconds on the event loop for each event, and events replayed in a second.

    Of the processor's time: neither waits for anything, so that is what they take where they have
    it to themselves. `append_p50_us` and `append_p99_us` are over the events of a burst, of each
    its least of all rounds, so that what else the machine did does not count; `round_p99_us` is
    what the median round gave as it is. `between_p50_us` and `between_p99_us` are those of one
    round in which a whole step of scheduler and simulated host comes before each event, so that
    the processor has forgotten how to write one: a broker that has little to do. `replayed_per_s`
    is the best round's.
    """

    append_p50_us: float
    append_p99_us: float
    round_p99_us: float
    between_p50_us: float
    between_p99_us: float
    replayed_per_s: float


def measure(*, events: int = EVENTS, rounds: int = 1) -> Costs:
    config = _host()
    steps = list(_traffic(config, events))
    appended, replayed_s = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            appended.append(asyncio.run(_append(Path(directory), config, steps)))
            began = time.thread_time()
            replayed = _replay(Path(directory))
            replayed_s.append(time.thread_time() - began)
        assert replayed == events, "all of them are replayed"
    with tempfile.TemporaryDirectory() as directory:
        between = asyncio.run(_append(Path(directory), config, _traffic(config, events)))
    least = list(map(min, zip(*appended, strict=True)))
    return Costs(
        append_p50_us=_quantile(least, 0.5),
        append_p99_us=_quantile(least, 0.99),
        round_p99_us=median(_quantile(took_us, 0.99) for took_us in appended),
        between_p50_us=_quantile(between, 0.5),
        between_p99_us=_quantile(between, 0.99),
        replayed_per_s=events / min(replayed_s),
    )


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(len(values) * part)]


async def _append(directory: Path, config: Config, steps: Steps) -> list[float]:
    """Write it as the broker does; tell how long the loop was held up by each event."""
    state = Scheduler(config).initial()
    log = EventLog(
        directory,
        EventLogSettings(),
        "bench",
        "bench",
        lambda: (encode_config(config), encode_state(state)),
    )
    log.open()
    log.begin(1)
    took_us = []
    for seq, (event, transition) in enumerate(steps, start=1):
        state = transition.state
        began = time.thread_time()
        log.append(
            seq,
            state.at,
            encode_event(event),
            [encode_effect(effect) for effect in transition.effects],
            [encode_note(note) for note in transition.notes],
        )
        took_us.append((time.thread_time() - began) * 1e6)
        if seq % 100 == 0:
            await asyncio.sleep(0)  # the loop has other work, and threads of the log want theirs
    await log.close()
    return took_us


def _replay(directory: Path) -> int:
    """Replay strictly; give how many events there were."""
    replay, events = Replay(), 0
    for item in read(directory):
        if isinstance(item, Segment):
            replay.begin(item.state)
        elif isinstance(item, Record):
            assert replay.step(item) is None, "today's code decides what it decided just now"
            events += 1
    return events


def _host() -> Config:
    return config_of(
        Consumer(name="mvoice", vram_mib={0: 2_800}, load_route=True, unload_route=True),
        Consumer(name="whisper-server", vram_mib={0: 2_100}, driver="systemd"),
        Consumer(name="ollama", vram_mib={0: 8_000}, load_route=True, unload_route=True),
        Consumer(name="comfyui", vram_mib={0: 13_000}, unload_route=True),
        gpus=(Gpu(total_mib=16_384, max_parallel=None),),
    )


def _traffic(config: Config, events: int) -> Steps:
    chance = random.Random(1)  # noqa: S311 - the same traffic each time
    names = ["mvoice", "whisper-server", "mvoice", "whisper-server", "ollama", "mvoice", "comfyui"]
    script = tuple(
        (2 * number * SECOND_US, Ask(consumer=names[number // 8 % len(names)], work_us=SECOND_US))
        for number in range(events)
    )
    world = World(config, chance=chance, script=script, scheduler=Scheduler(config))
    return islice(world.run(), events)
