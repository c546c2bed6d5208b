"""The scheduling pass: what every waiting request may do now, in the order of the queue."""

from attrs import evolve, frozen

from mgpu_core import swaps
from mgpu_core.config import Consumer
from mgpu_core.draft import Draft
from mgpu_core.memory import (
    alike,
    at_work,
    cooling_down,
    cushion_mib,
    free_mib,
    gain_mib,
    good_card,
    held_mib,
    is_busy,
    kept_mib,
    may_be_evicted,
    need_mib,
    promise_granted,
    shortage,
    stops_with,
)
from mgpu_core.notes import Reason, Why
from mgpu_core.ordering import walk_order
from mgpu_core.state import ABSENT, RESIDENT, SERVING, UNKNOWN, RequestState, Source
from mgpu_core.telling import awaited_now
from mgpu_core.transitions import Cause

# What no holding back of others can end: who waits for it holds nobody back.
BEYOND_HELP = frozenset({Why.UNFIT, Why.COOLDOWN, Why.VICTIM_BUSY})
# What is waited for is memory, so it is told how much is missing.
FOR_MEMORY = BEYOND_HELP | {Why.COLLISION, Why.VICTIM_AT_WORK}


@frozen
class Fence:
    """A promoted request that still waits, and what it needs that others must not take."""

    request: str
    consumer: str
    needs_slot: bool
    needs_memory: bool

    @property
    def reason(self) -> Reason:
        return Reason(why=Why.PROMOTED_AHEAD, who=(self.request,))


def walk(d: Draft) -> None:
    """Look at every queued request once; what can move on does, what can't learns why.

    A request of a consumer whose earlier one had to stay need not be looked at again: nothing in
    a walk comes free, it is only taken. Whatever does free something asks for another walk. Nor
    need anybody be looked at whom the event does not concern: who could not move on before it
    can't now, unless time has passed that somebody waited for, or a planner of the user's own,
    of whom nothing is known, answers otherwise.
    """
    fences: list[Fence] = []
    stuck: dict[str, Reason] = {}
    promoted, others = walk_order(d)
    on_time = d.wake is None or d.at < d.wake
    as_before = on_time and d.own_planner is None and not promoted and not d.again
    if d.concerned is not None and as_before:
        d.partial = d.concerned != others
        others = d.concerned
    for name in promoted:
        reason = _look(d, name, fences, stuck)
        if d.again:
            return
        if reason is not None and reason.why not in BEYOND_HELP:
            fences.append(_fence(d, d.requests[name]))
    for name in tuple(others):
        reason = stuck.get(d.requests[name].consumer)
        if reason is not None and d.reasons.get(name) is reason:
            continue  # it waits with others of its consumer, and knows why
        _look(d, name, fences, stuck)
        if d.again:
            return


def _look(d: Draft, name: str, fences: list[Fence], stuck: dict[str, Reason]) -> Reason | None:
    """Let one request move on, or note why it can't; `stuck` says so of whole consumers."""
    request = d.requests[name]
    reason = stuck.get(request.consumer)
    if reason is None or (request.owed and reason.why is Why.PROMOTED_AHEAD):
        reason = _attend(d, request, fences)
        if reason is None:
            return None
    if reason.why in FOR_MEMORY and not reason.numbers and d.reasons.get(name) != reason:
        reason = evolve(reason, numbers=shortage(d, request.consumer))
    stuck[request.consumer] = kept = d.why(name, reason)
    return kept


