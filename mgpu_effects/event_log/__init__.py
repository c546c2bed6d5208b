"""The event log: what happened, what was decided and why, from which every state can be computed.

`format` is what stands in a file, `files` which files there are; `writing` writes one run's, and
`keeping` looks after those that are closed; `reading` streams a log, and `memory` takes from the
last run what outlives it; `live` gives the lines of a running broker as they come.
"""

from mgpu_effects.event_log.files import default_dir
from mgpu_effects.event_log.format import (
    CorruptLogError,
    EventLogError,
    Gap,
    Segment,
    Skipped,
    Torn,
    encode_gap,
    encode_header,
    encode_line,
)
from mgpu_effects.event_log.live import Line, Live, PastError, past
from mgpu_effects.event_log.memory import Memory, recall
from mgpu_effects.event_log.reading import Item, found_in, last_record, read, segment_with
from mgpu_effects.event_log.writing import EventLog

__all__ = [
    "CorruptLogError",
    "EventLog",
    "EventLogError",
    "Gap",
    "Item",
    "Line",
    "Live",
    "Memory",
    "PastError",
    "Segment",
    "Skipped",
    "Torn",
    "default_dir",
    "encode_gap",
    "encode_header",
    "encode_line",
    "found_in",
    "last_record",
    "past",
    "read",
    "recall",
    "segment_with",
]
