"""`mgpu log show`: one line per event."""

import json
import os
import shutil
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from attrs import define, evolve, frozen

from mgpu_core.codec import CodecError, decode_event
from mgpu_core.replay import Record
from mgpu_core.state import State
from mgpu_http.commands.log_words import (
    clock,
    decisions,
    duration,
    event_words,
    free_words,
    moment,
    residency_words,
)
from mgpu_http.commands.logs import STANDARD_INPUT, Point, Source, Step
from mgpu_http.commands.output import DONE, USAGE, CommandError, message

FOLLOWED_FROM = 10  # so many events before the end, as tail -f does it
MOST_CELLS = 64  # consumers that need more than that share one column
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
        if last is not None and arguments.log == STANDARD_INPUT and arguments.follow:
            raise CommandError("standard input has no end to count from", USAGE)
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
    if none and shown.limit != 0:
        raise CommandError(f"{source.log}: there is no such event in it", USAGE)


def as_json(step: Step) -> dict[str, object]:
    record, state = step.record, step.state
    return {
        "seq": record.seq,
        "at": record.at,
        "event": record.event,
        "effects": record.effects,
        "notes": record.notes,
        "residency": state and {name: c.residency.value for name, c in state.consumers.items()},
        "free_mib": state and {str(gpu): card.free_mib for gpu, card in state.cards.items()},
        "queue": state and len(state.queue),
    }


def out(line: str, *, at_once: bool) -> None:
    sys.stdout.write(line + "\n")
    if at_once:
        sys.stdout.flush()


# -------------------------------------------------------------------------------------- as lines

BOLD, DIM, RED, GREEN, YELLOW, PLAIN = "1", "2", "31", "32", "33", ""
# Words of a line that stand for something that went wrong, or waits.
MARKS = (("reject ", RED), ("FAILED", RED), ("failed", RED), ("leaks", RED), ("waits", YELLOW))
CELL_COLOURS = {"in": GREEN, "loading": YELLOW, "leaving": YELLOW, "unknown": RED}
GAP = "  "


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


@define
class Lines:
    """Puts events into aligned lines, with headings where the columns or the day change.

    `width`: that of the terminal, None where lines may be of any length.
    """

    coloured: bool
    width: int | None
    _heading: str = ""
    _names: tuple[str, ...] = ()
    _columns: "Columns | None" = None
    _last_at: int | None = None

    def of(self, step: Step) -> Iterator[str]:
        record, state = step.record, step.state
        yield from self._dated(record, state)
        if self._columns is None or (state is not None and tuple(state.consumers) != self._names):
            self._names = tuple(state.consumers) if state else ()
            self._columns = Columns.fitting(self._names, self.width)
            yield self._paint(self._columns.titles, BOLD)
        since = "" if self._last_at is None else "+" + duration(record.at - self._last_at)
        self._last_at = record.at
        columns, decided = self._columns, "; ".join(decisions(record.effects, record.notes))
        cells = [
            f"{record.seq:>{SEQ_CELLS}}",
            clock(record.at),
            *([self._paint(f"{since:>9}", DIM)] if columns.since else []),
            cut(_event(record), None if self.width is None else columns.event).ljust(columns.event),
            *(self._cells(columns, state) if columns.most is not None else [_together(state)]),
            (free_words(state) if state else "?").rjust(FREE_CELLS),
            (str(len(state.queue) or "-") if state else "?").rjust(3),
            self._paint(cut(decided, columns.decided), _marked(decided)),
        ]
        yield GAP.join(cells).rstrip()

    def _dated(self, record: Record, state: State | None) -> Iterator[str]:
        run = f", run {state.run}" if state and state.run else ""
        heading = f"{moment(record.at):%Y-%m-%d}{run}"
        if heading != self._heading:
            self._heading = heading
            yield self._paint(f"-- {heading} --", BOLD)

    def _cells(self, columns: "Columns", state: State | None) -> Iterator[str]:
        for name in columns.names:
            word = residency_words(state, name) if state else "?"
            colour = CELL_COLOURS.get(word.split(" ")[0], DIM)
            yield self._paint(word.ljust(columns.cells(name)), colour)

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.coloured and colour and text else text


SEQ_CELLS, TIME_CELLS, SINCE_CELLS, FREE_CELLS, QUEUE_CELLS, TOGETHER_CELLS = 8, 12, 9, 8, 3, 24
DECIDED_CELLS = 24  # less is no use
# From the widest to the narrowest: with the time since the line before; the most cells of a
# consumer, None where all share one column, 0 where there is none; the most of an event.
LAYOUTS = ((True, 40, 44), (False, 40, 44), (False, 7, 28), (False, None, 28), (False, 0, 28))


@frozen(kw_only=True)
class Columns:
    """How the lines are laid out; `decided`: what is left for that, None: as much as it likes."""

    names: tuple[str, ...]
    since: bool
    most: int | None
    event: int
    decided: int | None = None

    @classmethod
    def fitting(cls, names: tuple[str, ...], width: int | None) -> "Columns":
        """Choose the widest layout in which there is room for what was decided."""
        longest = max((len(name) for name in names), default=0)
        layouts = [
            cls(
                names=names if most != 0 else (),
                since=since,
                most=most,
                event=min(event, 20 + longest),
            )
            for since, most, event in LAYOUTS
        ]
        layouts = [one for one in layouts if one.consumers <= MOST_CELLS] or layouts
        if width is None:
            return layouts[0]
        fits = (one for one in layouts if width - one.taken >= DECIDED_CELLS)
        chosen = next(fits, layouts[-1])
        return evolve(chosen, decided=max(DECIDED_CELLS // 2, width - chosen.taken))

    @property
    def consumers(self) -> int:
        if self.most is None:
            return TOGETHER_CELLS + len(GAP)
        return sum(self.cells(name) + len(GAP) for name in self.names)

    @property
    def taken(self) -> int:
        """Give the cells of all columns but the last."""
        since = SINCE_CELLS + len(GAP) if self.since else 0
        fixed = SEQ_CELLS + TIME_CELLS + self.event + FREE_CELLS + QUEUE_CELLS + 5 * len(GAP)
        return fixed + since + self.consumers

    def cells(self, name: str) -> int:
        return max(len("loading"), min(len(name), self.most or 0))

    @property
    def titles(self) -> str:
        apart = [cut(name, self.cells(name)).ljust(self.cells(name)) for name in self.names]
        return GAP.join(
            [
                "SEQ".rjust(SEQ_CELLS),
                "TIME".ljust(TIME_CELLS),
                *(["AFTER".rjust(SINCE_CELLS)] if self.since else []),
                "EVENT".ljust(self.event),
                *(apart if self.most is not None else ["IN MEMORY".ljust(TOGETHER_CELLS)]),
                "FREE MIB".rjust(FREE_CELLS),
                "Q".rjust(QUEUE_CELLS),
                "DECIDED",
            ]
        )


def cut(text: str, cells: int | None) -> str:
    return text if cells is None or len(text) <= cells else text[: cells - 1] + "…"


def _event(record: Record) -> str:
    try:
        return event_words(decode_event(record.event, record.at))
    except CodecError:
        return str(record.event.get("type"))


def _together(state: State | None) -> str:
    words = {name: residency_words(state, name) for name in state.consumers} if state else {}
    told = (f"{name}:{word.replace(' ', '')}" for name, word in words.items() if word != "-")
    return cut(" ".join(told), TOGETHER_CELLS).ljust(TOGETHER_CELLS)


def _marked(text: str) -> str:
    return next((colour for mark, colour in MARKS if mark in text), PLAIN)
