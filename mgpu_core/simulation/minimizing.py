"""Of a log that fails a check, the smallest history that still does.

First the log is read up to the event that fails (`Finder`). Then the end of it is tried, a few
events before the failing one and then twice as many each time, after a preamble that brings about
by events what was believed at that point: readings, probes, requests. So of thousands of events a
few dozen are left at once, and `shrinking` does the rest.

What fails is an invariant of the scheduler, a property as its oracle judges it, or that today's
code decides otherwise than the log says. In the last case nobody knows what would have been decided
then about a smaller history. Kept is what the two decisions are about: the event, today's decisions
with their reasons, and what is believed of everybody whom one of them names. It is known where only
the planner is another: then the configuration's own has to decide the smaller one as the log says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import define, evolve, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import decode_event, encode_effect
from mgpu_core.invariants import violations as unsound
from mgpu_core.notes import Note
from mgpu_core.planners import Planner
from mgpu_core.replay import Difference, Record, compared
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.oracles import ORACLES, Violation
from mgpu_core.simulation.planning import Watched
from mgpu_core.simulation.preamble import OPEN, STALE, STEP_US, preamble
from mgpu_core.simulation.run import INVARIANT, NOTHING, Witness, gives_up
from mgpu_core.simulation.shrinking import (
    Case,
    Retold,
    shifted,
    shortest,
    simplest,
    told,
)
from mgpu_core.simulation.world import START_US
from mgpu_core.state import State

DIVERGES, PLANNER = "diverges", "planner"
# What can be asked for.
CHECKS = (DIVERGES, INVARIANT, PLANNER, *ORACLES)
# So many events before the failing one are kept at most; half of them at least.
KEPT_EVENTS = 8_192
# A history that is so short is tried from its beginning before a state of then.
SHORT = 500
# How often groups of events are left out together, before it is done one by one.
GROUP_TRIES = 150
DECISIONS = (fx.Serve, fx.Reject, fx.StartUnload, fx.StartLoad)
Json: TypeAlias = Mapping[str, Any]
# Asked before each try, with the number of events of the smallest so far: shall it go on?
More: TypeAlias = Callable[[int | None], bool]


@frozen(kw_only=True)
class Found:
    """The first event of a log that fails, and what was before it: `events` from `start` on.

    `difference` is there where the log diverges.
    """

    seq: int
    violation: Violation
    start: State
    events: tuple[ev.Event, ...]
    difference: Difference | None = None


@define
class Finder:
    """Takes a log, item by item, up to the first event that fails the check (empty: any)."""

    check: str = ""
    planner: Planner | None = None
    state: State | None = None
    events: int = 0
    _watched: Watched | None = None
    _scheduler: Scheduler | None = None
    _witness: Witness | None = None
    _start: State | None = None
    _kept: list[ev.Event] = field(factory=list)
    _half: State | None = None

    def __attrs_post_init__(self) -> None:
        self._watched = None if self.planner is None else Watched(self.planner)

    def begin(self, state: State) -> None:
        """A segment begins in this state."""
        if state == self.state:
            return
        self.state = self._start = state
        self._kept, self._half = [], None
        self._scheduler = Scheduler(state.config, self._watched)
        only = {"": "", DIVERGES: NOTHING}.get(self.check, self.check)
        self._witness = Witness(state, self._watched, only, late=True)

    def lose(self) -> None:
        """Events are missing: what is believed is not known, up to the next segment."""
        self.state = None

    def take(self, record: Record) -> Found | None:
        """Take one event; None: nothing fails. Raises CodecError."""
        self.events += 1
        if self.state is None or self._scheduler is None:
            return None
        event, before = decode_event(record.event, record.at), self.state
        self._keep(event)
        try:
            transition = self._scheduler.step(before, event)
        except Exception as error:  # noqa: BLE001 - a step never raises
            violation = gives_up(error)
            fails = self.check in {"", DIVERGES, violation.property}
            self.lose()
            return self._found(record, violation) if fails else None
        self.state = transition.state
        difference = compared(record, before, transition) if self.check in {"", DIVERGES} else None
        violation_ = self._wrong(event, transition, difference)
        return self._found(record, violation_, difference) if violation_ else None

    def _wrong(
        self, event: ev.Event, transition: Transition, difference: Difference | None
    ) -> Violation | None:
        assert self._witness is not None
        seen = self._witness.see(event, transition) if self.check != DIVERGES else []
        if difference is not None:
            return Violation(DIVERGES, "today's code decides otherwise than the log says")
        if not self.check and (texts := unsound(transition.state)):
            return Violation(INVARIANT, texts[0])
        return next((one for one in seen if self.check in {"", one.property}), None)

    def _keep(self, event: ev.Event) -> None:
        if isinstance(event, ev.Started):  # nothing of an earlier run is under way any more
            self._start, self._kept, self._half = self.state, [], None
        if len(self._kept) == KEPT_EVENTS // 2:
            self._half = self.state
        if len(self._kept) == KEPT_EVENTS:
            self._start, self._half = self._half, self.state
            self._kept = self._kept[KEPT_EVENTS // 2 :]
        self._kept.append(event)

    def _found(
        self, record: Record, violation: Violation, difference: Difference | None = None
    ) -> Found:
        assert self._start is not None
        return Found(
            seq=record.seq,
            violation=violation,
            start=self._start,
            events=tuple(self._kept),
            difference=difference if violation.property == DIVERGES else None,
        )


# --------------------------------------------------------------------------------- the search


@frozen(kw_only=True)
class Smallest:
    """A case, what it comes to up to where it fails, and how.

    `recorded`: the decisions that the log has for its last event, where those diverge; `reasons`:
    the notes of those, where they are known.
    """

    case: Case
    retold: Retold
    violation: Violation
    recorded: tuple[Json, ...] | None = None
    reasons: tuple[Note, ...] | None = None

    @property
    def events(self) -> int:
        return len(self.retold.log)


class EnoughError(Exception):
    """The time is over."""


@define
class Search:
    """Looks for the smallest case. `best` is there also when `run` is interrupted."""

    found: Found
    planner: Planner | None
    more: More
    best: Smallest | None = None
    tries: int = 0
    # Without the planner today's code decides as the log says.
    _own_planner_known: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        difference = self.found.difference
        self._own_planner_known = (
            self.planner is not None
            and difference is not None
            and planned_without(difference) == list(difference.expected)
        )

    def run(self) -> Smallest | None:
        """Give the smallest that was found; None: the log can't be told so that it fails again."""
        cases = begun_later(self.found, self.planner)
        try:
            failing = next((case for case in cases if self.fails(case)), None)
            if failing is not None:
                simplest(in_groups(failing, self.fails), self.fails)
        except EnoughError:
            return self.best
        return self.best

    def whole(self) -> Smallest:
        """Give the log's own last events, from the state of then."""
        start, events = self.found.start, self.found.events
        case = Case(config=start.config, events=events, start=start)
        again = told(case, self.planner, wanted=NOTHING, ticks=False)
        difference = self.found.difference
        return Smallest(
            case=case,
            retold=again,
            violation=self.found.violation,
            recorded=None if difference is None else tuple(difference.expected),
        )

    def fails(self, case: Case) -> bool:
        """Try a case; raises EnoughError where no more tries are wanted."""
        if not self.more(self.best.events if self.best else None):
            raise EnoughError
        self.tries += 1
        smallest = self._judged(case)
        if smallest is not None:
            self.best = smallest
        return smallest is not None

    def _judged(self, case: Case) -> Smallest | None:
        wanted, difference = self.found.violation.property, self.found.difference
        if difference is not None:
            smallest = diverging(case, told(case, self.planner, wanted=NOTHING), difference)
            if smallest is None or not self._own_planner_known:
                return smallest
            return decided_then(smallest, told(case, None, wanted=NOTHING), difference)
        again = told(case, self.planner, wanted=wanted)
        if again.violation is None or again.violation.property != wanted:
            return None
        return Smallest(case=case, retold=again, violation=again.violation)


