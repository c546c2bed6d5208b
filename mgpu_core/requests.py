"""Events of a request: it comes, its client goes, its work ends."""

from attrs import frozen

from mgpu_core.draft import Draft
from mgpu_core.effects import Probe
from mgpu_core.events import Cancel, Request, ServeDone
from mgpu_core.memory import can_never_fit, promise_taken
from mgpu_core.ordering import Believed
from mgpu_core.state import RESIDENT, SERVING, RequestState, Source
from mgpu_core.transitions import Cause


def on_request(d: Draft, event: Request) -> None:
    """Admission: whatever can be refused is refused before a byte is answered."""
    if event.request in d.requests:
        d.note("Ignored", request=event.request, what="Request", because="its id is in use")
        return
    no = refusal(d, event.consumer, d.at)
    if no is not None:
        d.refuse(
            event.request,
            no.code,
            no.message,
            consumer=event.consumer if d.known(event.consumer) else None,
            retryable=no.retryable,
            retry_after_us=no.retry_after_us,
        )
        return
    d.arrivals += 1
    priority = event.priority
    deadline = d.at + d.config.queue_timeout_us
    d.admit(
        RequestState(
            request=event.request,
            consumer=event.consumer,
            kind=event.kind,
            priority=d.consumer(event.consumer).priority if priority is None else priority,
            arrival=d.arrivals,
            at=d.at,
            deadline=deadline if event.deadline is None else min(deadline, event.deadline),
        )
    )
    d.concerned = (event.request,)


@frozen
class Refusal:
    code: str
    message: str
    retryable: bool = True
    retry_after_us: int | None = None


def refusal(s: Believed, name: str, at: int) -> Refusal | None:
    """Say why a request for a consumer would be refused now; this decides nothing."""
    consumer = s.config.consumers.get(name)
    if consumer is None or name in s.retired:
        return Refusal("no_consumer", f"there is no consumer named {name}", retryable=False)
    if s.draining or s.stopping:
        return Refusal("shutting_down", "the broker takes no new work")
    state = s.consumers[name]
    if state.unreachable and not consumer.startable:
        why = f"{name} does not answer its health probe ({state.probe_error})"
        return Refusal("consumer_unreachable", why, retry_after_us=s.config.probe_interval_us)
    cooldown = state.load_cooldown
    if cooldown and at < cooldown.until and state.residency is not RESIDENT:
        why = f"{name} failed to load {cooldown.failures} times in a row"
        return Refusal("load_failed", why, retry_after_us=cooldown.until - at)
    operator_loads = 1 if operator_id(name) in s.requests else 0
    pending = s.waiting.get(name, 0) + s.serving.get(name, 0) - operator_loads
    if pending >= consumer.max_pending:
        why = f"{name} has {pending} requests waiting or served, which is its limit"
        return Refusal("overloaded", why, retry_after_us=s.counters.last_run_us or 1_000_000)
    if state.residency is not RESIDENT and (never := can_never_fit(s, name)):
        return Refusal("insufficient_vram", never, retryable=False)
    return None


def operator_id(consumer: str) -> str:
    """Give the id of the request without a client that brings a consumer in; one at a time."""
    return f"load:{consumer}"


def on_cancel(d: Draft, event: Cancel) -> None:
    """Take it out of wherever it waits; what is being served ends by its `ServeDone` alone."""
    request = d.requests.get(event.request)
    if request is None:
        d.note("Ignored", request=event.request, what="Cancel", because="it is not known")
    elif request.phase is SERVING:
        d.note("Ignored", request=event.request, what="Cancel", because="it is being served")
    else:
        d.drop(event.request)
        waited = d.at - request.at
        d.note("Cancelled", request=request.request, consumer=request.consumer, waited_us=waited)


def on_serve_done(d: Draft, event: ServeDone) -> None:
    request = d.requests.get(event.request)
    if request is None or request.phase is not SERVING:
        d.note("Ignored", request=event.request, what="ServeDone", because="it is not served")
        return
    d.end_serving(event.request)
    name, state = request.consumer, d.consumers[request.consumer]
    d.last_work = d.at
    ran_us = d.at - (request.granted or d.at)
    d.counters = d.counters.ran(ran_us)
    changes: dict[str, object] = {
        "touched": d.at,
        "last_done": d.at,
        "idle_since": None if name in d.serving else d.at,
    }
    if event.outcome == "ok":
        changes |= {"last_used": d.at, "uses": state.uses + 1, "credit": _credit(d, name)}
    if state.starter == event.request:
        changes["starter"] = None
        promise_taken(d, name)
        if event.outcome != "ok" and state.residency is RESIDENT:
            d.move(name, Cause.COLD_START_FAILED, Source.ASSUMED, uncertain="load")
            d.do(Probe(consumer=name))
    d.update(name, **changes)
    lost = d.consumers[name].uncertain == "load" and d.consumer(name).lazy
    if lost and event.outcome == "ok":
        d.move(name, Cause.COLD_STARTED, Source.ASSUMED)  # work that ended well shows that it is in
    nobody_waits = not any(one in d.waiting for one in (name, *d.siblings(name)))
    if name in d.serving and nobody_waits and state.starter != event.request:
        d.concerned = ()  # it works on for others: neither its slot nor its memory came free
    d.note(
        "Served",
        request=event.request,
        consumer=name,
        outcome=event.outcome,
        ran_us=ran_us,
    )


def _credit(d: Draft, name: str) -> int:
    """Frequency times the cost of a load by its size, on top of the age of the cache (gdsf)."""
    consumer, state = d.consumer(name), d.consumers[name]
    size_mib = max(1, state.measured_mib or sum(consumer.vram_mib.values()))
    return d.age + (state.uses + 1) * (state.load_us or 1_000_000) // size_mib
