"""A log taken apart: what came from outside, and how long everything took. The simulated host can
live through that again, under another configuration as well.

    recorder = Recorder(state)  # of the first header of a run
    for record in records:
        recorder.see(record)
    recording = recorder.recording()

Only what is seen in events and effects is used, nothing is decided anew. What a log can't tell is
replaced by something usual, and `Recording.remarks` says so.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from attrs import Factory, define, field, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import decode_effect, decode_event
from mgpu_core.config import SECOND_US, Config, Consumer
from mgpu_core.replay import Record
from mgpu_core.simulation.measures import Meter
from mgpu_core.simulation.world import (
    MS_US,
    Act,
    Ask,
    Busy,
    Deed,
    Foreign,
    Script,
    Tape,
    Took,
    Traits,
    Turns,
)
from mgpu_core.state import Phase, Residency, State, assumed_residency, first_belief

IN = Residency.RESIDENT
# Somebody else's memory goes up and down all the time: less than this is no news.
NOISE_MIB = 32
# An unload that has not shown in the readings by then leaves its memory to somebody else.
FREED_WITHIN_US = 60 * SECOND_US
# Of more than that at once nobody tries to tell whose memory it is.
TOLD_APART = 8
# Who waits when the log ends leaves then, or just after what its last event brings about.
LAST_US = 100 * MS_US
# What ended a load or unload that somebody else cut short says nothing of how long it takes.
CUT_SHORT = {"aborted", "cancelled"}
USUAL_WORK_US = SECOND_US
USUAL: Mapping[Deed, Took] = {
    "load": Took(us=3 * SECOND_US),
    "start": Took(us=3 * SECOND_US, memory_us=2 * SECOND_US),
    "unload": Took(us=200 * MS_US),
    "stop": Took(us=SECOND_US),
}
OPERATED = (ev.Unload, ev.Load, ev.Pin, ev.Drain, ev.Resume, ev.Reconfigured, ev.Shutdown)
Key: TypeAlias = tuple[str, str, int]
T = TypeVar("T")


@frozen(kw_only=True)
class Recording:
    """One run of a broker as the simulated host needs it. `config`: the one that it began with.

    Times are microseconds since the Unix epoch, those of the script since `start_us`. `asked`: how
    often for whom. `cards_mib`: how large the cards are, as far as they could be read.
    """

    config: Config
    state: State
    start_us: int
    end_us: int
    script: Script
    traits: Mapping[str, Traits]
    usual: Traits
    cards_mib: Mapping[int, int]
    # When the cards were read without anybody having asked for it, and how long that took.
    polls: Sequence[int]
    sample_ms: int
    # It begins in the middle of the broker's run.
    resumes: bool
    asked: Mapping[str, int]
    remarks: tuple[str, ...]

    @property
    def reconfigured(self) -> int:
        """How often the broker took over another configuration meanwhile."""
        return sum(isinstance(act, ev.Reconfigured) for _, act in self.script)


@define(kw_only=True)
class _Asked:
    """One request, as far as it has come."""

    event: ev.Request
    granted: int | None = None
    cold: bool = False
    # How long after the grant its cold start had taken the memory.
    memory_us: int | None = None
    work_us: int | None = None
    outcome: ev.Outcome = "ok"
    patience_us: int | None = None
    over: bool = False


@define(kw_only=True)
class _Command:
    """A load or unload under way; `number`: which of its consumer's."""

    consumer: str
    deed: Deed
    since: int
    number: int


@define(kw_only=True)
class _Freeing:
    """Memory that was unloaded, by card, and that no reading has shown as free yet."""

    consumer: str
    deed: Deed
    number: int
    since: int
    looked: int
    mib: Mapping[int, int]


@frozen(kw_only=True)
class _Rest:
    """A reading of a card while nothing moves there, and who was in or had left something then."""

    offset: int
    gpu: int
    used_mib: int
    loaded: tuple[str, ...]
    left: tuple[str, ...]

    def news(self, last: "_Rest | None") -> bool:
        return (
            last is None
            or (self.loaded, self.left) != (last.loaded, last.left)
            or abs(self.used_mib - last.used_mib) >= NOISE_MIB
        )


@define(kw_only=True)
class _Rising:
    """A cold start whose memory no reading has shown as taken yet; `from_mib`: in use before it."""

    asked: _Asked
    since: int
    looked: int
    from_mib: Mapping[int, int]


