"""What stands in a log, in a few words: events, decisions, times, what a consumer's memory is."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from mgpu_core import effects as fx
from mgpu_core import events as ev
from mgpu_core.state import Residency, State
from mgpu_core.telling import awaited

Json = Mapping[str, Any]
# What a cell of a consumer shows; with the number of requests it serves.
RESIDENCY = {
    Residency.ABSENT: "-",
    Residency.LOADING: "loading",
    Residency.RESIDENT: "in",
    Residency.UNLOADING: "leaving",
    Residency.UNKNOWN: "unknown",
}
SECOND_US = 1_000_000


# ----------------------------------------------------------------------------------------- times


def moment(at: int) -> datetime:
    """Give microseconds since the Unix epoch as local time."""
    return datetime.fromtimestamp(at / SECOND_US).astimezone()


def clock(at: int) -> str:
    return moment(at).strftime("%H:%M:%S.%f")[:-3]


def date_and_clock(at: int) -> str:
    return f"{moment(at):%Y-%m-%d} {clock(at)}"


def duration(us: int) -> str:
    """Give a time span so that it can be read: 0.020 s, 41.3 s, 3m07s, 2h05m, 3d04h."""
    seconds = us / SECOND_US
    if abs(seconds) < 60:
        return f"{seconds:.3f} s" if abs(seconds) < 10 else f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes}m{rest_s:02}s"
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


# ---------------------------------------------------------------------------------------- events


def event_words(event: ev.Event) -> str:
    """Say what happened."""
    match event:
        case ev.Started():
            return f"started: run {event.run}"
        case ev.Request():
            return f"request {event.request} {event.consumer}"
        case ev.Cancel():
            return f"cancel {event.request}"
        case ev.ServeDone():
            return f"done {event.request} {event.outcome}"
        case ev.UnloadDone():
            return f"unloaded {event.consumer}" + (" FAILED" if event.error else "")
        case ev.SwapDone():
            return f"loaded {event.consumer}" + (" FAILED" if event.error else "")
        case ev.GpuSample():
            return "sample" + (" FAILED" if event.error else "")
        case ev.ProbeResult():
            return f"probe {event.consumer} {_probed(event)}"
        case ev.Unload():
            force = " by force" if event.force else ""
            return f"operator: unload {' '.join(event.consumers) or 'all'}{force}"
        case ev.Load():
            free = " if it is free" if event.only_if_free else ""
            return f"operator: load {event.consumer}{free}"
        case ev.Pin():
            return f"operator: {'pin' if event.pinned else 'unpin'} {event.consumer}"
    return type(event).__name__.lower()


def _probed(event: ev.ProbeResult) -> str:
    if not event.healthy:
        return event.failure or event.error or "not healthy"
    memory = {True: "in", False: "absent", None: "answers"}[event.resident]
    return f"{memory}, busy" if event.busy else memory


# ------------------------------------------------------------------------------------- decisions


def decisions(effects: Sequence[Json], notes: Sequence[Json], most: int = 6) -> list[str]:
    """Say what was decided and what became of whom, the most important first."""
    reasons = {note.get("consumer"): note for note in notes if note["type"] == "Unloading"}
    words = [told for effect in effects if (told := effect_words(effect, reasons))]
    words += [*_noted(notes), *_waiting(notes)]
    return words if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} more"]


def effect_words(effect: Json, reasons: Mapping[str | None, Json] | None = None) -> str:
    """Say what is to be done; of the alarm clock nothing."""
    consumer, request = effect.get("consumer"), effect.get("request")
    match effect["type"]:
        case fx.Serve.__name__:
            return f"serve {request}"
        case fx.Reject.__name__:
            return f"reject {request}: {effect['code']}"
        case fx.StartUnload.__name__:
            because = (reasons or {}).get(consumer, {}).get("because")
            return f"unload {consumer}" + (f" ({because})" if because else "")
        case fx.StartLoad.__name__:
            return f"load {consumer}"
        case fx.SampleGpu.__name__:
            return "sample"
        case fx.Probe.__name__:
            return f"probe {consumer}"
        case fx.WakeAt.__name__:
            return ""
    return str(effect["type"])


def _noted(notes: Iterable[Json]) -> Iterator[str]:
    for note in notes:
        of = note.get("request") or note.get("consumer") or note.get("what")
        match note["type"]:
            case "LoadFailed" | "UnloadFailed":
                yield f"{of}: {'un' if note['type'][0] == 'U' else ''}load failed: {note['error']}"
            case "SampleFailed":
                yield f"the cards can't be read: {note['error']}"
            case "Ignored" | "NotLoaded" | "ColdStartGivenUp" if "because" in note:
                yield f"{of}: {note['type'].lower()}, {note['because']}"
            case "Leaky":
                yield f"{of} leaks: gave {note['freed_mib']} of {note['expected_mib']} MiB"
            case "Promoted" | "Cancelled" | "Unreachable" | "Healthy" | "UnloadBelieved":
                yield f"{of} {note['type'].lower()}"


def _waiting(notes: Iterable[Json]) -> Iterator[str]:
    """Tell who waits from now on for what, all that wait for the same in one."""
    alike: dict[str, list[str]] = {}
    for note in notes:
        if note["type"] == "Waits":
            alike.setdefault(reason_words(note), []).append(note["request"])
    for reason, (first, *rest) in alike.items():
        yield f"{first} {f'and {len(rest)} more wait' if rest else 'waits'} {reason}"


def reason_words(note: Json) -> str:
    """Say what a request waits for, as a note has it."""
    return awaited({**note, "type": note["why"]}, note["consumer"])


# ----------------------------------------------------------------------------------------- states


def residency_words(state: State, name: str) -> str:
    """Say in a cell what a consumer's memory is, and how many requests it serves."""
    consumer = state.consumers.get(name)
    if consumer is None:
        return ""
    served = state.serving.get(name)
    return RESIDENCY[consumer.residency] + (f" {served}" if served else "")


def free_words(state: State) -> str:
    return "/".join(str(card.free_mib) for card in state.cards.values()) or "-"
