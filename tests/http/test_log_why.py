"""`mgpu log why`: from a directory, a segment or a pipe, whole, cut or damaged."""

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgpu_core import events as ev
from mgpu_core.config import SECOND_US, Consumer, Gpu, config_of
from mgpu_core.replay import Record
from mgpu_core.simulation import folded
from mgpu_core.telling import lasting
from mgpu_core.why import Interval, Waits, encode_explanation
from mgpu_effects.event_log import read
from mgpu_http.cli import main
from mgpu_http.commands.log_why import LINES, page
from tests.support.logs import History, history, write_log

TOLD = history(seed=10, acts=70)
Mgpu = Callable[..., SimpleNamespace]


@pytest.fixture
def mgpu(capsys: pytest.CaptureFixture[str]) -> Mgpu:
    def run(*arguments: object) -> SimpleNamespace:
        code = main(["log", "why", *map(str, arguments)])
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return run


def whole(path: Path) -> Waits:
    """Fold everything that there is, without looking for anything."""
    waits = Waits()
    for item in read(path):
        if isinstance(item, Record):
            waits.see(item)
    return waits


def requests(waits: Waits) -> list[str]:
    return [one for one in waits.requests() if not one.startswith("load:")]


def test_each_request_is_found_in_the_segment_in_which_it_came(tmp_path: Path, mgpu: Mgpu) -> None:
    write_log(tmp_path, TOLD, per_segment=40)
    waits = whole(tmp_path)
    assert len(requests(waits)) > 40
    in_parts = 0
    for request in requests(waits):
        found = waits.explained(request)
        assert found is not None
        said = mgpu(tmp_path, request, "--json")
        assert (said.code, said.err) == (0, "")
        assert json.loads(said.out) == json.loads(json.dumps(encode_explanation(found)))
        in_parts += len(found.intervals) > 1
    assert in_parts > 10


