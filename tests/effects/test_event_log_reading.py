"""A log read back: all of it, from somewhere in it, and when it is damaged."""

import gzip
import io
import sys
import zlib
from pathlib import Path

import pytest

from mgpu_core import upcast
from mgpu_core.codec import CodecError, decode_event, encode_event
from mgpu_core.events import Tick
from mgpu_core.replay import Record, Replay, first_difference
from mgpu_effects.event_log import (
    CorruptLogError,
    EventLogError,
    Gap,
    Item,
    Segment,
    Skipped,
    Torn,
    encode_gap,
    encode_line,
    read,
)
from mgpu_effects.event_log.files import segment_files
from mgpu_effects.event_log.format import Place, decode_line
from tests.support.logs import header, history, lines, write_log

STEPS = len(history().steps)


def records(items: list[Item]) -> list[Record]:
    return [item for item in items if isinstance(item, Record)]


def seqs(items: list[Item]) -> list[int]:
    return [record.seq for record in records(items)]


def compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


# ---------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("packed", [False, True])
def test_a_log_is_read_as_it_was_written_and_replays(tmp_path: Path, packed: bool) -> None:
    told = history()
    paths = write_log(tmp_path / "log", told, per_segment=20)
    assert len(paths) > 2
    if packed:
        paths = [compress(path) for path in paths[:-1]]
    replay = Replay()
    number = 0
    for item in read(tmp_path / "log"):
        if isinstance(item, Segment):
            if replay.state is not None:
                assert item.state == replay.state, "a header is the fold of what is before it"
            assert (item.run, item.mgpu, item.config) == ("r1", "0.1.0", told.config)
            replay.begin(item.state)
        else:
            assert isinstance(item, Record)
            event, transition = told.steps[number]
            number += 1
            assert (item.seq, item.at) == (number, transition.state.at)
            assert item.event == encode_event(event)
            assert replay.step(item) is None
            assert replay.state == transition.state
    assert number == STEPS


@pytest.mark.parametrize(
    "odd", ["\ud800", "\x7f", "\u00e9", '"notes":[', 2**64 - 1, 2**64, -(2**70)]
)
def test_whatever_an_event_holds_is_read_as_it_was_written(odd: object) -> None:
    """Not all of it is JSON to every library, and some take a large number for another."""
    event, effect = {"type": "Request", "request": odd}, {"type": "Probe", "consumer": odd}
    line = encode_line(1, 2, event, [effect], [{"type": "Odd", "x": odd}])
    assert line.isascii()
    item = decode_line(line, Place("x", 0, 2))
    assert isinstance(item, Record)
    assert item.event == event
    assert item.effects == [effect]
    assert item.notes == [{"type": "Odd", "x": odd}]


def test_one_file_and_standard_input_are_logs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = write_log(tmp_path / "log", history(), per_segment=20)
    assert seqs(list(read(second))) == list(range(21, 41))
    both = io.BytesIO(first.read_bytes() + second.read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(both))
    assert seqs(list(read("-"))) == list(range(1, 41))


def test_runs_come_in_the_order_in_which_they_were(tmp_path: Path) -> None:
    log = tmp_path / "log"
    states = history().states
    for run, (start, end) in {"zz": (0, 20), "m": (20, 40), "a": (40, 50)}.items():
        write = header(states[start], run) + b"".join(lines(history().steps[start:end]))
        log.mkdir(exist_ok=True)
        (log / f"events-{run}-0000000001.jsonl").write_bytes(write)
    runs = [item.run for item in read(log) if isinstance(item, Segment)]
    assert runs == ["zz", "m", "a"]


def test_a_segment_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    """The broker was killed between the two steps of compressing it."""
    first, *_ = write_log(tmp_path / "log", history(), per_segment=20)
    plain = first.read_bytes()
    compress(first)
    first.write_bytes(plain)
    assert seqs(list(read(tmp_path / "log"))) == list(range(1, STEPS + 1))


