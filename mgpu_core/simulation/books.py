"""The bookkeeping of a judge: what must be so, from nothing but events and effects.

It restates in its own words what the contract says of requests, commands, pins and overtaking.
Where a request waits (queued, or joined to a swap) is not to be seen from outside: that alone is
read from the public state. Nothing is imported from the modules that decide.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from attrs import define, evolve, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import Config, Consumer
from mgpu_core.notes import Note, Why
from mgpu_core.planners import Planner
from mgpu_core.state import Phase, Residency, State


@frozen(kw_only=True)
class Ticket:
    """A request that was admitted and waits."""

    request: str
    consumer: str
    priority: int
    arrival: int
    at: int
    deadline: int


@frozen(kw_only=True)
class Order:
    """A load or unload under way; an unload by driver takes all of its server."""

    kind: str
    epoch: int
    deadline: int
    server: str | None = None


@frozen(kw_only=True)
class ColdStart:
    """A first request takes the memory of its service; `used_mib` was in use by card when it was
    granted, where whatever is used since then can only be its own.
    """

    request: str
    at: int
    used_mib: Mapping[int, int]


@define(kw_only=True)
class Books:
    """What is so after an event. `turn` gives the next ones; old ones stay as they are."""

    arrivals: int = 0
    waiting: dict[str, Ticket] = field(factory=dict)
    # Request to consumer, of what is served.
    jobs: dict[str, str] = field(factory=dict)
    orders: dict[str, Order] = field(factory=dict)
    highest_epoch: int = 0
    pins: dict[str, bool] = field(factory=dict)
    # Whom an operator wants out, and whether by name.
    leaving: dict[str, bool] = field(factory=dict)
    probed: dict[str, int] = field(factory=dict)
    busy: dict[str, int] = field(factory=dict)
    last_done: dict[str, int] = field(factory=dict)
    unloaded_at: dict[str, int] = field(factory=dict)
    # When a load, an unload or a first request of it ended last, well or not.
    ended_at: dict[str, int] = field(factory=dict)
    cold_starts: dict[str, ColdStart] = field(factory=dict)
    # When it last served, or was in a swap: what a probe saw before that is old.
    engaged_at: dict[str, int] = field(factory=dict)
    joined: frozenset[str] = frozenset()
    # Whose swap has lost a waiter, as long as it goes on.
    deserted: frozenset[str] = frozenset()
    # Who waited for a load that has ended, and not yet been served.
    owed: dict[str, str] = field(factory=dict)
    # Waiting request to those who overtook it: its equals and lower ones, and higher ones.
    overtakers: dict[str, frozenset[str]] = field(factory=dict)
    higher: dict[str, frozenset[str]] = field(factory=dict)
    # The overtakers that took something from it, while holding them back would have helped.
    takers: dict[str, frozenset[str]] = field(factory=dict)

    def copy(self) -> "Books":
        return evolve(
            self,
            waiting=dict(self.waiting),
            jobs=dict(self.jobs),
            orders=dict(self.orders),
            pins=dict(self.pins),
            leaving=dict(self.leaving),
            probed=dict(self.probed),
            busy=dict(self.busy),
            last_done=dict(self.last_done),
            unloaded_at=dict(self.unloaded_at),
            ended_at=dict(self.ended_at),
            cold_starts=dict(self.cold_starts),
            engaged_at=dict(self.engaged_at),
            owed=dict(self.owed),
            overtakers=dict(self.overtakers),
            higher=dict(self.higher),
            takers=dict(self.takers),
        )

    @property
    def serving(self) -> Counter[str]:
        return Counter(self.jobs.values())


@define(slots=False, kw_only=True)
class Step:
    """One step as its witness saw it: the state and books before it and after it."""

    before: State
    event: ev.Event
    after: State
    effects: tuple[fx.Effect, ...]
    notes: tuple[Note, ...]
    books: Books
    now: Books = field(factory=Books)
    # None: a built-in one.
    planner: Planner | None = None

    @property
    def at(self) -> int:
        return self.after.at

    @cached_property
    def served(self) -> list[fx.Serve]:
        return [effect for effect in self.effects if isinstance(effect, fx.Serve)]

    @cached_property
    def rejected(self) -> list[fx.Reject]:
        return [effect for effect in self.effects if isinstance(effect, fx.Reject)]

    @cached_property
    def unloads(self) -> list[fx.StartUnload]:
        return [effect for effect in self.effects if isinstance(effect, fx.StartUnload)]

    @cached_property
    def loads(self) -> list[fx.StartLoad]:
        return [effect for effect in self.effects if isinstance(effect, fx.StartLoad)]

    def consumer(self, name: str) -> Consumer:
        """Give it as configured now, or as it was where it has just left the configuration."""
        found = self.after.config.consumers.get(name) or self.before.config.consumers.get(name)
        assert found is not None, f"nobody knows {name}"
        return found

    def going(self, unload: fx.StartUnload) -> tuple[str, ...]:
        """Who goes out with an unload: by driver, the whole server."""
        if unload.how == "routes":
            return (unload.consumer,)
        return together(self.after.config, unload.consumer)


def together(config: Config, name: str) -> tuple[str, ...]:
    """Give who shares its server, itself included; of one that has left, nothing more is known."""
    if name not in config.consumers:
        return (name,)
    server = config.consumers[name].server
    return tuple(one for one, consumer in config.consumers.items() if consumer.server == server)


def shares_card(one: Consumer, other: Consumer) -> bool:
    return not one.vram_mib.keys().isdisjoint(other.vram_mib.keys())


# ------------------------------------------------------------------- begun in the midst of a log


def at_rest(state: State) -> bool:
    """Say whether `books_of` a state are complete: nothing is under way that began before."""
    return not (state.requests or state.swaps or state.promises) and not any(
        belief.operation or belief.leaving or belief.cleared or belief.busy_seen is not None
        for belief in state.consumers.values()
    )


def books_of(state: State) -> Books:
    """Give the books of somebody who comes in late: what a state itself tells of what was."""
    believed = state.consumers
    out = {n: b.moved for n, b in believed.items() if b.residency is Residency.ABSENT}
    return Books(
        highest_epoch=state.epoch,
        orders={n: _order(state, n) for n, belief in believed.items() if belief.operation},
        pins={n: b.pinned for n, b in believed.items() if b.pinned is not None},
        probed={n: b.last_probe for n, b in believed.items() if b.last_probe is not None},
        last_done={n: belief.last_done for n, belief in believed.items()},
        unloaded_at=out,
        ended_at=dict(out),
        engaged_at={n: belief.touched for n, belief in believed.items()},
    )


def _order(state: State, name: str) -> Order:
    operation = state.consumers[name].operation
    assert operation is not None
    stops = operation.kind == "unload" and operation.how == "driver"
    server = state.config.consumers[name].server if stops else None
    return Order(
        kind=operation.kind, epoch=operation.epoch, deadline=operation.deadline, server=server
    )


# ------------------------------------------------------------------------------ going on


def turn(step: Step) -> Books:
    """Give the books after a step: first what the event says, then what was decided."""
    books = step.books.copy()
    if isinstance(step.event, ev.Started):
        books = Books(arrivals=books.arrivals, highest_epoch=books.highest_epoch)
    _note_event(books, step)
    _note_overdue(books, step)
    tickets = step.books.waiting | books.waiting
    _note_decisions(books, step)
    _note_phases(books, step, tickets)
    _note_cold_starts(books, step)
    _note_engaged(books, step)
    return books


def _note_event(books: Books, step: Step) -> None:
    event = step.event
    match event:
        case ev.Request() if _is_admitted(books, step, event):
            books.arrivals += 1
            books.waiting[event.request] = _ticket(books, step, event)
        case ev.Cancel():
            books.waiting.pop(event.request, None)
        case ev.ServeDone():
            consumer = books.jobs.pop(event.request, None)
            if consumer is not None:
                books.last_done[consumer] = step.at
                cold = books.cold_starts.get(consumer)
                if cold is not None and cold.request == event.request:
                    books.ended_at[consumer] = step.at
        case ev.UnloadDone() | ev.SwapDone():
            _note_answer(books, step, event)
        case ev.Pin():
            books.pins[event.consumer] = event.pinned
        case ev.Unload():
            named = bool(event.consumers)
            books.leaving |= dict.fromkeys(event.consumers or step.after.config.consumers, named)
        case ev.ProbeResult():
            _note_probe(books, step, event)


def _note_probe(books: Books, step: Step, event: ev.ProbeResult) -> None:
    name, taken = event.consumer, min(event.taken, step.at)
    if taken < books.probed.get(name, taken):
        return  # older than the last one: it tells nothing
    books.probed[name] = taken
    if event.healthy and event.busy:
        books.busy[name] = taken
    elif event.busy is False or event.failure == "refused":
        books.busy.pop(name, None)


def _is_admitted(books: Books, step: Step, event: ev.Request) -> bool:
    in_use = event.request in books.waiting or event.request in books.jobs
    return not in_use and not any(one.request == event.request for one in refusals(step))


def refusals(step: Step) -> list[fx.Reject]:
    """The refusal of a request at its admission: a code for those who never waited."""
    if not isinstance(step.event, ev.Request):
        return []
    mine = [one for one in step.rejected if one.request == step.event.request]
    return [one for one in mine if step.event.request not in _noted(step, "Waits")]


def _noted(step: Step, kind: str) -> set[str]:
    return {note.request for note in step.notes if note.type == kind and note.request}


def _ticket(books: Books, step: Step, event: ev.Request) -> Ticket:
    config = step.after.config
    own = config.consumers[event.consumer].priority
    deadline = step.at + config.queue_timeout_us
    return Ticket(
        request=event.request,
        consumer=event.consumer,
        priority=own if event.priority is None else event.priority,
        arrival=books.arrivals,
        at=step.at,
        deadline=deadline if event.deadline is None else min(deadline, event.deadline),
    )


def _note_answer(books: Books, step: Step, event: ev.UnloadDone | ev.SwapDone) -> None:
    order = books.orders.get(event.consumer)
    kind = "load" if isinstance(event, ev.SwapDone) else "unload"
    if order is None or (order.kind, order.epoch) != (kind, event.epoch):
        return
    del books.orders[event.consumer]
    books.ended_at[event.consumer] = step.at
    if kind == "unload":
        gone = together(step.after.config, event.consumer) if order.server else (event.consumer,)
        for name in gone:
            books.leaving.pop(name, None)
            books.ended_at[name] = step.at
            if event.error is None:
                books.unloaded_at[name] = step.at


def _note_overdue(books: Books, step: Step) -> None:
    for name, order in list(books.orders.items()):
        if step.at >= order.deadline:
            del books.orders[name]
            gone = together(step.after.config, name) if order.server else (name,)
            books.ended_at |= dict.fromkeys(gone, step.at)
            if order.kind == "unload":
                books.leaving.pop(name, None)


def _note_decisions(books: Books, step: Step) -> None:
    config = step.after.config
    for effect in step.effects:
        match effect:
            case fx.Serve():
                books.waiting.pop(effect.request, None)
                books.jobs[effect.request] = effect.consumer
            case fx.Reject():
                books.waiting.pop(effect.request, None)
            case fx.StartLoad():
                books.highest_epoch = max(books.highest_epoch, effect.epoch)
                books.orders[effect.consumer] = Order(
                    kind="load", epoch=effect.epoch, deadline=step.at + config.load_timeout_us
                )
            case fx.StartUnload():
                books.highest_epoch = max(books.highest_epoch, effect.epoch)
                books.orders[effect.consumer] = Order(
                    kind="unload",
                    epoch=effect.epoch,
                    deadline=step.at + config.unload_timeout_us,
                    server=config.consumers[effect.consumer].server
                    if effect.how == "driver"
                    else None,
                )


def _note_phases(books: Books, step: Step, tickets: Mapping[str, Ticket]) -> None:
    """Count who overtook whom, and remember who is owed."""
    requests = step.after.requests
    joined = frozenset(n for n in books.waiting if n in requests and _joined(step.after, n))
    served = {one.request for one in step.served}
    moved = [n for n in tickets if n in served or (n in joined and n not in step.books.joined)]
    for name in books.waiting:
        if name in joined or name in step.books.joined:
            continue
        _count(
            books, name, [n for n in moved if _overtakes(step, tickets[n], tickets[name])], tickets
        )
    books.joined = joined
    lost = {step.books.waiting[n].consumer for n in step.books.joined - books.waiting.keys()}
    books.deserted = (step.books.deserted | lost) & step.after.swaps.keys()
    # A swap that a planner of one's own wants for who is in already may end for nothing.
    ended = {note.consumer for note in step.notes if note.type == "SwapEnded"}
    # A swap may begin and end in one step.
    for name in (step.books.joined | _joining(step)) - joined:
        books.owed.pop(name, None)
        consumer = books.waiting[name].consumer if name in books.waiting else None
        if consumer and consumer not in ended and _is_in(step.after, consumer):
            books.owed[name] = books.waiting[name].consumer
    for held in (books.owed, books.overtakers, books.higher, books.takers):
        for name in [name for name in held if name not in books.waiting]:
            del held[name]


def _note_cold_starts(books: Books, step: Step) -> None:
    """See first requests begin; what is used besides can be theirs only as long as they are alone.

    Growth on a card belongs to nobody where somebody else has memory promised there.
    """
    books.cold_starts = {
        name: cold for name, cold in books.cold_starts.items() if name in step.before.promises
    }
    for one in step.served:
        known = one.consumer in books.cold_starts
        if one.consumer in step.after.promises and not known and step.consumer(one.consumer).lazy:
            used = {gpu: card.used_mib for gpu, card in step.after.cards.items()}
            books.cold_starts[one.consumer] = ColdStart(
                request=one.request, at=step.at, used_mib=used
            )
    for name, cold in books.cold_starts.items():
        others = [one for other, one in step.after.promises.items() if other != name]
        crowded = {gpu for promise in others for gpu in promise.mib}
        if crowded & cold.used_mib.keys():
            alone = {gpu: mib for gpu, mib in cold.used_mib.items() if gpu not in crowded}
            books.cold_starts[name] = evolve(cold, used_mib=alone)


def _note_engaged(books: Books, step: Step) -> None:
    engaged = set(step.books.jobs.values()) | set(books.jobs.values())
    for swap in (*step.before.swaps.values(), *step.after.swaps.values()):
        engaged |= {swap.target, *swap.victims}
    books.engaged_at |= dict.fromkeys(engaged, step.at)


def _joining(step: Step) -> set[str]:
    return {
        note.request
        for note in step.notes
        if note.type == "Waits" and note.request and note.details["why"] == Why.SWAP
    }


def _joined(state: State, name: str) -> bool:
    return state.requests[name].phase is Phase.JOINED


def _is_in(state: State, name: str) -> bool:
    """It was brought in, or may be started by the first request of those that wait."""
    belief = state.consumers[name]
    return belief.residency is Residency.RESIDENT or belief.cleared


def _overtakes(step: Step, one: Ticket, other: Ticket) -> bool:
    later = one.arrival > other.arrival and one.request != other.request
    return later and shares_card(step.consumer(one.consumer), step.consumer(other.consumer))


def _count(books: Books, name: str, overtakers: list[str], tickets: Mapping[str, Ticket]) -> None:
    own = tickets[name].priority
    high = {n for n in overtakers if tickets[n].priority > own}
    low = set(overtakers) - high
    if high:
        books.higher[name] = books.higher.get(name, frozenset()) | high
    if low:
        books.overtakers[name] = books.overtakers.get(name, frozenset()) | low
