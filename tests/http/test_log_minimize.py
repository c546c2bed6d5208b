"""`mgpu log minimize`: what fails in a log of thousands of events is shown in a few."""

import itertools
import json
import os
import random
import re
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation.faults import Faults
from mgpu_core.simulation.making import draw_script
from mgpu_core.simulation.minimizing import CHECKS
from mgpu_core.simulation.oracles import ORACLES
from mgpu_core.simulation.world import World
from mgpu_core.state import Phase
from mgpu_effects.event_log import encode_line, read
from mgpu_http.cli import main
from mgpu_http.commands import log_minimize
from tests.golden.golden import DIVERGES
from tests.planted.planting import planted
from tests.planted.plants import PLANTS
from tests.support.logs import History, host, write_log

ROOT = Path(__file__).parents[2]
LIMIT_S = 150
DOZEN = 12
LONG = 3_000
PLANNERS = """
from attrs import evolve
from mgpu_core.planners import Lru

class Careless:
    '''As the built-in one, but it does not care who is pinned.'''

    def victims(self, target, view):
        holders = {
            name: evolve(one, evictable=True) if one.pinned else one
            for name, one in view.holders.items()
        }
        return Lru().victims(target, evolve(view, holders=holders))
"""
pytestmark = pytest.mark.timeout(LIMIT_S)


@cache
def long_history() -> History:
    """Four services take turns for a long time; near the end an operator pins two of them."""
    chance, config, faults = random.Random(10), host(), Faults(load_fails=50)
    script = draw_script(chance, config, faults, acts=700)
    late_us = script[-60][0]
    pins = tuple((late_us, ev.Pin(at=0, consumer=name)) for name in ("ollama", "mvoice"))
    script = tuple(sorted((*script, *pins), key=lambda act: act[0]))
    world = World(config, chance=chance, script=script, faults=faults, scheduler=Scheduler(config))
    steps = tuple(world.run(world.now + script[-1][0] + 5 * SECOND_US))
    assert len(steps) >= LONG
    return History(config, steps)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLANNERS)
    return tmp_path


def run(place: Path, *arguments: object, core: Path | None = None, code: int = 0) -> Any:
    """In a directory with planners of one's own; `core`: with that instead of today's code."""
    path = os.pathsep.join(map(str, filter(None, (core, ROOT))))
    told = subprocess.run(
        [sys.executable, "-m", "mgpu_http.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        timeout=LIMIT_S,
        check=False,
    )
    assert told.returncode == code, told.stderr
    assert "Traceback" not in told.stderr
    return told


def minimized(place: Path, log: Path, *options: object, **more: Any) -> Any:
    """Minimize it into `small.jsonl`; the answer, of which the log is the same."""
    told = run(place, "log", "minimize", log, "--json", "-o", "small.jsonl", *options, **more)
    answer = json.loads(told.stdout)
    assert answer["log"] == "small.jsonl"
    records = [item for item in read(place / "small.jsonl") if hasattr(item, "effects")]
    assert [{"at": r.at, "event": r.event} for r in records] == answer["events"]
    return answer


def tampered(place: Path, seq: int, kind: str) -> Path:
    """The long log, but in one event the first effect of a kind was not decided then."""
    (path,) = write_log(place / "log", long_history())
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[seq])
    gone = next(one for one in record["effects"] if one["type"] == kind)
    record["effects"].remove(gone)
    record.pop("crc")
    lines[seq] = encode_line(**record)
    path.write_bytes(b"".join(lines))
    return path


def late_event(kind: str) -> int:
    """Find the first event after nine tenths of the long log that brings about such an effect."""
    steps = long_history().steps
    return next(
        seq
        for seq, (_, transition) in enumerate(steps, start=1)
        if seq > 0.9 * len(steps)
        and any(type(effect).__name__ == kind for effect in transition.effects)
    )


