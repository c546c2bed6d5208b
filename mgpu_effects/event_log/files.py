"""Which files a log consists of: `events-RUN-SEQ.jsonl`, SEQ being the first event in it.

A closed segment becomes `events-RUN-SEQ.jsonl.gz`. For a moment both are there, with the same
content.
"""

import gzip
import os
import re
from collections import Counter
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from attrs import frozen

from mgpu_core.replay import Record
from mgpu_effects.event_log.format import (
    BadLineError,
    EventLogError,
    Place,
    decode_line,
)

COMPRESSED = ".gz"
_NAME = re.compile(r"events-(?P<run>.+)-(?P<seq>\d+)\.jsonl(?:\.gz)?")
_GZIP = b"\x1f\x8b"
# Longer than any line that is written; what has no line ends at all is read in such pieces.
LINE_LIMIT_BYTES = 64 * 2**20


def default_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$STATE_DIRECTORY` (systemd's; the first of several), else mgpu in the user's state home."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    home = Path(environ.get("XDG_STATE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".local" / "state") / "mgpu"


class GoneError(EventLogError):
    """There is no such file, or no longer."""


@frozen
class SegmentFile:
    """One segment, by what its name says."""

    path: Path
    run: str
    seq: int

    @property
    def compressed(self) -> bool:
        return self.path.suffix == COMPRESSED

    def open(self) -> BinaryIO:
        """Open it, also where it was compressed since it was listed.

        Raises EventLogError, GoneError where it was removed.
        """
        try:
            return open_log(self.path)
        except GoneError:
            if self.compressed:
                raise
            return open_log(self.path.with_name(self.path.name + COMPRESSED))


def segment_name(run: str, seq: int) -> str:
    return f"events-{run}-{seq:010d}.jsonl"


def named(path: Path) -> tuple[str, int] | None:
    """Give the run and the first event of a segment, or of what was made of one, by its name."""
    found = _NAME.match(path.name)
    return (found["run"], int(found["seq"])) if found else None


def open_log(path: Path) -> BinaryIO:
    """Open a file, compressed or not. Raises EventLogError, GoneError where there is none."""
    try:
        with path.open("rb") as file:
            compressed = file.read(len(_GZIP)) == _GZIP
        # A buffer around it makes reading by lines several times as fast.
        return BufferedReader(gzip.open(path)) if compressed else path.open("rb")
    except FileNotFoundError as error:
        raise GoneError(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise EventLogError(f"{path}: {error.strerror}") from error


def segment_files(directory: Path) -> list[SegmentFile]:
    """Give the segments in order.

    A run goes on counting events where the one before it ended. Only logs that were put together,
    whose runs begin with the same number, are sorted by time.
    """
    runs: dict[str, dict[int, SegmentFile]] = {}
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise EventLogError(f"{directory}: {error.strerror}") from error
    for name in reversed(names):  # `.jsonl` after `.jsonl.gz`: where both are there, it counts
        if found := _NAME.fullmatch(name):
            file = SegmentFile(directory / name, found["run"], int(found["seq"]))
            runs.setdefault(file.run, {})[file.seq] = file
    ordered = [sorted(run.values(), key=lambda file: file.seq) for run in runs.values()]
    begins = Counter(run[0].seq for run in ordered)

    def place(run: list[SegmentFile]) -> tuple[int, int, str]:
        first = run[0]
        return first.seq, began_us(first) if begins[first.seq] > 1 else 0, first.run

    return [file for run in sorted(ordered, key=place) for file in run]


def began_us(file: SegmentFile) -> int:
    """Tell when its first event happened; of one without events, when its file was last changed."""
    try:
        with file.open() as lines:
            for _ in range(3):  # a header, perhaps a gap, an event
                item = decode_line(lines.readline(LINE_LIMIT_BYTES), Place(str(file.path), 0, 1))
                if isinstance(item, Record):
                    return item.at
    except (BadLineError, EventLogError, OSError, EOFError):
        pass  # whoever reads on will say so
    return _changed_us(file.path)


def _changed_us(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns // 1000
    except OSError:
        return 0
