"""`mgpu log state`: what the scheduler believed at a point of a log."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence

from mgpu_core.codec import decode_event, encode_state
from mgpu_core.memory import held_mib
from mgpu_core.state import Phase, State
from mgpu_core.telling import awaited_now, overtakes
from mgpu_http.commands.log_words import (
    clock,
    date_and_clock,
    duration,
    event_words,
)
from mgpu_http.commands.logs import Source, There
from mgpu_http.commands.output import DONE, document, result, table

# So many requests are shown; --json has them all.
REQUEST_ROWS = 20


def state(arguments: Namespace) -> int:
    source = Source.of(arguments)
    there = source.there(source.point(arguments.at) if arguments.at is not None else None)
    if arguments.json:
        document(encode_state(there.state))
    else:
        result("\n\n".join([headline(there), *told(there.state)]))
    return DONE


def headline(there: There) -> str:
    record, state = there.record, there.state
    event = event_words(decode_event(record.event, record.at))
    mode = "stopping" if state.stopping else "draining" if state.draining else "serving"
    counted = state.counters
    return (
        f"after event {record.seq}, {event}\n"
        f"{date_and_clock(record.at)}, run {state.run or '-'}, {mode}: {counted.jobs} jobs,"
        f" {counted.loads} loads, {counted.evictions} evictions so far"
    )


def told(state: State) -> Iterator[str]:
    """Put a state in tables: the cards, the consumers, and what there is of the rest."""
    if state.sample_error:
        yield f"the cards can't be read: {state.sample_error}"
    yield from _table(
        ("GPU", "USED MIB", "FREE MIB", "TOTAL MIB", "FOREIGN MIB", "READ"),
        [
            (gpu, card.used_mib, card.free_mib, card.total_mib, card.foreign_mib, clock(card.taken))
            for gpu, card in state.cards.items()
        ],
    )
    yield from _table(
        ("CONSUMER", "MEMORY", "SINCE", "SOURCE", "MIB", "SERVES", "WAITING", "LAST USED", "MARKS"),
        [_consumer(state, name) for name in state.consumers],
    )
    yield from _table(
        ("REQUEST", "CONSUMER", "STATE", "PRIORITY", "SO FAR", "DEADLINE IN", "OVERTAKEN", "WAITS"),
        [_request(state, name) for name in _in_order(state)[:REQUEST_ROWS]],
    )
    if (more := len(state.requests) - REQUEST_ROWS) > 0:
        yield f"and {more} requests more, which --json shows"
    yield from _table(
        ("SWAP OF", "PHASE", "FOR", "EPOCH", "TO UNLOAD", "TOLD TO GO"),
        [
            (
                swap.target,
                swap.phase.value,
                duration(state.at - swap.since),
                swap.epoch,
                " ".join(swap.victims) or None,
                " ".join(swap.evicted) or None,
            )
            for swap in state.swaps.values()
        ],
    )
    yield from _table(
        ("PROMISED TO", "MIB"),
        [(name, by_card(state, promise.mib)) for name, promise in state.promises.items()],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    if rows:
        yield table(head, rows)


def by_card(state: State, mib: Mapping[int, int]) -> str | int:
    """Give the MiB, with the card where there are several."""
    if len(state.config.gpus) == 1:
        return sum(mib.values())
    return " ".join(f"{gpu}:{amount}" for gpu, amount in mib.items())


def _consumer(state: State, name: str) -> Sequence[object]:
    consumer, configured = state.consumers[name], state.config.consumers[name]
    held = {gpu: held_mib(configured, consumer, gpu) for gpu in configured.vram_mib}
    return (
        name,
        consumer.residency.value,
        duration(state.at - consumer.moved) if consumer.moved >= 0 else None,
        consumer.source.value,
        by_card(state, held),
        state.serving.get(name),
        state.waiting.get(name),
        clock(consumer.last_used) if consumer.last_used is not None else None,
        ", ".join(_marks(state, name)),
    )


def _marks(state: State, name: str) -> Iterator[str]:
    consumer = state.consumers[name]
    if consumer.unreachable:
        yield f"unreachable ({consumer.probe_error or 'no probe succeeded'})"
    if state.config.consumers[name].pinned if consumer.pinned is None else consumer.pinned:
        yield "pinned"
    for mark in ("owed", "retired"):
        if name in getattr(state, mark):
            yield mark
    if consumer.leaving:
        yield "leaving"
    if consumer.busy_seen is not None:
        yield f"busy with others at {clock(consumer.busy_seen)}"
    if consumer.leaky_mib is not None:
        yield f"leaky, gave {consumer.leaky_mib} MiB"
    if consumer.uncertain:
        yield f"its {consumer.uncertain} failed"
    for kind in ("load", "unload"):
        cooldown = getattr(consumer, f"{kind}_cooldown")
        if cooldown is not None and cooldown.until > state.at:
            yield f"no {kind} for {duration(cooldown.until - state.at)}"


def _in_order(state: State) -> list[str]:
    """Give who is served, then who joined a swap, then the queue in its order."""
    of = {phase: [n for n, r in state.requests.items() if r.phase is phase] for phase in Phase}
    return [*of[Phase.SERVING], *of[Phase.JOINED], *state.queue]


def _request(state: State, name: str) -> Sequence[object]:
    request, why = state.requests[name], state.reasons.get(name)
    serving = request.phase is Phase.SERVING
    since = request.granted if serving and request.granted is not None else request.at
    return (
        name,
        request.consumer + (f" (operator: {request.operator})" if request.operator else ""),
        request.phase.value + (", owed" if request.owed else ""),
        request.priority,
        duration(state.at - since),
        None if serving else duration(request.deadline - state.at),
        overtakes(state, name) if name in state.overtaken else None,
        awaited_now(why, request.consumer) if why else None,
    )
