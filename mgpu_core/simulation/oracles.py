"""The properties of the scheduler, each stated by an oracle of its own.

An oracle looks at one step from outside and says in words what is wrong. Those on single steps
hold for any events whatever, in any order; `run` adds what only a whole run can show.
"""

from collections.abc import Callable, Iterator, Mapping

from attrs import define, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import Consumer
from mgpu_core.invariants import violations
from mgpu_core.notes import Note, Why
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation import ledger
from mgpu_core.simulation.books import Books, Step, Ticket, refusals, shares_card, together, turn
from mgpu_core.state import Phase, Residency, State, assumed_residency

# What holding back others can't end (core.md 3): overtaking one who waits so is no wrong.
BEYOND_HELP = frozenset({Why.UNFIT, Why.COOLDOWN, Why.VICTIM_BUSY})


@frozen
class Violation:
    """What was broken, and how."""

    property: str
    text: str

    def __str__(self) -> str:
        return f"{self.property}: {self.text}"


Oracle = Callable[[Step], Iterator[str]]


def one_end(step: Step) -> Iterator[str]:
    """P1: every admitted request ends once, by its deadline unless it is served by then.

    Who waits for a load that fails ends with it.
    """
    open_ = _open(step)
    refused = {one.request for one in refusals(step)}
    for effect in step.effects:
        if isinstance(effect, fx.Serve | fx.Reject):
            if effect.request not in open_ and effect.request not in refused:
                yield f"{effect.request} ends again, or was never admitted: {effect}"
            open_.discard(effect.request)
    for ticket in step.now.waiting.values():
        if step.at >= ticket.deadline:
            yield f"{ticket.request} waits past its deadline"
    for reject in step.rejected:
        ticket_ = step.books.waiting.get(reject.request)
        if reject.code == "queue_timeout" and ticket_ and step.at < ticket_.deadline:
            yield f"{reject.request} timed out before its deadline"
    failed = {note.consumer for note in step.notes if note.type == "LoadFailed"}
    for ticket in step.now.waiting.values():
        if ticket.consumer in failed and ticket.request in step.books.waiting:
            yield f"{ticket.request} waits on, though {ticket.consumer} failed to load"
    phases = {n: r.phase for n, r in step.after.requests.items() if r.operator is None}
    waiting = {name for name, phase in phases.items() if phase is not Phase.SERVING}
    if waiting != set(step.now.waiting):
        yield f"waiting are {sorted(step.now.waiting)}, the state says {sorted(waiting)}"


def _open(step: Step) -> set[str]:
    """Give who had still to end when the decisions of this step were taken."""
    event = step.event
    if isinstance(event, ev.Started):
        return set()
    open_ = set(step.books.waiting)
    if isinstance(event, ev.Cancel):
        open_.discard(event.request)
    if isinstance(event, ev.Request) and step.now.arrivals > step.books.arrivals:
        open_.add(event.request)
    return open_


def nothing_behind_a_promoted(step: Step) -> Iterator[str]:
    """P2: who is promoted is not overtaken by what takes from it; a victim is granted nothing.

    Limits: what had joined a swap or was owed before the promotion goes on; who waits for what
    holding back can't end (as the core's own reason says) holds nobody back.
    """
    for name in _promoted(step):
        ticket = step.books.waiting[name]
        for one in step.served:
            if _takes(step, one.request, ticket):
                yield f"{one.request} is granted, though {name} is promoted and came before it"
        for swap in step.after.swaps.values():
            old = step.before.swaps.get(swap.target)
            if old and old.epoch == swap.epoch:
                continue
            joined = [n for n in step.now.joined if step.now.waiting[n].consumer == swap.target]
            if joined and all(_takes(step, one, ticket) for one in joined):
                yield f"the swap of {swap.target} starts, though {name} is promoted"
    for one in step.served:
        order = step.now.orders.get(one.consumer)
        if order and order.kind == "unload":
            yield f"{one.request} is granted on {one.consumer}, which is being unloaded"
        for swap in step.before.swaps.values():
            still = step.after.swaps.get(swap.target)
            if one.consumer in swap.victims and still and still.epoch == swap.epoch:
                yield f"{one.request} is granted on {one.consumer}, a victim of {swap.target}"
    for name in _let_off(step):
        yield f"{name} need not go any more, though an operator wants it out"


