"""A state as events: what has to happen so that about the same is believed.

A history that begins late in a log begins so. It need not be exact: what counts is whether what
comes after it still fails, and what is not needed for that is left out again.
"""

from collections.abc import Iterator

from attrs import evolve

from mgpu_core import events as ev
from mgpu_core.state import Phase, RequestState, Residency, State, SwapPhase

# Between two events of a case: as little as a transcript tells apart.
STEP_US = 1_000
# Epochs of answers: of the command that is open then, or of none.
OPEN, STALE = -1, 0
# Who was promoted comes before all others: so does the highest priority.
URGENT = 4
IN_MEMORY = {Residency.RESIDENT, Residency.UNLOADING}


def preamble(state: State, until: int, only: str | None = None) -> list[ev.Event]:
    """Give events of which the last comes right before `until` (microseconds).

    `only`: of those that wait, those for this consumer alone.
    """
    events = [*_seen(state), *_used(state), *_steered(state), *_asked(state, only)]
    first = until - len(events) * STEP_US
    return [_at(event, first + number * STEP_US) for number, event in enumerate(events)]


def _at(event: ev.Event, at: int) -> ev.Event:
    if isinstance(event, ev.GpuSample | ev.ProbeResult):
        return evolve(event, at=at, taken=at)
    return evolve(event, at=at)


def _seen(state: State) -> Iterator[ev.Event]:
    if state.cards:
        readings = tuple(
            ev.GpuReading(
                index=index, total_mib=c.total_mib, used_mib=c.used_mib, free_mib=c.free_mib
            )
            for index, c in state.cards.items()
        )
        yield ev.GpuSample(at=0, taken=0, gpus=readings)
    for name, belief in state.consumers.items():
        probe = ev.ProbeResult(at=0, taken=0, consumer=name, healthy=True)
        if belief.healthy is False:
            failed = evolve(
                probe, healthy=False, failure="refused" if belief.refused else "timeout"
            )
            yield from [failed] * (1 if belief.refused else state.config.probe_failures)
        elif belief.residency is not Residency.UNKNOWN:
            yield evolve(probe, resident=belief.residency in IN_MEMORY or name in _gone(state))


def _gone(state: State) -> set[str]:
    """Give who was told to go and has gone, but whose memory no reading has shown free yet."""
    waiting = (swap for swap in state.swaps.values() if swap.phase is not SwapPhase.LOADING)
    evicted = {name for swap in waiting for name in swap.evicted}
    return {n for n in evicted if state.consumers[n].residency is Residency.ABSENT}


def _used(state: State) -> Iterator[ev.Event]:
    """Who is in was used, one after the other, as long ago as they were."""
    used = {n: b.last_used for n, b in state.consumers.items() if b.last_used is not None}
    for name in sorted(used, key=lambda name: used[name]):
        if state.consumers[name].residency in IN_MEMORY:
            yield ev.Request(at=0, request=f"use-{name}", consumer=name)
            yield ev.ServeDone(at=0, request=f"use-{name}")


def _steered(state: State) -> Iterator[ev.Event]:
    for name, belief in state.consumers.items():
        if belief.pinned is not None:
            yield ev.Pin(at=0, consumer=name, pinned=belief.pinned)


def _asked(state: State, only: str | None) -> Iterator[ev.Event]:
    """Who is served came first, then those whose swap is under way, then the others."""
    phases = (Phase.SERVING, Phase.JOINED, Phase.QUEUED)
    requests = sorted(
        state.requests.values(), key=lambda one: (phases.index(one.phase), one.arrival)
    )
    for one in requests:
        if one.phase is not Phase.SERVING and only not in {None, one.consumer}:
            continue
        yield _request(one, URGENT if _is_promoted(state, one.request) else one.priority)
    for name in sorted(_gone(state)):
        yield ev.UnloadDone(at=0, consumer=name, epoch=OPEN)
    for name, belief in state.consumers.items():
        if belief.busy_seen is not None:
            yield ev.ProbeResult(at=0, taken=0, consumer=name, healthy=True, busy=True)
        if belief.leaving:
            yield ev.Unload(at=0, consumers=(name,))
    if state.stopping:
        yield ev.Shutdown(at=0)
    elif state.draining:
        yield ev.Drain(at=0)


def _is_promoted(state: State, request: str) -> bool:
    bound, overtaken = state.config.overtake_bound, state.overtaken.get(request, 0)
    higher = state.overtaken_high.get(request, 0)
    return bound is not None and (overtaken >= bound or higher >= 2 * bound)


def _request(one: RequestState, priority: int) -> ev.Event:
    if one.operator is not None:
        return ev.Load(at=0, consumer=one.consumer, only_if_free=one.only_if_free)
    return ev.Request(
        at=0,
        request=one.request,
        consumer=one.consumer,
        kind=one.kind,
        priority=priority,
        deadline=one.deadline,
    )
