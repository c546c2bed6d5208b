"""The accounting of GPU memory: needs, gains, promises, what is free, what a planner may see.

With a good sample a card says itself what is free; without one the static budget decides: what
the operator gave, less what residents are believed to hold.
"""

from collections.abc import Hashable

from attrs import evolve

from mgpu_core.config import Consumer
from mgpu_core.draft import Draft
from mgpu_core.ordering import Believed, is_pinned
from mgpu_core.planners import Holder, View
from mgpu_core.state import ABSENT, RESIDENT, UNKNOWN, Card, ConsumerState, Promise, Source

# A sample is good for so many poll intervals.
GOOD_INTERVALS = 3


def held_mib(consumer: Consumer, state: ConsumerState, gpu: int) -> int:
    """What it holds on a card while it is resident: as measured, else as declared."""
    if consumer.vram_managed:
        return 0
    if state.measured_mib is not None and len(consumer.vram_mib) == 1:
        return state.measured_mib if gpu in consumer.vram_mib else 0
    return consumer.vram_mib.get(gpu, 0)


def need_mib(consumer: Consumer, state: ConsumerState) -> dict[int, int]:
    """What must be free on each card before it loads; empty where nobody knows or cares."""
    if consumer.vram_managed:
        return {}
    needs = {}
    for gpu, declared in consumer.vram_mib.items():
        steady = held_mib(consumer, state, gpu) if consumer.vram_auto else declared
        need = max(steady, consumer.vram_load_mib)
        if need:
            needs[gpu] = need
    return needs


def good_card(d: Draft, gpu: int) -> Card | None:
    card = d.cards.get(gpu)
    if card is None or d.at - card.taken > GOOD_INTERVALS * d.config.poll_interval_us:
        return None
    return card


def gain_mib(d: Draft, name: str, gpu: int, *, by_driver: bool = False) -> int:
    """What an unload of it should give back on a card; `by_driver`: of a leaky one, its stop."""
    consumer, state = d.consumer(name), d.consumers[name]
    if gpu not in consumer.vram_mib:
        return 0
    if state.residency is ABSENT and name not in d.swaps:
        return 0
    if name in d.promises and (kept := kept_mib(d, name, gpu)):
        return kept
    if state.residency is UNKNOWN and state.uncertain != "unload" and good_card(d, gpu) is not None:
        return 0  # the sample counts what a failed load left behind, if anything
    full = _clean_gain_mib(consumer, state, gpu)
    if state.leaky_mib is None:
        return full
    if by_driver and stops_a_leak(d, name):
        return max(0, full - state.leaky_mib)
    return state.leaky_mib


def kept_mib(d: Draft, name: str, gpu: int) -> int:
    """What is set aside on a card for the first request of a lazy one that was brought up without
    any: it holds none of that yet, and if it goes, the promise goes with it.
    """
    promise = d.promises.get(name)
    if promise is None or promise.granted is not None or promise.done is not None:
        return 0
    waits = d.consumers[name].residency is RESIDENT
    return promise.mib.get(gpu, 0) if waits and good_card(d, gpu) else 0


def stops_a_leak(d: Draft, name: str) -> bool:
    """Its routes gave back too little, but a driver can end its process."""
    return d.consumers[name].leaky_mib is not None and d.consumer(name).driver != "none"


def full_gain_mib(d: Draft, name: str) -> int:
    """What an unload of it should give back on all cards, if it does not leak."""
    consumer, state = d.consumer(name), d.consumers[name]
    return sum(_clean_gain_mib(consumer, state, gpu) for gpu in consumer.vram_mib)


def _clean_gain_mib(consumer: Consumer, state: ConsumerState, gpu: int) -> int:
    return max(0, held_mib(consumer, state, gpu) - consumer.vram_residue_mib)


def free_mib(d: Draft, target: str, gpu: int) -> int | None:
    """What the target could have on a card now; None: no limit is known."""
    card = good_card(d, gpu)
    if card is None:
        return _static_free_mib(d, target, gpu)
    promised = 0
    for name, promise in d.promises.items():
        if name != target:
            promised += promise.mib.get(gpu, 0)
    return card.free_mib - promised + _still_held_mib(d, target, gpu)


def _still_held_mib(d: Draft, target: str, gpu: int) -> int:
    """What the target itself holds of a card while it is not in, as far as the card shows it: all
    that it held where its unload failed, else what its unload leaves behind.
    """
    consumer, state, card = d.consumer(target), d.consumers[target], good_card(d, gpu)
    if card is None or gpu not in consumer.vram_mib:
        return 0
    if state.residency is UNKNOWN and state.uncertain == "unload":
        own = held_mib(consumer, state, gpu)
    elif state.residency is ABSENT and state.source is Source.COMMAND:
        # Its process is still there: one that a driver has stopped has left nothing.
        own = consumer.vram_residue_mib if d.goes_by_route(target) else 0
    else:
        return 0
    others = sum(
        held_mib(d.consumer(name), d.consumers[name], gpu)
        for name in d.present()
        if name != target and d.consumers[name].residency is not ABSENT
    )
    return max(0, min(own, card.used_mib - others))