def _let_off(step: Step) -> Iterator[str]:
    """Give who an operator wants out, and who need not go any more, though nothing says so."""
    if isinstance(step.event, ev.Started | ev.Pin | ev.Unload | ev.Reconfigured):
        return
    moved = {note.consumer for note in step.notes if note.type == "Moved"}
    for name, belief in step.before.consumers.items():
        now = step.after.consumers.get(name)
        stays = now is not None and not now.leaving and _is_in(step.after, name)
        if belief.leaving and stays and name not in moved:
            yield name


def _promoted(step: Step) -> list[str]:
    """Give who is promoted all through the step, by our own count, and could be helped."""
    bound = step.before.config.overtake_bound
    if bound is None or step.after.config is not step.before.config:
        return []
    return [
        name
        for name in step.books.waiting
        if name in step.now.waiting
        and name not in step.books.joined | step.now.joined
        and (
            len(step.books.overtakers.get(name, ())) >= bound
            or len(step.books.higher.get(name, ())) >= 2 * bound
        )
        and not _beyond_help(step, name)
    ]


def _beyond_help(step: Step, name: str) -> bool:
    reasons = (step.before.reasons.get(name), step.after.reasons.get(name))
    if any(reason is None or reason.why in BEYOND_HELP for reason in reasons):
        return True
    return any(
        note.request == name and note.details["why"] in BEYOND_HELP
        for note in step.notes
        if note.type == "Waits"
    )


def _takes(step: Step, request: str, waiting: Ticket) -> bool:
    """Does this later request, granted or joined now, take a slot or memory from the waiting?"""
    ticket = step.books.waiting.get(request) or step.now.waiting.get(request)
    if ticket is None and isinstance(step.event, ev.Request):
        consumer, later = step.consumer(step.event.consumer), True
    elif ticket is not None:
        consumer, later = step.consumer(ticket.consumer), ticket.arrival > waiting.arrival
    else:
        return False
    if not later or request in step.books.joined or request in step.books.owed:
        return False
    mine = step.consumer(waiting.consumer)
    if not shares_card(consumer, mine) or consumer.name == mine.name:
        return shares_card(consumer, mine) and not _full(step, mine)
    if _takes_slot(step, consumer, mine):
        return True
    first = next((one.request for one in step.served if one.consumer == consumer.name), request)
    seen = any(note.details.get("new") == "resident" for note in _moves(step, consumer.name))
    order = step.books.orders.get(consumer.name)
    loaded = order is not None and order.kind == "load"  # what it needs is taken by now
    known = seen or loaded or _has_worked(step, consumer.name)
    was_in = _is_in(step.before, consumer.name) or first != request or known
    return _takes_memory(step, consumer, mine, was_in=was_in)


def _has_worked(step: Step, name: str) -> bool:
    """Its work ended well just now, which shows that it is in."""
    match step.event:
        case ev.ServeDone(request=request, outcome="ok"):
            return step.books.jobs.get(request) == name
    return False


def _moves(step: Step, name: str) -> list[Note]:
    """What a probe or a sample just told of a consumer."""
    by_eye = {"seen resident", "seen absent"}
    return [
        note
        for note in step.notes
        if note.type == "Moved" and note.consumer == name and note.details["because"] in by_eye
    ]


def _full(step: Step, consumer: Consumer) -> bool:
    return step.books.serving[consumer.name] >= consumer.max_concurrency


def _takes_slot(step: Step, consumer: Consumer, mine: Consumer) -> bool:
    at_work = step.books.serving[mine.name] or step.now.serving[mine.name]
    limited = any(
        gpu in step.after.config.gpus and step.after.config.gpus[gpu].max_parallel is not None
        for gpu in consumer.vram_mib.keys() & mine.vram_mib.keys()
    )
    return consumer.gpu_slot and mine.gpu_slot and limited and not at_work


def _takes_memory(step: Step, consumer: Consumer, mine: Consumer, *, was_in: bool) -> bool:
    if _is_in(step.before, mine.name) or _is_in(step.after, mine.name):
        return False
    shared = consumer.vram_mib.keys() & ledger.needs(step.after, mine).keys()
    if not shared or consumer.vram_managed:
        return False
    if not was_in:
        return any(ledger.needs(step.after, consumer).get(gpu) for gpu in shared)
    called = not consumer.gpu_slot and any(one != consumer.name for one in step.now.serving)
    return not called and _evictable(step, consumer, mine)