def _attend(d: Draft, request: RequestState, fences: list[Fence]) -> Reason | None:
    """Decide on one request: the tree of core.md section 3. None: it moved on; else why not."""
    name = request.consumer
    consumer, state = d.consumer(name), d.consumers[name]
    ahead = _held_back(d, consumer, fences) if fences and not request.owed else None
    if state.leaving:
        return Reason(why=Why.LEAVING)
    # 2. A swap to the same consumer is under way: join it.
    if name in d.swaps:
        if ahead:
            return ahead
        d.join(request.request)
        d.why(request.request, swaps.stage(d, d.swaps[name]))
        return None
    if state.operation is not None or _server_stops(d, consumer):
        return Reason(why=Why.UNLOADING)
    # 3. It is in, or may be started, and nothing has to go for it: serve.
    victims = () if state.cleared else swaps.plan(d, name)
    if victims and may_serve(d, name) and all(_is_out(d, victim) for victim in victims):
        victims = ()
    if victims == () and may_serve(d, name):
        if request.operator is not None:
            d.brought_in(request.request)
            return None
        reason = _wanted_elsewhere(d, name) or no_room(d, consumer) or ahead
        if reason is None and state.cleared and swaps.room_is_gone(d, name):
            swaps.give_up_cold_start(d, name)
        elif reason is None:
            grant(d, request.request)
        return reason
    if not request.owed:
        ahead = ahead or next((f.reason for f in fences if f.consumer in (victims or ())), None)
    return _bring_in(d, request, victims, ahead)


def _server_stops(d: Draft, consumer: Consumer) -> bool:
    """The process that it would be loaded into is on its way out with a sibling."""
    if not d.restless():
        return False
    return consumer.server in d.remember("stopping servers", lambda: _stopping_servers(d))


def _stopping_servers(d: Draft) -> frozenset[str]:
    return frozenset(
        d.consumer(name).server
        for name in d.restless()
        if (operation := d.consumers[name].operation) is not None
        and operation.kind == "unload"
        and operation.how == "driver"
    )


def _is_out(d: Draft, name: str) -> bool:
    """A victim that has gone already, and is not on its way in."""
    state = d.consumers.get(name)
    return state is None or (state.residency is ABSENT and name not in d.swaps)


def _bring_in(
    d: Draft, request: RequestState, victims: tuple[str, ...] | None, ahead: Reason | None
) -> Reason | None:
    """Start the swap that a request needs, or say why not yet."""
    name = request.consumer
    if request.only_if_free and victims != ():
        d.drop(request.request)
        d.note(
            "NotLoaded",
            request=request.request,
            consumer=name,
            because="there is no free memory for it",
        )
        return None
    if victims is None:
        missing = d.remember(("no set", alike(d, name)), lambda: _no_set(d, name))
        if missing.why is Why.UNFIT and (told := _told_to_let_go(d, name)):
            return told
        if missing.why is not Why.UNFIT or d.config.when_unfit == "wait":
            return missing
        if d.config.when_unfit == "reject":
            d.reject(request.request, "insufficient_vram", unfit_message(name, missing))
            return None
        d.note("Admitted", consumer=name, because="when_unfit", numbers=missing.numbers)
        victims = ()
    # 4. and 5. Its swap would collide with another, or a victim can't go yet.
    reason = swaps.in_the_way(d, name, victims) or _no_overlap(d, d.consumer(name)) or ahead
    if reason is not None:
        return reason
    # 6. Start it. The request joins before the swap moves on.
    swaps.start(d, name, victims, restore=request.operator in {"preload", "restore"})
    d.join(request.request)
    d.why(request.request, swaps.stage(d, d.swaps[name]))
    swaps.advance_all(d)
    return None


def _told_to_let_go(d: Draft, target: str) -> Reason | None:
    """No set would do, but something that nobody counts on may be in the way: told to go, it
    surely is not. The target itself comes first; each is told once.
    """
    if _may_hold_some(d, target) and may_be_evicted(d, target):
        if working := _working(d, target):
            return swaps.victims_at_work(d, working)
        d.start_unload(target, d.next_epoch(), because="what it may hold is in its own way")
        return Reason(why=Why.UNLOADING)
    consumer = d.consumer(target)
    for name in sorted(d.config.sharing[target] - {target, *consumer.can_coexist_with}):
        if _keeps_some(d, name):
            d.start_unload(name, d.next_epoch(), because="what it may hold is in the way")
            return swaps.victims_at_work(d, (name,))
    return None


