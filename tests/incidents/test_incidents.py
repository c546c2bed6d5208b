"""The three incidents of docs/debugging.md: their logs, what is printed of them, their tests."""

import json
import re
from typing import Any

import pytest

from mgpu_core.replay import Record, first_difference
from mgpu_effects.config_file import load_settings
from mgpu_effects.core_config import core_config
from mgpu_effects.event_log import Segment, read
from mgpu_http.cli import main
from tests.incidents.page import (
    EXAMPLES,
    HEADINGS,
    PAGE,
    PYTHON,
    Console,
    consoles,
    log_of,
    marks,
    printed_today,
    renumbered,
    section,
)
from tests.incidents.record import INCIDENTS

MOST_BYTES = 20_000
incident = pytest.mark.parametrize("name", HEADINGS)


@incident
def test_the_log_replays_exactly(name: str) -> None:
    segment, *items = read(log_of(name))
    assert isinstance(segment, Segment)
    records = [item for item in items if isinstance(item, Record)]
    assert len(records) == len(items) > 50
    assert first_difference(segment.state, records) is None
    assert log_of(name).stat().st_size < MOST_BYTES


@incident
def test_the_page_shows_what_is_printed_today(name: str) -> None:
    shown = consoles(name, PAGE.read_text())
    assert len(shown) >= 4
    for console, told in zip(shown, printed_today(shown), strict=True):
        assert console.printed == told, f"`python -m tests.incidents.page` renews {console.command}"


@incident
def test_the_tests_of_the_page_pass_and_fail_without_the_fix(name: str) -> None:
    (code,) = PYTHON.findall(section(name, PAGE.read_text()))
    run(code)
    without = re.sub(r'overtake_bound=2|eviction="gdsf"|, driver="systemd"', "", code)
    assert without != code
    with pytest.raises(AssertionError):
        run(without.replace("        ,\n", "").replace("        ,  #", "        #"))


def run(code: str) -> None:
    space: dict[str, Any] = {}
    exec(compile(code, "debugging.md", "exec"), space)
    (test,) = [found for key, found in space.items() if key.startswith("test_")]
    test()


@incident
def test_the_configuration_is_that_of_the_log_and_the_fix_is_another(name: str) -> None:
    segment = next(iter(read(log_of(name))))
    assert isinstance(segment, Segment)
    was, fixed = (
        core_config(load_settings(EXAMPLES / name / f"{which}.yaml")) for which in ("was", "fixed")
    )
    assert segment.state.config.consumers == was.consumers
    assert fixed != was


def test_the_fixes_help_and_what_was_tried_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    def longest_ms(name: str, which: str) -> tuple[float, float]:
        config = EXAMPLES / name / f"{which}.yaml"
        assert main(["whatif", str(log_of(name)), "--config", str(config), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        return told["same"]["max_wait_ms"], told["new"]["max_wait_ms"]

    for name, which, share in (("slow", "fixed", 0.5), ("leaky", "fixed", 0.5)):
        same, new = longest_ms(name, which)
        assert new < share * same
    same, new = longest_ms("slow", "tried")
    assert new == pytest.approx(same, rel=0.01)


def test_a_page_is_renumbered_in_its_commands_alone() -> None:
    text = f"{HEADINGS['slow']}\n$ mgpu log why LOG/7 ab-7 --at 35\n7 ab-7\nEvent 35: 35 MiB\n"
    again = renumbered("slow", text, {"ab-7": "cd-9", "35": "41"})
    assert again == text.replace("7 ab-7 --at 35", "7 cd-9 --at 41").replace("nt 35", "nt 41")
    assert Console("", "1\n2\n...\n5\n").cut("a\nb\nc\nd\ne\n") == "a\nb\n...\ne\n"


def test_each_has_what_commands_name_in_it() -> None:
    assert set(INCIDENTS) == set(HEADINGS)
    text = PAGE.read_text()
    for name in HEADINGS:
        _, turn, _ = marks(name)
        assert f"--at {turn}" in section(name, text) or f"ent {turn}:" in section(name, text)
