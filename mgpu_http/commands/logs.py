"""An event log opened for a command: from which point on, folded over its states, and with all
that is odd about it said on standard error.

    source = Source.of(arguments)
    for step in source.steps(source.point("02:10")):
        print(step.record.seq, step.state.queue)
"""

import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple, TypeAlias

from attrs import evolve, field, frozen

from mgpu_core.codec import CodecError
from mgpu_core.planners import Planner
from mgpu_core.replay import Difference, Record, Replay, compared
from mgpu_core.scheduler import Transition
from mgpu_core.state import State
from mgpu_effects.event_log import (
    EventLogError,
    Gap,
    Item,
    Segment,
    Skipped,
    Torn,
    last_record,
    read,
)
from mgpu_http.commands.output import USAGE, CommandError, message

STANDARD_INPUT = "-"
LOOK_AGAIN_S = 0.2
# More than a segment of the broker's holds: those of other makers are folded in such pieces.
PUT_OFF_AT_MOST = 10_000
_UNITS_US = {"ms": 1_000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
_AGO = re.compile(r"-?(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_CLOCK = re.compile(r"\d\d?:\d\d(:\d\d(\.\d+)?)?")
HOW_POINTS = (
    "the number of an event, a time (2026-03-01T02:10, 02:10:05), or 10m for that before the end"
)
Tell: TypeAlias = Callable[[str], None]
Wanted: TypeAlias = Callable[[Record], bool]


@frozen(kw_only=True)
class Point:
    """A place in a log: after the event of this number, or at this time (microseconds)."""

    text: str
    seq: int | None = None
    at: int | None = None

    def reached(self, record: Record) -> bool:
        """Say whether this event stands there, or after it."""
        if self.seq is not None:
            return record.seq >= self.seq
        return self.at is None or record.at >= self.at

    def passed(self, record: Record) -> bool:
        """Say whether this event is the first that lies beyond it."""
        if self.seq is not None:
            return record.seq > self.seq
        return self.at is not None and record.at > self.at


class Step(NamedTuple):
    """One event of a log; `before` and `transition` are None where the state is not known.

    `difference`: today's code decides otherwise here, so that the states from here on, up to the
    next segment, are not those of then.
    """

    record: Record
    before: State | None
    transition: Transition | None
    difference: Difference | None

    @property
    def state(self) -> State | None:
        """The state after it."""
        return self.transition.state if self.transition else None


@frozen
class There:
    """An event, and the state after it."""

    record: Record
    state: State


@frozen
class Source:
    """The log that a command was given. Everything it raises is a CommandError."""

    log: str
    salvage: bool = False
    tell: Tell = field(default=message)

    @classmethod
    def of(cls, arguments: Namespace) -> "Source":
        """Take LOG and --salvage from a command's arguments."""
        if arguments.log != STANDARD_INPUT and not Path(arguments.log).exists():
            raise CommandError(
                f"there is no {arguments.log}; a log is a directory of segments, a segment, or -"
                " for standard input",
                USAGE,
            )
        return cls(arguments.log, arguments.salvage)

    def silent(self) -> "Source":
        """Give the same for reading it once more: what is odd was said."""
        return evolve(self, tell=lambda _text: None)

    def items(
        self, point: Point | None = None, *, follow: bool = False
    ) -> Iterator[Segment | Record | Gap | Skipped]:
        """Stream it; of a directory, from the start of the segment that `point` is in."""
        point, begun = point or Point(text=""), False
        for item in self._read(point, follow=follow):
            if type(item) is Record:  # nearly all are
                yield item
                continue
            if said := odd(item):
                self.tell(said)
            begun = begun or isinstance(item, Segment)
            if not isinstance(item, Torn):
                yield item
        if not begun:
            raise CommandError(f"{self.log}: it is no event log, or nothing is in it yet", USAGE)

    def _read(self, point: Point, *, follow: bool) -> Iterator[Item]:
        again = _look_again if follow else None
        try:
            yield from read(
                self.log, seq=point.seq, at=point.at, salvage=self.salvage, follow=again
            )
        except EventLogError as error:
            raise CommandError(str(error), USAGE) from error

    def steps(
        self,
        point: Point | None = None,
        *,
        wanted: Wanted | None = None,
        planner: Planner | None = None,
        follow: bool = False,
    ) -> Iterator[Step]:
        """Fold it, from the start of the segment that `point` is in, and give the events that are
        `wanted`. What no such event comes after is read, but not folded.
        """
        fold = Fold(planner)
        for item in self.items(point, follow=follow):
            if not isinstance(item, Record):
                fold.begin(item)
            elif wanted is None or wanted(item):
                yield fold.step(item)
            else:
                fold.put_off(item)

    def there(self, point: Point | None = None) -> "There":
        """Give the last event not beyond the point, and the state after it."""
        if point is None and self.log != STANDARD_INPUT:
            seq = self.last().seq
            point = Point(text=str(seq), seq=seq)
        fold, last = Fold(), None
        for item in self.items(point):
            if not isinstance(item, Record):
                fold.begin(item)
            elif point is not None and point.passed(item):
                break
            else:
                last = item
                fold.put_off(item)
        if last is None or (point is not None and point.seq not in {None, last.seq}):
            place = f"event {point.text}" if point and point.seq is not None else "such a time"
            before = f"the event before that is {last.seq}" if last else "it begins after that"
            raise CommandError(f"{self.log}: {place} is not in it, {before}", USAGE)
        state = fold.state
        if state is None:
            raise CommandError(
                f"{self.log}: what is before event {last.seq} is damaged, so its state is unknown",
                USAGE,
            )
        return There(last, state)

    def point(self, text: str) -> Point:
        """Understand what a user says of a place: see HOW_POINTS."""
        if text.isdecimal():
            return Point(text=text, seq=int(text))
        if found := _AGO.fullmatch(text):
            ago_us = int(float(found[1]) * _UNITS_US[found[2]])
            return Point(text=text, at=self.last().at - ago_us)
        if _CLOCK.fullmatch(text):
            return Point(text=text, at=_last_time(text, self.last().at))
        try:
            return Point(text=text, at=_us(datetime.fromisoformat(text)))
        except ValueError as error:
            raise CommandError(
                f"{text!r} is no place in a log: give {HOW_POINTS}", USAGE
            ) from error

    def last(self) -> Record:
        """Give the last event, without reading what is before its segment."""
        if self.log == STANDARD_INPUT:
            raise CommandError(
                "standard input has no end to count from: give the number of an event, or a date"
                " and time",
                USAGE,
            )
        try:
            found = last_record(Path(self.log))
        except EventLogError as error:
            raise CommandError(str(error), USAGE) from error
        if found is None:
            raise CommandError(f"{self.log}: there are no events in it", USAGE)
        return found


class Fold:
    """Computes the states of a log, as late as can be."""

    def __init__(self, planner: Planner | None = None) -> None:
        self._replay = Replay(planner)
        self._segment: Segment | None = None
        self._written_by = ""
        self._behind: list[Record] = []

    def begin(self, item: Segment | Gap | Skipped) -> None:
        """Take what stands between the events."""
        if isinstance(item, Segment):
            self._segment, self._written_by = item, item.mgpu
        elif isinstance(item, Skipped):
            self._segment = None
            self._replay.lose()
        self._behind.clear()

    def put_off(self, record: Record) -> None:
        """Take an event whose state nobody wants to see yet."""
        self._behind.append(record)
        if len(self._behind) > PUT_OFF_AT_MOST:
            self._catch_up()

    def step(self, record: Record) -> Step:
        """Take an event."""
        if self._segment is not None or self._behind:
            self._catch_up()
        return self._step(record)

    @property
    def state(self) -> State | None:
        """The state after the last event; None: it is unknown."""
        self._catch_up()
        return self._replay.state

    def _catch_up(self) -> None:
        if self._segment is not None:
            try:
                self._replay.begin(self._segment.state)
            except EventLogError as error:
                raise CommandError(str(error), USAGE) from error
            self._segment = None
        for record in self._behind:
            self._step(record)
        self._behind.clear()

    def _step(self, record: Record) -> Step:
        before = self._replay.state
        try:
            transition = self._replay.advance(record)
        except CodecError as error:
            raise CommandError(
                f"event {record.seq} can't be read: {error}; mgpu {self._written_by} wrote it, read"
                " it with that version",
                USAGE,
            ) from error
        if before is None or transition is None:
            return Step(record, None, None, None)
        return Step(record, before, transition, compared(record, before, transition))


def odd(item: Item) -> str | None:
    """Say what is odd about a part of a log, and what it means for the reader."""
    match item:
        case Torn():
            return (
                f"{item.place}: {item.reason}: writing was cut off here, its last {item.size}"
                " bytes are left out"
            )
        case Gap():
            why = "could not be written then" if item.recorded else "are gone, with their segments"
            return f"events {item.first} to {item.last} {why}"
        case Skipped():
            lines = f"{item.lines} lines ({item.size} bytes) skipped: " if item.lines else ""
            rest = "the states after it are unknown, up to the next segment"
            return f"{item.place}: {lines}{item.reason}; {rest}"
    return None


def _look_again() -> bool:
    time.sleep(LOOK_AGAIN_S)
    return True


def _last_time(clock: str, end: int) -> int:
    """Give the last time that the clock showed this, up to the log's end."""
    last = datetime.fromtimestamp(end / 10**6).astimezone()
    day = last.date().isoformat()
    found = datetime.fromisoformat(f"{day}T{clock.zfill(5)}")
    return _us(found if found.astimezone() <= last else found - timedelta(days=1))


def _us(moment: datetime) -> int:
    """Give microseconds since the Unix epoch; without a zone it is local time."""
    return round(moment.astimezone().timestamp() * 10**6)
