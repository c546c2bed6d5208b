"""GET /v1/status: what the scheduler believes, in the words of the contract.

Times are microseconds since the Unix epoch, as in the event log; null: never, or not known.
"""

from importlib.metadata import version
from typing import Any

from mgpu_core.memory import held_mib
from mgpu_core.ordering import is_pinned, walk_order
from mgpu_core.state import ConsumerState, Phase, RequestState, Residency, State
from mgpu_core.why import Waits, encode_explanation, summary
from mgpu_effects.footprints import Footprints
from mgpu_effects.gpu_processes import Holders

VERSION = version("mgpu")
FOREIGN_SHOWN = 32  # those that hold the most


def snapshot(
    state: State, waits: Waits, now: int, holders: Holders | None, footprints: Footprints
) -> dict[str, Any]:
    """Give the whole answer of GET /v1/status; `now` in microseconds."""
    requests = request_rows(state, waits, now)
    return {
        "version": VERSION,
        "at": now,
        "run": state.run,
        "draining": state.draining,
        "gpu": [
            {
                **row,
                "holders": _holders(state, row["index"], footprints),
                "foreign": _foreign(row["index"], holders),
            }
            for row in gpu_rows(state)
        ],
        "consumers": {
            name: {
                **_consumer_row(state, name, consumer),
                "memory": _memory(state, name, footprints),
            }
            for name, consumer in state.consumers.items()
        },
        "scheduler": _scheduler_row(state),
        "requests": requests,
    }


def gpu_rows(state: State) -> list[dict[str, Any]]:
    rows = []
    for index, settings in state.config.gpus.items():
        card = state.cards.get(index)
        rows.append(
            {
                "index": index,
                "used_mib": card and card.used_mib,
                "free_mib": card and card.free_mib,
                "total_mib": card.total_mib if card else settings.total_mib,
                "at": card and card.taken,
                "error": state.sample_error,
            }
        )
    return rows


def _holders(state: State, card: int, footprints: Footprints) -> list[dict[str, Any]]:
    """List the consumers that hold memory of a card: as measured, else as believed."""
    rows = []
    for name, believed in state.consumers.items():
        consumer = state.config.consumers[name]
        if card not in consumer.vram_mib:
            continue
        mib = measured_mib = footprints.held_mib(name, card)
        if mib is None and believed.residency is Residency.RESIDENT:
            mib = held_mib(consumer, believed, card)
        if mib:
            rows.append({"consumer": name, "mib": mib, "measured": measured_mib is not None})
    return rows


def _foreign(card: int, holders: Holders | None) -> list[dict[str, Any]] | None:
    """List the processes that hold memory of a card and are no consumer's; None: not known."""
    if holders is None or holders.error is not None:
        return None
    strangers = holders.foreign(card)[:FOREIGN_SHOWN]
    return [{"pid": each.pid, "name": each.name, "mib": each.mib} for each in strangers]


def _consumer_row(state: State, name: str, believed: ConsumerState) -> dict[str, Any]:
    loaded = believed.residency is Residency.RESIDENT
    cooldowns = [c.until for c in (believed.load_cooldown, believed.unload_cooldown) if c]
    return {
        "healthy": believed.healthy,
        "last_probe": believed.last_probe,
        "error": believed.probe_error,
        "loaded": loaded,
        "residency": believed.residency.value,
        "residency_source": believed.source.value,
        "gpu_resident_mib": resident_mib(state, name) if loaded else 0,
        "active": state.serving.get(name, 0),
        "waiting": state.waiting.get(name, 0),
        "total_requests": believed.total_requests,
        "last_used": believed.last_used,
        "owed": name in state.owed,
        "leaky": believed.leaky_mib is not None,
        "cooldown_until": max((until for until in cooldowns if until > state.at), default=None),
        "pinned": is_pinned(state, name),
    }


