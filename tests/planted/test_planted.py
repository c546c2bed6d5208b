"""The planted bugs still apply, and each is caught with three seeds.

Where each was noticed the last time (`caught.json`) is where the search begins, so that it takes a
second; `make planted` searches anew.
"""

from random import Random

import pytest

from mgpu_core.simulation import campaign
from tests.planted import switch
from tests.planted.planting import (
    DoesNotApplyError,
    caught,
    changed,
    core_sources,
    planted,
)
from tests.planted.plants import PLANTS, Edit, Plant
from tests.planted.run import noticed

SEEDS = (1, 2, 3)
# For a seed, should the core or the simulated host have changed since it was noticed.
RUNS = 60


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_plant_still_applies_and_is_python(plant: Plant) -> None:
    for path, text in changed(plant.edits, core_sources()).items():
        compile(text, path, "exec")


def test_names_are_there_once() -> None:
    names = [plant.name for plant in PLANTS]
    assert len(names) == len(set(names)) >= 30


@pytest.mark.parametrize("text", ["no such text", "self"])
def test_a_plant_that_does_not_apply_says_so(text: str) -> None:
    with pytest.raises(DoesNotApplyError, match="times"):
        changed((Edit("draft", text, "instead"),), core_sources())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_plant_is_caught_with_each_seed(plant: Plant) -> None:
    with planted(plant) as tree:
        found = caught(tree, SEEDS, runs=RUNS, first=noticed().get(plant.name))
    missed = [seed for seed, one in zip(SEEDS, found, strict=True) if one is None]
    assert not missed, f"not noticed with {missed}; `make planted` looks longer, and keeps where"


@pytest.mark.timeout(300)
def test_nothing_is_found_where_nothing_is_planted() -> None:
    """The runs in which the bugs show are clean without them."""
    runs = sorted({run for kept in noticed().values() for run in kept.values()})
    assert [r.violation for r in campaign(runs, Random) if r.violation is not None] == []


def test_one_mutant_at_a_time_takes_the_place_of_its_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def x_answer__mutmut_orig() -> int:
        return 42

    variants = {switch.ORIGINAL: x_answer__mutmut_orig, "x_answer__mutmut_1": lambda: 43}
    answer = switch.wrap_in_trampoline(variants)(x_answer__mutmut_orig)
    assert answer() == 42
    monkeypatch.setattr(switch, "active", {__name__: "x_answer__mutmut_1"})
    assert answer() == 43
    monkeypatch.setattr(switch, "active", {"another module": "x_answer__mutmut_1"})
    monkeypatch.setattr(switch, "called", set())
    assert answer() == 42
    assert switch.called == {f"{__name__}.x_answer"}
