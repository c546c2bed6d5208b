"""`mgpu fuzz` as a user runs it, on planners and configurations of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mgpu_core.codec import decode_config, decode_event, decode_state, encode_config
from mgpu_core.scheduler import Scheduler
from mgpu_core.simulation import PROPERTIES, unfair_because
from mgpu_effects.config_file import load_settings
from mgpu_effects.core_config import core_config

ROOT = Path(__file__).parents[2]
FOUR_SERVICES = ROOT / "config" / "consumers.yaml"
LIMIT_S = 100
PLANNERS = """
import itertools
calls = itertools.count()

def says_none(target, view):
    return None

def raises(target, view):
    return view.holders["nobody"]

def counts(target, view):
    return () if next(calls) % 2 else None

def loops(target, view):
    while view is not None:
        pass
"""
UNFAIR = """
gpu: {total_mib: 10000}
consumers:
  fixed: {url: "http://127.0.0.1:1", vram_resident_mib: 6000}
  other:
    url: "http://127.0.0.1:2"
    vram_resident_mib: 6000
    load: {path: /load}
    unload: {path: /unload}
"""
pytestmark = pytest.mark.timeout(LIMIT_S)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLANNERS)
    return tmp_path


def run(place: Path, *arguments: str, given: str = "") -> Any:
    """In a directory with planners of one's own; what is found goes into `kept` there."""
    return subprocess.run(
        [sys.executable, "-m", "mgpu_http.cli", *arguments],
        input=given,
        capture_output=True,
        text=True,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LIMIT_S,
        check=False,
    )


def fuzz(place: Path, *options: str) -> Any:
    return run(place, "fuzz", "--save", "kept", *options)


def test_where_nothing_is_broken_it_says_so(place: Path) -> None:
    told = fuzz(place, "--seed", "3")
    assert told.returncode == 0, told.stderr
    assert re.fullmatch(r"no property broken in 1 runs, \d+ events\n", told.stdout)
    assert not (place / "kept").exists()


def test_it_looks_for_as_long_as_it_is_told(place: Path) -> None:
    told = fuzz(place, "--seconds", "0.5", "--json")
    answer = json.loads(told.stdout)
    assert told.returncode == 0
    assert answer["found"] is None
    assert answer["runs"] >= 1
    assert answer["not_reached"]


@pytest.mark.parametrize(
    ("planner", "text"),
    [
        ("says_none", "answers None, though"),
        ("raises", r"raises KeyError: 'nobody' \(.*mine.py, line 9, in raises\)"),
        ("counts", "answers .*, and asked again"),
        ("loops", r"raises TimeoutError: no answer, however long it computes \(at line 1[56]"),
    ],
)
def test_what_a_planner_breaks_is_shown_small_and_kept(
    planner: str, text: str, place: Path
) -> None:
    told = fuzz(place, "--planner", f"mine:{planner}", "--seed", "2")
    assert told.returncode == 1, told.stderr
    assert told.stdout.startswith(("gpu", "service", "consumer", "lazy"))
    assert f"broken:  planner, {PROPERTIES['planner']}" in told.stdout
    assert re.search(f"here:    .*{text}", told.stdout)
    assert "again:   mgpu fuzz --planner mine:" + planner + " --seed 2\n" in told.stdout
    events = re.search(r"events:  (\d+), of", told.stdout)
    assert events is not None
    assert int(events[1]) < 10
    assert "looking for a smaller history" in told.stderr


def test_what_is_found_is_found_again(place: Path) -> None:
    first, second = (
        fuzz(place, "--planner", "mine:says_none", "--seed", "2", "--json") for _ in range(2)
    )
    assert first.returncode == 1
    assert json.loads(first.stdout)["found"] == json.loads(second.stdout)["found"]
    assert len(list((place / "kept").rglob("events-*.jsonl"))) == 1


def test_what_is_kept_is_an_event_log_that_gives_the_same_again(place: Path) -> None:
    told = fuzz(place, "--planner", "mine:says_none", "--seed", "2", "--json")
    found = json.loads(told.stdout)["found"]
    (file,) = (place / found["log"]).glob("events-*.jsonl")
    head, *lines = file.read_text().splitlines(keepends=True)
    header = json.loads(head)
    assert [json.loads(line)["event"] for line in lines] == [e["event"] for e in found["events"]]
    assert decode_state(header["state"]) == Scheduler(decode_config(header["config"])).initial()
    assert all(decode_event(e["event"], e["at"]) for e in found["events"])

    (place / "core.json").write_text(json.dumps(header["config"]))
    applied = run(
        place, "log", "apply", "core.json", "--planner", "mine:says_none", given="".join(lines)
    )
    assert applied.stdout == "".join(lines)


def test_a_configuration_of_ones_own_is_played(place: Path) -> None:
    told = fuzz(place, "--config", str(FOUR_SERVICES), "--seed", "4", "--json")
    assert told.returncode == 0
    assert told.stderr == ""
    assert json.loads(told.stdout)["events"] > 50


def test_its_consumers_are_in_what_is_found(place: Path) -> None:
    options = ("--config", str(FOUR_SERVICES), "--planner", "mine:says_none", "--seed", "4")
    told = fuzz(place, *options, "--json")
    found = json.loads(told.stdout)["found"]
    names = {line.split()[1] for line in found["config"] if not line.startswith(("gpu", "set"))}
    assert names <= set(load_settings(FOUR_SERVICES).consumers)
    assert found["again"] == f"mgpu fuzz --planner mine:says_none --config {FOUR_SERVICES} --seed 4"


def test_it_says_where_a_configuration_may_keep_somebody_waiting(place: Path) -> None:
    (place / "unfair.yaml").write_text(UNFAIR)
    told = fuzz(place, "--config", "unfair.yaml", "--seed", "4")
    assert told.returncode == 0, told.stdout
    assert "other does not fit beside what can't be unloaded for it (fixed)" in told.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_wait_ends_by_itself_in_the_configurations_that_come_along(file: Path) -> None:
    config = core_config(load_settings(file))
    assert encode_config(config)["consumers"]
    assert unfair_because(config) == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--planner", "mine"), "--planner mine: it is lru, gdsf, or given as MODULE:NAME"),
        (("--planner", "mine:absent"), "--planner mine:absent: AttributeError"),
        (("--planner", "nowhere:x"), "--planner nowhere:x: ModuleNotFoundError"),
        (("--planner", "bad:x"), "--planner bad:x: SyntaxError"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--config", "bad.yaml"), "bad.yaml"),
        (("--seconds", "0"), "--seconds is a number above 0"),
        (("--seed", "x"), "--seed"),
    ],
)
def test_what_cannot_be_used_is_a_clear_error(
    options: tuple[str, ...], text: str, place: Path
) -> None:
    (place / "bad.py").write_text("def x(:")
    (place / "bad.yaml").write_text("consumers: 5\n")
    told = fuzz(place, *options)
    assert (told.returncode, told.stdout) == (2, "")
    assert text in told.stderr
    assert "Traceback" not in told.stderr


def test_what_cannot_be_kept_is_a_clear_error(place: Path) -> None:
    (place / "kept").write_text("a file")
    told = fuzz(place, "--planner", "mine:says_none", "--seed", "2")
    assert told.returncode == 1
    assert "the log is not saved" in told.stderr
    assert "Traceback" not in told.stderr
