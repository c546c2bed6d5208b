"""A history as a pytest case, in the words of `tests/core/driver.py`: a statement for each event,
and what was decided at it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attrs import NOTHING, fields

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Config, Consumer, Gpu
from mgpu_core.scheduler import Transition

WIDTH = 96
STEP_US = 1_000
HEAD = """\
from mgpu_core import events as ev
from mgpu_core.config import Consumer, Gpu, config_of
from tests.core.driver import STEP_US, Core, lazy, service

"""
INDENT = "    "


def pytest_case(
    name: str,
    config: Config,
    log: Sequence[tuple[ev.Event, Transition]],
    decided: Sequence[Sequence[str]],
    note: str = "",
) -> str:
    """Write a test of this name. `log` begins with the broker's start, `decided` has for each of
    its events what it has to bring about.
    """
    body = [f'"""{note}"""'] if note else []
    body += [_broken("core = Core", [*_configured(config)]), *_statements(log, decided)]
    text = "\n".join([f"def test_{name}() -> None:", *(INDENT + line for line in body)])
    used = [line for line in HEAD.splitlines() if line.startswith("from")]
    imports = [_only_used(line, text) for line in used]
    return "\n".join([*filter(None, imports), "", "", text, ""])


def _only_used(line: str, text: str) -> str:
    """Leave out of an import what the text has no use for."""
    module, _, names = line.partition(" import ")
    kept = [
        name
        for name in names.split(", ")
        if f"{name.rpartition(' as ')[2]}{'.' if ' as ' in name else ''}" in text
    ]
    return f"{module} import {', '.join(kept)}" if kept else ""


def _statements(
    log: Sequence[tuple[ev.Event, Transition]], decided: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Time passes in waits, with the ticks in it; each event takes a millisecond."""
    teller = _Teller()
    at = log[0][1].state.at
    teller.note(log[0][1])
    ticks: list[tuple[int, Sequence[str]]] = []
    for (event, transition), texts in zip(log[1:], decided[1:], strict=True):
        if isinstance(event, ev.Tick):
            ticks.append((transition.state.at, texts))
        else:
            from_us = event.at - STEP_US
            waited = [text for when, told in ticks if when <= from_us for text in told]
            sudden = [text for when, told in ticks if when > from_us for text in told]
            if from_us > at:
                yield _asserted(f"core.wait({_seconds(from_us - at)})", waited)
            yield _asserted(f"core.{teller.call(event)}", [*sudden, *texts])
            at, ticks = event.at, []
        teller.note(transition)
    if ticks:
        texts = [text for _, told in ticks for text in told]
        yield _asserted(f"core.wait({_seconds(ticks[-1][0] - at)})", texts)


def _asserted(call: str, decided: Iterable[str]) -> str:
    return _broken(f"assert {call} == ", [_quoted(text) for text in decided], "[]")


def _broken(before: str, items: Sequence[str], brackets: str = "()") -> str:
    """Put items behind it in brackets, one a line where they are too long for one."""
    opens, closes = brackets[0], brackets[1]
    line = f"{before}{opens}{', '.join(items)}{closes}"
    if len(INDENT + line) <= WIDTH:
        return line
    inner = "".join(f"\n{INDENT * 2}{item}," for item in items)
    return f"{before}{opens}{inner}\n{INDENT}{closes}"


class _Teller:
    """Knows which commands are open: an answer to one needs no epoch."""

    def __init__(self) -> None:
        self._open: dict[tuple[type, str], int] = {}

    def note(self, transition: Transition) -> None:
        for effect in transition.effects:
            if isinstance(effect, fx.StartUnload):
                self._open[ev.UnloadDone, effect.consumer] = effect.epoch
            elif isinstance(effect, fx.StartLoad):
                self._open[ev.SwapDone, effect.consumer] = effect.epoch

    def call(self, event: ev.Event) -> str:
        """Give the method of the driver that sends it."""
        match event:
            case ev.UnloadDone() | ev.SwapDone():
                return self._answer(event)
            case ev.Request() | ev.Cancel() | ev.ServeDone():
                return _of_a_client(event)
            case ev.GpuSample():
                return _sample(event)
            case ev.ProbeResult():
                return _probe(event)
            case ev.Unload() | ev.Load() | ev.Pin():
                return _of_an_operator(event)
            case ev.Reconfigured():
                given = ", ".join(_configured(event.config))
                return f"send(ev.Reconfigured, config=config_of({given}))"
            case ev.Started():
                return 'send(ev.Started, run="run-2")'
        return f"send(ev.{type(event).__name__})"

    def _answer(self, event: ev.UnloadDone | ev.SwapDone) -> str:
        if self._open.get((type(event), event.consumer)) == event.epoch:
            del self._open[type(event), event.consumer]
            word = "loaded" if isinstance(event, ev.SwapDone) else "unloaded"
            return _call(word, event.consumer, *_pairs(error=event.error))
        given = _pairs(consumer=event.consumer, epoch=event.epoch, error=event.error)
        return f"send(ev.{type(event).__name__}, {', '.join(given)})"