def _is_in(state: State, name: str) -> bool:
    belief = state.consumers.get(name)
    return belief is not None and (belief.residency is Residency.RESIDENT or belief.cleared)


def _evictable(step: Step, consumer: Consumer, target: Consumer) -> bool:
    """Might the target name it, as far as configuration and pins go?"""
    names = {consumer.name}
    was = step.before.consumers.get(consumer.name, step.after.consumers[consumer.name])
    if not consumer.unload_route or was.leaky_mib is not None:
        names |= set(together(step.after.config, consumer.name))
    cooldown = step.after.consumers[consumer.name].unload_cooldown
    return (
        consumer.unloadable
        and (cooldown is None or step.at >= cooldown.until)
        and names.isdisjoint(target.can_coexist_with)
        and not any(_protected(step, one) for one in names)
    )


def _protected(step: Step, name: str) -> bool:
    consumer = step.consumer(name)
    return consumer.vram_managed or step.now.pins.get(name, consumer.pinned)


def plan_before_unload(step: Step) -> Iterator[str]:
    """P3: nothing is unloaded for a swap unless, with its whole set gone, the target fits.

    By the numbers known then, before or after the event, whichever is kinder; where a built-in
    planner decides.
    """
    later = [note.consumer for note in step.notes if note.type == "SwapStarted"]
    for swap in step.after.swaps.values():
        told = [one for one in step.unloads if one.epoch == swap.epoch]
        if not told:
            continue
        new = later[later.index(swap.target) + 1 :] if swap.target in later else later
        target = step.consumer(swap.target)
        for gpu, need in ledger.needs(step.after, target).items():
            wanted = need + ledger.cushion(step.after, gpu)
            best = max(_after_unloads(step, swap.target, gpu, told, new))
            if best < wanted:
                yield (
                    f"{[one.consumer for one in told]} must go for {swap.target}, which needs "
                    f"{wanted} MiB on GPU {gpu} and would have {best}"
                )


def _after_unloads(
    step: Step, target: str, gpu: int, told: list[fx.StartUnload], new: list[str | None]
) -> Iterator[int]:
    """Give what would be free: by the card, by what is believed; unlimited if nobody knows."""
    state = step.after
    going = {name for one in told for name in step.going(one)}
    gains = sum(ledger.gain(state, step.consumer(name), gpu) for name in going)
    promised = [one for one in state.promises if one not in new]
    by_card = ledger.free_by_card(state, target, gpu, promised)
    if by_card is not None:
        freed = ledger.just_freed(state, step.now, target, gpu)
        yield by_card + gains + freed + _still_held(step, target, gpu)
        return
    by_belief = ledger.free_by_belief(state, target, gpu, gone=going | {one for one in new if one})
    yield by_belief if by_belief is not None else 1 << 60


def _still_held(step: Step, target: str, gpu: int) -> int:
    """What the target itself holds while it is not in counts as free for it: all that it held
    where its unload failed, else what its unload leaves behind, as far as the card shows it.
    """
    state, consumer = step.after, step.consumer(target)
    beliefs = (step.before.consumers.get(target), state.consumers.get(target))
    failed = any(belief is not None and belief.uncertain == "unload" for belief in beliefs)
    failed = failed or any(n.type == "UnloadFailed" and n.consumer == target for n in step.notes)
    if failed:
        return ledger.held(state, consumer, gpu)
    absent = any(belief and belief.residency is Residency.ABSENT for belief in beliefs)
    return ledger.residue(state, consumer, gpu) if absent else 0


def spared(step: Step) -> Iterator[str]:
    """P4: never unload what serves, is busy, loads, is owed, pinned, managed or protected.

    An operator may: by force whatever he names, and by name what is pinned or managed.
    """
    for unload in step.unloads:
        asked = unload.consumer in step.now.leaving
        named = step.now.leaving.get(unload.consumer, False)
        target = next((s for s in step.after.swaps.values() if s.epoch == unload.epoch), None)
        for name in step.going(unload):
            if _is_forced(step, name) or step.before.consumers.get(name) is None:
                continue
            for what in _claims(step, name, unload):
                yield f"{name} is unloaded, though it {what}"
            if _protected(step, name) and not (asked and (named or name in step.now.leaving)):
                yield f"{name} is unloaded, though it is pinned or managed"
            if target and name in step.consumer(target.target).can_coexist_with:
                yield f"{name} is unloaded for {target.target}, beside which it may stay"


