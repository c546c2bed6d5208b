"""P1 to P15 in the simulated world: whatever is configured, whoever comes, whatever goes wrong.

`docs/proving.md` tells what is checked. More seeds: `make fuzz`.
"""

from collections import Counter
from random import Random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mgpu_core.simulation import ORACLES, campaign, play, swarm
from mgpu_core.simulation.chance import Chance
from mgpu_core.simulation.reach import LABELS
from mgpu_core.simulation.run import Report

PROFILE = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
CHANCE = st.randoms(use_true_random=False)
# Enough that every label of `reach` is reached, with seeds to spare.
SEEDS = range(120)


def told(report: Report) -> str:
    """What a failure prints: the configuration and all that happened."""
    lines = [str(report.violation), str(report.setting.config), str(report.setting.faults)]
    return "\n".join([*lines, *map(str, report.history)])


@pytest.mark.timeout(300)
@PROFILE
@given(CHANCE)
def test_every_property_holds_and_every_wait_ends_by_itself(chance: Chance) -> None:
    report = play(chance, fair=True, acts=12)
    for label in report.reached:
        event(label)
    assert report.violation is None, told(report)


@pytest.mark.timeout(300)
@PROFILE
@given(CHANCE)
def test_every_property_holds_where_some_stay_in_the_way_for_ever(chance: Chance) -> None:
    report = play(chance, fair=False, acts=12)
    for label in report.reached:
        event(label)
    assert report.violation is None, told(report)


@pytest.mark.timeout(300)
def test_whatever_should_happen_happens_and_no_property_is_broken() -> None:
    reached: Counter[str] = Counter()
    for report in campaign(SEEDS, Random):
        reached.update(report.reached)
        assert report.violation is None, f"seed {report.seed}: {told(report)}"

    assert [label for label in LABELS if not reached[label]] == []


def test_there_is_an_oracle_for_every_property_of_single_steps() -> None:
    of_whole_runs = {"P11", "P13"}
    assert {*ORACLES, *of_whole_runs} == {f"P{number}" for number in range(1, 16)}


def test_a_run_is_a_function_of_its_chance() -> None:
    first, second = (play(Random(7), faults=swarm(Random(3))) for _ in range(2))
    assert first.history == second.history
