"""The commands that read event logs, on logs of a simulated host, golden ones and damaged ones."""

import csv
import gzip
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mgpu_core.codec import decode_state, encode_note, encode_state
from mgpu_core.events import Request
from mgpu_core.state import Phase
from mgpu_core.telling import awaited_now
from mgpu_effects.event_log import encode_gap, encode_line
from mgpu_http.cli import main
from mgpu_http.commands import logs
from mgpu_http.commands.log_words import reason_words
from tests.golden.golden import DIVERGES, LOGS
from tests.support.logs import header, history, lines, write_log

LIMIT_S = 30
PER_SEGMENT = 60
TOLD = history(seed=10, acts=70)
EVENTS = len(TOLD.steps)


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Mgpu = Callable[..., Said]


@pytest.fixture
def mgpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mgpu:
    """Run a command in this process, where it is UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()

    def run(*arguments: object, code: int = 0) -> Said:
        capsys.readouterr()
        said = Said(main([str(argument) for argument in arguments]), *capsys.readouterr())
        assert said.code == code, said
        return said

    return run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Several segments, the closed ones compressed."""
    paths = write_log(tmp_path / "log", TOLD, per_segment=PER_SEGMENT)
    assert len(paths) > 3
    for path in paths[:-1]:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return tmp_path / "log"


def at(seq: int) -> int:
    return TOLD.steps[seq - 1][1].state.at


def seqs(said: Said) -> list[int]:
    return [line["seq"] for line in said.lines]


# ------------------------------------------------------------------------------------------ show


def test_show_has_a_line_for_each_event_with_what_was_believed_then(mgpu: Mgpu, log: Path) -> None:
    shown = mgpu("log", "show", log, "--json").lines
    assert len(shown) == EVENTS
    for line, (_, transition) in zip(shown, TOLD.steps, strict=True):
        state = transition.state
        assert line["at"] == state.at
        assert line["residency"] == {n: c.residency.value for n, c in state.consumers.items()}
        assert line["free_mib"] == {str(gpu): card.free_mib for gpu, card in state.cards.items()}
        assert line["queue"] == len(state.queue)


def test_show_is_aligned_and_tells_times_both_ways(mgpu: Mgpu, log: Path) -> None:
    said = mgpu("log", "show", log)
    day, titles, *told = said.out.splitlines()
    assert day == "-- 2026-05-28, run run-1 --"
    assert titles.split()[:4] == ["SEQ", "TIME", "AFTER", "EVENT"]
    assert [name for name in TOLD.config.consumers if name in titles] == list(TOLD.config.consumers)
    assert len(told) == EVENTS
    assert said.err == ""
    assert re.match(r" +1  20:26:40\.000 +started: run run-1 ", told[0])
    column = titles.index("ollama")
    for number, line in enumerate(told, start=1):
        assert int(line[:8]) == number
        if number > 1:
            assert re.match(r" {2}\d\d:\d\d:\d\d\.\d{3} +\+\d+(\.\d+)? ?[sm]", line[8:])
        word = line[column:].split("  ")[0]
        residency = TOLD.steps[number - 1][1].state.consumers["ollama"].residency.value
        short = {"absent": "-", "resident": "in", "unloading": "leaving"}.get(residency, residency)
        assert word.startswith(short), line
    assert re.search(r"unload [\w-]+ \(swap of \w+\)", said.out)
    assert re.search(r"r\d+ waits for \w+ to ", said.out)


@pytest.mark.parametrize("seq", [1, 2, PER_SEGMENT, PER_SEGMENT + 1, 3 * PER_SEGMENT + 7, EVENTS])
def test_show_begins_where_it_is_told_to(mgpu: Mgpu, log: Path, seq: int) -> None:
    assert seqs(mgpu("log", "show", log, "--at", seq, "--json")) == list(range(seq, EVENTS + 1))
    limited = mgpu("log", "show", log, "--at", seq, "--limit", 2, "--json")
    assert seqs(limited) == list(range(seq, min(EVENTS, seq + 1) + 1))
    first = next(n for n in range(1, EVENTS + 1) if at(n) >= at(seq))
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at(seq) // 10**6))
    given = f"{moment}.{at(seq) % 10**6:06}Z"
    assert seqs(mgpu("log", "show", log, "--at", given, "--limit", 1, "--json")) == [first]
    assert seqs(mgpu("log", "show", log, "--at", given[11:-1], "--limit", 1, "--json")) == [first]