def _may_hold_some(d: Draft, name: str) -> bool:
    """A lazy one that was perhaps in use before the broker started, and nobody has seen it empty;
    or one whose load or first request failed, and may have left something.
    """
    state = d.consumers[name]
    unseen = state.residency is ABSENT and state.source is Source.ASSUMED
    failed = state.residency is UNKNOWN and state.uncertain == "load"
    return name not in d.swaps and ((unseen and d.consumer(name).lazy) or failed)


def _keeps_some(d: Draft, name: str) -> bool:
    """It has been so for some time, at least since the start, and nobody has to do with it."""
    state = d.consumers[name]
    since = max(state.moved, state.idle_since or 0)
    return (
        (_may_hold_some(d, name) or _is_in_for_good(d, name))
        and since <= d.at - d.config.settle_timeout_us
        and may_be_evicted(d, name)
        and not any(at_work(d, one) for one in (name, *stops_with(d, name)))
    )


def _is_in_for_good(d: Draft, name: str) -> bool:
    """Nobody is unloaded who gave nothing the last time. But that may have had a passing reason."""
    state = d.consumers[name]
    leaky = state.leaky_mib is not None and d.consumer(name).driver == "none"
    return leaky and state.residency is RESIDENT and name not in d.swaps


def _working(d: Draft, name: str) -> tuple[str, ...]:
    """Who would have to stop work if it were unloaded: itself, or others of its server."""
    itself = (name,) if name in d.serving or is_busy(d, name) else ()
    return itself + tuple(one for one in stops_with(d, name) if at_work(d, one))


def may_serve(d: Draft, name: str) -> bool:
    return d.consumers[name].residency is RESIDENT or d.consumers[name].cleared


def grant(d: Draft, request: str) -> None:
    """Serve a request; the first of a lazy consumer is what takes its memory."""
    name = d.requests[request].consumer
    state, promise = d.consumers[name], d.promises.get(name)
    untouched = promise is not None and promise.granted is None
    if state.cleared or (d.consumer(name).lazy and untouched):
        promise_granted(d, name)
        d.update(name, starter=request, cleared=False, leaky_mib=None)
        if state.residency is not RESIDENT:
            d.move(name, Cause.COLD_STARTED, Source.ASSUMED)
    d.grant(request)


def no_room(d: Draft, consumer: Consumer) -> Reason | None:
    """Say which limit keeps one more request of it from being served now."""
    serving = d.serving.get(consumer.name, 0)
    if serving >= consumer.max_concurrency:
        return Reason(why=Why.CONSUMER_FULL, who=(consumer.name,))
    if consumer.server_concurrency is not None:
        others = {one: d.serving[one] for one in d.siblings(consumer.name) if one in d.serving}
        if serving + sum(others.values()) >= consumer.server_concurrency:
            return Reason(why=Why.CONSUMER_FULL, who=tuple(sorted(others)))
    if not consumer.gpu_slot or serving:
        return None
    for gpu in consumer.vram_mib:
        settings = d.config.gpus.get(gpu)
        if settings is None or settings.max_parallel is None:
            continue
        holders = slot_holders(d, gpu)
        if len(holders) >= settings.max_parallel:
            return Reason(why=Why.SLOT, who=holders)
    if not d.config.overlap_loads and (loading := _swaps_beside(d, consumer)):
        return Reason(why=Why.NO_OVERLAP, who=tuple(sorted(loading)))
    return None


def _swaps_beside(d: Draft, consumer: Consumer) -> set[str]:
    """Give the targets of swaps on its cards."""
    return d.swaps.keys() & d.config.sharing[consumer.name]


def slot_holders(d: Draft, gpu: int) -> tuple[str, ...]:
    """Give who is at work in a slot of a card."""
    return tuple(
        sorted(
            name
            for name in d.serving
            if d.consumer(name).gpu_slot and gpu in d.consumer(name).vram_mib
        )
    )


def _wanted_elsewhere(d: Draft, name: str) -> Reason | None:
    """A swap under way counts on its going."""
    if not d.swaps:
        return None
    wanting = sorted(swap.target for swap in d.swaps.values() if name in swap.victims)
    return Reason(why=Why.COLLISION, who=tuple(wanting)) if wanting else None


