"""A recorded history made plain: short names, round times, nothing that decides nothing.

Each step is taken only where exactly the same is decided after it: so a test that is made of it
holds what the log holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import evolve, frozen

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config
from mgpu_core.effects import Effect
from mgpu_core.scheduler import Transition
from mgpu_core.simulation.preamble import STEP_US
from mgpu_core.simulation.shrinking import Case, Retold, shortest, told
from mgpu_core.simulation.world import START_US

Log: TypeAlias = Sequence[tuple[ev.Event, Transition]]
Names: TypeAlias = Mapping[str, str]
# They say how things are: most of them change nothing.
ROUTINE = (ev.GpuSample, ev.ProbeResult)
# So often is it tried to leave some of them out, at least; in short histories more often.
SHORT_TRIES, SHORT_EVENTS = 20, 60_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Times are rounded to the first of these with which the same is decided.
UNITS_US = (SECOND_US, SECOND_US // 10, SECOND_US // 100, STEP_US)


def decision(effect: Effect) -> str | None:
    """Give in a few words what is done to a request or a consumer; None: to nobody."""
    match effect:
        case fx.Serve():
            return f"serve {effect.request}"
        case fx.Reject():
            return f"reject {effect.request} {effect.code}"
        case fx.StartUnload():
            return f"unload {effect.consumer}" + (" by driver" if effect.how == "driver" else "")
        case fx.StartLoad():
            return f"load {effect.consumer}"
    return None


def decisions(effects: Sequence[Effect]) -> list[str]:
    return [words for effect in effects if (words := decision(effect)) is not None]


@frozen(kw_only=True)
class Plain:
    """A case made plain, what it comes to, and the names of then as they are now."""

    case: Case
    retold: Retold
    consumers: Names
    requests: Names

    @property
    def seen_plainly(self) -> bool:
        """Every reading says of cards of known size what is free; the rest of them is used."""
        readings = (
            one
            for event in self.case.events
            if isinstance(event, ev.GpuSample)
            for one in event.gpus
        )
        sizes = {index: gpu.total_mib for index, gpu in self.case.config.gpus.items()}
        return all(one.used_mib + one.free_mib == sizes.get(one.index) for one in readings)

    def words(self, text: str) -> str:
        """Give a decision of then with the names of now."""
        kind, name, *rest = text.split(" ")
        return " ".join([kind, self.consumers.get(name) or self.requests.get(name) or name, *rest])


def made_plain(case: Case, log: Log) -> Plain | None:
    """Make a case plain that was recorded as `log`; None: it doesn't come to the same at all."""
    wanted = decided(log)
    plain = Plain(case=case, retold=told(case, wanted="nothing"), consumers={}, requests={})
    if not _same(plain, wanted):
        return None
    for step in (_named, _without_what_decides_nothing, _seen_plainly, _rounded):
        for better in step(plain.case):
            if _same(better, wanted):
                plain = evolve(
                    better,
                    consumers=better.consumers or plain.consumers,
                    requests=better.requests or plain.requests,
                )
                wanted = decided(plain.retold.log)
                break
    return plain


def decided(log: Log) -> list[list[str]]:
    """Give for each event that is no tick what was decided at it and since the one before it."""
    all_of_them: list[list[str]] = [[]]
    for event, transition in log:
        all_of_them[-1] += decisions(transition.effects)
        if not isinstance(event, ev.Tick):
            all_of_them.append([])
    return all_of_them