def _is_forced(step: Step, name: str) -> bool:
    event = step.event
    return isinstance(event, ev.Unload) and event.force and name in (event.consumers or (name,))


def _claims(step: Step, name: str, unload: fx.StartUnload) -> Iterator[str]:
    if step.now.serving[name]:
        yield "serves"
    busy = step.now.busy.get(name)
    within = busy is not None and step.at <= busy + 2 * step.after.config.probe_interval_us
    if busy is not None and within and busy > step.now.last_done.get(name, -1):
        yield "is busy for somebody else"
    order = step.books.orders.get(name)
    answered = isinstance(step.event, ev.SwapDone | ev.UnloadDone | ev.Started)
    if order and step.at < order.deadline and not answered:
        yield f"has an {order.kind} under way"
    waiting = [n for n, one in step.now.owed.items() if one == name]
    if waiting and name not in step.now.leaving and not _for_itself(step, unload):
        yield f"is owed to {waiting}"


def _for_itself(step: Step, unload: fx.StartUnload) -> bool:
    """A lazy one lets go of what an earlier first request left, for those who wait for it."""
    itself = "what it may hold is in its own way"
    return any(
        note.consumer == unload.consumer and note.details["because"] == itself
        for note in step.notes
        if note.type == "Unloading"
    )


def one_load(step: Step) -> Iterator[str]:
    """P5: at most one load at a time for a consumer, whatever its waiters do."""
    ended = isinstance(step.event, ev.SwapDone | ev.UnloadDone | ev.Started)
    for load in step.loads:
        order = step.books.orders.get(load.consumer)
        if order and step.at < order.deadline and not ended:
            yield f"{load.consumer} is told to load during its {order.kind}"
        server = step.consumer(load.consumer).server
        for name, stop in step.books.orders.items():
            if stop.server == server and step.now.orders.get(name) is stop:
                yield f"{load.consumer} is told to load while {name} stops its server"
        if [one.consumer for one in step.loads].count(load.consumer) > 1:
            yield f"{load.consumer} is told to load twice in one step"
    for note in step.notes:
        order = step.books.orders.get(note.consumer or "")
        if note.type != "LoadFailed" or order is None or order.kind != "load":
            continue
        if not ended and step.at < order.deadline:
            yield f"the load of {note.consumer} is given up before its time"
    if isinstance(step.event, ev.Cancel):
        for name, order in step.books.orders.items():
            now = step.after.consumers[name].operation
            if step.at < order.deadline and (now is None or now.epoch != order.epoch):
                yield f"the {order.kind} of {name} did not survive a cancellation"


def what_answers_nothing(step: Step) -> Iterator[str]:
    """P6: a completion with an old epoch, and any other stale input, does what a tick does.

    A load that ended after it was given up asks for a probe besides.
    """
    event, books = step.event, step.books
    if isinstance(event, ev.ProbeResult):
        engaged = books.engaged_at.get(event.consumer, -1)
        at_work = event.consumer in books.serving and event.failure != "refused"
        if _moves(step, event.consumer) and (event.taken < engaged or at_work):
            yield f"{event} tells of a time before its last work or swap, and is believed"
    match event:
        case ev.UnloadDone() | ev.SwapDone():
            order = books.orders.get(event.consumer)
            kind = "load" if isinstance(event, ev.SwapDone) else "unload"
            stale = order is None or (order.kind, order.epoch) != (kind, event.epoch)
        case ev.ServeDone():
            stale = event.request not in books.jobs
        case ev.Cancel():
            stale = event.request not in books.waiting
        case ev.Request():
            stale = event.request in books.waiting or event.request in books.jobs
        case _:
            stale = False
    if not stale:
        return
    idle = Scheduler(step.before.config, step.planner).step(step.before, ev.Tick(at=event.at))
    effects = [one for one in step.effects if not isinstance(one, fx.Probe)]
    if effects != [one for one in idle.effects if not isinstance(one, fx.Probe)]:
        yield f"{event} answers nothing, and yet brings about {effects}"
    if step.after.consumers != idle.state.consumers or step.after.requests != idle.state.requests:
        yield f"{event} answers nothing, and yet changes what is believed"


