"""One whole run, and many of them.

A run has two phases. In the first, traffic and faults; every step is judged. In the second nobody
new comes, faults stop, the operator lets go of all: now every wait must end, within a bounded time
and number of steps, and in a fair setting without a time-out being what ends it. Then the log is
replayed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from attrs import evolve, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import (
    decode_event,
    decode_state,
    encode_effect,
    encode_event,
    encode_note,
    encode_state,
)
from mgpu_core.config import SECOND_US, Config, Consumer
from mgpu_core.invariants import violations as unsound
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation.books import at_rest, books_of
from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.faults import CALM, Faults, swarm
from mgpu_core.simulation.making import (
    Setting,
    draw_calm,
    draw_faults,
    draw_setting,
    draw_theme,
)
from mgpu_core.simulation.oracles import Judge, Violation
from mgpu_core.simulation.planning import Watched, told
from mgpu_core.simulation.reach import labels
from mgpu_core.simulation.world import Traits, World
from mgpu_core.state import Residency, State

ACTS = 40
CALM_EVERY = 12
# The bounds of the second phase: cool-downs of five minutes may come one after another.
PEACE_US = 1800 * SECOND_US
PEACE_STEPS = 20_000
# After so many probes, what is believed of a service at rest must be so.
LOOKS = 3
# What is no wrong of a planner, but can be had for less.
NEEDLESS = "a planner names more than it needs"

# What a witness may be asked to look at instead of properties: the scheduler's own invariants, or
# nothing at all.
INVARIANT, NOTHING = "invariant", "nothing"

# Even then: its queue is full, nobody is called so, its own deadline is over, no card is so large.
REFUSED_IN_CALM_WEATHER = {"overloaded", "no_consumer", "queue_timeout", "insufficient_vram"}

MakeChance = Callable[[int], Chance]
Log: TypeAlias = Sequence[tuple[ev.Event, Transition]]


@frozen(kw_only=True)
class Report:
    """What came of a run; `history` is every event of it, to the violation if there is one."""

    setting: Setting
    history: tuple[ev.Event, ...]
    violation: Violation | None
    reached: Counter[str] = field(factory=Counter)
    seed: int | None = None
    # How many of the events came before all was to end well.
    war: int = 0

    @property
    def steps(self) -> int:
        return len(self.history)


class Witness:
    """Sees every step of a run: a judge, and what a planner of one's own has answered.

    `late`: it comes in the midst of a run, so that what is judged by what was before has to wait
    until nothing of that is under way.
    """

    def __init__(
        self, state: State, watched: Watched | None, only: str = "", *, late: bool = False
    ) -> None:
        self.judge = Judge(state, planner=watched, only=NOTHING if late else only)
        self._only = only
        self._late = late
        self._watched = watched
        self._known = set(state.config.consumers)
        if late:
            self.judge.books = books_of(state)

    def see(self, event: ev.Event, transition: Transition) -> list[Violation]:
        if self._late and (isinstance(event, ev.Started) or at_rest(self.judge.state)):
            self._late, self.judge.only = False, self._only
            self.judge.books = books_of(self.judge.state)
        violations = self.judge.see(event, transition)
        if self._only == INVARIANT:
            violations += [Violation(INVARIANT, text) for text in unsound(transition.state)]
        if self._watched is None:
            return violations
        self._known.update(transition.state.config.consumers)
        return self._watched.found(self._known) + violations


class Run:
    """A world, a witness, and what they have come to."""

    def __init__(self, setting: Setting, chance: Chance, planner: Planner | None = None) -> None:
        self.setting = setting
        self.watched = None if planner is None else Watched(planner)
        self.world = World(
            setting.config,
            chance=chance,
            script=setting.script,
            faults=setting.faults,
            scheduler=Scheduler(setting.config, self.watched),
            traits=_open_ones(setting.config, chance) if setting.calm else None,
        )
        self.witness = Witness(self.world.state, self.watched)
        self.log: list[tuple[ev.Event, Transition]] = []
        self.reached: Counter[str] = Counter()
        self.calm = setting.calm or (is_calm(setting) and self.world.is_as_assumed())
        self._war_steps = 0

    def live(self, until_us: int | None) -> Iterator[tuple[ev.Event, Transition, list[Violation]]]:
        for event, transition in self.world.run(until_us):
            self.log.append((event, transition))
            violations = self.witness.see(event, transition)
            self.reached.update(labels(self.witness.judge.last))
            if self.calm:
                violations += self._in_calm_weather(transition)
            yield event, transition, violations

    def _in_calm_weather(self, transition: Transition) -> Iterator[Violation]:
        """Where nothing goes wrong no card has to hold more than it can, and nobody is refused."""
        if self.world.overcommitted:
            yield Violation("P7", "a card has to hold more than it can, though all is as declared")
        for effect in transition.effects:
            if isinstance(effect, fx.Reject) and effect.code not in REFUSED_IN_CALM_WEATHER:
                text = f"{effect.request} is refused, though nothing goes wrong: {effect.message}"
                yield Violation("P1", text)

    def report(self, violation: Violation | None) -> Report:
        if self.watched is not None and self.watched.needless:
            self.reached[NEEDLESS] = self.watched.needless
        return Report(
            setting=self.setting,
            history=tuple(event for event, _ in self.log),
            violation=violation,
            reached=self.reached,
            war=self._war_steps,
        )

    def play(self) -> Report:
        try:
            return self.report(self._war() or self.after())
        except Exception as error:  # noqa: BLE001 - a step never raises
            culprit = self.world.last_event
            if culprit is not None:
                self.log.append((culprit, Transition(self.world.state, (), ())))
            return self.report(gives_up(error))

    def after(self) -> Violation | None:
        """Let everything come to its end, and look at the whole of it."""
        phases = (self._peace, self._rest, self._replays)
        return next((found for phase in phases if (found := phase())), None)

    def _war(self) -> Violation | None:
        script = self.setting.script
        end_us = self.world.now + (script[-1][0] if script else 0) + 5 * SECOND_US
        return self.until(end_us)

    def until(self, end_us: int) -> Violation | None:
        """Live up to a virtual time, or the first violation."""
        for _, _, violations in self.live(end_us):
            if violations:
                return violations[0]
        return None

    def _peace(self) -> Violation | None:
        """P1, to the end: everybody's wait ends."""
        world = self.world
        since, self._war_steps = world.now, len(self.log)
        world.make_peace()
        steps = 0
        for _, transition, violations in self.live(since + PEACE_US):
            if violations:
                return violations[0]
            if text := self._by_time_out(transition, since):
                return Violation("P1", text)
            steps += 1
            if not transition.state.requests and not world.open_commands and not world.down:
                return None
            if steps > PEACE_STEPS:
                break
        if not world.state.requests:
            return None
        return Violation("P1", f"after {steps} calm steps there waits {pending(world.state)}")

    def _by_time_out(self, transition: Transition, since: int) -> str | None:
        """In a fair setting, nothing but a request's own deadline may end a wait."""
        if not self.setting.fair:
            return None
        if text := timed_out(self.witness.judge, transition):
            return text
        before = self.witness.judge.last.before.consumers
        for note in transition.notes:
            ended = note.type in {"LoadFailed", "UnloadFailed"}
            if not ended or note.details.get("error") != "timeout" or note.consumer is None:
                continue
            operation = before[note.consumer].operation
            # One from the war may have had to wait behind others of its server.
            if operation is not None and operation.since > since:
                return f"an operation of {note.consumer} had to time out"
        return None

    def _rest(self) -> Violation | None:
        """P12: at rest, what is believed of a service that tells is what is so.

        What has just changed is seen by its next probe: only what stays wrong is.
        """
        # Whose client left during a cold start loads on.
        if violation := self.until(self.world.now + 30 * SECOND_US):
            return violation
        wrong = set(self.world.services)
        for _ in range(LOOKS):
            interval_us = self.world.state.config.probe_interval_us
            if violation := self.until(self.world.now + interval_us + SECOND_US):
                return violation
            wrong &= set(self._mistaken())
            if not wrong:
                return None
        name = min(wrong)
        belief, loaded = self.world.state.consumers[name], self.world.services[name].loaded
        return Violation(
            "P12", f"{name} is believed {belief.residency}, and really loaded: {loaded}"
        )

    def _mistaken(self) -> Iterator[str]:
        """Give who could be known by now to be in or out, and is believed to be otherwise."""
        state = self.world.state
        if state.requests or self.world.open_commands:
            return
        for name, service in self.world.services.items():
            told = service.traits.tells_residency and service.up and name not in state.retired
            belief = state.consumers.get(name)
            if told and belief and (belief.residency is Residency.RESIDENT) is not service.loaded:
                yield name

    def _replays(self) -> Violation | None:
        """P11 and P13 at once: only where that fails it matters which of them did."""
        if not self.setting.replayed:
            return None
        return replays(self.setting.config, self.log, self.watched)


