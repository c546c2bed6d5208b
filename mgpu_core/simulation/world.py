"""A simulated host: cards, services, clients, other processes, time.

It keeps its own books (what is really in memory, which process is up, what really runs) and never
asks the scheduler what is true: it sees its effects, carries them out, and what comes of them
comes back as events. Time is a heap of happenings, each at a virtual microsecond.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush
from typing import Any, Literal, TypeAlias

from attrs import define, evolve, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer
from mgpu_core.effects import Effect
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.chance import Chance, likely, pick
from mgpu_core.simulation.faults import CALM, Faults
from mgpu_core.state import Residency, State, first_belief

START_US = 1_780_000_000_000_000
MS_US = 1_000
IN = Residency.RESIDENT
# What a card has where nobody configured a size.
CARD_MIB = 24_000
LOAD_US = (1 * SECOND_US, 3 * SECOND_US, 10 * SECOND_US, 25 * SECOND_US)


# ------------------------------------------------------------------------------- the script


@frozen(kw_only=True)
class Ask:
    """A client comes. It leaves after `patience_us`, wherever its request is then.

    `request`: its id, where it shall have a certain one; `outcome`: how work on it ends by itself.
    """

    consumer: str
    request: str | None = None
    kind: str = ""
    outcome: ev.Outcome = "ok"
    work_us: int = SECOND_US
    priority: int | None = None
    patience_us: int | None = None
    deadline_us: int | None = None


@frozen(kw_only=True)
class Foreign:
    """From now on, processes that are nobody's here hold so much on a card."""

    gpu: int
    mib: int


@frozen(kw_only=True)
class Busy:
    """Somebody works with a service past the broker."""

    consumer: str
    us: int


@frozen(kw_only=True)
class Turns:
    """A service is found up or down, loaded or not (None: as before), and nobody here did it.

    What it is just doing for the broker goes on undisturbed.
    """

    consumer: str
    up: bool = True
    loaded: bool | None = None


@frozen(kw_only=True)
class BrokerCrash:
    """The broker dies and is back after a while; the services go on."""

    down_us: int


@frozen(kw_only=True)
class ClockStops:
    us: int


# An event is one of an operator, sent as it is; its `at` is filled in.
Act: TypeAlias = Ask | Foreign | Busy | Turns | BrokerCrash | ClockStops | ev.Event
# Microseconds after the start, and what happens then.
Script: TypeAlias = tuple[tuple[int, Act], ...]


# -------------------------------------------------------------------------------- the truth


Deed: TypeAlias = Literal["load", "unload", "stop", "start"]


@frozen(kw_only=True)
class Took:
    """How one deed of a service went: how long until its answer, and which one.

    `memory_us`: how long after that its memory is free; of a cold start, from its beginning until
    the memory is taken.
    """

    us: int
    error: str | None = None
    memory_us: int = 0


@frozen(kw_only=True)
class Tape:
    """How a deed of a service is to go, time after time; `then`: once these are over."""

    takes: tuple[Took, ...] = ()
    then: Took

    def take(self, number: int) -> Took:
        return self.takes[number] if number < len(self.takes) else self.then


@frozen(kw_only=True)
class Traits:
    """What a service is like: nobody tells the scheduler."""

    load_us: int = 3 * SECOND_US
    unload_us: int = 200 * MS_US
    tells_residency: bool = True
    tells_busy: bool = True
    tells_vram: bool = False
    mute_at_work: bool = False
    # It works on one job after another, however many it was given.
    in_turn: bool = False
    # Between how many tenths of its usual time a load or unload takes.
    spread: tuple[int, int] = (8, 15)
    # What it really takes where its configuration knows nothing.
    unknown_mib: int = 0
    # What it really takes on a card, whatever its configuration says.
    holds_mib: Mapping[int, int] = field(factory=dict)
    # Between how many milliseconds its answer to a probe takes.
    probe_ms: tuple[int, int] = (1, 40)
    # What is laid down instead of drawn: loads, unloads by route, stops by driver, cold starts.
    tapes: Mapping[Deed, Tape] = field(factory=dict)

    @classmethod
    def drawn(cls, chance: Chance) -> "Traits":
        return cls(
            load_us=pick(chance, LOAD_US),
            unload_us=pick(chance, (200 * MS_US, 50 * MS_US, 2 * SECOND_US, 10 * SECOND_US)),
            tells_residency=not likely(chance, 300),
            tells_busy=not likely(chance, 300),
            tells_vram=likely(chance, 200),
            mute_at_work=likely(chance, 300),
            unknown_mib=pick(chance, (0, 3_000, 9_000)),
        )


