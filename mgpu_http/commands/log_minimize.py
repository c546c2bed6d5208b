"""`mgpu log minimize`: the smallest log that still fails a check."""

import os
import shlex
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from mgpu_core import events as ev
from mgpu_core.codec import (
    CodecError,
    encode_config,
    encode_effect,
    encode_event,
    encode_note,
    encode_state,
)
from mgpu_core.notes import Note
from mgpu_core.planners import Planner
from mgpu_core.replay import Record
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.simulation import PROPERTIES
from mgpu_core.simulation.minimizing import (
    CHECKS,
    DIVERGES,
    PLANNER,
    Finder,
    Found,
    Search,
    Smallest,
)
from mgpu_core.simulation.run import INVARIANT
from mgpu_core.state import State
from mgpu_core.transcript import configured, transcript
from mgpu_effects.event_log import EventLogError, Gap, Segment, encode_header, encode_line
from mgpu_http.commands.fuzz import SHOWN_EVENTS, Limited, limited
from mgpu_http.commands.log import load_planner
from mgpu_http.commands.log_words import effect_words
from mgpu_http.commands.logs import STANDARD_INPUT, Source
from mgpu_http.commands.output import (
    DONE,
    FAILED,
    USAGE,
    CommandError,
    Progress,
    document,
    message,
    result,
)

MEANS: Mapping[str, str] = {
    **PROPERTIES,
    DIVERGES: "today's code decides what was decided then",
    INVARIANT: "the scheduler's own invariants hold of every state",
}
PROGRESS_EVERY = 500
RUN = "minimized"


def minimize(arguments: Namespace) -> int:
    """Exit code 0: something fails, and the smallest log of it is written; 1: nothing fails."""
    if arguments.until is not None and arguments.until not in CHECKS:
        raise CommandError(f"--until {arguments.until}: it is one of {', '.join(CHECKS)}", USAGE)
    if arguments.until == PLANNER and not arguments.planner:
        raise CommandError(f"--until {PLANNER}: it takes --planner MODULE:NAME", USAGE)
    if arguments.seconds < 0:
        raise CommandError("--seconds is a number from 0 on", USAGE)
    source, path = Source.of(arguments), _path(arguments)
    planner = Limited(load_planner(arguments.planner)) if arguments.planner else None
    with limited():
        finder = Finder(arguments.until or "", planner)
        found = _first_failing(source, finder)
        if found is None:
            return _nothing(arguments, finder)
        message(f"event {found.seq}: {found.violation}")
        smallest = Hunt(found, planner, arguments.seconds).run()
    told = Told(arguments, found, smallest, path)
    if path is not None:
        told.save(path)
    if arguments.json:
        document(told.summary())
    else:
        told.tell()
    return DONE


def _path(arguments: Namespace) -> Path | None:
    """Give where the log goes, before any work is done for it; None: no smaller one is wanted."""
    if arguments.seconds == 0:
        return None
    if arguments.output is not None:
        path = Path(arguments.output)
    elif arguments.log == STANDARD_INPUT:
        path = Path(f"{RUN}.jsonl")
    else:
        log = Path(arguments.log).resolve()
        path = log.with_name(f"{log.name.removesuffix('.gz').removesuffix('.jsonl')}-{RUN}.jsonl")
    if path.exists():
        raise CommandError(f"{path} is there already: give another with -o", USAGE)
    return path


def _first_failing(source: Source, finder: Finder) -> Found | None:
    with Progress() as progress:
        for item in source.items():
            if isinstance(item, Segment):
                finder.begin(_state(item))
            elif not isinstance(item, Record | Gap):
                finder.lose()
            elif isinstance(item, Record):
                if (found := _taken(finder, item)) is not None:
                    return found
                if finder.events % PROGRESS_EVERY == 0:
                    progress.show(f"event {item.seq}: nothing fails so far")
    return None


def _state(segment: Segment) -> State:
    try:
        return segment.state
    except EventLogError as error:
        raise CommandError(str(error), USAGE) from error


def _taken(finder: Finder, record: Record) -> Found | None:
    try:
        return finder.take(record)
    except CodecError as error:
        raise CommandError(f"event {record.seq} can't be read: {error}", USAGE) from error


def _nothing(arguments: Namespace, finder: Finder) -> int:
    if arguments.json:
        document({"found": None, "events": finder.events})
    else:
        what = f"{arguments.until} ({MEANS[arguments.until]})" if arguments.until else "any check"
        result(f"none of {finder.events} events fails {what}")
    return FAILED


