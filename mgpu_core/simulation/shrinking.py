"""Of a failing run, the smallest history that breaks the same property.

What the world did is only how the history was found. From there on it is a case of its own: a
configuration, and events fed to a scheduler one after the other. So it needs no chance, and can be
made smaller piece by piece: fewer events, fewer consumers, plainer values, rounder times.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from attrs import NOTHING, Attribute, evolve, fields, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.faults import CALM
from mgpu_core.simulation.making import Setting, unfair_because
from mgpu_core.simulation.oracles import Judge, Violation
from mgpu_core.simulation.planning import Watched
from mgpu_core.simulation.preamble import OPEN, STALE, STEP_US
from mgpu_core.simulation.run import (
    MakeChance,
    Report,
    Witness,
    gives_up,
    pending,
    play_setting,
    replays,
    timed_out,
)
from mgpu_core.simulation.world import START_US
from mgpu_core.state import Residency, State

T = TypeVar("T")
# How often a run, or a case, is tried again to find a smaller one.
RUNS, TRIES = 60, 1_500
# More ticks than a wait needs, and more events than a calm end: what goes on for ever is given up.
MOST_TICKS, CALM_EVENTS = 100, 200
# What a case would not be plainer without: which card, what it can hold, what a reading showed.
KEPT = {"index", "total_mib", "gpus"}
START = ev.Started(at=START_US, run="run-1")


@frozen(kw_only=True)
class Case:
    """A configuration, and what happens to it after the start of the broker.

    `start`: what happens begins in this state instead, which few events can't bring about.
    """

    config: Config
    events: tuple[ev.Event, ...]
    start: State | None = None

    @property
    def begins_at(self) -> int:
        return START_US if self.start is None else self.start.at


@frozen(kw_only=True)
class Retold:
    """What a case comes to: every event that was fed, ticks included, and what is wrong."""

    log: tuple[tuple[ev.Event, Transition], ...]
    violation: Violation | None

    @property
    def history(self) -> tuple[ev.Event, ...]:
        return tuple(event for event, _ in self.log)


def smallest(report: Report, chance_of: MakeChance, planner: Planner | None = None) -> Report:
    """Give the smallest history that breaks the same property.

    Where its events alone don't show it (whether a belief is true, only the world can tell), give
    the run with the least of a script and the fewest faults instead.
    """
    assert report.violation is not None
    wanted = report.violation.property
    last_failing: Retold | None = None
    known = set(unfair_because(report.setting.config))

    def fails(case: Case) -> bool:
        nonlocal last_failing
        # Made plainer, a configuration may itself keep somebody waiting.
        fair = report.setting.fair and known.issuperset(unfair_because(case.config))
        again = retold(case, planner, wanted=wanted, fair=fair)
        failed = again.violation is not None and again.violation.property == wanted
        if failed:
            last_failing = again
        return failed

    whole = case_of(report, planner)
    cases = (evolve(whole, events=whole.events[: report.war]), whole)
    failing = next((case for case in cases if fails(case)), None)
    if failing is None:
        return _smallest_run(report, chance_of, planner)
    case = simplest(failing, fails)
    assert last_failing is not None  # of this very case: a planner may answer otherwise each time
    setting = evolve(report.setting, config=case.config, script=())
    history, violation = last_failing.history, last_failing.violation
    return evolve(report, setting=setting, history=history, violation=violation)


def judged(
    config: Config, events: Sequence[ev.Event], planner: Planner | None = None
) -> Violation | None:
    """Feed these events to a scheduler and give the first violation that single steps show."""
    return retold(Case(config=config, events=tuple(events)), planner).violation


# ------------------------------------------------------------------------------ telling a case


def case_of(report: Report, planner: Planner | None = None) -> Case:
    """Take the events of a run, from the start of the broker on.

    An answer to a command is told apart from one to nothing: of the first, the epoch is that of
    whatever command is open then, as without some earlier event it may have got another.
    """
    events = report.history
    if events and isinstance(events[0], ev.Started):
        events = events[1:]
    retelling = _Retelling(report.setting.config, planner, "none")
    return Case(config=report.setting.config, events=tuple(retelling.marked(events)))


def told(
    case: Case, planner: Planner | None = None, *, wanted: str = "", ticks: bool = True
) -> Retold:
    """Feed a case to a scheduler, up to the first violation of `wanted` that single steps show.

    `ticks`: they come when it asks for them, not only where the case has one.
    """
    retelling = _Retelling(case.config, planner, wanted, case.start)
    retelling.alone = wanted
    violation = retelling.all_of(case.events, ticks=ticks)
    return Retold(log=tuple(retelling.log), violation=violation)


def retold(
    case: Case, planner: Planner | None = None, *, wanted: str = "", fair: bool = False
) -> Retold:
    """Feed a case to a scheduler; ticks come when it asks for them.

    `wanted`: look for that property alone, also where only the whole shows it: for P1 all comes to
    its end where nothing goes wrong any more, and in a `fair` setting nobody may have to time out.
    """
    retelling = _Retelling(case.config, planner, wanted)
    violation = retelling.all_of(case.events)
    if violation is None and wanted == "P1":
        violation = retelling.calm_end(fair=fair)
    if violation is None and wanted in {"P11", "P13"}:
        violation = replays(case.config, retelling.log, retelling.watched)
    return Retold(log=tuple(retelling.log), violation=violation)


class _Retelling:
    """A scheduler that is told a case, and its witness."""

    def __init__(
        self, config: Config, planner: Planner | None, wanted: str, start: State | None = None
    ) -> None:
        self.watched = None if planner is None else Watched(planner)
        self.scheduler = Scheduler(config, self.watched)
        self.state: State = start or self.scheduler.initial()
        self.witness = Witness(self.state, self.watched, wanted, late=start is not None)
        self.log: list[tuple[ev.Event, Transition]] = []
        self._first = () if start else (START,)
        self.alone = ""  # the one property that it stops at; empty: at any

    @property
    def judge(self) -> Judge:
        return self.witness.judge

    def all_of(self, events: Sequence[ev.Event], *, ticks: bool = True) -> Violation | None:
        for event in (*self._first, *events):
            for tick in self._ticks(event.at) if ticks else ():
                if violation := self._feed(tick):
                    return violation
            if violation := self._feed(self._answering(event)):
                return violation
        return None

    def calm_end(self, *, fair: bool) -> Violation | None:
        """P1: with every command done and every job ended at once, each wait ends."""
        for _, event in zip(range(CALM_EVENTS), _calm(self), strict=False):
            if violation := self._feed(event):
                return violation
            if fair and (text := timed_out(self.judge, self.log[-1][1])):
                return Violation("P1", text)
        if self.state.requests and fair:
            return Violation("P1", f"nothing else happens, and there waits {pending(self.state)}")
        return None

    def _ticks(self, until: int) -> Iterator[ev.Event]:
        for _ in range(MOST_TICKS):
            wake = self.state.wake
            if wake is None or not self.state.at < wake <= until:
                return
            yield ev.Tick(at=wake)

    def _feed(self, event: ev.Event) -> Violation | None:
        try:
            transition = self.scheduler.step(self.state, event)
        except Exception as error:  # noqa: BLE001 - a step never raises
            self.log.append((event, Transition(self.state, (), ())))
            return gives_up(error)
        self.state = transition.state
        self.log.append((event, transition))
        seen = self.witness.see(event, transition)
        return next((one for one in seen if self.alone in {"", one.property}), None)

    def marked(self, events: Sequence[ev.Event]) -> Iterator[ev.Event]:
        """Give them with the epochs of answers as `OPEN` or `STALE`."""
        self._feed(START)
        for event in events:
            if isinstance(event, ev.UnloadDone | ev.SwapDone):
                epoch = OPEN if self._open_epoch(event) == event.epoch else STALE
                yield evolve(event, epoch=epoch)
            else:
                yield event
            self._feed(event)

    def _answering(self, event: ev.Event) -> ev.Event:
        if not isinstance(event, ev.UnloadDone | ev.SwapDone) or event.epoch != OPEN:
            return event
        return evolve(event, epoch=self._open_epoch(event))

    def _open_epoch(self, event: ev.UnloadDone | ev.SwapDone) -> int:
        order = self.judge.books.orders.get(event.consumer)
        kind = "load" if isinstance(event, ev.SwapDone) else "unload"
        return order.epoch if order is not None and order.kind == kind else STALE


def _calm(now: _Retelling) -> Iterator[ev.Event]:
    """Give what follows where all goes well: nobody meddles, and what is believed is so."""
    at = now.state.at
    if now.state.draining:
        yield ev.Resume(at=(at := at + STEP_US))
    for name in sorted(now.state.config.consumers):
        if now.state.consumers[name].pinned or now.state.config.consumers[name].pinned:
            yield ev.Pin(at=(at := at + STEP_US), consumer=name, pinned=False)
    for name, belief in now.state.consumers.items():
        unsure = belief.busy_seen is not None or belief.residency is Residency.UNKNOWN
        if unsure or not belief.healthy:
            yield ev.ProbeResult(
                at=(at := at + STEP_US),
                consumer=name,
                taken=at,
                healthy=True,
                resident=belief.residency is Residency.RESIDENT,
                busy=False,
            )
    read = False  # the cards, since anything has changed
    while True:
        at = max(at, now.state.at) + STEP_US
        orders, jobs = now.judge.books.orders, now.judge.books.jobs
        asked = any(isinstance(effect, fx.SampleGpu) for effect in now.log[-1][1].effects)
        waiting = now.state.requests and not orders and not jobs
        if now.state.cards and (asked or (waiting and not read)):
            read = True
            yield _sample(now.state, at)
        elif orders:
            read = False
            name, order = next(iter(orders.items()))
            done = ev.SwapDone if order.kind == "load" else ev.UnloadDone
            yield done(at=at, consumer=name, epoch=order.epoch)
        elif jobs:
            read = False
            yield ev.ServeDone(at=at, request=next(iter(jobs)))
        elif now.state.requests and now.state.wake is not None:
            yield ev.Tick(at=max(at, now.state.wake))
        else:
            return


def _sample(state: State, at: int) -> ev.GpuSample:
    """Give a reading of cards on which there is what is believed to be."""
    readings = []
    for gpu, card in state.cards.items():
        used_mib = sum(
            consumer.vram_mib.get(gpu, 0)
            for name, consumer in state.config.consumers.items()
            if state.consumers[name].residency is Residency.RESIDENT and not consumer.vram_managed
        )
        used_mib = min(used_mib, card.total_mib)
        free_mib = card.total_mib - used_mib
        readings.append(
            ev.GpuReading(index=gpu, total_mib=card.total_mib, used_mib=used_mib, free_mib=free_mib)
        )
    return ev.GpuSample(at=at, taken=at, gpus=tuple(readings))


# -------------------------------------------------------------------------------- made smaller


def simplest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Make a failing case as plain as it gets."""
    tries = [TRIES]

    def still_fails(candidate: Case) -> bool:
        tries[0] -= 1
        return tries[0] >= 0 and fails(candidate)

    while True:
        before = case
        case = _with_fewer_events(case, still_fails)
        for edit in _edits(case):
            candidate = edit(case)
            if candidate != case and still_fails(candidate):
                case = candidate
        if case == before or tries[0] <= 0:
            return case