def memory_is_there(step: Step) -> Iterator[str]:
    """P7: no load or cold start without room for it, by the core's own accounting.

    Either the card says so (with what unloads gave back since it was read), or the sum of what
    all are believed to hold; what may coexist counts as the operator vouches. Needs nothing,
    knows no total, or `when_unfit: admit`: nothing to check.
    """
    yield from _promises_broken(step)
    for load in step.loads:
        swap = step.after.swaps.get(load.consumer)
        for victim in swap.victims if swap else ():
            order = step.now.orders.get(victim)
            if order and order.kind == "unload" and order.epoch == load.epoch:
                yield f"{load.consumer} starts to load before its victim {victim} is out"
    if step.after.config.when_unfit == "admit":
        return
    starting = [load.consumer for load in step.loads] + _cold_starts(step)
    for name in starting:
        consumer = step.consumer(name)
        promise = step.before.promises.get(name)
        for gpu, need in ledger.needs(step.after, consumer).items():
            kept = promise.mib.get(gpu, need) if promise is not None else need
            wanted = min(need, kept) + ledger.cushion(step.after, gpu)
            rooms = _rooms(step, name, gpu, starting)
            if rooms and max(rooms) < wanted:
                yield f"{name} starts to load {wanted} MiB on GPU {gpu}, where {max(rooms)} are"


def _promises_broken(step: Step) -> Iterator[str]:
    """Give promises smaller than the need, and those that went before their memory was taken."""
    for note in step.notes:
        promise = step.after.promises.get(note.consumer or "")
        if note.type != "SwapStarted" or note.consumer is None or promise is None:
            continue
        consumer = step.consumer(note.consumer)
        for gpu, need in ledger.needs(step.after, consumer).items():
            left_mib = max(consumer.vram_residue_mib, _still_held(step, consumer.name, gpu))
            if promise.mib.get(gpu, 0) < need - left_mib:
                yield f"{consumer.name} needs {need} MiB on GPU {gpu}, {promise.mib} are promised"
    if isinstance(step.event, ev.Started) or (
        isinstance(step.event, ev.Unload) and step.event.force
    ):
        return
    for name in step.before.promises.keys() - step.after.promises.keys():
        if name in step.after.consumers and not _given_up(step, name) and not _is_taken(step, name):
            yield f"the memory promised to {name} is free for others before it is taken"


def _given_up(step: Step, name: str) -> bool:
    """Its swap came to nothing, or somebody saw that it is out."""
    match step.event:
        case ev.ProbeResult(consumer=one, resident=False) if one == name:
            return True
        case ev.ProbeResult(consumer=one, failure="refused") if one == name:
            return True
    return any(
        note.type in {"SwapEnded", "ColdStartGivenUp"} and note.consumer == name
        for note in step.notes
    )


def _is_taken(step: Step, name: str) -> bool:
    """A sample shows it: taken after the load or first request, or its growth on the card."""
    promise, cold = step.before.promises[name], step.books.cold_starts.get(name)
    cards = {gpu: card for gpu in promise.mib if (card := step.after.cards.get(gpu))}
    if not cards:
        return True  # nobody measures
    ended = step.now.ended_at.get(name)
    for gpu, card in cards.items():
        if ledger.good_card(step.after, gpu) is None or (ended is not None and card.taken > ended):
            continue
        before = cold.used_mib.get(gpu) if cold else None
        if cold is None or before is None or card.taken <= cold.at:
            return False
        if card.used_mib < before + promise.mib[gpu]:
            return False
    return isinstance(step.event, ev.GpuSample)


def _cold_starts(step: Step) -> list[str]:
    return [
        name
        for name in dict.fromkeys(one.consumer for one in step.served)
        if step.consumer(name).lazy and not _was_in(step, name)
    ]


def _was_in(step: Step, name: str) -> bool:
    """It was in before, or came in by this very event."""
    belief = step.before.consumers.get(name)
    if belief is not None and belief.residency is Residency.RESIDENT:
        return True
    told = isinstance(step.event, ev.ProbeResult | ev.Reconfigured | ev.GpuSample | ev.SwapDone)
    return told or _has_worked(step, name)


def _rooms(step: Step, name: str, gpu: int, starting: list[str]) -> list[int]:
    state = step.after
    new = {n.consumer for n in step.notes if n.type == "SwapStarted" and n.consumer}
    later = {*starting[starting.index(name) :], *new}
    earlier = [one for one in state.promises if one not in later]
    by_card = ledger.free_by_card(state, name, gpu, earlier)
    by_belief = ledger.free_by_belief(state, name, gpu, gone=later)
    rooms = [] if by_belief is None else [by_belief]
    if by_card is not None:
        freed = ledger.just_freed(state, step.now, name, gpu)
        rooms.append(by_card + freed + _still_held(step, name, gpu))
    return rooms


