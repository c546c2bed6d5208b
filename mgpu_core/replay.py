"""A log replayed strictly: today's code has to decide what was decided then.

    replay = Replay()
    for item in items:  # of a log, in order
        if isinstance(item, Segment): replay.begin(item.state)
        elif isinstance(item, Record): difference = replay.step(item)

What is compared is what the scheduler told the runtime to do, as the log holds it. Notes explain,
and a later version may explain better.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from attrs import frozen

from mgpu_core import upcast
from mgpu_core.codec import decode_event, encode_effect
from mgpu_core.planners import Planner
from mgpu_core.scheduler import Scheduler, Transition
from mgpu_core.state import State

Json: TypeAlias = Mapping[str, Any]


class Record(NamedTuple):
    """One event of a log, as the log holds it; `at` in microseconds since the Unix epoch."""

    seq: int
    at: int
    event: Json
    effects: Sequence[Json]
    notes: Sequence[Json]


@frozen(kw_only=True)
class Difference:
    """Where today's code decides otherwise: the record, what it does now, and from which state."""

    record: Record
    before: State
    transition: Transition

    @property
    def expected(self) -> list[Json]:
        return [upcast.shape(effect) for effect in self.record.effects]

    @property
    def got(self) -> list[Json]:
        return [encode_effect(effect) for effect in self.transition.effects]


class Replay:
    """Folds records over a state, and compares. `state` is the one after the last record.

    `state` None: it isn't known, from the outset or since events were lost; then `step` waits for
    the next `begin`.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.state: State | None = None
        self._planner = planner
        self._scheduler: Scheduler | None = None

    def begin(self, state: State) -> None:
        """Go on from this state: that of a segment's header."""
        self.state = state
        self._scheduler = Scheduler(state.config, self._planner)

    def lose(self) -> None:
        """Records are missing here: the state after them is unknown."""
        self.state = None

    def advance(self, record: Record) -> Transition | None:
        """Take one record without comparing; None: the state is unknown. Raises CodecError."""
        if self.state is None or self._scheduler is None:
            return None
        transition = self._scheduler.step(self.state, decode_event(record.event, record.at))
        self.state = transition.state
        return transition

    def step(self, record: Record) -> Difference | None:
        """Take one record; None: nothing differs. Raises CodecError."""
        before = self.state
        transition = self.advance(record)
        if before is None or transition is None:
            return None
        return compared(record, before, transition)


def compared(record: Record, before: State, transition: Transition) -> Difference | None:
    """Compare what a step decides with what was recorded of it."""
    if [encode_effect(effect) for effect in transition.effects] == record.effects:
        return None
    difference = Difference(record=record, before=before, transition=transition)
    return difference if difference.got != difference.expected else None


def first_difference(
    state: State, records: Iterable[Record], planner: Planner | None = None
) -> Difference | None:
    """Replay one segment: the header's state, and its records."""
    replay = Replay(planner)
    replay.begin(state)
    return next((found for record in records if (found := replay.step(record))), None)