Edit = Callable[[Case], Case]


def _with_fewer_events(case: Case, fails: Callable[[Case], bool]) -> Case:
    def fail(events: Sequence[ev.Event]) -> bool:
        return fails(evolve(case, events=tuple(events)))

    return evolve(case, events=tuple(shortest(case.events, fail, tries=TRIES)))


def _edits(case: Case) -> Iterator[Edit]:
    """Give what may make a case plainer; each is tried on what the ones before it have left."""
    for number, event in enumerate(case.events):
        yield partial(_sooner, number=number)
        yield partial(_on_the_second, number=number, part=2)
        yield partial(_on_the_second, number=number, part=1)
        for field in fields(type(event)):
            yield partial(_plainer_event, number=number, field=field)
    if case.start is not None:
        return  # its configuration is that of the state
    for field in fields(Config):
        yield partial(_plainer_setting, field=field)
    for key in ("gpus", "consumers"):
        for name, thing in getattr(case.config, key).items():
            for field in fields(type(thing)):
                yield partial(_plainer_thing, key=key, name=name, field=field)
        for name in getattr(case.config, key):
            yield partial(_without, key=key, name=name)


def _plainer(thing: T, field: "Attribute[Any]") -> T:
    """Give it with the default in a field, if that has one."""
    plain = field.default
    given = plain is NOTHING or not field.init or hasattr(plain, "factory")
    if given or field.name in KEPT:
        return thing
    return evolve(thing, **{field.name: plain})  # type: ignore[misc]