@define
class Service:
    """One consumer as it really is."""

    consumer: Consumer
    traits: Traits
    up: bool = True
    loaded: bool = False
    mib: dict[int, int] = field(factory=dict)
    jobs: set[str] = field(factory=set)
    busy_until: int = 0
    # When it will have worked off what it was given, where it works in turn.
    free_at: int = 0
    # Until when it works for a client of a broker that is no more; 0 once it has worked for another
    # since, so that nobody could tell the one from the other.
    left_until: int = 0
    # Grows whenever what it was about to do with its memory no longer holds.
    turn: int = 0
    # The turn in which its first request brings it in.
    starting: int = -1
    # How often it did what is laid down.
    did: Counter[Deed] = field(factory=Counter)

    def took(self, deed: Deed) -> Took | None:
        """Do it once more, and say how that is laid down to go; None: it is not."""
        if (tape := self.traits.tapes.get(deed)) is None:
            return None
        self.did[deed] += 1
        return tape.take(self.did[deed] - 1)

    def target_mib(self, gpu: int) -> int:
        if self.consumer.vram_managed:
            return 0
        declared = self.traits.holds_mib.get(gpu, self.consumer.vram_mib.get(gpu, 0))
        return declared or (self.traits.unknown_mib if self.consumer.vram_auto else 0)


@define
class Command:
    """A load or unload that the scheduler asked for; it is answered exactly once."""

    kind: type[ev.UnloadDone] | type[ev.SwapDone]
    consumer: str
    epoch: int
    how: fx.How = "routes"
    error: str | None = None
    answered: bool = False
    took: Took | None = None

    @property
    def deed(self) -> Deed:
        if self.kind is ev.SwapDone:
            return "load"
        return "unload" if self.how == "routes" else "stop"


@define
class Client:
    ask: Ask
    granted: bool = False


Happening: TypeAlias = Callable[..., ev.Event | None]


