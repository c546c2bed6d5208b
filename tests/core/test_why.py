"""Waits that are known by hand: what is told of them, interval by interval."""

from typing import Any

import pytest

from mgpu_core import events as ev
from mgpu_core.codec import encode_effect, encode_event, encode_note, encode_state
from mgpu_core.notes import Why
from mgpu_core.replay import Record
from mgpu_core.telling import AWAITED, awaited, happened, lasting, listed, missing
from mgpu_core.why import Explanation, Waits, encode_explanation, summary
from tests.core.driver import Core, lazy, service


class Recording(Core):
    """A core whose events are seen by `waits`; `seconds` lets time pass up to an event."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.waits = Waits()
        self.records: list[Record] = []
        super().__init__(*args, **settings)

    def feed(self, event: ev.Event) -> list[str]:
        told = super().feed(event)
        record = Record(
            seq=len(self.records) + 1,
            at=self.state.at,
            event=encode_event(event),
            effects=[encode_effect(effect) for effect in self.last],
            notes=[encode_note(note) for note in self.last_notes],
        )
        self.records.append(record)
        self.waits.see(record)
        return told

    def explained(self, request: str) -> Explanation:
        found = self.waits.explained(request, self.at)
        assert found is not None
        return found

    def told(self, request: str) -> list[tuple[int, str, str]]:
        """Give milliseconds, words and event of each interval."""
        encoded = encode_explanation(self.explained(request))["intervals"]
        return [
            ((one["to"] - one["from"]) // 1000, one["reason"]["text"], full.event)
            for one, full in zip(encoded, self.explained(request).intervals, strict=True)
        ]


def rivals(**settings: Any) -> Recording:
    """`llm` and `voice` do not fit together; `llm` is in."""
    core = Recording(service("llm", 20_000), service("voice", 8_000), absent=["voice"], **settings)
    core.sample(free=3_700)
    return core


def test_a_swap_is_told_step_by_step() -> None:
    core = rivals()
    core.request("r7", "llm")
    core.request("r8", "voice")
    core.wait(29.998)
    core.sample(free=3_700)
    core.finish("r7")
    core.wait(1.999)
    core.unloaded("llm")
    core.wait(0.499)
    core.sample(free=23_700)
    core.wait(2.999)
    assert core.loaded("voice") == ["serve r8"]
    assert core.told("r8") == [
        (30_000, "for llm to finish (r7)", "ServeDone of r7 on llm"),
        (2_000, "for llm to be unloaded", "UnloadDone of llm"),
        (500, "for the memory of llm to be seen free", "sample: 23,700 MiB free on GPU 0"),
        (3_000, "for voice to load", "SwapDone of voice"),
    ]
    found = core.explained("r8")
    assert summary(found) == (
        "waited 35.5 s: 30.0 s for llm to finish (r7), 2.0 s for llm to be unloaded,"
        " 500 ms for the memory of llm to be seen free, 3.0 s for voice to load"
    )
    assert [missing(one.reason) for one in found.intervals] == ["4,556 MiB on GPU 0"] * 3 + [""]
    assert encode_explanation(found)["intervals"][0] == {
        "from": found.begin,
        "to": found.begin + 30_000_000,
        "reason": {
            "type": "victim_at_work",
            "who": ["llm"],
            "doing": ["working"],
            "behind": ["r7"],
            "overtaken": 0,
            "promoted": False,
            "gpu": 0,
            "need_mib": 8_000,
            "cushion_mib": 256,
            "free_mib": 3_700,
            "text": "for llm to finish (r7)",
        },
        "ended_by": next(r.seq for r in core.records if r.event["type"] == "ServeDone"),
    }


def test_each_of_several_unloads_is_seen_to_end() -> None:
    core = Recording(service("a", 8_000), service("b", 8_000), service("c", 20_000), absent="c")
    core.sample(free=7_700)
    core.request("r1", "c")
    core.unloaded("b")
    core.unloaded("a")
    assert [words for _, words, _ in core.told("r1")] == [
        "for a and b to be unloaded",
        "for a to be unloaded",
    ]


def test_who_joins_waits_for_what_is_left_of_the_swap() -> None:
    core = rivals()
    core.request("r1", "voice")
    core.unloaded("llm")
    core.sample(free=23_700)
    core.request("r2", "voice")
    core.loaded("voice")
    assert core.told("r2") == [(1, "for voice to load", "SwapDone of voice")]


def test_those_served_meanwhile_are_named_and_counted() -> None:
    core = Recording(
        service("llm", 20_000, max_concurrency=2), service("voice", 8_000), absent=["voice"]
    )
    core.request("r1", "llm")
    core.request("waits", "voice")
    core.request("r2", "llm")
    core.finish("r1")
    core.finish("r2")
    core.unloaded("llm")
    core.loaded("voice")
    assert next(words for _, words, _ in core.told("waits")) == "for llm to finish (r1 and r2)"
    assert core.explained("waits").overtaken == 1


def test_a_promotion_is_told() -> None:
    core = Recording(
        service("llm", 20_000, max_concurrency=2),
        service("voice", 8_000),
        absent=["voice"],
        overtake_bound=1,
    )
    core.request("r1", "llm")
    core.request("waits", "voice")
    core.request("r2", "llm")
    core.finish("r1")
    core.request("r3", "llm")
    assert core.explained("waits").promoted
    assert core.explained("waits").intervals[-1].reason["promoted"]
    reason = core.waits.reason("r3")
    assert reason is not None
    assert reason["text"] == "for waits, which was overtaken too often"


@pytest.mark.parametrize("after_s", [0, 5])
def test_so_far(after_s: int) -> None:
    core = rivals()
    core.request("r7", "llm")
    core.request("r8", "voice")
    core.wait(after_s)
    found = core.explained("r8")
    assert (found.outcome, found.waited_us) == ("waiting", after_s * 1_000_000)
    assert [(one.us, one.ended_by) for one in found.intervals] == [(found.waited_us, None)][
        : bool(after_s)
    ]
    reason = core.waits.reason("r8")
    assert reason is not None
    assert reason["text"] == "for llm to finish (r7)"
    assert core.waits.reason("r7") is None
    begin = f"has waited {lasting(found.waited_us)} so far" if after_s else "has waited no time"
    assert summary(found).startswith(begin)


def test_how_waits_end_otherwise() -> None:
    core = rivals(queue_timeout_us=10_000_000)
    core.request("r7", "llm")
    core.request("late", "voice")
    core.request("gone", "voice")
    core.request("nobody's", "nothing")
    core.cancel("gone")
    core.wait(11)
    assert summary(core.explained("gone")) == (
        "was cancelled after 2.0 ms: 2.0 ms for llm to finish (r7)"
    )
    late = core.explained("late")
    assert (late.outcome, late.intervals[-1].event) == ("queue_timeout", "time passed")
    assert late.message.startswith("waited 10 s for voice")
    assert (
        summary(late) == "was refused (queue_timeout) after 10.0 s: 10.0 s for llm to finish (r7)"
    )
    assert summary(core.explained("nobody's")) == "was refused (no_consumer) after no time"
    assert summary(core.explained("r7")) == "was served at once"
    assert core.waits.explained("r99") is None


def test_a_crash_ends_a_wait_with_the_last_event_before_it() -> None:
    core = rivals()
    core.request("r7", "llm")
    core.request("r8", "voice")
    core.wait(3)
    core.sample(free=3_700)
    core.feed(ev.Started(at=core.at + 3_600_000_000, run="run-2"))  # the machine was down
    found = core.explained("r8")
    assert (found.outcome, found.waited_us) == ("lost", 3_001_000)
    assert [one.ended_by for one in found.intervals] == [None]
    assert summary(found).startswith("was lost after 3.0 s, when the broker ended: ")
    core.request("r8", "voice")
    assert core.explained("r8").outcome == "served"


def test_loads_without_a_client() -> None:
    core = rivals()
    core.request("r7", "llm")
    core.load("voice")
    core.load("voice", only_if_free=True)  # it is being loaded already
    core.finish("r7")
    core.unloaded("llm")
    core.sample(free=23_700)
    core.loaded("voice")
    found = core.explained("load:voice")
    assert (found.consumer, found.kind, found.outcome) == ("voice", "load", "brought_in")
    assert [one.reason["type"] for one in found.intervals] == ["victim_at_work"] + ["swap"] * 3
    assert core.told("load:voice")[0][2] == "ServeDone of r7 on llm"


def test_a_load_for_which_nobody_goes() -> None:
    core = rivals()
    core.load("voice", only_if_free=True)
    found = core.explained("load:voice")
    assert (found.outcome, found.intervals) == ("not_loaded", ())
    assert found.message == "there is no free memory for it"


def test_an_id_in_use_is_no_second_request() -> None:
    core = rivals()
    core.request("r7", "llm")
    core.request("r8", "voice")
    core.request("r8", "llm")
    assert core.explained("r8").consumer == "voice"


def test_events_that_are_lost_are_told() -> None:
    core = rivals()
    core.request("r7", "llm")
    core.request("r8", "voice")
    core.request("r9", "voice")
    core.wait(1)
    core.sample(free=3_700)
    lost = len(core.records)
    core.wait(2)
    core.cancel("r9")
    core.finish("r7")
    first, state = len(core.records), encode_state(core.state)
    core.wait(2)
    core.unloaded("llm")
    waits = Waits()
    for record in core.records[:lost]:
        waits.see(record)
    waits.begin(state)
    waits.lose(state_is_known=True)
    for record in core.records[first:]:
        waits.see(record)
    found, gone = waits.explained("r8"), waits.explained("r9")
    assert found is not None
    assert gone is not None
    assert (gone.outcome, gone.end) == ("unrecorded", core.records[lost - 1].at)
    assert summary(gone).startswith("waited 1.0 s, and its end is not in the log: ")
    assert [(one.us // 1000, one.reason["type"]) for one in found.intervals] == [
        (1_002, "victim_at_work"),
        (4_003, "unrecorded"),
    ]
    assert sum(one.us for one in found.intervals) == found.waited_us


def test_only_the_last_ones_are_kept_after_their_end() -> None:
    core = Recording(service("llm", 20_000, max_concurrency=2))
    core.waits = Waits(kept=2)
    for number in range(4):
        core.request(f"r{number}", "llm")
        core.finish(f"r{number}")
    core.request("r9", "llm")
    assert list(core.waits.requests()) == ["r2", "r3", "r9"]


# ---------------------------------------------------------------------------------------- words


@pytest.mark.parametrize("why", Why)
@pytest.mark.parametrize("who", [[], ["mvoice"]])
def test_every_reason_has_words(why: Why, who: list[str]) -> None:
    words = awaited({"type": why.value, "who": who}, "comfyui")
    assert why in AWAITED
    assert words.startswith(("for ", "to "))
    assert "{" not in words


def test_a_reason_of_a_later_version_is_shown_by_name() -> None:
    assert awaited({"type": "full_moon", "who": []}, "llm") == "for full_moon"


def test_several_who_do_several_things() -> None:
    reason = {"type": "victim_at_work", "who": ["a", "b", "c"], "doing": ["working", "loading"] * 2}
    reason["doing"] = ["working", "loading", "working"]
    assert awaited(reason, "d") == "for a and c to finish and b to load"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a and b"),
        (list("abcd"), "a, b, c and d"),
        (list("abcde"), "a, b, c and 2 more"),
    ],
)
def test_names_are_listed(names: list[str], words: str) -> None:
    assert listed(names) == words


@pytest.mark.parametrize(
    ("us", "words"),
    [(0, "0 s"), (312, "0.3 ms"), (12_300, "12 ms"), (41_234_567, "41.2 s"), (10**9, "1,000 s")],
)
def test_times_are_said(us: int, words: str) -> None:
    assert lasting(us) == words


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (ev.Request(at=0, request="r1", consumer="a"), "Request of r1 for a"),
        (ev.Cancel(at=0, request="r1"), "Cancel of r1"),
        (ev.ServeDone(at=0, request="r1", outcome="timeout"), "ServeDone of r1: timeout"),
        (ev.UnloadDone(at=0, consumer="a", epoch=1), "UnloadDone of a"),
        (ev.SwapDone(at=0, consumer="a", epoch=1, error="timeout"), "SwapDone of a: timeout"),
        (ev.GpuSample(at=0, taken=0, error="no_gpu"), "sample: no_gpu"),
        (ev.Load(at=0, consumer="a"), "Load of a by an operator"),
        (ev.Unload(at=0), "Unload of all by an operator"),
        (ev.Tick(at=0), "time passed"),
        (ev.Drain(at=0), "Drain"),
        (
            ev.ProbeResult(at=0, consumer="a", taken=0, healthy=False, failure="refused"),
            "probe of a: refused",
        ),
        (
            ev.ProbeResult(at=0, consumer="a", taken=0, healthy=True, resident=True, busy=True),
            "probe of a: loaded, at work",
        ),
    ],
)
def test_events_are_said(event: ev.Event, words: str) -> None:
    assert happened(encode_event(event)) == words


def test_a_wait_that_showed_a_leak_says_so() -> None:
    leak = {"type": "Leaky", "consumer": "a", "expected_mib": 12_000, "freed_mib": 30}
    words = happened(encode_event(ev.Tick(at=0)), [leak, {"type": "PlannedAnew"}])
    assert words == "time passed: a gave 30 of 12,000 MiB"


def test_a_cold_start_waits_for_room_only() -> None:
    core = Recording(service("llm", 20_000), lazy("pictures", 8_000), absent=["pictures"])
    core.sample(free=3_700)
    core.request("r1", "pictures")
    core.unloaded("llm")
    assert core.sample(free=23_700) == ["serve r1"]
    assert [words for _, words, _ in core.told("r1")] == [
        "for llm to be unloaded",
        "for the memory of llm to be seen free",
    ]