def bounded_overtaking(step: Step) -> Iterator[str]:
    """P8: who waits is overtaken at most N times by its equals and lower ones, 2 N by higher.

    Counted are grants that take a slot or memory from it while holding back could help.
    """
    bound = step.after.config.overtake_bound
    for name, ticket in step.now.waiting.items():
        if name not in step.books.waiting or name in step.books.joined | step.now.joined:
            continue
        if _beyond_help(step, name):
            continue
        takers = {one.request for one in step.served if _takes(step, one.request, ticket)}
        if takers:
            step.now.takers[name] = step.now.takers.get(name, frozenset()) | takers
        all_takers = step.now.takers.get(name, frozenset())
        high = all_takers & step.now.higher.get(name, frozenset())
        if bound is not None and (len(all_takers - high) > bound or len(high) > 2 * bound):
            yield f"{name} was overtaken by {sorted(all_takers)}, the bound is {bound}"


def nothing_left_of_a_cancelled(step: Step) -> Iterator[str]:
    """P9: a cancelled request leaves nothing behind, and nobody falls back for it."""
    if not isinstance(step.event, ev.Cancel) or step.event.request not in step.books.waiting:
        return
    state, name = step.after, step.event.request
    kept = (state.requests, state.queue, state.overtaken, state.overtaken_high, state.reasons)
    if any(name in held for held in kept):
        yield f"something of {name} stays after its cancellation"
    consumer = step.books.waiting[name].consumer
    counted = sum(one.consumer == consumer for one in step.now.waiting.values())
    counted += sum(
        r.operator is not None and r.consumer == consumer for r in state.requests.values()
    )
    if state.waiting.get(consumer, 0) != counted:
        yield f"{state.waiting.get(consumer, 0)} of {consumer} are counted, {counted} wait"
    places = {one: place for place, one in enumerate(step.before.queue)}
    for place, one in enumerate(state.queue):
        if one in places and place > places[one] and not _returned(step):
            yield f"{one} falls back from place {places[one]} to {place}"


def _returned(step: Step) -> bool:
    """Somebody comes back into the queue because time has passed as well."""
    return bool(set(step.after.queue) - set(step.before.queue))


def limits(step: Step) -> Iterator[str]:
    """P10: counts are right, what is served is what is open, and no grant exceeds a limit."""
    yield from violations(step.after)
    served = {n for n, r in step.after.requests.items() if r.phase is Phase.SERVING}
    if served != set(step.now.jobs):
        yield f"open are {sorted(step.now.jobs)}, the state says {sorted(served)}"
    serving = step.now.serving
    for one in step.served:
        consumer = step.consumer(one.consumer)
        if serving[consumer.name] > consumer.max_concurrency:
            yield f"{consumer.name} serves {serving[consumer.name]}"
        mates = together(step.after.config, consumer.name)
        most = consumer.server_concurrency
        if most is not None and sum(serving[mate] for mate in mates) > most:
            yield f"{consumer.server} serves more than {most}"
        for gpu in consumer.vram_mib if consumer.gpu_slot else ():
            settings = step.after.config.gpus.get(gpu)
            holders = _holders(step, gpu)
            new = not step.books.serving[consumer.name]
            parallel = settings.max_parallel if settings else None
            if new and parallel is not None and len(holders) > parallel:
                yield f"{sorted(holders)} work on GPU {gpu} at once"
    yield from _overlaps(step)


def _overlaps(step: Step) -> Iterator[str]:
    """Where a card can't load beside work, it does one of them at a time."""
    config = step.after.config
    if config.overlap_loads or config is not step.before.config:
        return
    started = [n.consumer for n in step.notes if n.type == "SwapStarted" and n.consumer]
    under_way = step.before.swaps.keys() & step.after.swaps.keys()
    for name in started:
        mine, others = step.consumer(name), (*under_way, *started[: started.index(name)])
        beside = [n for n in others if n != name and shares_card(mine, step.consumer(n))]
        beside = [n for n in beside if n in step.after.swaps]
        working = {n for request, n in step.books.jobs.items() if request in step.now.jobs}
        at_work = [n for n in working if step.consumer(n).gpu_slot]
        at_work = [n for n in at_work if shares_card(mine, step.consumer(n))]
        if beside or at_work:
            yield f"the swap of {name} starts beside {sorted([*beside, *at_work])}"
    for one in step.served:
        mine = step.consumer(one.consumer)
        new = mine.gpu_slot and not step.books.serving[mine.name]
        beside = [n for n in under_way if n != mine.name and shares_card(mine, step.consumer(n))]
        if new and beside:
            yield f"{one.request} is granted beside the swaps of {sorted(beside)}"