@define(kw_only=True)
class _Seen:
    """One consumer, as the log shows it."""

    consumer: Consumer
    up: bool
    loaded: bool
    # How it was before anything happened to it; None: nothing has, and nobody has told.
    at_first: Turns | None = None
    leaves_residue: bool = False
    starter: str | None = None
    rising: _Rising | None = None
    serving: set[str] = field(factory=set)
    touched: int = -1
    last_done: int = -1
    failures: int = 0
    busy_since: int | None = None
    measured_mib: int | None = None
    tells: Counter[str] = field(factory=Counter)
    mute_at_work: bool = False
    probe_us: int = 0
    probes: int = 0
    deeds: dict[Deed, list[Took | None]] = Factory(lambda: {deed: [] for deed in USUAL})
    # What readings showed of it, by card, whenever it alone gave back its memory.
    given_mib: dict[int, list[int]] = field(factory=dict)

    def full_mib(self, gpu: int) -> int:
        """What it holds on a card while it is in: as seen, else as configured or measured."""
        if self.consumer.vram_managed or not self.consumer.vram_mib:
            return 0
        if given := self.given_mib.get(gpu):
            return _median(given) + self.consumer.vram_residue_mib
        declared = self.consumer.vram_mib.get(gpu, 0)
        return declared or (self.measured_mib or 0 if self.consumer.vram_auto else 0)

    def left_mib(self, gpu: int) -> int:
        return min(self.full_mib(gpu), self.consumer.vram_residue_mib)

    def held_mib(self, gpu: int) -> int:
        """What it holds on a card now."""
        if self.loaded:
            return self.full_mib(gpu)
        return self.left_mib(gpu) if self.leaves_residue else 0


