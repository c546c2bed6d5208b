"""What a step of the scheduler costs, without a runtime: `core.md` section 8."""

import time
from collections.abc import Iterator

from attrs import frozen

from mgpu_core.config import Config, Consumer, Gpu
from mgpu_core.events import GpuReading, GpuSample, ProbeResult, Request, ServeDone
from mgpu_core.scheduler import Scheduler
from mgpu_core.state import State

CONSUMERS = 8
CROWD = 1000
CARD_MIB = 24_000
NEED_MIB = 4_000
WALK_LIMIT_MS = 8.0  # what llama-swap's Go code takes for such a pass


@frozen
class Steps:
    """How long a step takes while `waiting` others wait, in microseconds."""

    waiting: int
    step_us: float

    @property
    def per_s(self) -> float:
        return 1e6 / self.step_us


def steps(waiting: int, *, requests: int = 2000) -> Steps:
    """Time a request of a loaded consumer and its end, two steps, over and over."""
    scheduler, state = _host(CONSUMERS)
    for number in range(waiting):  # for those that are not in, behind the one that is at work
        consumer = f"c{1 + number % (CONSUMERS - 1)}"
        state = _request(scheduler, state, f"w{number}", consumer)
    began = time.perf_counter()
    for number in range(requests):
        state = _request(scheduler, state, f"r{number}", "c0")
        done = ServeDone(at=state.at + 1, request=f"r{number}", outcome="ok")
        state = scheduler.step(state, done).state
    took_s = time.perf_counter() - began
    assert len(state.requests) == waiting + 1, "the others were to wait, and nobody else"
    return Steps(waiting, took_s / (2 * requests) * 1e6)


def walk_ms(*, passes: int = 20) -> float:
    """Time a pass over 1,000 waiting requests of as many consumers, in milliseconds: the best.

    After a reading, all who wait for memory are looked at.
    """
    scheduler, state = _host(CROWD)
    for number in range(1, CROWD):
        state = _request(scheduler, state, f"w{number}", f"c{number}")
    assert len(state.queue) == CROWD - 1
    return min(_timed(scheduler, state, passes)) * 1e3


def _timed(scheduler: Scheduler, state: State, passes: int) -> Iterator[float]:
    card = state.cards[0]
    reading = GpuReading(
        index=0, total_mib=card.total_mib, used_mib=card.used_mib, free_mib=card.free_mib
    )
    for _ in range(passes):
        sample = GpuSample(at=state.at + 1, taken=state.at + 1, gpus=(reading,))
        began = time.perf_counter()
        state = scheduler.step(state, sample).state
        yield time.perf_counter() - began


def _host(consumers: int) -> tuple[Scheduler, State]:
    """One card on which the first consumer is loaded and at work, so that all others wait."""
    names = [f"c{number}" for number in range(consumers)]
    config = Config(
        consumers={
            name: Consumer(
                name=name,
                vram_mib={0: CARD_MIB - 2 * NEED_MIB if name == "c0" else 3 * NEED_MIB},
                load_route=True,
                unload_route=True,
                max_concurrency=4,
                max_pending=CROWD + 1,
            )
            for name in names
        },
        gpus={0: Gpu(total_mib=CARD_MIB)},
        overtake_bound=None,
        queue_timeout_us=10**12,
    )
    scheduler = Scheduler(config)
    state = scheduler.initial()
    for name in names[1:]:
        absent = ProbeResult(at=1, consumer=name, taken=1, healthy=True, resident=False)
        state = scheduler.step(state, absent).state
    held_mib = CARD_MIB - 2 * NEED_MIB
    card = GpuReading(index=0, total_mib=CARD_MIB, used_mib=held_mib, free_mib=2 * NEED_MIB)
    state = scheduler.step(state, GpuSample(at=2, taken=2, gpus=(card,))).state
    return scheduler, _request(scheduler, state, "at work", "c0")


def _request(scheduler: Scheduler, state: State, request: str, consumer: str) -> State:
    event = Request(at=state.at + 1, request=request, consumer=consumer, kind="llm")
    return scheduler.step(state, event).state