def _holders(step: Step, gpu: int) -> set[str]:
    names = set(step.now.serving)
    return {n for n in names if step.consumer(n).gpu_slot and gpu in step.consumer(n).vram_mib}


# What is known or under way that a new run must find out, or begin, by itself.
OF_ONE_RUN = ("cards", "promises", "swaps", "owed", "overtaken", "overtaken_high", "reasons")


def a_new_run(step: Step) -> Iterator[str]:
    """P12: a new run starts with nothing of the old one, looks at everything, reuses no epoch."""
    state = step.after
    for effect in step.effects:
        if isinstance(effect, fx.StartLoad | fx.StartUnload):
            swap = state.swaps.get(effect.consumer)
            mine = swap is not None and swap.epoch == effect.epoch
            if effect.epoch < step.books.highest_epoch and not _known_epoch(step, effect.epoch):
                yield f"epoch {effect.epoch} was used before"
            if isinstance(effect, fx.StartLoad) and not mine:
                yield f"{effect.consumer} loads for no swap"
    if not isinstance(step.event, ev.Started):
        return
    clients = [n for n, r in state.requests.items() if r.operator is None]
    if clients or state.serving or step.served:
        yield f"a new run begins with {clients} of the old one"
    if kept := [name for name in OF_ONE_RUN if getattr(state, name)]:
        yield f"a new run begins with {', '.join(kept)} of the old one"
    asked = {effect.consumer for effect in step.effects if isinstance(effect, fx.Probe)}
    if asked != set(state.consumers) or fx.SampleGpu() not in step.effects:
        yield f"a new run asks only {sorted(asked)} how they are"
    for name, consumer in state.config.consumers.items():
        seen_by = {"process": Residency.ABSENT, "container": Residency.UNKNOWN}
        assumed = seen_by.get(consumer.driver, assumed_residency(consumer))
        started = any(load.consumer == name for load in step.loads)
        if state.consumers[name].residency is not assumed and not started:
            yield f"{name} is {state.consumers[name].residency} at the start, not {assumed}"


def _known_epoch(step: Step, epoch: int) -> bool:
    """It belongs to a swap under way, which goes on with its own."""
    swaps = (*step.before.swaps.values(), *step.after.swaps.values())
    return any(swap.epoch == epoch for swap in swaps) or epoch > step.before.epoch


def nobody_waits_for_nothing(step: Step) -> Iterator[str]:
    """P14: nothing waits that could be served, or whose swap could start.

    Not looked at: while somebody is promoted who could be helped. A swap counts as possible only
    in plain cases: nothing else moves or is promised, and there is room, or enough idle ones could
    go.
    """
    state = step.after
    if state.stopping or _anybody_promoted(state):
        return
    for name in state.queue:
        request = state.requests[name]
        consumer = state.config.consumers[request.consumer]
        belief = state.consumers[consumer.name]
        if belief.leaving or consumer.name in state.swaps:
            continue
        if _is_in(state, consumer.name):
            if not _hindered(step, consumer) and not belief.cleared:
                yield f"{name} waits, though {consumer.name} could serve it"
        elif not request.only_if_free and _swap_could_start(step, consumer):
            yield f"{name} waits, though {consumer.name} could be brought in"


def _anybody_promoted(state: State) -> bool:
    """One whom holding back can help: others do not wait for who is beyond that."""
    bound = state.config.overtake_bound
    if bound is None:
        return False
    promoted = {name for name, count in state.overtaken.items() if count >= bound}
    promoted |= {name for name, count in state.overtaken_high.items() if count >= 2 * bound}
    reasons = (state.reasons.get(name) for name in promoted)
    return any(reason is None or reason.why not in BEYOND_HELP for reason in reasons)


