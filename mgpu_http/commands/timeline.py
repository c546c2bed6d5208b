"""A log as a timeline, in the trace event format that Perfetto and Chrome's tracing open.

Each consumer is a process: a track of its memory, a track for each request that it serves at once,
and its requests as asynchronous slices, in which their waits lie. The host is one more, with
counters of the cards. What is open is kept beside the state and brought in line with it after every
event, so that a restart or a gap closes what it has to.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from attrs import define, field, frozen

from mgpu_core.codec import decode_event
from mgpu_core.notes import Reason
from mgpu_core.replay import Record
from mgpu_core.state import ConsumerState, Phase, RequestState, Residency, State
from mgpu_core.telling import awaited_now
from mgpu_http.commands.log_words import event_words
from mgpu_http.commands.logs import Step

TraceEvent: TypeAlias = dict[str, Any]
HOST = 1
MEMORY = 1
FIRST_LANE = 2
# Notes and events that are shown as a mark on the track of their consumer, or of the host.
MARKED_NOTES = {"LoadFailed", "UnloadFailed", "Leaky", "Promoted", "Unreachable", "Healthy"}
MARKED_EVENTS = {"Started", "Reconfigured", "Unload", "Load", "Pin", "Drain", "Resume", "Shutdown"}


@frozen
class Slot:
    """Where a request is served: a track of its consumer."""

    consumer: str
    lane: int


@define
class Timeline:
    """Turns a log into trace events, in order of time."""

    _at: int = 0
    _pids: dict[str, int] = field(factory=dict)
    _named_lanes: set[Slot] = field(factory=set)
    # What is open: the memory of each consumer, each request, its wait, its service.
    _memory: dict[str, tuple[Residency, int | None]] = field(factory=dict)
    _requests: dict[str, RequestState] = field(factory=dict)
    _waits: dict[str, Reason] = field(factory=dict)
    _slots: dict[str, Slot] = field(factory=dict)
    _seen: tuple[object, object] | None = None  # those of the last state, often the same
    _counted: dict[str, Mapping[str, int]] = field(factory=dict)

    def of(self, step: Step) -> Iterator[TraceEvent]:
        """Take an event; where the state after it is not known, only marks can be made."""
        record, state = step.record, step.state
        if not self._pids:
            yield from self._process("host", HOST)
        self._at = max(self._at, record.at)  # a clock may be set back between two runs
        if state is not None:
            for name in [n for n in state.consumers if n not in self._pids]:
                yield from self._process(name, HOST + len(self._pids))
            yield from self._close_requests(state, outcomes(record))
            yield from self._memories(state, record)
            yield from self._open_requests(state)
            yield from self._counters(state)
        yield from self._marks(record)

    def end(self) -> Iterator[TraceEvent]:
        """Close what is still open."""
        for name in list(self._requests):
            yield from self._close(name, "open")
        for name in list(self._memory):
            yield self._event("E", name, MEMORY)
        self._memory.clear()

    # ------------------------------------------------------------------------------------ memory

    def _memories(self, state: State, record: Record) -> Iterator[TraceEvent]:
        for name in [n for n in self._memory if n not in state.consumers]:
            del self._memory[name]
            yield self._event("E", name, MEMORY)
        for name, consumer in state.consumers.items():
            shown = _shown(consumer)
            if shown == self._memory.get(name):
                continue
            if self._memory.pop(name, None) is not None:
                yield self._event("E", name, MEMORY)
            if shown is not None:
                self._memory[name] = shown
                begun = self._event("B", name, MEMORY, name=shown[0].value)
                yield begun | {"args": _about(name, consumer, record)}

    # ---------------------------------------------------------------------------------- requests

    def _close_requests(self, state: State, ended: Mapping[str, str]) -> Iterator[TraceEvent]:
        for name in [n for n in self._requests if n not in state.requests]:
            yield from self._close(name, ended.get(name, "lost"))

    def _close(self, name: str, outcome: str) -> Iterator[TraceEvent]:
        request = self._requests[name]
        yield from self._end_wait(request)
        yield from self._end_service(name, outcome)
        del self._requests[name]
        yield self._async("e", request, name=name) | {"args": {"outcome": outcome}}

    def _open_requests(self, state: State) -> Iterator[TraceEvent]:
        if (state.requests, state.reasons) == self._seen:
            return
        self._seen = (state.requests, state.reasons)
        for name, request in state.requests.items():
            if name not in self._requests:
                about = {"kind": request.kind, "priority": request.priority, "at": request.at}
                yield self._async("b", request, name=name) | {"args": about}
            self._requests[name] = request
            yield from self._wait(state, request)
            yield from self._service(request)

    def _wait(self, state: State, request: RequestState) -> Iterator[TraceEvent]:
        name = request.request
        reason = None if request.phase is Phase.SERVING else state.reasons.get(name)
        if reason == self._waits.get(name):
            return
        yield from self._end_wait(request)
        if reason is not None:
            self._waits[name] = reason
            yield self._async("b", request, name=_wait_name(reason, request)) | {
                "args": dict(reason.numbers)
            }

    def _end_wait(self, request: RequestState) -> Iterator[TraceEvent]:
        if (reason := self._waits.pop(request.request, None)) is not None:
            yield self._async("e", request, name=_wait_name(reason, request))

    def _service(self, request: RequestState) -> Iterator[TraceEvent]:
        name, consumer = request.request, request.consumer
        if (request.phase is Phase.SERVING) == (name in self._slots):
            return
        if name in self._slots:
            yield from self._end_service(name, "again")
            return
        taken = {slot.lane for slot in self._slots.values() if slot.consumer == consumer}
        lane = next(n for n in range(FIRST_LANE, FIRST_LANE + len(taken) + 1) if n not in taken)
        slot = self._slots[name] = Slot(consumer, lane)
        if slot not in self._named_lanes:
            self._named_lanes.add(slot)
            yield self._name_thread(consumer, lane, f"at work {lane - FIRST_LANE + 1}")
        granted = self._at if request.granted is None else request.granted
        about = {"kind": request.kind, "waited_us": granted - request.at}
        yield self._event("B", consumer, lane, name=name) | {"args": about}

    def _end_service(self, name: str, outcome: str) -> Iterator[TraceEvent]:
        if (slot := self._slots.pop(name, None)) is not None:
            yield self._event("E", slot.consumer, slot.lane) | {"args": {"outcome": outcome}}

    # --------------------------------------------------------------------------- counters, marks

    def _counters(self, state: State) -> Iterator[TraceEvent]:
        for name, values in _counts(state):
            if values != self._counted.get(name):
                self._counted[name] = values
                yield {"ph": "C", "name": name, "pid": HOST, "ts": self._at, "args": values}

    def _marks(self, record: Record) -> Iterator[TraceEvent]:
        if record.event["type"] in MARKED_EVENTS:
            words = event_words(decode_event(record.event, record.at))
            yield self._event("i", "host", 0, name=words) | {"s": "g"}
        for effect in record.effects:
            if effect["type"] == "Reject":
                name = f"reject {effect['request']}: {effect['code']}"
                yield self._mark(name, effect["consumer"], effect)
        for note in record.notes:
            if note["type"] in MARKED_NOTES:
                of = f" {note['request']}" if "request" in note else ""
                yield self._mark(note["type"] + of, note.get("consumer"), note)

    def _mark(self, name: str, consumer: str | None, about: Mapping[str, Any]) -> TraceEvent:
        process = consumer if consumer in self._pids and consumer else "host"
        mark = self._event("i", process, MEMORY if process != "host" else 0, name=name)
        return mark | {"s": "t", "args": {k: v for k, v in about.items() if k != "type"}}

    # --------------------------------------------------------------------------------- one event

    def _event(self, phase: str, process: str, thread: int, **more: str) -> TraceEvent:
        return {**more, "ph": phase, "pid": self._pids[process], "tid": thread, "ts": self._at}

    def _async(self, phase: str, request: RequestState, *, name: str) -> TraceEvent:
        ids = {"cat": "request", "id": request.request, "name": name}
        return {**ids, "ph": phase, "pid": self._pids[request.consumer], "tid": 0, "ts": self._at}

    def _process(self, name: str, pid: int) -> Iterator[TraceEvent]:
        self._pids[name] = pid
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        if pid != HOST:
            yield self._name_thread(name, MEMORY, "memory")

    def _name_thread(self, process: str, thread: int, name: str) -> TraceEvent:
        named = {"ph": "M", "name": "thread_name", "pid": self._pids[process], "tid": thread}
        return named | {"args": {"name": name}}


def outcomes(record: Record) -> dict[str, str]:
    """Say how requests ended with this event."""
    ended = {
        note["request"]: "cancelled" for note in record.notes if note["type"] == "Cancelled"
    } | {
        effect["request"]: effect["code"] for effect in record.effects if effect["type"] == "Reject"
    }
    if record.event["type"] == "ServeDone":
        ended[record.event["request"]] = record.event["outcome"]
    return ended


def _shown(consumer: ConsumerState) -> tuple[Residency, int | None] | None:
    """Give what makes a slice of memory one; None: there is nothing to show."""
    if consumer.residency is Residency.ABSENT:
        return None
    return consumer.residency, consumer.operation.epoch if consumer.operation else None


def _about(name: str, consumer: ConsumerState, record: Record) -> dict[str, Any]:
    notes = [note for note in record.notes if note.get("consumer") == name and "because" in note]
    # Why it is unloaded says more than that its residency changed because an unload started.
    notes.sort(key=lambda note: note["type"] != "Unloading")
    because = notes[0]["because"] if notes else None
    epoch = consumer.operation.epoch if consumer.operation else None
    about = {"source": consumer.source.value, "because": because, "epoch": epoch}
    return {key: value for key, value in about.items() if value is not None}


def _wait_name(reason: Reason, request: RequestState) -> str:
    return f"waits {awaited_now(reason, request.consumer)}"


def _counts(state: State) -> Iterator[tuple[str, Mapping[str, int]]]:
    for gpu, card in state.cards.items():
        foreign_mib = min(card.foreign_mib, card.used_mib)
        yield (
            f"GPU {gpu} MiB",
            {"ours": card.used_mib - foreign_mib, "foreign": foreign_mib, "free": card.free_mib},
        )
    for gpu in state.config.gpus:
        at_work = [name for name in state.serving if _takes_slot(state, name, gpu)]
        yield f"GPU {gpu} consumers at work", {"at work": len(at_work)}
    waiting = sum(state.waiting.values())
    yield "requests", {"waiting": waiting, "served": sum(state.serving.values())}


def _takes_slot(state: State, name: str, gpu: int) -> bool:
    consumer = state.config.consumers.get(name)
    return consumer is not None and consumer.gpu_slot and gpu in consumer.vram_mib
