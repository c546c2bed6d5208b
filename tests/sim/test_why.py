"""What requests waited for, in whole histories: intervals that add up to each wait."""

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

import pytest
from attrs import define

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.codec import encode_effect, encode_event, encode_note, encode_state
from mgpu_core.replay import Record
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation import Report, campaign, folded
from mgpu_core.simulation.run import Log
from mgpu_core.state import Phase, State
from mgpu_core.why import (
    BROUGHT_IN,
    CANCELLED,
    LOST,
    NOT_LOADED,
    SERVED,
    UNRECORDED,
    WAITING,
    Explanation,
    Waits,
)

SEEDS = range(32)


def recorded(log: Log) -> list[Record]:
    return [
        Record(
            seq=seq,
            at=transition.state.at,
            event=encode_event(event),
            effects=[encode_effect(effect) for effect in transition.effects],
            notes=[encode_note(note) for note in transition.notes],
        )
        for seq, (event, transition) in enumerate(log, start=1)
    ]


@define
class Truth:
    """One wait, from the events and effects alone: numbers of events, and how it ended."""

    first: int
    last: int | None = None
    outcome: str = WAITING


def truths(log: Log) -> Iterator[tuple[str, Truth]]:
    """Give every wait, in the order of their ends; those last whose end is not in the history."""
    going: dict[str, Truth] = {}
    for seq, (event, transition) in enumerate(log, start=1):
        if isinstance(event, ev.Started):
            for request, truth in going.items():
                truth.outcome, truth.last = LOST, seq - 1
                yield request, truth
            going.clear()
        if isinstance(event, ev.Request) and not any(n.type == "Ignored" for n in transition.notes):
            going[event.request] = Truth(seq)
        for effect in transition.effects:
            if isinstance(effect, fx.Serve | fx.Reject) and effect.request in going:
                truth = going.pop(effect.request)
                truth.outcome = effect.code if isinstance(effect, fx.Reject) else SERVED
                truth.last = seq
                yield effect.request, truth
        if isinstance(event, ev.Cancel) and event.request in going:
            truth = going.pop(event.request)
            truth.outcome, truth.last = CANCELLED, seq
            yield event.request, truth
    yield from going.items()


def check(found: Explanation, truth: Truth, records: Sequence[Record], states: list[State]) -> None:
    """The intervals tile the wait, and give the reason that the state held all the time."""
    last = records[-1] if truth.last is None else records[truth.last - 1]
    assert (found.outcome, found.begin) == (truth.outcome, records[truth.first - 1].at)
    assert found.end == last.at
    cuts = [found.begin, *(one.end for one in found.intervals)]
    assert [one.begin for one in found.intervals] == cuts[:-1]
    assert cuts[-1] == found.end
    assert all(one.us > 0 for one in found.intervals)
    for number, one in enumerate(found.intervals, start=1):
        nothing = number == len(found.intervals) and found.outcome in {WAITING, LOST}
        assert (one.ended_by is None) == nothing
        if one.ended_by is not None:
            assert records[one.ended_by - 1].at == one.end
            assert one.event
    for seq in range(truth.first, last.seq):
        if records[seq - 1].at < records[seq].at:  # else it lasted no time
            kept = states[seq].reasons[found.request]
            (one,) = (i for i in found.intervals if i.begin <= records[seq - 1].at < i.end)
            assert (one.reason["type"], tuple(one.reason["who"])) == (kept.why, kept.who)
            assert tuple(one.reason.get("doing", ())) == kept.doing


def waiting(waits: Waits) -> set[str]:
    return {request for request in waits.requests() if not waits.is_over(request)}


@pytest.mark.timeout(300)
def test_the_intervals_add_up_to_every_wait() -> None:
    seen: Counter[str] = Counter()
    for report in campaign(SEEDS, Random):
        log = folded(report.setting.config, report.history, None)
        states = [Scheduler(report.setting.config).initial(), *(t.state for _, t in log)]
        records, waits = recorded(log), Waits()
        for record in records:
            waits.see(record)
            held = states[record.seq].requests.values()
            assert waiting(waits) == {r.request for r in held if r.phase is not Phase.SERVING}
        for request, truth in truths(log):
            found = waits.explained(request)
            assert found is not None
            check(found, truth, records, states)
            seen[truth.outcome] += 1
            seen["in parts"] += len(found.intervals) > 1
        seen.update(waits.explained(one).outcome for one in waits.requests())  # type: ignore[union-attr]
    assert {SERVED, CANCELLED, LOST, "queue_timeout", "load_failed", "overloaded"} <= seen.keys()
    assert {BROUGHT_IN, NOT_LOADED} <= seen.keys()
    assert seen["in parts"] > 100


def told_whole(report: Report) -> tuple[Log, list[State], list[Record], Waits]:
    """Give a run as a log, the state before and after each of its records, and what all of them
    tell of those who waited.
    """
    log = folded(report.setting.config, report.history, None)
    states = [Scheduler(report.setting.config).initial(), *(t.state for _, t in log)]
    records, whole = recorded(log), Waits()
    for record in records:
        whole.see(record)
    return log, states, records, whole


def test_one_request_is_told_from_any_segment_on_as_from_the_whole() -> None:
    compared = 0
    for report in campaign(range(6), Random):
        log, states, records, whole = told_whole(report)
        for request, truth in truths(log):
            start = (truth.first - 1) // 10 * 10  # where its segment begins
            alone = Waits(only=request)
            alone.begin(encode_state(states[start]))
            for record in records[start:]:
                alone.see(record)
            assert alone.explained(request) == whole.explained(request)
            compared += 1
    assert compared > 100


def test_what_came_before_the_first_segment_is_told_as_not_recorded() -> None:
    cut = 0
    for report in campaign(range(6), Random):
        log, states, records, whole = told_whole(report)
        for request, truth in truths(log):
            if truth.last is None or truth.outcome == LOST or truth.last < truth.first + 2:
                continue
            start = truth.last - 2
            late = Waits()
            late.begin(encode_state(states[start]))
            for record in records[start:]:
                late.see(record)
            found, full = late.explained(request), whole.explained(request)
            assert found is not None
            assert full is not None
            assert (found.begin, found.end, found.outcome) == (full.begin, full.end, full.outcome)
            assert sum(one.us for one in found.intervals) == found.waited_us
            if found.intervals:
                kinds = [one.reason["type"] for one in found.intervals]
                assert kinds.count(UNRECORDED) == (records[start].at > found.begin)
                assert kinds[1:].count(UNRECORDED) == 0
                cut += 1
    assert cut > 20


def test_a_bound_on_intervals_keeps_their_sum() -> None:
    merged = 0
    for report in campaign(range(6), Random):
        log = folded(report.setting.config, report.history, None)
        bounded, whole = Waits(most=2), Waits()
        for record in recorded(log):
            bounded.see(record)
            whole.see(record)
        for request in whole.requests():
            found, full = bounded.explained(request), whole.explained(request)
            assert found is not None
            assert full is not None
            assert len(found.intervals) <= 3  # one more is going on
            assert sum(one.us for one in found.intervals) == found.waited_us == full.waited_us
            parts = sum(one.reason.get("merged", 1) for one in found.intervals)
            assert parts == len(full.intervals)
            merged += parts > len(found.intervals)
    assert merged > 20
