"""Logs of earlier days replay exactly; `--rewrite-golden` writes their decisions anew."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu_core.replay import Record, Replay, first_difference
from mgpu_effects.event_log import Segment, read
from tests.golden.golden import DIVERGES, FOLDER, LOGS, rewritten

HASH_SEEDS = range(10)


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_what_was_decided_is_decided_again(path: Path, request: pytest.FixtureRequest) -> None:
    now = b"".join(rewritten(path))
    if request.config.getoption("--rewrite-golden"):
        path.write_bytes(now)
    segment, *records = read(path)
    assert isinstance(segment, Segment)
    difference = first_difference(segment.state, records)  # type: ignore[arg-type]
    if difference is not None:
        pytest.fail(
            f"event {difference.record.seq}, {difference.record.event}\n"
            f"then: {difference.expected}\nnow:  {difference.got}"
        )
    assert path.read_bytes().splitlines() == now.splitlines(), "what it says of its reasons"


def test_a_decision_that_differs_is_found() -> None:
    segment, *records = read(DIVERGES)
    assert isinstance(segment, Segment)
    found = first_difference(segment.state, records)  # type: ignore[arg-type]
    assert found is not None
    assert found.record is records[-1]
    (expected,) = [effect for effect in found.expected if effect not in found.got]
    (got,) = [effect for effect in found.got if effect not in found.expected]
    assert expected == {**got, "consumer": "whisper-server"}
    assert got["type"] == "StartUnload"
    assert found.before.at <= found.record.at == found.transition.state.at


def test_a_replay_compares_nothing_where_the_state_is_unknown() -> None:
    segment, *records = read(DIVERGES)
    assert isinstance(segment, Segment)
    replay = Replay()
    assert [replay.step(record) for record in records if isinstance(record, Record)] == (
        [None] * len(records)
    )
    replay.begin(segment.state)
    replay.lose()
    assert replay.state is None
    assert replay.step(records[-1]) is None  # type: ignore[arg-type]


def test_a_replay_is_the_same_under_any_hash_seed() -> None:
    recorded = b"".join(path.read_bytes() for path in LOGS)
    for seed in HASH_SEEDS:
        replayed = subprocess.run(
            [sys.executable, "-m", "tests.golden.golden"],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=FOLDER.parents[1],
            capture_output=True,
            check=True,
            timeout=50,
        )
        assert replayed.stdout == recorded, f"PYTHONHASHSEED={seed}"


def test_each_log_says_what_it_is_for() -> None:
    listed = re.findall(r"^\| `([^`]+)`", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in [*LOGS, DIVERGES])
