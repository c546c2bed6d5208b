"""One whole run, and many of them; what is left of a failing one that still fails.

A run has two phases. In the first, traffic and faults; every step is judged. In the second nobody
new comes, faults stop, the operator lets go of all: now every wait must end, within a bounded time
and number of steps, and in a fair setting without a time-out being what ends it. Then the log is
replayed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from attrs import evolve, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import decode_event, decode_state, encode_effect, encode_event, encode_state
from mgpu_core.config import SECOND_US, Config
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.faults import Faults, swarm
from mgpu_core.simulation.making import Setting, draw_setting
from mgpu_core.simulation.oracles import Judge, Violation
from mgpu_core.simulation.reach import labels
from mgpu_core.simulation.world import Act, World
from mgpu_core.state import Residency, State

T = TypeVar("T")
ACTS = 25
# The bounds of the second phase: cool-downs of five minutes may come one after another.
PEACE_US = 1800 * SECOND_US
PEACE_STEPS = 20_000
# How often a failing run is played again to find a smaller one.
TRIES = 2_000

MakeChance = Callable[[int], Chance]


@frozen(kw_only=True)
class Report:
    """What came of a run; `history` is every event of it, to the violation if there is one."""

    setting: Setting
    history: tuple[ev.Event, ...]
    violation: Violation | None
    reached: Counter[str] = field(factory=Counter)
    seed: int | None = None

    @property
    def steps(self) -> int:
        return len(self.history)


class _Run:
    """A world, a judge, and what they have come to."""

    def __init__(self, setting: Setting, chance: Chance, planner: Planner | None) -> None:
        self.setting = setting
        self.planner = planner
        self.world = World(
            setting.config,
            chance=chance,
            script=setting.script,
            faults=setting.faults,
            scheduler=Scheduler(setting.config, planner),
        )
        self.judge = Judge(self.world.state, built_in=planner is None)
        self.log: list[tuple[ev.Event, Transition]] = []
        self.reached: Counter[str] = Counter()

    def live(self, until_us: int | None) -> Iterator[tuple[ev.Event, Transition, list[Violation]]]:
        for event, transition in self.world.run(until_us):
            self.log.append((event, transition))
            violations = self.judge.see(event, transition)
            self.reached.update(labels(self.judge.last))
            yield event, transition, violations

    def report(self, violation: Violation | None) -> Report:
        return Report(
            setting=self.setting,
            history=tuple(event for event, _ in self.log),
            violation=violation,
            reached=self.reached,
        )

    def play(self) -> Report:
        try:
            phases = (self._war, self._peace, self._rest, self._replays)
            return self.report(next((found for phase in phases if (found := phase())), None))
        except AssertionError as error:
            culprit = self.world.last_event
            if culprit is not None:
                self.log.append((culprit, Transition(self.world.state, (), ())))
            return self.report(Violation("P15", f"the core gives up: {error}"))

    def _war(self) -> Violation | None:
        script = self.setting.script
        end_us = self.world.now + (script[-1][0] if script else 0) + 5 * SECOND_US
        for _, _, violations in self.live(end_us):
            if violations:
                return violations[0]
        return None

    def _peace(self) -> Violation | None:
        """P1, to the end: everybody's wait ends."""
        world = self.world
        since = world.now
        world.make_peace()
        steps = 0
        for event, transition, violations in self.live(since + PEACE_US):
            if violations:
                return violations[0]
            if text := self._by_time_out(event, transition, since):
                return Violation("P1", text)
            steps += 1
            if not transition.state.requests and not world.open_commands and not world.down:
                return None
            if steps > PEACE_STEPS:
                break
        if not world.state.requests:
            return None
        return Violation("P1", f"after {steps} calm steps there waits {pending(world.state)}")

    def _by_time_out(self, event: ev.Event, transition: Transition, since: int) -> str | None:
        """In a fair setting, nothing but a request's own deadline may end a wait."""
        if not self.setting.fair:
            return None
        for effect in transition.effects:
            if isinstance(effect, fx.Reject) and effect.code == "queue_timeout":
                ticket = self.judge.last.books.waiting.get(effect.request)
                if ticket and ticket.deadline - ticket.at >= self.setting.config.queue_timeout_us:
                    return f"{effect.request} had to time out: {effect.message}"
        for note in transition.notes:
            ended = note.type in {"LoadFailed", "UnloadFailed"}
            late = event.at > since + 5 * SECOND_US
            if ended and late and note.details.get("error") == "timeout":
                return f"an operation of {note.consumer} had to time out"
        return None

    def _rest(self) -> Violation | None:
        """P12: at rest, what is believed of a service that tells is what is so."""
        # Whose client left during a cold start loads on; then it is probed once more.
        rest_us = 3 * self.world.state.config.probe_interval_us + 60 * SECOND_US
        for _, _, violations in self.live(self.world.now + rest_us):
            if violations:
                return violations[0]
        for name, service in self.world.services.items():
            belief = self.world.state.consumers.get(name)
            moving = self.world.state.requests or self.world.open_commands
            if (
                name in self.world.state.retired
                or belief is None
                or moving
                or not service.traits.tells_residency
                or not service.up
            ):
                continue
            if (belief.residency is Residency.RESIDENT) is not service.loaded:
                text = f"{name} is believed {belief.residency}, and really loaded: {service.loaded}"
                return Violation("P12", text)
        return None

    def _replays(self) -> Violation | None:
        """P11 and P13 at once: only where that fails it matters which of them did."""
        config = self.setting.config
        if replayed(backwards(config), self.log, self.planner, "") is None:
            return None
        return replayed(config, self.log, self.planner, "P11") or replayed(
            backwards(config), self.log, self.planner, "P13"
        )


