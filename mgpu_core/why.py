"""What requests waited for: the notes of events, folded into intervals that add up to each wait.

    waits = Waits()
    for record in records:  # of a log, or of a running broker, in order
        waits.see(record)
    waits.explained("r5")

A reason is what the scheduler noted when it became one; nothing is concluded anew. What is added
are names: which requests were served meanwhile by those in the way (`behind`), as their grants and
ends were noted.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from attrs import Factory, define, evolve, frozen

from mgpu_core.notes import Why
from mgpu_core.replay import Record
from mgpu_core.state import Phase
from mgpu_core.telling import awaited, behind, happened, lasting

Json: TypeAlias = Mapping[str, Any]

# Nobody noted why: the events were lost, or their segments are gone.
UNRECORDED = "unrecorded"
# Its consumer, and who else is in the way, are served in turn; so many of those are named.
BEHIND_WORK = frozenset(
    {Why.CONSUMER_FULL, Why.SLOT, Why.VICTIM_AT_WORK, Why.NO_OVERLAP, Why.LEAVING}
)
MOST_BEHIND = 8
MOST_SHARES = 5  # of a wait in one sentence
# What is the same reason still, whatever the numbers are.
_SAME = ("type", "who", "doing")
_ENDS = frozenset({"Granted", "Rejected", "Cancelled", "BroughtIn", "NotLoaded"})

WAITING, SERVED, CANCELLED, LOST = "waiting", "served", "cancelled", "lost"
BROUGHT_IN, NOT_LOADED = "brought_in", "not_loaded"


@frozen(kw_only=True)
class Interval:
    """A part of a wait, in microseconds; `ended_by` is the event at its end and `event` what that
    was, in words. None: no event ended it, it goes on, or the broker's run ended.
    """

    begin: int
    end: int
    reason: Json
    ended_by: int | None
    event: str = ""

    @property
    def us(self) -> int:
        return self.end - self.begin


@frozen(kw_only=True)
class Explanation:
    """A whole wait. `outcome`: waiting, served, cancelled, lost (the broker's run ended), or the
    code of its rejection; of a load without a client also brought_in and not_loaded.
    """

    request: str
    consumer: str
    kind: str
    outcome: str
    message: str
    begin: int
    end: int
    overtaken: int
    promoted: bool
    intervals: tuple[Interval, ...]

    @property
    def waited_us(self) -> int:
        return self.end - self.begin


def encode_explanation(explanation: Explanation) -> dict[str, Any]:
    """Give the shape of `mgpu log why --json`: times in microseconds since the Unix epoch."""
    return {
        "request": explanation.request,
        "consumer": explanation.consumer,
        "outcome": explanation.outcome,
        "waited_us": explanation.waited_us,
        "intervals": [
            {
                "from": one.begin,
                "to": one.end,
                "reason": told(one.reason, explanation.consumer),
                "ended_by": one.ended_by,
            }
            for one in explanation.intervals
        ],
    }


def told(reason: Json, consumer: str) -> dict[str, Any]:
    """Give a reason with its words."""
    return {**reason, "text": awaited(reason, consumer) + behind(reason)}


def summary(explanation: Explanation) -> str:
    """Tell a wait in a sentence: "waited 41.2 s: 30.1 s for comfyui to finish (r3), ..."."""
    outcome, intervals = explanation.outcome, explanation.intervals
    lasted = lasting(explanation.waited_us)
    if not intervals:
        lasted = "no time"
    begins = {
        WAITING: f"has waited {lasted} so far",
        SERVED: f"waited {lasted}",
        CANCELLED: f"was cancelled after {lasted}",
        LOST: f"was lost after {lasted}, when the broker ended",
        UNRECORDED: f"waited {lasted}, and its end is not in the log",
        BROUGHT_IN: f"was in after {lasted}",
        NOT_LOADED: f"was not loaded, after {lasted}",
    }
    begin = begins.get(outcome, f"was refused ({outcome}) after {lasted}")
    if not intervals and outcome == SERVED:
        begin = "was served at once"
    return f"{begin}: {_shares(explanation)}" if intervals else begin


def _shares(explanation: Explanation) -> str:
    """Name what took longest, in the order in which it came first."""
    took: dict[str, int] = {}
    served: dict[str, list[str]] = {}
    for one in explanation.intervals:
        words = awaited(one.reason, explanation.consumer)
        took[words] = took.get(words, 0) + one.us
        served.setdefault(words, []).extend(one.reason.get("behind", ()))
    named = MOST_SHARES if len(took) > MOST_SHARES + 1 else len(took)
    longest = sorted(took, key=lambda words: -took[words])[:named]
    parts = [
        f"{lasting(us)} {words}{behind({'behind': list(dict.fromkeys(served[words]))})}"
        for words, us in took.items()
        if words in longest
    ]
    if rest := took.keys() - set(longest):
        parts.append(f"{lasting(sum(took[words] for words in rest))} for {len(rest)} other reasons")
    return ", ".join(parts)


@define(kw_only=True)
class _Wait:
    """One request's, as far as it has come. `since`: when its reason, noted last, became one."""

    request: str
    consumer: str
    kind: str
    begin: int
    since: int
    since_seq: int
    reason: Json | None = None
    # Who was served by those in the way when that became the reason.
    served: tuple[str, ...] = ()
    intervals: list[Interval] = Factory(list)
    outcome: str = WAITING
    message: str = ""
    end: int | None = None
    overtaken: int = 0
    promoted: bool = False


class Waits:
    """Folds the records of a log into the waits of its requests.

    `only`: of this one request. `kept`: so many whose end was seen are remembered, the last ones.
    `most`: no wait has more intervals; beyond that, neighbours are put together (`merged` in the
    reason says how many), so that memory stays bounded.
    """

    def __init__(
        self, *, only: str | None = None, kept: int | None = None, most: int | None = None
    ) -> None:
        self._only = only
        self._kept = kept
        self._most = most
        self._open: dict[str, _Wait] = {}
        self._ended: dict[str, _Wait] = {}
        # Who is served, by consumer, and whom each was granted last, with the event of that.
        self._serving: dict[str, dict[str, None]] = {}
        self._granted: dict[str, deque[tuple[int, str]]] = {}
        self._at = 0
        # The state before the next event, where events were lost before it.
        self._state: Json | None = None
        self._whole = False
        self._handlers: Mapping[str, Callable[[Record, Json], None]] = {
            "Granted": self._on_granted,
            "Served": self._on_served,
            "Rejected": self._on_rejected,
            "Cancelled": self._on_cancelled,
            "BroughtIn": self._on_brought_in,
            "NotLoaded": self._on_not_loaded,
            "Promoted": self._on_promoted,
        }

    # ------------------------------------------------------------------------------- questions

    def explained(self, request: str, now: int | None = None) -> Explanation | None:
        """Give a wait so far (`now` in microseconds; None: up to the last event); None: unknown."""
        wait = self._open.get(request) or self._ended.get(request)
        if wait is None:
            return None
        intervals = tuple(wait.intervals)
        end = wait.end
        if end is None:
            end = max(wait.since, self._at if now is None else now)
            if end > wait.since:
                intervals = (*intervals, self._interval(wait, end, None))
        return Explanation(
            request=wait.request,
            consumer=wait.consumer,
            kind=wait.kind,
            outcome=wait.outcome,
            message=wait.message,
            begin=wait.begin,
            end=end,
            overtaken=wait.overtaken,
            promoted=wait.promoted,
            intervals=intervals,
        )

    def reason(self, request: str) -> dict[str, Any] | None:
        """Give the reason why a request waits now, with its words; None: it doesn't, or it came
        just now.
        """
        wait = self._open.get(request)
        if wait is None or wait.end is not None or wait.reason is None:
            return None
        return told(self._reason(wait, None), wait.consumer)

    def requests(self) -> Iterable[str]:
        """Give all that are known, those who wait or are served last."""
        return (*self._ended, *self._open)

    def is_over(self, request: str) -> bool:
        """Say whether it was known, and waits no more."""
        wait = self._open.get(request) or self._ended.get(request)
        return wait is not None and wait.end is not None

    # ------------------------------------------------------------------------------------ input

    def begin(self, state: Json) -> None:
        """Take the state of a segment's header, as the log holds it: needed only where it is the
        first, or events before it are lost.
        """
        self._state = state

    def lose(self, *, state_is_known: bool) -> None:
        """Events are missing here. `state_is_known`: the header told the state after them."""
        self._whole = False
        if not state_is_known:
            self._state = None
        for wait in self._open.values():
            if wait.end is None:
                self._change(wait, {"type": UNRECORDED}, self._at, None)

    def see(self, record: Record) -> None:
        """Take the next event."""
        if self._state is not None:
            if not self._whole:
                self._resume(self._state, record)
            self._state = None
        self._whole = True
        event = record.event
        if event["type"] == "Started":
            self._start_anew()
        elif event["type"] == "Request" and self._is_mine(event["request"]):
            self._ask(record)
        # What counts is the last reason of a step: those before it lasted no time.
        news: dict[str, Json] = {}
        for note in record.notes:
            kind = note["type"]
            if kind == "Waits":
                news[note["request"]] = note
            elif (handle := self._handlers.get(kind)) is not None:
                if kind in _ENDS:
                    news.pop(note.get("request", ""), None)
                handle(record, note)
        for request, note in news.items():
            if self._is_mine(request):
                self._wait_for(request, note, record)
        self._at = record.at

    def _is_mine(self, request: str) -> bool:
        return self._only is None or request == self._only

    def _ask(self, record: Record) -> None:
        event = record.event
        request = event["request"]
        if any(note["type"] == "Ignored" for note in record.notes):
            return
        self._open_wait(request, event["consumer"], event.get("kind", ""), record)

    def _open_wait(self, request: str, consumer: str, kind: str, record: Record) -> _Wait:
        self._ended.pop(request, None)
        wait = self._open[request] = _Wait(
            request=request,
            consumer=consumer,
            kind=kind,
            begin=record.at,
            since=record.at,
            since_seq=record.seq,
        )
        return wait

    def _wait_for(self, request: str, note: Json, record: Record) -> None:
        """Its reason is another one now, or only the numbers are."""
        wait = self._open.get(request)
        if wait is None:  # a load without a client
            wait = self._open_wait(request, note["consumer"], "load", record)
        wait.overtaken = note["overtaken"]
        reason = _reason_of(note, promoted=wait.promoted)
        if wait.reason is None or any(wait.reason.get(key) != reason.get(key) for key in _SAME):
            self._change(wait, reason, record.at, record)

    def _on_granted(self, record: Record, note: Json) -> None:
        request, consumer = note["request"], note["consumer"]
        self._serving.setdefault(consumer, {})[request] = None
        last = self._granted.setdefault(consumer, deque(maxlen=MOST_BEHIND))
        last.append((record.seq, request))
        if wait := self._open.get(request):
            wait.overtaken = note.get("overtaken", wait.overtaken)
            self._end(wait, SERVED, record)

    def _on_served(self, _record: Record, note: Json) -> None:
        self._serving.get(note["consumer"], {}).pop(note["request"], None)
        self._forget(note["request"])

    def _on_rejected(self, record: Record, note: Json) -> None:
        self._over(record, note, note["code"], note["message"])

    def _on_cancelled(self, record: Record, note: Json) -> None:
        self._over(record, note, CANCELLED)

    def _on_brought_in(self, record: Record, note: Json) -> None:
        self._over(record, note, BROUGHT_IN)

    def _on_not_loaded(self, record: Record, note: Json) -> None:
        if "request" in note:
            self._over(record, note, NOT_LOADED, note["because"])

    def _over(self, record: Record, note: Json, outcome: str, message: str = "") -> None:
        """It ends, and is served by nobody."""
        request = note["request"]
        if not self._is_mine(request):
            return
        wait = self._open.get(request)
        if wait is None and note["type"] in {"BroughtIn", "NotLoaded"}:
            wait = self._open_wait(request, note["consumer"], "load", record)
        if wait is not None and wait.end is None:
            wait.message = message
            self._end(wait, outcome, record)
            self._forget(request)

    def _on_promoted(self, _record: Record, note: Json) -> None:
        wait = self._open.get(note["request"])
        if wait is not None and wait.reason is not None:
            wait.promoted = True
            wait.reason = {**wait.reason, "promoted": True}

    # ---------------------------------------------------------------------------------- changes

    def _change(self, wait: _Wait, reason: Json, at: int, record: Record | None) -> None:
        self._close(wait, at, record)
        wait.reason, wait.since = reason, at
        if record is not None:
            wait.since_seq = record.seq
        names = _at_work(reason, wait.consumer)
        wait.served = tuple(sorted(one for name in names for one in self._serving.get(name, ())))

    def _end(self, wait: _Wait, outcome: str, record: Record) -> None:
        self._close(wait, record.at, record)
        wait.outcome, wait.end = outcome, record.at

    def _close(self, wait: _Wait, at: int, record: Record | None) -> None:
        if at > wait.since:
            wait.intervals.append(self._interval(wait, at, record))
            if self._most is not None and len(wait.intervals) > self._most:
                wait.intervals = _halved(wait.intervals)
        wait.since = at

    def _interval(self, wait: _Wait, at: int, record: Record | None) -> Interval:
        return Interval(
            begin=wait.since,
            end=at,
            reason=self._reason(wait, record),
            ended_by=None if record is None else record.seq,
            event="" if record is None else happened(record.event, record.notes),
        )

    def _reason(self, wait: _Wait, record: Record | None) -> Json:
        """Give its reason, with whom those in the way served meanwhile."""
        if wait.reason is None:
            return {"type": UNRECORDED}
        behind = list(wait.served)
        for name in _at_work(wait.reason, wait.consumer):
            behind += [
                request
                for seq, request in self._granted.get(name, ())
                if seq > wait.since_seq and (record is None or seq < record.seq)
            ]
        return {**wait.reason, "behind": behind[:MOST_BEHIND]} if behind else wait.reason

    def _forget(self, request: str) -> None:
        """Its end was seen: only the last ones are remembered."""
        wait = self._open.pop(request, None)
        if wait is None:
            return
        self._ended[request] = wait
        if self._kept is not None and len(self._ended) > self._kept:
            del self._ended[next(iter(self._ended))]

    # ------------------------------------------------------------------------ what was not seen

    def _start_anew(self) -> None:
        """Another run begins; who waited in the one before was lost with it."""
        for wait in list(self._open.values()):
            self._break_off(wait, LOST, self._at)
        self._serving.clear()
        self._granted.clear()

    def _break_off(self, wait: _Wait, outcome: str, at: int) -> None:
        """End a wait whose end was not seen."""
        if wait.end is None:
            self._close(wait, max(wait.since, at), None)
            wait.outcome, wait.end = outcome, wait.since
        self._forget(wait.request)

    def _resume(self, state: Json, record: Record) -> None:
        """Go on from a state, of which it is not known how it came about."""
        if record.event["type"] == "Started":
            return
        requests: Mapping[str, Json] = state["requests"]
        self._serving, self._granted = {}, {}
        for request, about in requests.items():
            if about["phase"] == Phase.SERVING:
                self._serving.setdefault(about["consumer"], {})[request] = None
            elif self._is_mine(request):
                self._resume_wait(request, state, record)
        for request, wait in list(self._open.items()):
            found = requests.get(request)
            if found is None:
                self._break_off(wait, UNRECORDED, self._at)
            elif found["phase"] == Phase.SERVING:
                self._break_off(wait, SERVED, found["granted"])

    def _resume_wait(self, request: str, state: Json, record: Record) -> None:
        about = state["requests"][request]
        wait = self._open.get(request)
        if wait is None:
            wait = self._open_wait(request, about["consumer"], about["kind"], record)
            wait.begin = wait.since = about["at"]
        if (reason := state["reasons"].get(request)) is not None:
            named = {key: value for key, value in reason.items() if key != "numbers" and value}
            note = {"who": [], **named, "overtaken": state["overtaken"].get(request, 0)}
            new = _reason_of({**note, **reason["numbers"]}, promoted=wait.promoted)
            self._change(wait, new, record.at, record)


def _reason_of(note: Json, *, promoted: bool) -> dict[str, Any]:
    """Make the reason of a wait from its note: a log's, or a running broker's, which has tuples."""
    rest = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in note.items()
        if key not in {"type", "request", "consumer", "why"}
    }
    return {"type": note["why"], **rest, "promoted": promoted}


def _at_work(reason: Json, consumer: str) -> Sequence[str]:
    """Give whose work is waited for."""
    if reason["type"] not in BEHIND_WORK:
        return ()
    names: Sequence[str] = reason.get("who") or (consumer,)
    return names


def _halved(intervals: Sequence[Interval]) -> list[Interval]:
    """Put neighbours together, two and two; the longer one says why."""
    pairs = zip(intervals[::2], intervals[1::2], strict=False)
    rest = intervals[len(intervals) // 2 * 2 :]
    return [*(_merged(first, second) for first, second in pairs), *rest]


def _merged(first: Interval, second: Interval) -> Interval:
    count = first.reason.get("merged", 1) + second.reason.get("merged", 1)
    longer = max(first, second, key=lambda one: one.us)
    return evolve(second, begin=first.begin, reason={**longer.reason, "merged": count})
