"""What outlives a run: the end of its log is folded again, and the next one begins with that."""

import logging
from pathlib import Path

from attrs import frozen

from mgpu_core.codec import CodecError
from mgpu_core.planners import Planner
from mgpu_core.replay import Record, Replay
from mgpu_core.state import State
from mgpu_effects.event_log.files import SegmentFile, segment_files
from mgpu_effects.event_log.format import CorruptLogError, EventLogError, Gap, Segment, Torn
from mgpu_effects.event_log.keeping import set_aside
from mgpu_effects.event_log.reading import read
from mgpu_effects.event_log.writing import SEGMENT_EVENTS

# How many segments may be unreadable before a new run gives up: each costs its reading.
_TRIES = 3
_log = logging.getLogger(__name__)


@frozen
class Memory:
    """The state at the end of the last run, None where there is none to be had, and the number of
    its last event: a new run goes on counting, so that a number is one event of the directory.
    """

    state: State | None = None
    seq: int = 0


def recall(directory: Path, planner: Planner | None = None) -> Memory:
    """Read the last segment, or the one before it where that can't be read. Never raises.

    A torn end is set aside. What can't be read stays as it is; that is said, and not found out
    again by the run after this one, which finds this one's segments.
    """
    try:
        files = segment_files(directory)
    except EventLogError as error:
        _log.error("event log: %s; a new run begins without what it remembers", error)
        return Memory()
    seq = 0
    for file in reversed(files[-_TRIES:]):
        try:
            memory = _fold(file, planner)
        except Exception as error:  # noqa: BLE001 - no log may keep a broker from starting
            _log.error("event log: not read: %s", _told(file, error))
            memory = Memory(None, file.seq + SEGMENT_EVENTS)  # it holds no events beyond that
        seq = max(seq, memory.seq)
        if memory.state is not None:
            return Memory(memory.state, seq)
    if files:
        _log.error("event log: what earlier runs measured is forgotten, this one begins afresh")
    return Memory(None, seq)


def _fold(file: SegmentFile, planner: Planner | None) -> Memory:
    replay = Replay(planner)
    seq, torn = file.seq - 1, None
    for item in read(file.path):
        match item:
            case Segment():
                replay.begin(item.state)
            case Record():
                replay.advance(item)
                seq = item.seq
            case Gap():
                seq = item.last
            case Torn():
                torn = item
    if torn is not None and not file.compressed:
        _set_aside(torn)
    return Memory(replay.state, seq)


def _set_aside(torn: Torn) -> None:
    told = f"{torn.place}: {torn.reason}; its last {torn.size} bytes"
    try:
        _log.warning("event log: %s are set aside in %s", told, set_aside(torn).name)
    except OSError as error:  # a full disk; readers pass over them as well
        _log.warning("event log: %s stay where they are: %s", told, error.strerror)


def _told(file: SegmentFile, error: Exception) -> str:
    if isinstance(error, CorruptLogError):
        return f"{error.place}: {error.reason}"
    if isinstance(error, EventLogError):
        return str(error)
    if isinstance(error, CodecError):
        return f"{file.path}: {error}"
    return f"{file.path}: {type(error).__name__}: {error}"
