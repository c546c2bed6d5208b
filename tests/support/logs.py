"""Logs of a host that is simulated: four services, one card, clients, and some things that fail."""

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from attrs import frozen

from mgpu_core.codec import encode_config, encode_effect, encode_event, encode_note, encode_state
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.events import Event
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.faults import Faults
from mgpu_core.simulation.making import draw_script
from mgpu_core.simulation.world import World
from mgpu_core.state import State
from mgpu_effects.event_log import encode_header, encode_line
from mgpu_effects.event_log.files import segment_name

VERSION = "0.1.0"
Steps: TypeAlias = Sequence[tuple[Event, Transition]]


def host() -> Config:
    """The services of the design, on a card that holds two or three of them."""
    return config_of(
        Consumer(name="mvoice", vram_mib={0: 2_800}, load_route=True, unload_route=True),
        Consumer(name="whisper-server", vram_mib={0: 2_100}, driver="systemd"),
        Consumer(name="ollama", vram_mib={0: 8_000}, load_route=True, unload_route=True),
        Consumer(name="comfyui", vram_mib={0: 13_000}, unload_route=True),
        gpus=(Gpu(total_mib=16_384),),
    )


@frozen
class History:
    """What happened from the first event on; `states[n]` is the one after n events."""

    config: Config
    steps: Steps

    @property
    def states(self) -> list[State]:
        return [Scheduler(self.config).initial(), *(t.state for _, t in self.steps)]

    def first(self, count: int) -> "History":
        return History(self.config, self.steps[:count])


@cache
def history(seed: int = 1, acts: int = 30) -> History:
    """Simulate it, with a load that fails now and then."""
    chance, config, faults = random.Random(seed), host(), Faults(load_fails=100, unload_fails=50)
    script = draw_script(chance, config, faults, acts=acts)
    world = World(config, chance=chance, script=script, faults=faults, scheduler=Scheduler(config))
    end_us = world.now + script[-1][0] + 20 * SECOND_US
    return History(config, tuple(world.run(end_us)))


def header(state: State, run: str = "r1") -> bytes:
    return encode_header(VERSION, run, encode_config(state.config), encode_state(state))


def lines(steps: Steps, first_seq: int = 1) -> Iterator[bytes]:
    for seq, (event, transition) in enumerate(steps, start=first_seq):
        yield encode_line(
            seq,
            transition.state.at,
            encode_event(event),
            [encode_effect(effect) for effect in transition.effects],
            [encode_note(note) for note in transition.notes],
        )


def write_log(
    directory: Path, told: History, run: str = "r1", *, per_segment: int = 10**9, first_seq: int = 1
) -> list[Path]:
    """Write it as a run does; give its segments in order."""
    directory.mkdir(exist_ok=True)
    paths = []
    states = told.states
    for start in range(0, len(told.steps), per_segment):
        path = directory / segment_name(run, first_seq + start)
        steps = told.steps[start : start + per_segment]
        path.write_bytes(header(states[start], run) + b"".join(lines(steps, first_seq + start)))
        paths.append(path)
    return paths
