"""`mgpu log why`: what a request of a log waited for, and until which event."""

import os
import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from json import dumps, loads
from pathlib import Path

from mgpu_core.replay import Record
from mgpu_core.telling import lasting, missing
from mgpu_core.why import (
    UNRECORDED,
    Explanation,
    Interval,
    Waits,
    encode_explanation,
    summary,
    told,
)
from mgpu_effects.event_log import EventLogError, Gap, Segment, Skipped, found_in, segment_with
from mgpu_http.commands.log_words import date_and_clock
from mgpu_http.commands.logs import STANDARD_INPUT, Point, Source
from mgpu_http.commands.output import DONE, USAGE, CommandError, document, result, table

LINES = 40
WIDTH = 100
_ASKED = '"event":{"type":"Request","request":%s'
_ASKED_BY = re.compile(rb'"event":\{"type":"Request","request":("(?:[^"\\]|\\.)*")')
# Among so many of the last ids a similar one is looked for.
_LAST_IDS = 10_000
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def why(arguments: Namespace) -> int:
    source = Source.of(arguments)
    explanation = explain(source, arguments.request)
    if arguments.json:
        document(encode_explanation(explanation))
    else:
        result("\n\n".join(page(explanation, every=arguments.all)))
    return DONE


# --------------------------------------------------------------------------------------- looking


def explain(source: Source, request: str) -> Explanation:
    """Read the part of a log that a request is in; of several with this id, the last one.

    Raises CommandError where there is none.
    """
    found = None
    if source.log == STANDARD_INPUT or not Path(source.log).is_dir():
        found = _read(source, request, None)
    elif (seq := _segment_of(Path(source.log), request)) is not None:
        found = _read(source, request, Point(text="", seq=seq))
        if found is None:  # only its end is there
            found = _read(source.silent(), request, None)
        elif found.intervals and found.intervals[0].reason["type"] == UNRECORDED:
            found = _read(source.silent(), request, Point(text="", at=found.begin)) or found
    if found is None:
        raise CommandError(f"{source.log}: {_unknown(source, request)}", USAGE)
    return found


def _read(source: Source, request: str, point: Point | None) -> Explanation | None:
    """Fold a log; of a directory, from there to the end of the segment in which it ended."""
    waits = Waits(only=request, kept=1)
    for item in source.items(point):
        if isinstance(item, Segment) and waits.is_over(request) and point:
            break
        _take(waits, item)
    return waits.explained(request)


def _take(waits: Waits, item: Segment | Record | Gap | Skipped) -> None:
    match item:
        case Segment():
            waits.begin(item.encoded_state)
        case Record():
            waits.see(item)
        case Gap():
            waits.lose(state_is_known=True)
        case Skipped():
            waits.lose(state_is_known=False)


def _segment_of(directory: Path, request: str) -> int | None:
    """Find the segment in which it was asked last, without decoding; else, where that is gone or
    was a load without a client, the last one that names it.
    """
    quoted = dumps(request)
    try:
        asked = segment_with(directory, (_ASKED % quoted).encode())
        named = f'"request":{quoted}'.encode()
        return segment_with(directory, named) if asked is None else asked
    except EventLogError as error:
        raise CommandError(str(error), USAGE) from error


def _unknown(source: Source, request: str) -> str:
    told = f"there is no request {request} in it"
    if source.log == STANDARD_INPUT:
        return told
    try:
        similar = _similar(Path(source.log), request)
    except EventLogError as error:
        raise CommandError(str(error), USAGE) from error
    return f"{told}; similar: {', '.join(similar)}" if similar else told


def _similar(log: Path, request: str) -> list[str]:
    """Give ids like this one, the latest first."""
    ids: Iterator[str] = (loads(found) for found in found_in(log, _ASKED_BY))
    last = list(islice(ids, _LAST_IDS))
    with_it = [one for one in last if request and request in one]
    return list(dict.fromkeys(with_it or get_close_matches(request, last)))[:3]


# --------------------------------------------------------------------------------------- telling


def page(explanation: Explanation, *, every: bool = False) -> Iterator[str]:
    """Tell a wait on a screen; `every`: each of its intervals, however many there are."""
    about = f"{explanation.request} for {explanation.consumer}, {date_and_clock(explanation.begin)}"
    yield about + "\n" + "\n".join(textwrap.wrap(summary(explanation), WIDTH))
    if explanation.message:
        yield f"the answer: {explanation.outcome}: {explanation.message}"
    if explanation.intervals:
        yield rows(explanation, every=every)
    overtaken, promoted = explanation.overtaken, explanation.promoted
    if overtaken or promoted:
        times = "once" if overtaken == 1 else f"{overtaken} times"
        yield f"overtaken {times}" + (", and promoted to go first" if promoted else "")


def rows(explanation: Explanation, *, every: bool) -> str:
    """Give a line for each interval, the longest one marked; of too many, the long ones."""
    intervals = explanation.intervals
    long = sorted(intervals, key=lambda one: -one.us)[: len(intervals) if every else LINES]
    shown = [one for one in intervals if one in long]
    lines = table(
        ("", "    FROM", "    TOOK", "SHARE", "WAITED", "MISSING", "UNTIL EVENT"),
        [_row(explanation, one, "*" if one is long[0] else "") for one in shown],
    ).splitlines()
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        marked = 1 + shown.index(long[0])
        lines[marked] = f"{_BOLD}{lines[marked]}{_PLAIN}"
    if rest := len(intervals) - len(shown):
        us = explanation.waited_us - sum(one.us for one in shown)
        lines.append(f"and {rest} shorter ones, {lasting(us)} together: --all shows them")
    return "\n".join(lines)


def _row(explanation: Explanation, one: Interval, mark: str) -> tuple[str, ...]:
    from_us = one.begin - explanation.begin
    share = f"{100 * one.us / explanation.waited_us:4.0f}%"
    text = told(one.reason, explanation.consumer)["text"]
    until = f"{one.ended_by}  {one.event}" if one.ended_by is not None else "-"
    return (
        mark,
        f"+{lasting(from_us)}".rjust(8),
        lasting(one.us).rjust(8),
        share,
        text,
        missing(one.reason) or "-",
        until,
    )
