r"""What stands in a segment: ASCII, LF, one JSON object per line.

1. A header: `{"log":"mgpu","format":1,"mgpu":VERSION,"run":RUN,"config":{...},"state":{...}}`,
   where `state` is the one before the segment's first event, so that it replays alone.
2. One line per event, keys in this order:
   `{"seq":17,"at":...,"event":{...},"effects":[...],"notes":[...],"crc":"9ae1f03b"}`.
3. Could events not be written (disk full, input/output error), the log goes on in a new segment,
   whose header holds the state after them and whose second line tells of them:
   `{"gap":COUNT,"first":SEQ,"last":SEQ,"crc":"..."}`.

`crc` is the last member of every line: the CRC-32 (zlib's), eight hexadecimal digits, over the line
without that member, which is its bytes before `,"crc":` and a closing `}`. Only a header may be
without one.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple, TypeAlias

import orjson
from attrs import field, frozen

from mgpu_core import upcast
from mgpu_core.codec import CodecError, decode_config, decode_state
from mgpu_core.config import Config
from mgpu_core.replay import Record
from mgpu_core.state import State

Json: TypeAlias = Mapping[str, Any]
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, check_circular=False).encode
# Of whole numbers of more than 64 bits orjson makes floats.
_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LARGE = b"0" * 19
_CRC_BYTES = len(b',"crc":"9ae1f03b"}\n')
_NOT_AS_WRITTEN = "its checksum is not that of its bytes"
_HEADER = {"log", "format", "mgpu", "run", "config", "state"}


class EventLogError(Exception):
    """The log can't be used; the message is for the operator and says what to do."""


class Place(NamedTuple):
    """Where in a log: bytes before the line (of a compressed file: uncompressed), lines from 1."""

    file: str
    offset: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}: byte {self.offset}, line {self.line}"


class CorruptLogError(EventLogError):
    """Something in it is not as it was written."""

    def __init__(self, place: Place, reason: str) -> None:
        super().__init__(f"{place}: {reason}; --salvage goes on after it")
        self.place = place
        self.reason = reason


class BadLineError(ValueError):
    """It is not what was written; the message says why."""


# ------------------------------------------------------------------------- what a log consists of


@frozen(kw_only=True)
class Segment:
    """A header: all that follows, up to the next one, replays from its state.

    `config` and `state` raise EventLogError where this version can't read them.
    """

    place: Place
    mgpu: str
    run: str
    encoded_config: Json = field(repr=False)
    encoded_state: Json = field(repr=False)

    @property
    def config(self) -> Config:
        with self._readable():
            return decode_config(self.encoded_config)

    @property
    def state(self) -> State:
        with self._readable():
            return decode_state(self.encoded_state)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except CodecError as error:
            raise EventLogError(
                f"{self.place.file}: {error}; mgpu {self.mgpu} wrote it, read it with that version"
            ) from error


@frozen(kw_only=True)
class Gap:
    """Events that are not in the log; the state of the header before it is the one after them.

    `recorded`: the log says itself that it could not hold them.
    """

    first: int
    last: int
    recorded: bool


@frozen(kw_only=True)
class Torn:
    """The end of a file, where writing was cut off: `size` bytes from `place` on are no lines."""

    place: Place
    size: int
    reason: str


@frozen(kw_only=True)
class Skipped:
    """Damage that was passed over: `size` bytes in `lines` lines, from `place` on.

    What the state is after it is unknown, up to the next segment.
    """

    place: Place
    size: int
    lines: int
    reason: str


# --------------------------------------------------------------------------------------- writing


def encode_header(mgpu: str, run: str, config: Json, state: Json) -> bytes:
    """Give the first line of a segment, whose first event happens in this state."""
    head = {"log": "mgpu", "format": upcast.format_now(), "mgpu": mgpu, "run": run}
    return _line({**head, "config": config, "state": state})


def encode_line(
    seq: int, at: int, event: Json, effects: Sequence[Json], notes: Sequence[Json]
) -> bytes:
    """Give the line of one event, as it stands in a segment."""
    return _line({"seq": seq, "at": at, "event": event, "effects": effects, "notes": notes})


def encode_gap(first: int, last: int) -> bytes:
    """Give the line that tells of events that could not be written."""
    return _line({"gap": last - first + 1, "first": first, "last": last})


def _line(members: Json) -> bytes:
    """Encode it as `json` does, which takes several times as long for what many notes explain.

    Only what is not printable ASCII, and whole numbers of more than 64 bits, orjson writes
    otherwise or not at all.
    """
    try:
        document = orjson.dumps(members)
    except orjson.JSONEncodeError:
        document = b""
    if not document.isascii() or b"\x7f" in document or not document:
        document = _encode(members).encode("ascii")
    return b'%b,"crc":"%08x"}\n' % (document[:-1], zlib.crc32(document))


# --------------------------------------------------------------------------------------- reading


def decode_line(line: bytes, place: Place) -> Segment | Record | Gap:
    """Read one line, with its LF. Raises BadLineError, and EventLogError for a newer format."""
    record = decode_record(line)
    if record is not None:
        return record
    if not line.endswith(b"\n"):
        raise BadLineError("the line has no end")
    checked = is_whole(line)
    if not checked and not line.startswith(b'{"log"'):
        raise BadLineError(_NOT_AS_WRITTEN)
    try:
        data = _parse(line)
    except ValueError as error:
        raise BadLineError(f"it is no JSON: {error}" if checked else _NOT_AS_WRITTEN) from error
    match data:
        case {"log": _}:
            return _decode_header(data, place, checked=checked)
        case {"gap": _, "first": first, "last": last} if checked:
            return Gap(first=first, last=last, recorded=True)
    raise BadLineError("it is neither a header nor an event of a log")


def decode_record(line: bytes) -> Record | None:
    """Read the line of an event; None: it is another one, or not as it was written."""
    if not is_whole(line):
        return None
    try:
        data = _parse(line)
        return Record(data["seq"], data["at"], data["event"], data["effects"], data["notes"])
    except (ValueError, TypeError, KeyError):
        return None


def _parse(line: bytes) -> Any:
    """Read the JSON of a line, ever so large numbers and halves of characters included."""
    if _LARGE not in line.translate(_AS_ZEROS):
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            pass  # as it knows no half of a character
    return json.loads(line)


def is_whole(line: bytes) -> bool:
    """Say whether the checksum of a line is that of its bytes."""
    document, crc = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    return crc == b',"crc":"%08x"}\n' % zlib.crc32(b"}", zlib.crc32(document))


def _decode_header(data: dict[str, Any], place: Place, *, checked: bool) -> Segment:
    if not checked and data.keys() != _HEADER:  # one without a checksum has these members
        raise BadLineError(_NOT_AS_WRITTEN)
    written = data.get("format")
    if data["log"] != "mgpu" or type(written) is not int or written < 1:
        raise BadLineError("it is no header of a log of mgpu")
    if written > upcast.format_now():
        raise EventLogError(
            f"{place.file} has format {written}, written by mgpu {data.get('mgpu')}; mgpu"
            f" {version('mgpu')} reads formats up to {upcast.format_now()}: read it with that"
            " version or a later one"
        )
    header = upcast.header(data, written)
    try:
        return Segment(
            place=place,
            mgpu=header["mgpu"],
            run=header["run"],
            encoded_config=header["config"],
            encoded_state=header["state"],
        )
    except KeyError as error:
        raise BadLineError(f"it is no header of a log of mgpu: {error} is missing") from error
