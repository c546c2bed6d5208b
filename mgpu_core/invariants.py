"""What must hold of every state, whatever happened: checked by tests, by fuzzing, by replays."""

from collections import Counter
from collections.abc import Iterator

from mgpu_core.state import (
    JOINED,
    LOADING,
    QUEUED,
    RESIDENT,
    SERVING,
    UNKNOWN,
    UNLOADING,
    State,
    SwapPhase,
)


def violations(state: State) -> tuple[str, ...]:
    """Give every broken invariant in words; empty where the state is sound."""
    return tuple(
        text
        for check in (_counts, _queue, _operations, _swaps, _promises, _names)
        for text in check(state)
    )


def _counts(state: State) -> Iterator[str]:
    serving: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    owed: Counter[str] = Counter()
    for request in state.requests.values():
        (serving if request.phase is SERVING else waiting)[request.consumer] += 1
        owed[request.consumer] += request.owed
        if request.owed and request.phase is not QUEUED:
            yield f"{request.request} is owed but {request.phase}"
    for name, kept, counted in (
        ("serving", state.serving, serving),
        ("waiting", state.waiting, waiting),
        ("owed", state.owed, +owed),
    ):
        if dict(kept) != dict(counted):
            yield f"{name} is {dict(kept)}, but the requests say {dict(counted)}"


def _queue(state: State) -> Iterator[str]:
    queued = {n for n, r in state.requests.items() if r.phase is QUEUED}
    if set(state.queue) != queued or len(state.queue) != len(queued):
        yield f"the queue holds {state.queue}, queued are {sorted(queued)}"
        return
    places = [(-state.requests[n].priority, state.requests[n].arrival) for n in state.queue]
    if places != sorted(places):
        yield "the queue is out of order"
    waiting = {n for n, r in state.requests.items() if r.phase is not SERVING}
    if set(state.overtaken) != waiting or set(state.overtaken_high) != waiting:
        yield "overtakes are counted for others than those who wait"
    if not set(state.reasons) <= waiting:
        yield "reasons are kept for requests that do not wait"


def _operations(state: State) -> Iterator[str]:
    moving = {LOADING: "load", UNLOADING: "unload"}
    for name, consumer in state.consumers.items():
        expected = moving.get(consumer.residency)
        kind = consumer.operation.kind if consumer.operation else None
        if kind != expected:
            yield f"{name} is {consumer.residency} with operation {kind}"
        loads_after = consumer.residency is LOADING and consumer.uncertain == "unload"
        if consumer.uncertain and consumer.residency is not UNKNOWN and not loads_after:
            yield f"{name} is {consumer.residency}, yet uncertain after a failed load or unload"
        if consumer.cleared and name not in state.waiting:
            yield f"{name} is cleared for a cold start that nobody waits for"


def _swaps(state: State) -> Iterator[str]:
    for name, swap in state.swaps.items():
        operation = state.consumers[name].operation
        loading = operation is not None and operation.kind == "load"
        if (swap.phase is SwapPhase.LOADING) != loading:
            residency = state.consumers[name].residency
            yield f"the swap of {name} is {swap.phase}, its target {residency}"
        for other in state.swaps.values():
            if other.target == name:
                continue
            if name in other.victims or not set(swap.victims).isdisjoint(other.victims):
                yield f"the swaps of {name} and {other.target} collide"
    for name, consumer in state.consumers.items():
        if consumer.operation and consumer.operation.kind == "load" and name not in state.swaps:
            yield f"{name} loads without a swap"
    for request in state.requests.values():
        if request.phase is JOINED and request.consumer not in state.swaps:
            yield f"{request.request} is joined to no swap"


def _promises(state: State) -> Iterator[str]:
    for name, promise in state.promises.items():
        consumer = state.consumers[name]
        held = (
            name in state.swaps
            or promise.done is not None  # until the next sample
            or consumer.cleared
            or consumer.residency in {RESIDENT, UNLOADING}
        )
        if not held:
            yield f"{promise.mib} MiB are promised to {name}, which is {consumer.residency}"


def _names(state: State) -> Iterator[str]:
    if set(state.consumers) != set(state.config.consumers):
        yield "beliefs are kept for others than the configured consumers"
    for name in {r.consumer for r in state.requests.values()} - set(state.consumers):
        yield f"requests wait for {name}, which is not known"
