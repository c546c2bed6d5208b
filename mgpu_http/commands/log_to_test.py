"""`mgpu log to-test`: a test of the scheduler from a log, names and times made plain."""

from argparse import Namespace

from attrs import frozen

from mgpu_core import events as ev
from mgpu_core.codec import decode_effect, decode_event
from mgpu_core.pytest_case import pytest_case
from mgpu_core.replay import Difference
from mgpu_core.scheduler import Transition
from mgpu_core.simulation.minimizing import marked
from mgpu_core.simulation.plain import Log, Plain, decisions, made_plain, shortened
from mgpu_core.simulation.preamble import STEP_US
from mgpu_core.simulation.shrinking import Case, shifted
from mgpu_core.simulation.world import START_US
from mgpu_core.state import State
from mgpu_core.transcript import transcript
from mgpu_http.commands.logs import Source, Step
from mgpu_http.commands.output import DONE, USAGE, CommandError, document, message, result

# Nobody reads a test that is longer.
LONG = 60
MOST = 5_000
SHORT = "`--short` leaves out readings and probes that decide nothing"
MINIMIZE = "`mgpu log minimize` gives a short one of it"
FILES = {
    "pytest": "tests/core/test_NAME.py",
    "transcript": "tests/core/transcripts/NAME.txt",
}


def to_test(arguments: Namespace) -> int:
    recorded = Recorded.of(Source.of(arguments))
    case, log = recorded.case(), recorded.log
    if arguments.short:
        case, log = shortened(case, log)
    elif len(log) > LONG:
        message(f"{len(log)} events make a long test: {SHORT}, {MINIMIZE}")
    plain = made_plain(case, log)
    if plain is None:
        raise CommandError(
            f"{arguments.log}: it hangs on what was before it (an earlier run, or a state that it"
            f" begins in), so no test from a new broker on comes to the same; {MINIMIZE}",
            USAGE,
        )
    shape = getattr(arguments, "as")
    if shape == "transcript" or not plain.seen_plainly:
        _refuse_transcripts(plain, recorded, shape)
    text = _as_pytest(plain, recorded) if shape == "pytest" else _as_transcript(plain)
    if arguments.json:
        document({"as": shape, "file": FILES[shape], "events": len(log), "text": text})
    else:
        result(text.rstrip("\n"))
        message(f"it goes into {FILES[shape]}")
    return DONE


def _refuse_transcripts(plain: Plain, recorded: "Recorded", shape: str) -> None:
    if not plain.seen_plainly:
        raise CommandError(
            "a reading of a card in it can't be told: what is used and free there is not all of"
            f" it, and that decides something; {MINIMIZE}",
            USAGE,
        )
    if recorded.difference is not None:
        raise CommandError(
            f"event {recorded.difference.record.seq} is decided otherwise today than the log says,"
            f" and a {shape} holds what is decided today: ask for --as pytest, which holds both",
            USAGE,
        )


def _as_transcript(plain: Plain) -> str:
    return transcript(plain.case.config, plain.retold.log)


def _as_pytest(plain: Plain, recorded: "Recorded") -> str:
    log = plain.retold.log
    expected = [decisions(transition.effects) for _, transition in log]
    note = ""
    if recorded.difference is not None:
        today, effects = expected[-1], map(decode_effect, recorded.difference.expected)
        expected[-1] = [plain.words(text) for text in decisions(tuple(effects))]
        if expected[-1] != today:
            told = ", ".join(today) or "nothing"
            note = f"At the end was decided otherwise than today, which decides: {told}."
            message(f"event {recorded.difference.record.seq} is decided otherwise today: it fails")
    return pytest_case("from_a_log", plain.case.config, log, expected, note)


@frozen
class Recorded:
    """The last run in a log, up to where today's code decides otherwise."""

    start: State
    log: Log
    difference: Difference | None

    @classmethod
    def of(cls, source: Source) -> "Recorded":
        steps: list[Step] = []
        for step in source.steps():
            if step.transition is None or step.before is None:
                raise CommandError(
                    f"event {step.record.seq}: what is before it is damaged, so its state is"
                    " unknown",
                    USAGE,
                )
            if step.record.event["type"] == ev.Started.__name__:
                steps = []
            steps.append(step)
            if len(steps) > MOST:
                raise CommandError(f"more than {MOST} events make no test: {MINIMIZE}", USAGE)
            if step.difference is not None:
                break
        if not steps or steps[0].before is None:
            raise CommandError(f"{source.log}: there are no events in it", USAGE)
        return cls(steps[0].before, [_told(step) for step in steps], steps[-1].difference)

    def case(self) -> Case:
        """Give it as what happens to a new broker, right after its start."""
        states = [self.start, *(transition.state for _, transition in self.log)]
        events = [marked(event, state) for (event, _), state in zip(self.log, states, strict=False)]
        if isinstance(events[0], ev.Started):
            by = START_US - events[0].at
            events = events[1:]
        else:
            by = START_US + STEP_US - events[0].at
        return Case(config=self.start.config, events=tuple(shifted(event, by) for event in events))


def _told(step: Step) -> tuple[ev.Event, Transition]:
    assert step.transition is not None
    return decode_event(step.record.event, step.record.at), step.transition