def test_a_segment_that_is_compressed_meanwhile_is_found(tmp_path: Path) -> None:
    write_log(tmp_path / "log", history(), per_segment=20)
    items = read(tmp_path / "log")
    next(items)
    for file in segment_files(tmp_path / "log")[1:]:
        compress(file.path)
    assert len(records(list(items))) == STEPS


def test_a_segment_that_is_removed_meanwhile_is_a_gap(tmp_path: Path) -> None:
    write_log(tmp_path / "log", history(), per_segment=20)
    items = read(tmp_path / "log")
    next(items)
    segment_files(tmp_path / "log")[1].path.unlink()
    rest = list(items)
    assert Gap(first=21, last=40, recorded=False) in rest
    assert len(records(rest)) == STEPS - 20


def test_a_gap_that_the_log_tells_of_is_told(tmp_path: Path) -> None:
    told = history()
    write_log(tmp_path / "log", told.first(10))
    rest = header(told.states[15]) + encode_gap(11, 15) + b"".join(lines(told.steps[15:20], 16))
    (tmp_path / "log" / "events-r1-0000000016.jsonl").write_bytes(rest)
    items = list(read(tmp_path / "log"))
    assert [item for item in items if isinstance(item, Gap)] == [
        Gap(first=11, last=15, recorded=True)
    ]
    assert seqs(items) == [*range(1, 11), *range(16, 21)]


def test_a_segment_that_somebody_removed_is_a_gap_too(tmp_path: Path) -> None:
    _, second, *_ = write_log(tmp_path / "log", history(), per_segment=20)
    second.unlink()
    items = list(read(tmp_path / "log"))
    assert Gap(first=21, last=40, recorded=False) in items
    assert len(records(items)) == STEPS - 20


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_where_there_is_no_log_that_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EventLogError, match=name):
        list(read(tmp_path / name))


# ---------------------------------------------------------------------------------------- a part


@pytest.mark.parametrize("seq", [1, 20, 21, 40, 41, STEPS])
def test_reading_begins_with_the_segment_of_an_event(tmp_path: Path, seq: int) -> None:
    write_log(tmp_path / "log", history(), per_segment=20)
    items = list(read(tmp_path / "log", seq=seq))
    assert isinstance(items[0], Segment)
    first = seqs(items)[0]
    assert first <= seq < first + 20
    assert first_difference(items[0].state, records(items)) is None


def test_reading_begins_with_the_segment_of_a_time(tmp_path: Path) -> None:
    for path in write_log(tmp_path / "log", history(), per_segment=20)[:2]:
        compress(path)
    times = [transition.state.at for _, transition in history().steps]
    for at in times:
        first = seqs(list(read(tmp_path / "log", at=at)))[0]
        last_until_then = sum(time <= at for time in times)
        assert first <= last_until_then < first + 20
    assert seqs(list(read(tmp_path / "log", at=0)))[0] == 1


def test_no_more_than_the_segments_from_there_on_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_log(tmp_path / "log", history(), per_segment=2)
    looked_at = []
    real = Path.open

    def opened(path: Path, *mode: str) -> io.IOBase:
        looked_at.append(path)
        return real(path, *mode)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "open", opened)
    next(iter(read(tmp_path / "log", at=history().steps[-1][1].state.at)))
    assert len(paths) > 16
    assert len(set(looked_at)) <= 2 + len(paths).bit_length()


def test_a_log_is_followed_as_it_grows(tmp_path: Path) -> None:
    log, told = tmp_path / "log", history()
    all_lines = list(lines(told.steps))
    log.mkdir()
    first, second = log / "events-r1-0000000001.jsonl", log / "events-r1-0000000004.jsonl"
    first.write_bytes(header(told.states[0]) + all_lines[0])
    half = len(all_lines[1]) // 2
    grows = iter(
        [
            lambda: append(first, all_lines[1][:half]),
            lambda: append(first, all_lines[1][half:] + all_lines[2]),
            lambda: second.write_bytes(header(told.states[3]) + all_lines[3]),
            lambda: append(second, all_lines[4]),
        ]
    )

    def follow() -> bool:
        grow = next(grows, None)
        if grow is not None:
            grow()
        return grow is not None

    items = list(read(log, follow=follow))
    assert seqs(items) == [1, 2, 3, 4, 5]
    assert not any(isinstance(item, Torn) for item in items)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# -------------------------------------------------------------------------------------- damaged


