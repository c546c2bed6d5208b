"""`mgpu demo` as a user runs it: real processes, a real broker, real requests."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from mgpu_effects.config_file import load_settings
from mgpu_http.cli import main
from mgpu_http.commands.demo import LineByLine, watching
from mgpu_http.demo.host import MARK, DemoError, Place, write_config
from mgpu_http.demo.traffic import arrivals

SECONDS, SEED = 4, 1
LIMIT_S = 100
KEYS = {
    *("requests", "outcomes", "mean_wait_ms", "p95_wait_ms"),
    *("loads", "evictions", "out_of_memory"),
}

pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def command(directory: Path, *more: str) -> list[str]:
    cli = [sys.executable, "-m", "mgpu_http.cli", "demo", "--dir", str(directory)]
    return [*cli, "--seed", str(SEED), *more]


def processes_of(directory: Path) -> dict[int, str]:
    """Give the processes that carry the mark of a demo in this directory, and their commands."""
    mark, found = f"{MARK}={directory}".encode(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


@contextlib.contextmanager
def begun(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a long demo, and go on when its clients have come."""
    process = subprocess.Popen(
        command(directory, "--seconds", "300", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert any(re.search(r"[1-9]\d* sent", line) for line in process.stderr)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_runs_and_accounts_for_everybody(tmp_path: Path) -> None:
    place = Place(tmp_path / "demo")
    told = subprocess.run(
        command(place.path, "--seconds", str(SECONDS), "--json"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    document = json.loads(told.stdout)
    assert list(document) == ["with", "without"]
    came = len(arrivals(SEED, SECONDS))
    for half in document.values():
        assert set(half) == KEYS
        assert half["requests"] == sum(half["outcomes"].values()) == came
        assert half["loads"] > 0
    assert document["with"]["out_of_memory"] == 0
    assert document["without"]["evictions"] == 0  # nobody is there to evict
    assert document["with"]["outcomes"]["ok"] > came / 2
    assert "with mgpu" in told.stderr
    assert processes_of(place.path) == {}
    assert main(["check", str(place.config)]) == 0
    logged = "".join(path.read_text() for path in place.events.glob("*.jsonl"))
    assert logged.count('"type":"Request"') >= came


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    with begun(tmp_path) as process:
        assert len(processes_of(tmp_path)) >= 5
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130
        assert processes_of(tmp_path) == {}
        assert json.loads(output)["with"]["requests"] > 0


def test_the_next_demo_ends_what_a_killed_one_left(tmp_path: Path) -> None:
    with begun(tmp_path) as process:
        process.kill()
        process.wait()
        left = processes_of(tmp_path).keys()
        assert left
    with begun(tmp_path) as process:
        assert left.isdisjoint(processes_of(tmp_path))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130
        assert processes_of(tmp_path) == {}


def test_two_demos_do_not_share_a_directory(tmp_path: Path) -> None:
    place = Place(tmp_path)
    with place.taken(), pytest.raises(DemoError, match="another demo runs"), place.taken():
        pass


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(DemoError, match="holds other things"), Place(tmp_path).taken():
        pass
    assert (tmp_path / "thesis.txt").read_text() == "all of it"


def test_each_run_begins_with_an_empty_directory(tmp_path: Path) -> None:
    place = Place(tmp_path / "demo")
    with place.taken():
        (place.path / "with").mkdir()
        (place.path / "with" / "broker.log").touch()
        place.config.touch()
    with place.taken():
        assert [entry.name for entry in place.path.iterdir()] == ["demo.lock"]


def test_the_configuration_is_the_shipped_one_but_for_what_it_says(tmp_path: Path) -> None:
    place = Place(tmp_path)
    write_config(place, seed=1)
    ours = load_settings(place.config)
    shipped = load_settings(Path(__file__).parents[2] / "config" / "consumers.yaml")
    assert ours.consumers.keys() == shipped.consumers.keys()
    for name, one in ours.consumers.items():
        assert one.url != shipped.consumers[name].url
        for kept in ("paths", "vram_resident_mib", "vram_load_mib", "unload", "load", "priority"):
            assert getattr(one, kept) == getattr(shipped.consumers[name], kept)
    assert len({one.url for one in ours.consumers.values()}) == len(ours.consumers)
    assert ours.gpus[0].sampler == "simulated"
    assert ours.routing["stt"] == "whisper-server"
    assert "Pictures need so much that the voice must leave" in place.config.read_text()


@pytest.mark.parametrize(("terminal", "lines"), [("dumb", True), ("xterm-256color", False)])
def test_a_terminal_without_a_screen_gets_lines(terminal: str, lines: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": terminal})
    with watching(console) as watch:
        assert isinstance(watch, LineByLine) is lines


@pytest.mark.parametrize("seconds", ["0", "-3", "1e9", "nan"])
def test_senseless_times_are_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", f"--seconds={seconds}"]) == 2
    assert "--seconds is a number from 1" in capsys.readouterr().err


def test_what_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "a-directory-with-a-name-that-is-too-long-for-a-socket" / ("x" * 80)
    told = subprocess.run(
        command(broken, "--seconds", "1"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert told.returncode == 1
    assert "card did not start" in told.stderr
    assert "path too long" in told.stderr
    assert processes_of(broken) == {}
