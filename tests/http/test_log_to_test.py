"""`mgpu log to-test`: what it prints passes where it belongs, and fails when a decision changes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mgpu_core.events import Event, GpuSample
from mgpu_core.scheduler import Scheduler
from mgpu_http.cli import main
from tests.core.transcript import rewritten
from tests.golden.golden import DIVERGES, LOGS
from tests.support.logs import History, history, write_log

ROOT = Path(__file__).parents[2]
LIMIT_S = 60
DEMO = ROOT / "docs" / "examples" / "demo.jsonl.gz"
PYTEST = ("-q", "-p", "no:cacheprovider", "-c", "pyproject.toml")
DECIDED = re.compile(r'== \["(serve|load|unload|reject)')


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        assert main(["log", "to-test", *map(str, arguments)]) == code
        return capsys.readouterr()

    return run


def logs(place: Path) -> list[Path]:
    told = [history(seed=seed, acts=12) for seed in range(1, 7)]
    made = [write_log(place / f"log{number}", one)[0] for number, one in enumerate(told)]
    return [*made, *LOGS, DEMO]


def pytest_of(folder: Path) -> Any:
    """Run real pytest on the files of a folder, as it runs the tests here."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *PYTEST, "--rootdir", str(ROOT), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LIMIT_S,
        check=False,
    )


def test_a_pytest_case_passes_and_fails_when_a_decision_is_altered(
    said: Any, tmp_path: Path
) -> None:
    good, altered = tmp_path / "good", tmp_path / "altered"
    good.mkdir()
    altered.mkdir()
    files = logs(tmp_path)
    for number, log in enumerate(files):
        text = said(log).out
        assert len(DECIDED.findall(text)) >= 3
        (good / f"test_{number}.py").write_text(text)
        changed = DECIDED.sub('== ["serve nobody", "\\\\1', text, count=1)
        (altered / f"test_{number}.py").write_text(changed)
    passed = pytest_of(good)
    assert f"{len(files)} passed" in passed.stdout, passed.stdout
    failed = pytest_of(altered)
    assert f"{len(files)} failed" in failed.stdout, failed.stdout
    assert failed.stdout.count("serve nobody") >= len(files)


def test_a_short_one_holds_the_same_decisions_in_fewer_lines(said: Any, tmp_path: Path) -> None:
    whole, short = said(DEMO).out, said(DEMO, "--short").out
    assert len(short.splitlines()) < len(whole.splitlines()) / 2
    decided = re.compile(r"== (\[.+\])")
    assert decided.findall(short) == decided.findall(whole)
    calls = re.compile(r"core\.(?:request|finish|loaded|unloaded)\(.*?\)")
    assert calls.findall(short) == calls.findall(whole)
    (tmp_path / "test_short.py").write_text(short)
    passed = pytest_of(tmp_path)
    assert "1 passed" in passed.stdout, passed.stdout


def test_a_pytest_case_is_in_order_for_ruff(said: Any, tmp_path: Path) -> None:
    for number, log in enumerate(logs(tmp_path)):
        (tmp_path / f"test_{number}.py").write_text(said(log).out)
    rules = ["--config", str(ROOT / "pyproject.toml"), "--select", "F,I,W"]
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", *rules, str(tmp_path)]
    checked = subprocess.run(ruff, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert checked.returncode == 0, checked.stdout


def test_a_transcript_is_what_the_core_does(said: Any, tmp_path: Path) -> None:
    for log in logs(tmp_path):
        text = said(log, "--as", "transcript").out
        again = rewritten(text, log.name)
        assert [line for line in again.splitlines() if line] == [
            line for line in text.splitlines() if line
        ]


def test_names_and_times_are_plain(said: Any, tmp_path: Path) -> None:
    (log,) = write_log(tmp_path / "log", history(seed=3, acts=12))
    for shape in ("pytest", "transcript"):
        text = said(log, "--as", shape).out
        for name in ("mvoice", "whisper", "ollama", "comfyui", "178000"):
            assert name not in text
        requests = [int(n) for n in re.findall(r'core\.request\("r(\d+)"', text)]
        assert requests == list(range(1, len(requests) + 1))
    answer = json.loads(said(log, "--json").out)
    assert answer["as"] == "pytest"
    assert answer["text"].startswith("from mgpu_core")
    assert answer["events"] == len(history(seed=3, acts=12).steps)


def test_what_diverges_is_a_test_that_fails_until_it_is_decided_so_again(
    said: Any, tmp_path: Path
) -> None:
    told = said(DIVERGES)
    assert "is decided otherwise today: it fails" in told.err
    (tmp_path / "test_it.py").write_text(told.out)
    failed = pytest_of(tmp_path)
    assert "1 failed" in failed.stdout
    refused = said(DIVERGES, "--as", "transcript", code=2)
    assert "ask for --as pytest, which holds both" in refused.err
    assert refused.out == ""


def test_of_a_long_log_it_says_what_makes_it_short(said: Any) -> None:
    told = said(DEMO).err
    assert "`--short` leaves out" in told
    assert "`mgpu log minimize` gives a short one" in told


def test_what_hangs_on_an_earlier_run_is_no_test(said: Any, tmp_path: Path) -> None:
    """A log that begins in mid-work: what it began with can't be told."""
    told = history(seed=10, acts=30)
    middle = next(n for n, state in enumerate(told.states) if n > 60 and state.swaps)
    later = write_log(tmp_path / "log", told, per_segment=middle)[1]
    refused = said(later, code=2)
    assert "it hangs on what was before it" in refused.err
    assert refused.out == ""


def test_a_reading_that_does_not_add_up_is_told_where_nothing_hangs_on_it(
    said: Any, tmp_path: Path
) -> None:
    """Of a real card some memory is neither used nor free."""
    config = history().config
    events = [event for event, _ in history(seed=2, acts=8).steps]
    state, steps = Scheduler(config).initial(), []
    for event in map(_less_used, events):
        steps.append((event, Scheduler(config).step(state, event)))
        state = steps[-1][1].state
    (log,) = write_log(tmp_path / "log", History(config, tuple(steps)))
    assert "core.sample(free=" in said(log).out


def _less_used(event: Event) -> Event:
    if not isinstance(event, GpuSample):
        return event
    return evolve(event, gpus=tuple(evolve(one, used_mib=one.used_mib - 300) for one in event.gpus))
