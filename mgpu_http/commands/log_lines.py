"""Events of a log as aligned lines: what happened, what was believed then, what was decided."""

from collections.abc import Iterator

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
from mgpu_http.commands.logs import Step

BOLD, DIM, RED, GREEN, YELLOW, PLAIN = "1", "2", "31", "32", "33", ""
# Words of a line that stand for something that went wrong, or waits.
MARKS = (("reject ", RED), ("FAILED", RED), ("failed", RED), ("leaks", RED), ("waits", YELLOW))
CELL_COLOURS = {"in": GREEN, "loading": YELLOW, "leaving": YELLOW, "unknown": RED}
GAP = "  "


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
MOST_CELLS = 64  # consumers that need more than that share one column
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