def _open_ones(config: Config, chance: Chance) -> dict[str, Traits]:
    """Give services that tell whether they are loaded, so that what is assumed is soon known."""
    return {name: evolve(Traits.drawn(chance), tells_residency=True) for name in config.consumers}


def is_calm(setting: Setting) -> bool:
    """Nothing goes wrong, and every size is as declared."""
    config, consumers = setting.config, setting.config.consumers.values()
    operates = (ev.Unload, ev.Load, ev.Reconfigured)
    return (
        setting.fair
        and setting.faults == evolve(CALM, client_leaves=setting.faults.client_leaves)
        and config.when_unfit != "admit"
        and all(gpu.total_mib is not None for gpu in config.gpus.values())
        and not any(one.can_coexist_with or _is_of_unknown_size(one) for one in consumers)
        # Where the start of a process loads any of several, nobody can tell who is in.
        and all(one.load_route or not config.siblings[n] for n, one in config.consumers.items())
        and not any(isinstance(act, operates) for _, act in setting.script)
    )


def _is_of_unknown_size(consumer: Consumer) -> bool:
    return consumer.vram_auto and not all(consumer.vram_mib.values())


def gives_up(error: Exception) -> Violation:
    return Violation("P15", f"a step does not end well: {told(error)}")


def timed_out(judge: Judge, transition: Transition) -> str | None:
    """Say who was ended by the longest wait there is, not by a deadline of its own."""
    for effect in transition.effects:
        if isinstance(effect, fx.Reject) and effect.code == "queue_timeout":
            ticket = judge.last.books.waiting.get(effect.request)
            longest_us = transition.state.config.queue_timeout_us
            if ticket and ticket.deadline - ticket.at >= longest_us:
                return f"{effect.request} had to time out: {effect.message}"
    return None


