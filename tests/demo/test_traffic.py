import itertools

import pytest

from mgpu_effects.settings import KINDS
from mgpu_http.demo.traffic import HABITS, arrivals

SEEDS = range(1, 21)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert arrivals(7, 30) == arrivals(7, 30)
    assert arrivals(7, 30) != arrivals(8, 30)


@pytest.mark.parametrize("seconds", [1, 4, 30])
def test_everybody_comes_in_time_and_in_order(seconds: float) -> None:
    for seed in SEEDS:
        coming = arrivals(seed, seconds)
        assert {one.name.split()[0] for one in coming} == {habit.name for habit in HABITS}
        assert all(0 <= one.at_s < seconds for one in coming)
        assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(coming))
        assert len({one.name for one in coming}) == len(coming)
        assert all(one.patience_s > 0 for one in coming)


def test_every_kind_of_work_is_asked_for() -> None:
    for seed in SEEDS:
        assert {one.kind for one in arrivals(seed, 10)} == set(KINDS)


def test_there_are_people_and_batches() -> None:
    coming = arrivals(1, 30)
    sizes = {
        habit.name: sum(one.name.startswith(f"{habit.name} 1.") for one in coming)
        for habit in HABITS
    }
    assert all(
        low * len(habit.steps) <= sizes[habit.name] <= high * len(habit.steps)
        for habit in HABITS
        for low, high in [habit.times]
    )
    assert max(sizes.values()) >= 6
    assert min(sizes.values()) == 1


def test_the_number_of_arrivals_is_bounded_by_the_time() -> None:
    assert all(20 < len(arrivals(seed, 30)) < 120 for seed in SEEDS)