def _no_overlap(d: Draft, consumer: Consumer) -> Reason | None:
    """On cards that can't load beside work, a swap waits until they are quiet."""
    if d.config.overlap_loads:
        return None
    at_work = {name for gpu in consumer.vram_mib for name in slot_holders(d, gpu)}
    in_the_way = at_work | _swaps_beside(d, consumer)
    if in_the_way:
        return Reason(why=Why.NO_OVERLAP, who=tuple(sorted(in_the_way)))
    return None


# --------------------------------------------------------------------------------------- no set


def _no_set(d: Draft, name: str) -> Reason:
    """The planner knows no set: say what stands in the way, and whether it will pass."""
    numbers: dict[str, int] = {}
    beyond_cooldowns = beyond_all = False
    needs = need_mib(d.consumer(name), d.consumers[name])
    for gpu, need in needs.items():
        free = free_mib(d, name, gpu)
        if free is None:
            continue
        now, later = _attainable_mib(d, name, gpu)
        wanted = need + cushion_mib(d, gpu)
        beyond_cooldowns = beyond_cooldowns or free + now < wanted
        beyond_all = beyond_all or free + later < wanted
        if not numbers or free + now < wanted:
            numbers = {"gpu": gpu, "need_mib": need, "cushion_mib": wanted - need, "free_mib": free}
    under_way = _under_way(d, name)
    if beyond_all or not (beyond_cooldowns or under_way):
        return Reason(why=Why.UNFIT, who=_holders(d, name, numbers), numbers=numbers)
    if beyond_cooldowns:
        cooling = tuple(sorted(other for other in d.consumers if cooling_down(d, other)))
        return Reason(why=Why.COOLDOWN, who=cooling, numbers=numbers)
    return Reason(why=Why.MEMORY, who=under_way, numbers=numbers)


def _attainable_mib(d: Draft, target: str, gpu: int) -> tuple[int, int]:
    """What could come free on a card at best: without who cools down, and with."""
    beside = d.consumer(target).can_coexist_with
    now = sum(held_mib(d.consumer(n), d.consumers[n], gpu) for n in _just_gone(d, gpu))
    cooling = 0
    for name in d.present():
        if name == target:
            continue
        promise, gain = d.promises.get(name), gain_mib(d, name, gpu)
        if promise is not None and not d.consumer(name).vram_managed:
            # At best it is given up, and what a sample shows of it already comes free as well.
            now += kept_mib(d, name, gpu) or promise.mib.get(gpu, 0) + gain
        elif d.consumers[name].operation is not None or (
            name not in beside and may_be_evicted(d, name)
        ):
            now += gain
        elif name not in beside and cooling_down(d, name):
            cooling += gain
    return now, now + cooling


def _under_way(d: Draft, target: str) -> tuple[str, ...]:
    """Give who loads, unloads or has memory promised on the target's cards."""
    sharing = d.config.sharing[target]
    moving = {
        name
        for name in d.present()
        if name != target
        and name in sharing
        and (_is_promised(d, name) or name in d.swaps or d.consumers[name].operation is not None)
    }
    cards = d.consumer(target).vram_mib
    return tuple(sorted(moving.union(*(_just_gone(d, gpu) for gpu in cards))))


def _is_promised(d: Draft, name: str) -> bool:
    """Its promise still counts: without a good sample it ended with its load."""
    promise = d.promises.get(name)
    return promise is not None and (
        promise.done is None or any(good_card(d, gpu) for gpu in promise.mib)
    )


def _just_gone(d: Draft, gpu: int) -> list[str]:
    """Give those whose unload ended so lately that the card may show their memory still."""
    card = good_card(d, gpu)
    if card is None:
        return []
    settled = min(card.taken, d.at - d.config.settle_timeout_us)
    return [
        name
        for name, state in d.consumers.items()
        if state.residency is ABSENT
        and state.source is Source.COMMAND
        and state.moved > settled
        and gpu in d.consumer(name).vram_mib
    ]