def _hindered(step: Step, consumer: Consumer) -> bool:
    """Is there a limit, a victim's fate or a rule against overlap in its way?"""
    state, serving = step.after, step.now.serving
    if any(consumer.name in swap.victims for swap in state.swaps.values()):
        return True
    mates = together(state.config, consumer.name)
    if any(_moves_with(state, consumer, mate) for mate in mates):
        return True
    if serving[consumer.name] >= consumer.max_concurrency:
        return True
    most = consumer.server_concurrency
    if most is not None and sum(serving[mate] for mate in mates) >= most:
        return True
    if not consumer.gpu_slot or serving[consumer.name]:
        return False
    if not state.config.overlap_loads and state.swaps:
        return True
    for gpu in consumer.vram_mib:
        settings = state.config.gpus.get(gpu)
        most = settings.max_parallel if settings else None
        if most is not None and len(_holders(step, gpu)) >= most:
            return True
    return False


def _moves_with(state: State, consumer: Consumer, mate: str) -> bool:
    operation = state.consumers[mate].operation
    return operation is not None and (mate == consumer.name or operation.how == "driver")


def _swap_could_start(step: Step, consumer: Consumer) -> bool:
    state = step.after
    quiet = not state.swaps and not state.promises and not step.now.orders
    if not quiet or (step.now.jobs and not state.config.overlap_loads):
        return False
    idle = [other for other in state.config.consumers.values() if _may_go(step, other, consumer)]
    if len(idle) > state.config.max_evictions:
        idle = []
    for gpu, need in ledger.needs(state, consumer).items():
        free = _surely_free(state, consumer, gpu)
        gains = sum(ledger.gain(state, other, gpu) for other in idle)
        if free is None or free + gains < need + ledger.cushion(state, gpu):
            return False
    return True


def _surely_free(state: State, consumer: Consumer, gpu: int) -> int | None:
    if ledger.good_card(state, gpu):
        return ledger.free_by_card(state, consumer.name, gpu, state.promises)
    return ledger.free_by_belief(state, consumer.name, gpu)


def _may_go(step: Step, other: Consumer, target: Consumer) -> bool:
    """Surely it could go at once: in, alone on its server, idle, trusted, and nobody's."""
    belief = step.after.consumers[other.name]
    return (
        other.name != target.name
        and belief.residency is Residency.RESIDENT
        and belief.leaky_mib is None
        and len(together(step.after.config, other.name)) == 1
        and _evictable(step, other, target)
        and not step.now.serving[other.name]
        and other.name not in step.now.owed.values()
        and belief.busy_seen is None
    )


def no_churn(step: Step) -> Iterator[str]:
    """P15: who was loaded for a waiter serves it before it goes; a step does a bounded amount."""
    for unload in step.unloads:
        for name in step.going(unload):
            waiting = [n for n, one in step.books.owed.items() if one == name]
            still = [n for n in waiting if n in step.now.waiting]
            asked = name in step.now.leaving or _for_itself(step, unload)
            if still and not asked and _is_in(step.before, name):
                yield f"{name} was loaded for {still} and goes before it served them"
    most = 4 * (len(step.before.requests) + len(step.after.consumers)) + 16
    if len(step.effects) > most:
        yield f"one step has {len(step.effects)} effects"


ORACLES: Mapping[str, Oracle] = {
    "P1": one_end,
    "P2": nothing_behind_a_promoted,
    "P3": plan_before_unload,
    "P4": spared,
    "P5": one_load,
    "P6": what_answers_nothing,
    "P7": memory_is_there,
    "P8": bounded_overtaking,
    "P9": nothing_left_of_a_cancelled,
    "P10": limits,
    "P12": a_new_run,
    "P14": nobody_waits_for_nothing,
    "P15": no_churn,
}


@define
class Judge:
    """Looks at every step of a run, with books of its own."""

    state: State
    planner: Planner | None = None
    # The one property to be looked at; empty: all.
    only: str = ""
    last: Step = field(init=False)
    books: Books = field(factory=Books)

    def see(self, event: ev.Event, transition: Transition) -> list[Violation]:
        step = Step(
            before=self.state,
            event=event,
            after=transition.state,
            effects=transition.effects,
            notes=transition.notes,
            books=self.books,
            planner=self.planner,
        )
        step.now = turn(step)
        self.last = step
        self.state, self.books = transition.state, step.now
        # Of a planner of one's own, only it knows what fits.
        left_out = () if self.planner is None else ("P3", "P7", "P14")
        return [
            Violation(name, text)
            for name, oracle in ORACLES.items()
            if name not in left_out and self.only in {"", name}
            for text in oracle(step)
        ]
