"""A log streamed: a directory of segments, one segment, or standard input. No more than some dozens
of its lines are held in memory.

    for item in read("/var/lib/mgpu", seq=4711):
        if isinstance(item, Record): ...

What is damaged is never passed over in silence. Bytes at the end of a file that are no lines were
cut off in mid-write: `Torn` tells of them. Before lines that are in order, or before a segment that
leaves events out, they are corruption: an error, or `Skipped` with `salvage`.
"""

import contextlib
import re
import sys
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

from mgpu_core.replay import Record
from mgpu_effects.event_log.files import (
    LINE_LIMIT_BYTES,
    GoneError,
    SegmentFile,
    began_us,
    open_log,
    segment_files,
)
from mgpu_effects.event_log.format import (
    BadLineError,
    CorruptLogError,
    EventLogError,
    Gap,
    Place,
    Segment,
    Skipped,
    Torn,
    decode_line,
    decode_record,
)

Item: TypeAlias = Segment | Record | Gap | Torn | Skipped
# Asked where the log ends for now: shall it be looked at again? It is the one that waits.
Follow: TypeAlias = Callable[[], bool]
# An event is among so many lines at the end of a log: behind it can be a header, or damage.
_LAST_LINES = 100
_LINES_AT_ONCE = 64
# What reading a file may end with, compressed or not.
UNREADABLE = (OSError, EOFError, zlib.error)


def read(
    log: Path | str,
    *,
    seq: int | None = None,
    at: int | None = None,
    salvage: bool = False,
    follow: Follow | None = None,
) -> Iterator[Item]:
    """Stream a log; of a directory, from the start of the segment that holds `seq` or time `at`.

    Raises CorruptLogError, and EventLogError where it can't be read at all.
    """
    reader = _Reader(salvage=salvage)
    if str(log) == "-":
        yield from reader.read(sys.stdin.buffer, "standard input")
    elif Path(log).is_dir():
        yield from _read_directory(Path(log), reader, seq, at, follow)
    else:
        with open_log(Path(log)) as file:
            yield from reader.read(file, str(log), follow)


def last_record(log: Path) -> Record | None:
    """Give the last event of a directory or segment; None where there is none.

    Raises EventLogError.
    """
    for path in _backwards(log):
        with contextlib.suppress(GoneError), open_log(path) as file:
            for line in reversed(_last_lines(file)):
                with contextlib.suppress(BadLineError):
                    item = decode_line(line, Place(str(path), 0, 1))
                    if isinstance(item, Record):
                        return item
    return None


def segment_with(directory: Path, text: bytes) -> int | None:
    """Give the first event of the last segment in which these bytes stand; nothing is decoded.

    Raises EventLogError.
    """
    for file in reversed(segment_files(directory)):
        with contextlib.suppress(GoneError), file.open() as lines:
            if any(text in line for line in readable_lines(lines)):
                return file.seq
    return None


def found_in(log: Path, pattern: re.Pattern[bytes]) -> Iterator[bytes]:
    """Give the first group of this in every line that has it, the last segment's first; nothing is
    decoded. Raises EventLogError.
    """
    for path in _backwards(log):
        with contextlib.suppress(GoneError), open_log(path) as file:
            for line in readable_lines(file):
                if found := pattern.search(line):
                    yield found[1]


def readable_lines(file: BinaryIO) -> Iterator[bytes]:
    """Give its lines, as far as it can be read; whoever decodes them will say what is wrong."""
    with contextlib.suppress(*UNREADABLE):
        yield from _lines(file, None)


def _last_lines(file: BinaryIO) -> "deque[bytes]":
    return deque(readable_lines(file), maxlen=_LAST_LINES)


def _backwards(log: Path) -> Sequence[Path]:
    return [file.path for file in reversed(segment_files(log))] if log.is_dir() else [log]


def _read_directory(
    directory: Path, reader: "_Reader", seq: int | None, at: int | None, follow: Follow | None
) -> Iterator[Item]:
    files = segment_files(directory)
    if not files:
        raise EventLogError(f"{directory}: there are no segments of an event log in it")
    files = files[_first(files, seq, at) :]
    while files:
        file, *files = files
        last = not files
        with contextlib.suppress(GoneError), file.open() as lines:  # what is gone shows as a gap
            following = _Following(file, follow) if last and follow else None
            yield from reader.read(lines, str(file.path), following)
        if last and follow:
            files = _after(file)


def _first(files: Sequence[SegmentFile], seq: int | None, at: int | None) -> int:
    """Find the segment that holds it: the last one that begins no later."""
    if seq is not None:
        return max((i for i, file in enumerate(files) if file.seq <= seq), default=0)
    if at is not None:
        return max(0, bisect_right(files, at, key=began_us) - 1)
    return 0


def _after(file: SegmentFile) -> list[SegmentFile]:
    files = segment_files(file.path.parent)
    for number, other in enumerate(files, start=1):
        if (other.run, other.seq) == (file.run, file.seq):
            return files[number:]
    return [other for other in files if other.seq > file.seq]  # it is gone by now