class Recorder:
    """Takes one run of a broker in, event by event; `meter` is shown them as well."""

    def __init__(self, state: State, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()
        self._state = state
        self._config = state.config
        self._start = self._end = state.at
        self._begun = False
        self._seen: dict[str, _Seen] = {}
        self._asked: dict[str, _Asked] = {}
        self._script: list[tuple[int, Act]] = []
        self._commands: dict[Key, _Command] = {}
        # When the last command of each server was over: the next one began no earlier.
        self._lanes: dict[str, int] = {}
        self._freeing: list[_Freeing] = []
        # At rest: when, on which card, how much was in use, who was in, who had left a residue.
        self._rests: list[_Rest] = []
        self._last_rest: dict[int, _Rest] = {}
        self._used: dict[int, int] = {}
        self._moved: dict[int, int] = {}
        self._cards_mib: dict[int, int] = {}
        self._polls: list[int] = []
        self._wants_sample = False
        self._resumes = False
        self._samples = self._sample_us = self._unread = 0
        self._remarks: list[str] = []

    def see(self, record: Record) -> None:
        """Take the next event. Raises CodecError."""
        event = decode_event(record.event, record.at)
        effects = [decode_effect(effect) for effect in record.effects]
        if not self._begun:
            self._begin(event)
        self._end = max(self._end, event.at)
        self._meter.take(event.at, event, effects)
        self._take(event)
        for effect in effects:
            self._decided(effect, event.at)
        for note in record.notes:
            if note["type"] == "Measured" and note["consumer"] in self._seen:
                self._seen[note["consumer"]].measured_mib = note["measured_mib"]

    # ------------------------------------------------------------------------- the beginning

    def _begin(self, event: ev.Event) -> None:
        self._begun = True
        fresh = isinstance(event, ev.Started)
        self._start = self._end = event.at if fresh else self._state.at
        for name, consumer in self._config.consumers.items():
            known = self._state.consumers[name]
            belief = first_belief(consumer) if fresh else known
            self._seen[name] = _Seen(
                consumer=consumer,
                up=not belief.refused and not belief.unreachable,
                loaded=belief.residency is IN,
                measured_mib=known.measured_mib,
                leaves_residue=not fresh and belief.residency is Residency.ABSENT,
            )
        if not fresh:
            self._resumes = True
            self._go_on()

    def _go_on(self) -> None:
        """The log begins in mid-run: who is on the way comes at its beginning."""
        state, at = self._state, self._start
        for name, known in state.consumers.items():
            if known.pinned is not None:
                self._script.append((1, ev.Pin(at=at, consumer=name, pinned=known.pinned)))
        ahead = [one for one in state.requests.values() if one.operator is None]
        for one in sorted(ahead, key=lambda one: (one.phase is not Phase.SERVING, one.arrival)):
            event = ev.Request(
                at=at,
                request=one.request,
                consumer=one.consumer,
                kind=one.kind,
                priority=one.priority,
                deadline=one.deadline,
            )
            self._take(event)
            granted = one.phase is Phase.SERVING
            effects = [fx.Serve(request=one.request, consumer=one.consumer)] if granted else []
            self._meter.take(at, event, effects)
            for effect in effects:
                self._decided(effect, at)
        for name, known in state.consumers.items():
            if (doing := known.operation) is not None:
                deed: Deed = "stop" if doing.how == "driver" else doing.kind
                self._order(name, doing.epoch, deed, at)
        if ahead:
            self._remarks.append(
                f"{len(ahead):>5} requests on the way when the log begins: they count from there"
            )

    # --------------------------------------------------------------------------------- events

    def _take(self, event: ev.Event) -> None:
        match event:
            case ev.Request():
                self._asked.setdefault(event.request, _Asked(event=event))
            case ev.Cancel():
                self._leave(event)
            case ev.ServeDone():
                self._done(event)
            case ev.SwapDone() | ev.UnloadDone():
                self._ended(event)
            case ev.GpuSample():
                self._read(event)
            case ev.ProbeResult() if event.consumer in self._seen:
                self._probed(self._seen[event.consumer], event)
            case _ if isinstance(event, OPERATED):
                self._operate(event)

    def _operate(self, event: ev.Event) -> None:
        self._script.append((event.at - self._start, event))
        if isinstance(event, ev.Reconfigured):
            self._config = event.config
            for name, consumer in event.config.consumers.items():
                belief = first_belief(consumer)
                seen = self._seen.setdefault(
                    name,
                    _Seen(consumer=consumer, up=not belief.refused, loaded=belief.residency is IN),
                )
                seen.consumer = consumer

    def _leave(self, event: ev.Cancel) -> None:
        asked = self._asked.get(event.request)
        if asked is not None and asked.granted is None and not asked.over:
            asked.patience_us = event.at - asked.event.at
            asked.over = True

    def _done(self, event: ev.ServeDone) -> None:
        asked = self._asked.get(event.request)
        if asked is None or asked.granted is None or asked.over:
            return
        asked.work_us, asked.outcome, asked.over = event.at - asked.granted, event.outcome, True
        seen = self._seen[asked.event.consumer]
        seen.serving.discard(event.request)
        seen.touched = seen.last_done = event.at
        if seen.starter == event.request:
            seen.starter = None
            self._move(seen, event.at)

    # -------------------------------------------------------------------------------- effects

    def _decided(self, effect: fx.Effect, at: int) -> None:
        match effect:
            case fx.Serve() if effect.request in self._asked:
                self._serve(self._asked[effect.request], at)
            case fx.Reject() if effect.request in self._asked:
                self._asked[effect.request].over = True
            case fx.SampleGpu():
                self._wants_sample = True
            case fx.StartLoad():
                self._order(effect.consumer, effect.epoch, "load", at)
            case fx.StartUnload():
                deed: Deed = "stop" if effect.how == "driver" else "unload"
                self._order(effect.consumer, effect.epoch, deed, at)

    def _serve(self, asked: _Asked, at: int) -> None:
        seen, request = self._seen[asked.event.consumer], asked.event.request
        self._fix(seen)
        asked.granted = at
        seen.serving.add(request)
        if not seen.loaded:
            asked.cold, seen.loaded, seen.starter = True, True, request
            seen.rising = _Rising(asked=asked, since=at, looked=at, from_mib=dict(self._used))
            self._unwatch(seen)
            self._move(seen, at)

    def _order(self, name: str, epoch: int, deed: Deed, at: int) -> None:
        seen = self._seen[name]
        self._fix(seen)
        self._move(seen, at)
        if deed == "load":
            self._unwatch(seen)
        number = len(seen.deeds[deed])
        seen.deeds[deed].append(None)
        key = ("load" if deed == "load" else "unload", name, epoch)
        self._commands[key] = _Command(consumer=name, deed=deed, since=at, number=number)

    def _ended(self, event: ev.SwapDone | ev.UnloadDone) -> None:
        loads = isinstance(event, ev.SwapDone)
        command = self._commands.pop(
            ("load" if loads else "unload", event.consumer, event.epoch), None
        )
        if command is None:
            return
        seen = self._seen[event.consumer]
        server = seen.consumer.server
        us = event.at - max(command.since, self._lanes.get(server, 0))
        self._lanes[server] = event.at
        if event.error not in CUT_SHORT:
            seen.deeds[command.deed][command.number] = Took(us=us, error=event.error)
        self._move(seen, event.at)
        if loads:
            seen.loaded = event.error is None and (seen.loaded or not seen.consumer.lazy)
            seen.up = seen.up or event.error is None
        elif event.error is None:
            self._unloaded(seen, command, event.at)

    def _unloaded(self, seen: _Seen, command: _Command, at: int) -> None:
        before = {gpu: seen.held_mib(gpu) for gpu in seen.consumer.vram_mib}
        stops = command.deed == "stop"
        for one in self._of_server(seen) if stops else (seen,):
            one.loaded, one.starter, one.touched = False, None, at
            one.leaves_residue = not stops
            one.up = one.up and not stops
        gone = {gpu: mib - seen.held_mib(gpu) for gpu, mib in before.items()}
        if any(gone.values()) and self._used:
            self._freeing.append(
                _Freeing(
                    consumer=command.consumer,
                    deed=command.deed,
                    number=command.number,
                    since=at,
                    looked=at,
                    mib=gone,
                )
            )

    def _of_server(self, seen: _Seen) -> Sequence[_Seen]:
        return [one for one in self._seen.values() if one.consumer.server == seen.consumer.server]

    def _unwatch(self, seen: _Seen) -> None:
        """It takes memory again: nobody can see any more when the last was free."""
        self._freeing = [one for one in self._freeing if one.consumer != seen.consumer.name]

    def _move(self, seen: _Seen, at: int) -> None:
        seen.touched = at
        for gpu in seen.consumer.vram_mib:
            self._moved[gpu] = at

    # ------------------------------------------------------------------------------- the cards

    def _read(self, sample: ev.GpuSample) -> None:
        if not self._wants_sample:
            self._polls.append(sample.taken)
        self._wants_sample = False
        if sample.error is not None or not sample.gpus:
            self._unread += 1
            return
        self._samples += 1
        self._sample_us += sample.at - sample.taken
        used = {reading.index: reading.used_mib for reading in sample.gpus}
        if not self._cards_mib:
            self._disbelieve(used)
        self._cards_mib |= {reading.index: reading.total_mib for reading in sample.gpus}
        self._see_freed(sample.taken, used)
        for seen in self._seen.values():
            if seen.rising is not None:
                self._see_risen(seen, seen.rising, sample.taken, used)
        self._used |= used
        for gpu, mib in used.items():
            if not self._moving(gpu, sample.taken):
                self._rest(gpu, mib, sample.taken)

    def _disbelieve(self, used: Mapping[int, int]) -> None:
        """Who is only taken to be loaded is not, where the first reading shows too little: as many
        are in as it has room for.
        """
        for gpu, mib in used.items():
            there = [one for one in self._seen.values() if one.loaded and one.full_mib(gpu)]
            left = mib - sum(one.full_mib(gpu) for one in there if one.at_first is not None)
            taken = [one for one in there if one.at_first is None][:TOLD_APART]
            choices = [(sum(one.full_mib(gpu) for one in some), some) for some in _subsets(taken)]
            _, believed = max(
                (one for one in choices if one[0] <= left + NOISE_MIB),
                key=lambda one: one[0],
                default=(0, ()),
            )
            for one in taken:
                one.loaded = any(one is other for other in believed)

    def _see_freed(self, taken: int, used: Mapping[int, int]) -> None:
        """It was free some time between the last reading without and the first with it."""
        looked = [one for one in self._freeing if one.since <= taken][:TOLD_APART]
        if not looked:
            return
        fell = {gpu: self._used.get(gpu, mib) - mib for gpu, mib in used.items()}
        freed = min(_subsets(looked), key=lambda some: _unexplained_mib(fell, some))
        for one in looked:
            deeds = self._seen[one.consumer].deeds[one.deed]
            took = deeds[one.number]
            if one in freed and took is not None:
                lag_us = (one.looked + taken) // 2 - one.since
                deeds[one.number] = Took(us=took.us, error=took.error, memory_us=lag_us)
                if len(freed) == 1:
                    self._weigh(one, fell)
            one.looked = taken
        self._freeing = [
            one for one in self._freeing if one not in freed and taken - one.since < FREED_WITHIN_US
        ]

    def _weigh(self, one: _Freeing, fell: Mapping[int, int]) -> None:
        given = self._seen[one.consumer].given_mib
        for gpu, mib in one.mib.items():
            if mib and 2 * abs(fell.get(gpu, 0) - mib) < mib:
                given.setdefault(gpu, []).append(fell[gpu])

    def _see_risen(self, seen: _Seen, rising: _Rising, taken: int, used: Mapping[int, int]) -> None:
        """Three quarters will do: others may give some back meanwhile."""
        if all(
            4 * (used.get(gpu, 0) - rising.from_mib.get(gpu, 0)) >= 3 * seen.held_mib(gpu)
            for gpu in seen.consumer.vram_mib
        ):
            rising.asked.memory_us = (rising.looked + taken) // 2 - rising.since
            seen.rising = None
        elif not seen.loaded or taken - rising.since > FREED_WITHIN_US:
            seen.rising = None
        else:
            rising.looked = max(rising.looked, taken)

    def _moving(self, gpu: int, taken: int) -> bool:
        """Something loads or unloads there, so that nobody can tell what is whose."""
        moving = {command.consumer for command in self._commands.values()}
        moving |= {one.consumer for one in self._freeing}
        return taken <= self._moved.get(gpu, -1) or any(
            gpu in seen.consumer.vram_mib and (seen.starter is not None or name in moving)
            for name, seen in self._seen.items()
        )

    def _rest(self, gpu: int, used_mib: int, at: int) -> None:
        """Remember what was in use and whose it may be, where that is news."""
        there = [seen for seen in self._seen.values() if gpu in seen.consumer.vram_mib]
        rest = _Rest(
            offset=at - self._start,
            gpu=gpu,
            used_mib=used_mib,
            loaded=tuple(seen.consumer.name for seen in there if seen.loaded),
            left=tuple(
                seen.consumer.name for seen in there if seen.leaves_residue and not seen.loaded
            ),
        )
        if rest.news(self._last_rest.get(gpu)):
            self._last_rest[gpu] = rest
            self._rests.append(rest)

    def _foreign(self) -> Iterator[tuple[int, Act]]:
        """Give what nobody here held. It is known at rest only; the first counts from the start."""
        known: set[int] = set()
        for rest in self._rests:
            ours = sum(self._seen[name].full_mib(rest.gpu) for name in rest.loaded)
            ours += sum(self._seen[name].left_mib(rest.gpu) for name in rest.left)
            offset = rest.offset if rest.gpu in known else 0
            known.add(rest.gpu)
            yield offset, Foreign(gpu=rest.gpu, mib=max(0, rest.used_mib - ours))

    # --------------------------------------------------------------------------------- probes

    def _probed(self, seen: _Seen, probe: ev.ProbeResult) -> None:
        server = self._of_server(seen)
        names = {one.consumer.name for one in server}
        doing = any(command.consumer in names for command in self._commands.values())
        if not probe.healthy:
            self._no_answer(seen, probe, doing=doing)
            return
        seen.failures = 0
        seen.probes += 1
        seen.probe_us += probe.at - probe.taken
        seen.tells["residency"] += probe.resident is not None
        seen.tells["busy"] += probe.busy is not None
        seen.tells["vram"] += probe.vram_mib is not None
        if not doing and not seen.serving and probe.taken > seen.touched:
            loaded = probe.resident
            if loaded is None and not seen.up:
                loaded = assumed_residency(seen.consumer) is IN
            self._found(seen, probe.taken, up=True, loaded=loaded)
            self._busy(seen, probe)
            if probe.vram_mib and seen.loaded:
                seen.measured_mib = probe.vram_mib

    def _no_answer(self, seen: _Seen, probe: ev.ProbeResult, *, doing: bool) -> None:
        worked = any(one.serving or one.last_done >= probe.taken for one in self._of_server(seen))
        if probe.failure == "timeout" and worked:
            seen.mute_at_work = True
        elif not doing and probe.taken > seen.touched:
            seen.failures += 1
            if probe.failure == "refused" or seen.failures >= self._config.probe_failures:
                self._found(seen, probe.taken, up=False, loaded=False)

    def _found(self, seen: _Seen, at: int, *, up: bool, loaded: bool | None) -> None:
        """A service is as nobody here has made it."""
        loaded = seen.loaded if loaded is None else loaded
        news = (up, loaded) != (seen.up, seen.loaded)
        seen.up, seen.loaded = up, loaded
        if seen.at_first is None:
            self._fix(seen)
        elif news:
            self._script.append((at - self._start, self._as_it_is(seen)))
            self._move(seen, at)

    def _fix(self, seen: _Seen) -> None:
        """What is known by now is how it was at first."""
        if seen.at_first is None:
            seen.at_first = self._as_it_is(seen)

    def _as_it_is(self, seen: _Seen) -> Turns:
        return Turns(consumer=seen.consumer.name, up=seen.up, loaded=seen.loaded)

    def _busy(self, seen: _Seen, probe: ev.ProbeResult) -> None:
        """Somebody works with it past the broker, from the probe that says so to the next."""
        if probe.busy and seen.busy_since is None:
            seen.busy_since = probe.taken
        elif not probe.busy and seen.busy_since is not None:
            self._was_busy(seen, probe.taken)

    def _was_busy(self, seen: _Seen, until: int) -> None:
        assert seen.busy_since is not None
        us = max(1, until - seen.busy_since - MS_US)
        offset = seen.busy_since - self._start
        self._script.append((offset, Busy(consumer=seen.consumer.name, us=us)))
        seen.busy_since = None

    # -------------------------------------------------------------------------------- the end

    def recording(self) -> Recording:
        """Give what came together."""
        for seen in self._seen.values():
            self._fix(seen)
            if seen.busy_since is not None:
                self._was_busy(seen, self._end)
        works = _Works(self._asked.values())
        asks = [
            # Nobody can come before the broker is there.
            (max(1, one.event.at - self._start), works.ask(one, self._end))
            for one in self._asked.values()
        ]
        first = [(0, seen.at_first) for seen in self._seen.values() if seen.at_first is not None]
        usual = self._usual(works)
        self._remark(works)
        return Recording(
            config=self._state.config,
            state=self._state,
            start_us=self._start,
            end_us=self._end,
            script=(
                *first,
                *sorted([*self._script, *self._foreign(), *asks], key=lambda item: item[0]),
            ),
            traits={
                name: self._traits(seen, works.starts.get(name, []), usual)
                for name, seen in self._seen.items()
            },
            usual=Traits(
                spread=(10, 10), tapes={deed: Tape(then=took) for deed, took in usual.items()}
            ),
            cards_mib=dict(self._cards_mib),
            polls=self._polls,
            resumes=self._resumes,
            sample_ms=_ms(self._sample_us, self._samples),
            asked=Counter(one.event.consumer for one in self._asked.values()),
            remarks=tuple(self._remarks),
        )

    def _usual(self, works: "_Works") -> dict[Deed, Took]:
        """How each deed usually went, whoever did it."""
        took: dict[Deed, list[Took | None]] = {
            deed: [one for seen in self._seen.values() for one in seen.deeds[deed]]
            for deed in USUAL
        }
        took["start"] = [one for starts in works.starts.values() for one in starts]
        return {deed: _middle(took[deed]) or then for deed, then in USUAL.items()}

    def _traits(self, seen: _Seen, starts: list[Took], usual: Mapping[Deed, Took]) -> Traits:
        deeds: dict[Deed, list[Took | None]] = {**seen.deeds, "start": [*starts]}
        own = {deed: _middle(took) for deed, took in deeds.items()}
        # A first request brings it in about as fast as a load does; a stop is no unload.
        own["load"] = own["load"] or own["start"]
        own["start"] = own["start"] or own["load"]
        tapes: dict[Deed, Tape] = {}
        for deed, took in deeds.items():
            then = own[deed] or usual[deed]
            tapes[deed] = Tape(takes=tuple(one or then for one in took), then=then)
        return Traits(
            spread=(10, 10),
            tells_residency=seen.tells["residency"] > 0,
            tells_busy=seen.tells["busy"] > 0,
            tells_vram=seen.tells["vram"] > 0,
            mute_at_work=seen.mute_at_work,
            holds_mib={gpu: seen.full_mib(gpu) for gpu in seen.given_mib},
            unknown_mib=seen.measured_mib or 0,
            probe_ms=(_ms(seen.probe_us, seen.probes),) * 2,
            tapes=tapes,
        )

    def _remark(self, works: "_Works") -> None:
        """Say what the log does not tell, and what is taken instead."""
        took = [one for seen in self._seen.values() for all_ in seen.deeds.values() for one in all_]
        waited = sum(one.granted is None and not one.over for one in self._asked.values())
        served = sum(one.granted is not None and not one.over for one in self._asked.values())
        told = (
            (took.count(None), "loads and unloads that never ended: the usual time is taken"),
            (waited, "requests that waited when the log ended: they leave then"),
            (served, "requests at work when the log ended: the usual time, or longer"),
            (works.unserved, "requests that were never served: the usual time for their work"),
            (self._unread if self._samples else 0, "readings of the cards that failed: left out"),
        )
        self._remarks += [f"{count:>5} {text}" for count, text in told if count]
        if not self._samples:
            self._remarks.append("no card was ever read: nobody else's memory is known")
        never = sorted(works.strangers)
        if never:
            self._remarks.append(
                f"{', '.join(never)}: no request was ever served, its work takes"
                f" {USUAL_WORK_US / SECOND_US:.0f} s"
            )


class _Works:
    """How long the work on each request took. What a cold start added to it is told apart: what
    first requests usually took longer than others.
    """

    def __init__(self, asked: Iterable[_Asked]) -> None:
        done: dict[str, dict[bool, list[int]]] = {}
        self.unserved = 0
        names: set[str] = set()
        for one in asked:
            names.add(one.event.consumer)
            if one.work_us is not None:
                kinds = done.setdefault(one.event.consumer, {True: [], False: []})
                kinds[one.cold].append(one.work_us)
            self.unserved += one.granted is None
        self.strangers = names - done.keys()
        self.starts: dict[str, list[Took]] = {}
        self._usual_us: dict[str, int] = {}
        self._start_us: dict[str, int] = {}
        for name, kinds in done.items():
            warm = kinds[False] or kinds[True]
            self._usual_us[name] = _median(warm)
            cold_us = _median(kinds[True]) if kinds[True] else 0
            self._start_us[name] = max(0, cold_us - self._usual_us[name])

    def ask(self, one: _Asked, end: int) -> Ask:
        """Give what the simulated host is to be asked; `end` of the log."""
        event = one.event
        usual_us = self._usual_us.get(event.consumer, USUAL_WORK_US)
        start_us, patience_us, work_us = 0, one.patience_us, one.work_us
        if work_us is None:
            so_far_us = 0 if one.granted is None else end - one.granted
            work_us = max(usual_us, so_far_us)
        if one.cold:
            start_us = min(work_us, self._start_us.get(event.consumer, 0))
            memory_us = work_us // 2 if one.memory_us is None else one.memory_us
            took = Took(us=start_us, memory_us=memory_us)
            self.starts.setdefault(event.consumer, []).append(took)
        if one.granted is None and not one.over:
            patience_us = end - event.at + LAST_US
        return Ask(
            consumer=event.consumer,
            request=event.request,
            kind=event.kind,
            outcome=one.outcome,
            work_us=work_us - start_us,
            priority=event.priority,
            patience_us=patience_us,
            deadline_us=None if event.deadline is None else event.deadline - event.at,
        )


def _subsets(of: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """Give every choice of them; none at all comes first."""
    for bits in range(1 << len(of)):
        yield tuple(one for place, one in enumerate(of) if bits >> place & 1)


def _unexplained_mib(fell: Mapping[int, int], freed: Iterable[_Freeing]) -> int:
    """How much a fall of what is in use differs from what these would give back."""
    given: Counter[int] = Counter()
    for one in freed:
        given.update(one.mib)
    return sum(abs(mib - given[gpu]) for gpu, mib in fell.items())


def _middle(took: Iterable[Took | None]) -> Took | None:
    """Give what is usual of these; None: there is none that went well."""
    well = [one for one in took if one is not None and one.error is None]
    if not well:
        return None
    return Took(
        us=_median([one.us for one in well]), memory_us=_median([one.memory_us for one in well])
    )


def _median(of: Sequence[int]) -> int:
    return (sorted(of)[len(of) // 2] + sorted(of)[(len(of) - 1) // 2]) // 2


def _ms(us: int, count: int) -> int:
    """Give the mean in milliseconds, 1 at least."""
    return max(1, round(us / max(1, count) / MS_US))
