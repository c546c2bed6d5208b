"""One run's events, written as they happen: a line is in the kernel's hands before any effect is
carried out, and on the disk by policy. What takes long is done in threads.
"""

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from mgpu_effects.event_log.files import segment_name
from mgpu_effects.event_log.format import (
    EventLogError,
    Json,
    encode_gap,
    encode_header,
    encode_line,
)
from mgpu_effects.event_log.keeping import MIB, Written, sync_directory, tidy
from mgpu_effects.event_log.live import Live
from mgpu_effects.settings import EventLogSettings

# A segment ends when it is full (`rotate_mib`), old, or holds this many events: to fold them over
# its header's state takes half a second, which is what a look at any point of a log costs.
SEGMENT_EVENTS = 4096
_SEGMENT_AGE_S = 86_400.0
_RETRY_S = 1.0
_log = logging.getLogger(__name__)

# The core's configuration and state as of now, encoded.
Snapshot: TypeAlias = Callable[[], tuple[Json, Json]]


class EventLog:
    """Writes one run's events. An event is appended before its effects are carried out.

    `snapshot` is asked where a segment begins, within `begin`, `append` and `close`: it gives the
    state after the last event appended. `lost` counts the events that could not be written.
    Nothing but `open` ever raises: a broker without a log still serves.
    """

    def __init__(
        self,
        directory: Path,
        settings: EventLogSettings,
        run: str,
        version: str,
        snapshot: Snapshot,
    ) -> None:
        self.directory = directory
        self.lost = 0
        self.live = Live(run)  # what was appended last, written or lost
        self._settings = settings
        self._run = run
        self._version = version
        self._snapshot = snapshot
        self._lock_fd = -1
        self._segment: _Segment | None = None
        self._gap: tuple[int, int] | None = None  # first and last event lost since the segment
        self._begin_after = -math.inf  # monotonic seconds: no attempt on a full disk before
        self._retired: list[int] = []  # descriptors of segments to be synced and closed
        self._named = False  # a segment was begun, and the disk may not know its name
        self._dirty = asyncio.Event()
        self._syncing = asyncio.Lock()
        self._syncer: asyncio.Task[None] | None = None
        self._untidy = asyncio.Event()
        self._ending = threading.Event()
        self._keeper: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Take the directory; nobody else writes to it until `close`.

        Raises EventLogError where it can't be used or another broker uses it.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _lock(self.directory / "lock")
        except BlockingIOError as error:
            raise EventLogError(
                f"another mgpu writes its event log to {self.directory}: end it, or give this one"
                " another `event_log.dir`"
            ) from error
        except OSError as error:
            raise EventLogError(
                f"event log: cannot use {error.filename}: {error.strerror}"
            ) from error

    def begin(self, first_seq: int) -> None:
        """Begin the segment for event `first_seq` and those after it, within an event loop."""
        self.live.begin(first_seq)
        self._begin(first_seq)
        self._keeper = asyncio.create_task(self._keep_tidy())
        if self._settings.fsync != "never":
            pause_s = 0.0 if self._settings.fsync == "each" else self._settings.fsync
            self._syncer = asyncio.create_task(self._sync_when_dirty(pause_s))

    def append(
        self, seq: int, at: int, event: Json, effects: Sequence[Json], notes: Sequence[Json]
    ) -> None:
        """Write one event, already encoded; on its return the kernel has it."""
        line = encode_line(seq, at, event, effects, notes)
        self._append(seq, line)
        self.live.add(seq, line)

    def _append(self, seq: int, line: bytes) -> None:
        segment = self._segment
        if segment is None:
            self._lose(seq)
            self._begin(seq + 1)
            return
        try:
            segment.write(line)
        except OSError as error:
            _log.error("event log: %s: events are lost from here", error.strerror)
            self._lose(seq)
            self._retire()
            self._begin_after = time.monotonic() + _RETRY_S
            return
        self._dirty.set()
        if segment.is_over(self._settings.rotate_mib * MIB):
            self._begin(seq + 1)

    async def sync(self) -> None:
        """Return when the disk has all that was appended before, or has refused it."""
        async with self._syncing:
            descriptors = [os.dup(self._segment.fd)] if self._segment else []
            descriptors += self._retired
            self._retired = []
            self._dirty.clear()
            named, self._named = self._named, False
            await asyncio.to_thread(_sync_and_close, descriptors, self.directory if named else None)

    async def close(self) -> None:
        """Write what is left, and let the directory go; the next run tidies up."""
        self.live.close()
        self._ending.set()
        if self._gap is not None:
            self._begin_after = -math.inf
            self._begin(self._gap[1] + 1)
        if self._syncer is not None:
            self._syncer.cancel()
            await asyncio.wait((self._syncer,))
            await self.sync()
        if self._keeper is not None:
            self._untidy.set()
            await self._keeper
        if self._segment is not None:
            os.close(self._segment.fd)
            self._segment = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _lose(self, seq: int) -> None:
        self.lost += 1
        self._gap = (self._gap[0] if self._gap else seq, seq)

    def _begin(self, seq: int) -> None:
        """Begin a segment, or go on as before if that can't be done now."""
        if time.monotonic() < self._begin_after:
            return
        config, state = self._snapshot()
        lines = encode_header(self._version, self._run, config, state)
        if self._gap is not None:
            lines += encode_gap(*self._gap)
        path = self.directory / segment_name(self._run, seq)
        try:
            segment = _Segment(path, seq, lines)
        except OSError as error:
            _log.error("event log: %s: %s", path.name, error.strerror)
            self._begin_after = time.monotonic() + _RETRY_S
            return
        if self._gap is not None:
            _log.warning("event log: goes on after a gap: events %d to %d are lost", *self._gap)
        self._retire()
        self._segment, self._gap = segment, None
        self._named = True
        self._dirty.set()
        self._untidy.set()

    def _retire(self) -> None:
        if self._segment is None:
            return
        if self._settings.fsync == "never":
            os.close(self._segment.fd)
        else:
            self._retired.append(self._segment.fd)
            self._dirty.set()
        self._segment = None

    async def _keep_tidy(self) -> None:
        while not self._ending.is_set():
            await self._untidy.wait()
            self._untidy.clear()
            seq = self._segment.seq if self._segment else self.live.seq + 1
            written = Written(self._run, seq)
            await asyncio.to_thread(tidy, self.directory, written, self._settings, self._ending)

    async def _sync_when_dirty(self, pause_s: float) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(pause_s)
            try:
                await self.sync()
            except OSError as error:
                _log.error("event log: not synced: %s", error.strerror)


