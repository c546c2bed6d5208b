"""`mgpu fuzz`: random histories until one breaks a property; that one is made small and kept."""

import asyncio
import itertools
import secrets
import shlex
import signal
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from attrs import define, field, frozen

from mgpu_core.codec import (
    encode_config,
    encode_effect,
    encode_event,
    encode_note,
    encode_state,
)
from mgpu_core.config import Config
from mgpu_core.planners import Planner, View
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation import (
    PROPERTIES,
    Report,
    campaign,
    folded,
    smallest,
    unfair_because,
)
from mgpu_core.simulation.reach import LABELS
from mgpu_core.simulation.run import NEEDLESS, Log
from mgpu_core.transcript import configured, transcript
from mgpu_effects.event_log import EventLog, EventLogError, default_dir
from mgpu_effects.settings import EventLogSettings
from mgpu_http.commands.log import load_config, load_planner
from mgpu_http.commands.output import (
    DONE,
    FAILED,
    USAGE,
    CommandError,
    Progress,
    document,
    message,
    result,
)

INTERRUPTED_EXIT = 130  # as a shell says it of Ctrl-C
# A planner is asked within a step of the broker: one that computes longer than this is stuck.
ANSWER_WITHIN_S = 1.0
# Once it has been, nobody need wait as long again and again while its history is made small.
THEN_WITHIN_S = 0.02
# A transcript longer than this is shown from its last events on; the log has them all.
SHOWN_EVENTS = 60


def fuzz(arguments: Namespace) -> int:
    """Exit code 0: nothing was found; 1: something was; 2: the planner or file can't be used."""
    if arguments.seconds <= 0:
        raise CommandError("--seconds is a number above 0", USAGE)
    planner = Limited(load_planner(arguments.planner)) if arguments.planner else None
    config = load_config(Path(arguments.config)) if arguments.config else None
    for reason in unfair_because(config) if config else ():
        message(f"no wait need end by itself, as {reason}")
    hunt = Hunt(planner=planner, config=config, seconds=arguments.seconds, one=arguments.seed)
    with limited():
        found = hunt.run()
        finding = _made_small(arguments, found, planner) if found else None
    if finding is None:
        return _nothing(arguments, hunt)
    finding.save()
    if arguments.json:
        document(hunt.summary() | {"found": finding.summary()})
    else:
        finding.tell()
    return FAILED


def _made_small(arguments: Namespace, found: Report, planner: Planner | None) -> "Finding":
    message(f"seed {found.seed}: {found.violation}\nlooking for a smaller history (Ctrl-C: enough)")
    try:
        small = smallest(found, Random, planner)
    except KeyboardInterrupt:
        small = found
    return Finding(arguments, small, folded(small.setting.config, small.history, planner))


def _nothing(arguments: Namespace, hunt: "Hunt") -> int:
    if arguments.json:
        document(hunt.summary() | {"found": None})
    else:
        result(f"no property broken in {hunt.runs} runs, {hunt.events} events")
        if hunt.missed:
            result(f"not reached: {', '.join(hunt.missed)}")
        if hunt.reached[NEEDLESS]:
            result(f"advice: {NEEDLESS} ({hunt.reached[NEEDLESS]} answers)")
    return INTERRUPTED_EXIT if hunt.interrupted else DONE


@define
class Hunt:
    """Plays run after run, and shows on standard error how it goes on."""

    planner: Planner | None
    config: Config | None
    seconds: float
    one: int | None  # the seed of the one run to play
    runs: int = 0
    events: int = 0
    reached: Counter[str] = field(factory=Counter)
    interrupted: bool = False

    def run(self) -> Report | None:
        """Give the first run that breaks a property; None: there was none in the time."""
        first = secrets.randbelow(2**40) if self.one is None else self.one
        seeds: Iterable[int] = itertools.count(first) if self.one is None else (first,)
        reports = campaign(seeds, Random, planner=self.planner, config=self.config)
        try:
            return next((one for one in self._shown(reports) if one.violation is not None), None)
        except KeyboardInterrupt:
            self.interrupted = True
            return None

    def _shown(self, reports: Iterator[Report]) -> Iterator[Report]:
        began = time.monotonic()
        with Progress() as progress:
            for report in reports:
                self.runs, self.events = self.runs + 1, self.events + report.steps
                self.reached.update(report.reached)
                passed_s = time.monotonic() - began
                rate = f"{self.events / max(passed_s, 0.001):.0f} a second"
                progress.show(f"{self.runs} runs, {self.events} events, {rate}, seed {report.seed}")
                yield report
                if passed_s > self.seconds:
                    return

    @property
    def missed(self) -> list[str]:
        """What should happen in many runs; in a configuration of one's own much of it can't."""
        many = self.config is None and self.one is None
        return [label for label in LABELS if not self.reached[label]] if many else []

    def summary(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "events": self.events,
            "not_reached": self.missed,
            "needless": self.reached[NEEDLESS],
        }


