"""Recorded arrivals, read from a directory: image requests of a cluster and their checkpoints.

The files are those of Alibaba's public trace GenTD26 (`cluster-trace-v2026-GenAI`). Which
checkpoint took how long to load is not in them: a time is drawn for each.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import md5
from pathlib import Path
from typing import TypeAlias, TypeVar

from attrs import frozen

from mgpu_core.config import SECOND_US
from mgpu_core.simulation.chance import Chance, pick
from mgpu_core.simulation.workload import Arrival, Workload, in_slots
from mgpu_core.simulation.world import MS_US
from mgpu_http.commands.output import USAGE, CommandError

REQUESTS = "lora_request_trace.csv"
LATENCIES = "basemodel_update_latency_anon.csv"
SERVED = "SUCCEED"
REQUEST_COLUMNS = (
    "gmt_create",
    "predict_status",
    "exec_time_seconds",
    "groupId",
    "checkpoint_model_version_id",
)
Row: TypeAlias = Mapping[str, str]
T = TypeVar("T")


@frozen
class Trace:
    """Who came when for which checkpoint, and how long loads took, whichever they were of."""

    arrivals: tuple[Arrival, ...]
    loads_us: tuple[int, ...]

    def workload(self, chance: Chance, slots: int) -> Workload:
        """Draw a load time for each checkpoint, on a card that holds so many of them."""
        models = sorted({one.model for one in self.arrivals})
        return in_slots(
            self.arrivals, {name: pick(chance, self.loads_us) for name in models}, slots
        )


def read_trace(directory: Path, *, users: int, part: int) -> Trace:
    """Read what one of so many parts of the users asked for."""

    def wanted(row: Row) -> Arrival | None:
        served = row["predict_status"] == SERVED and _part_of(row["groupId"], users) == part
        return _arrival(row) if served else None

    arrivals = tuple(_read(directory / REQUESTS, REQUEST_COLUMNS, wanted))
    loads_us = tuple(_read(directory / LATENCIES, ("value",), _load_us))
    if not arrivals or not loads_us:
        raise CommandError(f"{directory}: no request of part {part} of {users}, or no load", USAGE)
    return Trace(arrivals, loads_us)


def _arrival(row: Row) -> Arrival:
    came = datetime.fromisoformat(row["gmt_create"]).replace(tzinfo=UTC)
    return Arrival(
        int(came.timestamp()) * SECOND_US,
        row["checkpoint_model_version_id"],
        int(float(row["exec_time_seconds"]) * SECOND_US),
    )


def _load_us(row: Row) -> int:
    return int(float(row["value"]) * MS_US)


def _part_of(user: str, users: int) -> int:
    """Say to which part a user belongs, everywhere and always the same."""
    return int(md5(user.encode(), usedforsecurity=False).hexdigest(), 16) % users


def _read(path: Path, columns: Sequence[str], parse: Callable[[Row], T | None]) -> Iterator[T]:
    """Give what the lines under the head say, without None; an error names its line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise CommandError(f"{path}: no column {', '.join(sorted(missing))}", USAGE)
            for row in reader:
                parsed = _parsed(row, parse, f"{path}, line {reader.line_num}")
                if parsed is not None:
                    yield parsed
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}; --trace takes a directory", USAGE) from error


def _parsed(row: Row, parse: Callable[[Row], T | None], place: str) -> T | None:
    try:
        return parse(row)
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"{place}: {error}", USAGE) from error
