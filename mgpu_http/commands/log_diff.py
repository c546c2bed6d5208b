"""`mgpu log diff`: what changed between two points of a log."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import frozen

from mgpu_core.codec import encode_state
from mgpu_http.commands.log_words import clock, date_and_clock, duration
from mgpu_http.commands.logs import Source, There
from mgpu_http.commands.output import DONE, document, result

Json: TypeAlias = Any
Path: TypeAlias = tuple[str, ...]
ABSENT = object()
# They change all the time and say nothing that the rest does not.
ROUTINE = {
    "arrivals",
    "at",
    "last_done",
    "last_probe",
    "last_work",
    "taken",
    "touched",
    "uncounted",
    "wake",
}
# What there is of each request that waits comes and goes with it.
OF_REQUESTS = {"overtaken", "overtaken_high", "reasons"}
TIMES = {
    "began",
    "busy_seen",
    "deadline",
    "done",
    "granted",
    "idle_since",
    "last_used",
    "moved",
    "sample_at",
    "settle_until",
    "since",
    "unloaded",
    "until",
}
LONGEST = 90


def diff(arguments: Namespace) -> int:
    source = Source.of(arguments)
    before = source.there(source.point(arguments.a))
    after = source.silent().there(source.point(arguments.b))
    found = list(changes(encode_state(before.state), encode_state(after.state)))
    if arguments.json:
        places = {"a": _place(before), "b": _place(after)}
        document({**places, "changes": [change.encoded() for change in found]})
    else:
        result("\n".join([headline(before, after), *lines(found)]))
    return DONE


@frozen
class Change:
    """One value that is another one; ABSENT where it is not there at all."""

    path: Path
    before: Json
    after: Json

    def encoded(self) -> dict[str, Json]:
        sides = {"a": self.before, "b": self.after}
        return {"path": self.path, **{k: v for k, v in sides.items() if v is not ABSENT}}


def changes(before: Json, after: Json, path: Path = ()) -> Iterator[Change]:
    """Compare two encoded states, down to what can't be taken apart any more."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        if before != after:
            yield Change(path, before, after)
        return
    for key in dict.fromkeys([*before, *after]):
        yield from changes(before.get(key, ABSENT), after.get(key, ABSENT), (*path, key))


def _place(there: There) -> dict[str, int]:
    return {"seq": there.record.seq, "at": there.record.at}


# ------------------------------------------------------------------------------------- for people


def headline(before: There, after: There) -> str:
    a, b = before.record, after.record
    events = f"{b.seq - a.seq} event{'' if b.seq - a.seq == 1 else 's'}"
    return (
        f"from event {a.seq} ({date_and_clock(a.at)}) to event {b.seq} ({clock(b.at)}):"
        f" {events}, {duration(b.at - a.at)}"
    )


def lines(found: Sequence[Change]) -> Iterator[str]:
    """Say it a line for each change; of what changes all the time only how much there is of it."""
    told = [change for change in found if not _is_routine(change)]
    width = max((len(".".join(change.path)) for change in told), default=0)
    for change in told:
        yield f"  {'.'.join(change.path):<{min(width, 40)}}  {_told(change)}"
    if not told:
        yield "  nothing"
    if hidden := len(found) - len(told):
        yield f"  and {hidden} counts and times, which --json shows"


def _is_routine(change: Change) -> bool:
    one_sided = change.before is ABSENT or change.after is ABSENT
    return change.path[-1] in ROUTINE or (one_sided and change.path[0] in OF_REQUESTS)


def _told(change: Change) -> str:
    before, after = change.before, change.after
    if change.path[0] == "requests" and len(change.path) == 2:
        which, request = ("gone", before) if after is ABSENT else ("new", after)
        return f"{which}: of {request['consumer']}, {request['phase']}"
    if before is ABSENT:
        return _cut(f"new: {_value(change.path, after)}")
    if after is ABSENT:
        return _cut(f"gone: {_value(change.path, before)}")
    if isinstance(before, list) and isinstance(after, list):
        return _lists(before, after)
    return _cut(f"{_value(change.path, before)} -> {_value(change.path, after)}")


def _lists(before: list[Json], after: list[Json]) -> str:
    came = [str(item) for item in after if item not in before]
    went = [str(item) for item in before if item not in after]
    words = [f"+ {' '.join(came)}" if came else "", f"- {' '.join(went)}" if went else ""]
    if not came and not went:
        words = [f"in another order: {' '.join(map(str, after))}"]
    return _cut("  ".join(word for word in words if word)) + f"  ({len(before)} -> {len(after)})"


def _value(path: Path, value: Json) -> str:
    name = path[-1]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if name in TIMES and isinstance(value, int):
        return clock(value) if value >= 0 else "never"
    if name.endswith("_us") and isinstance(value, int):
        return duration(value)
    if isinstance(value, Mapping):
        inner = {key: item for key, item in value.items() if item not in (None, [], {}, False)}
        return ", ".join(f"{key} {_value((key,), item)}" for key, item in inner.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
