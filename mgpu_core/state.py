"""What the scheduler believes. Frozen: a step makes a new state, the old one stays as it was."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, TypeVar

from attrs import evolve, field, frozen

from mgpu_core.config import Config, Consumer
from mgpu_core.effects import How
from mgpu_core.notes import Reason

T = TypeVar("T")
# Who asked for a load without a client.
Operator = Literal["load", "preload", "restore"]


class Residency(StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    UNLOADING = "unloading"
    UNKNOWN = "unknown"


# By these names they are found ten times as fast, and a step asks for dozens of them.
ABSENT, LOADING, RESIDENT, UNLOADING, UNKNOWN = Residency


class Source(StrEnum):
    """Where a belief comes from."""

    ASSUMED = "assumed"
    COMMAND = "command"
    PROBE = "probe"
    NVML = "nvml"


def changed(record: T, **changes: object) -> T:
    """Copy one of the records that every event changes, with some fields changed.

    Half of a request's steps went into attrs' `evolve`. The dictionary of an instance without
    slots is copied at once, and nothing has to be checked anew.
    """
    return changed_by(record, changes)


def changed_by(record: T, changes: dict[str, object]) -> T:
    """Do so with changes that are in a dictionary already."""
    fields = record.__dict__ | changes
    assert len(fields) == len(record.__dict__), f"no such field: {changes}"
    return made_of(type(record), fields)


_new, _set = object.__new__, object.__setattr__


def made_of(kind: type[T], fields: Mapping[str, object]) -> T:
    """Make such a record of all of its fields, which are not looked at."""
    record = _new(kind)
    _set(record, "__dict__", fields)
    return record


@frozen(kw_only=True)
class Operation:
    """A load or unload that the runtime carries out; past `deadline` it counts as failed."""

    kind: Literal["load", "unload"]
    epoch: int
    since: int
    deadline: int
    how: How = "routes"


@frozen(kw_only=True)
class Cooldown:
    """After the `failures`-th failure in a row, nothing is tried `until` then."""

    failures: int
    until: int

    def earlier(self, us: int) -> "Cooldown":
        return evolve(self, until=self.until - us)


@frozen(kw_only=True, slots=False)  # see `changed`
class ConsumerState:
    residency: Residency
    source: Source = Source.ASSUMED
    # Set while residency is LOADING or UNLOADING, and only then.
    operation: Operation | None = None
    # When a swap, an operation or a serving last touched it: older probes know nothing newer.
    touched: int = -1
    # When its residency last changed.
    moved: int = -1
    # What went wrong, where residency is UNKNOWN (None: it was never looked at); a failed unload,
    # also while it loads after that.
    uncertain: Literal["load", "unload"] | None = None
    # The memory of a lazy one is set aside: its next request may be granted and starts it.
    cleared: bool = False
    # The request that cold-started a lazy one, while it is served.
    starter: str | None = None
    # An operator wants it out as soon as it has drained.
    leaving: bool = False
    pinned: bool | None = None

    healthy: bool | None = None
    refused: bool = False
    probe_failures: int = 0
    last_probe: int | None = None
    probe_error: str | None = None
    busy_seen: int | None = None

    measured_mib: int | None = None
    # What its last unload really gave back, where that was less than half of what it should.
    leaky_mib: int | None = None

    last_used: int | None = None
    last_done: int = -1
    # When its idle time began; None: it was only restored, and that starts no clock.
    idle_since: int | None = None
    uses: int = 0
    credit: int = 0
    load_us: int | None = None
    load_cooldown: Cooldown | None = None
    unload_cooldown: Cooldown | None = None
    total_requests: int = 0

    @property
    def unreachable(self) -> bool:
        return self.healthy is False

    def over_a_restart(self, fresh: "ConsumerState", back: int = 0) -> "ConsumerState":
        """Give what outlives a run, with a fresh belief about everything else.

        `back`: how far the clock was set back since.
        """
        return evolve(
            fresh,
            measured_mib=self.measured_mib,
            leaky_mib=self.leaky_mib,
            last_used=None if self.last_used is None else self.last_used - back,
            uses=self.uses,
            credit=self.credit,
            load_us=self.load_us,
            load_cooldown=self.load_cooldown and self.load_cooldown.earlier(back),
            unload_cooldown=self.unload_cooldown and self.unload_cooldown.earlier(back),
            total_requests=self.total_requests,
        )


class Phase(StrEnum):
    """Where an admitted request is."""

    QUEUED = "queued"
    JOINED = "joined"
    SERVING = "serving"


QUEUED, JOINED, SERVING = Phase


@frozen(kw_only=True, slots=False)  # see `changed`
class RequestState:
    """An admitted request whose end is still to come.

    `operator` ones (`load`, `preload`, `restore`) have no client: they end when their consumer is
    in, and are answered to nobody.
    """

    request: str
    consumer: str
    kind: str
    priority: int
    arrival: int
    at: int
    deadline: int
    phase: Phase = QUEUED
    # It was joined to a swap that is over and found no slot: its consumer may not be evicted.
    owed: bool = False
    # Who came before it and was joined, not queued, when the others counted it at its join: they
    # do so later. None: nobody has counted it yet.
    uncounted: tuple[str, ...] | None = None
    granted: int | None = None
    operator: Operator | None = None
    only_if_free: bool = False


class SwapPhase(StrEnum):
    UNLOADING = "unloading"
    SETTLING = "settling"
    LOADING = "loading"


@frozen(kw_only=True)
class Swap:
    """Bringing one target in. `victims` is its collision set, `evicted` those told to go."""

    target: str
    epoch: int
    since: int
    phase: SwapPhase = SwapPhase.UNLOADING
    victims: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()
    # One of its unloads failed since it was last planned.
    failed: bool = False
    # What each victim should give back, and what was free by card before: who gives less leaks.
    expected_mib: Mapping[str, int] = field(factory=dict)
    free_before_mib: Mapping[int, int] = field(factory=dict)
    unloaded: int | None = None
    settle_until: int | None = None
    sample_at: int | None = None
    # For a preload or restore only: it starts no idle clock.
    restore: bool = False


@frozen(kw_only=True)
class Promise:
    """Memory set aside for a swap that has not taken it yet, by card."""

    mib: Mapping[int, int]
    # When the load was over, so that a later sample shows it.
    done: int | None = None
    # Lazy ones: when the first request was granted.
    granted: int | None = None
    # When the load or that request began to take it, and what was in use then.
    began: int | None = None
    used_before_mib: Mapping[int, int] = field(factory=dict)


@frozen(kw_only=True)
class Card:
    """The last good reading of one GPU, and what it showed that is nobody's here."""

    total_mib: int
    used_mib: int
    free_mib: int
    taken: int
    foreign_mib: int = 0


