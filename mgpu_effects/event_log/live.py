"""A running log as it is written: its last lines for whoever listens, older ones from the files.

A listener keeps nothing but the number of the last event that it was given. So there is one buffer
for all of them, its size is bounded, and nobody who is slow holds up the broker.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mgpu_effects.event_log.files import GoneError, SegmentFile, segment_files
from mgpu_effects.event_log.format import EventLogError, encode_gap, is_whole
from mgpu_effects.event_log.reading import readable_lines

KEPT_EVENTS = 4_096
KEPT_BYTES = 4 * 2**20
_EVENT = re.compile(rb'\{"seq":(\d+),')
_GAP = re.compile(rb'\{"gap":\d+,"first":(\d+),"last":(\d+)')


class Line(NamedTuple):
    """A line of the log, with its LF; `seq` is the (last) event that it tells of."""

    run: str
    seq: int
    text: bytes


class PastError(EventLogError):
    """There is no such event; `first` is the one before the oldest that is kept, if any is."""

    def __init__(self, message: str, first: str | None = None) -> None:
        super().__init__(message)
        self.first = first


class Live:
    """The last lines of a run. `seq` is its last event, or the last one before the run."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.seq = 0
        self.closed = False
        self.kept_events = KEPT_EVENTS
        self.kept_bytes = KEPT_BYTES
        self._lines: deque[bytes] = deque()  # of events that follow each other, up to `seq`
        self._bytes = 0
        self._listeners: set[asyncio.Event] = set()

    def begin(self, first_seq: int) -> None:
        self.seq = first_seq - 1

    def add(self, seq: int, text: bytes) -> None:
        lines = self._lines
        lines.append(text)
        self._bytes += len(text)
        self.seq = seq
        while len(lines) > self.kept_events or self._bytes > self.kept_bytes:
            self._bytes -= len(lines.popleft())
        if self._listeners:
            self._wake()

    def close(self) -> None:
        """No more comes: listeners end when they have what there is."""
        self.closed = True
        self._wake()

    def after(self, seq: int) -> Sequence[Line] | None:
        """Give what came after an event; None: not all of that is here any more."""
        missing = self.seq - seq
        if missing > len(self._lines):
            return None
        kept = range(len(self._lines) - missing, len(self._lines))
        return [
            Line(self.run, first, self._lines[place]) for first, place in enumerate(kept, seq + 1)
        ]

    @property
    def first(self) -> int:
        """The event before the oldest that is here."""
        return self.seq - len(self._lines)

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever a line has come, or the end."""
        woken = asyncio.Event()
        self._listeners.add(woken)
        try:
            yield woken
        finally:
            self._listeners.discard(woken)

    def _wake(self) -> None:
        for woken in self._listeners:
            woken.set()


# -------------------------------------------------------------------------------- from the files


def past(directory: Path, run: str, seq: int) -> Iterator[Line]:
    """Give what files hold after event `seq` of a run, in later runs too; what is missing between
    two events shows as a gap. Raises PastError before the first line where that event is unknown,
    or not all that came after it is kept. It reads files, so it belongs into a thread.
    """
    files = _holding(segment_files(directory), run, seq)
    return _lines_after(files, seq)


def _holding(files: Sequence[SegmentFile], run: str, seq: int) -> Sequence[SegmentFile]:
    """Give the segments from the one on that holds this event."""
    number = max((n for n, file in enumerate(files) if file.seq <= seq), default=None)
    if number is None:
        if files and files[0].seq == seq + 1:
            return files
        raise PastError(
            f"what came after event {seq} is no longer kept",
            f"{files[0].run}-{files[0].seq - 1}" if files else None,
        )
    if files[number].run != run:
        raise PastError(f"event {seq} was not of run {run}: it is of another log")
    return files[number:]


def _lines_after(files: Sequence[SegmentFile], seq: int) -> Iterator[Line]:
    for file in files:
        for text in _whole_lines(file):
            if found := _EVENT.match(text):
                first = last = int(found[1])
            elif found := _GAP.match(text):
                first, last = int(found[1]), int(found[2])
            else:
                continue  # a header
            if last <= seq:
                continue
            if first > seq + 1:
                yield Line(file.run, first - 1, encode_gap(seq + 1, first - 1))
            yield Line(file.run, last, text)
            seq = last


def _whole_lines(file: SegmentFile) -> Iterator[bytes]:
    """Give what is as it was written; what is not shows by what is missing then."""
    with contextlib.suppress(GoneError, OSError), file.open() as lines:
        for text in readable_lines(lines):
            if not text.endswith(b"\n"):
                return  # it is being written, or was cut off
            if is_whole(text):
                yield text
