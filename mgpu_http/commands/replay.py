"""`mgpu replay`: every event of a log through today's code, its decisions compared with those of
then, up to the first that differs.
"""

import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from difflib import ndiff
from typing import Any, TypeAlias

from attrs import define

from mgpu_core.codec import CodecError, decode_event, decode_note, encode_note, encode_state
from mgpu_core.planners import Planner
from mgpu_core.replay import Difference, Record
from mgpu_core.state import State
from mgpu_core.telling import noted
from mgpu_http.commands.log import load_planner
from mgpu_http.commands.log_state import told
from mgpu_http.commands.log_words import date_and_clock, event_words
from mgpu_http.commands.logs import Fold, Source
from mgpu_http.commands.output import (
    DONE,
    FAILED,
    CommandError,
    Progress,
    document,
    message,
    result,
)

Json: TypeAlias = Mapping[str, Any]
PROGRESS_EVERY = 1_000


def replay(arguments: Namespace) -> int:
    """Exit code 0: nothing differs; 1: something does."""
    source = Source.of(arguments)
    strict = Strict(load_planner(arguments.planner) if arguments.planner else None)
    found = strict.run(source)
    if arguments.json:
        document(strict.summary() | {"difference": found and found.encoded()})
    else:
        if found is not None:
            result("\n".join(found.lines()))
        strict.tell(differs=found is not None)
    return DONE if found is None else FAILED


@define
class Strict:
    """Replays a log, and counts."""

    planner: Planner | None
    events: int = 0
    unknown: int = 0  # events whose state is not known, as those before them are damaged
    took_s: float = 0.0

    def run(self, source: Source) -> "Differs | None":
        """Give the first event that differs; None: there is none."""
        fold, began = Fold(self.planner), time.perf_counter()
        found = None
        with Progress() as progress:
            for item in source.items():
                if not isinstance(item, Record):
                    fold.begin(item)
                    continue
                if (found := self._step(fold, item)) is not None:
                    break
                if self.events % PROGRESS_EVERY == 0:
                    self.took_s = time.perf_counter() - began
                    progress.show(f"event {item.seq}: {self.events} replayed, {self.rate} a second")
        self.took_s = time.perf_counter() - began
        return found

    def _step(self, fold: Fold, record: Record) -> "Differs | None":
        self.events += 1
        try:
            step = fold.step(record)
        except CommandError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a planner or a defect may raise
            return Differs(record, fold.state, None, f"{type(error).__name__}: {error}")
        if step.before is None:
            self.unknown += 1
        return Differs(record, step.before, step.difference) if step.difference else None

    @property
    def rate(self) -> int:
        return round(self.events / max(self.took_s, 0.001))

    def summary(self) -> dict[str, Any]:
        return {"events": self.events, "unknown": self.unknown, "events_per_s": self.rate}

    def tell(self, *, differs: bool) -> None:
        """Say how far it came."""
        compared = self.events - self.unknown
        if self.unknown:
            message(f"{self.unknown} events were not compared: what is before them is damaged")
        rate = f"{self.rate} a second"
        if differs:
            message(f"{compared - 1} events before it are decided today as they were then ({rate})")
        else:
            result(f"{compared} events are decided today as they were then ({rate})")


@define
class Differs:
    """The first event about which today's code decides otherwise, or fails."""

    record: Record
    before: State | None
    difference: Difference | None
    failure: str | None = None

    def encoded(self) -> dict[str, Any]:
        record, difference = self.record, self.difference
        return {
            "seq": record.seq,
            "at": record.at,
            "event": record.event,
            "expected": record.effects if difference is None else difference.expected,
            "got": None if difference is None else difference.got,
            "failure": self.failure,
            "notes": difference and [encode_note(note) for note in difference.transition.notes],
            "recorded_notes": list(record.notes),
            "before": self.before and encode_state(self.before),
        }

    def lines(self) -> Iterator[str]:
        """Tell the event, what was decided then (-) and is today (+), why, and in which state."""
        record, run = self.record, self.before.run if self.before else "-"
        yield f"event {record.seq} differs: {_event(record)}"
        yield f"{date_and_clock(record.at)}, run {run}"
        if self.difference is None:
            yield f"\ntoday's code fails: {self.failure}"
        else:
            yield "\ndecided (- then, + today)"
            then = [_effect(effect) for effect in self.difference.expected]
            today = [_effect(effect) for effect in self.difference.got]
            yield from _indented(line for line in ndiff(then, today) if not line.startswith("?"))
            yield "\nbecause, today"
            yield from _indented(map(noted, self.difference.transition.notes))
        yield "\nbecause, then"
        yield from _indented(map(_note, record.notes))
        if self.before is not None:
            yield "\nthe state before it"
            for part in told(self.before):
                yield f"\n{part}"


def _indented(lines: Iterable[str]) -> Iterator[str]:
    lines = [f"  {line.strip() if line[:1] != '+' else line}".rstrip() for line in lines]
    return iter(lines or ["  (nothing was noted)"])


def _event(record: Record) -> str:
    try:
        return event_words(decode_event(record.event, record.at))
    except CodecError:
        return str(record.event.get("type"))


def _effect(effect: Json) -> str:
    words = [f"{key}={value}" for key, value in effect.items() if key != "type"]
    return " ".join([effect["type"], *words])


def _note(note: Json) -> str:
    """Tell a note of then; of an older version as it stands there."""
    try:
        return noted(decode_note(note))
    except (KeyError, TypeError, ValueError):
        return _effect(note)
