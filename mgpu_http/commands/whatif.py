"""`mgpu whatif`: the arrivals of a log again, simulated, under another configuration or planner.

The old configuration is simulated as well: how near that comes to what was recorded says how much
the simulation of a new one is worth.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, define, field, frozen

from mgpu_core.codec import CodecError
from mgpu_core.config import Config
from mgpu_core.planners import Planner
from mgpu_core.replay import Record
from mgpu_core.simulation.measures import Measures, Meter
from mgpu_core.simulation.planning import told
from mgpu_core.simulation.recorded import Recorder, Recording
from mgpu_core.simulation.rerun import rerun
from mgpu_core.simulation.world import Ask
from mgpu_core.telling import lasting
from mgpu_effects.event_log import EventLogError, Gap, Segment, Skipped
from mgpu_http.commands.log import load_config, load_planner
from mgpu_http.commands.log_words import date_and_clock
from mgpu_http.commands.logs import Source
from mgpu_http.commands.output import (
    DONE,
    USAGE,
    CommandError,
    Progress,
    document,
    message,
    result,
    table,
)

PROGRESS_EVERY = 1_000
# Of the requests that gained and of those that lost, so many are shown.
SHOWN = 10
# A simulation of the old configuration that is further off than this is said to be so.
NEAR_PERCENT = 10
SHARED = (
    "requests",
    "mean_wait_ms",
    "p95_wait_ms",
    "max_wait_ms",
    "loads",
    "evictions",
    "rejected",
)


def whatif(arguments: Namespace) -> int:
    source = Source.of(arguments)
    change = Change.of(arguments)
    compared = Compared(change)
    with Progress() as progress:
        for recording in recordings(source, compared.recorded, progress):
            compared.take(recording, progress)
    if not compared.consumers:
        raise CommandError(f"{arguments.log}: nobody asks for anything in it", USAGE)
    for remark in compared.remarks:
        message(remark)
    if arguments.json:
        document(compared.encoded())
    else:
        result("\n".join(compared.lines()))
    return DONE


@frozen(kw_only=True)
class Change:
    """What is to be different. Without a configuration or planner, nothing is."""

    config: Config | None
    planner: Planner | None
    words: str

    @classmethod
    def of(cls, arguments: Namespace) -> "Change":
        config = load_config(Path(arguments.config)) if arguments.config else None
        planner = load_planner(arguments.planner) if arguments.planner else None
        given = [text for text in (arguments.config, arguments.planner) if text]
        return cls(config=config, planner=planner, words=" with ".join(given))

    @property
    def is_one(self) -> bool:
        return self.config is not None or self.planner is not None


def recordings(source: Source, meter: Meter, progress: Progress) -> Iterator[Recording]:
    """Give each run of the log by itself: what was loaded and known between two, no log tells."""
    recorder: Recorder | None = None
    segment: Segment | None = None
    events = 0
    for item in source.items():
        if isinstance(item, Segment):
            if recorder is not None and segment is not None and segment.run != item.run:
                yield recorder.recording()
                recorder = None
            segment = item
        elif isinstance(item, Gap | Skipped):
            continue
        elif segment is not None:
            again = item.event.get("type") == "Started"
            if recorder is not None and again:
                yield recorder.recording()
                recorder = None
            recorder = recorder or _recorder(segment, meter)
            _see(recorder, item, segment)
            events += 1
            if events % PROGRESS_EVERY == 0:
                progress.show(f"{events} events read")
    if recorder is not None:
        yield recorder.recording()


def _recorder(segment: Segment, meter: Meter) -> Recorder:
    try:
        return Recorder(segment.state, meter)
    except EventLogError as error:
        raise CommandError(str(error), USAGE) from error


def _see(recorder: Recorder, record: Record, segment: Segment) -> None:
    try:
        recorder.see(record)
    except CodecError as error:
        raise CommandError(
            f"event {record.seq} can't be read: {error}; mgpu {segment.mgpu} wrote it, read it with"
            " that version",
            USAGE,
        ) from error


@define
class Compared:
    """What was recorded, the same simulated, and what the change makes of it."""

    change: Change
    recorded: Meter = field(factory=Meter)
    same: Meter = field(factory=Meter)
    new: Meter = field(factory=Meter)
    consumers: dict[str, str] = field(factory=dict)  # by request
    spans: list[tuple[int, int]] = field(factory=list)  # of each run
    remarks: list[str] = field(factory=list)

    def take(self, recording: Recording, progress: Progress) -> None:
        """Simulate one run."""
        self.spans.append((recording.start_us, recording.end_us))
        self.consumers |= {
            act.request: act.consumer
            for _, act in recording.script
            if isinstance(act, Ask) and act.request is not None
        }
        self.remarks += recording.remarks
        self._simulate(recording, self.same, Change(config=None, planner=None, words=""), progress)
        if not self.change.is_one:
            self.new = self.same
            return
        self._remark(recording)
        try:
            self._simulate(recording, self.new, self.change, progress)
        except Exception as error:
            if self.change.planner is None:
                raise
            raise CommandError(f"the planner fails: {told(error)}") from error

    def _simulate(
        self, recording: Recording, meter: Meter, change: Change, progress: Progress
    ) -> None:
        """Let one run happen again, and show how far it has come."""
        span_us = max(1, recording.end_us - recording.start_us)
        what = change.words or "the old configuration"
        times = rerun(recording, meter, change.config, change.planner)
        for events, at in enumerate(times, start=1):
            if events % PROGRESS_EVERY == 0:
                share = min(1.0, (at - recording.start_us) / span_us)
                progress.show(f"simulating {what}: {share:.0%}, {events} events")

    def _remark(self, recording: Recording) -> None:
        config = self.change.config
        if config is None:
            return
        if recording.reconfigured:
            self.remarks.append(
                f"the configuration changed {recording.reconfigured} times then: the new one holds"
                " throughout"
            )
        for name, count in sorted(recording.asked.items()):
            if name not in config.consumers:
                self.remarks.append(
                    f"the new configuration has no {name}: its {count} requests are refused"
                    " (no_consumer)"
                )
        for name in sorted(config.consumers.keys() - recording.traits.keys()):
            self.remarks.append(f"{name} is not in the log: it loads and unloads as others do")

    # --------------------------------------------------------------------------------- results

    @property
    def measures(self) -> dict[str, Measures]:
        meters = {"recorded": self.recorded, "same": self.same, "new": self.new}
        return {name: meter.measures() for name, meter in meters.items()}

    def encoded(self) -> dict[str, Any]:
        meters = {"recorded": self.recorded, "same": self.same, "new": self.new}
        requests = [
            {
                "request": request,
                "consumer": consumer,
                "wait_ms": {name: _wait_ms(meter, request) for name, meter in meters.items()},
                "outcome": {name: _outcome(meter, request) for name, meter in meters.items()},
            }
            for request, consumer in self.consumers.items()
        ]
        return {
            **{
                name: {key: value for key, value in asdict(one).items() if key in SHARED}
                for name, one in self.measures.items()
            },
            "requests": requests,
        }

    def lines(self) -> Iterator[str]:
        """Tell what was simulated, how near it is, and what is different."""
        (start, _), (_, end) = self.spans[0], self.spans[-1]
        runs = f", {len(self.spans)} runs, each by itself" if len(self.spans) > 1 else ""
        yield f"{date_and_clock(start)} to {date_and_clock(end)}{runs}"
        yield ""
        yield from self._table()
        yield ""
        yield self._nearness()
        if self.change.is_one:
            yield from self._differences()

    def _table(self) -> Iterator[str]:
        shown = [*self.measures.values()][: 3 if self.change.is_one else 2]
        rows: tuple[tuple[str, list[object]], ...] = (
            ("requests", [one.requests for one in shown]),
            ("mean wait", [_time(one.mean_wait_ms) for one in shown]),
            ("95 % wait at most", [_time(one.p95_wait_ms) for one in shown]),
            ("longest wait", [_time(one.max_wait_ms) for one in shown]),
            ("loads", [one.loads for one in shown]),
            ("evictions", [one.evictions for one in shown]),
            ("rejected", [one.rejected for one in shown]),
        )
        head = ["", "RECORDED", "SAME, SIMULATED", "NEW, SIMULATED"][: len(shown) + 1]
        yield from _right(head, [[title, *map(str, values)] for title, values in rows])

    def _nearness(self) -> str:
        recorded, same = self.recorded.measures(), self.same.measures()
        off = abs(_percent(same.mean_wait_ms - recorded.mean_wait_ms, recorded.mean_wait_ms))
        loads = f"{same.loads} loads for {recorded.loads}"
        if same.loads == recorded.loads:
            loads = f"as many loads ({same.loads})"
        text = (
            f"The old configuration, simulated, is {off:.1f} % off the recorded mean wait,"
            f" with {loads}."
        )
        if off > NEAR_PERCENT or same.loads != recorded.loads:
            text += "\nThat is not what happened: take the simulated figures with care."
        return text

    def _differences(self) -> Iterator[str]:
        """Tell who gains and who loses most, from the old to the new, both simulated."""
        both = self.same.waits_us.keys() & self.new.waits_us.keys()
        by_us = {one: self.new.waits_us[one] - self.same.waits_us[one] for one in both}
        gained = sorted((one for one in by_us if by_us[one] < -1000), key=lambda one: by_us[one])
        lost = sorted((one for one in by_us if by_us[one] > 1000), key=lambda one: -by_us[one])
        mean = [self.same.measures().mean_wait_ms, self.new.measures().mean_wait_ms]
        yield (
            f"With {self.change.words} the mean wait is {_percent(mean[1] - mean[0], mean[0]):+.1f}"
            f" % of that; wait less: {len(gained)}, longer: {len(lost)},"
            f" as long: {len(both) - len(gained) - len(lost)}."
        )
        for title, names in (("gained most", gained), ("lost most", lost)):
            if names:
                yield f"\n{title}"
                yield self._waits(names[:SHOWN], by_us)
        otherwise = [
            (one, _outcome(self.same, one), _outcome(self.new, one))
            for one in self.consumers
            if _outcome(self.same, one) != _outcome(self.new, one)
        ]
        if otherwise:
            yield f"\n{len(otherwise)} end otherwise"
            rows = [(one, self.consumers[one], old, new) for one, old, new in otherwise[:SHOWN]]
            yield table(("REQUEST", "CONSUMER", "SAME", "NEW"), rows)

    def _waits(self, names: list[str], by_us: Mapping[str, int]) -> str:
        rows = [
            (
                one,
                self.consumers[one],
                *(_waited(meter, one) for meter in (self.recorded, self.same, self.new)),
                ("-" if by_us[one] < 0 else "+") + lasting(abs(by_us[one])),
            )
            for one in names
        ]
        return table(("REQUEST", "CONSUMER", "RECORDED", "SAME", "NEW", "CHANGE"), rows)


def _wait_ms(meter: Meter, request: str) -> float | None:
    us = meter.waits_us.get(request)
    return None if us is None else round(us / 1000, 1)


def _outcome(meter: Meter, request: str) -> str:
    """Say how its wait ended: served, left, or with which code it was refused."""
    if request in meter.waits_us:
        return "served"
    return meter.refused.get(request, "left")


def _waited(meter: Meter, request: str) -> str:
    us = meter.waits_us.get(request)
    return _outcome(meter, request) if us is None else lasting(us)


def _time(ms: float) -> str:
    return lasting(round(ms * 1000))


def _percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 100.0 if part else 0.0


def _right(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Align a table whose first column is text and whose others are figures, units and all."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        yield "  ".join(cells).rstrip()