def _holders(d: Draft, target: str, numbers: dict[str, int]) -> tuple[str, ...]:
    """Give who holds memory on the card that is short, others than ours included."""
    cards = {numbers["gpu"]} if numbers else set(d.consumer(target).vram_mib)
    ours = sorted(
        name
        for name in d.present()
        if name != target
        and d.consumers[name].residency is not ABSENT
        and not cards.isdisjoint(d.consumer(name).vram_mib)
    )
    foreign = any(gpu in d.cards and d.cards[gpu].foreign_mib for gpu in cards)
    return (*ours, "(other processes)") if foreign else tuple(ours)


def unfit_message(name: str, reason: Reason) -> str:
    """Tell a client what is missing and who holds it."""
    held = ", ".join(reason.who) or "nobody known"
    numbers = reason.numbers
    return (
        f"{name} needs {numbers.get('need_mib', 0)} MiB on GPU {numbers.get('gpu', 0)}, "
        f"{numbers.get('free_mib', 0)} MiB are free and cannot be made enough; held by: {held}"
    )


# --------------------------------------------------------------------------------------- fences


def _fence(d: Draft, request: RequestState) -> Fence:
    """What a promoted request still needs."""
    consumer = d.consumer(request.consumer)
    limited = any(
        gpu in d.config.gpus and d.config.gpus[gpu].max_parallel is not None
        for gpu in consumer.vram_mib
    )
    needs_memory = not may_serve(d, consumer.name) or swaps.plan(d, consumer.name) != ()
    return Fence(
        request=request.request,
        consumer=consumer.name,
        needs_slot=(consumer.gpu_slot and consumer.name not in d.serving and limited)
        or (not d.config.overlap_loads and (needs_memory or consumer.gpu_slot)),
        needs_memory=needs_memory,
    )


def _held_back(d: Draft, consumer: Consumer, fences: list[Fence]) -> Reason | None:
    for fence in fences:
        if _takes_from(d, consumer, fence):
            return fence.reason
    return None


def _takes_from(d: Draft, consumer: Consumer, fence: Fence) -> bool:
    """Would work of this consumer take a slot or memory that the promoted request needs?"""
    promoted = d.consumer(fence.consumer)
    if consumer.name not in d.config.sharing[fence.consumer]:
        return False
    if fence.needs_slot and consumer.gpu_slot:
        return True
    if not fence.needs_memory:
        return False
    if not may_serve(d, consumer.name):
        return True
    if not consumer.gpu_slot and any(other != consumer.name for other in d.serving):
        return False  # the work that is served may be calling it
    return may_be_evicted(d, consumer.name) and consumer.name not in promoted.can_coexist_with


# ---------------------------------------------------------------------------------- end of waits


def serve_arrived(d: Draft) -> None:
    """Serve who waited in a swap that is over, before the walk and past promoted requests."""
    arrived, d.arrived = d.arrived, []
    for name in arrived:
        if not no_room(d, d.consumer(d.requests[name].consumer)):
            grant(d, name)


def expire(d: Draft) -> None:
    """End the waits whose time is over."""
    first = d.first_deadline()
    if first is None or d.at < first:
        return
    late = [
        name
        for name, request in d.requests.items()
        if request.phase is not SERVING and d.at >= request.deadline
    ]
    for name in late:
        request, reason = d.requests[name], d.reasons[name]
        waited_s = (d.at - request.at) // 1_000_000
        at_last = awaited_now(reason, request.consumer)
        d.reject(
            name, "queue_timeout", f"waited {waited_s} s for {request.consumer}, at last {at_last}"
        )


def give_up_unclaimed(d: Draft) -> None:
    """Nobody is left to cold-start a consumer for whom memory is set aside."""
    for name in d.restless():
        if d.consumers[name].cleared and name not in d.owed:
            d.update(name, cleared=False)
            d.give_up_promise(name)
            d.note("ColdStartGivenUp", consumer=name)
