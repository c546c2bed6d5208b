"""Recorded arrivals, read from a directory: image requests of a cluster and their checkpoints.

The files are those of Alibaba's public trace GenTD26 (`cluster-trace-v2026-GenAI`). Which
checkpoint took how long to load is not in them: a time is drawn for each.
"""

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import md5
from pathlib import Path

from attrs import frozen

from mgpu_core.config import SECOND_US
from mgpu_core.simulation.chance import Chance, pick
from mgpu_core.simulation.workload import Arrival, Workload, in_slots
from mgpu_http.commands.output import USAGE, CommandError

REQUESTS = "lora_request_trace.csv"
LATENCIES = "basemodel_update_latency_anon.csv"
SERVED = "SUCCEED"


@frozen
class Trace:
    """Who came when for which checkpoint, and how long loads took, whichever they were of."""

    arrivals: tuple[Arrival, ...]
    loads_us: tuple[int, ...]

    def workload(self, chance: Chance, slots: int) -> Workload:
        """Draw a load time for each checkpoint, on a card that holds so many of them."""
        models = sorted({one.model for one in self.arrivals})
        return in_slots(self.arrivals, {name: pick(chance, self.loads_us) for name in models}, slots)


def read_trace(directory: Path, *, users: int, part: int) -> Trace:
    """Read what one of so many parts of the users asked for."""
    arrivals = tuple(
        Arrival(
            int(datetime.fromisoformat(row["gmt_create"]).replace(tzinfo=UTC).timestamp())
            * SECOND_US,
            row["checkpoint_model_version_id"],
            int(float(row["exec_time_seconds"]) * SECOND_US),
        )
        for row in _rows(
            directory / REQUESTS,
            ("gmt_create", "predict_status", "exec_time_seconds", "groupId")
            + ("checkpoint_model_version_id",),
        )
        if row["predict_status"] == SERVED and _part_of(row["groupId"], users) == part
    )
    loads_us = tuple(
        int(float(row["value"]) * 1000) for row in _rows(directory / LATENCIES, ("value",))
    )
    if not arrivals or not loads_us:
        raise CommandError(f"{directory}: no request of part {part} of {users}, or no load", USAGE)
    return Trace(arrivals, loads_us)


def _part_of(user: str, users: int) -> int:
    """Say to which part a user belongs, everywhere and always the same."""
    return int(md5(user.encode(), usedforsecurity=False).hexdigest(), 16) % users


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Read a file with a head; what is wrong with it is said with its line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := set(columns) - set(reader.fieldnames or ()):
                raise CommandError(f"{path}: no column {', '.join(sorted(missing))}", USAGE)
            yield from reader
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}; --trace takes a directory", USAGE) from error
