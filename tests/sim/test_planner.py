"""Planners of one's own in the simulated world: what is looked at, and what the core withstands."""

import re
from pathlib import Path
from random import Random
from unittest import mock
from zlib import crc32

import pytest
from attrs import evolve

from docs.examples.planners import LargestFirst, OnlyIdle
from mgpu_core import effects as fx
from mgpu_core.planners import Gdsf, Holder, Lru, View
from mgpu_core.simulation import campaign, first_violation, play, smallest
from mgpu_core.simulation.planning import Watched
from mgpu_core.simulation.run import NEEDLESS
from mgpu_core.state import Residency
from tests.core.driver import Core, Table, lazy, service
from tests.core.transcript import rewritten

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-planner.md"


def holder(name: str, mib: int = 9_000, **fields: object) -> Holder:
    plain: dict[str, object] = {
        "residency": Residency.RESIDENT,
        "gain_mib": {0: mib},
        "need_mib": {0: mib},
        "measured_mib": None,
        "last_used": None,
        "uses": 0,
        "credit": 0,
        "load_us": None,
        "serving": 0,
        "busy": False,
        "owed": False,
        "pinned": False,
        "stops_with": (),
        "evictable": True,
        "idle": True,
    }
    return Holder(name=name, **(plain | fields))  # type: ignore[arg-type]


def view(*holders: Holder, need: int = 10_000, free: int = 2_000, **fields: object) -> View:
    plain: dict[str, object] = {"resident": False, "protected": (), "max_evictions": 5}
    return View(
        running=tuple(one.name for one in holders),
        holders={one.name: one for one in holders},
        need_mib={0: need},
        free_mib={0: free},
        **(plain | fields),  # type: ignore[arg-type]
    )


def test_what_is_missing_on_two_cards_may_be_asked_with_an_iterator() -> None:
    a = holder("a", gain_mib={0: 9_000, 1: 9_000})
    seen = evolve(view(a), need_mib={0: 10_000, 1: 10_000}, free_mib={0: 2_000, 1: 2_000})
    assert seen.missing_mib() == {0: 8_000, 1: 8_000}
    assert seen.missing_mib(one for one in [a]) == {}


def complaints(answer: object, seen: View) -> list[str]:
    watched = Watched(lambda: None)  # type: ignore[arg-type]
    watched.planner = mock.Mock(victims=mock.Mock(return_value=answer))
    watched.victims("t", seen)
    return [found.text for found in watched.found({"a", "b", "c", "t"})]


BUSY = holder("a", serving=1, idle=False)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (("a",), view(holder("a"))),
        (("a",), view(BUSY)),
        ((), view(need=1_000)),
        (("c",), view(need=1_000)),  # absent, so nothing happens
        (None, view(holder("a", mib=1_000))),
        (None, view(holder("a"), holder("b"), need=18_000, max_evictions=1)),
        (("b",), view(holder("a"), resident=True)),
        (("a",), view(holder("a", mib=5_000, stops_with=("b",)), holder("b", mib=5_000))),
    ],
)
def test_an_answer_that_keeps_to_the_protocol_is_right(answer: object, seen: View) -> None:
    assert complaints(answer, seen) == []


@pytest.mark.parametrize(
    ("answer", "seen", "told"),
    [
        (["a"], view(holder("a")), r"answers \['a'\]: no tuple of names"),
        ({"a"}, view(holder("a")), "no tuple of names"),
        ("a", view(holder("a")), "no tuple of names"),
        ((1,), view(holder("a")), "no tuple of names"),
        (("a", "t"), view(holder("a")), "names t itself"),
        (("a", "x"), view(holder("a")), "names x, which is no consumer"),
        (("a",), view(holder("a", pinned=True, evictable=False)), "names a, which is pinned"),
        (("a",), view(holder("a", evictable=False)), "a, which may not be unloaded"),
        (("a",), view(holder("a"), protected=("a",)), r"a, which takes \['a'\] with it"),
        (("a",), view(holder("a", stops_with=("b",)), protected=("b",)), r"takes \['b'\] with it"),
        (("a",), view(holder("a", mib=7_000)), "1000 MiB on GPU 0 are still missing"),
        ((), view(holder("a")), "8000 MiB on GPU 0 are still missing"),
        (("a", "b"), view(holder("a"), holder("b"), max_evictions=1), "names 2, where 1 may go"),
        (None, view(holder("a")), r"None, though it would fit with \['a'\] gone"),
        (None, view(BUSY), r"None, though it would fit with \['a'\] gone"),
        (None, view(need=1_000), "None, though nobody has to go"),
        (None, view(holder("a"), resident=True), "None, though nobody has to go"),
    ],
)
def test_an_answer_that_does_not_is_told(answer: object, seen: View, told: str) -> None:
    assert any(re.search(told, text) for text in complaints(answer, seen))


class Forgetful:
    """It answers for the numbers of its calls."""

    calls = 0

    def victims(self, target: str, seen: View) -> tuple[str, ...] | None:
        self.calls += 1
        return ("a",) if self.calls % 2 else ("b",)


class Careless:
    def victims(self, target: str, seen: View) -> tuple[str, ...] | None:
        seen.holders.clear()  # type: ignore[attr-defined]
        return ()


