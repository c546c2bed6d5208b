"""What becomes of closed segments: set aside where torn, compressed, removed; whatever comes
between.
"""

import gzip
import os
import threading
import time
from pathlib import Path

import pytest

from mgpu_effects.event_log import Torn, keeping, read
from mgpu_effects.event_log.files import named
from mgpu_effects.event_log.format import Place
from mgpu_effects.event_log.keeping import Written, set_aside, tidy
from mgpu_effects.settings import EventLogSettings
from tests.support.logs import history, write_log

DAY_S = 86_400


NOBODY_WRITES = Written("another run", 1)


def keep(directory: Path, current: Path | None = None, **settings: object) -> None:
    settings = {"rotate_mib": 1, "keep_mib": 100, **settings}
    written = Written(*(named(current) or ("", 0))) if current else NOBODY_WRITES
    tidy(directory, written, EventLogSettings(**settings), threading.Event())  # type: ignore[arg-type]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_closed_segments_are_compressed_and_the_current_one_is_not(tmp_path: Path) -> None:
    paths = write_log(tmp_path, history(), per_segment=50)
    before = [path.read_bytes() for path in paths]
    then = time.time() - DAY_S
    os.utime(paths[0], (then, then))
    keep(tmp_path, paths[-1])
    assert names(tmp_path) == [*(f"{path.name}.gz" for path in paths[:-1]), paths[-1].name]
    for path, content in zip(paths[:-1], before, strict=False):
        packed = path.with_name(path.name + ".gz")
        assert gzip.decompress(packed.read_bytes()) == content
        assert packed.stat().st_size < len(content) / 3
        assert packed.stat().st_mode & 0o777 == 0o600
    packed = paths[0].with_name(paths[0].name + ".gz")
    assert packed.stat().st_mtime == pytest.approx(then, abs=1), "its age is that of its events"


STEPS = ("open", "fsync", "utime", "rename", "unlink")


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_while_compressing_loses_nothing_and_leaves_no_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """At each step that changes something on the disk; the next run puts it in order."""
    write_log(tmp_path, history(), per_segment=50)
    whole = list(read(tmp_path))

    class Killed(BaseException):
        pass

    def killed(*_args: object, **_more: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path if step in {"rename", "unlink"} else os, step, killed)
        with pytest.raises(Killed):
            keep(tmp_path)
    assert seqs_of(tmp_path) == [item.seq for item in whole if hasattr(item, "seq")]
    keep(tmp_path)
    assert seqs_of(tmp_path) == [item.seq for item in whole if hasattr(item, "seq")]
    assert all(name.endswith(".jsonl.gz") for name in names(tmp_path))


def seqs_of(directory: Path) -> list[int]:
    return [item.seq for item in read(directory) if hasattr(item, "seq")]


def test_a_full_disk_leaves_the_segment_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = write_log(tmp_path, history())

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping.os, "fsync", full)
    keep(tmp_path)
    assert names(tmp_path) == [path.name]
    assert "not compressed: [Errno 28] No space left on device" in caplog.text


def test_it_stops_when_the_broker_ends(tmp_path: Path) -> None:
    (path,) = write_log(tmp_path, history())
    ending = threading.Event()
    ending.set()
    tidy(tmp_path, NOBODY_WRITES, EventLogSettings(), ending)
    assert names(tmp_path) == [path.name]


def test_the_oldest_go_when_there_are_too_many_bytes(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"events-r1-{number:010d}.jsonl.gz"
        path.write_bytes(bytes(2**20))
        os.utime(path, (time.time() - 100 + number,) * 2)
    current = tmp_path / "events-r1-0000000009.jsonl"
    current.write_bytes(b"")
    keep(tmp_path, current, keep_mib=3)
    assert names(tmp_path) == [
        "events-r1-0000000003.jsonl.gz",
        "events-r1-0000000004.jsonl.gz",
        current.name,
    ]


def test_old_ones_go_by_age_and_other_files_never(tmp_path: Path) -> None:
    days = {
        "events-r0-0000000001.jsonl.gz": 3,
        "events-r0-0000000001.jsonl.torn": 3,
        "events-r0-0000000009.jsonl.gz": 1,
        "events-r0-0000000009.jsonl.gz.part": 1,
        "notes.txt": 1000,
    }
    for name, age in days.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age * DAY_S,) * 2)
    keep(tmp_path, keep_days=2)
    assert names(tmp_path) == ["events-r0-0000000009.jsonl.gz", "notes.txt"]


def test_a_torn_end_is_kept_beside_and_the_segment_cut(tmp_path: Path) -> None:
    (path,) = write_log(tmp_path, history().first(10))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq":11,')
    *_, torn = read(path)
    assert isinstance(torn, Torn)
    beside = set_aside(torn)
    assert beside.name == f"{path.name}.torn"
    assert beside.read_bytes() == b'{"seq":11,'
    assert beside.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == whole


def test_a_segment_that_is_torn_in_its_header_is_kept_beside_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "events-r1-0000000001.jsonl"
    path.write_bytes(b'{"log":')
    set_aside(Torn(place=Place(str(path), 0, 1), size=7, reason="the line has no end"))
    assert names(tmp_path) == [f"{path.name}.torn"]
