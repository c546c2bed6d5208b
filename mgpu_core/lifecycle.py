"""Events of the broker's own life: a start, a new configuration, draining, the end."""

from attrs import evolve

from mgpu_core.config import Config, Consumer, in_order
from mgpu_core.draft import Draft
from mgpu_core.effects import Probe
from mgpu_core.events import Drain, Reconfigured, Resume, Shutdown, Started
from mgpu_core.state import ABSENT, SERVING, ConsumerState, State, first_belief, initial_state


def carried_over(last: State, config: Config, at: int) -> State:
    """Give the state with which a new run begins at `at`: what outlives the last, under `config`.

    Who is no longer configured is forgotten; who is new begins as at a first start. Was the clock
    set back between the two, what lies ahead stays as far ahead as it was.
    """
    fresh = initial_state(in_order(config))
    back = max(0, last.at - at)
    began = last.at - back
    at_work = _at_work(last)
    return evolve(
        fresh,
        at=began,
        run=last.run,
        epoch=last.epoch,
        arrivals=last.arrivals,
        age=last.age,
        counters=last.counters,
        consumers={
            name: _begun(last.consumers[name], state, began if name in at_work else None, back)
            if name in last.consumers
            else state
            for name, state in fresh.consumers.items()
        },
    )


def _at_work(last: Draft | State) -> set[str]:
    """Name those whose work may go on: nobody at a service knows that the broker was away."""
    return {
        name
        for name, state in last.consumers.items()
        if name in last.serving
        or (state.busy_seen is not None and state.busy_seen > state.last_done)
    }


def _begun(
    last: ConsumerState, fresh: ConsumerState, busy_seen: int | None, back: int = 0
) -> ConsumerState:
    return evolve(last.over_a_restart(fresh, back), busy_seen=busy_seen)


def on_started(d: Draft, event: Started) -> None:
    """Forget what an earlier run had under way; keep what outlives it."""
    d.run = event.run
    d.draining = d.stopping = False
    d.wake = None
    for name in d.retired:
        d.drop_consumer(name)
    d.configure(_without(d.config, d.retired))
    d.retired = ()
    at_work = _at_work(d)
    d.drop_work()
    for name, state in d.consumers.items():
        fresh = evolve(first_belief(d.consumer(name)), idle_since=d.at)
        d.put_consumer(name, _begun(state, fresh, d.at if name in at_work else None))
    d.sample_error = None
    d.last_work = d.at
    d.restore_due = False
    d.preload_due = tuple(name for name, c in d.config.consumers.items() if c.preload)
    d.sample()
    for name in d.consumers:
        d.do(Probe(consumer=name))
    d.note("Started", run=event.run)


def on_drain(d: Draft, _event: Drain) -> None:
    d.draining = True
    d.note("Draining")


def on_resume(d: Draft, _event: Resume) -> None:
    if d.stopping:
        d.note("Ignored", what="Resume", because="the broker is shutting down")
        return
    d.draining = False
    d.note("Resumed")


def on_shutdown(d: Draft, _event: Shutdown) -> None:
    d.draining = d.stopping = True
    for name in [n for n, r in d.requests.items() if r.phase is not SERVING]:
        d.reject(name, "shutting_down", "the broker is shutting down")
    d.note("ShuttingDown")


def on_reconfigured(d: Draft, event: Reconfigured) -> None:
    """Take over a new configuration; who is no longer in it stays until nothing is left of it."""
    old, new = d.config, event.config
    kept = tuple(sorted(n for n in d.consumers if n not in new.consumers and _alive(d, n)))
    staying = {name: _under_limit_of(new, old.consumers[name]) for name in kept}
    consumers = {**new.consumers, **staying}
    d.configure(in_order(evolve(new, consumers=consumers)))
    d.retired = kept
    d.preload_due = tuple(name for name in d.preload_due if name in consumers)
    states: dict[str, ConsumerState] = {}
    for name, consumer in d.config.consumers.items():
        if name in d.consumers:
            states[name] = d.consumers[name]
        else:
            states[name] = evolve(first_belief(consumer), idle_since=d.at)
            d.do(Probe(consumer=name))
    d.consumers = states
    d.note("Reconfigured", retired=kept)


def _under_limit_of(new: Config, staying: Consumer) -> Consumer:
    """What a server may do at once is the server's: who stays there has the limit of the others."""
    limits = [
        one.server_concurrency for one in new.consumers.values() if one.server == staying.server
    ]
    return evolve(staying, server_concurrency=limits[0]) if limits else staying


def retire(d: Draft) -> None:
    """Forget those that left the configuration and have nothing left here."""
    if not d.retired:
        return
    gone = tuple(name for name in d.retired if not _alive(d, name))
    if gone:
        d.retired = tuple(name for name in d.retired if name not in gone)
        for name in gone:
            d.drop_consumer(name)
        d.preload_due = tuple(name for name in d.preload_due if name not in gone)
        d.configure(_without(d.config, gone))
        d.note("Retired", who=gone)


def _alive(d: Draft, name: str) -> bool:
    """Something of it is still here: memory, also such as no sample shows free yet, or requests."""
    state = d.consumers[name]
    holds = state.residency is not ABSENT and not d.consumer(name).vram_managed
    return (
        holds
        or state.operation is not None
        or name in d.swaps
        or name in d.promises
        or any(name in swap.victims for swap in d.swaps.values())
        or name in d.waiting
        or name in d.serving
    )


def _without(config: Config, names: tuple[str, ...]) -> Config:
    if not names:
        return config
    consumers = {n: c for n, c in config.consumers.items() if n not in names}
    return evolve(config, consumers=consumers)
