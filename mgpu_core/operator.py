"""Loads and unloads that no client asked for: an operator's, and those due by themselves."""

from collections.abc import Sequence

from mgpu_core import swaps
from mgpu_core.draft import Draft
from mgpu_core.events import Load, Pin, Unload
from mgpu_core.memory import (
    at_work,
    can_never_fit,
    is_busy,
    is_protected,
    may_be_evicted,
    stops_with,
)
from mgpu_core.ordering import is_pinned
from mgpu_core.requests import operator_id
from mgpu_core.state import ABSENT, LOADING, QUEUED, RESIDENT, UNLOADING, Operator, RequestState


def on_unload(d: Draft, event: Unload) -> None:
    names = event.consumers or tuple(
        name
        for name, consumer in d.config.consumers.items()
        if consumer.unloadable and not consumer.vram_managed and not is_pinned(d, name)
    )
    for name in names:
        because = _no_unload(d, name, names)
        if because is not None:
            d.note("Ignored", consumer=name, what="Unload", because=because)
            continue
        for request in d.waiting_for(name):
            d.reject(request, "unloaded", f"an operator unloaded {name}")
        if event.force:
            _force_out(d, name)
        elif d.consumers[name].residency is not ABSENT or name in d.swaps:
            d.update(name, leaving=True)
            d.note("Leaving", consumer=name)


def _no_unload(d: Draft, name: str, named: Sequence[str]) -> str | None:
    consumer = d.known(name)
    if consumer is None:
        return "it is not known"
    if not consumer.unloadable:
        return "there is no way to unload it"
    if any(is_protected(d, one) for one in stops_with(d, name) if one not in named):
        return "its server holds one that is pinned"
    return None


def _force_out(d: Draft, name: str) -> None:
    """Send it out at once, in the middle of whatever it does."""
    if any(at_work(d, one) for one in stops_with(d, name)):
        # Others live in the same process: nobody asked for their end.
        d.update(name, leaving=True)
        d.note("Leaving", consumer=name, beside=stops_with(d, name))
        return
    if name in d.swaps:
        swaps.abandon(d, d.swaps[name])
    if d.consumers[name].residency in {ABSENT, UNLOADING}:
        d.give_up_promise(name)
    else:
        d.start_unload(name, d.next_epoch(), because="an operator forces it")


def leave(d: Draft) -> None:
    """Send out those that an operator wants gone and that have drained."""
    for name in d.restless():
        state = d.consumers[name]  # a moment ago it may have gone with its server
        if not state.leaving or state.operation is not None or name in d.swaps:
            continue
        pinned_since = any(is_pinned(d, one) for one in stops_with(d, name))
        if state.residency is ABSENT or pinned_since:
            d.update(name, leaving=False)
            d.again = True
        elif name not in d.serving and not is_busy(d, name) and not _siblings_at_work(d, name):
            d.start_unload(name, d.next_epoch(), because="an operator wants it out")


def _siblings_at_work(d: Draft, name: str) -> bool:
    return any(at_work(d, one) or is_pinned(d, one) for one in stops_with(d, name))


def unload_idle(d: Draft) -> None:
    """Send out what was idle for as long as its configuration allows."""
    for name, due in idle_dues(d):
        if d.at < due:
            continue
        if any(at_work(d, one) for one in (name, *stops_with(d, name))):
            continue
        if may_be_evicted(d, name):
            d.start_unload(name, d.next_epoch(), because="it was idle")


def idle_dues(d: Draft) -> list[tuple[str, int]]:
    """Give who may not stay for ever, and when its idle time is over."""
    dues = []
    for name in d.restless():
        consumer = d.consumer(name)
        if consumer.idle_unload_us is None or not consumer.unloadable or consumer.vram_managed:
            continue
        state = d.consumers[name]
        if state.idle_since is None or state.residency is not RESIDENT:
            continue
        if name in d.waiting or is_pinned(d, name):
            continue
        cooled = state.unload_cooldown.until if state.unload_cooldown else 0
        dues.append((name, max(state.idle_since + consumer.idle_unload_us, cooled)))
    return dues


def on_load(d: Draft, event: Load) -> None:
    request_load(d, event.consumer, "load", only_if_free=event.only_if_free)


def request_load(d: Draft, name: str, operator: Operator, *, only_if_free: bool) -> None:
    """Queue a request without a client: it ends when the consumer is in."""
    because = _no_load(d, name)
    if because is not None:
        d.note("NotLoaded", consumer=name, because=because)
        return
    d.arrivals += 1
    d.admit(
        RequestState(
            request=operator_id(name),
            consumer=name,
            kind="load",
            priority=d.consumer(name).priority,
            arrival=d.arrivals,
            at=d.at,
            deadline=d.at + d.config.queue_timeout_us,
            phase=QUEUED,
            operator=operator,
            only_if_free=only_if_free,
        )
    )


def _no_load(d: Draft, name: str) -> str | None:
    consumer = d.known(name)
    if consumer is None or name in d.retired:
        return "it is not known"
    if d.draining or d.stopping:
        return "the broker takes no new work"
    if not consumer.loadable:
        return "only its first request can load it"
    state = d.consumers[name]
    if state.unreachable and not consumer.startable:
        return "it does not answer"
    if never := can_never_fit(d, name):
        return never
    if operator_id(name) in d.requests or state.residency is LOADING:
        return "it is being loaded already"
    if state.residency is RESIDENT and not state.leaving:
        return "it is loaded already"
    if state.load_cooldown is not None and d.at < state.load_cooldown.until:
        return "it failed to load a moment ago"
    return None


def on_pin(d: Draft, event: Pin) -> None:
    if event.consumer not in d.consumers:
        d.note("Ignored", consumer=event.consumer, what="Pin", because="it is not known")
        return
    d.update(event.consumer, pinned=event.pinned)
    d.note("Pinned" if event.pinned else "Unpinned", consumer=event.consumer)


def load_by_itself(d: Draft) -> None:
    """Bring in the preload set: once at the start, and once in each long idle time."""
    if d.draining or d.stopping:
        return
    if d.preload_due and (d.cards or d.sample_error is not None):
        # Who is only assumed to be in is asked first.
        unsure = tuple(name for name in d.preload_due if _only_assumed(d, name))
        _load_absent(d, [name for name in d.preload_due if name not in unsure], "preload")
        d.preload_due = unsure
    restore = restore_at(d)
    if restore is not None and d.at >= restore:
        d.restore_due = False
        names = [name for name, consumer in d.config.consumers.items() if consumer.preload]
        _load_absent(d, names, "restore")


def _only_assumed(d: Draft, name: str) -> bool:
    state = d.consumers[name]
    return state.residency is RESIDENT and state.last_probe is None


def _load_absent(d: Draft, names: Sequence[str], operator: Operator) -> None:
    for name in names:
        if d.consumers[name].residency is not RESIDENT:
            request_load(d, name, operator, only_if_free=True)
            d.again = True


def restore_at(d: Draft) -> int | None:
    """When the broker has been without work for long enough to restore the preload set."""
    if d.config.restore_after_us is None or not d.restore_due or d.requests or d.swaps:
        return None
    return d.last_work + d.config.restore_after_us