class _Following:
    """Asks on while a segment is the last one, and once more when it no longer is: what came
    between the last look and the segment after it.
    """

    def __init__(self, file: SegmentFile, follow: Follow) -> None:
        self._file = file
        self._follow = follow
        self._over = False

    def __call__(self) -> bool:
        if self._over:
            return False
        self._over = bool(_after(self._file))
        return self._over or self._follow()


class _Damage:
    """Lines in a row that are not as they were written."""

    def __init__(self, place: Place, reason: str) -> None:
        self.place = place
        self.reason = reason
        self.size = 0
        self.lines = 0

    def add(self, line: bytes) -> "_Damage":
        self.size += len(line)
        self.lines += 1
        return self


class _Reader:
    """Reads file after file, and sees whether the events follow each other."""

    def __init__(self, *, salvage: bool) -> None:
        self._salvage = salvage
        self._run: str | None = None
        self._next: int | None = None  # the event that has to come
        self._begun = False  # a segment, of which no event has come
        self._torn: Torn | None = None

    def read(self, file: BinaryIO, name: str, follow: Follow | None = None) -> Iterator[Item]:
        damage: _Damage | None = None
        offset = number = 0
        try:
            for number, (line, record) in enumerate(_lines_and_records(file, follow), start=1):
                in_order = record is not None and record.seq == self._next
                if record is not None and in_order and number > 1 and damage is None:
                    self._in_order(record.seq)
                    yield record
                else:
                    place = Place(name, offset, number)
                    try:
                        item = _decoded(line, place)
                    except BadLineError as error:
                        damage = (damage or _Damage(place, str(error))).add(line)
                    else:
                        if damage is not None:
                            yield self._skipped(damage)
                            damage = None
                        yield from self._seen(item, place)
                offset += len(line)
        except UNREADABLE as error:
            place = Place(name, offset, number + 1)
            yield self._skipped(damage or _Damage(place, f"it can't be read on: {error}"))
            return
        if damage is not None:
            self._torn = Torn(place=damage.place, size=damage.size, reason=damage.reason)
            yield self._torn

    def _skipped(self, damage: _Damage) -> Skipped:
        if not self._salvage:
            raise CorruptLogError(damage.place, damage.reason)
        self._next = None
        return Skipped(
            place=damage.place, size=damage.size, lines=damage.lines, reason=damage.reason
        )

    def _seen(self, item: Segment | Record | Gap, place: Place) -> Iterator[Item]:
        if isinstance(item, Segment):
            if item.run != self._run:
                self._run, self._next, self._torn = item.run, None, None
            self._begun = True
            yield item
            return
        first, last = (item.seq, item.seq) if isinstance(item, Record) else (item.first, item.last)
        if self._next is not None and first != self._next:
            yield from self._missing(first, place)
        self._in_order(last)
        yield item

    def _in_order(self, last: int) -> None:
        self._next, self._begun, self._torn = last + 1, False, None

    def _missing(self, first: int, place: Place) -> Iterator[Gap | Skipped]:
        """Whole segments may be gone, and their absence is told; within one, or behind a torn end,
        events that are missing were damaged.
        """
        assert self._next is not None
        whole_segments = self._begun and self._torn is None and first > self._next
        reason = f"event {self._next} has to come here, not {first}"
        if not whole_segments and not self._salvage:
            raise CorruptLogError(self._torn.place if self._torn else place, reason)
        if not self._begun:
            yield Skipped(place=place, size=0, lines=0, reason=reason)
        elif first > self._next:
            yield Gap(first=self._next, last=first - 1, recorded=False)


def _decoded(line: bytes, place: Place) -> Segment | Record | Gap:
    item = decode_line(line, place)
    if place.line == 1 and not isinstance(item, Segment):
        raise BadLineError("a log begins with a header, and this is none")
    return item


def _lines_and_records(
    file: BinaryIO, follow: Follow | None
) -> Iterator[tuple[bytes, Record | None]]:
    """Give each line, and the event in it if it is whole.

    Some dozens of lines are decoded in one go, which makes a replay a tenth faster; where they come
    now and then, each as it comes.
    """
    size = 1 if follow or not file.seekable() else _LINES_AT_ONCE
    for lines in _batches(_lines(file, follow), size):
        yield from zip(lines, [decode_record(line) for line in lines], strict=True)


def _batches(lines: Iterator[bytes], size: int) -> Iterator[Sequence[bytes]]:
    """Give the lines, so many at a time; those before an error that ends them, too."""
    batch: list[bytes] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) >= size:
                yield batch
                batch = []
    except UNREADABLE:
        yield batch
        raise
    yield batch


def _lines(file: BinaryIO, follow: Follow | None) -> Iterator[bytes]:
    """Give line by line, each with its LF but for what is behind the last one."""
    if follow is None:
        return iter(partial(file.readline, LINE_LIMIT_BYTES), b"")
    return _lines_to_come(file, follow)


def _lines_to_come(file: BinaryIO, follow: Follow) -> Iterator[bytes]:
    while True:
        start = file.tell()
        line = file.readline(LINE_LIMIT_BYTES)
        if not line.endswith(b"\n") and len(line) < LINE_LIMIT_BYTES and follow():
            file.seek(start)
            continue
        if not line:
            return
        yield line