def test_a_closed_segment_a_file_and_a_pipe_tell_the_same(
    tmp_path: Path, mgpu: Mgpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_log(tmp_path, TOLD)
    content, request = path.read_bytes(), requests(whole(tmp_path))[20]
    told = mgpu(path, request).out
    assert request in told
    Path(f"{path}.gz").write_bytes(gzip.compress(content))
    path.unlink()
    assert mgpu(tmp_path, request).out == told
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert mgpu("-", request).out == told


def test_what_is_gone_with_its_segment_is_said(tmp_path: Path, mgpu: Mgpu) -> None:
    """A request whose beginning is in no segment any more, and one whose end is in none yet."""
    states = TOLD.states
    cut = next(n for n in range(60, len(states)) if states[n].reasons)
    request = next(one for one in states[cut].reasons if not one.startswith("load:"))
    paths = write_log(tmp_path, TOLD, per_segment=cut)
    full = whole(tmp_path).explained(request)
    assert full is not None
    last = [path.rename(path.with_suffix(".away")) for path in paths[1:]]
    said = json.loads(mgpu(tmp_path, request, "--json").out)
    assert (said["outcome"], said["intervals"][-1]["ended_by"]) == ("waiting", None)
    for path in last:
        path.rename(path.with_suffix(".jsonl"))
    paths[0].unlink()
    said = json.loads(mgpu(tmp_path, request, "--json").out)
    assert (said["outcome"], said["waited_us"]) == (full.outcome, full.waited_us)
    parts = said["intervals"]
    assert parts[0]["reason"]["type"] == "unrecorded"
    assert sum(one["to"] - one["from"] for one in parts) == full.waited_us


def test_damage_is_named_and_salvaged(tmp_path: Path, mgpu: Mgpu) -> None:
    (path,) = write_log(tmp_path, TOLD)
    waits = whole(path)
    long = [r for r in requests(waits) if len(waits.explained(r).intervals) > 3]  # type: ignore[union-attr]
    full = waits.explained(long[0])
    assert full is not None
    within = full.intervals[1].ended_by
    assert within is not None
    lines = path.read_bytes().splitlines(keepends=True)
    lines[within] = lines[within].replace(b'"notes"', b'"nodes"')
    path.write_bytes(b"".join(lines))
    said = mgpu(tmp_path, long[0])
    assert said.code == 2
    assert f"line {within + 1}" in said.err
    assert "--salvage" in said.err
    said = mgpu(tmp_path, long[0], "--json", "--salvage")
    told = json.loads(said.out)
    assert "skipped" in said.err
    assert (told["outcome"], told["waited_us"]) == (full.outcome, full.waited_us)
    assert sum(one["to"] - one["from"] for one in told["intervals"]) == full.waited_us
    assert "unrecorded" in [one["reason"]["type"] for one in told["intervals"]]


@pytest.mark.parametrize("asked", ["12", "x12", "r12x"])
def test_similar_ids_are_named(tmp_path: Path, mgpu: Mgpu, asked: str) -> None:
    write_log(tmp_path, TOLD, per_segment=40)
    said = mgpu(tmp_path, asked)
    assert (said.code, said.out) == (2, "")
    assert f"there is no request {asked}" in said.err
    assert "similar: r" in said.err


def a_load_that_waits() -> History:
    """An operator wants `voice` in while `llm`, which has to go, serves for 20 s; then again."""
    at = 1_780_000_000_000_000
    config = config_of(
        Consumer(name="llm", vram_mib={0: 20_000}, load_route=True, unload_route=True),
        Consumer(name="voice", vram_mib={0: 8_000}, load_route=True, unload_route=True),
        gpus=(Gpu(total_mib=24_000),),
    )
    history = [
        ev.Started(at=at, run="r1"),
        ev.ProbeResult(at=at, consumer="voice", taken=at, healthy=True, resident=False),
        ev.Request(at=at, request="r7", consumer="llm"),
        ev.Load(at=at + 1, consumer="voice"),
        *(ev.Tick(at=at + second * SECOND_US) for second in range(1, 20)),
        ev.ServeDone(at=at + 20 * SECOND_US, request="r7"),
        ev.UnloadDone(at=at + 21 * SECOND_US, consumer="llm", epoch=1),
        ev.SwapDone(at=at + 25 * SECOND_US, consumer="voice", epoch=1),
        *(ev.Tick(at=at + second * SECOND_US) for second in range(26, 40)),
        ev.Request(at=at + 40 * SECOND_US, request="r8", consumer="voice"),
        ev.Load(at=at + 41 * SECOND_US, consumer="llm"),
    ]
    return History(config, folded(config, history, None))


def test_a_load_that_an_operator_asked_for_is_found(tmp_path: Path, mgpu: Mgpu) -> None:
    """No event of a request begins it, and its wait spans several segments."""
    write_log(tmp_path, a_load_that_waits(), per_segment=5)
    assert json.loads(mgpu(tmp_path, "load:llm", "--json").out)["outcome"] == "waiting"
    said = json.loads(mgpu(tmp_path, "load:voice", "--json").out)
    assert (said["outcome"], said["consumer"]) == ("brought_in", "voice")
    assert [(one["to"] - one["from"], one["reason"]["text"]) for one in said["intervals"]] == [
        (20_000_000 - 1, "for llm to finish (r7)"),
        (1_000_000, "for llm to be unloaded"),
        (4_000_000, "for voice to load"),
    ]


def test_the_page_for_people(tmp_path: Path, mgpu: Mgpu) -> None:
    write_log(tmp_path, TOLD)
    waits = whole(tmp_path)
    for request in requests(waits):
        found = waits.explained(request)
        assert found is not None
        if len(found.intervals) < 2:
            continue
        said = mgpu(tmp_path, request).out
        longest = max(found.intervals, key=lambda one: one.us)
        (marked,) = [line for line in said.splitlines() if line.startswith("*")]
        assert lasting(longest.us) in marked
        assert f"{longest.ended_by}  {longest.event}" in marked
        assert said.startswith(f"{request} for {found.consumer}, ")
        return
    raise AssertionError("nobody waits for several reasons")


def test_a_wait_of_very_many_parts_fits_on_a_screen(tmp_path: Path) -> None:
    write_log(tmp_path, TOLD)
    waits = whole(tmp_path)
    found = next(f for r in requests(waits) if (f := waits.explained(r)) and f.intervals)
    wait = waits._ended.get(found.request) or waits._open[found.request]
    one, begin = found.intervals[0], found.begin
    wait.intervals = [
        Interval(begin=begin + n * 10, end=begin + n * 10 + 10, reason=one.reason, ended_by=n)
        for n in range(100)
    ]
    wait.end = begin + 1000
    found = waits.explained(found.request)
    assert found is not None
    short, full = ("\n".join(page(found, every=every)) for every in (False, True))
    assert "and 60 shorter ones, 0.6 ms together: --all shows them" in short
    assert len(short.splitlines()) < LINES + 10
    assert len(full.splitlines()) > 100


def test_no_log(tmp_path: Path, mgpu: Mgpu) -> None:
    assert mgpu(tmp_path, "r1").code == 2
    assert mgpu(tmp_path / "nothing", "r1").code == 2


def test_a_restart_within_a_log(tmp_path: Path, mgpu: Mgpu) -> None:
    """A second run's segments, after a first one that was killed with somebody waiting."""
    states = TOLD.states
    cut = next(n for n in range(60, len(states)) if states[n].reasons)
    request = next(one for one in states[cut].reasons if not one.startswith("load:"))
    write_log(tmp_path, TOLD.first(cut), run="r1", per_segment=25)
    write_log(tmp_path, history(seed=2).first(8), run="r2", first_seq=cut + 1)
    said = json.loads(mgpu(tmp_path, request, "--json").out)
    assert said["outcome"] == "lost"
    assert said["intervals"][-1]["to"] == states[cut].at
    assert said["intervals"][-1]["ended_by"] is None
    assert "when the broker ended" in mgpu(tmp_path, request).out