def pending(state: State) -> str:
    """Say who waits still, and for whom."""
    told_of = []
    for name, request in state.requests.items():
        reason = state.reasons.get(name)
        why = f"{reason.why.value} {list(reason.who)}" if reason else request.phase.value
        told_of.append(f"{name} for {request.consumer} ({why})")
    return ", ".join(told_of)


# ------------------------------------------------------------------------------------ replays


def replays(config: Config, log: Log, planner: Planner | None) -> Violation | None:
    """P11 and P13: the log gives the same again, whatever the order of the configuration."""
    back = list(reconfigured_backwards(log))
    if replayed(backwards(config), back, planner, "") is None:
        return None
    again = replayed(config, log, planner, "P11")
    return again or replayed(backwards(config), back, planner, "P13")


def reconfigured_backwards(log: Log) -> Iterator[tuple[ev.Event, Transition]]:
    for event, transition in log:
        if isinstance(event, ev.Reconfigured):
            yield evolve(event, config=backwards(event.config)), transition
        else:
            yield event, transition


def backwards(config: Config) -> Config:
    """The same configuration, written down in the other order."""
    return evolve(
        config,
        consumers=dict(reversed(tuple(config.consumers.items()))),
        gpus=dict(reversed(tuple(config.gpus.items()))),
    )


def folded(config: Config, history: Sequence[ev.Event], planner: Planner | None) -> Log:
    """Give a history with what each event brings about; one that brings the core down, nothing."""
    watched = None if planner is None else Watched(planner)
    scheduler, log = Scheduler(config, watched), []
    state = scheduler.initial()
    for event in history:
        try:
            transition = scheduler.step(state, event)
        except Exception:  # noqa: BLE001 - that is what was found
            transition = Transition(state, (), ())
        state = transition.state
        log.append((event, transition))
    return log


def replayed(config: Config, log: Log, planner: Planner | None, name: str) -> Violation | None:
    """P11, P13: the log, read back, gives the same effects and the same state at every point."""
    scheduler = Scheduler(config, planner)
    state = scheduler.initial()
    for number, (event, live) in enumerate(log):
        if number == len(log) // 2:
            state = decode_state(encode_state(state))
        again = scheduler.step(state, decode_event(encode_event(event), event.at))
        state = again.state
        if state != live.state or encoded(again) != encoded(live):
            return Violation(name, f"event {number}, {event}: a replay differs")
    return None


def encoded(transition: Transition) -> list[object]:
    effects = [encode_effect(effect) for effect in transition.effects]
    return [*effects, *(encode_note(note) for note in transition.notes)]


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
    return Run(setting, chance, planner).play()


def campaign(
    seeds: Iterable[int],
    chance_of: MakeChance,
    *,
    planner: Planner | None = None,
    acts: int = ACTS,
    config: Config | None = None,
) -> Iterator[Report]:
    """Play one run for each seed, every other one in a fair setting, some in calm weather.

    With a configuration, in that; where it is not fair (`unfair_because`), no run is.
    """
    for seed in seeds:
        chance = chance_of(seed)
        theme = draw_theme(chance)
        faults = draw_faults(chance, theme)
        if seed % CALM_EVERY == CALM_EVERY - 1:
            setting = draw_calm(chance, faults, acts=acts, config=config, theme=theme)
        else:
            fair = seed % 2 == 0
            setting = draw_setting(chance, faults, fair=fair, acts=acts, config=config, theme=theme)
        yield evolve(play_setting(setting, chance_of(seed), planner), seed=seed)


def first_violation(
    seeds: Iterable[int],
    chance_of: MakeChance,
    *,
    planner: Planner | None = None,
    acts: int = ACTS,
    config: Config | None = None,
) -> Report | None:
    """Play until something is broken; None: nothing was."""
    reports = campaign(seeds, chance_of, planner=planner, acts=acts, config=config)
    return next((report for report in reports if report.violation is not None), None)