def _memory(state: State, name: str, footprints: Footprints) -> dict[str, Any]:
    """Give what was declared beside what was measured, on all its cards; null: not known.

    Suggested is what to declare as `vram_resident_mib`, which is for a single card.
    """
    consumer, believed, seen = state.config.consumers[name], state.consumers[name], footprints[name]
    tracked = len(consumer.vram_mib) == 1 and not consumer.vram_managed
    steady_mib = believed.measured_mib if seen.steady_mib is None else seen.steady_mib
    return {
        "declared_mib": None if consumer.vram_auto else sum(consumer.vram_mib.values()),
        "api_mib": footprints.said_mib(name),
        "held_mib": footprints.held_mib(name),
        "measured": {
            "residue_mib": seen.residue_mib,
            "steady_mib": seen.steady_mib,
            "load_peak_mib": seen.load_peak_mib,
            "work_peak_mib": seen.work_peak_mib,
        },
        "load_s": _s(believed.load_us),
        "unload_s": _s(seen.unload_us),
        "suggested_mib": steady_mib if tracked else None,
    }


def resident_mib(state: State, name: str) -> int:
    """What it holds on all cards, as measured, else as declared."""
    consumer = state.config.consumers[name]
    return sum(held_mib(consumer, state.consumers[name], gpu) for gpu in consumer.vram_mib)


def _scheduler_row(state: State) -> dict[str, Any]:
    counters = state.counters
    waiting = [r for r in state.requests.values() if r.phase is not Phase.SERVING]
    return {
        "queue_depth": len(waiting),
        "in_flight": sum(state.serving.values()),
        "total_jobs": counters.jobs,
        "last_wait_ms": _ms(counters.last_wait_us),
        "last_run_ms": _ms(counters.last_run_us),
        "evictions": counters.evictions,
        "loads": counters.loads,
        "oldest_queued": min((request.at for request in waiting), default=None),
    }


def explained(state: State, waits: Waits, request: str, now: int) -> dict[str, Any] | None:
    """Give the answer of GET /v1/requests/{id}: its row, and its whole wait; None: unknown."""
    told = waits.explained(request, now)
    if told is None:
        return None
    rows = (row for row in request_rows(state, waits, now) if row["id"] == request)
    row = next(rows, None) or {
        "id": request,
        "consumer": told.consumer,
        "kind": told.kind,
        "state": "ended",
        "position": None,
        "promoted": told.promoted,
        "waited_ms": told.waited_us // 1000,
        "granted": None,
        "why": None,
    }
    return {**row, **encode_explanation(told), "summary": summary(told)}


def describe(state: State, waits: Waits, request: str) -> str:
    """Say in one line where a request stands."""
    known = state.requests.get(request)
    if known is None or known.phase is Phase.SERVING:
        return "being served"
    promoted, others = walk_order(state)
    queue = [*promoted, *others]
    place = f"position {queue.index(request) + 1} of {len(queue)}" if request in queue else "next"
    reason = waits.reason(request)
    return f"{place}: waits {reason['text']}" if reason else place


def request_rows(state: State, waits: Waits, now: int) -> list[dict[str, Any]]:
    """Give a row for each admitted request: those served, those joined to a swap, the queue."""
    promoted, others = walk_order(state)
    places = {name: place for place, name in enumerate([*promoted, *others], start=1)}
    rows = [
        {
            "id": name,
            "consumer": request.consumer,
            "kind": request.kind,
            "state": request.phase.value,
            "position": places.get(name),
            "promoted": name in promoted,
            "waited_ms": _waited_ms(request, now),
            "granted": request.granted,
            "why": waits.reason(name),
        }
        for name, request in state.requests.items()
    ]
    phases = list(reversed(Phase))
    return sorted(rows, key=lambda r: (phases.index(Phase(r["state"])), r["position"] or 0))


def _waited_ms(request: RequestState, now: int) -> int:
    until = now if request.granted is None else request.granted
    return max(0, until - request.at) // 1000


def _s(us: int | None) -> float | None:
    return None if us is None else round(us / 1_000_000, 3)


def _ms(us: int | None) -> int | None:
    return None if us is None else us // 1000
