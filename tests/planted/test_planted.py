"""The planted bugs still apply, and a few that every machine can afford are caught."""

import pytest

from tests.planted import switch
from tests.planted.planting import (
    DoesNotApplyError,
    caught,
    changed,
    core_sources,
    planted,
)
from tests.planted.plants import PLANTS, Edit, Plant

# Found within a few thousand events.
QUICK = ("owed-to-the-highest-priority-only",)


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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", QUICK)
def test_quick_one_is_caught(name: str) -> None:
    (plant,) = [plant for plant in PLANTS if plant.name == name]
    with planted(plant) as tree:
        assert caught(tree, seed=1)


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