class _Segment:
    """A new file. Its constructor and `write` raise OSError and leave no part of the data."""

    def __init__(self, path: Path, seq: int, head: bytes) -> None:
        self.seq = seq  # of its first event
        self.size = 0
        self._events = 0
        self._begun = time.monotonic()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.fd = os.open(path, flags, 0o600)
        try:
            self._write(head)
        except OSError:
            os.close(self.fd)
            path.unlink(missing_ok=True)
            raise

    def write(self, line: bytes) -> None:
        self._write(line)
        self._events += 1

    def is_over(self, full_bytes: int) -> bool:
        return (
            self.size >= full_bytes
            or self._events >= SEGMENT_EVENTS
            or time.monotonic() >= self._begun + _SEGMENT_AGE_S
        )

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self.fd, data)
            while written < len(data):
                written += os.write(self.fd, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise
        self.size += len(data)


def _lock(path: Path) -> int:
    """Raises BlockingIOError where another process holds it. Kept until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_and_close(descriptors: Sequence[int], directory: Path | None) -> None:
    for descriptor in descriptors:
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            _log.error("event log: not synced: %s", error.strerror)
        finally:
            os.close(descriptor)
    if directory is not None:
        try:
            sync_directory(directory)
        except OSError as error:
            _log.error("event log: names of files not synced: %s", error.strerror)
