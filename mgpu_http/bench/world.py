"""How fast the simulated host is: by itself, with the scheduler in it, and with its judge.

Each run is one of a campaign (`make fuzz`), with faults and all. Of the processor's time, as
nothing here waits for anything.
"""

import time
from collections.abc import Iterator
from random import Random

from attrs import frozen

from mgpu_core.events import Event
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation import World, campaign, swarm
from mgpu_core.simulation.making import draw_setting
from mgpu_core.state import State

RUNS = 40
GOAL_PER_S = 10_000


@frozen(kw_only=True)
class Speed:
    """Events a second: of the host alone, of host and scheduler, of these with the judge."""

    host: float
    scheduled: float
    judged: float


class Timed(Scheduler):
    """It knows how long all of its steps took, in seconds."""

    took_s = 0.0

    def step(self, state: State, event: Event) -> Transition:
        began = time.thread_time()
        transition = super().step(state, event)
        self.took_s += time.thread_time() - began
        return transition


def measure(*, runs: int = RUNS) -> Speed:
    events = total_s = steps_s = 0.0
    for world, scheduler in _worlds(runs):
        began = time.thread_time()
        events += sum(1 for _ in world.run(world.now + 120_000_000))
        total_s += time.thread_time() - began
        steps_s += scheduler.took_s
    began = time.thread_time()
    judged = sum(report.steps for report in campaign(range(runs), Random))
    return Speed(
        host=events / (total_s - steps_s),
        scheduled=events / total_s,
        judged=judged / (time.thread_time() - began),
    )


def _worlds(runs: int) -> Iterator[tuple[World, Timed]]:
    for seed in range(runs):
        chance = Random(seed)  # noqa: S311 - to be drawn again, not to be secret
        setting = draw_setting(chance, swarm(chance), fair=True, acts=40)
        scheduler = Timed(setting.config)
        yield (
            World(
                setting.config,
                chance=chance,
                script=setting.script,
                faults=setting.faults,
                scheduler=scheduler,
            ),
            scheduler,
        )