# ---------------------------------------------------------------------------- what was found


@frozen
class Finding:
    """The smallest history, as it is shown and kept."""

    arguments: Namespace
    report: Report
    log: Log

    @property
    def broken(self) -> str:
        assert self.report.violation is not None
        return self.report.violation.property

    @property
    def directory(self) -> Path:
        parent = self.arguments.save
        base = default_dir() / "fuzz" if parent is None else Path(parent)
        return base / f"seed-{self.report.seed}-{self.broken}"

    @property
    def again(self) -> str:
        """Give the command that finds it again."""
        given = vars(self.arguments)
        options = [
            f"--{name} {shlex.quote(given[name])}" for name in ("planner", "config") if given[name]
        ]
        return " ".join(["mgpu fuzz", *options, f"--seed {self.report.seed}"])

    def tell(self) -> None:
        violation = self.report.violation
        assert violation is not None
        left_out = len(self.log) - SHOWN_EVENTS
        result(transcript(self.report.setting.config, self.log, last=SHOWN_EVENTS))
        if left_out > 0:
            result(f"(the first {left_out} events are in the log only)")
        result(f"broken:  {self.broken}, {PROPERTIES[self.broken]}")
        result(f"here:    {violation.text}")
        result(
            f"events:  {len(self.log)}, of {len(self.report.setting.config.consumers)} consumers"
        )
        result(f"saved:   {shlex.quote(str(self.directory))}")
        result(f"again:   {self.again}")

    def summary(self) -> dict[str, Any]:
        violation, config = self.report.violation, self.report.setting.config
        assert violation is not None
        return {
            "property": violation.property,
            "means": PROPERTIES[violation.property],
            "text": violation.text,
            "seed": self.report.seed,
            "config": configured(config),
            "events": [{"at": event.at, "event": encode_event(event)} for event, _ in self.log],
            "transcript": transcript(config, self.log),
            "log": str(self.directory),
            "again": self.again,
        }

    def save(self) -> None:
        """Write it as an event log, in the place of what the same seed has left before."""
        try:
            for old in self.directory.glob("events-*.jsonl*"):
                old.unlink()
            asyncio.run(self._write())
        except (OSError, EventLogError) as error:
            raise CommandError(f"{self.directory}: the log is not saved: {error}") from error

    async def _write(self) -> None:
        config = self.report.setting.config
        states = [Scheduler(config).initial(), *(transition.state for _, transition in self.log)]
        written = EventLog(
            self.directory,
            EventLogSettings(),
            f"seed-{self.report.seed}",
            version("mgpu"),
            lambda: (encode_config(config), encode_state(states[number])),
        )
        number = 0
        written.open()
        written.begin(1)
        for number, (event, transition) in enumerate(self.log, start=1):
            effects = [encode_effect(effect) for effect in transition.effects]
            notes = [encode_note(note) for note in transition.notes]
            at = transition.state.at
            written.append(number, at, encode_event(event), effects, notes)
        await written.close()
        if written.lost:
            raise EventLogError(f"{written.lost} events could not be written")


# ------------------------------------------------------------------- planners that never answer


@define
class Limited:
    """A planner that is interrupted when it computes too long for one answer."""

    planner: Planner
    _within_s: float = ANSWER_WITHIN_S

    def victims(self, target: str, view: View) -> tuple[str, ...] | None:
        signal.setitimer(signal.ITIMER_VIRTUAL, self._within_s)
        try:
            return self.planner.victims(target, view)
        except TimeoutError:
            self._within_s = THEN_WITHIN_S
            raise
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextmanager
def limited() -> Iterator[None]:
    """Have the time limit of planners raise where one is stuck."""
    before = signal.signal(signal.SIGVTALRM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, before)


def _interrupt(_number: int, frame: FrameType | None) -> None:
    where = f" (at line {frame.f_lineno} of {frame.f_code.co_filename})" if frame else ""
    raise TimeoutError(f"no answer, however long it computes{where}")
