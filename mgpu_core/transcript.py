"""A history as a transcript: a configuration, commands, and what was decided and why.

The notation is that of docs/transcripts.md. What differs from the defaults is written, nothing
else. An event that no command can tell (a reading in which memory is neither used nor free, say)
is written as near as can be.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import NOTHING, fields

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu
from mgpu_core.scheduler import Transition
from mgpu_core.telling import READ, said

LINE = "----"
# A command takes so long: waits are what is left of the time between two events.
STEP_US = 1_000


def transcript(
    config: Config, log: Iterable[tuple[ev.Event, Transition]], *, last: int | None = None
) -> str:
    """Write down a history, from its first event on: the broker's start, which goes without saying.

    Ticks are the waits between commands. `last`: no more than so many of the last events.
    """
    writer = _Writer()
    told = [writer.block(event, transition) for event, transition in log]
    blocks = [[*configured(config), LINE, ""], *(told if last is None else told[-last:])]
    return "\n".join(line for block in blocks for line in block)


class _Writer:
    """Knows what is needed to write the next event: the time, and which commands are open."""

    def __init__(self) -> None:
        self._began: int | None = None
        self._at = 0
        self._open: dict[tuple[str, str], int] = {}

    def block(self, event: ev.Event, transition: Transition) -> list[str]:
        if self._began is None:
            self._began = self._at = transition.state.at
            self._note(transition)
            return []
        commands = self._commands(event)
        self._at = max(self._at, event.at)
        self._note(transition)
        told = said(transition.effects, transition.notes, self._at - self._began)
        read = [line for line in told if READ in line]
        told = [line for line in told if line not in read[1:]]
        return [*commands, LINE, *told, ""]

    def _commands(self, event: ev.Event) -> list[str]:
        tick = isinstance(event, ev.Tick)
        wait_us = event.at - self._at - (0 if tick else STEP_US)
        wait = [f"wait {seconds(wait_us)}"] if wait_us > 0 else []
        if wait and isinstance(event, ev.Reconfigured):
            wait += [LINE, ""]  # a configuration begins a block
        return wait + ([] if tick else self._told(event))

    def _told(self, event: ev.Event) -> list[str]:
        if isinstance(event, ev.Reconfigured):
            return ["reconfigure", *configured(event.config)]
        if isinstance(event, ev.UnloadDone | ev.SwapDone):
            return [self._answer(event)]
        return [" ".join(words(event))]

    def _answer(self, event: ev.UnloadDone | ev.SwapDone) -> str:
        kind, word = ("load", "loaded")
        if isinstance(event, ev.UnloadDone):
            kind, word = ("unload", "unloaded")
        if self._open.get((kind, event.consumer)) == event.epoch:
            del self._open[kind, event.consumer]
            return " ".join([word, event.consumer, *([event.error] if event.error else [])])
        error = f" error={event.error}" if event.error else ""
        return f"late {word} {event.consumer} epoch={event.epoch}{error}"

    def _note(self, transition: Transition) -> None:
        for effect in transition.effects:
            if isinstance(effect, fx.StartUnload | fx.StartLoad):
                kind = "load" if isinstance(effect, fx.StartLoad) else "unload"
                self._open[kind, effect.consumer] = effect.epoch


def words(event: ev.Event) -> list[str]:
    """Give the words of the command that tells an event."""
    match event:
        case ev.Request():
            after = None if event.deadline is None else seconds(event.deadline - event.at)
            rest = pairs(priority=event.priority, deadline=after)
            return ["request", event.request, event.consumer, *rest]
        case ev.Cancel():
            return ["cancel", event.request]
        case ev.ServeDone():
            return ["done", event.request, *([] if event.outcome == "ok" else [event.outcome])]
        case ev.GpuSample():
            return _sample(event)
        case ev.ProbeResult():
            return _probe(event)
        case ev.Unload():
            return ["unload-by-force" if event.force else "unload", *event.consumers]
        case ev.Load():
            return ["load-if-free" if event.only_if_free else "load", event.consumer]
        case ev.Pin():
            return ["pin" if event.pinned else "unpin", event.consumer]
        case ev.Started():
            return ["restart"]
    return [type(event).__name__.lower()]


def _sample(event: ev.GpuSample) -> list[str]:
    if event.error:
        return ["sample-fails"]
    free = {f"free{one.index or ''}": one.free_mib for one in event.gpus}
    return ["sample", *pairs(**free, age_s=_age(event))]


def _probe(event: ev.ProbeResult) -> list[str]:
    """A healthy one tells something, a failed one how it failed."""
    told = pairs(
        resident=event.resident,
        busy=event.busy,
        vram_mib=event.vram_mib,
        failure=event.failure,
        age_s=_age(event),
    )
    return ["probe", event.consumer, *told]


def _age(event: ev.GpuSample | ev.ProbeResult) -> str | None:
    return seconds(event.at - event.taken) if event.taken < event.at else None


# ----------------------------------------------------------------------------- configurations


def configured(config: Config) -> list[str]:
    """Give a configuration as lines: the cards, the consumers, then settings of the scheduler."""
    cards = [" ".join(["gpu", *_number(gpu), *differing(gpu)]) for gpu in config.gpus.values()]
    consumers = [" ".join(_consumer(consumer)) for consumer in config.consumers.values()]
    settings = differing(config)
    return [*cards, *consumers, *([" ".join(["set", *settings])] if settings else [])]


def _number(gpu: Gpu) -> list[str]:
    return [str(gpu.index)] if gpu.index else []


def _consumer(consumer: Consumer) -> Iterator[str]:
    kinds = {(True, True): "service", (False, True): "lazy"}
    kind = kinds.get((consumer.load_route, consumer.unload_route), "consumer")
    yield kind
    yield consumer.name
    single = consumer.vram_mib.keys() == {0}
    if single and consumer.vram_mib[0]:
        yield str(consumer.vram_mib[0])
    elif not single:
        by_card = ",".join(f"{gpu}:{mib}" for gpu, mib in consumer.vram_mib.items())
        yield f"vram_mib={by_card or 'none'}"
    if kind == "consumer" and consumer.load_route:
        yield "load_route=true"
    if consumer.server != consumer.name:
        yield f"server={consumer.server}"
    yield from differing(consumer)


# What a line says in another way.
SAID = {"name", "index", "vram_mib", "server", "load_route", "unload_route", "consumers", "gpus"}


def differing(thing: Config | Consumer | Gpu) -> list[str]:
    """Give the fields that are not as they are by default, as `key=value`."""
    changed: dict[str, Any] = {
        field.name: value
        for field in fields(type(thing))
        if field.name not in SAID and field.init
        if field.default is NOTHING or (value := getattr(thing, field.name)) != field.default
    }
    told: Mapping[str, Any] = {
        f"{name.removesuffix('_us')}_s" if name.endswith("_us") else name: seconds(value)
        if name.endswith("_us") and value is not None
        else value
        for name, value in changed.items()
    }
    return [f"{key}={plain(value)}" for key, value in told.items()]


def pairs(**values: object) -> list[str]:
    return [f"{key}={plain(value)}" for key, value in values.items() if value is not None]


def plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def seconds(us: int) -> str:
    """Give microseconds as seconds, without digits that say nothing."""
    whole, rest = divmod(us, SECOND_US)
    return f"{whole}.{rest:06d}".rstrip("0") if rest else str(whole)