def _plainer_setting(case: Case, field: "Attribute[Any]") -> Case:
    return evolve(case, config=_plainer(case.config, field))


def _plainer_thing(case: Case, key: str, name: Any, field: "Attribute[Any]") -> Case:
    things = getattr(case.config, key)
    if name not in things:
        return case
    of_its_own = field.name == "server"
    plain = evolve(things[name], server=name) if of_its_own else _plainer(things[name], field)
    return _configured(case, key, things | {name: plain})


def _without(case: Case, key: str, name: Any) -> Case:
    """Leave out a card or a consumer that no event is about."""
    things = dict(getattr(case.config, key))
    named = any(getattr(event, "consumer", None) == name for event in case.events)
    if named or (key == "gpus" and len(things) == 1):
        return case
    things.pop(name, None)
    return _configured(case, key, things)


def _configured(case: Case, key: str, things: Any) -> Case:
    return evolve(case, config=evolve(case.config, **{key: things}))


def _plainer_event(case: Case, number: int, field: "Attribute[Any]") -> Case:
    event = case.events[number]
    if not hasattr(event, field.name):
        return case
    plain = evolve(event, taken=event.at) if field.name == "taken" else _plainer(event, field)  # type: ignore[arg-type]
    return evolve(case, events=(*case.events[:number], plain, *case.events[number + 1 :]))