def pending(state: State) -> str:
    """Say who waits still, and for whom."""
    told = []
    for name, request in state.requests.items():
        reason = state.reasons.get(name)
        why = f"{reason.why.value} {list(reason.who)}" if reason else request.phase.value
        told.append(f"{name} for {request.consumer} ({why})")
    return ", ".join(told)


# ------------------------------------------------------------------------------------ replays


def backwards(config: Config) -> Config:
    """The same configuration, written down in the other order."""
    return evolve(
        config,
        consumers=dict(reversed(tuple(config.consumers.items()))),
        gpus=dict(reversed(tuple(config.gpus.items()))),
    )


def replayed(
    config: Config,
    log: Sequence[tuple[ev.Event, Transition]],
    planner: Planner | None,
    name: str,
) -> Violation | None:
    """P11, P13: the log, read back, gives the same effects and the same state at every point."""
    scheduler = Scheduler(config, planner)
    state = scheduler.initial()
    for number, (event, live) in enumerate(log):
        if number == len(log) // 2:
            state = decode_state(encode_state(state))
        again = scheduler.step(state, decode_event(encode_event(event), event.at))
        state = again.state
        same = [encode_effect(e) for e in again.effects] == [encode_effect(e) for e in live.effects]
        if not same or state != live.state:
            return Violation(name, f"event {number}, {event}: a replay differs")
    return None


# ---------------------------------------------------------------------------------- campaigns


def play(
    chance: Chance,
    *,
    faults: Faults | None = None,
    fair: bool = True,
    acts: int = ACTS,
    planner: Planner | None = None,
) -> Report:
    """Draw a setting and play it."""
    drawn = swarm(chance) if faults is None else faults
    return play_setting(draw_setting(chance, drawn, fair=fair, acts=acts), chance, planner)


def play_setting(setting: Setting, chance: Chance, planner: Planner | None = None) -> Report:
    return _Run(setting, chance, planner).play()


def campaign(
    seeds: Iterable[int], chance_of: MakeChance, *, planner: Planner | None = None, acts: int = ACTS
) -> Iterator[Report]:
    """Play one run for each seed, every other one in a fair setting."""
    for seed in seeds:
        chance = chance_of(seed)
        faults = swarm(chance)
        setting = draw_setting(chance, faults, fair=seed % 2 == 0, acts=acts)
        yield evolve(play_setting(setting, chance_of(seed), planner), seed=seed)


def first_violation(
    seeds: Iterable[int], chance_of: MakeChance, *, planner: Planner | None = None, acts: int = ACTS
) -> Report | None:
    """Play until something is broken; None: nothing was."""
    reports = campaign(seeds, chance_of, planner=planner, acts=acts)
    return next((report for report in reports if report.violation is not None), None)


# ------------------------------------------------------------------------------- the smallest


def smallest(report: Report, chance_of: MakeChance, planner: Planner | None = None) -> Report:
    """Give the smallest run that breaks the same property.

    First with less of a script, in the world; then, where single steps show it, with fewer events.
    """
    assert report.violation is not None
    assert report.seed is not None
    wanted, seed = report.violation.property, report.seed
    best = [report]

    def fails_in_the_world(script: Sequence[tuple[int, Act]]) -> bool:
        setting = evolve(report.setting, script=tuple(script))
        again = play_setting(setting, chance_of(seed), planner)
        found = again.violation is not None and again.violation.property == wanted
        if found:
            best[0] = evolve(again, seed=seed)
        return found

    _shortest(report.setting.script, fails_in_the_world, tries=100)
    history = best[0].history

    def fails_alone(events: Sequence[ev.Event]) -> bool:
        violation = judged(report.setting.config, events, planner)
        return violation is not None and violation.property == wanted

    if fails_alone(history):
        events = tuple(_shortest(history, fails_alone, tries=TRIES))
        violation = judged(report.setting.config, events, planner)
        return evolve(best[0], history=events, violation=violation)
    return best[0]


def judged(
    config: Config, events: Sequence[ev.Event], planner: Planner | None = None
) -> Violation | None:
    """Feed these events to a scheduler and give the first violation.

    An answer to a command answers the one that is open now: without some earlier event it may
    have got another epoch.
    """
    scheduler = Scheduler(config, planner)
    state = scheduler.initial()
    judge = Judge(state, built_in=planner is None)
    for recorded in events:
        event = _answering(recorded, judge)
        try:
            transition = scheduler.step(state, event)
        except AssertionError as error:
            return Violation("P15", f"the core gives up: {error}")
        state = transition.state
        if violations := judge.see(event, transition):
            return violations[0]
    return None


def _answering(event: ev.Event, judge: Judge) -> ev.Event:
    if not isinstance(event, ev.UnloadDone | ev.SwapDone):
        return event
    order = judge.books.orders.get(event.consumer)
    kind = "load" if isinstance(event, ev.SwapDone) else "unload"
    same = order is not None and order.kind == kind
    return evolve(event, epoch=order.epoch) if order is not None and same else event


def _shortest(
    items: Sequence[T], fails: Callable[[Sequence[T]], bool], *, tries: int
) -> Sequence[T]:
    """Leave out larger parts, then smaller ones, as long as it still fails."""
    size = max(1, len(items) // 2)
    while tries > 0:
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