def test_show_counts_times_from_the_end(mgpu: Mgpu, log: Path) -> None:
    shown = seqs(mgpu("log", "show", log, "--at", "20s", "--json"))
    assert shown == [n for n in range(1, EVENTS + 1) if at(n) >= at(EVENTS) - 20 * 10**6]
    assert 1 < len(shown) < EVENTS
    assert shown == seqs(mgpu("log", "show", log, "--at=-20s", "--json"))
    assert seqs(mgpu("log", "show", log, "--last", 5, "--json")) == list(
        range(EVENTS - 4, EVENTS + 1)
    )


def test_show_leaves_out_what_is_not_asked_for_and_still_knows_the_state(
    mgpu: Mgpu, log: Path
) -> None:
    every = mgpu("log", "show", log, "--json").lines
    of_r3 = mgpu("log", "show", log, "--request", "r3", "--json").lines
    parts = [[line["event"], *line["effects"], *line["notes"]] for line in every]
    named = [any(part.get("request") == "r3" for part in of) for of in parts]
    assert of_r3 == [line for line, is_named in zip(every, named, strict=True) if is_named]
    assert of_r3[0]["event"]["type"] == "Request"
    of_ollama = mgpu("log", "show", log, "--consumer", "ollama", "--json").lines
    assert len(of_r3) < len(of_ollama) < EVENTS
    assert all(line in every for line in of_ollama)
    changes = mgpu("log", "show", log, "--changes", "--json").lines
    left_out = [line for line in every if line not in changes]
    assert {line["event"]["type"] for line in left_out} <= {"Tick", "GpuSample", "ProbeResult"}
    assert not any(line["notes"] for line in left_out)
    last = mgpu("log", "show", log, "--request", "r3", "--last", 1, "--json").lines
    assert last == of_r3[-1:]
    assert "no such event" in mgpu("log", "show", log, "--request", "r99999", code=2).err


def test_a_log_comes_from_standard_input_or_one_file_too(
    mgpu: Mgpu, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(log.iterdir())
    assert seqs(mgpu("log", "show", files[1], "--json"))[0] == PER_SEGMENT + 1
    whole = b"".join(
        gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files
    )

    def standard_input() -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(whole)))

    standard_input()
    assert seqs(mgpu("log", "show", "-", "--json")) == list(range(1, EVENTS + 1))
    standard_input()
    state = mgpu("log", "state", "-", "--json").document
    assert state == encode_state(TOLD.states[-1])
    assert "has no end" in mgpu("log", "show", "-", "--at", "5m", code=2).err


