import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu_core.replay import Record
from mgpu_effects.event_log import EventLog, EventLogError, default_dir, encode_line, read, writing
from mgpu_effects.settings import EventLogSettings
from tests.support.upstream import eventually

AT = 1_780_000_000_000_000
# One line of it makes a segment full.
FULL = {"type": "Request", "request": "x" * 2**20}
HEADER = (
    '{"log":"mgpu","format":1,"mgpu":"0.1.0","run":"r1","config":{"consumers":{}},"state":{"seq":0}'
)
FIRST_EVENT = (
    '{"seq":1,"at":1780000000000001,'
    '"event":{"type":"Request","request":"r1","consumer":"\\u00e9"},'
    '"effects":[{"type":"SampleGpu"}],"notes":[{"type":"admitted","request":"r1"}]'
)
SECOND_EVENT = (
    '{"seq":2,"at":1780000000000002,"event":{"type":"Tick"},'
    '"effects":[{"type":"SampleGpu"}],"notes":[{"type":"admitted","request":"r1"}]'
)


class Run:
    """A broker, as far as its log needs one: it counts events, and that is its state."""

    def __init__(self, directory: Path, run: str = "r1", **settings: object) -> None:
        settings = {"fsync": "never", "rotate_mib": 1, **settings}
        self.seq = 0
        self.log = EventLog(directory, EventLogSettings(**settings), run, "0.1.0", self.snapshot)

    def snapshot(self) -> tuple[dict, dict]:
        return {"consumers": {}}, {"seq": self.seq}

    def open(self) -> "Run":
        self.log.open()
        self.log.begin(self.seq + 1)
        return self

    def append(self, event: dict | None = None) -> None:
        self.seq += 1
        effects, notes = [{"type": "SampleGpu"}], [{"type": "admitted", "request": "r1"}]
        self.log.append(self.seq, AT + self.seq, event or {"type": "Tick"}, effects, notes)


@pytest.fixture
async def start(tmp_path):
    runs = []

    def start(name: str = "r1", **settings: object) -> Run:
        runs.append(Run(tmp_path / "log", name, **settings).open())
        return runs[-1]

    yield start
    for run in runs:
        await run.log.close()


def segments(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "log").glob("events-*"))


def lines(segment: Path) -> list[dict]:
    return [json.loads(line) for line in segment.read_bytes().splitlines()]


async def test_a_segment_is_a_header_and_a_line_for_each_event(start, tmp_path):
    run = start()
    run.append({"type": "Request", "request": "r1", "consumer": "é"})
    run.append()
    (segment,) = segments(tmp_path)
    assert segment.name == "events-r1-0000000001.jsonl"
    header, *events, rest = segment.read_bytes().decode("ascii").split("\n")
    all_lines = [header, *events]
    assert [line[: line.index(',"crc":"')] for line in all_lines] == [
        HEADER,
        FIRST_EVENT,
        SECOND_EVENT,
    ]
    crc = len(',"crc":"9ae1f03b"}')
    assert all(len(line[line.index(',"crc":"') :]) == crc for line in all_lines)
    assert rest == ""


async def test_the_checksum_covers_the_line_without_itself(start, tmp_path):
    run = start()
    run.append()
    line = segments(tmp_path)[0].read_bytes().splitlines()[1]
    document, _, crc = line.rpartition(b',"crc":')
    assert crc == b'"%08x"}' % zlib.crc32(document + b"}")
    parsed = json.loads(line)
    del parsed["crc"]
    again = json.dumps(parsed, separators=(",", ":")).encode()
    assert zlib.crc32(again) == zlib.crc32(document + b"}")


async def test_nobody_else_may_read_it(start, tmp_path):
    os.umask(os.umask(0))  # whatever the umask is, the modes are these
    start()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "log").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600


async def test_an_appended_line_is_in_the_file_at_once(start, tmp_path):
    run = start(fsync=3600)
    run.append()
    assert lines(segments(tmp_path)[0])[-1]["seq"] == 1


