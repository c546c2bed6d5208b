"""Policies on arrivals few enough that their waits can be worked out by hand."""

from collections.abc import Mapping, Sequence
from random import Random

import pytest
from attrs import evolve

from mgpu_core.config import SECOND_US
from mgpu_core.simulation.measures import Measures
from mgpu_core.simulation.policies import POLICIES, simulate
from mgpu_core.simulation.workload import SERVICES, Arrival, Workload, four_services, in_slots

LOAD_S, WORK_S = 10, 5
# What an unload and seeing its memory free may take; all else comes in tens of seconds.
ABOUT_S = 1.5


def workload(asked: Sequence[tuple[int, str]], slots: int, work_s: int = WORK_S) -> Workload:
    """Who is asked for at which second; everything loads and works equally long."""
    arrivals = [Arrival(at * SECOND_US, name, work_s * SECOND_US) for at, name in asked]
    loads_us = dict.fromkeys(sorted({name for _, name in asked}), LOAD_S * SECOND_US)
    return in_slots(arrivals, loads_us, slots)


def played(policy: str, work: Workload) -> Measures:
    return simulate(work, POLICIES[policy], Random(0))


def seconds(measures: Measures) -> Mapping[str, float]:
    return {
        "mean": measures.mean_wait_ms / 1000,
        "p95": measures.p95_wait_ms / 1000,
        "max": measures.max_wait_ms / 1000,
    }


@pytest.mark.parametrize(
    ("policy", "waits_s", "loads"),
    [
        # a from 10, b from 25 (loaded from 15), a from 40 (loaded from 30)
        ("fifo", (10, 24, 38), 3),
        ("serial-lru", (10, 24, 38), 3),
        # both a from 10, b from 30 (loaded from 20)
        ("llama-swap", (10, 13, 29), 2),
        ("default", (10, 13, 29), 2),
        ("default-gdsf", (10, 13, 29), 2),
        ("belady", (10, 13, 29), 2),
    ],
)
def test_who_asks_for_what_is_loaded_may_go_first(
    policy: str, waits_s: Sequence[int], loads: int
) -> None:
    measures = played(policy, workload([(0, "a"), (1, "b"), (2, "a")], slots=1))
    waited = seconds(measures)
    assert waited["mean"] == pytest.approx(sum(waits_s) / 3, abs=ABOUT_S)
    assert waited["max"] == waited["p95"] == pytest.approx(max(waits_s), abs=ABOUT_S)
    assert (measures.requests, measures.loads, measures.evictions) == (3, loads, loads - 1)


def test_only_one_lock_keeps_a_load_from_going_on_beside_work() -> None:
    work = workload([(0, "a"), (1, "b")], slots=2)
    waits_s = {policy: seconds(played(policy, work))["max"] for policy in POLICIES}
    assert waits_s.pop("serial-lru") == pytest.approx(24, abs=ABOUT_S)  # 10 and 5, then 10
    assert set(waits_s.values()) == {14}  # it is in from 11 on, and a works until 15


def test_a_bound_ends_what_overtaking_without_one_does_not() -> None:
    """While a is asked for faster than it works, nobody else has a turn, or only at the bound."""
    stream = [(11 + 4 * number, "a") for number in range(30)]
    work = workload([(0, "a"), (10, "b"), *stream], slots=1)
    assert seconds(played("llama-swap", work))["max"] == pytest.approx(31 * 5 + 10, abs=ABOUT_S)
    # The first a and eight more work until 55; b is loaded then, and works from 65 to 70. The other
    # 22 work from 80 on, each 5 s after the one before, though they came 4 s after each other.
    last = played("default", work)
    assert seconds(last)["max"] == pytest.approx((80 + 21 * 5) - (11 + 29 * 4), abs=ABOUT_S)
    assert last.loads == 3


def test_clairvoyance_keeps_what_is_needed_next() -> None:
    """In turns through three on two slots, who was used longest ago is who is needed next."""
    times = [100 * number for number in range(9)]
    work = workload(list(zip(times, "abcabcabc", strict=True)), slots=2)
    loads = {policy: played(policy, work).loads for policy in ("default", "belady")}
    # In turns, one of two is kept: every second request finds its own loaded.
    assert loads == {"default": 9, "belady": 6}


def test_gdsf_keeps_what_is_dear_to_load() -> None:
    """Loads of a take longest: lru sends it out for b and c all the same."""
    times = [200 * number for number in range(9)]
    work = workload(list(zip(times, "abcabcabc", strict=True)), slots=2)
    dear = evolve(work.traits["a"], load_us=100 * SECOND_US)
    work = evolve(work, traits={**work.traits, "a": dear})
    hours = {policy: played(policy, work).load_hours for policy in ("default", "default-gdsf")}
    assert hours["default-gdsf"] < hours["default"] / 2


def test_a_run_is_a_function_of_its_seed() -> None:
    first, again, other = (four_services(Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    short = evolve(first, script=first.script[:150])
    assert played("default", short) == played("default", short)
    assert {act.consumer for _, act in first.script} == SERVICES.keys()  # type: ignore[union-attr]


def test_time_at_work_and_hours_of_loading() -> None:
    measures = played("default", workload([(0, "a"), (25, "a")], slots=1))
    assert measures.utilisation == pytest.approx(10 / 30, abs=0.001)  # from 10 to 15, from 25 to 30
    assert measures.load_hours == pytest.approx(10 / 3600, abs=0.001)


def test_who_is_turned_away_has_waited_for_nothing() -> None:
    work = workload([(0, "a"), (1, "a"), (2, "a")], slots=1)
    narrow = {name: evolve(one, max_pending=1) for name, one in work.config.consumers.items()}
    work = evolve(work, config=evolve(work.config, consumers=narrow))
    measures = played("default", work)
    assert (measures.requests, measures.rejected, measures.loads) == (3, 2, 1)
    assert seconds(measures)["mean"] == 10


def test_nobody_asked() -> None:
    measures = played("default", in_slots([], {"a": SECOND_US}, 1))
    assert (measures.requests, measures.mean_wait_ms, measures.loads) == (0, 0, 0)