def shortened(case: Case, log: Log) -> tuple[Case, Log]:
    """Leave out readings and probes without which the same is decided, when and by what.

    The last event stays. What doesn't come to the same even whole is given as it is.
    """
    wanted = _acts(log)
    events = [one for one in case.events[:-1] if not isinstance(one, ev.Tick)]
    kept: Sequence[int] = range(len(events))
    routine = [number for number in kept if isinstance(events[number], ROUTINE)]
    best: tuple[Case, Log] = case, log

    def same(chosen: Sequence[int]) -> bool:
        nonlocal best
        dropped = set(routine).difference(chosen)
        left = (events[number] for number in kept if number not in dropped)
        again = evolve(case, events=(*left, case.events[-1]))
        retold = told(again, wanted="nothing").log
        if _acts(retold) != wanted:
            return False
        best = again, retold
        return True

    if same(routine):
        shortest(routine, same, tries=max(SHORT_TRIES, SHORT_EVENTS // len(case.events)))
    return best


def _acts(log: Log) -> list[object]:
    """Give what was decided at which event, and all events but those that only show how it is."""
    since = log[0][1].state.at
    return [
        (type(event), getattr(event, "request", None), getattr(event, "consumer", None), at, texts)
        for event, transition in log
        for at, texts in [(transition.state.at - since, decisions(transition.effects))]
        if texts or not isinstance(event, (*ROUTINE, ev.Tick))
    ]


def _same(plain: Plain, wanted: list[list[str]]) -> bool:
    now = decided(plain.retold.log)
    return now == [[plain.words(text) for text in texts] for texts in wanted]


def _told(case: Case, consumers: Names | None = None, requests: Names | None = None) -> Plain:
    return Plain(
        case=case,
        retold=told(case, wanted="nothing"),
        consumers=consumers or {},
        requests=requests or {},
    )


# ------------------------------------------------------------------------------------- the steps


def _named(case: Case) -> Iterator[Plain]:
    """Consumers a, b, c... in their old order, which decides between equals; requests r1, r2..."""
    configs = [case.config, *(e.config for e in case.events if isinstance(e, ev.Reconfigured))]
    old = sorted({name for config in configs for name in config.consumers})
    new = LETTERS if len(old) <= len(LETTERS) else [f"c{n:03}" for n in range(1, len(old) + 1)]
    consumers = dict(zip(old, new, strict=False))
    asked = dict.fromkeys(e.request for e in case.events if isinstance(e, ev.Request))
    requests = {name: f"r{number}" for number, name in enumerate(asked, start=1)}
    servers = {one.server for config in configs for one in config.consumers.values()} - set(old)
    named = {name: f"s{number}" for number, name in enumerate(sorted(servers), start=1)}

    def config_of(config: Config) -> Config:
        return evolve(
            config,
            consumers={
                consumers[name]: evolve(
                    one,
                    name=consumers[name],
                    server=consumers.get(one.server) or named[one.server],
                    can_coexist_with=tuple(consumers.get(n, n) for n in one.can_coexist_with),
                )
                for name, one in config.consumers.items()
            },
        )

    def event_of(event: ev.Event) -> ev.Event:
        if isinstance(event, ev.Reconfigured):
            return evolve(event, config=config_of(event.config))
        if isinstance(event, ev.Unload):
            return evolve(event, consumers=tuple(consumers.get(n, n) for n in event.consumers))
        changed = {
            field: names.get(name, name)
            for field, names in (("consumer", consumers), ("request", requests))
            if (name := getattr(event, field, None)) is not None
        }
        return evolve(event, **changed)

    events = tuple(event_of(event) for event in case.events)
    again = evolve(case, config=config_of(case.config), events=events)
    yield _told(again, consumers, requests)


def _without_what_decides_nothing(case: Case) -> Iterator[Plain]:
    """Ticks come by themselves; kinds of work and errors of probes are for people."""

    def plainer(event: ev.Event) -> ev.Event:
        match event:
            case ev.Request():
                return evolve(event, kind="")
            case ev.ProbeResult():
                failure = None if event.healthy else event.failure or "status"
                return evolve(event, error=None, failure=failure)
            case ev.Started():
                return evolve(event, run="run-2")
        return event

    events = tuple(plainer(one) for one in case.events if not isinstance(one, ev.Tick))
    yield _told(evolve(case, events=events))


def _seen_plainly(case: Case) -> Iterator[Plain]:
    """On a card is used what is not free, and its size is known."""
    sizes: dict[int, int] = {}
    for event in case.events:
        if isinstance(event, ev.GpuSample):
            sizes |= {one.index: one.total_mib for one in event.gpus}

    def config_of(config: Config) -> Config:
        sized = {
            index: evolve(
                gpu, total_mib=sizes.get(index) if gpu.total_mib is None else gpu.total_mib
            )
            for index, gpu in config.gpus.items()
        }
        return evolve(config, gpus=sized)

    config = config_of(case.config)

    def plainer(event: ev.Event) -> ev.Event:
        if isinstance(event, ev.Reconfigured):
            return evolve(event, config=config_of(event.config))
        if not isinstance(event, ev.GpuSample):
            return event
        readings = []
        for one in event.gpus:
            if (gpu := config.gpus.get(one.index)) is not None and gpu.total_mib is not None:
                used_mib = gpu.total_mib - one.free_mib
                readings.append(evolve(one, total_mib=gpu.total_mib, used_mib=used_mib))
        return evolve(event, gpus=tuple(readings))

    yield _told(evolve(case, config=config, events=tuple(map(plainer, case.events))))


def _rounded(case: Case) -> Iterator[Plain]:
    """Whole seconds between two events, or tenths of them, or as little as a test tells apart."""
    for unit_us in UNITS_US:
        yield _told(evolve(case, events=tuple(_in_units(case.events, unit_us))))


def _in_units(events: Sequence[ev.Event], unit_us: int) -> Iterator[ev.Event]:
    def rounded(us: int) -> int:
        return max(0, round(us / unit_us)) * unit_us

    before, at = START_US, START_US
    for event in events:
        at += STEP_US + rounded(event.at - before - STEP_US)
        before = event.at
        changed: dict[str, Any] = {"at": at}
        if isinstance(event, ev.GpuSample | ev.ProbeResult):
            changed["taken"] = at - rounded(event.at - event.taken)
        if isinstance(event, ev.Request) and event.deadline is not None:
            changed["deadline"] = at + rounded(event.deadline - event.at)
        yield evolve(event, **changed)
