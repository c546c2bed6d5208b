"""A state in the making: the working copy of one step, which nobody else sees.

Every change of the state is one of the methods here, so that the counts and orders that the state
keeps twice cannot come apart, and every effect and note passes through here.
"""

from bisect import insort
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from attrs import evolve

from mgpu_core.config import Config, Consumer
from mgpu_core.effects import Effect, Reject, SampleGpu, Serve, StartLoad, StartUnload
from mgpu_core.notes import Detail, Note, Reason
from mgpu_core.planners import PLANNERS, Planner
from mgpu_core.state import (
    ABSENT,
    JOINED,
    LOADING,
    QUEUED,
    RESIDENT,
    SERVING,
    UNKNOWN,
    UNLOADING,
    Card,
    ConsumerState,
    Counters,
    Operation,
    Promise,
    RequestState,
    Source,
    State,
    Swap,
    SwapPhase,
    changed,
    changed_by,
    made_of,
)
from mgpu_core.transitions import RESIDENCY, SWAP, Cause, Turn

T = TypeVar("T")
# What ends with a run: nobody waits or is served any more, and the cards are looked at anew.
WORK = (
    "requests",
    "queue",
    "overtaken",
    "overtaken_high",
    "reasons",
    "waiting",
    "serving",
    "owed",
    "swaps",
    "promises",
    "cards",
)

# What is believed of a consumer, but nobody waits for: only admission and the next probe ask.
# (And a preload, which waits for the first probe.)
UNSTIRRING = frozenset({"last_probe", "healthy", "probe_failures", "probe_error"})
# Whatever makes one restless, and who may not stay for ever when it is idle.
RESTLESS = frozenset({"operation", "busy_seen", "unload_cooldown", "cleared", "leaving"})