def _sooner(case: Case, number: int) -> Case:
    """Let an event come right after the one before it, and the later ones as much sooner."""
    return _moved(case, number, _before(case, number) + STEP_US)


def _on_the_second(case: Case, number: int, part: int) -> Case:
    """Let it come whole seconds after the one before it, after a part of the time."""
    first = _before(case, number) + STEP_US
    seconds = -(-(case.events[number].at - first) // (part * SECOND_US))
    return _moved(case, number, first + seconds * SECOND_US) if seconds > 0 else case


def _before(case: Case, number: int) -> int:
    return case.events[number - 1].at if number else case.begins_at


def _moved(case: Case, number: int, at: int) -> Case:
    by = at - case.events[number].at
    later = tuple(shifted(event, by) for event in case.events[number:])
    return evolve(case, events=(*case.events[:number], *later))


def shifted(event: ev.Event, by: int) -> ev.Event:
    times = {
        name: time + by
        for name in ("at", "taken", "deadline")
        if (time := getattr(event, name, None)) is not None
    }
    return evolve(event, **times)


def shortest(
    items: Sequence[T], fails: Callable[[Sequence[T]], bool], *, tries: int
) -> Sequence[T]:
    """Leave out larger parts, then smaller ones, as long as it still fails."""
    size = max(1, len(items) // 2)
    while tries > 0 and items:
        start, shorter = 0, False
        while start < len(items) and tries > 0:
            rest = [*items[:start], *items[start + size :]]
            tries -= 1
            if fails(rest):
                items, shorter = rest, True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = size if shorter and size == 1 else max(1, size // 2)
    return items


# ----------------------------------------------------------------------------- the smallest run


def _smallest_run(report: Report, chance_of: MakeChance, planner: Planner | None) -> Report:
    """Play it with less of a script and fewer faults, as long as it breaks the same property.

    Another script draws other chances from there on, so this finds a smaller run more often than
    the same one in small; what counts is that it fails.
    """
    assert report.violation is not None
    assert report.seed is not None
    wanted, seed, best = report.violation.property, report.seed, report

    def fails(setting: Setting) -> bool:
        nonlocal best
        again = play_setting(setting, chance_of(seed), planner)
        found = again.violation is not None and again.violation.property == wanted
        if found:
            best = evolve(again, seed=seed)
        return found

    def fails_with(script: Sequence[Any]) -> bool:
        return fails(evolve(best.setting, script=tuple(script)))

    shortest(report.setting.script, fails_with, tries=RUNS)
    for fault in fields(type(CALM)):
        if getattr(best.setting.faults, fault.name):
            fails(evolve(best.setting, faults=_plainer(best.setting.faults, fault)))
    return best