@frozen(kw_only=True, slots=False)  # see `changed`
class Counters:
    jobs: int = 0
    loads: int = 0
    evictions: int = 0
    last_wait_us: int | None = None
    last_run_us: int | None = None

    def ran(self, us: int) -> "Counters":
        return changed(self, last_run_us=us)


@frozen(kw_only=True, slots=False)  # see `changed`
class State:
    """Everything a decision depends on, the configuration included."""

    config: Config
    at: int = 0
    run: str = ""
    draining: bool = False
    stopping: bool = False
    epoch: int = 0
    arrivals: int = 0
    consumers: Mapping[str, ConsumerState]
    # Those that have left the configuration but still hold memory or have requests under way.
    retired: tuple[str, ...] = ()
    requests: Mapping[str, RequestState] = field(factory=dict)
    # The queued requests by priority, then arrival. Who is promoted is derived from the counts.
    queue: tuple[str, ...] = ()
    # How often each queued request was overtaken: by its equals and lower ones, by higher ones.
    overtaken: Mapping[str, int] = field(factory=dict)
    overtaken_high: Mapping[str, int] = field(factory=dict)
    # Why each waiting request waits, as last noted.
    reasons: Mapping[str, Reason] = field(factory=dict)
    # How many requests of each consumer wait, are served, are owed; nobody is in here with 0.
    waiting: Mapping[str, int] = field(factory=dict)
    serving: Mapping[str, int] = field(factory=dict)
    owed: Mapping[str, int] = field(factory=dict)
    swaps: Mapping[str, Swap] = field(factory=dict)
    promises: Mapping[str, Promise] = field(factory=dict)
    cards: Mapping[int, Card] = field(factory=dict)
    sample_error: str | None = None
    # The time up to which evictions have aged what was used before (gdsf).
    age: int = 0
    last_work: int = 0
    # There was work since the preload set was last restored.
    restore_due: bool = False
    # Who of the preload set was not yet looked after in this run.
    preload_due: tuple[str, ...] = ()
    wake: int | None = None
    counters: Counters = field(factory=Counters)

    # What a step has found out, so that the next one need not. No part of what is believed: no log
    # holds it, and a state that lacks it comes to the same.
    # Before that time nobody has anything to do, unless something changes; 0: not known.
    calm_until: int = field(default=0, init=False, eq=False, repr=False)
    # For whom time alone, or the end of what they do, can change something; None: not known.
    known_restless: tuple[str, ...] | None = field(default=None, init=False, eq=False, repr=False)
    # When the first wait has to end; None: not known, or nobody waits.
    known_deadline: int | None = field(default=None, init=False, eq=False, repr=False)


def assumed_residency(consumer: Consumer) -> Residency:
    """What holds of a service that answers, until a probe says more (core.md 4.1)."""
    if consumer.vram_managed:
        return RESIDENT
    if consumer.unload_route and not consumer.load_route:
        return ABSENT
    return RESIDENT


def first_belief(consumer: Consumer) -> ConsumerState:
    """What holds before the first probe: a process of the broker's own does not run yet.

    A container may, and outlives the broker. Until it was looked at it is started like an absent
    one, which does no harm if it runs, and its memory counts as taken.
    """
    if consumer.driver == "process":
        return ConsumerState(residency=ABSENT, refused=True)
    if consumer.driver == "container":
        return ConsumerState(residency=UNKNOWN, refused=True)
    return ConsumerState(residency=assumed_residency(consumer))


def initial_state(config: Config) -> State:
    """The state before the first event."""
    return State(
        config=config,
        consumers={name: first_belief(consumer) for name, consumer in config.consumers.items()},
    )