def test_show_follows_a_log_that_grows(tmp_path: Path) -> None:
    path, *_ = write_log(tmp_path / "log", TOLD.first(40))
    more = list(lines(TOLD.steps[40:42], 41))
    process = subprocess.Popen(
        [sys.executable, "-m", "mgpu_http.cli", *f"log show {path.parent} --follow --json".split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what a buffer here has taken already, `select` would not see
    )
    try:
        assert process.stdout is not None
        shown = [json.loads(_line(process)) for _ in range(10)]
        assert [line["seq"] for line in shown] == list(range(31, 41))
        with path.open("ab") as file:
            file.write(more[0])
            file.write(more[1][:50])  # in the middle of a line
            file.flush()
            assert json.loads(_line(process))["seq"] == 41
            file.write(more[1][50:])
        assert json.loads(_line(process))["seq"] == 42
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        process.communicate()


def _line(process: Any) -> bytes:
    ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
    assert ready, "nothing came"
    line: bytes = process.stdout.readline()
    return line


def test_on_a_terminal_it_is_one_coloured_screen(log: Path) -> None:
    told, screen = os.openpty()
    environment = {**os.environ, "LINES": "20", "COLUMNS": "100", "NO_COLOR": ""}
    with subprocess.Popen(
        [sys.executable, "-m", "mgpu_http.cli", "log", "show", str(log)],
        stdout=screen,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        os.close(screen)
        assert process.stderr is not None
        assert b"--last" in process.stderr.read()
        assert process.wait(LIMIT_S) == 0
    shown = os.read(told, 100_000).decode()
    os.close(told)
    plain = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert plain != shown.splitlines()
    assert len(plain) <= 20
    assert int(plain[-1][:8]) == EVENTS


def test_what_is_put_off_for_long_is_folded_in_pieces(
    mgpu: Mgpu, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_r3 = mgpu("log", "show", log, "--request", "r3", "--json").lines
    monkeypatch.setattr(logs, "PUT_OFF_AT_MOST", 7)
    assert mgpu("log", "show", log, "--request", "r3", "--json").lines == of_r3


def test_states_that_are_not_those_of_then_are_not_shown_as_such(mgpu: Mgpu) -> None:
    said = mgpu("log", "show", DIVERGES)
    assert re.fullmatch(r"event \d+: today's code decides otherwise .*\n", said.err)


def test_whoever_has_seen_enough_need_not_read_on(log: Path) -> None:
    command = f"{sys.executable} -m mgpu_http.cli log show {log} --json | head -n 1"
    told = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=LIMIT_S, check=True
    )
    assert json.loads(told.stdout)["seq"] == 1
    assert told.stderr == b""


@pytest.mark.parametrize(
    "wrong", [["--last", "3", "--at", "5"], ["--at", "99999"], ["--at", "x"], ["--at", "-1"]]
)
def test_wrong_usage_of_show_is_2(mgpu: Mgpu, log: Path, wrong: list[str]) -> None:
    assert mgpu("log", "show", log, *wrong, code=2).out == ""


# ---------------------------------------------------------------------------------- state, diff


@pytest.mark.parametrize("seq", [1, 7, PER_SEGMENT, PER_SEGMENT + 1, EVENTS - 3, EVENTS])
def test_state_is_the_fold_up_to_there(mgpu: Mgpu, log: Path, seq: int) -> None:
    encoded = mgpu("log", "state", log, "--at", seq, "--json").document
    assert decode_state(encoded) == TOLD.states[seq]
    told = mgpu("log", "state", log, "--at", seq).out
    assert told.startswith(f"after event {seq}, ")
    state = TOLD.states[seq]
    for name, consumer in state.consumers.items():
        assert re.search(rf"^{name} +{consumer.residency.value} ", told, re.MULTILINE)
    for name in state.queue[:5]:
        waits = awaited_now(state.reasons[name], state.requests[name].consumer)
        assert re.search(rf"^{name} .*{re.escape(waits)}", told, re.MULTILINE)
    for name in state.swaps:
        assert re.search(rf"SWAP OF.*^{name} ", told, re.MULTILINE | re.DOTALL)
    for name in state.promises:
        assert re.search(rf"PROMISED TO.*^{name} ", told, re.MULTILINE | re.DOTALL)


def test_state_without_a_point_is_that_at_the_end(mgpu: Mgpu, log: Path) -> None:
    encoded = mgpu("log", "state", log, "--json").document
    assert decode_state(encoded) == TOLD.states[-1]


@pytest.mark.parametrize("point", [EVENTS + 1, "2020-01-01"])
def test_a_point_that_is_not_in_the_log_is_an_error(mgpu: Mgpu, log: Path, point: object) -> None:
    assert "is not in it" in mgpu("log", "state", log, "--at", point, code=2).err


def test_a_point_that_can_not_be_understood_is_an_error(mgpu: Mgpu, log: Path) -> None:
    told = mgpu("log", "state", log, "--at", "yesterday", code=2).err
    assert "'yesterday' is no place in a log: give the number of an event" in told


def applied(encoded: Any, changes: list[Any]) -> Any:
    for change in changes:
        *path, last = change["path"]
        inner = encoded
        for key in path:
            inner = inner[key]
        if "b" in change:
            inner[last] = change["b"]
        else:
            del inner[last]
    return encoded


@pytest.mark.parametrize(("a", "b"), [(1, 2), (30, 200), (200, 30), (12, EVENTS), (50, 50)])
def test_diff_is_what_has_to_change_for_one_to_be_the_other(
    mgpu: Mgpu, log: Path, a: int, b: int
) -> None:
    found = mgpu("log", "diff", log, a, b, "--json").document
    assert (found["a"], found["b"]) == ({"seq": a, "at": at(a)}, {"seq": b, "at": at(b)})
    before = encode_state(TOLD.states[a])
    assert applied(before, found["changes"]) == encode_state(TOLD.states[b])
    assert (not found["changes"]) == (a == b)
    told = mgpu("log", "diff", log, a, b).out
    for name, consumer in TOLD.states[a].consumers.items():
        old, new = consumer.residency.value, TOLD.states[b].consumers[name].residency.value
        path = rf"consumers\.{name}\.residency +"
        assert bool(re.search(rf"{path}{old} -> {new}\n", told)) == (old != new)
        assert bool(re.search(path, told)) == (old != new)


# ---------------------------------------------------------------------------------------- replay


def test_replay_of_what_today_decides_is_0(mgpu: Mgpu, log: Path) -> None:
    answer = mgpu("replay", log, "--json").document
    assert (answer["events"], answer["unknown"], answer["difference"]) == (EVENTS, 0, None)
    told = mgpu("replay", log).out
    assert re.fullmatch(
        rf"{EVENTS} events are decided today as they were then \(\d+ a second\)\n", told
    )


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_golden_logs_are_replayed(mgpu: Mgpu, path: Path) -> None:
    assert mgpu("replay", path, "--json").document["difference"] is None


def test_replay_stops_at_the_first_difference_and_explains_it(mgpu: Mgpu) -> None:
    differs = mgpu("replay", DIVERGES, "--json", code=1).document["difference"]
    last = json.loads(DIVERGES.read_bytes().splitlines()[-1])
    assert {key: differs[key] for key in ("seq", "at", "event")} == {
        key: last[key] for key in ("seq", "at", "event")
    }
    assert differs["expected"] == last["effects"] != differs["got"]
    assert differs["notes"]
    assert differs["recorded_notes"] == last["notes"]
    assert decode_state(differs["before"]).queue is not None
    told = mgpu("replay", DIVERGES, code=1)
    assert f"event {last['seq']} differs: request r6 mvoice" in told.out
    assert "\n  - StartUnload consumer=whisper-server epoch=2" in told.out
    assert "\n  + StartUnload consumer=comfyui epoch=2" in told.out
    assert re.search("because, today\n.*swap of mvoice.*because, then", told.out, re.DOTALL)
    assert re.search(
        "the state before it\n.*^comfyui +resident", told.out, re.DOTALL | re.MULTILINE
    )
    assert f"{last['seq'] - 1} events before it are decided today as" in told.err


PLANNERS = """
def none(target, view):
    return None

def raises(target, view):
    raise ValueError("no idea")
"""


def test_replay_with_another_planner_differs(
    mgpu: Mgpu, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log_planners.py").write_text(PLANNERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = mgpu("replay", log, "--planner", "log_planners:none", "--json", code=1).document
    assert any(effect["type"] == "StartUnload" for effect in answer["difference"]["expected"])
    failed = mgpu("replay", log, "--planner", "log_planners:raises", code=1)
    assert "today's code fails: ValueError: no idea" in failed.out
    assert "none:such" in mgpu("replay", log, "--planner", "none:such", code=2).err


# ---------------------------------------------------------------------------------------- export


def check_trace(events: list[Any]) -> None:
    """Slices begin and end in turn on each track, in order of time, and everything has a name."""
    named = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    tracks: set[object] = set()
    open_slices: dict[object, list[str]] = {}
    now = 0
    for event in events:
        assert event["pid"] in named
        if event["ph"] == "M":
            tracks.add((event["pid"], event.get("tid")))
            continue
        assert event["ts"] >= now
        now = event["ts"]
        match event["ph"]:
            case "B":
                assert (event["pid"], event["tid"]) in tracks
                slices = open_slices.setdefault((event["pid"], event["tid"]), [])
                assert not slices, "slices on a track follow each other"
                slices.append(event["name"])
            case "E":
                open_slices[event["pid"], event["tid"]].pop()
            case "b":
                open_slices.setdefault((event["cat"], event["id"]), []).append(event["name"])
            case "e":
                assert open_slices[event["cat"], event["id"]].pop() == event["name"]
            case "i":
                assert event["s"] in {"g", "p", "t"}
            case "C":
                assert all(type(value) is int for value in event["args"].values())
            case other:
                pytest.fail(f"unknown phase {other}")
    assert not any(open_slices.values()), "everything that is open is closed"


def test_export_is_a_well_formed_trace_of_all_that_happened(mgpu: Mgpu, log: Path) -> None:
    said = mgpu("log", "export", log)
    events = said.document
    assert len(said.out.splitlines()) == len(events) + 2, "an event a line, between brackets"
    assert mgpu("log", "export", log, "--json").lines == events
    check_trace(events)
    transitions = [transition for _, transition in TOLD.steps]
    decided = Counter(type(e).__name__ for t in transitions for e in t.effects)
    slices = Counter(e["name"] for e in events if e["ph"] == "B")
    assert slices["loading"] == decided["StartLoad"] > 0
    assert slices["unloading"] == decided["StartUnload"] > 0
    served = [e for e in events if e["ph"] == "B" and "waited_us" in e["args"]]
    assert len(served) == decided["Serve"] > 0
    rejects = [e for e in events if e["ph"] == "i" and e["name"].startswith("reject ")]
    assert len(rejects) == decided["Reject"] > 0
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {"host", *TOLD.config.consumers}
    waits = Counter(e["name"] for e in events if e["ph"] == "b" and e["name"].startswith("waits"))
    noted = {
        "waits " + reason_words(encode_note(note))
        for transition in transitions
        for note in transition.notes
        if note.type == "Waits"
    }
    assert noted >= set(waits) > set()
    free = [e["args"]["free"] for e in events if e["ph"] == "C" and e["name"] == "GPU 0 MiB"]
    assert set(free) == {t.state.cards[0].free_mib for t in transitions if t.state.cards}


@pytest.mark.parametrize("path", [*LOGS, DIVERGES], ids=lambda path: path.stem)
def test_golden_logs_are_exported(mgpu: Mgpu, path: Path) -> None:
    check_trace(mgpu("log", "export", path).document)


def test_export_of_a_part(mgpu: Mgpu, log: Path) -> None:
    events = mgpu("log", "export", log, "--from", 100, "--to", 150).document
    check_trace(events)
    times = [e["ts"] for e in events if "ts" in e]
    assert (min(times), max(times)) == (at(100), at(150))


def test_a_run_that_ended_without_an_end_leaves_nothing_open(mgpu: Mgpu, tmp_path: Path) -> None:
    """The next run knows nothing of what the last one served."""
    cut = next(n for n, (_, t) in enumerate(TOLD.steps, 1) if t.state.serving and t.state.queue)
    (first,) = write_log(tmp_path / "log", TOLD.first(cut), "a")
    write_log(tmp_path / "log", TOLD.first(20), "b", first_seq=cut + 1)
    check_trace(mgpu("log", "export", first.parent).document)
    rows = list(csv.DictReader(io.StringIO(mgpu("log", "export", first.parent, "--csv").out)))
    lost = {row["request"] for row in rows if row["outcome"] == "lost"}
    assert lost == set(TOLD.states[cut].requests)


def test_the_table_of_requests_is_what_became_of_each(mgpu: Mgpu, log: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(mgpu("log", "export", log, "--csv").out)))
    asked = [event for event, _ in TOLD.steps if isinstance(event, Request)]
    assert sorted(row["request"] for row in rows) == sorted(event.request for event in asked)
    by_name = {row["request"]: row for row in rows}
    notes = [note for _, t in TOLD.steps for note in t.notes]
    for note in notes:
        if note.type == "Granted" and note.request in by_name:
            assert int(by_name[note.request]["waited_us"]) == note.details["waited_us"]
        if note.type == "Served" and note.request in by_name:
            row = by_name[note.request]
            assert row["outcome"] == note.details["outcome"]
            assert int(row["served_us"]) == note.details["ran_us"]
        if note.type == "Rejected" and note.request in by_name:
            row = by_name[note.request]
            assert (row["outcome"], row["code"]) == ("rejected", note.details["code"])
    outcomes = Counter(row["outcome"] for row in rows)
    assert outcomes["ok"] > 0
    assert outcomes["rejected"] > 0
    still = {n for n, r in TOLD.states[-1].requests.items() if r.operator is None}
    assert {row["request"] for row in rows if row["outcome"] == "open"} == still
    queued = [n for n in still if TOLD.states[-1].requests[n].phase is not Phase.SERVING]
    assert all(by_name[name]["waited_us"] == "" for name in queued)


def test_the_table_of_a_part_tells_the_same_of_those_that_end_in_it(mgpu: Mgpu, log: Path) -> None:
    every = mgpu("log", "export", log, "--csv").out.splitlines()
    first = PER_SEGMENT + 30
    part = mgpu("log", "export", log, "--csv", "--from", first).out.splitlines()
    ended_before = {
        line["event"].get("request")
        for line in mgpu("log", "show", log, "--json").lines
        if line["seq"] < first and line["event"]["type"] == "ServeDone"
    } | {
        effect["request"]
        for line in mgpu("log", "show", log, "--json").lines
        for effect in line["effects"]
        if line["seq"] < first and effect["type"] == "Reject"
    }
    assert ended_before
    assert part == [row for row in every if row.split(",")[0] not in ended_before]


# ---------------------------------------------------------------------------------------- damage


COMMANDS = [
    ("log", "show"),
    ("log", "state"),
    ("log", "diff"),
    ("replay",),
    ("log", "export"),
    ("log", "export", "--csv"),
]
each_command = pytest.mark.parametrize("command", COMMANDS, ids=" ".join)


def given(command: tuple[str, ...], log: Path, *more: str) -> list[object]:
    points = ["1", str(EVENTS)] if command[-1] == "diff" else []
    return [*command, log, *points, *more]


@each_command
def test_no_log_is_an_error_that_says_so(
    mgpu: Mgpu, tmp_path: Path, command: tuple[str, ...]
) -> None:
    told = mgpu(*given(command, tmp_path / "none"), code=2)
    assert f"there is no {tmp_path / 'none'}" in told.err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: there are no" in mgpu(*given(command, empty), code=2).err
    other = tmp_path / "other.txt"
    other.write_text("not a log\n")
    assert f"{other}" in mgpu(*given(command, other), code=2).err


@each_command
def test_damage_is_named_and_passed_over_where_that_is_wanted(
    mgpu: Mgpu, tmp_path: Path, command: tuple[str, ...]
) -> None:
    paths = write_log(tmp_path / "log", TOLD, per_segment=PER_SEGMENT)
    whole = paths[1].read_bytes()
    start = whole.index(b'{"seq":70,')
    paths[1].write_bytes(whole[: start + 20] + b"X" + whole[start + 21 :])
    if command[-1] != "diff":
        told = mgpu(*given(command, paths[1]), code=2).err
        place = f"{paths[1]}: byte {start}, line 11"
        assert f"{place}: its checksum is not that of its bytes; --salvage goes on" in told
    salvaged = mgpu(*given(command, paths[0].parent, "--salvage"))
    assert command[-1] in {"state", "diff"} or f"byte {start}, line 11: 1 lines (" in salvaged.err


def test_where_the_state_is_unknown_it_is_not_made_up(mgpu: Mgpu, tmp_path: Path) -> None:
    first, second, *_ = write_log(tmp_path / "log", TOLD, per_segment=PER_SEGMENT)
    kept = first.read_bytes().splitlines(keepends=True)
    first.write_bytes(b"".join([*kept[:10], *kept[11:]]))  # event 10 is not there
    shown = mgpu("log", "show", first.parent, "--salvage", "--json").lines
    assert [line["seq"] for line in shown if line["queue"] is None] == list(range(11, 61))
    assert " ?" in mgpu("log", "show", first.parent, "--salvage", "--at", "20", "--limit", "1").out
    answer = mgpu("replay", first.parent, "--salvage", "--json").document
    assert (answer["events"], answer["unknown"]) == (EVENTS - 1, 50)
    told = mgpu("log", "state", first.parent, "--salvage", "--at", "20", code=2).err
    assert "what is before event 20 is damaged, so its state is unknown" in told
    check_trace(mgpu("log", "export", first.parent, "--salvage").document)
    assert mgpu("log", "show", second, "--limit", "1", "--json").lines[0]["queue"] is not None


def test_torn_ends_and_gaps_are_told_and_are_no_error(mgpu: Mgpu, tmp_path: Path) -> None:
    first, second, third, *_ = write_log(tmp_path / "log", TOLD, per_segment=PER_SEGMENT)
    second.unlink()
    whole = third.read_bytes()
    third.write_bytes(whole[:-30])
    for later in sorted(first.parent.iterdir())[2:]:
        later.unlink()
    said = mgpu("replay", first.parent, "--json")
    assert said.document["events"] == 2 * PER_SEGMENT - 1
    assert "events 61 to 120 are gone, with their segments" in said.err
    assert re.search(r"byte \d+, line 61: .*: writing was cut off here", said.err)
    lost = tmp_path / "lost.jsonl"
    state = TOLD.states[25]
    lost.write_bytes(header(state) + encode_gap(21, 25) + b"".join(lines(TOLD.steps[25:30], 26)))
    said = mgpu("log", "show", lost, "--json")
    assert seqs(said) == list(range(26, 31))
    assert "events 21 to 25 could not be written then" in said.err


def test_a_later_format_names_the_version_that_reads_it(mgpu: Mgpu, tmp_path: Path) -> None:
    head = {"log": "mgpu", "format": 99, "mgpu": "9.0", "run": "r", "config": {}, "state": {}}
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(head) + "\n")
    told = mgpu("replay", path, code=2).err
    assert "format 99, written by mgpu 9.0" in told


def test_an_event_of_a_later_version_names_the_version_that_reads_it(
    mgpu: Mgpu, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    later = encode_line(1, at(1), {"type": "Later"}, [], [])
    path.write_bytes(header(TOLD.states[0]) + later)
    told = mgpu("log", "show", path, code=2).err
    assert re.search(
        r"event 1 can't be read: .*'Later'.*; mgpu 0\.1\.0 wrote it, read it with", told
    )


# ------------------------------------------------------------------------------ logs of mgpu fuzz


@pytest.mark.timeout(100)
def test_what_fuzz_keeps_can_be_looked_at(
    mgpu: Mgpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log_planners.py").write_text(PLANNERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    planner = ("--planner", "log_planners:none")
    found = mgpu(
        "fuzz", *planner, "--seed", 2, "--json", "--save", tmp_path / "kept", code=1
    ).document["found"]
    kept = found["log"]
    shown = mgpu("log", "show", kept, "--json").lines
    assert [line["event"] for line in shown] == [event["event"] for event in found["events"]]
    assert mgpu("replay", kept, *planner, "--json").document["difference"] is None
    assert mgpu("log", "state", kept).out.startswith(f"after event {len(shown)}, ")
    check_trace(mgpu("log", "export", kept).document)