class Draft:
    """Open it on a state, change it, `close` it into the next state.

    Its dictionary holds the fields of the state and nothing else, so that they are copied at once,
    as in `changed`; what belongs to the step alone has slots.
    """

    __slots__ = (
        "__dict__",
        "_memo",
        "again",
        "arrived",
        "before",
        "calm",
        "concerned",
        "effects",
        "notes",
        "own_planner",
        "partial",
        "planner",
        "reread",
        "stirred",
    )
    config: Config
    at: int
    run: str
    draining: bool
    stopping: bool
    epoch: int
    arrivals: int
    consumers: Mapping[str, ConsumerState]
    retired: tuple[str, ...]
    requests: Mapping[str, RequestState]
    queue: tuple[str, ...]
    overtaken: Mapping[str, int]
    overtaken_high: Mapping[str, int]
    reasons: Mapping[str, Reason]
    waiting: Mapping[str, int]
    serving: Mapping[str, int]
    owed: Mapping[str, int]
    swaps: Mapping[str, Swap]
    promises: Mapping[str, Promise]
    cards: Mapping[int, Card]
    sample_error: str | None
    age: int
    last_work: int
    restore_due: bool
    preload_due: tuple[str, ...]
    wake: int | None
    counters: Counters
    calm_until: int
    known_restless: tuple[str, ...] | None
    known_deadline: int | None

    def __init__(self, state: State, at: int, planner: Planner | None) -> None:
        self.__dict__ = state.__dict__.copy()
        if at > state.at:
            self.at = at

        self.before = state
        self.effects: list[Effect] = []
        self.notes: list[Note] = []
        # Who waited in swaps that ended in this step, in the order in which to serve them.
        self.arrived: list[str] = []
        # Something came free or moved on, so that what was looked at before may have changed.
        self.again = False
        # Who alone may move on after this event; None: everybody.
        self.concerned: tuple[str, ...] | None = None
        # Only those were looked at.
        self.partial = False
        # Everybody was looked at, and there was nothing to do.
        self.calm = False
        self.own_planner = planner
        self.planner = planner or PLANNERS[self.config.eviction]
        self._memo: dict[Hashable, Any] = {}
        # Something changed that somebody may have waited for.
        self.stirred = False
        # A card was read, which keeps good for longer now, but nobody waited for that.
        self.reread = False

    def configure(self, config: Config) -> None:
        self.stir()
        self.known_restless = self.known_deadline = None
        self.config = config
        self.planner = self.own_planner or PLANNERS[config.eviction]

    def stir(self) -> None:
        """What was looked at before is to be looked at again."""
        self._memo.clear()
        self.stirred = True

    def close(self) -> State:
        """Give the next state. It has what was the draft's, so that ends here."""
        fields, self.__dict__ = self.__dict__, {}
        return made_of(State, fields)

    def _own(self, name: str) -> dict[Any, Any]:
        """Give a map of the state to be changed: a copy, made once a step where it is needed."""
        held: dict[Any, Any] = self.__dict__[name]
        if held is self.before.__dict__[name]:
            self.__dict__[name] = held = held.copy()
        return held

    # -------------------------------------------------------------------------- what goes out

    def do(self, effect: Effect) -> None:
        self.effects.append(effect)

    def sample(self) -> None:
        """Have the cards read, once a step."""
        if SampleGpu() not in self.effects:
            self.do(SampleGpu())

    def note(self, type_: str, /, **told: Detail) -> None:
        """Say why: `request` and `consumer` first, where it is about one, then the numbers."""
        self.notes.append(Note({"type": type_, **told}))

    # ------------------------------------------------------------------------------ consumers

    def known(self, name: str) -> Consumer | None:
        return self.config.consumers.get(name)

    def consumer(self, name: str) -> Consumer:
        return self.config.consumers[name]

    def update(self, name: str, **changes: Any) -> None:
        """Believe something else of it; what is the same as before is no change."""
        old = self.consumers[name]
        if changes.items() <= old.__dict__.items():
            return
        self._own("consumers")[name] = changed_by(old, changes)
        if not RESTLESS.isdisjoint(changes):
            self.known_restless = None
        if self.preload_due or not changes.keys() <= UNSTIRRING:
            self.stir()

    def put_consumer(self, name: str, state: ConsumerState) -> None:
        self.stir()
        self.known_restless = None
        self._own("consumers")[name] = state

    def drop_consumer(self, name: str) -> None:
        """Forget one that is no longer configured; whoever does so configures anew."""
        del self._own("consumers")[name]

    def drop_work(self) -> None:
        """Forget all requests, swaps and promises, and what the cards showed."""
        for name in WORK:
            setattr(self, name, type(getattr(self, name))())
        self.known_deadline = None
        self.stir()

    def move(self, name: str, cause: Cause, source: Source, **changes: Any) -> None:
        """Change what is believed of a consumer's memory, along the table only."""
        old = self.consumers[name]
        residency = RESIDENCY.get((old.residency, cause))
        assert residency is not None, f"{name}: {old.residency} does not move when {cause}"
        if residency is not UNKNOWN:
            changes.setdefault("uncertain", None)
        if residency is not LOADING and residency is not UNLOADING:
            changes["operation"] = None
        if residency is not old.residency:
            changes.setdefault("moved", self.at)
            self.again = True
            self.note(
                "Moved",
                consumer=name,
                old=old.residency.value,
                new=residency.value,
                because=cause.value,
                source=source.value,
            )
        self.update(name, residency=residency, source=source, **changes)

    def present(self) -> tuple[str, ...]:
        """Give, sorted, who may hold memory or has some set aside."""
        return self.remember(
            "present",
            lambda: tuple(
                name
                for name, state in self.consumers.items()
                if state.residency is not ABSENT or name in self.swaps or name in self.promises
            ),
        )

    def restless(self) -> tuple[str, ...]:
        """Give those for whom time alone, or the end of what they do, can change something."""
        if self.known_restless is None:
            self.known_restless = tuple(
                name
                for name, state in self.consumers.items()
                if state.operation is not None
                or state.busy_seen is not None
                or state.unload_cooldown is not None
                or state.cleared
                or state.leaving
                or self.config.consumers[name].idle_unload_us is not None
            )
        return self.known_restless

    def first_deadline(self) -> int | None:
        """Give when the first wait has to end; None: nobody waits."""
        if self.known_deadline is None and self.overtaken:
            self.known_deadline = min(self.requests[name].deadline for name in self.overtaken)
        return self.known_deadline

    def remember(self, what: Hashable, make: Callable[[], T]) -> T:
        """Make something about memory and work once, until any of that changes."""
        if what in self._memo:
            found: T = self._memo[what]
            return found
        self._memo[what] = made = make()
        return made

    def siblings(self, name: str) -> tuple[str, ...]:
        """Give the other consumers of its server."""
        return self.config.siblings[name]

    # ----------------------------------------------------------------------------- operations

    def start_load(self, name: str, epoch: int) -> None:
        operation = Operation(
            kind="load", epoch=epoch, since=self.at, deadline=self.at + self.config.load_timeout_us
        )
        self.move(
            name,
            Cause.LOAD_STARTED,
            Source.COMMAND,
            operation=operation,
            touched=self.at,
            # Should the load fail as well, what it holds since before is still there.
            uncertain="unload" if self.consumers[name].uncertain == "unload" else None,
        )
        self.counters = changed(self.counters, loads=self.counters.loads + 1)
        self.do(StartLoad(consumer=name, epoch=epoch))

    def goes_by_route(self, name: str) -> bool:
        """Routes come first; one whose routes gave back too little is stopped by its driver."""
        consumer, leaky_mib = self.consumer(name), self.consumers[name].leaky_mib
        return consumer.unload_route and (leaky_mib is None or consumer.driver == "none")

    def start_unload(self, name: str, epoch: int, *, because: str) -> None:
        """Send it out, with all of its server where only a stop of that helps."""
        old, by_route = self.consumers[name], self.goes_by_route(name)
        operation = Operation(
            kind="unload",
            epoch=epoch,
            since=self.at,
            deadline=self.at + self.config.unload_timeout_us,
            how="routes" if by_route else "driver",
        )
        together = (name,) if by_route else (name, *self.siblings(name))
        for one in together:
            if self.consumers[one].residency is ABSENT and one != name:
                continue
            self.move(
                one,
                Cause.UNLOAD_STARTED,
                Source.COMMAND,
                operation=operation,
                touched=self.at,
                cleared=False,
                starter=None,
            )
        self.counters = changed(self.counters, evictions=self.counters.evictions + 1)
        self.age = max(self.age, old.credit)
        self.do(StartUnload(consumer=name, epoch=epoch, how=operation.how))
        self.note("Unloading", consumer=name, epoch=epoch, how=operation.how, because=because)

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    # ------------------------------------------------------------------------------- requests

    def admit(self, request: RequestState) -> None:
        self._own("requests")[request.request] = request
        if self.known_deadline is not None:
            self.known_deadline = min(self.known_deadline, request.deadline)
        self._count("waiting", request.consumer, 1)
        self._enqueue(request.request)

    def enqueue_again(self, name: str, *, owed: bool) -> None:
        """Give a joined request its old place back."""
        request = self.requests[name]
        self._own("requests")[name] = changed(request, phase=QUEUED, owed=owed)
        if owed and not request.owed:
            self._count("owed", request.consumer, 1)
        self._enqueue(name)
        self.stir()
        self.again = True

    def join(self, name: str) -> None:
        uncounted = self._count_overtakes(name)
        request = self._leave_queue(name)
        self._own("requests")[name] = changed(
            request, phase=JOINED, owed=False, uncounted=uncounted
        )
        self.stir()

    def grant(self, name: str) -> None:
        """Let it be served now."""
        uncounted = self._count_overtakes(name)
        request = self._leave_queue(name)
        overtaken = self._forget_wait(request)
        self._own("requests")[name] = changed(
            request, phase=SERVING, owed=False, uncounted=uncounted, granted=self.at
        )
        self._count("waiting", request.consumer, -1)
        self._count("serving", request.consumer, 1)
        state = self.consumers[request.consumer]
        self.update(
            request.consumer,
            touched=self.at,
            idle_since=None,
            total_requests=state.total_requests + 1,
        )
        waited = self.at - request.at
        self.counters = changed(self.counters, jobs=self.counters.jobs + 1, last_wait_us=waited)
        self.last_work = self.at
        self.restore_due = True
        self.do(Serve(request=name, consumer=request.consumer))
        self.note(
            "Granted",
            request=name,
            consumer=request.consumer,
            waited_us=waited,
            overtaken=overtaken,
        )

    def drop(self, name: str) -> RequestState:
        """Take a waiting request out of everything; who answers it is somebody else's."""
        assert self.requests[name].phase is not SERVING, f"{name} is being served"
        request = self._leave_queue(name)
        self._forget_wait(request)
        del self._own("requests")[name]
        self._count("waiting", request.consumer, -1)
        self.again = True
        return request

    def brought_in(self, name: str) -> None:
        """End a load that no client asked for: its consumer is in."""
        request = self.drop(name)
        waited = self.at - request.at
        self.note("BroughtIn", request=name, consumer=request.consumer, waited_us=waited)

    def end_serving(self, name: str) -> RequestState:
        request: RequestState = self._own("requests").pop(name)
        assert request.phase is SERVING, f"{name} is not being served"
        self._count("serving", request.consumer, -1)
        self.again = True
        return request

    def reject(
        self,
        name: str,
        code: str,
        message: str,
        *,
        retryable: bool = True,
        retry_after_us: int | None = None,
    ) -> None:
        """End a waiting request with an error."""
        request = self.drop(name)
        self.refuse(
            name,
            code,
            message,
            consumer=request.consumer,
            retryable=retryable,
            retry_after_us=retry_after_us,
            answered=request.operator is None,
        )

    def refuse(
        self,
        name: str,
        code: str,
        message: str,
        *,
        consumer: str | None,
        retryable: bool,
        retry_after_us: int | None = None,
        answered: bool = True,
    ) -> None:
        """Answer a request that was not admitted, or no longer is."""
        seconds = None if retry_after_us is None else max(1, -(-retry_after_us // 1_000_000))
        if answered:
            self.do(
                Reject(
                    request=name,
                    code=code,
                    message=message,
                    consumer=consumer,
                    retryable=retryable,
                    retry_after=seconds,
                )
            )
        about = {"request": name} if consumer is None else {"request": name, "consumer": consumer}
        self.note("Rejected", **about, code=code, message=message)

    def why(self, name: str, reason: Reason) -> Reason:
        """Note why a request waits, where that is news; gives the reason as it is kept."""
        old = self.reasons.get(name)
        if old is reason or old == reason:
            return old
        self._own("reasons")[name] = reason
        request = self.requests[name]
        doing = {"doing": reason.doing} if reason.doing else {}
        self.note(
            "Waits",
            request=name,
            consumer=request.consumer,
            why=reason.why.value,
            who=reason.who,
            **doing,
            overtaken=self._overtaken(name),
            **reason.numbers,
        )
        return reason

    def _overtaken(self, name: str) -> int:
        return self.overtaken.get(name, 0) + self.overtaken_high.get(name, 0)

    def joined(self, target: str) -> list[str]:
        """Give who waits in the swap of this target, in queue order."""
        if target not in self.waiting:
            return []
        names = [
            name
            for name, request in self.requests.items()
            if request.phase is JOINED and request.consumer == target
        ]
        return sorted(names, key=self._place)

    def waiting_for(self, consumer: str) -> list[str]:
        """Give who waits for this consumer, queued or joined, in queue order."""
        names = [
            name
            for name, request in self.requests.items()
            if request.phase is not SERVING and request.consumer == consumer
        ]
        return sorted(names, key=self._place)

    def _place(self, name: str) -> tuple[int, int]:
        request = self.requests[name]
        return (-request.priority, request.arrival)

    def _enqueue(self, name: str) -> None:
        queue = list(self.queue)
        insort(queue, name, key=self._place)
        self.queue = tuple(queue)
        self._own("overtaken").setdefault(name, 0)
        self._own("overtaken_high").setdefault(name, 0)

    def _leave_queue(self, name: str) -> RequestState:
        """Take it out of the queue and of those who are owed, wherever it is in."""
        request = self.requests[name]
        if request.phase is QUEUED:
            place = self.queue.index(name)
            self.queue = self.queue[:place] + self.queue[place + 1 :]
        if request.owed:
            self._count("owed", request.consumer, -1)
        return request

    def _forget_wait(self, request: RequestState) -> int:
        """Forget why and how long it may wait; gives how often it was overtaken."""
        if request.deadline == self.known_deadline:
            self.known_deadline = None
        name = request.request
        if name in self.reasons:
            del self._own("reasons")[name]
        equals: int = self._own("overtaken").pop(name)
        higher: int = self._own("overtaken_high").pop(name)
        return equals + higher

    def _count_overtakes(self, name: str) -> tuple[str, ...] | None:
        """Let everybody who came before on its cards count this one: now, or once it is queued.

        Gives those who do so later.
        """
        overtaker, requests = self.requests[name], self.requests
        if overtaker.operator is not None:
            return overtaker.uncounted
        if overtaker.uncounted is None:
            before = self._came_before(overtaker)
        else:
            before = [one for one in overtaker.uncounted if one in self.overtaken]
        later = []
        for one in before:
            request = requests[one]
            if request.phase is QUEUED:
                self._count_overtake(request, overtaker)
            else:
                later.append(one)
        return tuple(later)

    def _came_before(self, request: RequestState) -> list[str]:
        """Give those who wait and came before it on its cards, the queued ones first."""
        if len(self.overtaken) == 1:
            return []  # it waits alone
        requests, arrival = self.requests, request.arrival
        sharing = self.config.sharing[request.consumer]
        return [
            name
            for name in (*self.queue, *self._all_joined())
            if (other := requests[name]).arrival < arrival and other.consumer in sharing
        ]

    def _all_joined(self) -> list[str]:
        if len(self.queue) == len(self.overtaken):
            return []
        return [n for n, request in self.requests.items() if request.phase is JOINED]

    def _count_overtake(self, request: RequestState, overtaker: RequestState) -> None:
        higher = overtaker.priority > request.priority
        counts = self._own("overtaken_high" if higher else "overtaken")
        bound = self.config.overtake_bound
        counts[request.request] = count = counts[request.request] + 1
        if bound is None or request.only_if_free:
            return
        if count == (2 * bound if higher else bound):
            self.again = True
            self.note("Promoted", request=request.request, consumer=request.consumer)

    # ------------------------------------------------------------------------ swaps, promises

    def turn(self, swap: Swap, turn: Turn, **changes: Any) -> Swap:
        """Bring a swap on, along the table only."""
        phase = SWAP.get((swap.phase, turn))
        assert phase is not None, f"swap of {swap.target}: {swap.phase} knows no {turn}"
        self.again = True
        return self.put_swap(evolve(swap, phase=phase, **changes))

    def put_swap(self, swap: Swap) -> Swap:
        self.stir()
        self._own("swaps")[swap.target] = swap
        return swap

    def drop_swap(self, swap: Swap) -> None:
        self.stir()
        del self._own("swaps")[swap.target]
        self.again = True

    def put_promise(self, name: str, promise: Promise) -> None:
        self.stir()
        self._own("promises")[name] = promise

    def give_up_promise(self, name: str) -> None:
        if name in self.promises:
            del self._own("promises")[name]
            self.stir()
            self.again = True

    def put_card(self, gpu: int, card: Card) -> None:
        self._own("cards")[gpu] = card
        self._memo.clear()
        if self.preload_due or self._some_wait_for_memory():
            self.stir()
        else:
            self.reread = True

    def _some_wait_for_memory(self) -> bool:
        """Say whether anybody asks what is free: a swap that waits for its victims' memory, or who
        is queued for one that is not in. Who is queued for one that is in waits for a place there.
        """
        return any(swap.phase is SwapPhase.SETTLING for swap in self.swaps.values()) or any(
            self.consumers[self.requests[name].consumer].residency is not RESIDENT
            for name in self.queue
        )

    def _count(self, what: str, name: str, by: int) -> None:
        """Change a count; nobody stays in with zero."""
        self.stir()
        counts = self._own(what)
        counts[name] = count = counts.get(name, 0) + by
        assert count >= 0, f"{name}: a count fell below zero"
        if not count:
            del counts[name]