@pytest.mark.parametrize("kind", ["StartUnload", "StartLoad", "Serve"])
def test_what_was_decided_otherwise_is_left_in_a_dozen_events(place: Path, kind: str) -> None:
    seq = late_event(kind)
    log = tampered(place, seq, kind)
    answer = minimized(place, log, "--until", "diverges")
    assert (answer["check"], answer["seq"]) == ("diverges", seq)
    assert len(answer["events"]) <= DOZEN
    # The memory of one that is owed to others: no few events bring that about.
    assert answer["from_a_state"] is (kind == "StartUnload")
    assert answer["again"] == "mgpu replay small.jsonl"
    found = json.loads(run(place, "replay", "small.jsonl", "--json", code=1).stdout)["difference"]
    assert found["seq"] == len(answer["events"])
    assert found["event"]["type"] == json.loads(log.read_text().splitlines()[seq])["event"]["type"]
    missing = [one for one in found["got"] if one not in found["expected"]]
    assert [one["type"] for one in missing] == [kind]
    shown = run(place, "log", "show", "small.jsonl", "--json").stdout.splitlines()
    assert len(shown) == len(answer["events"])


def test_what_a_planner_broke_is_left_in_a_dozen_events(place: Path) -> None:
    write_log(place / "log", long_history(), per_segment=700)
    options = ("--until", "planner", "--planner", "mine:Careless")
    answer = minimized(place, place / "log", *options)
    assert answer["seq"] > 0.9 * LONG
    assert len(answer["events"]) <= DOZEN
    assert "which is pinned" in answer["text"]
    again = run(place, *answer["again"].split()[1:], "--json")
    assert json.loads(again.stdout)["text"] == answer["text"]
    assert json.loads(again.stdout)["log"] is None


def test_what_another_planner_decides_otherwise_is_left_with_what_the_own_one_decided(
    place: Path,
) -> None:
    """So what was decided then is true of the small history too, and a test of it passes."""
    write_log(place / "log", long_history())
    other = ("--planner", "mgpu_core.planners:Gdsf")
    answer = minimized(place, place / "log", "--until", "diverges", *other)
    assert len(answer["events"]) <= 2 * DOZEN
    assert json.loads(run(place, "replay", "small.jsonl", "--json").stdout)["difference"] is None
    found = json.loads(run(place, "replay", "small.jsonl", "--json", *other, code=1).stdout)
    differs = found["difference"]
    assert differs["seq"] == len(answer["events"])
    then, now = (
        [one["consumer"] for one in differs[side] if one["type"] == "StartUnload"]
        for side in ("expected", "got")
    )
    assert then != now


@pytest.mark.parametrize("check", ["diverges", "P10"])
def test_what_a_change_of_the_core_broke_is_left_in_a_dozen_events(place: Path, check: str) -> None:
    """A job that timed out, the first one after thousands of events, is not taken for ended."""
    (plant,) = [one for one in PLANTS if one.name == "a-timed-out-job-never-ends"]
    told = timed_out_at_last()
    write_log(place / "log", told)
    run(place, "log", "minimize", "log", "--until", check, code=1)
    with planted(plant) as core:
        answer = minimized(place, place / "log", "--until", check, core=core)
        assert answer["seq"] == len(told.steps)
        assert len(answer["events"]) <= DOZEN
        assert answer["events"][-1]["event"]["outcome"] == "timeout"
        run(place, *answer["again"].split()[1:], core=core, code=int(check == "diverges"))
    run(place, "log", "minimize", "small.jsonl", "--until", "P10", "-o", "none.jsonl", code=1)


def timed_out_at_last() -> History:
    steps = list(long_history().steps)
    while not (serving := _serving(steps[-1][1].state)):
        steps.pop()
    state = steps[-1][1].state
    event = ev.ServeDone(at=state.at + SECOND_US, request=serving[0], outcome="timeout")
    steps.append((event, Scheduler(state.config).step(state, event)))
    assert len(steps) >= 0.9 * LONG
    return History(long_history().config, tuple(steps))


def _serving(state: Any) -> list[str]:
    return [n for n, one in state.requests.items() if one.phase is Phase.SERVING]