async def test_a_full_segment_is_followed_by_one_that_replays_alone(start, tmp_path):
    run = start()
    run.append()
    run.append(FULL)
    run.append()
    first, second = segments(tmp_path)
    assert [line.get("seq") for line in lines(first)] == [None, 1, 2]
    assert second.name == "events-r1-0000000003.jsonl"
    header, event = lines(second)
    assert (header["log"], header["state"]) == ("mgpu", {"seq": 2})
    assert event["seq"] == 3


async def test_a_segment_with_enough_events_is_followed_too(start, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SEGMENT_EVENTS", 3)
    run = start()
    for _ in range(7):
        run.append()
    assert [s.name[-7:-6] for s in segments(tmp_path)] == ["1", "4", "7"]


async def test_a_segment_that_is_old_is_followed_too(start, tmp_path, monkeypatch):
    run = start()
    run.append()
    monkeypatch.setattr(writing, "_SEGMENT_AGE_S", 0)
    run.append()
    assert [s.name[-7:-6] for s in segments(tmp_path)] == ["1", "3"]


async def test_closed_segments_are_looked_after_beside_the_event_loop(start, tmp_path):
    run = start(keep_mib=2)
    for _ in range(3):
        run.append(FULL)
    first, *_ = segments(tmp_path)
    async with asyncio.timeout(20):
        while first.exists():  # noqa: ASYNC110 - a thread removes it
            await asyncio.sleep(0.01)


async def test_a_second_broker_on_the_directory_is_refused(start, tmp_path):
    start()
    with pytest.raises(EventLogError, match=r"another mgpu writes its event log to .*/log"):
        Run(tmp_path / "log", "r2").open()


async def test_the_lock_ends_with_its_broker(start, tmp_path):
    await start().log.close()
    start("r2").append()
    assert len(segments(tmp_path)) == 2


async def test_a_lock_of_another_process_is_seen(tmp_path, start):
    (tmp_path / "log").mkdir()
    with held(tmp_path / "log" / "lock"), pytest.raises(EventLogError, match="another mgpu"):
        start()
    start()


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Have another process hold it."""
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        " print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline() == b"held\n"
        yield
        holder.stdin.close()


async def test_a_directory_that_cannot_be_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EventLogError, match=r"cannot use .*file.*: Not a directory"):
        Run(tmp_path / "file" / "log").open()


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Have the kernel limit how large a file may get: a write beyond is cut short, then fails.

    It holds for the whole process: nothing but the log may write meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_on_a_full_disk_the_run_goes_on_and_the_gap_is_told(start, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_RETRY_S", 0)
    run = start()
    run.append()
    (segment,) = segments(tmp_path)
    size = segment.stat().st_size
    with file_limit(size + 20):
        run.append()
    assert segment.stat().st_size == size, "no torn line is left"
    with file_limit(10):
        run.append()
        run.append()
    assert run.log.lost == 3
    run.append()  # this one finds out that it can be written again, and is in the state
    run.append()
    first, second = segments(tmp_path)
    assert [line.get("seq") for line in lines(first)] == [None, 1]
    header, gap, event = lines(second)
    assert header["state"] == {"seq": 5}
    crc = zlib.crc32(b'{"gap":4,"first":2,"last":5}')
    assert gap == {"gap": 4, "first": 2, "last": 5, "crc": f"{crc:08x}"}
    assert event["seq"] == 6
    assert run.log.lost == 4


async def test_a_full_disk_is_tried_again_only_now_and_then(start):
    run = start()
    asked = []
    run.log._snapshot = lambda: (asked.append(True) or {}, {})
    with file_limit(10):
        for _ in range(100):
            run.append()
    assert len(asked) <= 1
    assert run.log.lost == 100


async def test_a_gap_at_the_end_of_a_run_is_told_at_its_close(start, tmp_path):
    run = start()
    with file_limit(10):
        run.append()
        run.append()
    await run.log.close()
    assert lines(segments(tmp_path)[-1])[1]["gap"] == 2


async def test_a_segment_that_cannot_be_followed_is_written_on(start, tmp_path):
    run = start()
    (segment,) = segments(tmp_path)
    (tmp_path / "log" / "events-r1-0000000002.jsonl").mkdir()
    run.append(FULL)
    run.append()
    assert [line.get("seq") for line in lines(segment)] == [None, 1, 2]
    assert run.log.lost == 0


@pytest.fixture
def synced(monkeypatch):
    """Record the size of each file that was synced; the real call is made."""
    sizes = []
    real = os.fdatasync

    def record(descriptor: int) -> None:
        real(descriptor)
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fdatasync", record)
    return sizes


async def until_synced(synced: list[int], size: int) -> None:
    async with asyncio.timeout(20):
        while size not in synced:  # noqa: ASYNC110 - a thread adds to it
            await asyncio.sleep(0.01)


async def test_each_line_is_synced_without_being_asked(start, tmp_path, synced):
    run = start(fsync="each")
    for _ in range(3):
        run.append()
        await until_synced(synced, segments(tmp_path)[0].stat().st_size)


async def test_lines_of_an_interval_are_synced_together(start, tmp_path, synced):
    run = start(fsync=0.3)
    for _ in range(1000):
        run.append()
    await until_synced(synced, segments(tmp_path)[0].stat().st_size)
    assert len(synced) <= 2


async def test_never_is_never(start, tmp_path, synced):
    run = start(fsync="never")
    run.append(FULL)
    run.append()
    await run.log.close()
    assert synced == []


async def test_closing_syncs_what_is_left_the_closed_segments_too(start, tmp_path, synced):
    run = start(fsync=3600)
    run.append(FULL)
    run.append()
    await run.log.close()
    assert sorted(synced) == sorted(s.stat().st_size for s in segments(tmp_path))


async def test_a_failing_sync_does_not_end_the_log(start, tmp_path, monkeypatch, caplog):
    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    run = start(fsync="each")
    run.append()
    async with asyncio.timeout(20):
        while "not synced: Input/output error" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    run.append()
    assert lines(segments(tmp_path)[0])[-1]["seq"] == 2


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_descriptor_is_left_open(tmp_path):
    before = open_descriptors()
    for fsync in ("each", "never", 3600):
        run = Run(tmp_path / "log", str(fsync), fsync=fsync).open()
        run.append(FULL)
        run.append(FULL)
        await run.log.sync()
        await run.log.close()
    assert open_descriptors() == before


async def test_a_line_costs_the_event_loop_tens_of_microseconds(start):
    run = start(rotate_mib=64)
    event = {"type": "Request", "request": "r5", "consumer": "mvoice", "kind": "tts"}
    best = min(_cost_s(run, event, 1000) for _ in range(5))
    assert best < 200e-6


def _cost_s(run: Run, event: dict, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run.append(event)
    return (time.perf_counter() - start) / count


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/mgpu:/var/lib/other"}, Path("/var/lib/mgpu")),
        ({"XDG_STATE_HOME": "/state"}, Path("/state/mgpu")),
        ({"XDG_STATE_HOME": "not/absolute"}, Path.home() / ".local/state/mgpu"),
        ({}, Path.home() / ".local/state/mgpu"),
    ],
)
def test_the_directory_is_systemds_else_in_the_users_state_home(environ, directory):
    assert default_dir(environ) == directory


WORDS = st.text(st.characters(exclude_categories=[]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(WORDS, VALUES, max_size=4))
def test_a_line_is_ascii_as_the_standard_library_writes_it(note):
    members = {"seq": 17, "at": 18, "event": {"type": "Tick"}, "effects": [], "notes": [note]}
    document = json.dumps(members, separators=(",", ":")).encode("ascii")

    line = encode_line(**members)

    assert line == b'%b,"crc":"%08x"}\n' % (document[:-1], zlib.crc32(document))


async def test_a_segment_that_began_while_others_wait_to_be_tidied_is_left_alone(
    start, tmp_path, monkeypatch
):
    """All threads are at work for somebody else, and the run goes on for two segments."""
    monkeypatch.setattr(writing, "SEGMENT_EVENTS", 3)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
    free = threading.Event()
    at_work = loop.run_in_executor(None, free.wait)
    run = start()
    await asyncio.sleep(0)  # its keeper asks for a thread
    for _ in range(7):
        run.append()
    free.set()
    await at_work
    await eventually(lambda: len(list((tmp_path / "log").glob("*.jsonl"))) <= 1)
    run.append()
    await run.log.close()
    kept = [item.seq for item in read(tmp_path / "log") if isinstance(item, Record)]
    assert kept == list(range(1, 9))
