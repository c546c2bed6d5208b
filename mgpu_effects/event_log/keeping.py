"""Closed segments: a torn end is set aside, they are compressed, and the oldest ones go.

Everything here may take long, so it runs in a thread, and can be interrupted anywhere, also by the
end of the process: what is left is put in order by the next one.
"""

import gzip
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import BinaryIO

from attrs import frozen

from mgpu_effects.event_log.files import COMPRESSED, named
from mgpu_effects.event_log.format import Torn
from mgpu_effects.settings import EventLogSettings

MIB = 2**20
_DAY_S = 86_400
_PART = ".part"
_TORN = ".torn"
_log = logging.getLogger(__name__)


def set_aside(torn: Torn) -> Path:
    """Cut a segment where it is torn; what was cut off is kept in a file beside it.

    Raises OSError.
    """
    path = Path(torn.place.file)
    with path.open("r+b") as file:
        file.seek(torn.place.offset)
        beside = _beside(path, _TORN)
        with _create(beside) as kept:
            shutil.copyfileobj(file, kept)
            kept.flush()
            os.fsync(kept.fileno())
        if torn.place.offset:
            file.truncate(torn.place.offset)
            os.fsync(file.fileno())
        else:
            path.unlink()  # nothing was ever whole in it
    sync_directory(path.parent)
    return beside


@frozen
class Written:
    """What may be written to: the segments of a run from the one on that begins with event `seq`.

    A run goes on while older segments are tidied, so they may be several by then.
    """

    run: str
    seq: int

    def has(self, path: Path) -> bool:
        of = named(path)
        return of is not None and of[0] == self.run and of[1] >= self.seq


def tidy(
    directory: Path, written: Written, settings: EventLogSettings, stop: threading.Event
) -> None:
    """Compress what is closed, and remove what is too old or too much. Never raises OSError."""
    try:
        for path in sorted(directory.glob("events-*.jsonl")):
            if not written.has(path) and not stop.is_set():
                _compress(path, stop)
    except OSError as error:
        _log.error("event log: closed segments are not compressed: %s", error)
    try:
        _prune(directory, written, settings)
    except OSError as error:
        _log.error("event log: old segments stay: %s", error)


def _compress(path: Path, stop: threading.Event) -> None:
    """Replace a segment by its compressed form, of the same age: at any moment one is whole."""
    part = _beside(path, COMPRESSED + _PART)
    stat = path.stat()
    try:
        with path.open("rb") as plain, _create(part) as packed:
            _pack(plain, packed, stop)
        if not stop.is_set():
            os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            part.rename(_beside(path, COMPRESSED))
            sync_directory(path.parent)
            path.unlink()
    finally:
        part.unlink(missing_ok=True)


def _pack(plain: BinaryIO, packed: BinaryIO, stop: threading.Event) -> None:
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=packed, mtime=0) as file:
        while (piece := plain.read(MIB)) and not stop.is_set():
            file.write(piece)
    packed.flush()
    os.fsync(packed.fileno())


def _prune(directory: Path, written: Written, settings: EventLogSettings) -> None:
    """Remove the oldest beyond `keep_mib`, of which the one that is written counts as full, and
    those beyond `keep_days`; and what compressing left behind when its process was killed.
    """
    for leftover in directory.glob(f"events-*{_PART}"):
        leftover.unlink()
    room_bytes = (settings.keep_mib - settings.rotate_mib) * MIB
    oldest_s = time.time() - settings.keep_days * _DAY_S
    closed = [(p.stat(), p) for p in directory.glob("events-*.jsonl*") if not written.has(p)]
    for stat, path in sorted(closed, key=lambda c: (c[0].st_mtime_ns, c[1]), reverse=True):
        room_bytes -= stat.st_size
        if room_bytes < 0 or stat.st_mtime < oldest_s:
            path.unlink()


def sync_directory(directory: Path) -> None:
    """Have the disk know the names of new files. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