def begun_later(found: Found, planner: Planner | None) -> Iterator[Case]:
    """Give what may fail as well, the shortest first: the last events after a preamble; the last
    events in the state of then; and where that is not enough, the same with more of them.
    """
    states, events = _retraced(found, planner)
    latest_first = sorted(states, reverse=True)
    short = [number for number in latest_first if len(events) - number <= SHORT]
    for number in short:
        # Where many wait, whom a decision is about comes first more surely when alone.
        for only in (*states[number].waiting, None):
            yield _after(states[number], events[number:], only)
    whole = _from_the_beginning(found, events)
    if len(events) <= SHORT:
        yield from whole
    for number in short:
        yield Case(config=states[number].config, events=events[number:], start=states[number])
    for number in latest_first:
        if number not in short:
            yield _after(states[number], events[number:])
    yield from whole
    yield Case(config=found.start.config, events=events, start=found.start)


def _after(state: State, events: tuple[ev.Event, ...], only: str | None = None) -> Case:
    """Give what brings the state about, more or less, and then the events."""
    before = preamble(state, events[0].at, only)
    return _after_start(Case(config=state.config, events=(*before, *events)))


def _from_the_beginning(found: Found, events: tuple[ev.Event, ...]) -> list[Case]:
    first = events[1:] if isinstance(events[0], ev.Started) else events
    return [_after_start(Case(config=found.start.config, events=first))] if first else []