def ends(data: bytes) -> list[int]:
    """Give where the header ends, and each event after it."""
    return [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]


def test_a_log_that_was_cut_off_anywhere_in_its_end_can_be_read(tmp_path: Path) -> None:
    """At every byte of its last three lines."""
    told = history().first(30)
    (path,) = write_log(tmp_path / "log", told)
    whole = path.read_bytes()
    for size in range(ends(whole)[-4], len(whole) + 1):
        path.write_bytes(whole[:size])
        items = list(read(path))
        events = sum(end <= size for end in ends(whole)) - 1
        assert seqs(items) == list(range(1, events + 1))
        torn = [(i.place.offset, i.size) for i in items if isinstance(i, Torn)]
        kept = ends(whole)[events]
        assert torn == ([(kept, size - kept)] if size > kept else [])


def test_a_log_that_was_cut_off_in_its_header_has_nothing_in_it(tmp_path: Path) -> None:
    (path,) = write_log(tmp_path / "log", history().first(1))
    head = path.read_bytes().splitlines()[0]
    for size in (1, 10, len(head)):
        path.write_bytes(head[:size])
        (torn,) = read(path)
        assert isinstance(torn, Torn)
        assert (torn.place.offset, torn.size) == (0, size)
    path.write_bytes(b"")
    assert list(read(path)) == []


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


@pytest.mark.parametrize(("line", "every"), [(1, 13), (5, 1)])
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, line: int, every: int) -> None:
    """In every byte of a line in the middle, its LF included, and in some of the header."""
    (path,) = write_log(tmp_path / "log", history().first(8))
    whole = path.read_bytes()
    start, end = [0, *ends(whole)][line - 1 : line + 1]
    for offset in range(start, end, every):
        path.write_bytes(flipped(whole, offset, offset % 8))
        with pytest.raises(CorruptLogError) as found:
            list(read(path))
        assert found.value.place == (str(path), start, line)
        assert f"{path}: byte {start}, line {line}: " in str(found.value)
        assert "--salvage" in str(found.value)


def test_salvage_goes_on_after_the_damage_and_says_what_it_skipped(tmp_path: Path) -> None:
    (path,) = write_log(tmp_path / "log", history().first(8))
    whole = path.read_bytes()
    start, end = ends(whole)[3:5]
    path.write_bytes(flipped(whole, start + 7, 3))
    items = list(read(path, salvage=True))
    assert seqs(items) == [1, 2, 3, 5, 6, 7, 8]
    (skipped,) = [item for item in items if isinstance(item, Skipped)]
    assert skipped.place == (str(path), start, 5)
    assert (skipped.size, skipped.lines) == (end - start, 1)
    assert items.index(skipped) == 4, "where it is"


def test_a_damaged_end_of_a_segment_is_corruption_when_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    first, *_ = write_log(tmp_path / "log", history().first(40), per_segment=20)
    whole = first.read_bytes()
    start = ends(whole)[-2]
    first.write_bytes(flipped(whole, start + 3, 0))
    with pytest.raises(CorruptLogError, match="event 20 has to come here") as found:
        list(read(tmp_path / "log"))
    assert found.value.place == (str(first), start, 21)
    items = list(read(tmp_path / "log", salvage=True))
    assert Gap(first=20, last=20, recorded=False) in items
    assert len(records(items)) == 39


def test_a_line_that_somebody_took_out_is_corruption(tmp_path: Path) -> None:
    (path,) = write_log(tmp_path / "log", history().first(8))
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:4], *whole[5:]]))
    with pytest.raises(CorruptLogError, match="event 4 has to come here, not 5"):
        list(read(path))
    *_, skipped, _, _, _, _ = list(read(path, salvage=True))
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "event 4 has to come here, not 5"


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_damage_to_a_compressed_segment_is_corruption(tmp_path: Path, harm: str) -> None:
    (path,) = write_log(tmp_path / "log", history().first(20))
    path = compress(path)
    packed = path.read_bytes()
    middle = len(packed) // 2
    path.write_bytes(packed[:middle] if harm == "cut" else flipped(packed, middle, 4))
    with pytest.raises(CorruptLogError, match=str(path)):
        list(read(path))
    items = list(read(path, salvage=True))
    assert isinstance(items[-1], Skipped)


