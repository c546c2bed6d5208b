"""What a log holds can be read back as it was, and anything else is refused with its place."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from mgpu_core import codec
from mgpu_core import events as ev
from mgpu_core.codec import CodecError
from mgpu_core.config import Gpu, config_of
from mgpu_core.effects import StartUnload
from tests.core.driver import Core, lazy, service

TWO_CARDS = (Gpu(total_mib=24_000), Gpu(index=1, total_mib=24_000, max_parallel=None))
CONFIG = config_of(
    service("a", 8_000, can_coexist_with=("b",), idle_unload_us=5),
    lazy("b", vram_mib={0: 1, 1: 2}, pinned=True),
    gpus=TWO_CARDS,
)
READING = ev.GpuReading(index=1, total_mib=3, used_mib=2, free_mib=1)
EVENTS = (
    ev.Started(at=1, run="run-1"),
    ev.Request(at=2, request="r", consumer="a", kind="k", priority=3, deadline=4),
    ev.Request(at=2, request="r", consumer="a"),
    ev.Cancel(at=3, request="r"),
    ev.ServeDone(at=4, request="r", outcome="upstream_error"),
    ev.UnloadDone(at=5, consumer="a", epoch=6, error="timeout"),
    ev.SwapDone(at=6, consumer="a", epoch=7, error=None),
    ev.Unload(at=7, consumers=("a", "b"), force=True),
    ev.Load(at=8, consumer="a", only_if_free=True),
    ev.GpuSample(at=9, taken=8, gpus=(READING,)),
    ev.GpuSample(at=9, taken=8, gpus=(), error="sampler_failed"),
    ev.ProbeResult(at=10, consumer="a", taken=9, healthy=True, resident=False, vram_mib=7),
    ev.ProbeResult(at=10, consumer="a", taken=9, healthy=False, failure="refused", error="e"),
    ev.Pin(at=11, consumer="a", pinned=False),
    ev.Reconfigured(at=12, config=CONFIG),
    ev.Tick(at=13),
    ev.Drain(at=14),
    ev.Resume(at=15),
    ev.Shutdown(at=16),
)


def through_json(encoded: Any) -> Any:
    return json.loads(json.dumps(encoded))


def played() -> Core:
    """A history with something of everything in it: swaps, waits, promises, cards, failures."""
    core = Core(
        service("a", 20_000, max_pending=2, can_coexist_with=("far",)),
        service("b", 20_000),
        lazy("far", vram_mib={1: 9_000}),
        service("refused", 1_000, driver="process"),
        gpus=TWO_CARDS,
        absent=["b"],
    )
    core.sample(free=4_000, free1=20_000)
    core.use("r1", "a")
    for request in ("r2", "r3", "r4"):
        core.request(request, "a")
    core.request("image", "far")
    core.request("r5", "b")
    core.cancel("r3")
    core.finish("r2")
    core.unloaded("a", error="unload_failed")
    core.probe("refused", failure="refused")
    core.unload("refused", "a")
    core.request("r6", "ghost", priority=4)
    return core


def test_every_kind_of_event_is_tried_here() -> None:
    assert {type(event).__name__ for event in EVENTS} == set(codec.EVENTS)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_read_back_as_it_was(event: ev.Event) -> None:
    encoded = codec.encode_event(event)
    assert "at" not in encoded
    assert codec.decode_event(through_json(encoded), event.at) == event


def test_what_a_history_left_is_read_back_as_it_was() -> None:
    core = played()
    for effect in core.effects:
        assert codec.decode_effect(through_json(codec.encode_effect(effect))) == effect
    for note in core.notes:
        encoded = through_json(codec.encode_note(note))
        assert codec.decode_note(encoded) == note
    assert codec.decode_config(through_json(codec.encode_config(CONFIG))) == CONFIG
    assert codec.decode_state(through_json(codec.encode_state(core.state))) == core.state


def test_the_names_in_a_log_are_those_of_the_contract() -> None:
    cancel, unload = ev.Cancel(at=1, request="r"), StartUnload(consumer="a", epoch=3, how="driver")
    assert codec.encode_event(cancel) == {"type": "Cancel", "request": "r"}
    assert codec.encode_effect(unload) == {
        "type": "StartUnload",
        "consumer": "a",
        "epoch": 3,
        "how": "driver",
    }
    core = Core(service("a", max_pending=1))
    core.request("r1", "a")
    core.request("r2", "a")
    waits = codec.encode_note(core.last_notes[-1])
    assert list(waits)[:3] == ["type", "request", "consumer"]
    assert waits["code"] == "overloaded"
    assert codec.encode_event(EVENTS[9])["gpus"] == [
        {"index": 1, "total_mib": 3, "used_mib": 2, "free_mib": 1}
    ]
    assert codec.encode_config(CONFIG)["consumers"]["b"]["vram_mib"] == {"0": 1, "1": 2}


def event(**fields: Any) -> Callable[[], object]:
    return lambda: codec.decode_event(fields, 1)


def config(**fields: Any) -> Callable[[], object]:
    return lambda: codec.decode_config({"consumers": {}, **fields})


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (event(type="Nothing"), "event.type: 'Nothing' is none of Cancel, Drain, GpuSample, "),
        (event(request="r"), "event.type: None is none of Cancel, "),
        (event(type=["Tick"]), r"event.type: \['Tick'\] is none of Cancel, "),
        (lambda: codec.decode_effect({"type": "Tick"}), "effect.type: 'Tick' is none of Probe, "),
        (lambda: codec.decode_effect([]), "effect: expected an object, got list"),
        (event(type="Cancel"), "Cancel: field 'request' is missing"),
        (event(type="Tick", x=1, b=2), "Tick: unknown field 'b'"),
        (event(type="Cancel", request=1), "Cancel.request: expected str, got 1"),
        (event(type="Load", consumer="a", only_if_free=1), "Load.only_if_free: expected bool, got"),
        (event(type="Unload", consumers="ab"), "Unload.consumers: expected a list, got 'ab'"),
        (event(type="Unload", consumers=["a", 2]), r"Unload.consumers\[1\]: expected str, got 2"),
        (
            event(type="ServeDone", request="r", outcome="fine"),
            "ServeDone.outcome: expected one of ok, .*, got 'fine'",
        ),
        (
            event(type="ServeDone", request="r", outcome=1),
            "ServeDone.outcome: expected one of ok, .*, got 1",
        ),
        (
            event(type="Request", request="r", consumer="a", priority="high"),
            r"Request.priority: expected int \| None, got 'high'",
        ),
        (
            event(type="GpuSample", taken=1, gpus=[{"index": 0}]),
            r"GpuSample.gpus\[0\]: field 'free_mib' is missing",
        ),
        (
            event(type="GpuSample", taken=1, gpus=[7]),
            r"GpuSample.gpus\[0\]: expected an object, got int",
        ),
        (config(gpus=[]), r"config.gpus: expected an object, got \[\]"),
        (config(gpus={"x": {}}), "config.gpus: keys are ints"),
        (config(gpus={"0": {"index": "0"}}), "config.gpus.0.index: expected int, got '0'"),
        (lambda: codec.decode_state({}), "state: field 'config' is missing"),
    ],
)
def test_anything_else_is_refused_with_its_place(
    decode: Callable[[], object], message: str
) -> None:
    with pytest.raises(CodecError, match=f"^{message}"):
        decode()