class Broken:
    def victims(self, target: str, seen: View) -> tuple[str, ...] | None:
        return (seen.holders["nobody"].name,)


@pytest.mark.parametrize(
    ("planner", "told"),
    [
        (Forgetful(), r"answers \('a',\), and asked again \('b',\)"),
        (Careless(), "changes the view"),
        (Broken(), r"raises KeyError: 'nobody' \(.*test_planner.py, line \d+, in victims\)"),
    ],
)
def test_a_planner_that_is_not_pure_or_raises_is_told(planner: object, told: str) -> None:
    watched = Watched(planner)  # type: ignore[arg-type]
    watched.victims("t", view(holder("a"), holder("b")))
    (found,) = watched.found({"a", "b"})
    assert re.search(told, found.text)
    assert watched.found({"a", "b"}) == []


# ------------------------------------------------------------------------------ in the world


@pytest.mark.parametrize("planner", [Lru(), Gdsf(), LargestFirst()], ids=lambda p: type(p).__name__)
@pytest.mark.timeout(120)
def test_a_good_planner_breaks_nothing(planner: Lru) -> None:
    for report in campaign(range(12), Random, planner=planner, acts=12):
        assert report.violation is None, f"seed {report.seed}: {report.violation}"
        assert not report.reached[NEEDLESS]


def test_one_run_is_played_with_a_planner() -> None:
    with_lru, built_in = (play(Random(3), planner=planner) for planner in (Lru(), None))
    assert with_lru.violation is None
    assert with_lru.history == built_in.history


class Wild:
    """Names anybody, for no reason, but the same for the same: what the core has to withstand."""

    def __init__(self, salt: int) -> None:
        self.salt = salt

    def victims(self, target: str, seen: View) -> tuple[str, ...] | None:
        def drawn(*of: object) -> int:
            return crc32(repr((self.salt, target, seen.running, *of)).encode())

        if drawn() % 7 == 0:
            return None
        share = (10, 30, 60, 100)[self.salt % 4]
        return tuple(name for name in (*seen.holders, target) if drawn(name) % 100 < share)


@pytest.mark.timeout(120)
def test_the_core_keeps_its_other_properties_whatever_a_planner_says() -> None:
    """P1 and P7 excepted: who names too few, or those who may not go, makes others wait or fail."""
    with mock.patch.object(Watched, "found", return_value=[]):
        for seed in range(12):
            (report,) = campaign([seed], Random, planner=Wild(seed), acts=15)
            found = report.violation
            assert found is None or found.property in {"P1", "P7"}, f"seed {seed}: {found}"


def test_who_may_stay_beside_the_target_is_not_unloaded_for_it() -> None:
    core = Core(
        service("a", 9_000),
        service("b", 9_000, can_coexist_with=("a",)),
        planner=Table({"b": ["a"]}),
        absent=["b"],
    )
    assert core.request("r1", "b") == []
    assert not [effect for effect in core.effects if isinstance(effect, fx.StartUnload)]


def test_that_nothing_would_do_for_one_that_is_in_is_not_believed() -> None:
    core = Core(lazy("a", 9_000), planner=mock.Mock(victims=mock.Mock(return_value=None)))
    core.probe("a", resident=True)
    assert core.request("r1", "a") == ["serve r1"]


# ---------------------------------------------------------------------------------- the page


def test_the_bad_example_of_the_page_is_found_soon_and_made_small() -> None:
    report = first_violation(range(20), Random, planner=OnlyIdle())
    assert report is not None
    small = smallest(report, Random, OnlyIdle())
    assert small.violation is not None
    assert "answers None, though it would fit" in small.violation.text
    assert len(small.history) < 10
    assert len(small.setting.config.consumers) < 5


def test_the_transcript_of_the_page_is_what_happens() -> None:
    page = PAGE.read_text()
    (block,) = re.findall(r"<!-- found -->\n```text\n(.*?)```", page, re.DOTALL)
    again = rewritten(block, PAGE.name, OnlyIdle())
    assert [line for line in again.splitlines() if line] == [x for x in block.splitlines() if x]


def test_the_code_of_the_page_is_that_of_the_examples() -> None:
    code = (PAGE.parent / "examples" / "planners.py").read_text()
    body = [line for line in code.splitlines() if line.strip() and '"""' not in line]
    page = PAGE.read_text()
    for block in re.findall(r"```python\n(class (?:Largest|Only).*?)```", page, re.DOTALL):
        lines = [line for line in block.splitlines()[1:] if line.strip()]
        assert any(body[at : at + len(lines)] == lines for at in range(len(body)))


def test_naming_more_than_is_needed_is_told_as_advice() -> None:
    class Everybody:
        def victims(self, target: str, seen: View) -> tuple[str, ...] | None:
            if Lru().victims(target, seen) is None:
                return None
            named = tuple(one.name for one in seen.candidates(target))[: seen.max_evictions]
            going = [seen.holders[name] for name in named]
            enough = not seen.resident and seen.missing_mib() and not seen.missing_mib(going)
            return named if enough else Lru().victims(target, seen)

    reports = campaign(range(6), Random, planner=Everybody())
    assert any(report.reached[NEEDLESS] for report in reports)