def test_it_is_shown_as_a_transcript_with_the_command_for_it(place: Path) -> None:
    told = run(place, "log", "minimize", DIVERGES, "-o", "small.jsonl")
    assert told.stdout.startswith(("gpu ", "service ", "lazy ", "consumer "))
    assert "\nthen:    " in told.stdout
    assert "\nfails:   diverges, today's code decides what was decided then\n" in told.stdout
    assert told.stdout.endswith("again:   mgpu replay small.jsonl\n")
    assert "looking for a smaller history" in told.stderr
    assert stat.S_IMODE((place / "small.jsonl").stat().st_mode) == 0o600


def test_the_log_goes_beside_and_is_never_written_over(place: Path) -> None:
    (place / "one.jsonl").write_bytes(DIVERGES.read_bytes())
    told = run(place, "log", "minimize", "one.jsonl")
    assert f"saved:   {place / 'one-minimized.jsonl'}\n" in told.stdout
    kept = (place / "one-minimized.jsonl").read_bytes()
    refused = run(place, "log", "minimize", "one.jsonl", code=2)
    assert "is there already: give another with -o" in refused.stderr
    assert (place / "one-minimized.jsonl").read_bytes() == kept


def test_without_time_it_shows_what_fails_first(place: Path) -> None:
    told = run(place, "log", "minimize", DIVERGES, "--seconds", 0, "--json")
    answer = json.loads(told.stdout)
    assert answer["check"] == "diverges"
    assert len(answer["events"]) == answer["seq"]
    assert answer["log"] is None
    assert not list(place.glob("*.jsonl"))


def test_a_log_that_begins_in_mid_work_is_judged_from_when_that_is_over(place: Path) -> None:
    told = long_history()
    middle = next(n for n, state in enumerate(told.states) if n > 500 and state.swaps)
    later = write_log(place / "log", told, per_segment=middle)[1]
    nothing = run(place, "log", "minimize", later, code=1)
    assert "events fails any check" in nothing.stdout


@pytest.mark.parametrize("after", [0, 30])
def test_when_interrupted_it_keeps_the_smallest_so_far(
    place: Path, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where there is none yet: then that is the end of the log itself."""
    tries, more = itertools.count(), log_minimize.Hunt._more

    def interrupted(hunt: Any, events: int | None) -> bool:
        if next(tries) == after:
            raise KeyboardInterrupt
        return more(hunt, events)

    monkeypatch.setattr(log_minimize.Hunt, "_more", interrupted)
    monkeypatch.chdir(place)
    assert main(["log", "minimize", str(DIVERGES), "-o", "small.jsonl"]) == 0
    said = capsys.readouterr()
    assert "enough: this is the smallest so far" in said.err
    assert "fails:   diverges" in said.out
    run(place, "replay", "small.jsonl", code=1)
    events = re.search(r"events:  (\d+), of (\d+) in", said.out)
    assert events is not None
    assert (events[1] == events[2]) is (after == 0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("nowhere",), "there is no nowhere"),
        ((DIVERGES, "--until", "P99"), "--until P99: it is one of diverges, invariant, planner"),
        ((DIVERGES, "--until", "planner"), "--until planner: it takes --planner MODULE:NAME"),
        ((DIVERGES, "--seconds", "-1"), "--seconds is a number from 0 on"),
        ((DIVERGES, "--planner", "mine"), "--planner mine: it is lru, gdsf, or given as"),
        ((DIVERGES, "-o", "nowhere/small.jsonl"), "nowhere/small.jsonl"),
    ],
)
def test_what_cannot_be_used_is_a_clear_error(place: Path, options: Any, text: str) -> None:
    told = run(place, "log", "minimize", *options, code=1 if "-o" in options else 2)
    assert text in told.stderr
    assert told.stdout == ""


def test_every_oracle_can_be_asked_for() -> None:
    assert {*ORACLES, "diverges", "invariant", "planner"} == set(CHECKS)
