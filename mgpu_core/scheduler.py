"""The scheduler: one event in, the next state, effects and notes out.

A request's way, numbered as in the decision tree of `walk.py`: 1 admission (`requests.py`), 2 join,
3 serve, 4 and 5 wait, 6 start a swap (`swaps.py`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mgpu_core import beliefs, completions, events, lifecycle, operator, requests, swaps, walk
from mgpu_core.config import Config, in_order
from mgpu_core.draft import Draft
from mgpu_core.effects import Effect, WakeAt
from mgpu_core.events import Event
from mgpu_core.memory import GOOD_INTERVALS
from mgpu_core.notes import Note
from mgpu_core.planners import Planner
from mgpu_core.state import State, SwapPhase, initial_state


class Transition(NamedTuple):
    """What a step gives: the next state, what is to be done, and why."""

    state: State
    effects: tuple[Effect, ...]
    notes: tuple[Note, ...]


class Scheduler:
    """Pure: the same state and event give the same transition, on any machine, at any time.

    `planner` None: the built-in one that the configuration names.
    """

    def __init__(self, config: Config, planner: Planner | None = None) -> None:
        self._config = in_order(config)
        self._planner = planner

    def initial(self) -> State:
        """Give the state before the first event."""
        return initial_state(self._config)

    def step(self, state: State, event: Event) -> Transition:
        """Take one event. Whatever it holds, this never raises: odd input leaves a note."""
        d = Draft(state, event.at, self._planner)
        HANDLERS[type(event)](d, event)
        if d.stirred or type(event) not in SEEING or d.at >= d.calm_until:
            completions.give_up_overdue(d)
            settle(d)
            set_alarm(d)
        elif d.reread and d.waiting:
            d.calm = True  # as it was before
            set_alarm(d)
        return Transition(d.close(), tuple(d.effects), tuple(d.notes))


def settle(d: Draft) -> None:
    """Let everything happen that can happen now; each round ends something, so this ends."""
    rounds = 8 * (len(d.requests) + len(d.consumers)) + 32
    for _ in range(rounds):
        d.again = d.stirred = False
        told = _told(d)
        if d.swaps:
            swaps.advance_all(d)
        if d.arrived:
            walk.serve_arrived(d)
        if d.restless():
            walk.give_up_unclaimed(d)
            operator.leave(d)
            operator.unload_idle(d)
        if d.queue and not d.stopping:
            stirred, before = d.stirred, _told(d)
            walk.walk(d)
            if not d.queue:  # a walk only takes, and nobody is left who might be told of that
                d.stirred = stirred
                told += _told(d) - before
        d.concerned = None
        if not d.again:
            walk.expire(d)
        if not d.again:
            operator.load_by_itself(d)
        if not d.again:
            lifecycle.retire(d)
            swaps.tell(d)
            d.calm = not (d.stirred or d.partial) and _told(d) == told
            return
    raise AssertionError(f"the step at {d.at} does not come to rest")


def _told(d: Draft) -> int:
    return len(d.notes) + len(d.effects)


# ---------------------------------------------------------------------------- single events


def on_tick(d: Draft, _event: events.Tick) -> None:
    """Nothing but time passed, which every step looks at anyway."""


# What is seen changes nothing most of the time; then nothing follows from it.
SEEING = frozenset({events.Tick, events.GpuSample, events.ProbeResult})
LATEST = 2**63

Handler = Callable[[Draft, Any], None]

HANDLERS: Mapping[type, Handler] = {
    events.Started: lifecycle.on_started,
    events.Request: requests.on_request,
    events.Cancel: requests.on_cancel,
    events.ServeDone: requests.on_serve_done,
    events.UnloadDone: completions.on_unload_done,
    events.SwapDone: completions.on_swap_done,
    events.Unload: operator.on_unload,
    events.Load: operator.on_load,
    events.GpuSample: beliefs.on_sample,
    events.ProbeResult: beliefs.on_probe,
    events.Pin: operator.on_pin,
    events.Reconfigured: lifecycle.on_reconfigured,
    events.Tick: on_tick,
    events.Drain: lifecycle.on_drain,
    events.Resume: lifecycle.on_resume,
    events.Shutdown: lifecycle.on_shutdown,
}


# ------------------------------------------------------------------------------------ alarms


def set_alarm(d: Draft) -> None:
    """Ask to be woken when time alone will change something."""
    wake = None
    for time in _deadlines(d):
        if time > d.at and (wake is None or time < wake):
            wake = time
    if wake is not None and wake != d.wake:
        d.do(WakeAt(time=wake))
    d.wake = wake
    d.calm_until = _calm_until(d) if d.calm and d.own_planner is None else 0


def _calm_until(d: Draft) -> int:
    """Give when time alone may change something, also where nobody has to be woken for it: what
    those who wait are told depends on who has just moved.
    """
    until = LATEST if d.wake is None else d.wake
    if d.queue:
        settle_us = d.config.settle_timeout_us
        for state in d.consumers.values():
            for since in (state.moved, state.idle_since or 0):
                if d.at < since + settle_us < until:
                    until = since + settle_us
    return until


def _deadlines(d: Draft) -> list[int]:
    first = d.first_deadline()
    waiting = first is not None
    times = [] if first is None else [first]
    restless = d.restless()
    if restless:
        times += [due for _, due in operator.idle_dues(d)]
    for name in restless:
        state = d.consumers[name]
        if state.operation is not None:
            times.append(state.operation.deadline)
        if waiting and state.unload_cooldown is not None:
            times.append(state.unload_cooldown.until)
        if state.busy_seen is not None:
            times.append(state.busy_seen + 2 * d.config.probe_interval_us + 1)
    for swap in d.swaps.values():
        if swap.phase is SwapPhase.SETTLING:
            times += [time for time in (swap.settle_until, swap.sample_at) if time is not None]
    if waiting:
        for card in d.cards.values():
            times.append(card.taken + GOOD_INTERVALS * d.config.poll_interval_us + 1)
    if (restore := operator.restore_at(d)) is not None:
        times.append(restore)
    return times