def _retraced(
    found: Found, planner: Planner | None
) -> tuple[dict[int, State], tuple[ev.Event, ...]]:
    """Give the states before the last event, the last two, four, eight..., and before the first.

    And the events, with the epochs of answers as `OPEN` or `STALE`, as cases have them.
    """
    count = len(found.events)
    wanted = {0, *(count - (1 << power) for power in range(count.bit_length()))}
    watched = None if planner is None else Watched(planner)
    scheduler, state = Scheduler(found.start.config, watched), found.start
    states, told_apart = {}, []
    for number, event in enumerate(found.events):
        if number in wanted:
            states[number] = state
        told_apart.append(marked(event, state))
        if number < count - 1:  # the last one may bring the scheduler down
            state = scheduler.step(state, event).state
    return states, tuple(told_apart)


def marked(event: ev.Event, state: State) -> ev.Event:
    """Give an answer with its epoch as `OPEN` or `STALE`; anything else as it is."""
    if not isinstance(event, ev.UnloadDone | ev.SwapDone):
        return event
    kind = "load" if isinstance(event, ev.SwapDone) else "unload"
    belief = state.consumers.get(event.consumer)
    order = belief.operation if belief else None
    answers = order is not None and (order.kind, order.epoch) == (kind, event.epoch)
    return evolve(event, epoch=OPEN if answers else STALE)


def _after_start(case: Case) -> Case:
    """Let it begin right after the start of a broker."""
    by = START_US + STEP_US - case.events[0].at
    return evolve(case, events=tuple(shifted(event, by) for event in case.events))