@define
class Hunt:
    """The search for the smallest, within a time, with its progress on standard error."""

    found: Found
    planner: Planner | None
    seconds: float
    _until: float = 0.0
    _progress: Progress = field(factory=Progress)

    def run(self) -> Smallest:
        """Give the smallest up to the end of the time, or to Ctrl-C."""
        search = Search(self.found, self.planner, self._more)
        self._until = time.monotonic() + self.seconds
        if self.seconds > 0:
            with self._progress:
                try:
                    message("looking for a smaller history (Ctrl-C: enough)")
                    search.run()
                except KeyboardInterrupt:
                    message("enough: this is the smallest so far")
        if search.best is None and self.seconds > 0:
            message("no smaller one fails as well: this is the log's own end")
        return search.best or search.whole()

    def _more(self, events: int | None) -> bool:
        left_s = self._until - time.monotonic()
        best = f"{events} events" if events else f"{len(self.found.events)} events, not yet fewer"
        self._progress.show(f"{best}, {max(0, left_s):.0f} s left")
        return left_s > 0


# ---------------------------------------------------------------------------------- what is told


@frozen
class Told:
    """The smallest history, as it is shown and kept."""

    arguments: Namespace
    found: Found
    smallest: Smallest
    path: Path | None

    @property
    def check(self) -> str:
        return self.found.violation.property

    @property
    def again(self) -> str:
        """Give the command that shows it again."""
        planner = self.arguments.planner
        log = shlex.quote(str(self.path or self.arguments.log))
        options = f" --planner {shlex.quote(planner)}" if planner else ""
        if self.check == DIVERGES:
            return f"mgpu replay {log}{options}"
        return f"mgpu log minimize {log} --until {self.check} --seconds 0{options}"

    def tell(self) -> None:
        history = self._transcript(SHOWN_EVENTS)
        result(history)
        left_out = self.smallest.events - SHOWN_EVENTS
        if left_out > 0:
            result(f"(the {left_out} events before these are in the log only)")
        if self.smallest.case.start is not None:
            result("(it begins in a state of then, which the log has)")
        for line in self._then():
            result(line)
        result(f"fails:   {self.check}, {MEANS[self.check]}")
        result(f"here:    {self.smallest.violation.text}")
        result(f"events:  {self.smallest.events}, of {self.found.seq} in {self.arguments.log}")
        if self.path is not None:
            result(f"saved:   {shlex.quote(str(self.path))}")
        result(f"again:   {self.again}")

    def _then(self) -> Iterator[str]:
        recorded = self.smallest.recorded
        if recorded is not None:
            told = [words for one in recorded if (words := effect_words(one))]
            yield f"then:    {'; '.join(told) or 'nothing was decided'}"

    def _transcript(self, last: int | None) -> str:
        steps = self.smallest.retold.log
        start = self.smallest.case.start
        if start is not None:  # a transcript begins after the start of the broker
            steps = ((ev.Started(at=start.at, run=""), Transition(start, (), ())), *steps)
        return transcript(self.smallest.case.config, steps, last=last)

    def summary(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "means": MEANS[self.check],
            "text": self.smallest.violation.text,
            "seq": self.found.seq,
            "config": configured(self.smallest.case.config),
            "from_a_state": self.smallest.case.start is not None,
            "events": [
                {"at": event.at, "event": encode_event(event)}
                for event, _ in self.smallest.retold.log
            ],
            "recorded": self.smallest.recorded,
            "transcript": self._transcript(None),
            "log": None if self.path is None else str(self.path),
            "again": self.again,
        }

    def save(self, path: Path) -> None:
        """Write it as a log of one segment, readable by its user alone."""
        start = self.smallest.case.start or Scheduler(self.smallest.case.config).initial()
        state = encode_state(start)
        lines = [encode_header(version("mgpu"), RUN, encode_config(start.config), state)]
        lines += self._lines(self.smallest.retold.log)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(lines)
        except OSError as error:
            raise CommandError(f"{path}: the log is not saved: {error.strerror}") from error

    def _lines(self, steps: Iterable[tuple[ev.Event, Transition]]) -> Iterator[bytes]:
        for seq, (event, transition) in enumerate(steps, start=1):
            effects = [encode_effect(effect) for effect in transition.effects]
            reasons: Iterable[Note] = transition.notes
            if seq == self.smallest.events and self.smallest.recorded is not None:
                effects = [dict(one) for one in self.smallest.recorded]
                reasons = self.smallest.reasons or reasons
            notes = [encode_note(note) for note in reasons]
            yield encode_line(seq, transition.state.at, encode_event(event), effects, notes)