def fits_as_believed(d: Draft, target: str) -> bool:
    """Is there room by what everybody is believed to hold, whatever a card showed before?"""
    needs = need_mib(d.consumer(target), d.consumers[target])
    free_mib = {gpu: _static_free_mib(d, target, gpu) for gpu in needs}
    return all(
        free is None or free >= needs[gpu] + cushion_mib(d, gpu) for gpu, free in free_mib.items()
    )


def _static_free_mib(d: Draft, target: str, gpu: int) -> int | None:
    total = total_mib(d, gpu)
    if total is None:
        return None
    beside = d.consumer(target).can_coexist_with
    held = sum(
        static_mib(d, name, gpu) for name in d.present() if name != target and name not in beside
    )
    settings, card = d.config.gpus.get(gpu), d.cards.get(gpu)
    reserved = settings.reserved_mib if settings else 0
    return total - reserved - held - (card.foreign_mib if card else 0)


def static_mib(d: Draft, name: str, gpu: int) -> int:
    """What a consumer counts in the static budget: once, by its promise or as a resident."""
    state, promise = d.consumers[name], d.promises.get(name)
    ahead = promise is not None and promise.done is None
    if promise is not None and ahead and state.residency is not RESIDENT:
        return promise.mib.get(gpu, 0)
    if state.residency is ABSENT:
        return 0
    return held_mib(d.consumer(name), state, gpu)


def total_mib(s: Believed, gpu: int) -> int | None:
    settings, card = s.config.gpus.get(gpu), s.cards.get(gpu)
    if settings is not None and settings.total_mib is not None:
        return settings.total_mib
    return None if card is None else card.total_mib


def shortage(d: Draft, target: str) -> dict[str, int]:
    """Give what the target needs and could have on the card that lacks most; where that is known.

    `need_mib` and `cushion_mib` have to be free, `free_mib` is.
    """
    rows = [
        {"gpu": gpu, "need_mib": need, "cushion_mib": cushion_mib(d, gpu), "free_mib": free}
        for gpu, need in need_mib(d.consumer(target), d.consumers[target]).items()
        if (free := free_mib(d, target, gpu)) is not None
    ]
    return max(rows, key=lambda row: row["need_mib"] - row["free_mib"], default={})


def cushion_mib(s: Believed, gpu: int) -> int:
    settings = s.config.gpus.get(gpu)
    return settings.cushion_mib if settings else 0


def can_never_fit(s: Believed, name: str) -> str | None:
    """Say why the consumer can never be brought in as things are configured and pinned."""
    consumer = s.config.consumers[name]
    for gpu, need in need_mib(consumer, s.consumers[name]).items():
        total = total_mib(s, gpu)
        if total is None:
            continue
        settings = s.config.gpus.get(gpu)
        reserved = settings.reserved_mib if settings else 0
        pinned = [
            other
            for other, state in s.consumers.items()
            if other != name
            and state.residency is RESIDENT
            and is_pinned(s, other)
            and other not in consumer.can_coexist_with
        ]
        room = (
            total
            - reserved
            - sum(held_mib(s.config.consumers[p], s.consumers[p], gpu) for p in pinned)
        )
        if need + cushion_mib(s, gpu) > room:
            beside = f" beside the pinned {', '.join(pinned)}" if pinned else ""
            return (
                f"{name} needs {need} MiB and a cushion of {cushion_mib(s, gpu)} MiB on GPU {gpu}, "
                f"where {room} MiB can be had{beside}"
            )
    return None


# ---------------------------------------------------------------------------- what a planner sees


def is_busy(d: Draft, name: str) -> bool:
    """It works for somebody past the broker, by a probe taken after its last work for us."""
    state = d.consumers[name]
    if state.busy_seen is None or state.busy_seen <= state.last_done:
        return False
    return d.at <= state.busy_seen + 2 * d.config.probe_interval_us


def at_work(d: Draft, name: str) -> bool:
    """It may not go now: it serves, is busy, moves already, or is owed to somebody."""
    return (
        name in d.serving
        or name in d.owed
        or name in d.swaps
        or d.consumers[name].operation is not None
        or is_busy(d, name)
    )


def cooling_down(d: Draft, name: str) -> bool:
    """It refused to be unloaded a moment ago."""
    cooldown = d.consumers[name].unload_cooldown
    return cooldown is not None and d.at < cooldown.until


def stops_with(d: Draft, name: str) -> tuple[str, ...]:
    """Who shares its fate when it is unloaded: all of its server, where only a stop helps."""
    return () if d.goes_by_route(name) else d.siblings(name)


def may_be_evicted(d: Draft, name: str) -> bool:
    """Nothing forbids it, for itself or for those who would go with it."""
    if not d.consumer(name).unloadable or cooling_down(d, name) or is_protected(d, name):
        return False
    stopped = stops_with(d, name)
    return not (stopped and any(is_protected(d, one) for one in stopped))


def is_protected(d: Draft, name: str) -> bool:
    """Only an operator who names it may send it out."""
    return d.consumer(name).vram_managed or is_pinned(d, name)


