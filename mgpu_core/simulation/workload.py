"""Who asks for what and when, on which host: the same for every policy.

Services here work on one job after another, as a GPU does that is busy with one, however many they
were given: whoever asks for what is loaded is next in line there, and waits until its turn.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from attrs import frozen

from mgpu_core.config import SECOND_US, Config, Consumer, Gpu, config_of
from mgpu_core.simulation.chance import Chance, pick
from mgpu_core.simulation.world import MS_US, Ask, Script, Traits

# Nothing but the policy may end a wait, or make one: no time-out, no full queue.
FOREVER_US = 10**9 * SECOND_US
NO_LIMIT = 10**6
# Everybody comes after the first probes, which find nothing loaded.
QUIET_US = 60 * SECOND_US


@frozen(kw_only=True)
class Workload:
    """A host, what its services are like, and every arrival on it."""

    config: Config
    traits: Mapping[str, Traits]
    script: Script

    def arrivals(self) -> dict[str, list[int]]:
        """Give when each consumer is asked for, in order."""
        times: dict[str, list[int]] = {name: [] for name in self.config.consumers}
        for at, act in self.script:
            if isinstance(act, Ask):
                times[act.consumer].append(at)
        return times


def host(consumers: Iterable[Consumer], total_mib: int) -> Config:
    """One card that does one work at a time. It is read and probed when the scheduler asks."""
    return config_of(
        *consumers,
        gpus=(Gpu(total_mib=total_mib, cushion_mib=0, max_parallel=1),),
        queue_timeout_us=FOREVER_US,
        load_timeout_us=FOREVER_US,
        unload_timeout_us=FOREVER_US,
        poll_interval_us=FOREVER_US,
        probe_interval_us=FOREVER_US,
    )


def _service(name: str, mib: int) -> Consumer:
    return Consumer(
        name=name,
        vram_mib={0: mib},
        load_route=True,
        unload_route=True,
        max_concurrency=NO_LIMIT,
        max_pending=NO_LIMIT,
    )


def _traits(load_us: int) -> Traits:
    return Traits(load_us=load_us, unload_us=0, in_turn=True, spread=(10, 10))


# ------------------------------------------------------------------------- recorded arrivals


SLOT_MIB = 1_000


@frozen
class Arrival:
    """A recorded request: when it came, for which model, and how long the GPU worked on it."""

    at_us: int
    model: str
    work_us: int


def in_slots(arrivals: Iterable[Arrival], load_us: Mapping[str, int], slots: int) -> Workload:
    """Models of equal size on a card that holds so many of them."""
    asks = sorted(arrivals, key=lambda one: one.at_us)
    first_us = asks[0].at_us if asks else 0
    return Workload(
        config=host((_service(name, SLOT_MIB) for name in load_us), slots * SLOT_MIB),
        traits={name: _traits(us) for name, us in load_us.items()},
        script=tuple(
            (QUIET_US + one.at_us - first_us, Ask(consumer=one.model, work_us=one.work_us))
            for one in asks
        ),
    )


# ------------------------------------------------------------------------- the four services


CARD_MIB = 24_000
SESSIONS = 400
# MiB, seconds to load, and the least and most milliseconds that one piece of work takes.
SERVICES: Mapping[str, tuple[int, int, tuple[int, int]]] = {
    "tts": (2_800, 5, (400, 4_000)),
    "stt": (4_500, 6, (500, 5_000)),
    "llm": (11_000, 15, (2_000, 20_000)),
    "image": (18_000, 25, (8_000, 40_000)),
}
# The most time between the beginnings of two sessions.
HURRIES_MS = (240_000, 180_000, 360_000)
TURN = ("stt", "llm", "tts")
# What somebody does, how often at least and at most, and the least and most seconds between.
Habit: TypeAlias = tuple[tuple[str, ...], tuple[int, int], tuple[int, int]]
HABITS: tuple[Habit, ...] = (
    (TURN, (2, 8), (10, 60)),
    (("llm",), (1, 6), (20, 120)),
    (("image",), (1, 8), (5, 90)),
    (("stt",), (1, 5), (5, 60)),
    (("tts",), (3, 15), (2, 20)),
)


def four_services(chance: Chance) -> Workload:
    """Draw half a day in a house with one card: people talk, write, draw, dictate, have read.

    How much is asked for and what is asked for most are drawn as well.
    """
    asks: list[tuple[int, Ask]] = []
    at_ms, hurry_ms, favourite = 0, pick(chance, HURRIES_MS), pick(chance, HABITS)
    for _ in range(SESSIONS):
        at_ms += chance.randint(0, hurry_ms)
        asks += _session(chance, at_ms, pick(chance, (*HABITS, favourite, favourite)))
    return Workload(
        config=host((_service(name, mib) for name, (mib, _, _) in SERVICES.items()), CARD_MIB),
        traits={name: _traits(s * SECOND_US) for name, (_, s, _) in SERVICES.items()},
        script=tuple(sorted(asks, key=lambda one: one[0])),
    )


def _session(chance: Chance, at_ms: int, habit: Habit) -> list[tuple[int, Ask]]:
    wants, times, between_s = habit
    asks = []
    for _ in range(chance.randint(*times)):
        for service in wants:
            work_ms = chance.randint(*SERVICES[service][2])
            asks.append((QUIET_US + at_ms * MS_US, Ask(consumer=service, work_us=work_ms * MS_US)))
            at_ms += work_ms  # the next in a turn needs what this one gives
        at_ms += chance.randint(*between_s) * 1000
    return asks
