"""`mgpu log show`: one line per event."""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from attrs import frozen

from mgpu_core.replay import Record
from mgpu_http.commands.log_lines import Lines
from mgpu_http.commands.logs import STANDARD_INPUT, Point, Source, Step
from mgpu_http.commands.output import DONE, USAGE, CommandError, message

FOLLOWED_FROM = 10  # so many events before the end, as tail -f does it
HEADLINES = 4
ROUTINE = {"Tick", "GpuSample", "ProbeResult"}
DECIDES = {"Serve", "Reject", "StartUnload", "StartLoad"}


def show(arguments: Namespace) -> int:
    source = Source.of(arguments)
    shown = Shown.of(arguments)
    try:
        steps = chosen(source, shown)
        if arguments.json:
            for step in steps:
                out(json.dumps(as_json(step)), at_once=shown.follow)
        else:
            show_lines(steps, at_once=shown.follow)
    except KeyboardInterrupt:
        if not shown.follow:
            raise
    return DONE


@frozen(kw_only=True)
class Shown:
    """Which events are shown. `limit` and `last` None: all of them."""

    at: str | None
    request: str | None
    consumer: str | None
    changes: bool
    follow: bool
    limit: int | None
    last: int | None

    @classmethod
    def of(cls, arguments: Namespace) -> "Shown":
        limit, last = arguments.limit, arguments.last
        if last is not None and arguments.at is not None:
            raise CommandError("--last counts from the end, --at says where to begin", USAGE)
        if arguments.follow and arguments.log == STANDARD_INPUT:
            raise CommandError("standard input is followed anyway, without --follow", USAGE)
        one_screen = sys.stdout.isatty() and not (arguments.follow or arguments.json)
        if one_screen and limit is None and last is None:
            rows = max(HEADLINES, shutil.get_terminal_size().lines - HEADLINES)
            limit, last = (None, rows) if arguments.at is None else (rows, None)
            message(f"{rows} events, one screen; --limit and --last show more or less")
        if arguments.follow and arguments.at is None and last is None:
            last = FOLLOWED_FROM
        return cls(
            at=arguments.at,
            request=arguments.request,
            consumer=arguments.consumer,
            changes=arguments.changes,
            follow=arguments.follow,
            limit=limit,
            last=last,
        )

    @property
    def some(self) -> bool:
        """Not every event is shown."""
        return self.changes or self.request is not None or self.consumer is not None

    def matches(self, record: Record) -> bool:
        if self.changes and record.event["type"] in ROUTINE and not changes(record):
            return False
        parts = (record.event, *record.effects, *record.notes)
        if self.request is not None and all(p.get("request") != self.request for p in parts):
            return False
        return self.consumer is None or any(
            part.get("consumer") == self.consumer or self.consumer in part.get("consumers", ())
            for part in parts
        )


def changes(record: Record) -> bool:
    """Say whether it did anything to anybody."""
    return bool(record.notes) or any(effect["type"] in DECIDES for effect in record.effects)


def chosen(source: Source, shown: Shown) -> Iterator[Step]:
    """Give the events that are to be shown. Raises CommandError where none is."""
    point = source.point(shown.at) if shown.at is not None else None
    last = shown.last
    if last is not None and source.log != STANDARD_INPUT and (shown.follow or not shown.some):
        seq = max(0, source.last().seq - last + 1)
        point, last = Point(text=str(seq), seq=seq), None

    def wanted(record: Record) -> bool:
        return (point is None or point.reached(record)) and (
            not shown.some or shown.matches(record)
        )

    steps: Iterable[Step] = source.steps(point, wanted=wanted, follow=shown.follow)
    if last is not None:
        steps = deque(steps, maxlen=last)
    none = True
    for step in islice(steps, shown.limit):
        none = False
        yield step
    if none:
        raise CommandError(f"{source.log}: there is no such event in it", USAGE)


def as_json(step: Step) -> dict[str, object]:
    record, state = step.record, step.state
    return {
        "seq": record.seq,
        "at": record.at,
        "event": record.event,
        "effects": record.effects,
        "notes": list(record.notes),
        "residency": state and {name: c.residency.value for name, c in state.consumers.items()},
        "free_mib": state and {str(gpu): card.free_mib for gpu, card in state.cards.items()},
        "queue": state and len(state.queue),
    }


def out(line: str, *, at_once: bool) -> None:
    sys.stdout.write(line + "\n")
    if at_once:
        sys.stdout.flush()


def show_lines(steps: Iterator[Step], *, at_once: bool) -> None:
    terminal = sys.stdout.isatty()
    lines = Lines(
        coloured=terminal and not os.environ.get("NO_COLOR"),
        width=shutil.get_terminal_size().columns if terminal or "COLUMNS" in os.environ else None,
    )
    differed = False
    for step in steps:
        for line in lines.of(step):
            out(line, at_once=at_once)
        if step.difference is not None and not differed:
            differed = True
            message(
                f"event {step.record.seq}: today's code decides otherwise than was decided then, so"
                " what is shown of the states from here on is today's; see `mgpu replay`"
            )
