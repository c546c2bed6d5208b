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
from typing import TypeAlias

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
    last_at,
    read,
)
from mgpu_http.commands.output import USAGE, CommandError, message

STANDARD_INPUT = "-"
LOOK_AGAIN_S = 0.2
_UNITS_US = {"ms": 1_000, "s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
_AGO = re.compile(r"-?(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_CLOCK = re.compile(r"\d\d?:\d\d(:\d\d(\.\d+)?)?")
HOW_POINTS = (
    "the number of an event, a time (2026-03-01T02:10, 02:10:05), or 10m for that before the end"
)
Tell: TypeAlias = Callable[[str], None]


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


@frozen
class Step:
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
        planner: Planner | None = None,
        follow: bool = False,
    ) -> Iterator[Step]:
        """Fold it, event by event, from the start of the segment that `point` is in."""
        replay = Replay(planner)
        for item in self.items(point, follow=follow):
            if isinstance(item, Record):
                yield folded(replay, item, self.log)
            else:
                begin(replay, item)

    def point(self, text: str) -> Point:
        """Understand what a user says of a place: see HOW_POINTS."""
        if text.isdecimal():
            return Point(text=text, seq=int(text))
        if found := _AGO.fullmatch(text):
            return Point(text=text, at=self._end() - int(float(found[1]) * _UNITS_US[found[2]]))
        if _CLOCK.fullmatch(text):
            return Point(text=text, at=_last_time(text, self._end()))
        try:
            return Point(text=text, at=_us(datetime.fromisoformat(text)))
        except ValueError as error:
            raise CommandError(
                f"{text!r} is no place in a log: give {HOW_POINTS}", USAGE
            ) from error

    def _end(self) -> int:
        if self.log == STANDARD_INPUT:
            raise CommandError(
                "standard input has no end to count from: give the number of an event, or a date"
                " and time",
                USAGE,
            )
        try:
            found = last_at(Path(self.log))
        except EventLogError as error:
            raise CommandError(str(error), USAGE) from error
        if found is None:
            raise CommandError(f"{self.log}: there are no events in it", USAGE)
        return found


def begin(replay: Replay, item: Segment | Gap | Skipped) -> None:
    """Have a replay know what stands between the events."""
    if isinstance(item, Segment):
        try:
            replay.begin(item.state)
        except EventLogError as error:
            raise CommandError(str(error), USAGE) from error
    elif isinstance(item, Skipped):
        replay.lose()


def folded(replay: Replay, record: Record, log: str = "the log") -> Step:
    """Take one event."""
    before = replay.state
    try:
        transition = replay.advance(record)
    except CodecError as error:
        raise CommandError(f"{log}: event {record.seq}: {error}", USAGE) from error
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