def test_lines_of_events_alone_are_no_log(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(lines(history().steps[:3])))
    with pytest.raises(CorruptLogError, match="line 1: a log begins with a header"):
        list(read(path))


def test_a_line_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgpu_effects.event_log.reading.LINE_LIMIT_BYTES", 10_000)
    path = tmp_path / "log.jsonl"
    path.write_bytes(header(history().states[0]) + b"x" * 100_000)
    *_, torn = read(path)
    assert isinstance(torn, Torn)
    assert torn.size == 100_000


# ----------------------------------------------------------------------------------- other times


def test_a_log_of_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    later = header(history().states[0]).replace(b'"format":1', b'"format":9')
    path.write_bytes(checked(later))
    with pytest.raises(EventLogError) as refused:
        list(read(path))
    assert "format 9, written by mgpu 0.1.0" in str(refused.value)
    assert "reads formats up to 1: read it with that version or a later one" in str(refused.value)


def checked(line: bytes) -> bytes:
    """Give the line with a checksum that fits."""
    document = line[: line.rindex(b',"crc":')]
    return document + b',"crc":"%08x"}\n' % zlib.crc32(document + b"}")


def test_a_header_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    line = header(history().states[0])
    path.write_bytes(line[: line.rindex(b',"crc":')] + b"}\n" + b"".join(lines(history().steps)))
    assert seqs(list(read(path))) == list(range(1, STEPS + 1))


def test_a_header_that_this_version_cannot_decode_says_who_can(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    line = header(history().states[0]).replace(b'"epoch":', b'"epochs":')
    path.write_bytes(checked(line))
    (segment,) = read(path)
    assert isinstance(segment, Segment)
    with pytest.raises(EventLogError, match=r"state: unknown field 'epochs'; mgpu 0\.1\.0 wrote"):
        _ = segment.state


def test_what_an_earlier_version_wrote_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if Tick had once been told whose clock it was, and the state had had another name."""
    told = history()
    path = tmp_path / "log.jsonl"
    old = [
        line.replace(b'{"type":"Tick"}', b'{"type":"Tick","clock":1}') for line in lines(told.steps)
    ]
    assert any(b'"clock"' in line for line in old)
    head = header(told.states[0]).replace(b'"state":{"config"', b'"state":{"settings"')
    path.write_bytes(b"".join(map(checked, [head, *old])))
    with pytest.raises(EventLogError, match="settings"):
        replayed(path)

    def without_clock(data: upcast.Json) -> upcast.Json:
        return {key: value for key, value in data.items() if key != "clock"}

    def renamed(data: upcast.Json) -> upcast.Json:
        state = {**data["state"], "config": data["state"]["settings"]}
        del state["settings"]
        return {**data, "state": state}

    monkeypatch.setattr(upcast, "FORMATS", [renamed])
    with pytest.raises(CodecError, match="unknown field 'clock'"):
        replayed(path)
    monkeypatch.setitem(upcast.SHAPES, "Tick", (without_clock,))
    assert replayed(path) == STEPS

    tick = next(event for event, _ in told.steps if isinstance(event, Tick))
    assert encode_event(tick) == {"type": "Tick", "version": 2}, "what is written from then on"
    assert decode_event(encode_event(tick), tick.at) == tick
    with pytest.raises(CodecError, match="version 3 is unknown"):
        decode_event({"type": "Tick", "version": 3}, 0)
    assert header(told.states[0]).startswith(b'{"log":"mgpu","format":2,')


def replayed(path: Path) -> int:
    """Replay it exactly; give the number of its events."""
    segment, *rest = read(path)
    assert isinstance(segment, Segment)
    assert first_difference(segment.state, records(rest)) is None
    return len(rest)
