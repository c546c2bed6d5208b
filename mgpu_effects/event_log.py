r"""The event log, written: JSON Lines in segments, from which every state can be computed again.

A segment `events-RUN-SEQ.jsonl` (SEQ: its first event, ten digits) is ASCII with LF and holds

1. a header: `{"log":"mgpu","format":1,"mgpu":VERSION,"run":RUN,"config":{...},"state":{...}}`,
   where `state` is the one before event SEQ, so that the segment replays alone;
2. one line per event, keys in this order:
   `{"seq":17,"at":...,"event":{...},"effects":[...],"notes":[...],"crc":"9ae1f03b"}`.

`crc` is the CRC-32 (zlib's), eight hexadecimal digits, over the line without that member: its
bytes before `,"crc":` and a closing `}`.

Could events not be written (disk full, input/output error), the log goes on in a new segment,
whose header holds the state after them and whose second line tells of them:
`{"gap":COUNT,"first":SEQ,"last":SEQ,"crc":"..."}`.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from mgpu_effects.settings import EventLogSettings

FORMAT = 1
_MIB = 2**20
_DAY_S = 86_400
_RETRY_S = 1.0
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True).encode
_log = logging.getLogger(__name__)

Json: TypeAlias = Mapping[str, object]
# The core's configuration and state as of now, encoded.
Snapshot: TypeAlias = Callable[[], tuple[Json, Json]]


class EventLogError(Exception):
    """The log can't be opened; the message is for the operator."""


def default_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$STATE_DIRECTORY` (systemd's; the first of several), else mgpu in the user's state home."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    home = Path(environ.get("XDG_STATE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".local" / "state") / "mgpu"


class EventLog:
    """Writes one run's events. An event is appended before its effects are carried out.

    `snapshot` is asked where a segment begins, within `open`, `append` and `close`: it gives the
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
        self.lost = 0
        self._directory = directory
        self._settings = settings
        self._run = run
        self._version = version
        self._snapshot = snapshot
        self._lock_fd = -1
        self._segment: _Segment | None = None
        self._gap: tuple[int, int] | None = None  # first and last event lost since the segment
        self._begin_after = -math.inf  # monotonic seconds: no attempt on a full disk before
        self._retired: list[int] = []  # descriptors of segments to be synced and closed
        self._dirty = asyncio.Event()
        self._syncing = asyncio.Lock()
        self._syncer: asyncio.Task[None] | None = None

    def open(self, first_seq: int) -> None:
        """Begin the segment for event `first_seq` and those after it; needs a running event loop.

        Raises EventLogError where the directory can't be used or another broker uses it.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _lock(self._directory / "lock")
        except BlockingIOError as error:
            raise EventLogError(
                f"another mgpu writes its event log to {self._directory}"
            ) from error
        except OSError as error:
            raise EventLogError(
                f"event log: cannot use {error.filename}: {error.strerror}"
            ) from error
        self._begin(first_seq)
        if self._settings.fsync != "never":
            pause_s = 0.0 if self._settings.fsync == "each" else self._settings.fsync
            self._syncer = asyncio.create_task(self._sync_when_dirty(pause_s))

    def append(
        self, seq: int, at: int, event: Json, effects: Sequence[Json], notes: Sequence[Json]
    ) -> None:
        """Write one event, already encoded; on its return the kernel has it."""
        segment = self._segment
        if segment is None:
            self._lose(seq)
            self._begin(seq + 1)
            return
        line = encode_line(seq, at, event, effects, notes)
        try:
            segment.write(line)
        except OSError as error:
            _log.error("event log: %s: events are lost from here", error.strerror)
            self._lose(seq)
            self._retire()
            self._begin_after = time.monotonic() + _RETRY_S
            return
        self._dirty.set()
        if segment.size >= self._settings.rotate_mib * _MIB:
            self._begin(seq + 1)

    async def sync(self) -> None:
        """Return when the disk has all that was appended before, or has refused it."""
        async with self._syncing:
            descriptors = [os.dup(self._segment.fd)] if self._segment else []
            descriptors += self._retired
            self._retired = []
            self._dirty.clear()
            await asyncio.to_thread(_sync_and_close, descriptors)

    async def close(self) -> None:
        if self._gap is not None:
            self._begin_after = -math.inf
            self._begin(self._gap[1] + 1)
        if self._syncer is not None:
            self._syncer.cancel()
            await asyncio.wait((self._syncer,))
            await self.sync()
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
        head = {"log": "mgpu", "format": FORMAT, "mgpu": self._version, "run": self._run}
        lines = _encode({**head, "config": config, "state": state}).encode("ascii") + b"\n"
        if self._gap is not None:
            first, last = self._gap
            lines += _line({"gap": last - first + 1, "first": first, "last": last})
        path = self._directory / f"events-{self._run}-{seq:010d}.jsonl"
        try:
            segment = _Segment(path, lines)
        except OSError as error:
            _log.error("event log: %s: %s", path.name, error.strerror)
            self._begin_after = time.monotonic() + _RETRY_S
            return
        if self._gap is not None:
            _log.warning("event log: goes on after a gap of %d events", last - first + 1)
        self._retire()
        self._segment, self._gap = segment, None
        self._dirty.set()
        self._prune(segment.path)

    def _retire(self) -> None:
        if self._segment is None:
            return
        if self._settings.fsync == "never":
            os.close(self._segment.fd)
        else:
            self._retired.append(self._segment.fd)
            self._dirty.set()
        self._segment = None

    def _prune(self, current: Path) -> None:
        """Remove the oldest segments beyond `keep_mib` (the current one counts as full) and those
        beyond `keep_days`.
        """
        settings = self._settings
        room_bytes = (settings.keep_mib - settings.rotate_mib) * _MIB
        oldest_s = time.time() - settings.keep_days * _DAY_S
        try:
            closed = [
                (p.stat(), p) for p in self._directory.glob("events-*.jsonl*") if p != current
            ]
            for stat, path in sorted(closed, key=lambda c: (c[0].st_mtime_ns, c[1]), reverse=True):
                room_bytes -= stat.st_size
                if room_bytes < 0 or stat.st_mtime < oldest_s:
                    path.unlink()
        except OSError as error:
            _log.error("event log: old segments stay: %s", error)

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

    def __init__(self, path: Path, head: bytes) -> None:
        self.path = path
        self.size = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.fd = os.open(path, flags, 0o600)
        try:
            self.write(head)
        except OSError:
            os.close(self.fd)
            path.unlink(missing_ok=True)
            raise

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise
        self.size += len(data)


def encode_line(
    seq: int, at: int, event: Json, effects: Sequence[Json], notes: Sequence[Json]
) -> bytes:
    """Give the line of one event, as it stands in a segment."""
    return _line({"seq": seq, "at": at, "event": event, "effects": effects, "notes": notes})


def _line(members: Json) -> bytes:
    document = _encode(members).encode("ascii")
    return b'%b,"crc":"%08x"}\n' % (document[:-1], zlib.crc32(document))


def _lock(path: Path) -> int:
    """Raises BlockingIOError where another process holds it. Kept until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_and_close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            _log.error("event log: not synced: %s", error.strerror)
        finally:
            os.close(descriptor)