def alike(d: Draft, name: str) -> Hashable:
    """Give a key that all consumers share who are the same to the accounting of memory."""
    consumer, state = d.consumer(name), d.consumers[name]
    holds_none = state.residency is ABSENT
    if not holds_none or consumer.vram_auto or name in d.promises or name in d.swaps:
        return name
    return consumer.footprint


def fits_now(d: Draft, target: str) -> bool:
    """Is there room for it, with nobody going?"""
    return all(
        (free := free_mib(d, target, gpu)) is None or free >= wanted
        for gpu, wanted in _wanted_mib(d, target).items()
    )


def _wanted_mib(d: Draft, target: str) -> dict[int, int]:
    """What it needs on each card, with the cushion."""
    needs = need_mib(d.consumer(target), d.consumers[target])
    return {gpu: need + cushion_mib(d, gpu) for gpu, need in needs.items()}


def view_for(d: Draft, target: str, *, max_evictions: int, by_driver: bool = False) -> View:
    """Make what a planner may know for one target; `by_driver`: leaky ones are stopped."""
    wanted = _wanted_mib(d, target)
    return View(
        running=d.remember("running", lambda: _running(d)),
        holders=d.remember(("holders", by_driver), lambda: _holders(d, by_driver=by_driver)),
        resident=d.consumers[target].residency is RESIDENT,
        need_mib=wanted,
        free_mib={gpu: free_mib(d, target, gpu) for gpu in wanted},
        protected=d.consumer(target).can_coexist_with,
        max_evictions=max_evictions,
    )


def _running(d: Draft) -> tuple[str, ...]:
    return tuple(
        name
        for name in d.present()
        if name in d.swaps or d.consumers[name].residency is not UNKNOWN
    )


def _holders(d: Draft, *, by_driver: bool) -> dict[str, Holder]:
    return {name: _holder(d, name, by_driver=by_driver) for name in d.present()}


def _holder(d: Draft, name: str, *, by_driver: bool) -> Holder:
    consumer, state = d.consumer(name), d.consumers[name]
    stopped = stops_with(d, name)
    gains = {}
    for gpu in consumer.vram_mib:
        gains[gpu] = gain_mib(d, name, gpu, by_driver=by_driver)
    return Holder(
        name=name,
        residency=state.residency,
        gain_mib=gains,
        need_mib=need_mib(consumer, state),
        measured_mib=state.measured_mib,
        last_used=state.last_used,
        uses=state.uses,
        credit=state.credit,
        load_us=state.load_us,
        serving=d.serving.get(name, 0),
        busy=is_busy(d, name),
        owed=name in d.owed,
        pinned=is_pinned(d, name),
        stops_with=stopped,
        evictable=may_be_evicted(d, name),
        idle=not at_work(d, name) and not (stopped and any(at_work(d, one) for one in stopped)),
    )


# --------------------------------------------------------------------------------------- promises


def promise_for(d: Draft, target: str) -> None:
    """Set aside what a swap will take; a target that is in already takes nothing."""
    consumer, state = d.consumer(target), d.consumers[target]
    needs = need_mib(consumer, state)
    if state.residency is ABSENT:  # what it left behind is taken already
        needs = {gpu: max(0, n - _still_held_mib(d, target, gpu)) for gpu, n in needs.items()}
    if consumer.vram_auto and not needs:
        needs = dict.fromkeys(consumer.vram_mib, 0)  # nothing is known, but it will be measured
    if needs and state.residency is not RESIDENT:
        _lose_baselines(d, set(needs))
        d.put_promise(target, Promise(mib=needs))


def _lose_baselines(d: Draft, gpus: set[int]) -> None:
    """From now on, growth on these cards may be somebody else's."""
    for name, promise in list(d.promises.items()):
        if promise.granted is not None and gpus & promise.used_before_mib.keys():
            d.put_promise(name, evolve(promise, used_before_mib={}))


def promise_loading(d: Draft, name: str) -> None:
    """The load begins: what is in use now is not its own."""
    promise = d.promises.get(name)
    if promise is not None:
        d.put_promise(name, evolve(promise, began=d.at, used_before_mib=_used_mib(d, promise)))


def _used_mib(d: Draft, promise: Promise) -> dict[int, int]:
    return {gpu: card.used_mib for gpu in promise.mib if (card := good_card(d, gpu))}


def promise_taken(d: Draft, name: str) -> None:
    """The load is over: the next sample shows the memory, where there are samples."""
    promise = d.promises.get(name)
    if promise is None:
        return
    if any(gpu in d.cards for gpu in promise.mib):
        d.put_promise(name, evolve(promise, done=d.at))
    else:
        d.give_up_promise(name)


def promise_granted(d: Draft, name: str) -> None:
    """A lazy consumer takes its memory from now on, at its own pace."""
    promise = d.promises.get(name)
    if promise is not None:
        others = {gpu for other, p in d.promises.items() if other != name for gpu in p.mib}
        used = {gpu: mib for gpu, mib in _used_mib(d, promise).items() if gpu not in others}
        d.put_promise(name, evolve(promise, granted=d.at, began=d.at, used_before_mib=used))