def in_groups(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Leave out what belongs together: all of one consumer, of one request, of one type."""
    for key in (_consumer_of, _request_of, _type_of):
        groups = list(dict.fromkeys(found for event in case.events if (found := key(event))))

        def kept(groups: Sequence[str], *, key: Key = key, case: Case = case) -> Case:
            events = (one for one in case.events if not key(one) or key(one) in groups)
            return evolve(case, events=tuple(events))

        def still_fails(groups: Sequence[str], kept: Callable[..., Case] = kept) -> bool:
            return fails(kept(groups))

        case = kept(shortest(groups, still_fails, tries=GROUP_TRIES))
    return case


Key: TypeAlias = Callable[[ev.Event], str | None]


def _consumer_of(event: ev.Event) -> str | None:
    return getattr(event, "consumer", None)


def _request_of(event: ev.Event) -> str | None:
    return getattr(event, "request", None)


def _type_of(event: ev.Event) -> str | None:
    return type(event).__name__


# ------------------------------------------------------------------------------ what diverges


def diverging(case: Case, again: Retold, difference: Difference) -> Smallest | None:
    """Give the case if its end is about the same as where the log diverges; None: it is not."""
    wanted = facts(difference.before, difference.transition, difference)
    steps = list(again.log)
    last = decode_event(difference.record.event, difference.record.at)
    # A tick at the very time of the last one has nothing left to do.
    for _ in range(2 if isinstance(last, ev.Tick) else 1):
        if len(steps) < (2 if case.start is None else 1):
            return None
        event, transition = steps[-1]
        before = steps[-2][1].state if len(steps) > 1 else case.start
        assert before is not None
        same = type(event) is type(last) and _named(event) == _named(last)
        if same and facts(before, transition, difference) == wanted:
            return Smallest(
                case=case,
                retold=evolve(again, log=tuple(steps)),
                violation=Violation(DIVERGES, "today's code decides otherwise than the log says"),
                recorded=_recorded(difference, before, transition),
            )
        steps.pop()
    return None


def planned_without(difference: Difference) -> list[Json]:
    """Give what is decided of its event with the configuration's own planner."""
    record, before = difference.record, difference.before
    event = decode_event(record.event, record.at)
    return [encode_effect(one) for one in Scheduler(before.config).step(before, event).effects]


def decided_then(smallest: Smallest, own: Retold, difference: Difference) -> Smallest | None:
    """Give it with the decisions of the configuration's own planner at its end, if those are the
    log's, and none before them differs; None: they are not.
    """
    count = smallest.events
    steps, other = own.log[:count], smallest.retold.log
    if len(steps) < count or any(
        (event, transition.effects) != (event_, transition_.effects)
        for (event, transition), (event_, transition_) in zip(steps[:-1], other[:-1], strict=True)
    ):
        return None
    event, transition = steps[-1]
    recorded = tuple(encode_effect(one) for one in transition.effects)
    then_only, _ = _apart(difference)
    plain = _plain(recorded, transition.state)
    last, today = other[-1]
    if event != last or today.effects == transition.effects:
        return None
    if any(one not in plain for one in then_only):
        return None
    return evolve(smallest, recorded=recorded, reasons=tuple(transition.notes))


def facts(before: State, transition: Transition, difference: Difference) -> object:
    """Give what the two decisions differ in, as far as it is so here: which of it is decided now,
    with which reasons, and what is believed of all that it names.
    """
    then_only, today_only = _apart(difference)
    both = [*then_only, *today_only]
    consumers = {one["consumer"] for one in both if one.get("consumer")}
    requests = {one["request"] for one in both if one.get("request")}
    got = _plain([encode_effect(effect) for effect in transition.effects], transition.state)
    beliefs = {
        name: (belief.residency, bool(before.serving.get(name)))
        for name, belief in before.consumers.items()
        if name in consumers
    }
    phases = {n: (r.phase, r.consumer) for n, r in before.requests.items() if n in requests}
    reasons = [
        (note.type, note.request, note.consumer, note.details.get("why"), note.details.get("what"))
        for note in transition.notes
        if note.request in requests or (note.request is None and note.consumer in consumers)
    ]
    return [one in got for one in both], beliefs, phases, reasons


def _apart(difference: Difference) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give what was decided only then, and what is only today: of what is done to anybody, if they
    differ in that; else of everything. Where only the order is another, all that is done.
    """
    then = _plain(difference.expected, difference.transition.state)
    today = _plain(difference.got, difference.transition.state)
    then_only = [one for one in then if one not in today]
    today_only = [one for one in today if one not in then]
    if not then_only and not today_only:
        return list(filter(_decides, then)), list(filter(_decides, today))
    if any(map(_decides, (*then_only, *today_only))):
        return list(filter(_decides, then_only)), list(filter(_decides, today_only))
    return then_only, today_only


def _plain(effects: Sequence[Json], state: State) -> list[dict[str, Any]]:
    """Give effects without what another history may have otherwise: epochs and times."""
    plain = [dict(effect) for effect in effects]
    for one in plain:
        one.pop("epoch", None)
        if "time" in one:
            one["time"] -= state.at
    return plain


def _decides(effect: Json) -> bool:
    return effect["type"] in {kind.__name__ for kind in DECISIONS}


def _named(event: ev.Event) -> object:
    names = ("request", "consumer", "consumers", "error", "outcome", "force", "pinned")
    return [getattr(event, name, None) for name in names]


def _recorded(difference: Difference, before: State, transition: Transition) -> tuple[Json, ...]:
    """Give what the log has for the last event, with the epochs and times of this history."""
    then_only, today_only = _apart(difference)
    got = [encode_effect(effect) for effect in transition.effects]
    epochs = {swap.target: swap.epoch for swap in before.swaps.values()}
    epochs |= {one["consumer"]: one["epoch"] for one in got if "epoch" in one}
    kept = [
        one
        for one, plain in zip(got, _plain(got, transition.state), strict=True)
        if plain not in today_only
    ]
    return (*kept, *(_put_back(one, epochs, transition.state) for one in then_only))


def _put_back(effect: dict[str, Any], epochs: Mapping[str, int], state: State) -> Json:
    """Give an effect what `_plain` has taken from it."""
    if "time" in effect:
        return effect | {"time": effect["time"] + state.at}
    if effect["type"] not in {fx.StartUnload.__name__, fx.StartLoad.__name__}:
        return effect
    kind, consumer = effect["type"], effect["consumer"]
    return {"type": kind, "consumer": consumer, "epoch": epochs.get(consumer, state.epoch)} | effect
