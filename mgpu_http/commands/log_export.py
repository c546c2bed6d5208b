"""`mgpu log export`: a timeline for Perfetto or Chrome's tracing, or a table of the requests."""

import csv
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from attrs import define, field

from mgpu_core.replay import Record
from mgpu_effects.event_log import EventLogError, Segment
from mgpu_http.commands.logs import Point, Source
from mgpu_http.commands.output import DONE, USAGE, CommandError
from mgpu_http.commands.timeline import Timeline, TraceEvent, outcomes

Json: TypeAlias = Mapping[str, Any]
SERVED = {"ok", "upstream_error", "disconnected", "timeout"}
COLUMNS = (
    "request",
    "consumer",
    "kind",
    "priority",
    "arrived",
    "waited_us",
    "served_us",
    "outcome",
    "code",
)


def export(arguments: Namespace) -> int:
    source = Source.of(arguments)
    start = source.point(arguments.start) if arguments.start is not None else None
    end = source.point(arguments.end) if arguments.end is not None else None
    if arguments.csv:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(requests(source, start, end))
        return DONE
    lines = map(_encoded, trace(source, start, end))
    if arguments.json:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        return DONE
    # A list with one event a line, written as they come: a long log is never in memory.
    sys.stdout.write("[\n" + next(lines, ""))
    sys.stdout.writelines(f",\n{line}" for line in lines)
    sys.stdout.write("\n]\n")
    return DONE


_encoded = json.JSONEncoder(separators=(",", ":")).encode


def trace(source: Source, start: Point | None, end: Point | None) -> Iterator[TraceEvent]:
    timeline = Timeline()
    for step in source.steps(start, wanted=start.reached if start else None):
        if end is not None and end.passed(step.record):
            break
        yield from timeline.of(step)
    yield from timeline.end()


# -------------------------------------------------------------------------------------- requests


def requests(source: Source, start: Point | None, end: Point | None) -> Iterator[dict[str, Any]]:
    """Give a row for each request, as it ends; those that have not ended come last."""
    book = Book()
    for item in source.items(start):
        if isinstance(item, Segment):
            book.begin(item)
        elif isinstance(item, Record):
            if end is not None and end.passed(item):
                break
            ended = list(book.take(item))
            if start is None or start.reached(item):
                yield from ended
    yield from book.rest()


@define
class Book:
    """The requests that are open, and how those end that end."""

    _open: dict[str, dict[str, Any]] = field(factory=dict)
    _arrived: dict[str, int] = field(factory=dict)
    _served: dict[str, int] = field(factory=dict)
    _priorities: dict[str, int] = field(factory=dict)
    _begun: bool = False

    def begin(self, segment: Segment) -> None:
        """Take over who is on the way at the start of what is read."""
        try:
            state = segment.state
        except EventLogError as error:
            raise CommandError(str(error), USAGE) from error
        self._priorities = {name: c.priority for name, c in state.config.consumers.items()}
        if not self._begun:
            for name, known in state.requests.items():
                if known.operator is None:
                    self._enter(name, known.consumer, known.kind, known.priority, known.at)
                    if known.granted is not None:
                        self._served[name] = known.granted
        self._begun = True

    def take(self, record: Record) -> Iterator[dict[str, Any]]:
        event, kind = record.event, record.event["type"]
        if kind == "Request" and event["request"] not in self._open:
            priority = event["priority"]
            if priority is None:
                priority = self._priorities.get(event["consumer"])
            self._enter(event["request"], event["consumer"], event["kind"], priority, record.at)
        elif kind == "Reconfigured":
            consumers = event["config"]["consumers"]
            self._priorities = {name: c["priority"] for name, c in consumers.items()}
        elif kind == "Started":
            yield from self._all("lost")
        for effect in record.effects:
            if effect["type"] == "Serve":
                self._served[effect["request"]] = record.at
        for name, outcome in outcomes(record).items():
            if name in self._open:
                yield self._row(name, outcome, record.at)

    def rest(self) -> Iterator[dict[str, Any]]:
        yield from self._all("open")

    def _enter(self, name: str, consumer: str, kind: str, priority: int | None, at: int) -> None:
        arrived = datetime.fromtimestamp(at / 10**6, UTC).isoformat(timespec="milliseconds")
        self._arrived[name] = at
        self._open[name] = {
            "request": name,
            "consumer": consumer,
            "kind": kind,
            "priority": priority,
            "arrived": arrived,
        }

    def _all(self, outcome: str) -> Iterator[dict[str, Any]]:
        for name in list(self._open):
            yield self._row(name, outcome, None)

    def _row(self, name: str, outcome: str, at: int | None) -> dict[str, Any]:
        """Close it; `at` None: nobody knows when it ended."""
        row, arrived = self._open.pop(name), self._arrived.pop(name)
        served = self._served.pop(name, None)
        waited_to = at if served is None else served
        row["waited_us"] = None if waited_to is None else waited_to - arrived
        row["served_us"] = None if served is None or at is None else at - served
        known = outcome in SERVED or outcome in {"cancelled", "lost", "open"}
        return row | {
            "outcome": outcome if known else "rejected",
            "code": None if known else outcome,
        }