class World:
    """One host and the broker's scheduler in it. `run` lets it live."""

    def __init__(
        self,
        config: Config,
        *,
        chance: Chance,
        script: Script = (),
        faults: Faults = CALM,
        scheduler: Scheduler | None = None,
        traits: Mapping[str, Traits] | None = None,
        resident: frozenset[str] | None = None,
        rereads: bool = False,
        state: State | None = None,
        cards_mib: Mapping[int, int] | None = None,
        sample_ms: tuple[int, int] = (1, 50),
        repolls: bool = False,
        polls: Iterable[int] = (),
        resumes: bool = False,
        renders: frozenset[str] = frozenset(),
    ) -> None:
        self.config = config
        # The cards are read whenever a load or unload has ended, which takes the place of polls
        # where these come so seldom that they don't count.
        self.rereads = rereads
        self.chance = chance
        self.faults = faults
        self.scheduler = scheduler or Scheduler(config)
        # What an earlier run has left to know, its time included: this one begins then.
        self.state: State = state or self.scheduler.initial()
        start_us = state.at if state else START_US
        self.now = start_us
        self.runs = 0
        self.down = True
        self.clock_stands_until = 0
        self.clock = start_us
        self.sample_ms = sample_ms
        # As a broker reads them: just after it was asked to, and the next poll comes an interval
        # after the last reading, whyever that was taken.
        self.repolls = repolls
        self._last_reading = 0
        # When the first polls come, where that is laid down.
        self._polls = iter(polls)
        # The broker has run before: nothing starts, its state is what it knows already.
        self.resumes = resumes
        # Who goes on with its work whether or not somebody waits for it, and says so.
        self.renders = renders
        self._again: list[Ask] = []
        # Whose work an unload has ended that nobody forced.
        self.cut: str | None = None
        self.foreign: dict[int, int] = dict.fromkeys(config.gpus, 0)
        self.totals = {n: g.total_mib or CARD_MIB for n, g in config.gpus.items()}
        self.totals |= cards_mib or {}
        self.clients: dict[str, Client] = {}
        # When the work of each request that was granted began, or will.
        self.began: dict[str, int] = {}
        self.asked = 0
        self.overcommitted = 0
        self.last_event: ev.Event | None = None
        self.lanes: dict[str, deque[Command]] = {}
        self._alarm: int | None = None
        self._lost: list[tuple[int, Callable[..., ev.Event], Any]] = []
        self._heap: list[tuple[int, int, Happening, tuple[Any, ...]]] = []
        self._order = 0
        self._traits = dict(traits or {})
        self.services: dict[str, Service] = {}
        for name, consumer in config.consumers.items():
            self._install(consumer, resident is None or name in resident)
        for offset, act in script:
            self._at(start_us + offset, self._act, act)
        self._at(start_us, self._start_broker)

    # ------------------------------------------------------------------------------- running

    def run(self, until_us: int | None = None) -> Iterator[tuple[ev.Event, Transition]]:
        """Give each event and what the scheduler made of it, up to a virtual time."""
        heap = self._heap
        while heap and (until_us is None or heap[0][0] <= until_us):
            self.now, _, happening, args = heappop(heap)
            event = happening(*args)
            if event is not None and not self.down:
                self.last_event = event
                transition = self.scheduler.step(self.state, event)
                self.state = transition.state
                for effect in transition.effects:
                    self._carry_out(effect)
                yield event, transition

    @property
    def open_commands(self) -> list[Command]:
        return [command for lane in self.lanes.values() for command in lane]

    def used_mib(self, gpu: int) -> int:
        ours = sum(service.mib.get(gpu, 0) for service in self.services.values())
        return ours + self.foreign.get(gpu, 0)

    def is_as_assumed(self) -> bool:
        """At the start, each service is as a broker that knows nothing takes it to be, or tells."""
        return all(
            one.traits.tells_residency or one.loaded is (first_belief(one.consumer).residency is IN)
            for one in self.services.values()
        )

    def happen(self, act: Act) -> None:
        """Let something happen from outside, next."""
        self._in(0, self._act, act)

    def leave(self, request: str) -> None:
        """Let a client leave, next, if it is still there."""
        self._in(0, self._leave, request)

    def die(self, consumer: str) -> None:
        """Let a service crash, next, with all of its server."""
        self._in(0, self._die, self.services[consumer])

    @property
    def next_at(self) -> int:
        """The time of whatever happens next."""
        return self._heap[0][0] if self._heap else self.now

    def heal(self) -> None:
        """No fault from now on: what hangs answers, what leaks lets go, nobody else is here."""
        self.faults = CALM
        self.foreign = dict.fromkeys(self.foreign, 0)
        self.clock_stands_until = 0
        for service in self.services.values():
            service.busy_until = service.left_until = 0
            if not service.up and not service.consumer.startable:
                service.up = True
            if not service.loaded and not service.jobs and not self._loads(service):
                service.mib = self._residue(service)
        for lane in list(self.lanes.values()):
            if lane:
                self._in(MS_US, self._finish, lane[0])
        for lost in self._lost:
            self._in(MS_US, self._arrive, *lost)
        self._lost.clear()
        if self._alarm is not None:
            self._at(max(self.now, self._alarm), self._tick, self._alarm)

    def make_peace(self) -> None:
        """Heal, and let the operator take back whatever could keep anybody waiting."""
        self.heal()
        self._heap = [item for item in self._heap if item[2] != self._act]
        heapify(self._heap)
        self._in(1, self._act, ev.Resume(at=0))
        for name in self.config.consumers:
            self._in(1, self._act, ev.Pin(at=0, consumer=name, pinned=False))

    def _at(self, time: int, happening: Happening, *args: Any) -> None:
        self._order += 1
        heappush(self._heap, (time, self._order, happening, args))

    def _in(self, us: int, happening: Happening, *args: Any) -> None:
        self._at(self.now + us, happening, *args)

    def _stamp(self) -> int:
        """Give the time as the broker's clock shows it."""
        if self.now >= self.clock_stands_until:
            self.clock = self.now
        return self.clock

    def _tell(self, us: int, kind: type[ev.Event], **fields: Any) -> None:
        """Send the broker of this run an event after a while."""
        self._in(us, self._arrive, self.runs, kind, fields)

    def _arrive(self, run: int, kind: Callable[..., ev.Event], fields: Any) -> ev.Event | None:
        return kind(at=self._stamp(), **fields) if run == self.runs else None

    def _fault(self, name: str) -> bool:
        return likely(self.chance, getattr(self.faults, name))

    # ---------------------------------------------------------------------------- the broker

    def _start_broker(self) -> ev.Event:
        self.down = False
        self.runs += 1
        self._alarm = None
        self._in(0, self._poll, self.runs)
        for number, name in enumerate(self.config.consumers):
            self._in((number + 1) * 10 * MS_US, self._watch, self.runs, name)
        for ask in self._again:
            self._in(2 * MS_US, self._come, ask)
        self._again = []
        if self.resumes and self.runs == 1:
            return ev.Tick(at=self._stamp())
        return ev.Started(at=self._stamp(), run=f"run-{self.runs}")

    def _poll(self, run: int) -> None:
        if run != self.runs:
            return
        interval_us = self.state.config.poll_interval_us
        if self.repolls and self.now < (due := self._last_reading + interval_us):
            self._at(due, self._poll, run)
        else:
            self._sample()
            self._poll_later(run)

    def _poll_later(self, run: int) -> None:
        laid_down = next((time for time in self._polls if time > self.now), None)
        if laid_down is None:
            self._in(self.state.config.poll_interval_us, self._poll, run)
        else:
            self._at(laid_down, self._poll_as_laid_down, run)

    def _poll_as_laid_down(self, run: int) -> None:
        if run == self.runs:
            self._sample()
            self._poll_later(run)

    def _watch(self, run: int, name: str) -> None:
        if run == self.runs and name in self.config.consumers:
            self._probe(name)
            self._in(self.config.probe_interval_us, self._watch, run, name)

    def _tick(self, time: int) -> ev.Event | None:
        if self._alarm != time:
            return None  # another alarm has replaced it
        if self._stamp() < time:
            self._at(max(self.clock_stands_until, self.now + 1), self._tick, time)
            return None
        self._alarm = None
        return ev.Tick(at=self.clock)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case fx.WakeAt():
                self._alarm = effect.time
                self._at(max(self.now, effect.time), self._tick, effect.time)
            case fx.SampleGpu():
                if self.repolls:
                    self._in(1, self._sample)
                else:
                    self._sample()
            case fx.Probe():
                self._probe(effect.consumer)
            case fx.Serve():
                self._serve(effect.request, effect.consumer)
            case fx.Reject():
                self.clients.pop(effect.request, None)
            case fx.StartLoad():
                self._order_command(Command(ev.SwapDone, effect.consumer, effect.epoch))
            case fx.StartUnload():
                self._look_for_a_cut(effect)
                self._order_command(
                    Command(ev.UnloadDone, effect.consumer, effect.epoch, effect.how)
                )

    # ------------------------------------------------------------------------- what happens

    def _act(self, act: Act) -> ev.Event | None:
        match act:
            case Ask():
                return self._come(act)
            case Foreign():
                free = self.totals.get(act.gpu, 0) - self.used_mib(act.gpu)
                self.foreign[act.gpu] = min(act.mib, self.foreign.get(act.gpu, 0) + max(0, free))
            case Busy():
                if act.consumer in self.services:
                    service = self.services[act.consumer]
                    service.busy_until = max(service.left_until, self.now + act.us)
            case Turns():
                self._turn(act)
            case BrokerCrash():
                if not self.down:
                    self._crash(act)
            case ClockStops():
                self._stamp()
                self.clock_stands_until = self.now + act.us
            case ev.Reconfigured() if not self.down:
                self._reconfigure(act.config)
                return evolve(act, at=self._stamp())
            case _:
                return evolve(act, at=self._stamp())
        return None

    def _come(self, ask: Ask) -> ev.Event | None:
        if self.down:
            return None
        self.asked += 1
        request = ask.request or f"r{self.asked}"
        self.clients[request] = Client(ask)
        if ask.patience_us is not None:
            self._in(ask.patience_us, self._leave, request)
        at = self._stamp()
        return ev.Request(
            at=at,
            request=request,
            consumer=ask.consumer,
            kind=ask.kind,
            priority=ask.priority,
            deadline=None if ask.deadline_us is None else at + ask.deadline_us,
        )

    def _leave(self, request: str) -> ev.Event | None:
        client = self.clients.get(request)
        if client is None:
            return None
        if not client.granted:
            del self.clients[request]
            if self._fault("answered_twice"):
                self._tell(MS_US, ev.Cancel, request=request)
        elif client.ask.consumer not in self.renders:
            self._job_ends(request, "disconnected", 20 * MS_US)
        return ev.Cancel(at=self._stamp(), request=request)

    def _turn(self, act: Turns) -> None:
        service = self.services.get(act.consumer)
        if service is None or self.lanes[service.consumer.server] or service.jobs:
            return
        service.up = act.up
        loaded = act.up and (service.loaded if act.loaded is None else act.loaded)
        if loaded == service.loaded:
            return
        self._forget_memory(service)
        if loaded and self._fits(service, need := self._steady(service)):
            service.loaded, service.mib = True, need

    def _crash(self, act: BrokerCrash) -> None:
        """What was said to the broker is lost, and so is what it was about to order."""
        self.runs += 1
        self.down = True
        for service in self.services.values():
            if service.consumer.name in self.renders and service.jobs:
                ends = [self.began[one] + self.clients[one].ask.work_us for one in service.jobs]
                service.left_until = service.busy_until = max(service.busy_until, *ends)
        if self.renders:  # who waited comes again as soon as there is somebody to ask
            self._again = [one.ask for one in self.clients.values() if not one.granted]
        self.clients.clear()
        for lane in self.lanes.values():
            while len(lane) > 1:
                lane.pop()
        for service in self.services.values():
            service.jobs.clear()
        self._in(act.down_us, self._start_broker)

    def _reconfigure(self, config: Config) -> None:
        for name, consumer in config.consumers.items():
            if name in self.services:
                self.services[name].consumer = consumer
            else:
                self._install(consumer, resident=False)
            if name not in self.config.consumers:
                self._in(10 * MS_US, self._watch, self.runs, name)
        self.config = config

    def _install(self, consumer: Consumer, resident: bool) -> None:  # noqa: FBT001
        traits = self._traits.get(consumer.name) or Traits.drawn(self.chance)
        service = self.services[consumer.name] = Service(consumer, traits)
        self.lanes.setdefault(consumer.server, deque())
        if consumer.driver == "process":
            service.up = False
        elif resident and (consumer.load_route or not consumer.unload_route):
            need = {gpu: service.target_mib(gpu) for gpu in consumer.vram_mib}
            if all(self.used_mib(g) + n <= self.totals.get(g, n) for g, n in need.items()):
                service.loaded, service.mib = True, need

    # ----------------------------------------------------------------------- loads and unloads

    def _order_command(self, command: Command) -> None:
        """One server's commands are carried out in order; a forced unload first ends a load."""
        lane = self.lanes[self.services[command.consumer].consumer.server]
        lane.append(command)
        first = lane[0]
        if first is command:
            self._begin(command)
        elif (
            command.kind is ev.UnloadDone
            and first.kind is ev.SwapDone
            and (command.consumer == first.consumer or command.how == "driver")
        ):
            first.error = "aborted"
            self._in(MS_US, self._finish, first)

    def _look_for_a_cut(self, unload: fx.StartUnload) -> None:
        """Note an unload that ends what it works at, as far as looking tells. Force may."""
        service = self.services[unload.consumer]
        by_driver = unload.how == "driver"
        for one in self._of_server(service) if by_driver else (service,):
            tells = one.up and one.traits.tells_busy and not one.traits.mute_at_work
            forced = isinstance(self.last_event, ev.Unload) and self.last_event.force
            if (one.jobs or (self.now < one.left_until and tells)) and not forced:
                self.cut = one.consumer.name

    def _begin(self, command: Command) -> None:
        service = self.services[command.consumer]
        loads = command.kind is ev.SwapDone
        which = "load" if loads else "unload"
        command.took = service.took(command.deed)
        if command.took is not None:
            us, command.error = command.took.us, command.took.error
        else:
            us = service.traits.load_us if loads else service.traits.unload_us
            us = us * self.chance.randint(*service.traits.spread) // 10
        timeout_us = self.config.load_timeout_us if loads else self.config.unload_timeout_us
        if self._fault(f"{which}_hangs"):
            us = timeout_us + self.chance.randint(1, 30) * SECOND_US
        elif self._fault(f"{which}_fails"):
            command.error = f"{which}_failed"
        elif loads and self._fault("load_late"):
            us *= 4
        if loads and command.error is None:
            for one in self._of_server(service):
                one.up = True
            if not service.loaded and not service.consumer.lazy:
                self._grow(service, us)
        self._in(us, self._finish, command)

    def _finish(self, command: Command) -> ev.Event | None:
        """Answer a command, and go on to the next one of its server."""
        if command.answered:
            return None
        command.answered = True
        service = self.services[command.consumer]
        if command.kind is ev.UnloadDone:
            if command.error is None:
                self._let_go(service, command)
        elif command.error is None:
            self._loaded(service, command)
        elif not service.loaded:
            self._forget_memory(service)
        lane = self.lanes[service.consumer.server]
        if lane and lane[0] is command:
            lane.popleft()
            if lane:
                self._begin(lane[0])
        if self.rereads:
            self._in(SECOND_US, self._sample)
        fields = {
            "consumer": command.consumer,
            "epoch": command.epoch,
            "error": command.error,
        }
        return self._answer(command.kind, fields)

    def _answer(self, kind: Callable[..., ev.Event], fields: Any) -> ev.Event | None:
        """Send an answer: once, twice, after others, or only when all is well again."""
        if kind is not ev.ServeDone and self._fault("answer_lost"):
            self._lost.append((self.runs, kind, fields))
            return None
        if self._fault("answered_twice"):
            again_us = pick(self.chance, (1, 0, self.chance.randint(1, 60))) * SECOND_US
            self._in(again_us, self._arrive, self.runs, kind, fields)
        if self._fault("answered_late"):
            late_us = self.chance.randint(1, 30) * 100 * MS_US
            self._in(late_us, self._arrive, self.runs, kind, fields)
            return None
        return kind(at=self._stamp(), **fields)

    def _loaded(self, service: Service, command: Command) -> None:
        if service.consumer.lazy:
            return  # its process is up; its first request takes the memory
        need = self._steady(service)
        if not service.loaded and not self._fits(service, need):
            self.overcommitted += 1
            command.error = "out_of_memory"
            self._forget_memory(service)
            return
        service.turn += 1
        service.loaded, service.up, service.mib = True, True, need

    def _let_go(self, service: Service, command: Command) -> None:
        """An unload was accepted: the memory comes free now, later, or not at all."""
        frees_us = command.took.memory_us if command.took else None
        if command.how == "driver":
            for one in self._of_server(service):
                one.turn += 1
                one.loaded, one.up = False, False
                self._end_jobs(one)
                if frees_us:
                    self._in(frees_us, self._set_memory, one, one.turn, {})
                else:
                    one.mib = {}
            return
        service.turn += 1
        service.loaded = False
        self._end_jobs(service)
        if self._fault("unload_keeps"):
            return
        lag_us = pick(self.chance, (50 * MS_US, 0, 500 * MS_US)) if frees_us is None else frees_us
        if self._fault("frees_late"):
            lag_us = self.chance.randint(2, 20) * SECOND_US
        self._in(lag_us, self._set_memory, service, service.turn, self._residue(service))

    def _grow(self, service: Service, us: int) -> None:
        """It takes its memory step by step, at its peak more than later."""
        service.turn += 1
        steady = self._steady(service)
        peak = {gpu: max(mib, service.consumer.vram_load_mib) for gpu, mib in steady.items()}
        half = {gpu: mib // 2 for gpu, mib in steady.items()}
        self._in(us // 3, self._set_memory, service, service.turn, half)
        self._in(us * 2 // 3, self._set_memory, service, service.turn, peak)

    def _set_memory(self, service: Service, turn: int, mib: dict[int, int]) -> None:
        if turn != service.turn:
            return
        if self._fits(service, mib):
            service.mib = dict(mib)
        else:
            self.overcommitted += 1

    def _fits(self, service: Service, mib: dict[int, int]) -> bool:
        return all(
            self.used_mib(gpu) - service.mib.get(gpu, 0) + need <= self.totals.get(gpu, need)
            for gpu, need in mib.items()
        )

    def _forget_memory(self, service: Service) -> None:
        service.turn += 1
        service.loaded, service.mib = False, {}

    def _steady(self, service: Service) -> dict[int, int]:
        return {gpu: service.target_mib(gpu) for gpu in service.consumer.vram_mib}

    def _residue(self, service: Service) -> dict[int, int]:
        residue = service.consumer.vram_residue_mib
        return {gpu: min(residue, mib) for gpu, mib in service.mib.items()}

    def _of_server(self, service: Service) -> list[Service]:
        server = service.consumer.server
        return [one for one in self.services.values() if one.consumer.server == server]

    def _loads(self, service: Service) -> bool:
        lane = self.lanes.get(service.consumer.server, ())
        name = service.consumer.name
        return any(one.kind is ev.SwapDone and one.consumer == name for one in lane)

    # ---------------------------------------------------------------------------------- jobs

    def _serve(self, request: str, consumer: str) -> None:
        client, service = self.clients.get(request), self.services[consumer]
        service.jobs.add(request)
        if client is None:  # it has just left: the runtime finds nobody to answer
            self._job_ends(request, "disconnected", 5 * MS_US, consumer)
            return
        client.granted = True
        if self._fault("leaves_at_grant"):
            self._in(0, self._leave, request)
        if not service.up:
            self._job_ends(request, "upstream_error", 10 * MS_US)
            return
        begins = self.now
        if not service.loaded:
            begins += self._start_cold(service)
        if service.traits.in_turn:
            begins = max(begins, service.free_at)
            service.free_at = begins + client.ask.work_us
        self.began[request] = begins
        us = begins - self.now + client.ask.work_us
        if self._fault("job_crashes"):
            self._in(us // 2, self._die, service)
        else:
            self._job_ends(request, self._outcome(client.ask), us)

    def _outcome(self, ask: Ask) -> str:
        failed = self._fault("job_fails")
        return pick(self.chance, ("upstream_error", "timeout")) if failed else ask.outcome

    def _start_cold(self, service: Service) -> int:
        """Its first request has it take its memory; who comes meanwhile waits for that as well.

        Give how long that is; where it is laid down, the work of those who come includes it.
        """
        taped = "start" in service.traits.tapes
        if service.starting == service.turn:
            return 0 if taped else service.traits.load_us
        took = service.took("start")
        us = took.us if took else service.traits.load_us
        grows_us = took.memory_us * 3 // 2 if took else us
        self._grow(service, grows_us)
        service.starting = service.turn
        self._in(grows_us, self._cold_started, service, service.turn)
        return us

    def _cold_started(self, service: Service, turn: int) -> None:
        need = self._steady(service)
        if turn != service.turn:
            return
        if self._fits(service, need):
            service.loaded, service.mib = True, need
        else:
            self.overcommitted += 1
            self._forget_memory(service)
            self._end_jobs(service)

    def _die(self, service: Service) -> None:
        """A service crashes; whoever supervises it has it back, empty, a moment later."""
        for one in self._of_server(service):
            self._forget_memory(one)
            one.up = False
            self._end_jobs(one)
        if not service.consumer.startable:
            self._in(3 * SECOND_US, self._revive, service)

    def _revive(self, service: Service) -> None:
        for one in self._of_server(service):
            one.up = True

    def _end_jobs(self, service: Service) -> None:
        if service.left_until:
            service.busy_until = service.left_until = 0
        for request in sorted(service.jobs):
            self._job_ends(request, "upstream_error", 5 * MS_US, service.consumer.name)

    def _job_ends(self, request: str, outcome: str, us: int, consumer: str | None = None) -> None:
        client = self.clients.get(request)
        name = consumer or (client.ask.consumer if client else "")
        self._in(us, self._job_is_over, self.runs, request, name, outcome)

    def _job_is_over(self, run: int, request: str, name: str, outcome: str) -> ev.Event | None:
        service = self.services.get(name)
        if run != self.runs or service is None or request not in service.jobs:
            return None
        service.jobs.discard(request)
        service.left_until = 0
        self.clients.pop(request, None)
        return self._answer(ev.ServeDone, {"request": request, "outcome": outcome})

    # ------------------------------------------------------------------------ what is observed

    def _sample(self) -> None:
        taken = self._stamp()
        self._last_reading = self.now
        if self._fault("sample_missing"):
            self._tell(5 * MS_US, ev.GpuSample, taken=taken, error="sampler_failed")
            return
        readings = tuple(self._reading(gpu) for gpu in sorted(self.totals))
        us = self.chance.randint(*self.sample_ms) * MS_US
        if self._fault("sample_stale"):
            us += self.chance.randint(1, 8) * SECOND_US
        self._tell(us, ev.GpuSample, taken=taken, gpus=readings)

    def _reading(self, gpu: int) -> ev.GpuReading:
        total, used = self.totals[gpu], self.used_mib(gpu)
        if self._fault("sample_wrong"):
            used = self.chance.randint(0, total)
        used = min(used, total)
        return ev.GpuReading(index=gpu, total_mib=total, used_mib=used, free_mib=total - used)

    def _probe(self, name: str) -> None:
        service = self.services.get(name)
        if service is None:
            return
        fields: dict[str, Any] = {"consumer": name, "taken": self._stamp(), "healthy": True}
        failure = self._failure(service)
        if failure is not None:
            fields |= {"healthy": False, "failure": failure}
        else:
            fields |= self._answers(service)
        us = self.chance.randint(*service.traits.probe_ms) * MS_US
        if self._fault("probe_slow"):
            us += self.chance.randint(1, 8) * SECOND_US
        self._tell(us, ev.ProbeResult, **fields)

    def _failure(self, service: Service) -> ev.ProbeFailure | None:
        if self._fault("probe_flaps"):
            flaps: tuple[ev.ProbeFailure, ...] = ("status", "timeout", "refused", "answer")
            return pick(self.chance, flaps)
        if not service.up:
            return "refused"
        if service.traits.mute_at_work and any(one.jobs for one in self._of_server(service)):
            return "timeout"
        return None

    def _answers(self, service: Service) -> dict[str, Any]:
        told: dict[str, Any] = {}
        lies, traits = self._fault("probe_lies"), service.traits
        if traits.tells_residency:
            told["resident"] = service.loaded is not lies
        if traits.tells_busy:
            told["busy"] = (self.now < service.busy_until or bool(service.jobs)) is not lies
        if traits.tells_vram and service.loaded:
            told["vram_mib"] = sum(service.mib.values()) or None
        return told