def _of_a_client(event: ev.Request | ev.Cancel | ev.ServeDone) -> str:
    match event:
        case ev.Request():
            rest = _pairs(priority=event.priority)
            if event.deadline is not None:
                after_us = _number(event.deadline - event.at)
                rest.append(f"deadline=core.at + STEP_US + {after_us}")
            return _call("request", event.request, event.consumer, *rest)
        case ev.Cancel():
            return _call("cancel", event.request)
    return _call("finish", event.request, *([] if event.outcome == "ok" else [event.outcome]))


def _of_an_operator(event: ev.Unload | ev.Load | ev.Pin) -> str:
    match event:
        case ev.Unload():
            names = map(_quoted, event.consumers)
            return f"unload({', '.join([*names, *_pairs(force=event.force or None)])})"
        case ev.Load():
            return _call("load", event.consumer, *_pairs(only_if_free=event.only_if_free or None))
    return _call("pin", event.consumer, *_pairs(pinned=None if event.pinned else False))


def _probe(event: ev.ProbeResult) -> str:
    told = _pairs(
        resident=event.resident,
        busy=event.busy,
        vram_mib=event.vram_mib,
        failure=event.failure,
        age_s=_age_s(event),
    )
    return _call("probe", event.consumer, *told)


def _sample(event: ev.GpuSample) -> str:
    if event.error:
        return "sample_fails()"
    free = {f"free{one.index or ''}": one.free_mib for one in event.gpus}
    return f"sample({', '.join(_pairs(**free, age_s=_age_s(event)))})"


def _age_s(event: ev.GpuSample | ev.ProbeResult) -> float | None:
    return (event.at - event.taken) / SECOND_US if event.taken < event.at else None


# --------------------------------------------------------------------------------- configurations


def _configured(config: Config) -> Iterator[str]:
    for consumer in config.consumers.values():
        yield _consumer(consumer)
    cards = ", ".join(f"Gpu({', '.join(_differing(gpu))})" for gpu in config.gpus.values())
    yield f"gpus=({cards},)"
    yield from _differing(config, "consumers", "gpus")


def _consumer(consumer: Consumer) -> str:
    kinds = {(True, True): "service", (False, True): "lazy"}
    kind = kinds.get((consumer.load_route, consumer.unload_route))
    if kind is None:
        given = [f"name={_quoted(consumer.name)}", *_memory(consumer)]
        return f"Consumer({', '.join([*given, *_differing(consumer, 'name', 'vram_mib')])})"
    said = ("name", "vram_mib", "load_route", "unload_route")
    plain = consumer.vram_mib.keys() == {0}
    memory = [_number(consumer.vram_mib[0])] if plain else list(_memory(consumer))
    given = [_quoted(consumer.name), *memory, *_differing(consumer, *said)]
    return f"{kind}({', '.join(given)})"


def _memory(consumer: Consumer) -> Iterator[str]:
    by_card = ", ".join(f"{gpu}: {_number(mib)}" for gpu, mib in consumer.vram_mib.items())
    yield f"vram_mib={{{by_card}}}"


def _differing(thing: Config | Consumer | Gpu, *but: str) -> Iterator[str]:
    for one in fields(type(thing)):
        if one.name in but or not one.init:
            continue
        value = getattr(thing, one.name)
        own_server = one.name == "server" and value == getattr(thing, "name", None)
        if not own_server and (one.default is NOTHING or value != one.default):
            yield f"{one.name}={_value(value)}"


# ----------------------------------------------------------------------------------------- values


def _call(method: str, first: str, *rest: str) -> str:
    """Names come first, then what is `key=value` already."""
    given = [text if "=" in text else _quoted(text) for text in rest]
    return f"{method}({', '.join([_quoted(first), *given])})"


def _pairs(**values: Any) -> list[str]:
    return [f"{key}={_value(value)}" for key, value in values.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, tuple):
        return f"({''.join(f'{_value(one)}, ' for one in value).rstrip()})"
    return _number(value) if type(value) is int else repr(value)


def _quoted(text: str) -> str:
    return '"' + repr(text)[1:-1].replace('"', '\\"') + '"'


def _number(value: int) -> str:
    return f"{value:_}"


def _seconds(us: int) -> str:
    return f"{us / SECOND_US:g}" if us % SECOND_US else str(us // SECOND_US)
